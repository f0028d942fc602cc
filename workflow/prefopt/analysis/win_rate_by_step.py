"""The stage `win_rate_by_step`: the win rate of runs over training steps at each temperature (Fig. 3, right)."""

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

from prefopt.analysis.caveats import data_notes, equal_texts, few_prompts, prompts_note, read_facts, titled
from prefopt.analysis.statistics import crossed_mean
from prefopt.analysis.style import annotate, display_name, draw_curve, figure_style, position_style, save
from prefopt.analysis.texts import write_csv
from prefopt.analysis.verdicts import read_verdicts, seed_scores
from prefopt.analysis.win_rates import tally
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.store.tables import read_table

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByStepTableRecipe:
    """The task, its runs that were sampled while they trained, and the confidence of the intervals."""

    task: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    confidence: float


def step_table(verdicts: pd.DataFrame, recipe: ByStepTableRecipe) -> pd.DataFrame:
    """A row per run, step and temperature, on the test prompts.

    Args:
        verdicts: verdicts tables, whose runs are a run's name, "_step_" and a number of steps, with the column seed.
        recipe: task, runs, seeds and confidence.

    Returns:
        Of several seeds the mean, with its interval over prompts and seeds (see `statistics.crossed_mean`); counts are sums.

    Raises:
        UserError: another run is among them.
    """
    test = verdicts[verdicts["split"] == "test"]
    names = test["run"].str.rpartition("_step_")
    if odd := sorted(set(test["run"][~names[0].isin(recipe.runs)])):
        raise UserError(f"The verdicts hold the run {odd[0]!r}, which is no step of {' or '.join(recipe.runs)}.")
    rows = [
        {
            "task": recipe.task,
            "run": run,
            "step": step,
            "temperature": temperature,
            **tally(group, recipe.confidence),
            **_over_seeds(group, recipe),
            "seeds": len(recipe.seeds),
            "mean_tokens": group["tokens"].mean(),
            "prompts": group["prompt_id"].nunique(),
            "confidence": recipe.confidence,
            "judge": group["judge"].iloc[0],
        }
        for (run, step, temperature), group in test.groupby([names[0], names[2].astype(int), "temperature"])
    ]
    table = pd.DataFrame(rows)
    return table.sort_values("run", key=lambda column: column.map(recipe.runs.index), kind="stable", ignore_index=True)


def _over_seeds(group: pd.DataFrame, recipe: ByStepTableRecipe) -> dict[str, float]:
    """Mean and interval of several seeds' win rate, in place of those of all their verdicts."""
    if len(recipe.seeds) == 1:
        return {}
    scores = seed_scores(group)
    found = crossed_mean(scores, recipe.confidence, 0.0, 1.0)
    return {"win_rate": found.mean, "ci_low": found.interval.low, "ci_high": found.interval.high}


def by_step_figure(table: pd.DataFrame, summary: dict[str, Any], caveats: Sequence[str]) -> Figure:
    """Win rate against training steps, a line and a band per run and temperature.

    Args:
        table: see `step_table`.
        summary: of the task's data, whose facts are written under the figure.
        caveats: sentences that are written above it.
    """
    task, judge = str(table["task"].iloc[0]), str(table["judge"].iloc[0])
    with figure_style():
        figure, axes = plt.subplots(figsize=(5.4, 4.4), layout="constrained")
        axes.axhline(0.5, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
        for position, ((run, temperature), rows) in enumerate(table.groupby(["run", "temperature"], sort=False)):
            style = position_style(position)
            label = f"{display_name(str(run))}, T = {temperature:g}"
            draw_curve(axes, style, label, *(rows[name] for name in ("step", "win_rate", "ci_low", "ci_high")))
        names = " and ".join(display_name(run) for run in dict.fromkeys(table["run"]))
        axes.set_title(titled(f"{summary['title']}: {names} while training", summary), loc="left", fontweight="bold")
        axes.set_xlabel("Training steps (0 is where training starts)")
        axes.set_ylabel(f"Win rate against {summary['reference']}")
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        note = (
            f"Judge: {judge}. {prompts_note(table['prompts'].tolist())} Bands: {table['confidence'].iloc[0]:.0%} intervals "
            f"over prompts{_sources(int(table['seeds'].iloc[0]))}. Dotted: as good as {summary['reference']}."
        )
        annotate(figure, " ".join([note, *data_notes([{**summary, "task": task}], {task: judge})]), caveats)
        plt.close(figure)
    return figure


def _sources(seeds: int) -> str:
    return ", of one training each" if seeds == 1 else f" and over {seeds} trainings each"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `win_rate_by_step`."""
    parser.add_argument(
        "--verdicts", required=True, type=Path, nargs="+", help="verdicts on a run's samples at each step"
    )
    parser.add_argument("--samples", required=True, type=Path, nargs="+", help="these samples")
    parser.add_argument("--summary", required=True, type=Path, help="summary of the data, JSON")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--table", required=True, type=Path, help="CSV that is made")
    parser.add_argument("--out", required=True, type=Path, nargs="+", help="figures that are made: .svg, .png or .pdf")


def run(args: argparse.Namespace) -> None:
    """Writes the table and draws it."""
    recipe = from_json(ByStepTableRecipe, args.recipe)
    of_run = [seed for seed in recipe.seeds for _ in recipe.runs]
    frames = [read_verdicts(path).assign(seed=seed) for path, seed in zip(args.verdicts, of_run, strict=True)]
    table = step_table(pd.concat(frames, ignore_index=True), recipe)
    samples = pd.concat([read_table(path, "samples") for path in args.samples], ignore_index=True)
    caveats = [*few_prompts(int(table["prompts"].min())), *equal_texts(samples[samples["split"] == "test"])]
    for caveat in caveats:
        logger.warning("warning: %s", caveat)
    write_csv(args.table, table)
    figure = by_step_figure(table, read_facts(args.summary), caveats)
    with figure_style():
        for path in args.out:
            save(figure, path)
