"""The stage `win_rate_by_step`: DPO's win rate over training steps at each temperature (Fig. 3, right)."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from prefopt.analysis.caveats import data_notes, equal_texts, few_prompts, prompts_note, read_facts
from prefopt.analysis.style import annotate, figure_style, position_style, reference_name, save, task_name
from prefopt.analysis.texts import write_csv
from prefopt.analysis.verdicts import read_verdicts
from prefopt.analysis.win_rates import tally
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.store.tables import read_table

logger = logging.getLogger(__name__)

_METHOD = "dpo_step_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByStepTableRecipe:
    """The task, and the confidence of the intervals."""

    task: str
    confidence: float


def step_table(verdicts: pd.DataFrame, recipe: ByStepTableRecipe) -> pd.DataFrame:
    """A row per step and temperature, on the test prompts.

    Args:
        verdicts: verdicts table, whose methods are "dpo_step_" and a number of steps.
        recipe: task and confidence.

    Raises:
        UserError: another method is among them.
    """
    test = verdicts[verdicts["split"] == "test"]
    if odd := sorted(method for method in set(test["method"]) if not method.startswith(_METHOD)):
        raise UserError(f"The verdicts hold the method {odd[0]!r}, which is no step of DPO: pass those of its steps.")
    steps = test["method"].str.removeprefix(_METHOD).astype(int)
    rows = [
        {
            "task": recipe.task,
            "step": step,
            "temperature": temperature,
            **tally(group, recipe.confidence),
            "mean_tokens": group["tokens"].mean(),
            "prompts": group["prompt_id"].nunique(),
            "confidence": recipe.confidence,
            "judge": group["judge"].iloc[0],
        }
        for (step, temperature), group in test.groupby([steps.rename("step"), "temperature"])
    ]
    return pd.DataFrame(rows)


def by_step_figure(table: pd.DataFrame, summary: dict[str, Any], caveats: Sequence[str]) -> Figure:
    """Win rate against training steps, a line and a band per temperature.

    Args:
        table: see `step_table`.
        summary: of the task's data, whose facts are written under the figure.
        caveats: sentences that are written above it.
    """
    task, judge = str(table["task"].iloc[0]), str(table["judge"].iloc[0])
    with figure_style():
        figure, axes = plt.subplots(figsize=(5.4, 4.4), layout="constrained")
        axes.axhline(0.5, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
        for position, (temperature, rows) in enumerate(table.groupby("temperature")):
            style = position_style(position)
            axes.fill_between(rows["step"], rows["ci_low"], rows["ci_high"], color=style.color, alpha=0.13, linewidth=0)
            axes.plot(
                *(rows["step"], rows["win_rate"]),
                color=style.color,
                linestyle=style.dashes,
                marker=style.marker,
                markersize=4.5,
                linewidth=1.5,
                label=f"DPO, T = {temperature:g}",
            )
        kind = " (synthetic records)" if summary["synthetic"] else ""
        axes.set_title(f"{task_name(task)}: DPO while it trains{kind}", loc="left", fontweight="bold")
        axes.set_xlabel("Training steps (0 is the reference policy)")
        axes.set_ylabel(f"Win rate against {reference_name(task)}")
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        note = (
            f"Judge: {judge}. {prompts_note(table['prompts'].tolist())} Bands: {table['confidence'].iloc[0]:.0%} intervals "
            f"over prompts, of this one training. Dotted: as good as {reference_name(task)}."
        )
        annotate(figure, " ".join([note, *data_notes([{**summary, "task": task}], {task: judge})]), caveats)
        plt.close(figure)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `win_rate_by_step`."""
    parser.add_argument("--verdicts", required=True, type=Path, help="verdicts on DPO's samples at each step")
    parser.add_argument("--samples", required=True, type=Path, help="these samples")
    parser.add_argument("--summary", required=True, type=Path, help="summary of the data, JSON")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--table", required=True, type=Path, help="CSV that is made")
    parser.add_argument("--out", required=True, type=Path, nargs="+", help="figures that are made, .svg or .png")


def run(args: argparse.Namespace) -> None:
    """Writes the table and draws it."""
    table = step_table(read_verdicts(args.verdicts), from_json(ByStepTableRecipe, args.recipe))
    samples = read_table(args.samples, "samples")
    caveats = [*few_prompts(int(table["prompts"].min())), *equal_texts(samples[samples["split"] == "test"])]
    for caveat in caveats:
        logger.warning("warning: %s", caveat)
    write_csv(args.table, table)
    figure = by_step_figure(table, read_facts(args.summary), caveats)
    with figure_style():
        for path in args.out:
            save(figure, path)
