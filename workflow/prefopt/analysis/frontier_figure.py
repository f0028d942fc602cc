"""The stage `frontier_figure`: reward against KL, every checkpoint of every run and each method's frontier (Fig. 2)."""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D

from prefopt.analysis.caveats import data_notes, few_prompts, prompts_note, read_facts, titled
from prefopt.analysis.statistics import Z_95, mean_over_seeds
from prefopt.analysis.style import LineStyle, annotate, display_name, figure_style, line_styles, save
from prefopt.errors import UserError
from prefopt.experiment.methods import of_group
from prefopt.experiment.recipes import from_json
from prefopt.store.tables import read_csv

logger = logging.getLogger(__name__)

# Of the optimal frontier, beyond what can be relied on, this much more KL is shown in grey.
_BEYOND = 1.5
# The right edge, in units of the KL that half of the methods (three at least) reach, and how much farther another is followed.
_ROOM, _FAR = 1.5, 4.0

_LABEL = 34  # characters of a line of the legend

# A marker's size in points, from the run that stays nearest to the reference policy to the one that goes farthest.
_SMALLEST, _LARGEST = 3.0, 7.5
_MIDDLE = 5.0  # where there is nothing to tell apart

# What the true reward is, and its unit, by its kind (see `rewards.stage.TrueRewardsRecipe`).
REWARDS = {
    "rule": ("a rule that knows how the reviews are meant", "P(positive)"),
    "ngrams": ("n-grams of labelled reviews, by logistic regression", "P(positive)"),
    "classifier": ("a classifier of sentiment", "P(positive)"),
    "oracle": ("the quality that is hidden in the records' facts", "hidden quality"),
    "gold_reward_model": ("a reward model from pairs that no run has seen", "score of the gold reward model"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierFigureRecipe:
    """What the figure is of."""

    task: str
    methods: tuple[str, ...]  # whose frontiers are drawn, see `experiment.runs.group`
    title: str  # for a reader
    written: str  # what a program wrote where the records are synthetic
    true_reward: str  # see `REWARDS`


def frontier_figure(
    table: pd.DataFrame, ceiling: pd.DataFrame, recipe: FrontierFigureRecipe, summary: Mapping[str, Any]
) -> Figure:
    """Every checkpoint, each method's frontier as a line with 95% intervals, and the optimal frontier.

    A marker's size tells the run: its beta, alpha or target, as the legend lists them.

    Args:
        table: as the stage `frontier` wrote it.
        ceiling: as the stage `optimal_frontier` wrote it.
        recipe: task and true reward.
        summary: of the task's data, whose facts are written under the figure.
    """
    with figure_style():
        figure, axes = plt.subplots(figsize=(7.4, 5.4), layout="constrained")
        handles: list[Any] = []
        labels: list[str] = []
        for handle, label in _draw_ceiling(axes, ceiling):
            handles.append(handle)
            labels.append(label)
        ends: list[float] = []
        styles = line_styles(recipe.methods)
        for method in recipe.methods:
            rows = table[table["method"] == method]
            if rows.empty:
                continue
            ends.append(float(rows.loc[rows["on_frontier"], "kl"].max()))
            handles.append(_draw_method(axes, rows, method, styles[method]))
            labels.append(_label(method, list(marker_sizes(method, rows["conservativeness"]))))
        edge = right_edge(ends)
        axes.set_xlim(-0.02 * edge, edge)
        axes.set_title(titled(f"{recipe.title}: true reward against KL", summary), loc="left", fontweight="bold")
        axes.set_xlabel("KL to the reference policy, nats per completion")
        axes.set_ylabel(f"Mean true reward, {REWARDS[recipe.true_reward][1]}")
        figure.legend(
            *(handles, labels),
            loc="outside right center",
            handler_map={tuple: HandlerTuple(ndivide=None, pad=0.6)},
            handlelength=3.4,
            labelspacing=0.8,
            fontsize=8,
        )
        outside = int((table["kl"] > edge).sum())
        annotate(figure, _note(table, recipe, summary, outside), caveats(table))
        plt.close(figure)
    return figure


def caveats(table: pd.DataFrame) -> list[str]:
    """What takes from the weight of the frontiers, a sentence each."""
    found = few_prompts(int(table["prompts"].min()))
    if table["reward"].round(6).nunique() == 1:
        found.append("Every checkpoint has the same reward.")
    return found


def marker_sizes(method: str, conservativeness: pd.Series) -> dict[float, float]:
    """The size of the marker of each value that the method's runs have, in points; the freest run has the largest.

    Args:
        method: a larger beta or alpha holds a policy back, a larger target lets it go.
        conservativeness: the values; a method that varies nothing has none.
    """
    values = sorted(conservativeness.dropna().unique(), reverse=of_group(method).varies != "kl_target")
    if len(values) < 2:
        return dict.fromkeys(values, _MIDDLE)
    step = (_LARGEST - _SMALLEST) / (len(values) - 1)
    return {float(value): _SMALLEST + i * step for i, value in enumerate(values)}


def mean_frontier(rows: pd.DataFrame) -> pd.DataFrame:
    """The mean of the seeds' frontiers of a method, as far as all reach, with 95% intervals over prompts and seeds.

    Args:
        rows: the method's checkpoints.

    Returns:
        kl, reward, low and high. The error over prompts is taken to be common to all seeds (see
        `statistics.mean_over_seeds`).
    """
    lines = [line for _, line in rows[rows["on_frontier"]].sort_values("kl").groupby("seed")]
    grid = np.linspace(max(line["kl"].min() for line in lines), min(line["kl"].max() for line in lines), 61)
    reward, error = (
        np.array([np.interp(grid, line["kl"], line[name]) for line in lines]) for name in ("reward", "reward_se")
    )
    found = [
        mean_over_seeds(values.tolist(), float(errors.mean()), int(rows["prompts"].iloc[0]), 0.95)
        for values, errors in zip(reward.T, error.T, strict=True)
    ]
    ends = {"low": [one.interval.low for one in found], "high": [one.interval.high for one in found]}
    return pd.DataFrame({"kl": grid, "reward": reward.mean(axis=0), **ends})


def _draw_method(axes: Axes, rows: pd.DataFrame, method: str, style: LineStyle) -> tuple[Any, ...]:
    """Draws a method's checkpoints and its frontier; returns a handle of the legend for each size of marker."""
    several = rows["seed"].nunique() > 1
    for _, line in rows[rows["on_frontier"]].sort_values("kl").groupby("seed"):
        axes.errorbar(
            *(line["kl"], line["reward"]),
            xerr=None if several else Z_95 * line["kl_se"],
            yerr=None if several else Z_95 * line["reward_se"],
            color=style.color,
            linestyle=style.dashes,
            linewidth=0.6 if several else 1.5,
            elinewidth=0.7,
            alpha=0.4 if several else 1.0,
        )
    if several:
        mean = mean_frontier(rows)
        axes.plot(mean["kl"], mean["reward"], color=style.color, linestyle=style.dashes, linewidth=1.8)
        axes.fill_between(mean["kl"], mean["low"], mean["high"], color=style.color, alpha=0.13, linewidth=0)
    sizes = marker_sizes(method, rows["conservativeness"])
    handles = []
    for value, size in sizes.items() or [(float("nan"), _MIDDLE)]:
        of_value = rows[rows["conservativeness"] == value] if sizes else rows
        for on_frontier, alpha in ((False, 0.35), (True, 1.0)):
            these = of_value[of_value["on_frontier"] == on_frontier]
            axes.plot(
                *(these["kl"], these["reward"]),
                color=style.color,
                marker=style.marker,
                linestyle="none",
                markersize=size,
                alpha=alpha,
                markeredgewidth=0.5 if on_frontier else 0,
                markeredgecolor="white",
                zorder=3 if on_frontier else 2,
            )
        handles.append(Line2D([], [], color=style.color, marker=style.marker, linestyle="none", markersize=size))
    return tuple(handles)


def _label(method: str, values: Sequence[float]) -> str:
    symbol, name = of_group(method).symbol, textwrap.fill(display_name(method), _LABEL)
    if not symbol or not values:
        return name
    return f"{name}\n{symbol} = {', '.join(f'{value:g}' for value in values)}"


def _note(table: pd.DataFrame, recipe: FrontierFigureRecipe, summary: Mapping[str, Any], outside: int) -> str:
    per_prompt, seeds = table["samples"] / table["prompts"], table["seed"].nunique()
    frontier = "frontier, its bars 95% intervals over prompts"
    if seeds > 1:
        frontier = (
            f"mean frontier over {seeds} seeds, its bands 95% intervals over prompts and seeds, and thin each seed's"
        )
    parts = [
        f"True reward: {REWARDS[recipe.true_reward][0]}. {prompts_note(table['prompts'].tolist())}",
        f"{per_prompt.max():g} completion{'s' if per_prompt.max() > 1 else ''} of each. Lines and full colours: each method's "
        f"{frontier}; faint: its other checkpoints. Markers grow with the freedom of the "
        f"run, in the legend's order; the smallest KL is the reference policy.",
    ]
    if outside:
        parts.append(f"{outside} checkpoint{'s lie' if outside > 1 else ' lies'} beyond the right edge.")
    facts = {**summary, "task": recipe.task, "title": recipe.title, "written": recipe.written}
    program = {"oracle": "rule"}.get(recipe.true_reward, recipe.true_reward)
    return " ".join([*parts, *data_notes([facts], {recipe.task: program})])


def right_edge(ends: Sequence[float]) -> float:
    """Where the KL axis ends: policies that have collapsed lie far to the right, and may be on their frontier.

    Args:
        ends: the largest KL of each method's frontier, in nats.
    """
    reached = max(min(heapq.nlargest(max(3, (len(ends) + 1) // 2), ends), default=0.0), 0.1)
    return max([_ROOM * reached, *(1.05 * end for end in ends if end <= _FAR * reached)])


def _draw_ceiling(axes: Axes, ceiling: pd.DataFrame) -> Iterator[tuple[Any, str]]:
    """Draws the optimal frontier; yields handles and labels of the legend."""
    rows = ceiling.sort_values("kl")
    reliable = rows[rows["reliable"]]
    if reliable.empty:
        return
    last = reliable.iloc[-1]
    yield axes.plot(reliable["kl"], reliable["reward"], color="black", linewidth=1.3)[0], "Optimal frontier\n(estimate)"
    beyond = rows[(rows["kl"] >= last["kl"]) & (rows["kl"] <= last["kl"] + _BEYOND)]
    # Where few samples carry the weights, the estimate is too low.
    (grey,) = axes.plot(beyond["kl"], beyond["reward"], color="0.6", linewidth=1.0, linestyle=(0, (2, 1.5)))
    yield grey, f"the same, too low:\nfew of {last['samples']:,.0f} samples\ncarry the estimate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `frontier_figure`."""
    parser.add_argument("--frontier", required=True, type=Path, help="CSV of the stage `frontier`")
    parser.add_argument("--ceiling", required=True, type=Path, help="CSV of the stage `optimal_frontier`")
    parser.add_argument("--summary", required=True, type=Path, help="summary of the data, JSON")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, nargs="+", help="figures that are made: .svg, .png or .pdf")


def run(args: argparse.Namespace) -> None:
    """Draws the frontier."""
    for path in (args.frontier, args.ceiling):
        if not path.is_file():
            raise UserError(f"{path} does not exist: run the stage that makes it.")
    recipe, table = from_json(FrontierFigureRecipe, args.recipe), read_csv(args.frontier)
    for caveat in caveats(table):
        logger.warning("warning: %s", caveat)
    figure = frontier_figure(table, read_csv(args.ceiling), recipe, read_facts(args.summary))
    with figure_style():
        for path in args.out:
            save(figure, path)
