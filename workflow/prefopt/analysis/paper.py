"""The stage `paper`: each number that the paper prints, with its counterpart here."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from prefopt.errors import UserError
from prefopt.files import write_text
from prefopt.recipes import from_json

NUMBERS = Path(__file__).with_name("paper_numbers.yaml")
_HEAD = """# The paper's numbers and their counterparts here

Printed by Rafailov et al. (2023), not read off a figure. A counterpart has the paper's method and temperature, on the
test prompts of this run with its own judge; an empty cell has none. The last column says at which scale it was obtained:
numbers of different scales are not measurements of one thing.

| where | what | paper | here [95% interval] | scale here |
| --- | --- | --- | --- | --- |
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperRecipe:
    """Of each task with win rates: where its records, its base and its judge come from."""

    scale: dict[str, str]


def counterpart(entry: dict[str, Any], win_rates: dict[str, pd.DataFrame]) -> str:
    """The counterpart of a printed win rate as text, or nothing."""
    table = win_rates.get(entry.get("task", ""))
    if table is None or "method" not in entry:
        return ""
    rows = table[(table["method"] == entry["method"]) & (table["temperature"] == entry["temperature"])]
    if rows.empty:
        return ""
    row = rows.iloc[0]
    return f"{100 * row['win_rate']:.0f} [{100 * row['ci_low']:.0f}, {100 * row['ci_high']:.0f}]"


def page(win_rates: dict[str, pd.DataFrame], scale: dict[str, str]) -> str:
    """The page in Markdown.

    Args:
        win_rates: the table of each task.
        scale: data, base and judge of each task.
    """
    lines = []
    for entry in yaml.safe_load(NUMBERS.read_text(encoding="utf-8")):
        here = counterpart(entry, win_rates)
        cells = [entry["where"], entry["what"], str(entry["paper"]), here, scale[entry["task"]] if here else ""]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n")
    return _HEAD + "".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `paper`."""
    parser.add_argument("--win-rates", required=True, type=Path, nargs="+", help="CSVs of win rates")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="Markdown page that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the page."""
    tables = {}
    for path in args.win_rates:
        if not path.is_file():
            raise UserError(f"{path} does not exist: run the stage `win_rates`.")
        table = pd.read_csv(path)
        tables[str(table["task"].iloc[0])] = table
    write_text(args.out, page(tables, from_json(PaperRecipe, args.recipe).scale))
