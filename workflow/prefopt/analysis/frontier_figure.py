"""The stage `frontier_figure`: reward against KL, every checkpoint of every run and each method's frontier (Fig. 2)."""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import norm

from prefopt.analysis.dominance import METHODS
from prefopt.analysis.style import display_name, figure_style, line_style, save
from prefopt.errors import UserError

_Z = float(norm.ppf(0.975))
# Of the optimal frontier, beyond what can be relied on, this much more KL is shown in grey.
_BEYOND = 1.5
# The right edge, in units of the KL that three methods' frontiers reach.
_ROOM = 1.5


def frontier_figure(table: pd.DataFrame, ceiling: pd.DataFrame) -> Figure:
    """Every checkpoint as a dot, each method's frontier as a line with 95% intervals, and the optimal frontier.

    Args:
        table: as the stage `frontier` wrote it.
        ceiling: as the stage `optimal_frontier` wrote it.
    """
    with figure_style():
        figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
        _draw_ceiling(axes, ceiling)
        ends: list[float] = []
        for method in METHODS:
            rows = table[table["method"] == method]
            if rows.empty:
                continue
            style = line_style(method)
            axes.plot(
                *(rows["kl"], rows["reward"]),
                color=style.color,
                marker=style.marker,
                linestyle="none",
                markersize=3.2,
                alpha=0.35,
                markeredgewidth=0,
            )
            line = rows[rows["on_frontier"]].sort_values("kl")
            ends.append(float(line["kl"].max()))
            axes.errorbar(
                *(line["kl"], line["reward"]),
                xerr=_Z * line["kl_se"],
                yerr=_Z * line["reward_se"],
                color=style.color,
                marker=style.marker,
                linestyle=style.dashes,
                markersize=4.5,
                linewidth=1.5,
                elinewidth=0.7,
                label=display_name(method),
            )
        edge = right_edge(ends)
        axes.set_xlim(-0.02 * edge, edge)
        outside = int((table["kl"] > edge).sum())
        axes.set_xlabel(
            "KL to the reference policy, nats per completion"
            + (f" ({outside} beyond the right edge)" if outside else "")
        )
        axes.set_ylabel("Mean true reward, P(positive)")
        axes.legend(loc="lower right")
        plt.close(figure)
    return figure


def right_edge(ends: Sequence[float]) -> float:
    """Where the KL axis ends: policies that have collapsed lie far to the right, and may be on their frontier.

    Args:
        ends: the largest KL of each method's frontier, in nats.
    """
    return _ROOM * max(min(heapq.nlargest(3, ends), default=0.0), 0.1)


def _draw_ceiling(axes: Axes, ceiling: pd.DataFrame) -> None:
    rows = ceiling.sort_values("kl")
    reliable = rows[rows["reliable"]]
    if reliable.empty:
        return
    last = reliable.iloc[-1]
    axes.plot(reliable["kl"], reliable["reward"], color="black", linewidth=1.3, label="Optimal frontier (estimate)")
    beyond = rows[(rows["kl"] >= last["kl"]) & (rows["kl"] <= last["kl"] + _BEYOND)]
    # Where few samples carry the weights, the estimate is too low.
    few = f"its estimate from under {last['effective_samples']:.0f} of {last['samples']:.0f} samples, too low"
    axes.plot(beyond["kl"], beyond["reward"], color="0.6", linewidth=1.0, linestyle=(0, (2, 1.5)), label=few)
    for wanted in (1000, 100):
        enough = reliable[reliable["effective_samples"] >= wanted]
        # Where nearly all samples carry the weights, the mark would lie on the axis.
        if 0 < len(enough) < len(reliable) and wanted < last["samples"] / 3:
            point = enough.iloc[-1]
            axes.plot(point["kl"], point["reward"], color="black", marker="|", markersize=7)
            axes.annotate(
                f"{wanted} ", (point["kl"], point["reward"]), ha="right", va="bottom", fontsize=7, color="0.25"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `frontier_figure`."""
    parser.add_argument("--frontier", required=True, type=Path, help="CSV of the stage `frontier`")
    parser.add_argument("--ceiling", required=True, type=Path, help="CSV of the stage `optimal_frontier`")
    parser.add_argument("--out", required=True, type=Path, nargs="+", help="figures that are made, .svg or .png")


def run(args: argparse.Namespace) -> None:
    """Draws the frontier."""
    for path in (args.frontier, args.ceiling):
        if not path.is_file():
            raise UserError(f"{path} does not exist: run the stage that makes it.")
    figure = frontier_figure(pd.read_csv(args.frontier), pd.read_csv(args.ceiling))
    with figure_style():
        for path in args.out:
            save(figure, path)
