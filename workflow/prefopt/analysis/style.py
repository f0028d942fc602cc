"""How figures look: colours that the colour-blind and a grey printer keep apart, and files that do not vary."""

from __future__ import annotations

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefopt.experiment.methods import METHODS, n_of
from prefopt.experiment.runs import round_of
from prefopt.store.files import atomic_path

matplotlib.use("Agg")

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "prefopt",
    "svg.fonttype": "path",  # a viewer without the font would draw another one over its neighbours
    "pdf.fonttype": 42,  # TrueType, as publishers ask
}
# What a file says of itself that another day, or another release of matplotlib, would write differently.
_VARYING = {"svg": ["Date"], "png": ["Software"], "pdf": ["CreationDate", "Creator", "Producer"]}


@dataclasses.dataclass(frozen=True)
class LineStyle:
    """Colour, marker and dashes of one line; any one of them is enough to tell it from the others."""

    color: str
    marker: str
    dashes: str | tuple[float, tuple[float, ...]]


# Okabe and Ito's palette (2008), less its yellow, which is too light for a line.
_STYLES = [
    LineStyle("#0072B2", "o", "solid"),
    LineStyle("#D55E00", "s", (0, (5, 1.5))),
    LineStyle("#009E73", "^", (0, (1, 1.2))),
    LineStyle("#CC79A7", "D", (0, (6, 1.5, 1, 1.5))),
    LineStyle("#000000", "v", (0, (3, 1.5))),
    LineStyle("#56B4E9", "P", (0, (8, 2))),
    LineStyle("#E69F00", "X", (0, (4, 1.5, 1, 1.5, 1, 1.5))),
]
# Models that are no methods.
_MODELS = {
    "classifier": "Classifier",
    "reward_model": "Reward model",
    "gold_reward_model": "Gold reward model (judge)",
    "gold": "Gold reward model (judge)",
    "pretrain": "Pretraining",
}


def display_name(run: str) -> str:
    """A run's name for a reader: "best_of_128" becomes "Best of 128"; a name of the user's own stays as it is.

    Of a group of runs (`experiment.runs.group`) its values stay behind the method's, a section of them without its braces.
    """
    name, start, values = run.partition(" (")
    if start:
        return display_name(name) + start + re.sub(r"[{}':]", "", values)
    if of_step := re.fullmatch(r"(.+)_step_([0-9]+)", run):
        return f"{display_name(of_step[1])} after {of_step[2]} steps"
    if of_round := round_of(run):
        return f"{display_name(of_round[0])}, round {of_round[1]}"
    if n := n_of(run):
        return f"Best of {n}"
    return METHODS[run].label if run in METHODS else _MODELS.get(run, run)


def position_style(position: int) -> LineStyle:
    """A style by position; of 49 no two are alike, and of the first seven no two share a colour, marker or dashes."""
    turn = position // len(_STYLES)
    color, marker, dashes = (_STYLES[(position + n * turn) % len(_STYLES)] for n in range(3))
    return LineStyle(color.color, marker.marker, dashes.dashes)


def line_styles(runs: Iterable[str]) -> dict[str, LineStyle]:
    """A style for each run of a figure, no two alike for forty of them.

    A run that is called as its method has the method's, the same in every figure; others take, in their order, those
    that no method has.
    """
    further = itertools.count(1 + max(method.style for method in METHODS.values()))
    places: dict[str, int] = {}
    for run in dict.fromkeys(runs):
        method = METHODS.get("best_of_n" if n_of(run) else run)
        free = method is not None and method.style not in places.values()
        places[run] = method.style if method and free else next(further)
    return {run: position_style(place) for run, place in places.items()}


def draw_curve(
    axes: Axes, style: LineStyle, label: str | None, x: pd.Series, y: pd.Series, low: pd.Series, high: pd.Series
) -> None:
    """A line with the band of its interval; its points are marked where they are few."""
    axes.fill_between(x, low, high, color=style.color, alpha=0.13, linewidth=0)
    marker = style.marker if len(x) < 20 else None
    axes.plot(
        *(x, y), color=style.color, linestyle=style.dashes, marker=marker, markersize=4.5, linewidth=1.5, label=label
    )


@contextmanager
def figure_style() -> Iterator[None]:
    """Matplotlib's settings for a figure of this project."""
    with matplotlib.rc_context(_RC):
        yield


def annotate(figure: Figure, note: str, caveats: Sequence[str]) -> None:
    """Writes a note under a figure and, in a frame above it, what takes from its weight.

    The figure has the layout `constrained`, which makes room for both; it grows by what stands above, and to what a legend
    outside its axes takes, which is centred and touches neither. Names in them are a config's or an endpoint's and are no
    formulas.

    Args:
        figure: the finished figure.
        note: what a reader must know of the numbers.
        caveats: sentences.
    """
    width = figure.get_figwidth()
    note = textwrap.fill(note, int(19 * width))
    above = "\n".join(textwrap.fill(caveat, int(15 * width)) for caveat in caveats)
    legend = max((legend.get_window_extent().height / figure.dpi for legend in figure.legends), default=0.0)
    head, foot = 0.155 * (above.count("\n") + 1) + 0.1 if caveats else 0.0, 0.135 * (note.count("\n") + 1) + 0.1
    figure.set_figheight(max(figure.get_figheight() + head, legend + 2 * max(head, foot)))
    figure.supxlabel(
        note,
        **{"x": 0.008, "ha": "left", "fontsize": 7, "color": "#333333", "linespacing": 1.35, "parse_math": False},
    )
    if caveats:
        figure.suptitle(
            above,
            **{"x": 0.02, "ha": "left", "fontsize": 8, "fontweight": "bold", "parse_math": False},
            bbox={"facecolor": "white", "edgecolor": "black", "linewidth": 0.9, "pad": 3},
        )


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as its file's suffix says, byte for byte the same for the same content."""
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    metadata = dict.fromkeys(_VARYING[kind])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, metadata=metadata, dpi=200)
