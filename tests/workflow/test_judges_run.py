"""The win-rate table of the embedded task through servers that speak the OpenAI protocol."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from llmock.pytest_plugin import LLMock
from llmock.scenarios import Delay, Fail, Match, Reply
from running import TINY, only, overlay, snakemake

from prefopt.judging.verdict_store import VerdictStore

pytestmark = pytest.mark.workflow

CHAT = Match(path="*/chat/completions")
WIN_RATES = "results/tldr_winrates.csv"


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, in which only the judge changes."""
    return shutil.copytree(finished, tmp_path / "copy", symlinks=True)


def chat_judge(folder: Path, base_url: str, kind: str = "chat", **changes: Any) -> Path:
    chat = {
        **{"base_url": base_url, "model": "gpt-4o", "api_key_env": None, "prompt": "tldr_concise", "max_tokens": 20},
        **{"max_retries": 10, "parse_retries": 1, "prices": {"gpt-4o": {"input": 2.0, "output": 8.0}}, **changes},
    }
    judge = {"kind": kind, "order": "both", "repeat": 0.2, "chat": chat}
    return overlay(folder.parent, {"tasks": {"tldr": {"judge": judge, "other_judges": {"gold": None}, "human": None}}})


def test_the_table_through_an_endpoint_with_faults(folder: Path, llmock: LLMock) -> None:
    llmock.add(
        *(Fail(429, retry_after=0.1, times=3, match=CHAT), Fail(503, times=2, match=CHAT)),
        Reply(text="Comparison: it is the first.\nPreferred: A", times=None, match=CHAT),
    )
    config = chat_judge(folder, llmock.base_url())
    targets = [WIN_RATES, "results/candidates/tldr_curve.csv"]
    # One job at a time: the server takes equal requests of two jobs for hasty retries.
    result = snakemake("--cores", "1", *targets, "--configfile", TINY, config, folder=folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    llmock.assert_resilient()
    table = pd.read_csv(folder / WIN_RATES)
    assert table["judge"].str.startswith("chat:gpt-4o/tldr_concise@").all()
    # A judge that always names the first text: every pair flips, and is a tie.
    assert (table["flip_rate"] == 1).all() and (table["first_position_rate"] == 1).all()
    assert (table["win_rate"] == 0.5).all() and (table["self_agreement"] == 1).all()
    assert (table["cost_usd"] > 0).all()
    manifest = json.loads((folder / "results/tldr_winrates.manifest.json").read_text())
    assert manifest["template"]["name"] == "tldr_concise" and manifest["cost_usd"] > 0
    # The curve rests on seeded subsets.
    curve = pd.read_csv(folder / targets[1])
    judged = pd.read_parquet(folder / "results/candidates/tldr_verdicts.parquet")
    every = pd.read_parquet(folder / "results/candidates/tldr.parquet")
    assert len(judged) // 2 < len(every) / 2 and sorted(curve["n"].unique()) == [1, 4]
    # Recorded, it needs no endpoint.
    again = chat_judge(folder, llmock.base_url(), kind="recorded")
    before = len(llmock.requests)
    result = snakemake("--cores", "2", WIN_RATES, "--configfile", TINY, again, folder=folder)
    assert result.returncode == 0, result.stderr[-6000:]
    assert len(llmock.requests) == before
    recorded = pd.read_csv(folder / WIN_RATES)
    assert recorded["judge"].str.startswith("recorded:").all()
    pd.testing.assert_frame_equal(recorded.drop(columns="judge"), table.drop(columns="judge"))


def test_a_killed_judge_pays_only_for_what_is_missing(folder: Path, llmock: LLMock) -> None:
    llmock.add(Delay(0.05, times=None, match=CHAT), Reply(text="Preferred: B", times=None, match=CHAT))
    config = chat_judge(folder, llmock.base_url(), concurrency=4)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(folder / "Snakefile"), "--cores", "2", WIN_RATES]
    arguments = [*command, "--configfile", str(TINY), str(config)]
    with subprocess.Popen(
        arguments, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        store = folder / "verdicts.sqlite"
        deadline = time.monotonic() + 120
        while not (store.exists() and len(VerdictStore(store).export()) >= 30):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        for job in psutil.process_iter(["cwd"]):
            if job.info["cwd"] == str(folder):
                job.kill()
        process.wait()
    kept = len(VerdictStore(store).export())
    made = sum("chat" in record.path for record in llmock.requests)
    assert kept <= made <= kept + 2 * 4  # two jobs with four calls in flight
    llmock.add(Delay(0.0, times=None, match=CHAT))
    result = snakemake("--cores", "2", "--rerun-incomplete", WIN_RATES, "--configfile", TINY, config, folder=folder)
    if "Directory cannot be locked" in result.stderr + result.stdout:
        snakemake("--unlock", "--configfile", TINY, config, folder=folder)
        result = snakemake("--cores", "2", "--rerun-incomplete", WIN_RATES, "--configfile", TINY, config, folder=folder)
    assert result.returncode == 0, result.stderr[-6000:]
    whole = len(VerdictStore(store).export())
    final = sum("chat" in record.path for record in llmock.requests)
    assert whole > kept and final - made == whole - kept
    assert pd.read_csv(folder / WIN_RATES)["judge"].str.startswith("chat:").all()


def test_people_can_judge_the_table(folder: Path) -> None:
    """Here simulated ones: SFT's completions against the references of all test prompts, by the majority of three."""
    side = {"run": "sft", "temperature": 1.0}
    matchup = {"first": side, "second": {"run": "reference"}, "items": 8, "raters_per_item": 3}
    raters = {"noise": 0.1, "length_bias": 0.0, "indifference": 0.0, "careless": 0.0}
    tldr = {
        **{
            "judge": {"kind": "human"},
            "other_judges": {"gold": {"kind": "oracle"}},
            "runs": {**only("tldr", "sft"), "best_of_4": None},
        },
        **{"sampling": {"temperatures": [1.0]}, "human": {"matchups": [matchup], "simulated_raters": raters}},
    }
    config = overlay(folder.parent, {"tasks": {"tldr": tldr, "cnndm": None}})
    targets = [WIN_RATES, "results/human_agreement.csv"]
    # The samples at other temperatures were made already, with equal ones at this one.
    result = snakemake("--cores", "2", *targets, "--configfile", TINY, config, folder=folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    table = pd.read_csv(folder / WIN_RATES)
    assert table["judge"].str.startswith("human:simulated-").all() and table["n"].tolist() == [8]
    assert table["selected"].tolist() == [True] and table["losses"].item() >= 6  # a toy model writes no summary
    people = pd.read_csv(folder / "results/human_agreement.csv")
    assert people["judge"].tolist() == ["simulated raters", "gold"]
    assert people["agreement"].min() > 0.8


@pytest.fixture
def small_judge(tmp_path: Path) -> Path:
    """A tiny random chat model: real generation, which never says anything sensible."""
    pytest.importorskip("fastapi")
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a b c"], vocab_size=260, special_tokens=["<eos>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(fast), max_position_embeddings=4096, eos_token_id=fast.eos_token_id, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "judge")
    fast.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def test_the_table_through_a_judge_that_the_jobs_serve(
    folder: Path, small_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`transformers serve`, started by the first job and shared by all; `recorded` then needs none."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    limits = {"max_tokens": 6, "parse_retries": 0, "budget_usd": 0.0, "concurrency": 2, "prompt": "tldr_concise"}
    chat = {**limits, "serve": {"model": str(small_judge)}}

    def run(kind: str) -> pd.DataFrame:
        tldr = {"judge": {"kind": kind, "chat": chat}, "other_judges": {"gold": None}, "human": None}
        config = overlay(folder.parent, {"tasks": {"tldr": tldr}})
        result = snakemake("--cores", "2", WIN_RATES, "--configfile", TINY, config, folder=folder)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
        return pd.read_csv(folder / WIN_RATES)

    try:
        table = run("chat")
        # Nothing that it says names a winner, and nothing is guessed.
        assert (table["invalid"] == table["n"]).all() and table["win_rate"].isna().all()
        assert (table["if_invalid_lose"] == 0).all() and (table["if_invalid_win"] == 1).all()
        replies = VerdictStore(folder / "verdicts.sqlite").export()
        assert (replies["completion_tokens"] > 0).all() and (replies["prompt_tokens"] > 50).all()
        assert table["cost_usd"].eq(0).all() and table["judge"].str.startswith("chat:judge/tldr_concise@").all()
        said = [path.read_text() for path in (folder / "logs/tldr").glob("judge_*.log")]
        urls = {word for text in said for word in text.split() if word.startswith("http://127.0.0.1:")}
        assert len(urls) == 1, "one server for all jobs"
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if str(tmp_path / "tmp") in " ".join(process.info["cmdline"] or []):
                process.kill()  # the stage `serve`, which takes the engine with it
    recorded = run("recorded")
    pd.testing.assert_frame_equal(recorded.drop(columns="judge"), table.drop(columns="judge"))
