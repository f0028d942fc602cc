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
    table = pd.DataFrame(rows, columns=["run", "temperature", "win_rate", "ci_low", "ci_high"])
    return table.assign(task=task)


def test_a_printed_number_stands_beside_its_counterpart(tmp_path: Path) -> None:
    paths = []
    for task in ("tldr", "cnndm"):
        paths.append(tmp_path / f"{task}_winrates.csv")
        rates(task).to_csv(paths[-1], index=False)
    recipe = json.dumps({"scale": {"tldr": "embedded | tiny", "cnndm": "news"}})
    paper.run(argparse.Namespace(win_rates=paths, human=None, recipe=recipe, out=tmp_path / "page.md"))
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert (
        "| section 6.2 | TL;DR win rate of DPO at temperature 0 | about 61 | 88 [83, 92] | embedded &#124; tiny |"
        in lines
    )
    assert "| Table 1 | CNN/DailyMail win rate of PPO at temperature 0.25 | 23 |  |  |" in lines
    human = [line for line in lines if "Human win rate" in line]
    assert len(human) == 3 and all(line.endswith("|  |  |") for line in human)
    assert {line.count(" | ") for line in lines if line.startswith("| ")} <= {4}


def test_table_2_has_its_counterparts(tmp_path: Path) -> None:
    rates("tldr").to_csv(tmp_path / "tldr_winrates.csv", index=False)
    matchup = {"task": "tldr", "matchup": "dpo T=0.25 vs ppo T=0"}
    rows = [
        {**matchup, "judge": "people", "raters": 24, "win_rate": 0.6, "ci_low": 0.5, "ci_high": 0.7, "agreement": 0.65},
        {**matchup, "judge": "main", "raters": 0, "win_rate": 0.8, "ci_low": 0.7, "ci_high": 0.9, "agreement": 0.72},
    ]
    table = pd.DataFrame(rows).assign(agreement_low=0.5, agreement_high=0.9)
    arguments = {
        "win_rates": [tmp_path / "tldr_winrates.csv"],
        "human": tmp_path / "h.csv",
        "out": tmp_path / "page.md",
    }
    recipe = json.dumps({"scale": {"tldr": "mine"}})
    for people in ("people", "simulated raters"):
        table.replace("people", people).to_csv(tmp_path / "h.csv", index=False)
        paper.run(argparse.Namespace(**arguments, recipe=recipe))
        lines = [line for line in (tmp_path / "page.md").read_text().splitlines() if "Table 2" in line]
        mark = "" if people == "people" else " (simulated raters)"
        dpo = "of DPO at 0.25 against PPO at 0, TL;DR"
        assert f"| Table 2 | Human win rate {dpo} | 58 | 60 [50, 70]{mark} | mine |" in lines
        assert f"| Table 2 | GPT-4 (C) win rate {dpo} | 54 | 80 [70, 90] | mine |" in lines
        assert f"| Table 2 | GPT-4 (S) win rate {dpo} | 47 |  |  |" in lines
        agreement = "GPT-4 (C) agreement with humans, DPO at 0.25 against PPO at 0, TL;DR"
        assert f"| Table 2 | {agreement} | 67 | 72 [50, 90]{mark} | mine |" in lines


def test_every_entry_is_complete() -> None:
    entries = yaml.safe_load(paper.NUMBERS.read_text())
    for entry in entries:
        known = [set(), {"task", "method", "temperature"}, {"task", "matchup", "judge", "figure"}]
        assert {"where", "what", "paper"} <= set(entry) and set(entry) - {"where", "what", "paper"} in known
    table_1 = [entry["paper"] for entry in entries if entry["where"] == "Table 1"]
    assert table_1 == [36, 31, 26, 23]
