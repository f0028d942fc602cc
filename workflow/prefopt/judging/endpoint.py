"""A server that speaks the OpenAI chat protocol, asked through the official client."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

import httpx2
import openai

from prefopt.errors import UserError
from prefopt.judging.answers import estimated_tokens, listed_models, read_completion
from prefopt.judging.failures import failure, from_environment, words
from prefopt.judging.server_text import harmless, one_line
from prefopt.judging.transport import UNANSWERED, TooLongError, Transport
from prefopt.judging.verdict_store import REFUSED, UNREADABLE, Reply

_BYTES_PER_TOKEN = 16  # at most, of a reply in JSON
_BYTES_BESIDE = 2**20  # of an answer, beside its reply

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Endpoint:
    """One model of an endpoint.

    The client retries what may pass (429, 5xx, timeouts, lost connections) with growing pauses and waits as long as
    `Retry-After` says; what cannot succeed stops at once. The key is read from the environment and stays in the
    client; nothing else of the environment is sent.

    Args:
        base_url: e.g. "https://api.example.org/v1".
        model: its name there.
        api_key_env: environment variable that holds the key; None: the server wants none.
        timeout: seconds to wait for a reply, from the start of a call to its last byte.
        max_retries: how often a call is made again.
        requests_per_minute: at most so many calls are begun a minute; None: no limit.
        max_tokens: longest reply that will be asked for; an answer that is much longer is not taken.

    Raises:
        UserError: the variable is not set or holds no key, or the environment's proxies or certificates cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None,
        timeout: float,
        max_retries: int,
        requests_per_minute: float | None,
        max_tokens: int,
    ) -> None:
        self._base_url, self._model, self._key_env = base_url, model, api_key_env
        self._timeout, self._retries, self._max_tokens = timeout, max_retries, max_tokens
        self._key = _key(api_key_env)
        try:
            transport = Transport(self._key, timeout, _BYTES_BESIDE + _BYTES_PER_TOKEN * max_tokens)
            # Without a key the client would look for one in the environment by itself.
            self._client = openai.AsyncOpenAI(
                base_url=base_url,
                api_key=self._key or "none",
                timeout=timeout,
                max_retries=max_retries,
                http_client=transport,
            )
        except (ValueError, OSError, ImportError, openai.OpenAIError) as error:
            # Not in its own words: they may hold a proxy's password.
            raise UserError(
                f"{base_url}: no client can be made ({type(error).__name__}); check judge.chat.base_url"
                f"{from_environment()}."
            ) from None
        # Calls run in one loop beside the threads that wait for them, since only there a call can be given a deadline.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True).start()
        self._pause = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        self._answered = self._estimating = False

    def check(self) -> None:
        """Asks once which models there are, so that a wrong key or a retired model is seen before anything is paid.

        A server without such a list, or with one of another shape, is no error: the first call will tell.

        Raises:
            UserError: the key is refused, or the endpoint cannot be reached.
        """
        found: dict[str, str] = {}
        try:
            found, reason = listed_models(self._run(self._list())), "the answer is no list of models"
        except openai.APITimeoutError as error:
            reason = words(error)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.APIConnectionError) as error:
            self._fail(failure(error, self._key_env, self._timeout, 1))
        except openai.OpenAIError as error:
            reason = words(error)
        if not found:
            logger.info("%s lists no models (%s); the first call will tell.", self._base_url, self._clean(reason))
        elif self._model not in found:
            logger.warning("%s does not list the model %r; the first call will tell.", self._base_url, self._model)
        elif end := found[self._model]:
            logger.warning("%s will stop serving %r on %s.", self._base_url, self._model, end)

    def ask(
        self,
        messages: list[dict[str, str]],
        parameters: dict[str, Any],
        about: str,
        lost: Callable[[Reply], None],
    ) -> Reply:
        """One completion.

        Args:
            messages: role and content of each.
            parameters: further arguments of the call, under the names that this endpoint knows.
            about: what the call is about, for messages.
            lost: takes each call that gave no reply and may have been billed, as a whole reply.

        Returns:
            What was answered, whatever it holds. A call that the endpoint refuses to answer, and bills nothing for,
            gives `REFUSED` and its words; an answer that cannot be read, after others that could, `UNREADABLE`.

        Raises:
            UserError: the call cannot succeed, or did not after all retries; in the endpoint's own words.
        """
        self._wait()
        unanswered: list[str] = []
        try:
            response = self._run(self._create(messages, parameters, unanswered))
        except TooLongError as error:
            return self._unreadable(str(error), messages, about, lost)
        except openai.OpenAIError as error:
            if self._refuses_this_one(error):
                return Reply(self._clean(words(error)), REFUSED, "", 0, 0)
            self._fail(failure(error, self._key_env, self._timeout, self._retries), about)
        finally:
            for said in unanswered:
                lost(self._billed(said, messages))
            if unanswered:
                logger.warning(
                    "%s, model %r, %s: %d calls were sent and not answered (%s); each counts as billed whole.",
                    *(self._base_url, self._model, about, len(unanswered), self._clean(unanswered[-1])),
                )
        text = response.text
        read = read_completion(text, messages, self._max_tokens)
        if read is None:
            kind = one_line(response.headers.get("content-type", "of no type"), 80)
            return self._unreadable(f"{kind}: {one_line(text, 200) or 'nothing'}", messages, about, lost)
        reply, odd = read
        self._answered = True
        with self._lock:
            if odd and not self._estimating:
                self._estimating = True
                logger.warning(
                    "%s, model %r, reports no tokens that can be counted (%s): they are estimated from the texts, "
                    "rather too many, here and wherever else this occurs.",
                    *(self._base_url, self._model, odd),
                )
        return reply

    async def _create(
        self, messages: list[dict[str, str]], parameters: dict[str, Any], unanswered: list[str]
    ) -> httpx2.Response:
        UNANSWERED.set(unanswered)
        answer = await self._client.chat.completions.with_raw_response.create(
            model=self._model,
            messages=messages,  # type: ignore[arg-type]
            **parameters,
        )
        return answer.http_response

    async def _list(self) -> str:
        answer = await self._client.with_options(max_retries=1).models.with_raw_response.list()
        return answer.http_response.text

    def _run(self, call: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def _wait(self) -> None:
        """Sleeps until the next call may begin."""
        if not self._pause:
            return
        with self._lock:
            start = max(self._next, time.monotonic())
            self._next = start + self._pause
        time.sleep(max(0.0, start - time.monotonic()))

    def _refuses_this_one(self, error: openai.OpenAIError) -> bool:
        """Whether it may be this pair that is refused, for its content or length, and not every call."""
        status = error.status_code if isinstance(error, openai.APIStatusError) else 0
        return status in (400, 413, 422) or (status == 403 and self._answered)

    def _unreadable(
        self, said: str, messages: list[dict[str, str]], about: str, lost: Callable[[Reply], None]
    ) -> Reply:
        """An answer that is none of the chat protocol; before any that is, it may be the address, and ends the stage."""
        reply = self._billed(said, messages)
        if not self._answered:
            lost(reply)
            self._fail(
                f"the answer is none of the chat protocol ({said}); check judge.chat.base_url, which as a rule ends "
                f"with /v1{from_environment()}.",
                about,
            )
        return reply

    def _billed(self, said: str, messages: list[dict[str, str]]) -> Reply:
        """A call without a reply; it may have been billed, so that it counts as a whole one."""
        asked = sum(len(message["content"].encode()) for message in messages)
        return Reply(self._clean(said), UNREADABLE, "", estimated_tokens(asked), self._max_tokens)

    def _clean(self, text: str) -> str:
        return one_line(harmless(text, self._key))

    def _fail(self, said: str, about: str | None = None) -> NoReturn:
        """Raises what a user can act on. Not `from error`: its trace holds the request with its headers."""
        where = f"{self._base_url}, model {self._model!r}{f', {about}' if about else ''}"
        raise UserError(f"{where}: {one_line(harmless(said, self._key), 1200)}") from None


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"The environment variable {name}, which holds the judge's key, is not set: export it first.")
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(
            f"The environment variable {name} holds no key: there are spaces, line ends or letters beyond ASCII in it."
        )
    return key
