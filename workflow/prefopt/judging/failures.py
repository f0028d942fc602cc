"""What a call to an endpoint came to when it failed, as one sentence that a user can act on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import openai

from prefopt.judging.answers import error_words
from prefopt.judging.server_text import one_line

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def failure(error: openai.OpenAIError, key_env: str | None, timeout: float, retries: int) -> str:
    """The rest of a sentence that begins with the endpoint and its model.

    Args:
        error: what the client raised.
        key_env: environment variable that holds the key; None: the server wants none.
        timeout: seconds that a call may take.
        retries: how often it was made again.
    """
    said, kept = words(error), "verdicts so far are kept"
    status = error.status_code if isinstance(error, openai.APIStatusError) else 0
    if isinstance(error, openai.APITimeoutError):
        return (
            f"no reply within {timeout:g} s in {retries + 1} attempts; {kept}, run again or raise "
            f"judge.chat.timeout{from_environment()}."
        )
    if isinstance(error, openai.APIConnectionError):
        return f"the endpoint cannot be reached ({said}); check judge.chat.base_url{from_environment()}; {kept}."
    if 300 <= status < 400 and isinstance(error, openai.APIStatusError):
        where = one_line(error.response.headers.get("location", "somewhere else"), 200)
        return (
            f"the endpoint sends its callers on to {where} (status {status}), which is not followed, since prompts and "
            f"key would go there: give the right address in judge.chat.base_url{from_environment()}."
        )
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        wanted = f"the environment variable {key_env}" if key_env else "judge.chat.api_key_env, null now"
        return f"the key was refused ({said}); check {wanted}."
    if isinstance(error, openai.NotFoundError):
        return (
            f"the endpoint does not serve this model, which may be retired ({said}); name another in judge.chat.model, "
            f"check judge.chat.base_url, or replay recorded verdicts with judge.kind 'recorded'."
        )
    if status == 407:
        return f"the proxy refused the call ({said}){from_environment()}."
    if isinstance(error, openai.RateLimitError | openai.InternalServerError):
        return (
            f"still refused after {retries} retries ({said}); {kept}, run again later or lower "
            f"judge.chat.requests_per_minute."
        )
    return f"the call cannot succeed ({said}); {kept}."


def words(error: openai.OpenAIError) -> str:
    """What the endpoint said, or else what went wrong on the way to it."""
    if isinstance(error, openai.APIStatusError):
        said = error_words(error.body)
        return f"status {error.status_code}: {said}" if said else f"status {error.status_code} without a word"
    causes = [str(cause) or type(cause).__name__ for cause in _chain(error)]
    # The last says most: the client's own "Connection error." hides a name that is not known, or a certificate.
    return one_line(": ".join(dict.fromkeys([causes[0].rstrip("."), causes[-1]])))


def from_environment() -> str:
    """Which variables that lead a call elsewhere are set, as the end of a sentence; never their values."""
    names = [name for plain in _PROXIES for name in (plain, plain.lower())] + list(_CERTIFICATES)
    found = [name for name in names if os.environ.get(name)]
    return f", and what the environment's {', '.join(found)} say" if found else ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
