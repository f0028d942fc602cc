"""The paper's printed numbers beside those of a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
import yaml

from prefopt.analysis import paper


def rates(task: str) -> pd.DataFrame:
    rows = [("dpo", 0.0, 0.881, 0.83, 0.92), ("dpo", 0.25, 0.7, 0.6, 0.8), ("ppo", 0.0, 0.61, 0.55, 0.67)]
    table = pd.DataFrame(rows, columns=["method", "temperature", "win_rate", "ci_low", "ci_high"])
    return table.assign(task=task)


def test_a_printed_number_stands_beside_its_counterpart(tmp_path: Path) -> None:
    paths = []
    for task in ("tldr", "cnndm"):
        paths.append(tmp_path / f"{task}_winrates.csv")
        rates(task).to_csv(paths[-1], index=False)
    recipe = json.dumps({"scale": {"tldr": "embedded | tiny", "cnndm": "news"}})
    paper.run(argparse.Namespace(win_rates=paths, recipe=recipe, out=tmp_path / "page.md"))
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert (
        "| section 6.2 | TL;DR win rate of DPO at temperature 0 | about 61 | 88 [83, 92] | embedded \\| tiny |" in lines
    )
    assert "| Table 1 | CNN/DailyMail win rate of PPO at temperature 0.25 | 23 |  |  |" in lines
    human = [line for line in lines if "Human win rate" in line]
    assert len(human) == 3 and all(line.endswith("|  |  |") for line in human)
    assert {line.count(" | ") for line in lines if line.startswith("| ")} <= {4}


def test_every_entry_is_complete() -> None:
    entries = yaml.safe_load(paper.NUMBERS.read_text())
    for entry in entries:
        assert {"where", "what", "paper"} <= set(entry) <= {"where", "what", "paper", "task", "method", "temperature"}
        assert ("task" in entry) == ("method" in entry) == ("temperature" in entry)
    table_1 = [entry["paper"] for entry in entries if entry["where"] == "Table 1"]
    assert table_1 == [36, 31, 26, 23]
