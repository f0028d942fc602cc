"""The stage `best_of_n_figure`: one table of every task's curves, and win rate against N and against its cost (Fig. 4)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter
from scipy import stats

from prefopt.analysis.caveats import data_notes, few_prompts, interval_sources, prompts_note, read_facts, titled
from prefopt.analysis.statistics import mean_over_seeds
from prefopt.analysis.style import annotate, display_name, draw_curve, figure_style, position_style, save
from prefopt.analysis.texts import write_csv
from prefopt.errors import UserError
from prefopt.store.tables import read_csv

logger = logging.getLogger(__name__)


def best_of_n_figure(table: pd.DataFrame, summaries: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A row per task: win rate against N at each temperature, and against operations per prompt.

    Args:
        table: curves as the stage `best_of_n_curve` wrote them. A task's first run is the policy that the
            candidates are samples of; rows of another are its one sample: a level on the left, a point on the right.
        summaries: of each task's data, whose facts are written under the figure.
    """
    tasks = list(dict.fromkeys(table["task"]))
    # A temperature looks the same in every task.
    positions = {temperature: i for i, temperature in enumerate(sorted(table["temperature"].unique()))}
    with figure_style():
        figure, panels = plt.subplots(
            len(tasks), 2, figsize=(8.8, 3.0 * len(tasks) + 0.9), squeeze=False, sharey="row", layout="constrained"
        )
        for (left, right), task in zip(panels, tasks, strict=True):
            rows = table[table["task"] == task]
            _draw(left, rows, "n", positions)
            _draw(right, rows, "flops", positions)
            left.set_title(titled(summaries[task]["title"], summaries[task]), loc="left", fontweight="bold")
            left.set_xscale("log", base=2)
            values = sorted(rows["n"].unique())
            left.set_xticks(values, [str(n) for n in values])
            left.xaxis.set_minor_locator(NullLocator())
            left.set_xlabel("N, candidates per prompt")
            left.set_ylabel(f"Win rate against\n{summaries[task]['reference']}")
            left.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
            right.set_xscale("log")
            right.set_xlabel("Floating-point operations per prompt")
            right.set_title("The same against its cost", loc="left")
        named: dict[str, Any] = {}
        for left, _ in panels:
            handles, labels = left.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        figure.legend([named[label] for label in sorted(named)], sorted(named), loc="outside right center", fontsize=8)
        annotate(figure, _note(table, summaries), caveats(table, summaries))
        plt.close(figure)
    return figure


def caveats(table: pd.DataFrame, summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What takes from the weight of the curves, a sentence each."""
    found = few_prompts(int(table["prompts"].min()))
    chosen = table[(table["n"] > 1) & (table["distinct_texts"] == 1)]
    for task, rows in chosen.groupby("task", sort=False):
        at = ", ".join(f"{temperature:g}" for temperature in sorted(rows["temperature"].unique()))
        found.append(
            f"{summaries[str(task)]['title']}: all candidates of a prompt are one and the same text at T = {at}."
        )
    return found


def _note(table: pd.DataFrame, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    judges = {str(task): str(rows["judge"].iloc[0]) for task, rows in table.groupby("task", sort=False)}
    parts = []
    for task, judge in judges.items():
        of_task = f"{summaries[task]['title']}: " if len(judges) > 1 else ""
        prompts = prompts_note(table.loc[table["task"] == task, "prompts"].tolist())
        parts.append(f"{of_task}judge {judge}, {prompts}" if of_task else f"Judge: {judge}. {prompts}")
    parts.append(
        f"The best of N by the learned reward. Bands and bars: {table['confidence'].iloc[0]:.0%} intervals over "
        f"{interval_sources(int(table['seeds'].max()))}. Operations: sampling and scoring all N."
    )
    facts = [{**summaries[task], "task": task} for task in judges]
    return " ".join([*parts, *data_notes(facts, judges)])


def over_seeds(curves: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The curves of all tasks and seeds, a row per task, run, temperature and N.

    Of several seeds the means; the interval of the win rate holds prompts and training, where the error over prompts is
    taken to be common to all of them (see `statistics.mean_over_seeds`). `seeds` says how many there are.
    """
    table = pd.concat(curves, ignore_index=True).drop(columns="seed")
    key = ["task", "run", "temperature", "n"]
    groups = table.groupby(key, sort=False)
    joined = table.drop_duplicates(key).set_index(key).assign(seeds=groups.size())
    if (joined["seeds"] > 1).any():
        numbers = [str(name) for name in table.select_dtypes("number") if name not in (*key, "prompts")]
        joined[numbers] = groups[numbers].mean()
        for place, rows in groups:
            z = stats.norm.ppf(0.5 + rows["confidence"].iloc[0] / 2)
            error = float((rows["ci_high"] - rows["ci_low"]).mean() / (2 * z))
            prompts, confidence = int(rows["prompts"].iloc[0]), float(rows["confidence"].iloc[0])
            if len(rows) > 1:
                found = mean_over_seeds(rows["win_rate"].tolist(), error, prompts, confidence).interval
                joined.loc[place, ["ci_low", "ci_high"]] = [max(0.0, found.low), min(1.0, found.high)]
    return joined.reset_index()[[*map(str, table.columns), "seeds"]]


def _draw(axes: Axes, rows: pd.DataFrame, x: str, positions: Mapping[Any, int]) -> None:
    own = rows["run"].iloc[0]
    curves = rows[rows["run"] == own]
    for temperature, curve in curves.groupby("temperature"):
        style = position_style(positions[temperature])
        ordered = curve.sort_values("n")
        label = f"Best of N, T = {temperature:g}"
        draw_curve(axes, style, label, *(ordered[name] for name in (x, "win_rate", "ci_low", "ci_high")))
    for _, one in rows[rows["run"] != own].iterrows():
        label = f"{display_name(one['run'])}, one sample, T = {one['temperature']:g}"
        spread = [[one["win_rate"] - one["ci_low"]], [one["ci_high"] - one["win_rate"]]]
        axes.errorbar(one[x], one["win_rate"], yerr=spread, color="black", marker="*", markersize=11, label=label)
        if x == "n":
            axes.axhline(one["win_rate"], color="black", linewidth=0.8, linestyle=(0, (1, 2)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `best_of_n_figure`."""
    parser.add_argument("--curves", required=True, type=Path, nargs="+", help="CSVs of the stage `best_of_n_curve`")
    parser.add_argument(
        "--summaries", required=True, type=Path, nargs="+", help="summaries of the data of their tasks, in their order"
    )
    parser.add_argument("--table", required=True, type=Path, help="CSV of all of them that is made")
    parser.add_argument("--out", required=True, type=Path, nargs="+", help="figures that are made: .svg, .png or .pdf")


def run(args: argparse.Namespace) -> None:
    """Joins the curves and draws them."""
    for path in args.curves:
        if not path.is_file():
            raise UserError(f"{path} does not exist: run the stage `best_of_n_curve`.")
    table = over_seeds([read_csv(path) for path in args.curves])
    summaries = dict(zip(dict.fromkeys(table["task"]), map(read_facts, args.summaries), strict=True))
    for caveat in caveats(table, summaries):
        logger.warning("warning: %s", caveat)
    write_csv(args.table, table)
    figure = best_of_n_figure(table, summaries)
    with figure_style():
        for path in args.out:
            save(figure, path)
