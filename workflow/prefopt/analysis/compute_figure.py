"""The stage `compute_figure`: win rate and reward against what training cost, and win rate against what an answer costs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from prefopt.analysis.caveats import caveats_of, data_notes, interval_sources, read_facts, titled
from prefopt.analysis.style import (
    LineStyle,
    annotate,
    display_name,
    figure_style,
    line_styles,
    save,
)
from prefopt.errors import UserError
from prefopt.store.tables import read_csv


def compute_figure(table: pd.DataFrame, manifests: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A row per task with win rates: on the left against training, beside it against one answer.

    Where a task has a frontier, its reward against training is on the right.

    Args:
        table: as the stage `compute` wrote it.
        manifests: of each task's win rates, whose facts are written under the figure.
    """
    totals = table[(table["stage"] == "total") & table["bought"].notna()]
    tasks, styles = list(dict.fromkeys(totals["task"])), line_styles(totals["run"])
    if not tasks:
        raise UserError("No run has a win rate: run the stage `win_rates`.")
    rewarded = set(totals.loc[totals["reward"].notna(), "task"])
    columns = 3 if rewarded else 2
    with figure_style():
        figure, panels = plt.subplots(
            len(tasks),
            columns,
            figsize=(3.5 * columns + 1.4, 2.6 * len(tasks) + 1.3),
            squeeze=False,
            layout="constrained",
        )
        handles: dict[str, Any] = {}
        for (left, right, *of_reward), task in zip(panels, tasks, strict=True):
            rows = totals[totals["task"] == task]
            right.sharey(left)
            for axes in of_reward:
                if task not in rewarded:
                    axes.set_axis_off()
                    continue
                _draw(axes, rows, "training_flops", styles, "reward")
                axes.set_ylabel("Reward of the frontier")
                axes.set_xlabel("Training, floating-point operations")
            handles |= _draw(left, rows, "training_flops", styles)
            handles |= _draw(right, rows, "inference_flops_per_prompt", styles)
            left.set_title(titled(manifests[task]["title"], manifests[task]), loc="left", fontweight="bold")
            left.set_ylabel(f"Win rate against\n{manifests[task]['reference']}")
            left.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
            left.set_xlabel("Training, floating-point operations")
            right.set_xlabel("One answer, floating-point operations")
        figure.legend(list(handles.values()), list(handles), loc="outside right center", fontsize=8)
        annotate(figure, _note(tasks, manifests, bool(rewarded)), _caveats(tasks, manifests))
        plt.close(figure)
    return figure


def _caveats(tasks: Sequence[str], manifests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"{manifests[task]['title']}: {caveat}" for task in tasks for caveat in caveats_of(manifests[task])]


def _note(tasks: Sequence[str], manifests: Mapping[str, Mapping[str, Any]], rewards: bool) -> str:
    judges = {task: str(manifests[task]["judge"]) for task in tasks}
    parts = [
        f"{manifests[task]['title']}: judge {judges[task]}, {manifests[task]['test_prompts']} test prompts, "
        f"{manifests[task]['recipe']['confidence']:.0%} intervals."
        for task in tasks
    ]
    seeds = len(manifests[tasks[0]].get("seeds", [0]))
    sources = interval_sources(seeds) + (", costs their means" if seeds > 1 else "")
    parts.append(
        f"Each run at the temperature chosen on validation prompts; bars: intervals over {sources}. Training "
        f"counts every stage after the base, all rounds of a run among them; a run that trains nothing has an answer's cost "
        f"only. Best-of-N's answer holds all N candidates and their scores."
        + (" Rewards are told of the same samples." if rewards else "")
    )
    facts = [{**manifests[task], "warnings": manifests[task]["data_warnings"]} for task in tasks]
    return " ".join([*parts, *data_notes(facts, judges)])


def _draw(axes: Axes, rows: pd.DataFrame, x: str, styles: Mapping[str, LineStyle], y: str = "bought") -> dict[str, Any]:
    """Draws the runs that have this cost and what it bought; one that was not trained has none of training."""
    handles: dict[str, Any] = {}
    for _, row in rows[(rows[x].fillna(0) > 0) & rows[y].notna()].iterrows():
        style, name = styles[row["run"]], display_name(str(row["run"]))
        spread = [[row[y] - row[f"{y}_low"]], [row[f"{y}_high"] - row[y]]]
        handles[name] = axes.errorbar(
            *(row[x], row[y]),
            yerr=spread,
            color=style.color,
            marker=style.marker,
            markersize=6,
            linestyle="none",
        )
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    # Whole decades, so that runs that cost alike look alike.
    low, high = axes.get_xlim()
    axes.set_xlim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    return handles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `compute_figure`."""
    parser.add_argument("--table", required=True, type=Path, help="CSV of the stage `compute`")
    parser.add_argument(
        "--manifests", required=True, type=Path, nargs="*", help="manifests of the win rates of all its tasks"
    )
    parser.add_argument("--out", required=True, type=Path, nargs="+", help="figures that are made: .svg, .png or .pdf")


def run(args: argparse.Namespace) -> None:
    """Draws the costs."""
    if not args.table.is_file():
        raise UserError(f"{args.table} does not exist: run the stage `compute`.")
    manifests = {str(one["task"]): one for one in map(read_facts, args.manifests)}
    figure = compute_figure(read_csv(args.table), manifests)
    with figure_style():
        for path in args.out:
            save(figure, path)
