"""The stage `win_rate_figure`: win rate against sampling temperature, a line per run with its intervals."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.optimize import isotonic_regression

from prefopt.analysis.caveats import caveats_of, data_notes, interval_sources, titled
from prefopt.analysis.style import LineStyle, display_name, figure_style, line_styles, save
from prefopt.errors import UserError
from prefopt.store.files import read_json
from prefopt.store.tables import read_csv

_NAME, _CAVEAT = 0.178, 0.145  # inches of a name beside its line and of a line of a caveat
_LETTER = 0.075  # inches of a letter of a name
_DODGE = 0.07  # of the smallest step between temperatures, between neighbouring runs
_SPREAD = 0.6  # the same, for all of them together at most


def win_rate_figure(table: pd.DataFrame, manifest: dict[str, Any], by_seed: pd.DataFrame | None = None) -> Figure:
    """Draws the win rates of a task.

    Args:
        table: rows of the win-rate table, of one task.
        by_seed: the same of each seed, drawn faintly; None where there is one.
        manifest: its manifest; judge, prompts, what is synthetic, what was lost and what takes from the weight of the
            numbers are written on the figure.
    """
    styles = line_styles(table["run"])
    temperatures = sorted(set(table["temperature"]))
    step = min((b - a for a, b in itertools.pairwise(temperatures)), default=0.25)
    with figure_style():
        note = textwrap.fill(footnote(table, manifest), 126)
        caveats = [textwrap.fill(caveat, 96) for caveat in caveats_of(manifest)]
        above, below = sum(caveat.count("\n") + 1 for caveat in caveats), note.count("\n") + 1
        # Inches: of the axes room for every name, and lines of text above and below.
        tall = max(3.07, _NAME * len(styles))
        head, foot = 0.32 + _CAVEAT * above + 0.05 * bool(above), 0.6 + 0.152 * below
        # The longest name has room beside the axes.
        width = 5.7 + max(1.1, _LETTER * max(len(display_name(run)) for run in styles))
        figure, axes = plt.subplots(figsize=(width, tall + head + foot))
        top = min(1.04, max(0.6, table["ci_high"].max() + 0.04))
        ends = []
        for position, (run, style) in enumerate(styles.items()):
            rows = table[table["run"] == run].sort_values("temperature")
            shift = (position - (len(styles) - 1) / 2) * min(_DODGE, _SPREAD / len(styles)) * step
            _draw_run(axes, rows, shift, style)
            if by_seed is not None:
                of_run = by_seed[by_seed["run"] == run].sort_values("temperature")
                for _, one in of_run.groupby("seed"):
                    axes.plot(
                        one["temperature"] + shift,
                        one["win_rate"],
                        color=style.color,
                        linewidth=0.7,
                        alpha=0.3,
                        zorder=2,
                    )
            last = rows.iloc[-1]
            ends.append((float(last["win_rate"]), float(last["temperature"] + shift), display_name(run), style))
        axes.axhline(0.5, color="#444444", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        left, right = temperatures[0] - 0.4 * step, temperatures[-1] + 0.45 * step
        axes.set_xlim(left, right)
        axes.set_ylim(0, top)
        _label_lines(axes, ends, right, _NAME / tall)
        axes.set_xticks(temperatures)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        axes.set_xlabel("Sampling temperature")
        axes.set_ylabel(f"Win rate against {manifest['reference']}")
        axes.set_title(titled(manifest["title"], manifest), loc="left", fontweight="bold", y=1.01)
        if caveats:
            _write_above(axes, caveats, _CAVEAT * above / tall)
        height = tall + head + foot
        figure.subplots_adjust(left=0.68 / width, right=5.44 / width, top=1 - head / height, bottom=foot / height)
        figure.text(
            *(0.015, 0.015, note),
            fontsize=7,
            color="#333333",
            va="bottom",
            linespacing=1.35,
            parse_math=False,
        )
        plt.close(figure)
    return figure


def footnote(table: pd.DataFrame, manifest: dict[str, Any]) -> str:
    """What a reader must know of the numbers: judge, n, intervals, and what they do not mean."""
    confidence = manifest.get("recipe", {}).get("confidence", 0.95)
    task = str(table["task"].iloc[0])
    parts = [
        f"Judge: {manifest['judge']}. {manifest['test_prompts']} test prompts.",
        f"Bars: {confidence:.0%} intervals over {_sources(manifest)}; thin lines: for all temperatures of a run at once. Filled "
        f"marker: the temperature chosen on validation prompts. Dashed: as good as {manifest['reference']}.",
    ]
    if (invalid := int(table["invalid"].sum())) > 0:
        parts.append(f"{invalid} invalid verdicts are left out.")
    if table["flip_rate"].notna().any():
        parts.append(f"Shown in both orders, the judge changed its verdict in {table['flip_rate'].mean():.0%}.")
    if manifest.get("judge_accuracy") is not None:
        parts.append(
            f"The judge agrees with {manifest['judge_accuracy']:.0%} of held-out comparisons "
            f"[{manifest['judge_accuracy_low']:.0%}, {manifest['judge_accuracy_high']:.0%}]; "
            f'"the longer one wins" with {manifest["longer_wins_accuracy"]:.0%}.'
        )
    facts = {
        "task": task,
        **{word: manifest[word] for word in ("title", "written")},
        "synthetic": manifest.get("synthetic", False),
        "warnings": manifest.get("data_warnings", []),
    }
    return " ".join([*parts, *data_notes([facts], {task: str(manifest["judge"])})])


def _sources(manifest: dict[str, Any]) -> str:
    """What the intervals hold, in words."""
    seeds = len(manifest.get("seeds", [0]))
    return interval_sources(seeds) + (" (faint: each of them)" if seeds > 1 else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `win_rate_figure`."""
    parser.add_argument("--win-rates", required=True, type=Path, help="CSV of the stage `win_rates`")
    parser.add_argument("--by-seed", required=True, type=Path, help="its CSV of each seed")
    parser.add_argument("--manifest", required=True, type=Path, help="its JSON manifest")
    parser.add_argument("--out", required=True, type=Path, nargs="+", help="figures that are made: .svg, .png or .pdf")


def run(args: argparse.Namespace) -> None:
    """Draws the figure and writes it in each format that is asked for."""
    table, by_seed = read_win_rates(args.win_rates), read_win_rates(args.by_seed)
    several = by_seed["seed"].nunique() > 1
    figure = win_rate_figure(table, read_json(args.manifest), by_seed if several else None)
    with figure_style():
        for path in args.out:
            save(figure, path)


def read_win_rates(path: str | Path) -> pd.DataFrame:
    """The win-rate table as it was written.

    Raises:
        UserError: it is missing, empty, or lacks a column.
    """
    table = read_csv(path)
    needed = ["task", "run", "temperature", "selected", "win_rate", "ci_low", "ci_high", "band_low", "band_high"]
    needed += ["flip_rate", "invalid"]
    if missing := [column for column in needed if column not in table.columns]:
        raise UserError(f"{path} lacks the column {missing[0]!r}: run the stage `win_rates` again.")
    if table.empty:
        raise UserError(f"{path} has no rows: run the stage `win_rates` again.")
    return table


def _draw_run(axes: Axes, rows: pd.DataFrame, shift: float, style: LineStyle) -> None:
    x, y = rows["temperature"] + shift, rows["win_rate"]
    axes.vlines(x, rows["band_low"], rows["band_high"], color=style.color, linewidth=0.5, alpha=0.55, zorder=2)
    axes.vlines(x, rows["ci_low"], rows["ci_high"], color=style.color, linewidth=1.4, alpha=0.55, zorder=2)
    axes.plot(x, y, color=style.color, linestyle=style.dashes, linewidth=1.6, zorder=3)
    for chosen, face in ((False, "white"), (True, style.color)):
        here = rows["selected"] == chosen
        axes.plot(
            *(x[here], y[here]),
            color=style.color,
            linestyle="none",
            marker=style.marker,
            markersize=7 if chosen else 5.5,
            markerfacecolor=face,
            markeredgewidth=1.3,
            zorder=4,
        )


def _label_lines(axes: Axes, ends: Sequence[tuple[float, float, str, LineStyle]], right: float, share: float) -> None:
    """Each line's name beside its last point, moved apart where names would touch: by this share of the axes."""
    low, high = axes.get_ylim()
    ordered = sorted((end for end in ends if end[0] == end[0]), key=lambda end: end[:3])
    # The nearest heights to those of the lines that lie in their order, this far apart and within the axes.
    gaps = (high - low) * share * np.arange(len(ordered))
    wanted = isotonic_regression(np.array([y for y, *_ in ordered]) - gaps).x if ordered else gaps
    half = (high - low) * share / 2
    heights = np.clip(wanted, low + half, max(low + half, high - half - float(gaps[-1:].sum()))) + gaps
    span = right - axes.get_xlim()[0]
    for (y, x, name, style), height in zip(ordered, heights, strict=True):
        axes.plot(
            [x + 0.012 * span, right + 0.012 * span],
            [y, height],
            color=style.color,
            linewidth=0.7,
            alpha=0.7,
            clip_on=False,
            zorder=1,
        )
        axes.plot(
            [right + 0.03 * span],
            [height],
            color=style.color,
            marker=style.marker,
            markersize=5,
            clip_on=False,
            linestyle="none",
        )
        axes.text(
            *(right + 0.05 * span, height, name),
            color=style.color,
            va="center_baseline",
            clip_on=False,
        )


def _write_above(axes: Axes, caveats: Sequence[str], room: float) -> None:
    """Caveats in a frame between title and axes, which takes this room in units of the axes."""
    axes.set_title(axes.get_title(loc="left"), loc="left", fontweight="bold", y=1.03 + room)
    axes.text(
        *(0.0, 1.025, "\n".join(caveats)),
        transform=axes.transAxes,
        fontsize=8,
        fontweight="bold",
        va="bottom",
        parse_math=False,
        bbox={"facecolor": "white", "edgecolor": "black", "linewidth": 0.9, "pad": 2.5},
    )
