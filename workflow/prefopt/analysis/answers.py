"""What a report opens with: each task's question, its answer in a sentence with an interval, the figure; from tables alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt.analysis.caveats import caveats_of, data_notes, interval_sources, read_facts
from prefopt.analysis.figures import read_win_rates
from prefopt.analysis.style import display_name
from prefopt.store.tables import read_csv


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer of one table."""

    question: str
    sentence: str
    caveats: list[str]  # what takes from its weight
    note: str  # what a reader must know of the numbers
    figure: Path  # an SVG file, which need not be there


def answers(tables: Iterable[Path]) -> Iterator[Answer]:
    """An answer for each table of win rates or of frontiers that has one.

    Args:
        tables: paths of result files; others than these are passed over.

    Raises:
        UserError: one cannot be read.
    """
    for path in tables:
        name = path.name
        if name.endswith("_winrates.csv"):
            yield _of_win_rates(path)
        elif name.endswith("_dominance.csv") and (answer := _of_frontiers(path)):
            yield answer


def _of_win_rates(path: Path) -> Answer:
    """The run that wins most often at the temperature chosen on validation prompts, and those whose intervals overlap its."""
    table, manifest = read_win_rates(path), read_facts(path.with_suffix(".manifest.json"))
    rows = table[table["selected"] & table["win_rate"].notna()].sort_values("win_rate", ascending=False, kind="stable")
    best, *others = rows.to_dict("records")
    near = [row for row in others if row["ci_high"] >= best["ci_low"]]
    sentence = f"{_rate(best)} at temperature {best['temperature']:g}, of {best['n']} test prompts. " + (
        f"Intervals that overlap with this one: {'; '.join(map(_rate, near))}."
        if near
        else "No other run's interval overlaps with this one."
    )
    facts = {"task": best["task"], "warnings": manifest.get("data_warnings", [])}
    facts |= {word: manifest[word] for word in ("title", "written", "synthetic")}
    over = interval_sources(len(manifest["seeds"]))
    note = f"Judge: {manifest['judge']}. {manifest['recipe']['confidence']:.0%} intervals over {over}."
    return Answer(
        f"{manifest['title']}: whose texts are most often preferred to {manifest['reference']}?",
        sentence,
        caveats_of(manifest),
        " ".join([note, *data_notes([facts], {best["task"]: manifest["judge"]})]),
        path.with_suffix(".svg"),
    )


def _rate(row: Mapping[Any, Any]) -> str:
    rate, low, high = (f"{100 * row[name]:.0f}" for name in ("win_rate", "ci_low", "ci_high"))
    return f"{display_name(row['run'])} with {rate}% [{low}, {high}]"


def _of_frontiers(path: Path) -> Answer | None:
    """How far the first method's frontier is above the others'; None where no two share a range of KL."""
    table = read_csv(path)
    table = table[table["area"].notna()]
    if table.empty:
        return None
    task, method = path.name.removesuffix("_dominance.csv"), table["method"].iloc[0]
    summary = path.parent / "data" / task / "summary.json"
    facts = {"task": task, "title": task, "written": "reviews", "synthetic": False, "warnings": []}
    facts |= read_facts(summary) if summary.exists() else {}
    areas = [_area(row) for row in table[table["method"] == method].to_dict("records")]
    note = [f"Areas in reward times nats, with intervals over {interval_sources(int(table['seeds'].iloc[0]))}."]
    return Answer(
        f"{facts['title']}: which method gives more reward at the same KL to the reference policy?",
        f"The frontier of {display_name(method)} is {'; '.join(areas)}.",
        [],
        " ".join([*note, *data_notes([facts], {})]),
        path.with_name(f"{task}_frontier.svg"),
    )


def _area(row: Mapping[Any, Any]) -> str:
    sign, where = (1, "above") if row["area"] >= 0 else (-1, "below")
    low, high = sorted((sign * row["area_low"], sign * row["area_high"]))
    return f"{where} that of {display_name(row['other'])} by an area of {abs(row['area']):.2f} [{low:.2f}, {high:.2f}]"
