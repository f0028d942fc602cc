"""The stage `training_figure`: what each trainer measured as it went, a row of panels a trainer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefopt.analysis.caveats import read_facts, titled
from prefopt.analysis.style import display_name, figure_style, save
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json

Metrics = Sequence[Mapping[str, Any]]

_COLUMNS = 4
_COLORS = ("#0072B2", "#D55E00", "#009E73")
_DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)), (0, (1, 1.2)))


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel: its title, the label and unit of its axis, and the metrics drawn in it by their names."""

    title: str
    label: str
    series: Mapping[str, str]
    chance: float | None = None  # where knowing nothing would lie


_PANELS = (
    Panel("Loss", "Loss (nats)", {"loss": ""}),
    Panel("Implicit reward margin", "Chosen − rejected (nats)", {"margin": ""}, chance=0.0),
    Panel("Accuracy", "Pairs ranked rightly", {"accuracy": ""}, chance=0.5),
    Panel(
        "Log-probability",
        "Per completion (nats)",
        {"chosen_logp": "chosen", "rejected_logp": "rejected"},
    ),
    Panel("Margin of a label", "On its side of z0 (nats)", {"kto_margin": ""}, chance=0.0),
    Panel("Accuracy", "On their label's side of z0", {"kto_accuracy": ""}, chance=0.5),
    Panel("Reward", "Reward model's score", {"reward": ""}, chance=0.0),
    Panel("KL to the reference", "Nats per completion", {"kl": ""}),
    Panel("Clip fraction", "Share of tokens", {"clip_fraction": ""}),
    Panel("Value loss", "Squared error", {"value_loss": ""}),
    Panel("Learning rate", "Learning rate", {"learning_rate": ""}),
)
# A figure that has a better panel of its own: the policy loss of PPO says nothing, and a reward model's margin
# is of another kind than DPO's.
_ONLY_WITH = {"margin": "chosen_logp"}
_NOT_WITH = {"loss": "clip_fraction"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingFigureRecipe:
    """How the figure speaks of its task."""

    title: str


def training_figure(
    title: str, runs: Mapping[str, Metrics], further: Mapping[str, Sequence[Metrics]] | None = None
) -> Figure:
    """Draws the metrics of each trainer.

    Args:
        title: of the figure.
        runs: by trainer's name, its metrics: mappings with `step`, `split` ("train" or "validation") and figures.
        further: the metrics of its trainings with other seeds, which are drawn faintly.
    """
    rows = {name: _panels_of(metrics) for name, metrics in runs.items()}
    with figure_style():
        figure, grid = plt.subplots(len(rows), _COLUMNS, figsize=(2.65 * _COLUMNS, 2.25 * len(rows)), squeeze=False)
        for axes_row, (name, panels) in zip(grid, rows.items(), strict=True):
            for axes in axes_row[len(panels) :]:
                axes.set_axis_off()
            for axes, panel in zip(axes_row, panels, strict=False):
                _draw_panel(axes, panel, runs[name], (further or {}).get(name, ()))
            axes_row[0].annotate(
                display_name(name),
                (0, 1),
                xytext=(-44, 25),
                xycoords="axes fraction",
                textcoords="offset points",
                fontsize=11,
                fontweight="bold",
                annotation_clip=False,
            )
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.tight_layout(h_pad=1.6, w_pad=1.0)
        plt.close(figure)
    return figure


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The metrics of one trainer, from JSON lines.

    Raises:
        UserError: the file is missing or empty, or a line is not a JSON object with `step` and `split`.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): run its trainer again.") from error
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error.msg}): run its trainer again.") from error
        if not isinstance(row, dict) or not {"step", "split"} <= row.keys():
            raise UserError(f"{path}, line {number} lacks `step` or `split`: run its trainer again.")
        metrics.append(row)
    if not metrics:
        raise UserError(f"{path} holds no metrics: run its trainer again.")
    return metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `training_figure`."""
    parser.add_argument(
        "--metrics", required=True, type=Path, nargs="+", help="JSON-lines files, each named after its trainer"
    )
    parser.add_argument("--summary", required=True, type=Path, help="summary of the data, JSON")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, nargs="+", help="figures that are made: .svg, .png or .pdf")


def run(args: argparse.Namespace) -> None:
    """Draws the figure and writes it in each format that is asked for."""
    every: dict[str, list[Metrics]] = {}
    for path in args.metrics:
        every.setdefault(path.stem, []).append(read_metrics(path))
    first = {name: each[0] for name, each in every.items()}
    recipe = from_json(TrainingFigureRecipe, args.recipe)
    title = titled(f"{recipe.title}: training curves", read_facts(args.summary))
    figure = training_figure(title, first, {name: each[1:] for name, each in every.items()})
    with figure_style():
        for path in args.out:
            save(figure, path)


def _panels_of(metrics: Metrics) -> list[Panel]:
    keys = {key for row in metrics for key in row}

    def fits(key: str) -> bool:
        return key in keys and _ONLY_WITH.get(key, key) in keys and _NOT_WITH.get(key) not in keys

    return [panel for panel in _PANELS if any(map(fits, panel.series))][:_COLUMNS]


def _points(metrics: Metrics, key: str, split: str) -> list[tuple[float, float]]:
    """Steps and finite values of a metric in a split."""
    return [
        (row["step"], row[key])
        for row in metrics
        if row["split"] == split and isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]


def _draw_panel(axes: Axes, panel: Panel, metrics: Metrics, further: Sequence[Metrics]) -> None:
    """Training as a thin line, validation as a thick one with markers; several metrics by colour and dashes."""
    for others in further:
        for key in panel.series:
            points = _points(others, key, "validation") or _points(others, key, "train")
            axes.plot(*zip(*points, strict=True), color="#000000", linewidth=0.6, alpha=0.3, zorder=1)
    update = "PPO update" if any("clip_fraction" in row for row in metrics) else "Optimizer step"
    several = len(panel.series) > 1
    labels: set[str] = set()
    for index, (key, name) in enumerate(panel.series.items()):
        for split in ("validation", "train"):
            points = _points(metrics, key, split)
            if not points:
                continue
            held_out = split == "validation"
            label = name or split
            axes.plot(
                *zip(*points, strict=True),
                color=_COLORS[index] if several else "#000000" if held_out else "#56B4E9",
                linestyle=_DASHES[index] if several else "solid",
                linewidth=1.5 if held_out else 0.9,
                alpha=1.0 if held_out else 0.75,
                marker=("o", "s", "^")[index] if held_out else "",
                markersize=3,
                label=label if label not in labels else "_nolegend_",
                zorder=3 if held_out else 2,
            )
            labels.add(label)
    if panel.chance is not None:
        axes.axhline(panel.chance, color="#666666", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.set_title(panel.title, loc="left")
    axes.set_ylabel(panel.label, fontsize=8)
    axes.set_xlabel(update, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labelsize=8)
    if panel.title == "Learning rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.yaxis.get_offset_text().set_fontsize(7)
    if len(labels) > 1:
        axes.legend(
            fontsize=7,
            loc="best",
            handlelength=2.2,
            borderpad=0.2,
            labelspacing=0.3,
            frameon=True,
            edgecolor="none",
            framealpha=0.8,
        )
