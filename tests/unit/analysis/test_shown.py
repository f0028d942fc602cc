"""What a run says at its end."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from prefopt.analysis.shown import shown


def write(folder: Path, name: str, text: str, when: float) -> None:
    path = folder / name
    path.write_text(text)
    os.utime(path, (when, when))


def test_the_win_rates_that_were_made_are_shown_at_the_selected_temperatures(tmp_path: Path) -> None:
    rows = [
        ("sft", 0.0, False, 0.5, 0.4, 0.6, 12.4),
        ("sft", 0.25, True, 0.637, 0.571, 0.704, 20.6),
        ("best_of_128", 0.5, True, 0.78, 0.72, 0.83, 23.0),
    ]
    columns = ["run", "temperature", "selected", "win_rate", "ci_low", "ci_high", "mean_tokens"]
    table = pd.DataFrame(rows, columns=columns).assign(n=192, judge="oracle")
    write(tmp_path, "tldr_winrates.csv", table.to_csv(index=False), 200)
    write(tmp_path, "hh_winrates.csv", "of an earlier run", 100)
    for name in ("tldr_winrates.svg", "imdb_frontier.csv", "tldr_training.svg", "hh_winrate_by_step.svg"):
        write(tmp_path, name, "", 200)
    write(tmp_path, "compute.csv", "", 200)
    assert shown(tmp_path, since=150).splitlines() == [
        f"{tmp_path}/tldr_winrates.csv, on 192 test prompts by the judge oracle:",
        "  run          temperature  win rate, % [interval]  tokens",
        "  sft          0.25         64 [57, 70]             21",
        "  best_of_128  0.5          78 [72, 83]             23",
        *(f"{tmp_path}/{name}" for name in ("hh_winrate_by_step.svg", "imdb_frontier.csv", "tldr_training.svg")),
        f"{tmp_path}/tldr_winrates.svg",
    ]


def test_nothing_made_says_nothing(tmp_path: Path) -> None:
    write(tmp_path, "tldr_winrates.csv", "of an earlier run", 100)
    assert shown(tmp_path, since=150) == ""
    assert shown(tmp_path / "missing", since=0) == ""
