"""Made-up verdicts and samples, written as letters: w(in), l(oss), t(ie), i(nvalid)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.analysis.verdicts import KEY, settle
from prefopt.experiment.tasks import TASKS
from prefopt.store.tables import write_table

# What the evaluations table says of each completion beside reward, KL and tokens.
MEASURES = {"logp": -4.0, "ended": True, "repeats": False, "copies": False, "empty": False, "text_hash": "text"}
MEASURES |= {"learned_reward": None}
OUTCOMES = {"w": "win", "l": "loss", "t": "tie", "i": "invalid"}
# By method and temperature: outcomes on the validation prompts, then on the test prompts.
Outcomes = dict[str, dict[float, tuple[str, str]]]


def words(task: str) -> dict[str, str]:
    """How figures speak of a shipped task."""
    form = TASKS[task]
    return {"title": form.title, "reference": form.reference, "written": form.written}


def _frames(method: str, rows: dict[float, tuple[str, str]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    verdicts: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for temperature, splits in rows.items():
        for split, letters in zip(("validation", "test"), splits, strict=True):
            for i, letter in enumerate(letters):
                key = {
                    "prompt_id": f"{split}-{i}",
                    "run": method,
                    "temperature": temperature,
                    "sample_index": 0,
                    "split": split,
                }
                outcome = OUTCOMES[letter]
                winner = {"win": "first", "loss": "second"}.get(outcome, outcome)
                verdicts.append(
                    {
                        **key,
                        "order": "policy_first",
                        "winner": winner,
                        "outcome": outcome,
                        "reply": "first 1.0, second 0.5",
                        "judge": "oracle:embedded-v1",
                        "cost_usd": 0.25,
                        "tokens": 10 + i,
                        "reference_tokens": 20,
                        "well_formed": i % 2 == 0,
                    }
                )
                samples.append(
                    {
                        **key,
                        "text": f" {method} says {i}",
                        "tokens": 10 + i,
                        "token_ids": [1, 2],
                        "finish_reason": "eos",
                        "logp": 0.0 if temperature == 0 else -10.0,
                        "reference_logp": -10.5 - i,
                    }
                )
    return pd.DataFrame(verdicts), pd.DataFrame(samples)


def make_frames(outcomes: Outcomes) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Settled verdicts and samples of all methods."""
    pairs = [_frames(method, rows) for method, rows in outcomes.items()]
    verdicts, samples = zip(*pairs, strict=True)
    return settle(pd.concat(verdicts, ignore_index=True), KEY), pd.concat(samples, ignore_index=True)


def make_files(tmp_path: Path, outcomes: Outcomes, **manifest: Any) -> dict[str, list[str]]:
    """The same as files, with a summary of the data and a prompts table."""
    paths: dict[str, list[str]] = {"verdicts": [], "samples": []}
    prompt_ids: dict[str, str] = {}
    for method, rows in outcomes.items():
        verdicts, samples = _frames(method, rows)
        prompt_ids |= dict(zip(verdicts["prompt_id"], verdicts["split"], strict=True))
        if "judge" in manifest:
            verdicts["judge"] = manifest["judge"]
        sample_path = tmp_path / "samples" / f"{method}.parquet"
        written = write_table(sample_path, "samples", samples)
        verdict_path = tmp_path / "verdicts" / f"{method}.parquet"
        facts = {
            "judge": "oracle:embedded-v1",
            "recipe": {"kind": "oracle", "seed": 3, "token_budget": 1},
            "inputs": {"samples": written["content_hash"]},
            **manifest,
        }
        write_table(verdict_path, "verdicts", verdicts, **facts)
        paths["samples"].append(str(sample_path))
        paths["verdicts"].append(str(verdict_path))
    prompts = [
        {
            "prompt_id": prompt_id,
            "prompt": f"SUBREDDIT: r/x\n\nPOST: post {prompt_id}\n\nTL;DR:",
            "reference": " the reference",
            "split": split,
            "facts": "",
            "prompt_ids": [1, 2, 3],
        }
        for prompt_id, split in prompt_ids.items()
    ]
    write_table(tmp_path / "prompts.parquet", "prompts", prompts)
    (tmp_path / "summary.json").write_text(
        json.dumps({**words("tldr"), "synthetic": True, "warnings": ["many were lost."]})
    )
    paths["summary"] = [str(tmp_path / "summary.json")]
    paths["prompts"] = [str(tmp_path / "prompts.parquet")]
    return paths
