"""Two result folders side by side."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from prefopt.analysis.diff import compare_tables, report
from prefopt.cli import main
from prefopt.store.tables import write_table


def results(folder: Path, beta: float, rate: float) -> Path:
    write_table(folder / "data" / "text.parquet", "pretraining", [{"text": "a"}], recipe={"beta": beta, "seed": 0})
    rows = [("tldr", "dpo", 0.0, rate, True), ("tldr", "sft", 0.0, 0.5, True)]
    table = pd.DataFrame(rows, columns=["task", "run", "temperature", "win_rate", "selected"])
    table.to_csv(folder / "tldr_winrates.csv", index=False)
    return folder


def test_parameters_and_numbers_that_differ_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = results(tmp_path / "a", 0.1, 0.75), results(tmp_path / "b", 0.5, 0.8)
    (b / "extra.csv").write_text("x\n1\n")
    assert main(["diff", str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert "data/text.parquet: beta: 0.1 | 0.5" in text and "seed" not in text
    (line,) = [line for line in text.splitlines() if "dpo" in line]
    assert line.split() == ["tldr", "dpo", "0", "win_rate", "0.75", "0.8", "0.05"]
    assert "sft" not in text and "not in A" in text


def test_equal_folders_differ_in_nothing(tmp_path: Path) -> None:
    a, b = results(tmp_path / "a", 0.1, 0.75), results(tmp_path / "b", 0.1, 0.75)
    text = report(a, b)
    assert "Parameters that differ\n  none" in text and "the same numbers" in text


def test_rows_of_one_table_alone_are_given_with_the_other_missing() -> None:
    first = pd.DataFrame({"run": ["dpo", "ppo"], "win_rate": [0.5, 0.6]})
    second = pd.DataFrame({"run": ["dpo"], "win_rate": [0.5]})
    difference = compare_tables(first, second, "x_winrates")
    assert difference["run"].tolist() == ["ppo"] and difference["B"].isna().all()


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(tmp_path), str(tmp_path / "nowhere")]) == 2
    assert "is no folder: name two folders of results" in capsys.readouterr().err
