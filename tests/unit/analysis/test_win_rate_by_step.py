"""DPO's win rate over its training steps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
import pytest

from prefopt.analysis import win_rate_by_step
from prefopt.analysis.win_rate_by_step import ByStepTableRecipe, step_table
from prefopt.errors import UserError
from prefopt.tables import write_table

RECIPE = ByStepTableRecipe(task="hh", confidence=0.95)


def verdicts(wins: dict[tuple[int, float], int], prompts: int = 10, prefix: str = "dpo_step_") -> pd.DataFrame:
    rest = {
        "sample_index": 0,
        "split": "test",
        "order": "policy_first",
        "winner": "first",
        "reply": "",
        "judge": "j",
        "cost_usd": 0.0,
    }
    return pd.DataFrame(
        {
            "prompt_id": f"p{i}",
            "method": f"{prefix}{step}",
            "temperature": temperature,
            **rest,
            "outcome": "win" if i < count else "loss",
            "tokens": 4 + step,
            "reference_tokens": 5,
            "well_formed": True,
        }
        for (step, temperature), count in wins.items()
        for i in range(prompts)
    )


def test_a_row_per_step_and_temperature_in_the_order_of_the_steps() -> None:
    table = step_table(verdicts({(100, 0.7): 8, (20, 0.7): 5, (0, 0.7): 3, (0, 1.0): 2}), RECIPE)
    assert table[["step", "temperature", "win_rate"]].to_numpy().tolist() == [
        [0, 0.7, 0.3],
        [0, 1.0, 0.2],
        [20, 0.7, 0.5],
        [100, 0.7, 0.8],
    ]
    assert table["mean_tokens"].tolist() == [4, 4, 24, 104]
    assert (table["ci_low"] < table["win_rate"]).all() and (table["win_rate"] < table["ci_high"]).all()


def test_only_test_prompts_count_and_other_methods_are_refused() -> None:
    rows = verdicts({(0, 0.7): 3})
    rows.loc[0, "split"] = "validation"
    assert step_table(rows, RECIPE)["n"].tolist() == [9]
    with pytest.raises(UserError, match="method 'sft0', which is no step of DPO"):
        step_table(verdicts({(0, 0.7): 3}, prefix="sft"), RECIPE)


def test_the_stage_writes_table_and_figure(tmp_path: Path) -> None:
    write_table(tmp_path / "v.parquet", "verdicts", verdicts({(0, 0.7): 3, (10, 0.7): 6}))
    outputs = {"table": tmp_path / "t.csv", "out": [tmp_path / "f.svg", tmp_path / "f.png"]}
    recipe = json.dumps({"task": "hh", "confidence": 0.95})
    win_rate_by_step.run(argparse.Namespace(verdicts=tmp_path / "v.parquet", recipe=recipe, **outputs))
    assert pd.read_csv(tmp_path / "t.csv")["win_rate"].tolist() == [0.3, 0.6]
    assert all(path.stat().st_size > 1000 for path in outputs["out"])  # type: ignore[attr-defined]
