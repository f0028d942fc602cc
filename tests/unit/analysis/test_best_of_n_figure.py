from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from made_up import words
from prefopt.analysis import best_of_n_figure
from prefopt.analysis.statistics import mean_over_seeds
from prefopt.errors import UserError


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [
        {
            **{"task": "tldr", "run": method, "n": n, "temperature": temperature},
            **{"win_rate": 0.4 + 0.05 * n / 4, "ci_low": 0.3, "ci_high": 0.7, "flops": 1e9 * n},
            **{
                "prompts": 64,
                "confidence": 0.9,
                "judge": "oracle:v1",
                "distinct_texts": 1.0 + 4 * temperature,
                "seeds": 1,
            },
        }
        for method, values, temperatures in (("sft", (1, 4, 16), (0.5, 1.0)), ("dpo", (1,), (0.5,)))
        for n in values
        for temperature in temperatures
    ]
    return pd.DataFrame(rows)


FACTS: dict[str, Any] = {**words("tldr"), "synthetic": False, "warnings": []}


def shown(figure: Any) -> str:
    return " ".join(" ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text"))).split())


def test_the_figure_draws_each_temperature_and_the_other_policys_one_sample(table: pd.DataFrame) -> None:
    figure = best_of_n_figure.best_of_n_figure(table, {"tldr": FACTS})
    left, right = figure.axes
    assert [line.get_xdata().tolist() for line in left.get_lines()[:2]] == [[1, 4, 16], [1, 4, 16]]
    assert right.get_lines()[0].get_xdata().tolist() == [1e9, 4e9, 16e9]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "Best of N, T = 0.5",
        "Best of N, T = 1",
        "DPO, one sample, T = 0.5",
    ]
    assert "N" in left.get_xlabel() and "operations" in right.get_xlabel() and "Win rate" in left.get_ylabel()


def test_the_figure_stands_alone(table: pd.DataFrame) -> None:
    both = pd.concat([table, table.assign(task="hh", judge="reward_model:x", prompts=80)], ignore_index=True)
    summaries: dict[str, dict[str, Any]] = {
        "tldr": {**words("tldr"), "synthetic": True, "warnings": []},
        "hh": {**words("hh"), "synthetic": False, "warnings": ["9 are lost"]},
    }
    figure = best_of_n_figure.best_of_n_figure(both, summaries)
    text = shown(figure)
    for said in (
        "TL;DR summarization: judge oracle:v1, 64 test prompts.",
        "Anthropic HH dialogue: judge reward_model:x, 80 test prompts.",
        "Bands and bars: 90% intervals over prompts.",
        "TL;DR summarization is synthetic: posts, references, preferences and the judge are a program",
        "Anthropic HH dialogue: 9 are lost.",
    ):
        assert said in text
    assert [axes.get_title(loc="left") for axes in figure.axes[::2]] == [
        "TL;DR summarization (synthetic records)",
        "Anthropic HH dialogue",
    ]
    assert "the chosen response" in figure.axes[2].get_ylabel() and "reference summary" in figure.axes[0].get_ylabel()
    assert figure.get_suptitle() == ""


def test_few_prompts_and_equal_candidates_are_said(table: pd.DataFrame) -> None:
    assert best_of_n_figure.caveats(table, {"tldr": FACTS}) == []
    table.loc[table["temperature"] == 0.5, "distinct_texts"] = 1.0
    few = table.assign(prompts=8)
    expected = [
        "Only 8 test prompts: this tries the machinery and is no result.",
        "TL;DR summarization: all candidates of a prompt are one and the same text at T = 0.5.",
    ]
    assert best_of_n_figure.caveats(few, {"tldr": FACTS}) == expected
    assert best_of_n_figure.best_of_n_figure(few, {"tldr": FACTS}).get_suptitle() == "\n".join(expected)
    # One sample has nothing to choose from.
    assert best_of_n_figure.caveats(table[table["n"] == 1], {"tldr": FACTS}) == []


def test_a_temperature_looks_the_same_in_every_task(table: pd.DataFrame) -> None:
    other = table[table["temperature"] == 1.0].assign(task="hh", run="preferred_ft")
    figure = best_of_n_figure.best_of_n_figure(
        pd.concat([table, other], ignore_index=True), {"tldr": FACTS, "hh": FACTS}
    )
    first, second = figure.axes[0], figure.axes[2]
    (line,) = [line for line in second.get_lines() if line.get_label() == "Best of N, T = 1"]
    (same,) = [line for line in first.get_lines() if line.get_label() == "Best of N, T = 1"]
    assert (line.get_color(), line.get_marker()) == (same.get_color(), same.get_marker())


def test_the_stage_joins_the_tasks(table: pd.DataFrame, tmp_path: Path) -> None:
    curves = [tmp_path / "a.csv", tmp_path / "b.csv"]
    curve = table.drop(columns="seeds").assign(seed=0)
    curve.to_csv(curves[0], index=False)
    curve.assign(task="hh").to_csv(curves[1], index=False)
    out = [tmp_path / "figure.svg", tmp_path / "figure.png"]
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps(FACTS))
    named = {"curves": curves, "summaries": [summary, summary], "table": tmp_path / "all.csv", "out": out}
    best_of_n_figure.run(argparse.Namespace(**named))
    assert pd.read_csv(tmp_path / "all.csv")["task"].value_counts().to_dict() == {"tldr": 7, "hh": 7}
    assert all(path.stat().st_size > 1000 for path in out)


def test_several_seeds_are_a_mean_with_an_interval_over_prompts_and_seeds(table: pd.DataFrame) -> None:
    curve = table.drop(columns="seeds").assign(seed=0)
    other = curve.assign(win_rate=curve["win_rate"] + 0.1, flops=curve["flops"] * 3)
    both = best_of_n_figure.over_seeds([curve, other])
    assert both["seeds"].tolist() == [2] * 7 and len(both) == 7
    assert both["win_rate"].tolist() == pytest.approx((curve["win_rate"] + 0.05).tolist())
    assert both["flops"].tolist() == pytest.approx((2 * curve["flops"]).tolist())
    error = 0.4 / (2 * stats.norm.ppf(0.95))
    first = mean_over_seeds([0.4125, 0.5125], error, 64, 0.9).interval
    assert both.loc[0, ["ci_low", "ci_high"]].tolist() == pytest.approx([max(0, first.low), min(1, first.high)])
    alone = best_of_n_figure.over_seeds([curve]).drop(columns="seeds")
    pd.testing.assert_frame_equal(alone, curve.drop(columns="seed"), check_like=True)
    figure = best_of_n_figure.best_of_n_figure(both, {"tldr": FACTS})
    assert "64 test prompts." in shown(figure) and "intervals over prompts and 2 seeds of training" in shown(figure)


def test_a_missing_curve_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"b\.csv does not exist"):
        best_of_n_figure.run(
            argparse.Namespace(curves=[tmp_path / "b.csv"], summaries=[], table=tmp_path / "t.csv", out=[])
        )
