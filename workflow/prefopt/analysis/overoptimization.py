"""The stage `overoptimization`: learned and true reward against the square root of KL, and where they part.

Gao, Schulman and Hilton (2023, "Scaling Laws for Reward Model Overoptimization", section 3.1) fit the true reward of a
policy, less that of the reference policy, by d (a - b d) for the best of N and d (a - b log d) for reinforcement learning, where
d is the square root of the KL to the reference policy. Both are linear in a and b.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from statsmodels.stats.multitest import multipletests

from prefopt.analysis.best_of_n_curve import best_of_n_weights
from prefopt.analysis.caveats import data_notes, few_prompts, prompts_note, read_facts, titled
from prefopt.analysis.statistics import Z_95, mean_over_seeds, sign_flip_p
from prefopt.analysis.style import LineStyle, annotate, display_name, draw_curve, figure_style, line_styles, save
from prefopt.analysis.texts import write_csv
from prefopt.analysis.win_rates import best_of_n_bound
from prefopt.errors import UserError
from prefopt.experiment.methods import of_group
from prefopt.experiment.recipes import from_json
from prefopt.store.tables import read_table

logger = logging.getLogger(__name__)

BEST_OF_N = "best_of_n"
_RESAMPLES = 2000
_KEY = ["prompt_id", "temperature", "sample_index"]

Form = Literal["best_of_n", "rl"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OveroptimizationRecipe:
    """Whose the tables are, in their order, and what is said of their tasks."""

    # Task, seed and run of each evaluations table, and whether the run's loss is on log-ratios of a token.
    runs: tuple[tuple[str, int, str, bool], ...]
    candidates: tuple[tuple[str, int], ...]  # task and seed of each table of candidates
    # Name, title, what is written where it is synthetic, true reward, and how sure an interval and an alarm are.
    tasks: tuple[tuple[str, str, str, str, float], ...]
    seed: int  # of resamples


@dataclasses.dataclass(frozen=True)
class Optimized:
    """A run, or the best of N, at every step or N: [prompts, points], the first that of the reference policy."""

    task: str
    run: str
    method: str
    seed: int
    at: list[int]  # steps, or N
    kl: np.ndarray
    true: np.ndarray
    learned: np.ndarray  # the reward model's; NaN where there is none
    implicit: np.ndarray  # beta times KL, or KL of a token; NaN where the method has no implicit reward

    @property
    def maximised(self) -> np.ndarray:
        """The reward that is maximised: of a method on pairs its implicit one, else the learned one."""
        return self.learned if np.isnan(self.implicit).all() else self.implicit

    @property
    def form(self) -> Form:
        """Which of the two curves is fitted."""
        return "best_of_n" if self.method == BEST_OF_N else "rl"


def of_run(evaluations: pd.DataFrame, task: str, seed: int, of_a_token: bool) -> Optimized:
    """A run from its evaluations table.

    The implicit reward of a completion is beta times its log-ratio (Rafailov et al. 2023, section 4), whose mean over the
    policy's own completions is beta times the KL; of a loss on log-ratios of a token it is that of each completion over its
    tokens.

    Raises:
        UserError: a step was not evaluated on every prompt.
    """
    first = evaluations.iloc[0]
    rows = evaluations.assign(log_ratio=evaluations["kl"] / (evaluations["tokens"] if of_a_token else 1))
    columns = {
        name: rows.pivot_table(index="prompt_id", columns="step", values=name, dropna=False)
        for name in ("kl", "reward", "learned_reward", "log_ratio")
    }
    if columns["kl"].isna().to_numpy().any():
        raise UserError(f"{first['run']} of {task} was not evaluated on every prompt at each step: run it again.")
    kl, true, learned, log_ratio = (table.to_numpy(dtype=np.float64) for table in columns.values())
    method = of_group(str(first["method"]))
    implicit = method.varies == "beta" and "reference_logprobs" in method.needs
    beta = float(first["conservativeness"]) if implicit else math.nan
    steps = [int(step) for step in columns["kl"].columns]
    return Optimized(task, str(first["run"]), str(first["method"]), seed, steps, kl, true, learned, beta * log_ratio)


def of_candidates(candidates: pd.DataFrame, task: str, seed: int) -> Optimized | None:
    """The best of N at temperature 1, for every N: the mean over all subsets of a prompt's candidates, each exactly.

    Args:
        candidates: of the test split; prompt_id, temperature, sample_index, reward (learned) and true.
        task: their task.
        seed: of what was trained and sampled.

    Returns:
        None where nothing was sampled at temperature 1. The KL is log N - (N - 1) / N, which is its upper bound where equal
        texts were drawn (Beirami et al. 2024).
    """
    chosen = candidates[candidates["temperature"] == 1].sort_values(_KEY)
    if chosen.empty:
        return None
    groups = [group for _, group in chosen.groupby("prompt_id")]
    numbers = list(range(1, min(map(len, groups)) + 1))
    learned, true = (np.empty((len(groups), len(numbers))) for _ in range(2))
    for p, group in enumerate(groups):
        rewards, trues = group["reward"].tolist(), group["true"].to_numpy(dtype=np.float64)
        for k, n in enumerate(numbers):
            weights = best_of_n_weights(rewards, n)
            learned[p, k], true[p, k] = weights @ np.asarray(rewards, dtype=np.float64), weights @ trues
    kl = np.tile([best_of_n_bound(n, 1.0) for n in numbers], (len(groups), 1))
    return Optimized(task, BEST_OF_N, BEST_OF_N, seed, numbers, kl, true, learned, np.full_like(kl, math.nan))


def coefficients(kl: np.ndarray, gain: np.ndarray, form: Form) -> np.ndarray:
    """Least squares a and b of gain = d (a - b d), or d (a - b log d), for the root d of each KL.

    Args:
        kl: float [rows, points]; a point whose KL is not above 0, as a mean of log-ratios may be, is left out.
        gain: float [rows, points], true reward less the reference policy's.
        form: which of the two.

    Returns:
        float64 [rows, 2]; NaN for a row with fewer than two different KLs.
    """
    there = kl > 0
    d = np.sqrt(np.where(there, kl, 1.0))
    columns = np.stack([d, -d * (d if form == "best_of_n" else np.log(d))], axis=2) * there[:, :, None]
    products = np.swapaxes(columns, 1, 2) @ columns
    known = [len(np.unique(row[use])) > 1 for row, use in zip(kl, there, strict=True)]
    found = np.full((len(kl), 2), math.nan)
    right = np.swapaxes(columns, 1, 2) @ gain[:, :, None]
    found[known] = np.linalg.solve(products[known], right[known])[:, :, 0]
    return found


def fitted_gain(d: np.ndarray, a: float, b: float, form: Form) -> np.ndarray:
    """The fitted curve at roots of the KL, which are not negative."""
    return d * (a - b * (d if form == "best_of_n" else np.log(np.where(d > 0, d, 1.0))))


def peak_kl(a: float, b: float, form: Form) -> float:
    """The KL at which the fitted curve is highest; infinite where it rises for ever.

    Of d (a - b d) at d = a / 2b, of d (a - b log d) at log d = a / b - 1.
    """
    if b <= 0:
        return math.inf
    if form == "best_of_n":
        return max(0.0, a / (2 * b)) ** 2
    return math.exp(min(2 * (a / b - 1), 700.0))


def fit_row(curves: Sequence[Optimized], confidence: float, seed: int) -> dict[str, Any]:
    """The fit of one run over its seeds: a, b and where the true reward peaks, with intervals.

    Of one seed intervals are the percentile bootstrap's over prompts, with all points of a prompt drawn together; of several
    that of `mean_over_seeds`, for a and b; that of the peak, of their means, holds prompts alone. Of the best of N, whose points
    hang together, powers of 2 are taken. What the form leaves out, if it is not the right one, is in no interval.

    Args:
        curves: of one task and run, one a seed.
        confidence: e.g. 0.95.
        seed: of the resamples.
    """
    one, rng = curves[0], np.random.default_rng(seed)
    prompts = len(one.true)
    counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=_RESAMPLES)
    weights = np.vstack([np.full(prompts, 1 / prompts), counts / prompts])
    gains = [curve.true - curve.true[:, :1] for curve in curves]
    places = _fitted(one)
    of_seeds = np.array(  # [seeds, 1 + resamples, 2]
        [
            coefficients(weights @ curve.kl[:, places], weights @ gain[:, places], one.form)
            for curve, gain in zip(curves, gains, strict=True)
        ]
    )
    row: dict[str, Any] = {"task": one.task, "run": one.run, "method": one.method, "form": one.form}
    row |= {"seeds": len(curves), "prompts": prompts, "points": len(places)}
    tail = [(1 - confidence) / 2, (1 + confidence) / 2]
    mean = of_seeds.mean(axis=0)
    for i, name in enumerate(("a", "b")):
        low, high = np.quantile(mean[1:, i], tail)
        if len(curves) > 1:
            error = float(mean[1:, i].std())
            interval = mean_over_seeds(of_seeds[:, 0, i].tolist(), error, prompts, confidence).interval
            low, high = interval.low, interval.high
        row |= {name: float(mean[0, i]), f"{name}_low": float(low), f"{name}_high": float(high)}
    peaks = np.array([peak_kl(float(a), float(b), one.form) for a, b in mean])
    low, high = np.quantile(peaks[1:], tail, method="nearest")  # some may be infinite
    largest = max(float(curve.kl.mean(axis=0).max()) for curve in curves)
    row |= {"peak_kl": peaks[0], "peak_kl_low": float(low), "peak_kl_high": float(high), "largest_kl": largest}
    return row | {"peak_measured": bool(peaks[0] <= largest), "confidence": confidence}


def _fitted(curve: Optimized) -> list[int]:
    """Places of the points that are fitted: all but the reference policy, of the best of N those whose N is a power of 2."""
    later = range(1, len(curve.at))
    return [i for i in later if curve.form == "rl" or curve.at[i] & (curve.at[i] - 1) == 0]


def alarm(curve: Optimized, confidence: float, seed: int) -> str:
    """Where the true reward fell significantly while the one that is maximised rose, a sentence; "" where it did nowhere.

    Every pair of points is a test: sign flips over prompts, adjusted by Holm over all pairs, those too in which it did not fall
    or the other did not rise. Of the best of N the points are the powers of 2. The largest significant fall is named.
    """
    places = [0, *_fitted(curve)]
    pairs, p = list(itertools.combinations(places, 2)), []
    if not pairs or np.isnan(curve.maximised).any():
        return ""
    falls = [curve.true[:, j] - curve.true[:, i] for i, j in pairs]
    resamples = max(9999, math.ceil(4 * len(pairs) / (1 - confidence)))
    for (i, j), fall in zip(pairs, falls, strict=True):
        rose = curve.maximised[:, j].mean() > curve.maximised[:, i].mean()
        p.append(sign_flip_p(fall, seed, resamples) if rose and fall.mean() < 0 else 1.0)
    adjusted = multipletests(p, method="holm")[1]
    sure = [k for k in range(len(pairs)) if adjusted[k] < 1 - confidence]
    if not sure:
        return ""
    (i, j), fall = min(((pairs[k], falls[k]) for k in sure), key=lambda found: found[1].mean())
    what = "N" if curve.form == "best_of_n" else "step"
    rise = curve.maximised[:, j].mean() - curve.maximised[:, i].mean()
    name = "implicit" if curve.maximised is curve.implicit else "learned"
    return (
        f"over-optimised: from {what} {curve.at[i]} to {curve.at[j]} the true reward fell by {-fall.mean():.2g} while the {name} "
        f"one rose by {rise:.2g}"
    )


def points(curve: Optimized, warning: str) -> Iterator[dict[str, Any]]:
    """A row for each step or N; rewards are less the reference policy's, with standard errors over prompts."""
    root = math.sqrt(len(curve.true))
    for i, at in enumerate(curve.at):
        kl = float(curve.kl[:, i].mean())
        row = {"task": curve.task, "run": curve.run, "method": curve.method, "seed": curve.seed}
        row |= {"step": None, "n": at} if curve.form == "best_of_n" else {"step": at, "n": None}
        row |= {"kl": kl, "root_kl": math.sqrt(max(0.0, kl)), "prompts": len(curve.true)}
        for name in ("true", "learned", "implicit"):
            gain = getattr(curve, name)[:, i] - getattr(curve, name)[:, 0]
            row |= {f"{name}_gain": float(gain.mean()), f"{name}_gain_se": float(gain.std(ddof=1)) / root}
        yield {**row, "alarm": warning}


def overoptimization_figure(
    table: pd.DataFrame, fits: pd.DataFrame, facts: Sequence[Mapping[str, Any]], rewards: Mapping[str, str]
) -> Figure:
    """A row per task: the true reward on the left, what is maximised on the right, both against the root of KL.

    Args:
        table: rows of `points`.
        fits: rows of `fit_row`, drawn beside the true rewards.
        facts: of each task, see `data_notes`.
        rewards: the true reward of each task.
    """
    titles = {str(one["task"]): titled(one["title"], one) for one in facts}
    tasks, styles = list(dict.fromkeys(table["task"])), line_styles(table["run"])
    with figure_style():
        figure, panels = plt.subplots(
            len(tasks), 2, figsize=(8.4, 2.8 * len(tasks) + 0.8), squeeze=False, layout="constrained"
        )
        handles: dict[str, Any] = {}
        for (left, right), task in zip(panels, tasks, strict=True):
            rows = table[table["task"] == task]
            _draw(left, rows, styles, ("true_gain",), fits[fits["task"] == task])
            _draw(right, rows, styles, ("implicit_gain", "learned_gain"))
            left.set_title(titles[task], loc="left", fontweight="bold")
            left.set_ylabel("Gain in true reward")
            right.set_ylabel("Gain in learned or implicit reward")
            if not right.lines:
                right.text(0.5, 0.5, "No run has one.", transform=right.transAxes, ha="center", va="center")
            for axes in (left, right):
                axes.set_xlabel("Square root of KL to the reference (nats)")
            handles |= dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
        figure.legend(list(handles.values()), list(handles), loc="outside right center", fontsize=7)
        alarms = table.drop_duplicates(["task", "run", "seed"]).query("alarm != ''")
        note = (
            "Rewards less the reference policy's; bands are 95% intervals over prompts, thin lines the fits of "
            "overoptimization_fits.csv. Of methods on pairs the implicit reward, beta times KL (of a token where the loss is), "
            f"is on the right. KL of the best of N: log N - (N - 1) / N. {prompts_note(table['prompts'].tolist())}"
        )
        annotate(
            figure,
            " ".join([note, *data_notes(facts, rewards)]),
            few_prompts(int(table["prompts"].min()))
            + [
                f"{row.task}, {display_name(str(row.run))}, seed {row.seed}: {row.alarm}."
                for row in alarms.itertuples()
            ],
        )
        plt.close(figure)
    return figure


def _draw(
    axes: Axes,
    rows: pd.DataFrame,
    styles: Mapping[str, LineStyle],
    columns: Sequence[str],
    fits: pd.DataFrame | None = None,
) -> None:
    """A line with its interval per run and seed, of the first of these columns that it has, and a run's fit."""
    for run, line_rows in rows.groupby("run", sort=False):
        style = styles[str(run)]
        column = next((name for name in columns if line_rows[name].notna().any()), None)
        for number, (_, line) in enumerate(line_rows.groupby("seed", sort=False)):
            if column is not None:
                half = Z_95 * line[f"{column}_se"]
                label = display_name(str(run)) if number == 0 else None
                band = (line["root_kl"], line[column], line[column] - half, line[column] + half)
                draw_curve(axes, style, label, *band)
        for fit in () if fits is None else fits[fits["run"] == run].to_dict("records"):
            d = np.linspace(0, line_rows["root_kl"].max(), 100)
            axes.plot(
                d, fitted_gain(d, fit["a"], fit["b"], fit["form"]), color=style.color, linewidth=0.7, label="_fit"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `overoptimization`."""
    parser.add_argument("--evaluations", required=True, type=Path, nargs="+", help="evaluations of every run and seed")
    parser.add_argument("--candidates", type=Path, nargs="+", default=[], help="samples tables of candidates")
    parser.add_argument("--scores", type=Path, nargs="+", default=[], help="their learned rewards")
    parser.add_argument("--true", type=Path, nargs="+", default=[], help="their true rewards")
    parser.add_argument("--summaries", required=True, type=Path, nargs="+", help="summary of each task's data, JSON")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--table", required=True, type=Path, help="CSV of every point that is made")
    parser.add_argument("--fits", required=True, type=Path, help="CSV of the fits that is made")
    parser.add_argument("--out", required=True, type=Path, nargs="+", help="figures that are made: .svg, .png or .pdf")


def run(args: argparse.Namespace) -> None:
    """Writes the points, the fits and the figure; alarms are told in the log too."""
    recipe = from_json(OveroptimizationRecipe, args.recipe)
    confidence = {task: sure for task, *_, sure in recipe.tasks}
    curves = [
        of_run(read_table(path, "evaluations"), task, seed, of_a_token)
        for path, (task, seed, _, of_a_token) in zip(args.evaluations, recipe.runs, strict=True)
    ]
    tables = zip(args.candidates, args.scores, args.true, recipe.candidates, strict=True)
    curves += [
        found
        for candidates, scores, true, (task, seed) in tables
        if (found := of_candidates(_read(candidates, scores, true), task, seed)) is not None
    ]
    rows = []
    for curve in curves:
        warning = alarm(curve, confidence[curve.task], recipe.seed)
        if warning:
            logger.warning("%s, %s, seed %d: %s", curve.task, curve.run, curve.seed, warning)
        rows += list(points(curve, warning))
    by_run: dict[tuple[str, str, str], list[Optimized]] = {}
    for curve in curves:
        by_run.setdefault((curve.task, curve.run, curve.method), []).append(curve)
    table = pd.DataFrame(rows)
    write_csv(args.table, table)
    fits = pd.DataFrame(fit_row(one, confidence[one[0].task], recipe.seed) for one in by_run.values())
    write_csv(args.fits, fits)
    facts = [
        {**read_facts(path), "task": task, "title": title, "written": written}
        for path, (task, title, written, *_) in zip(args.summaries, recipe.tasks, strict=True)
    ]
    rewards = {task: reward for task, _, _, reward, _ in recipe.tasks}
    for caveat in [*few_prompts(int(table["prompts"].min())), *data_notes(facts, rewards)]:
        logger.warning("warning: %s", caveat)
    figure = overoptimization_figure(table, fits, facts, rewards)
    with figure_style():
        for path in args.out:
            save(figure, path)


def _read(candidates: Path, scores: Path, true: Path) -> pd.DataFrame:
    """Candidates of the test split with their learned reward and their true one."""
    samples = read_table(candidates, "samples")
    test = samples.loc[samples["split"] == "test", _KEY]
    content = samples.attrs["manifest"]["content_hash"]
    for path, name in ((scores, "reward"), (true, "true")):
        found = read_table(path, "scores", samples=content).rename(columns={"reward": name})
        test = test.merge(found, on=_KEY, validate="one_to_one")
    return test
