"""A server that speaks the OpenAI chat protocol, asked through the official client."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any, NoReturn

import openai

from prefopt.errors import UserError
from prefopt.judging.verdict_store import Reply

logger = logging.getLogger(__name__)


class Endpoint:
    """One model of an endpoint.

    The client retries what may pass (429, 5xx, timeouts, lost connections) with growing pauses and waits as long as
    `Retry-After` says; what cannot succeed stops at once. The key is read from the environment and stays in the
    client.

    Args:
        base_url: e.g. "https://api.example.org/v1".
        model: its name there.
        api_key_env: environment variable that holds the key; None: the server wants none.
        timeout: seconds to wait for a reply.
        max_retries: how often a call is made again.
        requests_per_minute: at most so many calls are begun a minute; None: no limit.

    Raises:
        UserError: the variable is not set.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None,
        timeout: float,
        max_retries: int,
        requests_per_minute: float | None,
    ) -> None:
        self._base_url, self._model, self._key_env = base_url, model, api_key_env
        self._timeout, self._retries = timeout, max_retries
        self._key = _key(api_key_env)
        # Without a key the client would look for one in the environment by itself.
        self._client = openai.OpenAI(
            base_url=base_url, api_key=self._key or "none", timeout=timeout, max_retries=max_retries
        )
        self._pause = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def check(self) -> None:
        """Asks once which models there are, so that a wrong key or a retired model is seen before anything is paid.

        A server without such a list is no error: the first call will tell.

        Raises:
            UserError: the key is refused, or the endpoint cannot be reached.
        """
        try:
            models = self._client.with_options(max_retries=1).models.list().data
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.APIConnectionError) as error:
            self._fail(error)
        except openai.OpenAIError as error:
            logger.info("%s lists no models (%s); the first call will tell.", self._base_url, type(error).__name__)
            return
        found = {model.id: model for model in models}
        if self._model not in found:
            logger.warning("%s does not list the model %r; the first call will tell.", self._base_url, self._model)
        elif end := (found[self._model].model_extra or {}).get("shutdown_date"):
            logger.warning("%s will stop serving %r on %s.", self._base_url, self._model, end)

    def ask(self, messages: list[dict[str, str]], parameters: dict[str, Any]) -> Reply:
        """One completion.

        Args:
            messages: role and content of each.
            parameters: further arguments of the call, under the names that this endpoint knows.

        Raises:
            UserError: the call cannot succeed, or did not after all retries; in the endpoint's own words.
        """
        self._wait()
        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=messages,  # type: ignore[arg-type]
                **parameters,
            )
        except openai.OpenAIError as error:
            self._fail(error)
        choice = completion.choices[0] if completion.choices else None
        usage = completion.usage
        return Reply(
            (choice.message.content or "") if choice else "",
            (choice.finish_reason or "") if choice else "",
            completion.model or "",
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
        )

    def _wait(self) -> None:
        """Sleeps until the next call may begin."""
        if not self._pause:
            return
        with self._lock:
            start = max(self._next, time.monotonic())
            self._next = start + self._pause
        time.sleep(max(0.0, start - time.monotonic()))

    def _fail(self, error: openai.OpenAIError) -> NoReturn:
        """Raises what a user can act on. Not `from error`: its trace holds the request with its headers."""
        said = " ".join(str(error).split())
        if self._key:
            said = said.replace(self._key, "***")
        said = said[:500]
        where = f"{self._base_url}, model {self._model!r}"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            wanted = (
                f"the environment variable {self._key_env}" if self._key_env else "judge.chat.api_key_env, null now"
            )
            raise UserError(f"{where}: the key was refused ({said}); check {wanted}.") from None
        if isinstance(error, openai.NotFoundError):
            raise UserError(
                f"{where}: the endpoint does not serve this model, which may be retired ({said}); name another in "
                f"judge.chat.model, or replay recorded verdicts with judge.kind 'recorded'."
            ) from None
        if isinstance(error, openai.APITimeoutError):
            raise UserError(
                f"{where}: no reply within {self._timeout:g} s in {self._retries + 1} attempts; verdicts so far are "
                f"kept, run again or raise judge.chat.timeout."
            ) from None
        if isinstance(error, openai.APIConnectionError):
            raise UserError(
                f"{where}: the endpoint cannot be reached ({said}); check judge.chat.base_url, verdicts so far are kept."
            ) from None
        if isinstance(error, openai.RateLimitError | openai.InternalServerError):
            raise UserError(
                f"{where}: still refused after {self._retries} retries ({said}); verdicts so far are kept, run again "
                f"later or lower judge.chat.requests_per_minute."
            ) from None
        raise UserError(f"{where}: the call cannot succeed ({said}).") from None


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"The environment variable {name}, which holds the judge's key, is not set: export it first.")
    return key
