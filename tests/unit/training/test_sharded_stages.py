"""Sampling, scoring and judging in shards: the gathered table is that of one job, to the last bit.

Here for the tiny task's models. Blocks are made small, so that there are more than shards, and fewer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from llmock.pytest_plugin import LLMock
from llmock.scenarios import Match, Reply

from prefopt.cli import main
from prefopt.experiment import targets
from prefopt.generation import sample, score
from prefopt.judging import reward_model, stage
from prefopt.lm.models import new_scorer, save_model
from prefopt.rewards import learned
from prefopt.rewards import stage as rewards_stage
from prefopt.store.tables import read_manifest, read_table, write_table
from tiny_task import Task

SAMPLING = {
    **{"temperatures": [0.0, 0.7, 1.0], "stop": [" shop"], "n": 3, "max_new_tokens": 6, "train_prompts": 12},
    **{"validation_prompts": 4, "test_prompts": 0, "token_budget": 64, "dtype": "float32", "seed": 0, "vllm": None},
}
FACTS = json.dumps(
    {
        **{"event": "my sister anna broke the old guitar", "setting": "it happened at the wedding on friday"},
        **{"cause": "because of the noise", "feeling": "i feel ashamed", "question": "should i call the landlord"},
        "distractors": ["my neighbor mark sold the red bicycle", "my boss feels proud"],
    }
)
# Prompts of a sampled block: 9 at temperature 0, 3 at the others, so that there are 2 + 6 + 6 blocks.
BLOCKS = 14
CHAT = Match(path="*/chat/completions")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_COMPLETIONS_AT_ONCE", 9)
    monkeypatch.setattr(rewards_stage, "_TEXTS_AT_ONCE", 10)
    for module in (stage, reward_model):
        monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 3)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What models are given at once, call by call: the tiny ones' numbers hardly show with what a text was read."""
    calls: set[str] = set()

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(model: Any, rows: Any, *args: Any, **options: Any) -> Any:
            calls.add(f"{name} {rows} {args} {options}")
            return function(model, rows, *args, **options)

        return call

    functions = ((sample, "sample"), (sample, "completion_logprobs"), (score, "score_rows"), (learned, "raw_scores"))
    for module, name in functions:
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    return calls


@pytest.fixture(scope="module")
def prompts(task: Task) -> Path:
    """The tiny task's prompts with hidden facts, so that the oracle can judge."""
    rows = read_table(task.prompts, "prompts")
    path = task.folder / "prompts_with_facts.parquet"
    write_table(path, "prompts", rows.assign(facts=FACTS), tokenizer_hash=read_manifest(task.prompts)["tokenizer_hash"])
    return path


@pytest.fixture(scope="module")
def scorer(task: Task) -> Path:
    model, tokenizer = new_scorer(task.model, seed=1)
    save_model(task.folder / "scorer", model, tokenizer, {})
    return task.folder / "scorer"


@pytest.fixture
def samples(task: Task, prompts: Path, tmp_path: Path) -> Path:
    run(["sample", *sampling(task, prompts)], tmp_path / "samples.parquet")
    return tmp_path / "samples.parquet"


def sampling(task: Task, prompts: Path, **values: Any) -> list[str]:
    policy = ["--model", str(task.model), "--reference-model", str(task.model), "--run", "base"]
    return [*policy, "--prompts", str(prompts), "--recipe", json.dumps({**SAMPLING, **values})]


def judging(task: Task, prompts: Path, samples: Path, **values: Any) -> list[str]:
    recipe = {"order": "random", "seed": 0, "repeat": 0.0, "suffix": "", "token_budget": 64, "chat": None, **values}
    tables = ["--samples", str(samples), "--prompts", str(prompts), "--demonstrations", str(task.demonstrations)]
    return ["judge", *tables, "--recipe", json.dumps(recipe)]


def run(command: Sequence[str], out: Path) -> dict[str, Any]:
    """The manifest of what a stage writes."""
    assert main([*command, "--out", str(out)]) == 0
    return read_manifest(out)


def sharded(command: Sequence[str], count: int, folder: Path) -> tuple[dict[str, Any], list[int]]:
    """The manifest of the table of so many shards, and how many rows each has."""
    parts = [folder / f"{i}-of-{count}.parquet" for i in range(1, count + 1)]
    rows = [run([*command, "--shard", part.stem], part)["rows"] for part in parts]
    return run(["gather", "--parts", *map(str, parts)], folder / f"{count}.parquet"), rows


def lasting(manifest: dict[str, Any]) -> dict[str, Any]:
    """All but what depends on the machine's hour."""
    timed = ("seconds", "device_seconds", "tokens_per_second", "peak_memory_mib")

    def of(used: dict[str, Any]) -> dict[str, Any]:
        return {
            key: {name: of(part) for name, part in value.items()} if key == "by_temperature" else value
            for key, value in used.items()
            if key not in timed
        }

    return {**manifest, "used": of(manifest.get("used", {}))}


def test_samples(task: Task, prompts: Path, tmp_path: Path, read: set[str]) -> None:
    command = ["sample", *sampling(task, prompts)]
    whole = run(command, tmp_path / "whole.parquet")
    assert whole["rows"] == 16 * (1 + 3 + 3) and whole["stopped"] > 0
    assert read_table(tmp_path / "whole.parquet", "samples")["reference_logp"].notna().all()
    at_once = set(read)
    for count in (2, 5, BLOCKS + 6):
        read.clear()
        manifest, rows = sharded(command, count, tmp_path)
        assert read == at_once
        assert lasting(manifest) == lasting(whole) and manifest["used"].keys() == whole["used"].keys()
        assert rows.count(0) == max(0, count - BLOCKS) and sum(rows) == whole["rows"]


def test_scores(prompts: Path, scorer: Path, samples: Path, tmp_path: Path, read: set[str]) -> None:
    recipe = json.dumps({"token_budget": 40, "dtype": "float32"})
    files = ["--model", str(scorer), "--prompts", str(prompts), "--samples", str(samples)]
    whole = run(["score", *files, "--recipe", recipe], tmp_path / "whole.parquet")
    assert whole["rows"] == 112 and read_table(tmp_path / "whole.parquet", "scores")["reward"].nunique() > 90
    at_once = {call for call in read if call.startswith("score_rows")}
    # Of 48 groups, 16 have one completion and 32 have three.
    for count, expected in ((2, [40, 72]), (5, [9, 16, 27, 30, 30])):
        read.clear()
        manifest, rows = sharded(["score", *files, "--recipe", recipe], count, tmp_path)
        assert {call for call in read if call.startswith("score_rows")} == at_once
        assert lasting(manifest) == lasting(whole) and rows == expected


def test_true_rewards(prompts: Path, samples: Path, tmp_path: Path) -> None:
    recipe = json.dumps({"kind": "rule", "max_length": 64, "batch_size": 8, "token_budget": 99})
    command = ["true_rewards", "--prompts", str(prompts), "--samples", str(samples), "--recipe", recipe]
    whole = run(command, tmp_path / "whole.parquet")
    for count in (2, 5):
        manifest, rows = sharded(command, count, tmp_path)
        assert lasting(manifest) == lasting(whole) and all(rows)


@pytest.mark.parametrize("order", ["random", "both"])
def test_verdicts_of_the_oracle(task: Task, prompts: Path, samples: Path, tmp_path: Path, order: str) -> None:
    command = judging(task, prompts, samples, kind="oracle", order=order)
    whole = run(command, tmp_path / "whole.parquet")
    assert whole["rows"] == (224 if order == "both" else 112)
    # 16 prompts in blocks of three are six blocks.
    for count, empty in ((2, 0), (5, 0), (8, 2)):
        manifest, rows = sharded(command, count, tmp_path)
        assert lasting(manifest) == lasting(whole) and rows.count(0) == empty


def test_verdicts_of_a_reward_model(
    task: Task, prompts: Path, scorer: Path, samples: Path, tmp_path: Path, read: set[str]
) -> None:
    pairs = read_table(task.preferences, "preferences")
    gold = tmp_path / "gold.parquet"
    tokenizer_hash = read_manifest(task.preferences)["tokenizer_hash"]
    write_table(gold, "preferences", pairs.assign(split="test"), tokenizer_hash=tokenizer_hash)
    measured = tmp_path / "accuracy.parquet"
    values = json.dumps({"token_budget": 400, "confidence": 0.95})
    run(["judge_accuracy", "--gold-model", str(scorer), "--gold-data", str(gold), "--recipe", values], measured)
    command = [*judging(task, prompts, samples, kind="reward_model", token_budget=400), "--gold-model", str(scorer)]
    command += ["--gold-accuracy", str(measured)]
    read.clear()
    whole = run(command, tmp_path / "whole.parquet")
    at_once = set(read)
    assert whole["used"]["examples"] > 100 and whole["n_held_out"] == 16
    for count in (2, 5):
        read.clear()
        manifest, _ = sharded(command, count, tmp_path)
        assert read == at_once
        assert lasting(manifest) == lasting(whole)


def test_verdicts_of_a_chat_model(task: Task, prompts: Path, samples: Path, tmp_path: Path, llmock: LLMock) -> None:
    llmock.add(Reply(text="Preferred: A", times=None, match=CHAT))
    chat = {
        **{
            "serve": None,
            "base_url": llmock.base_url(),
            "model": "gpt-4o",
            "api_key_env": None,
            "prompt": "tldr_simple",
        },
        **{"temperature": 0.0, "seed": None, "max_tokens": 20, "max_tokens_parameter": "max_tokens"},
        **{"structured_output": False, "parse_retries": 0, "concurrency": 4, "requests_per_minute": None},
        **{"timeout": 5.0, "max_retries": 2, "budget_usd": 1.0, "prices": {"gpt-4o": {"input": 2.0, "output": 8.0}}},
    }
    template = ["--template", str(targets.PROMPTS / "tldr_simple.txt")]

    def command(count: int) -> list[str]:
        store = {"store": str(tmp_path / f"{count}.sqlite")}
        return [*judging(task, prompts, samples, kind="chat", repeat=0.3, chat={**chat, **store}), *template]

    whole = run(command(1), tmp_path / "whole.parquet")
    asked = len(llmock.requests)
    assert whole["repeated"] == whole["repeated_agree"] > 10 and whole["calls_made"] > 60
    manifest, _ = sharded(command(3), 3, tmp_path)
    # Every pair is asked once, whichever shard it is in, and its price is counted once.
    assert len(llmock.requests) - asked == asked + 2  # each shard asks once which models there are
    assert manifest["cost_usd"] == pytest.approx(whole["cost_usd"], rel=1e-12)
    same = {"cost_usd": None, "recipe": None, "made_by": None}
    assert {**lasting(manifest), **same} == {**lasting(whole), **same}


def test_a_shard_that_does_not_exist_is_refused(task: Task, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", *sampling(task, prompts), "--shard", "3-of-2", "--out", "x"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("prefopt sample: --shard is '3-of-2'; allowed: ")


@pytest.mark.parametrize("count", [1, 3])
def test_a_further_temperature_is_sampled_alone(
    task: Task, prompts: Path, samples: Path, read: set[str], tmp_path: Path, count: int
) -> None:
    """Rows of the temperatures that an earlier table has are kept; the table is the one that is made anew."""

    def asked() -> set[str]:
        sampled = (call for call in read if call.startswith("sample "))
        found = {match[1] for call in sampled if (match := re.search(r"'temperature': ([0-9.]+)", call))}
        read.clear()
        return found

    earlier = tmp_path / "earlier.parquet"
    first = run(["sample", *sampling(task, prompts, temperatures=[0.0, 1.0])], earlier)
    read.clear()
    command = ["sample", *sampling(task, prompts), "--earlier", str(earlier)]
    manifest = run(command, tmp_path / "again.parquet") if count == 1 else sharded(command, count, tmp_path)[0]
    whole = read_manifest(samples)
    assert asked() == {"0.7"} and manifest["content_hash"] == whole["content_hash"]
    used = [manifest["used"], whole["used"]]
    assert len({tuple(each[key] for key in ("examples", "tokens", "generated_tokens", "flops")) for each in used}) == 1
    assert manifest["used"]["by_temperature"]["1.0"] == first["used"]["by_temperature"]["1.0"]
    # With other values, of another policy, with the same temperatures or by other packages it is made anew.
    for other in ([*command[:-1], str(samples)], [*sampling_of_other(task, prompts), *command[-2:]]):
        run(other, tmp_path / "other.parquet")
        assert asked() == {"0.0", "0.7", "1.0"}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sample, "package_versions", lambda: {"torch": "0"})
        run(command, tmp_path / "other.parquet")
    assert asked() == {"0.0", "0.7", "1.0"}
    earlier.write_bytes(b"cut off")
    assert run(command, tmp_path / "other.parquet")["content_hash"] == whole["content_hash"]


def sampling_of_other(task: Task, prompts: Path) -> list[str]:
    return ["sample", *sampling(task, prompts, seed=1)]
