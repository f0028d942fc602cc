"""vLLM itself, of an environment of its own: `PREFOPT_VLLM=/path/of/bin/vllm pytest -n 0 tests/vllm`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

import prefopt
from prefopt.errors import UserError
from prefopt.generation.vllm import Server, VLLMRecipe, serving
from prefopt.lm.batching import Row
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import load_policy, save_model
from prefopt.lm.sampling import sample
from prefopt.training.pretrain import train_tokenizer
from tiny_task import WORDS

PROGRAM = os.environ.get("PREFOPT_VLLM")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="PREFOPT_VLLM names no vLLM")

END = 0  # EOS of the tokenizers that are trained here
PROMPTS = [[3], [7, 8, 9], [5] * 20, [11, 12] * 8]
RECIPE = VLLMRecipe(program=PROGRAM, gpus=0)
JOB = """
import sys, pathlib
from prefopt.generation.vllm import VLLMRecipe, serving
with serving(pathlib.Path(sys.argv[1]), VLLMRecipe(program=sys.argv[2], gpus=0), "float32", 64) as server:
    print(server.version, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with some likely tokens and many unlikely ones, an end token among the former."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 300)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.15, **shape)).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0.8 * model.lm_head.weight[40]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    path: Path = tmp_path_factory.mktemp("vllm") / "model"
    save_model(path, model, tokenizer, {})
    return path


@pytest.fixture(scope="module")
def policy(folder: Path) -> Any:
    return load_policy(folder)[0]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, RECIPE, "float32", 64) as one:
        yield one


def asked(server: Server, temperature: float, n: int, steps: int, seed: int = 0) -> Any:
    seeds = [seed + i for i in range(len(PROMPTS))]
    return server.sample(PROMPTS, n=n, temperature=temperature, max_new_tokens=steps, ends=[END], seeds=seeds)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_first_tokens_are_drawn_from_the_models_distribution(server: Server, policy: Any, temperature: float) -> None:
    n = 4000
    for prompt, completions in zip(PROMPTS, asked(server, temperature, n, 1), strict=True):
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([prompt])).logits[0, -1]
        expected = (logits / temperature).softmax(-1).double() * n
        counts = Counter(completion.token_ids[0] for completion in completions)
        kept = [token for token in range(len(expected)) if expected[token] >= 5]
        observed = [counts[token] for token in kept]
        rest, most = n - sum(observed), n - float(expected[kept].sum())
        assert chisquare([*observed, rest], [*expected[kept].tolist(), most]).pvalue > 1e-4


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probabilities_are_those_at_the_temperature(server: Server, policy: Any, temperature: float) -> None:
    for prompt, completions in zip(PROMPTS, asked(server, temperature, 8, 12), strict=True):
        row = Row(prompt, tuple(tuple(one.token_ids) for one in completions))
        with torch.no_grad():
            expected = completion_logprobs(policy, [row], temperature=temperature).tokens
        found = torch.tensor([logp for one in completions for logp in one.logps])
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_the_likeliest_is_the_engines(server: Server, policy: Any) -> None:
    given: dict[str, Any] = {"n": 1, "temperature": 0.0, "max_new_tokens": 12, "ends": [END], "seeds": [0] * 4}
    assert server.sample(PROMPTS, **given) == sample(policy, PROMPTS, **given)


def test_a_completion_holds_its_end_token_and_nothing_behind_it(server: Server) -> None:
    completions = [one for group in asked(server, 1.0, 64, 12) for one in group]
    assert {one.finish_reason for one in completions} == {"eos", "length"}
    for one in completions:
        assert len(one.token_ids) == len(one.logps) and END not in one.token_ids[:-1]
        assert (one.token_ids[-1] == END) == (one.finish_reason == "eos")
        assert one.finish_reason == "eos" or len(one.token_ids) == 12


def test_equal_seeds_give_equal_completions_and_a_prompts_differ(server: Server) -> None:
    first, again, other = (asked(server, 1.0, 8, 12, seed) for seed in (0, 0, 100))
    assert first == again != other
    assert all(len({tuple(one.token_ids) for one in group}) > 4 for group in first)


def test_it_reads_completions_as_the_engine_does(server: Server, policy: Any) -> None:
    completions = [group[0].token_ids for group in asked(server, 1.0, 1, 12)]
    rows = [Row(prompt, (tuple(ids),)) for prompt, ids in zip(PROMPTS, completions, strict=True)]
    with torch.no_grad():
        expected = completion_logprobs(policy, rows).sums.tolist()
    assert server.logps(PROMPTS, completions) == pytest.approx(expected, abs=1e-3)


def processes_of(folder: Path) -> list[psutil.Process]:
    """vLLM's processes that serve a folder, and what these have started."""
    found = [one for one in psutil.process_iter(["cmdline"]) if str(folder) in (one.info["cmdline"] or [])]
    return [*found, *(child for one in found for child in one.children(recursive=True))]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_job_leaves_no_process(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    copy = tmp_path / "copy"
    copy.symlink_to(folder)
    path = {"PYTHONPATH": str(Path(prefopt.__file__).parents[1])}
    words = [sys.executable, "-c", JOB, str(copy), str(PROGRAM)]
    with subprocess.Popen(
        words, env={**os.environ, **path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None and job.stdout.readline().startswith("0.")
        started = [one for one in processes_of(copy) if one.pid != job.pid]
        assert len(started) > 1
        job.send_signal(number)
        job.wait(60)
        _, alive = psutil.wait_procs(started, timeout=60)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_a_model_that_it_refuses_is_told_in_its_words(folder: Path) -> None:
    with (
        pytest.raises(UserError, match=r"is not served: vllm ended .*max_model_len"),
        serving(folder, RECIPE, "float32", 10**6),
    ):
        pass


def test_a_server_that_is_killed_is_told(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.symlink_to(folder)
    with (
        pytest.raises(UserError, match="vLLM ended with the code -9 while it samples"),
        serving(copy, RECIPE, "float32", 64) as one,
    ):
        for process in processes_of(copy):
            process.kill()
        time.sleep(1)
        asked(one, 1.0, 4, 8)
