"""The win rate of runs over their training steps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from made_up import words
from prefopt.analysis import win_rate_by_step
from prefopt.analysis.statistics import crossed_mean
from prefopt.analysis.win_rate_by_step import ByStepTableRecipe, by_step_figure, step_table
from prefopt.errors import UserError
from prefopt.store.tables import write_table

RECIPE = ByStepTableRecipe(task="hh", runs=("dpo", "my_step_run"), seeds=(0,), confidence=0.95)


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
            "run": f"{prefix}{step}",
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


def test_several_runs_stand_in_the_configs_order_each_with_a_line_of_its_own() -> None:
    mine, dpo = {(0, 0.7): 3, (5, 0.7): 4}, {(0, 0.7): 3, (20, 0.7): 6}
    every = pd.concat([verdicts(mine, prefix="my_step_run_step_"), verdicts(dpo)])
    table = step_table(every, RECIPE)
    assert table[["run", "step", "win_rate"]].to_numpy().tolist() == [
        *(["dpo", 0, 0.3], ["dpo", 20, 0.6], ["my_step_run", 0, 0.3], ["my_step_run", 5, 0.4])
    ]
    (axes,) = by_step_figure(table, {**words("hh"), "synthetic": False, "warnings": []}, []).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["DPO, T = 0.7", "my_step_run, T = 0.7"]
    assert axes.get_title(loc="left") == "Anthropic HH dialogue: DPO and my_step_run while training"


def test_several_seeds_are_a_mean_with_an_interval_over_prompts_and_seeds() -> None:
    two = [verdicts({(0, 0.7): 3, (5, 0.7): wins}).assign(seed=seed) for seed, wins in ((0, 8), (4, 5))]
    recipe = ByStepTableRecipe(task="hh", runs=("dpo",), seeds=(0, 4), confidence=0.95)
    table = step_table(pd.concat(two), recipe)
    scores = np.array([[1.0] * 8 + [0.0] * 2, [1.0] * 5 + [0.0] * 5])
    expected = crossed_mean(scores, 0.95, 0.0, 1.0)
    last = table.iloc[-1]
    assert (last["step"], last["n"], last["wins"], last["seeds"]) == (5, 20, 13, 2)
    assert last["win_rate"] == pytest.approx(0.65) == expected.mean
    assert (last["ci_low"], last["ci_high"]) == pytest.approx((expected.interval.low, expected.interval.high))
    assert list(table.columns) == list(step_table(verdicts({(0, 0.7): 3}), RECIPE).columns)
    figure = by_step_figure(table, {**words("hh"), "synthetic": False, "warnings": []}, [])
    assert "intervals over prompts and over 2 trainings each" in " ".join(figure.get_supxlabel().split())


def test_only_test_prompts_count_and_other_methods_are_refused() -> None:
    rows = verdicts({(0, 0.7): 3})
    rows.loc[0, "split"] = "validation"
    assert step_table(rows, RECIPE)["n"].tolist() == [9]
    with pytest.raises(UserError, match="run 'sft0', which is no step of dpo or my_step_run"):
        step_table(verdicts({(0, 0.7): 3}, prefix="sft"), RECIPE)


def test_the_figure_stands_alone() -> None:
    table = step_table(
        verdicts({(0, 0.7): 3, (10, 0.7): 6}), ByStepTableRecipe(task="hh", runs=("dpo",), seeds=(0,), confidence=0.9)
    )
    assert table[["prompts", "confidence", "judge"]].to_numpy().tolist() == [[10, 0.9, "j"]] * 2
    figure = by_step_figure(table, {**words("hh"), "synthetic": True, "warnings": ["9 are lost"]}, ["A caveat."])
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Anthropic HH dialogue: DPO while training (synthetic records)"
    assert axes.get_ylabel() == "Win rate against the chosen response"
    assert list(axes.lines[0].get_ydata()) == [0.5, 0.5], "as good as the chosen response"
    assert " ".join(figure.get_supxlabel().split()) == (
        "Judge: j. 10 test prompts. Bands: 90% intervals over prompts, of one training each. Dotted: as good as the chosen "
        "response. Synthetic: dialogues, responses, preferences are by a program; no person was asked. 9 are lost."
    )
    assert figure.get_suptitle() == "A caveat."
    assert (
        by_step_figure(
            table.assign(task="tldr"), {**words("hh"), "synthetic": False, "warnings": []}, []
        ).get_suptitle()
        == ""
    )


def test_the_stage_writes_table_and_figure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = verdicts({(0, 0.7): 3, (10, 0.7): 6})
    write_table(tmp_path / "v.parquet", "verdicts", rows)
    key = ["prompt_id", "run", "temperature", "sample_index", "split"]
    rest = {"tokens": 1, "finish_reason": "eos", "logp": 0.0, "reference_logp": 0.0}
    samples = rows[key].assign(text=rows["prompt_id"], token_ids=[[1]] * 20, **rest)
    write_table(tmp_path / "s.parquet", "samples", samples)
    (tmp_path / "summary.json").write_text(json.dumps({**words("hh"), "synthetic": True, "warnings": []}))
    outputs = {"table": tmp_path / "t.csv", "out": [tmp_path / "f.svg", tmp_path / "f.png"]}
    inputs = {
        "verdicts": [tmp_path / "v.parquet"],
        "samples": [tmp_path / "s.parquet"],
        "summary": tmp_path / "summary.json",
    }
    recipe = json.dumps({"task": "hh", "runs": ["dpo"], "seeds": [0], "confidence": 0.95})
    win_rate_by_step.run(argparse.Namespace(**inputs, recipe=recipe, **outputs))
    assert pd.read_csv(tmp_path / "t.csv")["win_rate"].tolist() == [0.3, 0.6]
    assert all(path.stat().st_size > 1000 for path in outputs["out"])  # type: ignore[attr-defined]
    assert "Only 10 test prompts" in caplog.text
    assert "DPO after 0 steps and DPO after 10 steps wrote the same texts at T = 0.7." in caplog.text
