from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import pytest

from prefopt.analysis import best_of_n_figure
from prefopt.errors import UserError


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [
        {
            **{"task": "tldr", "method": method, "n": n, "temperature": temperature},
            **{"win_rate": 0.4 + 0.05 * n / 4, "ci_low": 0.3, "ci_high": 0.7, "flops": 1e9 * n},
        }
        for method, values, temperatures in (("sft", (1, 4, 16), (0.5, 1.0)), ("dpo", (1,), (0.5,)))
        for n in values
        for temperature in temperatures
    ]
    return pd.DataFrame(rows)


def test_the_figure_draws_each_temperature_and_the_other_policys_one_sample(table: pd.DataFrame) -> None:
    figure = best_of_n_figure.best_of_n_figure(table)
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


def test_a_temperature_looks_the_same_in_every_task(table: pd.DataFrame) -> None:
    other = table[table["temperature"] == 1.0].assign(task="hh", method="preferred_ft")
    figure = best_of_n_figure.best_of_n_figure(pd.concat([table, other], ignore_index=True))
    first, second = figure.axes[0], figure.axes[2]
    (line,) = [line for line in second.get_lines() if line.get_label() == "Best of N, T = 1"]
    (same,) = [line for line in first.get_lines() if line.get_label() == "Best of N, T = 1"]
    assert (line.get_color(), line.get_marker()) == (same.get_color(), same.get_marker())


def test_the_stage_joins_the_tasks(table: pd.DataFrame, tmp_path: Path) -> None:
    curves = [tmp_path / "a.csv", tmp_path / "b.csv"]
    table.to_csv(curves[0], index=False)
    table.assign(task="hh").to_csv(curves[1], index=False)
    out = [tmp_path / "figure.svg", tmp_path / "figure.png"]
    best_of_n_figure.run(argparse.Namespace(curves=curves, table=tmp_path / "all.csv", out=out))
    assert pd.read_csv(tmp_path / "all.csv")["task"].value_counts().to_dict() == {"tldr": 7, "hh": 7}
    assert all(path.stat().st_size > 1000 for path in out)


def test_a_missing_curve_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"b\.csv does not exist"):
        best_of_n_figure.run(argparse.Namespace(curves=[tmp_path / "b.csv"], table=tmp_path / "t.csv", out=[]))
