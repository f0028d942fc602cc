"""The HTTP client below the OpenAI client: what it sends, how long and how much it takes, and what it passes on."""

from __future__ import annotations

import asyncio
import json
from contextvars import ContextVar
from typing import Any

import httpx2
import openai

from prefopt.judging.server_text import harmless

_LONGEST_LIST = 2**23  # bytes of a list of models; those of routers are about a megabyte
_SENT = {
    *("host", "accept", "accept-encoding", "connection", "user-agent"),
    *("content-type", "content-length", "transfer-encoding"),
}
_PASSED_ON = ("content-type", "location", "retry-after", "retry-after-ms", "x-should-retry")
# Of one question: what became of each call that was sent and got no answer. The OpenAI client calls again by itself.
UNANSWERED: ContextVar[list[str]] = ContextVar("unanswered")

_DIGITS = 19  # of an integer that JSON may hold here; longer ones are read as floats


class TooLongError(openai.OpenAIError):
    """An answer that goes on and on."""


class Transport(openai.DefaultAsyncHttpxClient):
    """A client that gives each call a deadline, its answer a largest size, and follows no redirect.

    httpx2's own timeouts are for each read, so that a server that drips never meets one. A call that is too late
    raises `httpx2.ReadTimeout`, which the OpenAI client retries. Proxies and certificates are those of the environment.

    Args:
        key: sent to the endpoint alone, and taken out of all that it answers; None: the server wants none.
        seconds: from the start of a call to the last byte of its answer.
        longest: bytes of an answer.
    """

    def __init__(self, key: str | None, seconds: float, longest: int) -> None:
        super().__init__(follow_redirects=False, timeout=seconds)
        self._key, self._seconds, self._longest = key, seconds, longest

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Sends one request and reads its answer whole; what was sent without an answer goes to `UNANSWERED`.

        Raises:
            TooLongError: the answer is longer than is taken.
        """
        # The OpenAI client adds organization, project and headers of the environment; they are another account's.
        for name in list(request.headers):
            if name.lower() not in _SENT and not name.lower().startswith("x-stainless-"):
                del request.headers[name]
        request.headers["Authorization"] = f"Bearer {self._key or 'none'}"
        sent = False

        async def trace(event: str, info: dict[str, Any]) -> None:
            # A proxy's CONNECT reaches no endpoint, and a list of models (GET) costs nothing.
            nonlocal sent
            sent |= event.endswith(".send_request_body.started") and info["request"].method == b"POST"

        request.extensions = {**request.extensions, "trace": trace}
        try:
            async with asyncio.timeout(self._seconds):
                response = await super().send(request, **{**options, "stream": True, "follow_redirects": False})
                try:
                    body = await self._read(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            _note(sent, "the answer took too long")
            raise httpx2.ReadTimeout("the answer took too long", request=request) from None
        except openai.OpenAIError:
            raise
        except httpx2.RequestError as error:
            _note(sent, str(error) or type(error).__name__)
            raise
        except Exception as error:
            # What the libraries below let through: a port that is none, a proxy's address, a broken TLS record.
            cause: BaseException = error
            while isinstance(cause, BaseExceptionGroup):
                cause = cause.exceptions[0]
            _note(sent, f"{type(cause).__name__}: {cause}")
            raise httpx2.TransportError(f"{type(cause).__name__}: {cause}", request=request) from None
        status, text = _checked(response.status_code, body.decode("utf-8-sig", "replace"), self._key)
        headers = {name: response.headers[name] for name in _PASSED_ON if name in response.headers}
        return httpx2.Response(status, headers=headers, content=text.encode(), request=request)

    async def _read(self, response: httpx2.Response) -> bytes:
        longest = _LONGEST_LIST if response.request.method == "GET" else self._longest
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > longest:
                raise TooLongError(f"the answer is longer than {longest:,} bytes")
        return bytes(body)


def _note(sent: bool, what: str) -> None:
    if sent:
        UNANSWERED.get().append(what)


def _checked(status: int, text: str, key: str | None) -> tuple[int, str]:
    """An answer without the key, also where JSON's escapes hide it.

    An error that comes with status 200 gets the status that it names, or else 400, so that it is retried or raised as
    any other.
    """
    try:
        value = json.loads(text, parse_int=lambda digits: (int if len(digits) <= _DIGITS else float)(digits))
        plain = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        return status, harmless(text, key)
    if 200 <= status < 300 and isinstance(value, dict) and value.get("error") and not value.get("choices"):
        status = _status_of(value["error"])
    return status, harmless(plain, json.dumps(key, ensure_ascii=False)[1:-1] if key else None)


def _status_of(error: Any) -> int:
    code = error.get("code") if isinstance(error, dict) else None
    try:
        status = int(code)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 400
    return status if 400 <= status < 600 else 400
