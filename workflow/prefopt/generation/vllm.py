"""Sampling by vLLM: a server that a job starts for itself, perhaps over several GPUs, and ends when it has sampled.

What is asked for means what it means to `lm.sampling`: the model's whole distribution, the same end tokens, a seed for each
prompt, token ids in and out. The numbers that are drawn are others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import logging
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal

from prefopt.errors import UserError
from prefopt.lm.sampling import Completion
from prefopt.runtime.server import HOST, program_of, started, vllm_words

logger = logging.getLogger(__name__)

_AT_ONCE = 256  # requests; the server queues what it has no room for
_ENDS_WITHIN = 5.0  # seconds from a broken connection to the end of the server that broke it
_NAME = "policy"  # of the model, to the server
_ERROR = re.compile(r"\b\w*Error: .+")
# Whatever a model's generation config says: nothing is left out of the distribution and no token made less likely.
_PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLLMRecipe:
    """Where vLLM is and what it may use."""

    program: str | None  # None: the one that is installed
    gpus: int  # over which the model is spread; 0 is the CPU


class Server:
    """A vLLM server of one model.

    Args:
        process: its own.
        url: where it listens.
        log: what it writes.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
        self._process, self._address, self._log = process, url.removeprefix("http://"), log

    @property
    def version(self) -> str:
        """vLLM's."""
        return str(self._ask("GET", "/version")["version"])

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        temperature: float,
        max_new_tokens: int,
        ends: Sequence[int],
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """Completions as `lm.sampling.sample` gives them; errors are those of `logps`."""
        request = {
            **{"n": n, "temperature": temperature, "max_tokens": max_new_tokens, **_PLAIN},
            **{"stop_token_ids": list(ends), "logprobs": 0, "return_token_ids": True},
        }
        answers = self._ask_all(
            {**request, "prompt": list(prompt), "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)
        )
        return [[_completion(choice, temperature, ends) for choice in answer["choices"]] for answer in answers]

    def logps(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        """Log-probability of a completion of each prompt at temperature 1.

        Raises:
            UserError: the server ended, or refused a prompt.
        """
        whole = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        answers = self._ask_all({"prompt": ids, "prompt_logprobs": 0, "max_tokens": 1, **_PLAIN} for ids in whole)
        return [
            sum(
                each[str(token)]["logprob"]
                for token, each in zip(completion, answer["choices"][0]["prompt_logprobs"][len(prompt) :], strict=True)
            )
            for prompt, completion, answer in zip(prompts, completions, answers, strict=True)
        ]

    def _ask_all(self, requests: Iterator[dict[str, Any]]) -> list[Any]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            asked = [pool.submit(self._ask, "POST", "/v1/completions", request) for request in requests]
            try:
                return [one.result() for one in asked]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        # A connection each: what is asked takes seconds. No proxy of the environment stands between.
        connection = http.client.HTTPConnection(self._address)
        try:
            text = None if body is None else json.dumps({"model": _NAME, **body})
            connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDS_WITHIN)
            code = self._process.returncode
            raise UserError(
                f"vLLM {'does not answer' if code is None else f'ended with the code {code}'} while it samples "
                f"({type(error).__name__}): {last_words(self._log)}."
            ) from error
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise UserError(f"vLLM refuses what is asked (status {answer.status}): {said[:800]}")
        return json.loads(said)


def _completion(choice: dict[str, Any], temperature: float, ends: Sequence[int]) -> Completion:
    ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    return Completion(ids, logps if temperature > 0 else [0.0] * len(ids), "eos" if ids[-1] in ends else "length")


@contextlib.contextmanager
def serving(folder: Path, recipe: VLLMRecipe, dtype: Literal["float32", "bfloat16"], longest: int) -> Iterator[Server]:
    """A server that ends with the context, and with this process however it ends.

    Args:
        folder: of the model.
        recipe: where vLLM is and what it may use.
        dtype: of weights and passes.
        longest: most tokens of a prompt with its completion.

    Raises:
        UserError: vLLM is not installed, or ended before it served the model, in its own last words.
    """
    # On a CPU vLLM 0.32 ends where a prompt with a seed of its own is read in parts.
    whole = [] if recipe.gpus else ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(longest, 8192))]
    program = program_of("vllm", recipe.program, "sampling.vllm.program")

    def command(port: int) -> list[str]:
        return [
            *(program, "serve", str(folder), "--served-model-name", _NAME, "--host", HOST, "--port", str(port)),
            *("--dtype", dtype, "--max-model-len", str(longest), "--generation-config", "vllm"),
            # Log-probabilities at the temperature of the sampling.
            *("--logprobs-mode", "processed_logprobs", *vllm_words(recipe.gpus), *whole),
        ]

    with tempfile.TemporaryFile() as log, contextlib.ExitStack() as stack:
        try:
            process, url = started(command, "vllm", stack, log)
        except UserError as error:
            raise UserError(f"{folder} is not served: {error} Its last words: {last_words(log)}") from error
        server = Server(process, url, log)
        logger.info("vLLM %s serves %s", server.version, folder)
        yield server


def last_words(log: IO[bytes]) -> str:
    """The error that came first in a log, else its last line; it is written to this process's log."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    logger.info("vLLM said:\n%s", "\n".join(lines[-200:]))
    # Each line begins with a process, a level, an hour and a place. Errors that come later are of those who waited for it.
    first = next((place for place, line in enumerate(lines) if _ERROR.search(line) and "WARNING" not in line), None)
    if first is None:
        return lines[-1][:800] if lines else "none"
    # What pydantic finds wrong stands in the next line.
    found, more = _ERROR.findall(lines[first])[0], lines[first + 1 : first + 2]
    return " ".join([found, *(more if "validation error" in found else [])])[:800]
