"""The stage `paper`: each number that the paper prints, with its counterpart here."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from prefopt.analysis.texts import escape_markdown
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.store.files import write_text
from prefopt.store.tables import read_csv

NUMBERS = Path(__file__).with_name("paper_numbers.yaml")
_HEAD = """# The paper's numbers and their counterparts here

Printed by Rafailov et al. (2023), not read off a figure. A counterpart is the run that is called as the paper's method, at
its temperature, on the test prompts here with the task's own judge; an empty cell has none. The last column says at which
scale it was obtained: numbers of different scales are not measurements of one thing.

| where | what | paper | here [95% interval] | scale here |
| --- | --- | --- | --- | --- |
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperRecipe:
    """Of each task with win rates against reference texts: where its records, its base and its judge come from."""

    scale: dict[str, str]


def counterpart(entry: dict[str, Any], win_rates: dict[str, pd.DataFrame], human: pd.DataFrame | None) -> str:
    """The counterpart of a printed win rate or agreement as text, or nothing."""
    if "matchup" in entry:
        return _of_table_2(entry, human) if human is not None else ""
    table = win_rates.get(entry.get("task", ""))
    if table is None or "method" not in entry:
        return ""
    rows = table[(table["run"] == entry["method"]) & (table["temperature"] == entry["temperature"])]
    if rows.empty:
        return ""
    return _shown(*rows.iloc[0][["win_rate", "ci_low", "ci_high"]])


def _of_table_2(entry: dict[str, Any], human: pd.DataFrame) -> str:
    """What people, or a judge, say of a matchup; the judge of the tables stands for the paper's main one, "C"."""
    people = human["raters"] > 0
    judge = people if entry["judge"] == "people" else (human["judge"] == entry["judge"]) & ~people
    rows = human[judge & (human["task"] == entry["task"]) & (human["matchup"] == entry["matchup"])]
    if rows.empty:
        return ""
    columns = {"win_rate": ["win_rate", "ci_low", "ci_high"]}.get(entry["figure"])
    shown = _shown(*rows.iloc[0][columns or ["agreement", "agreement_low", "agreement_high"]])
    simulated = (human["judge"] == "simulated raters").any() and (entry["judge"] == "people" or columns is None)
    return f"{shown} (simulated raters)" if shown and simulated else shown


def _shown(value: float, low: float, high: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def page(win_rates: dict[str, pd.DataFrame], human: pd.DataFrame | None, scale: dict[str, str]) -> str:
    """The page in Markdown.

    Args:
        win_rates: the table of each task.
        human: the table of people and judges; None where nobody was asked.
        scale: data, base and judge of each task.
    """
    lines = []
    for entry in yaml.safe_load(NUMBERS.read_text(encoding="utf-8")):
        here = counterpart(entry, win_rates, human)
        # The scale holds what a config names: paths, models.
        where = escape_markdown(scale[entry["task"]]) if here else ""
        lines.append("| " + " | ".join([entry["where"], entry["what"], str(entry["paper"]), here, where]) + " |\n")
    return _HEAD + "".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `paper`."""
    parser.add_argument("--win-rates", required=True, type=Path, nargs="+", help="CSVs of win rates")
    parser.add_argument("--human", type=Path, help="CSV of people and judges")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="Markdown page that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the page."""
    tables: dict[str, pd.DataFrame] = {}
    scale = from_json(PaperRecipe, args.recipe).scale
    for path in args.win_rates:
        if not path.is_file():
            raise UserError(f"{path} does not exist: run the stage `win_rates`.")
        table = read_csv(path)
        task = str(table["task"].iloc[0])
        tables |= {task: table} if task in scale else {}
    human = None if args.human is None else read_csv(args.human)
    write_text(args.out, page(tables, human, scale))
