"""The stage `diagnosis`: what became of a run's texts while it trained, and whether it collapsed.

Every step is held against the reference policy's own completions of the same prompts, which are those of step 0. A measure
is flagged where it is worse than theirs by more than a margin (see `threshold`) and significantly so: by a test over
prompts, Holm-adjusted over all measures and steps of the run. So of runs that are as the reference policy at most a share of
1 - confidence has any flag. The change of the log-probability of held-out pairs comes from the trainer's log, which has
means alone, and is flagged without a test.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from prefopt.analysis.caveats import few_prompts
from prefopt.analysis.statistics import score_interval, sign_flip_p
from prefopt.analysis.style import display_name
from prefopt.analysis.texts import escape_markdown, write_csv
from prefopt.analysis.training_curves import Metrics, read_metrics
from prefopt.errors import UserError
from prefopt.experiment.methods import of_group
from prefopt.experiment.recipes import from_json
from prefopt.store.files import write_text
from prefopt.store.tables import read_table

logger = logging.getLogger(__name__)

SHARE_MARGIN = 0.05  # of completions, beyond the reference policy's share
_RESAMPLES = 9999
_BATCH = 500  # resamples held in memory at once


@dataclasses.dataclass(frozen=True)
class Measure:
    """Something that can go wrong with a run's texts: a column of the table and what it is called."""

    column: str
    worse: Literal[-1, 1]  # +1: more of it is worse
    flag: str
    words: str  # of a run, in a sentence
    unit: Literal["share", "tokens", "distinct"]


MEASURES = (
    Measure("empty", 1, "empty", "writes nothing", "share"),
    Measure("ended", -1, "endless", "does not end", "share"),
    Measure("repeats", 1, "repeating", "repeats itself", "share"),
    Measure("copies", 1, "copying", "copies its prompt", "share"),
    Measure("tokens", 1, "too long", "grows too long", "tokens"),
    Measure("distinct", -1, "alike", "writes the same to many prompts", "distinct"),
)
CHOSEN_FALLS = "chosen falls"
# What the measures are, at the reference policy, in a table for a reader.
_NAMES = {
    "empty": "empty",
    "ended": "end before the length limit",
    "repeats": "have four tokens in a row twice",
    "copies": "more than half from the prompt",
    "tokens": "tokens, mean",
    "distinct": "distinct texts",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagnosisRecipe:
    """The task, its runs and seeds in the order of its tables, and the confidence of flags and intervals."""

    task: str
    runs: tuple[str, ...]
    logged: tuple[str, ...]  # of these what is trained at once, whose trainer logs held-out pairs by step
    seeds: tuple[int, ...]  # of what was trained and sampled
    confidence: float
    seed: int  # of the tests' resamples
    values: dict[str, tuple[str, ...]]  # what the objective of each method takes, of those that learn from pairs


def threshold(measure: Measure, reference: pd.DataFrame) -> float:
    """What a measure must be beyond to be flagged, from the reference policy's own completions.

    A share: theirs and `SHARE_MARGIN`. Tokens: their mean and one standard deviation of theirs, so that the mean completion
    is long for one of theirs. Distinct texts: half of theirs.

    Args:
        measure: which.
        reference: rows of the evaluations table, of step 0.
    """
    value = _value(measure, reference)
    if measure.unit == "distinct":
        return value / 2
    return value + measure.worse * (SHARE_MARGIN if measure.unit == "share" else float(reference["tokens"].std()))


def diagnosis_table(
    evaluations: pd.DataFrame, metrics: Mapping[tuple[str, int], Metrics], recipe: DiagnosisRecipe
) -> pd.DataFrame:
    """A row per run, seed and evaluated step.

    Args:
        evaluations: rows of evaluations tables, `seed` that of what was trained and sampled.
        metrics: what each run's trainer logged, by run and seed.
        recipe: see `DiagnosisRecipe`.

    Returns:
        See docs/diagnosis.md.

    Raises:
        UserError: a run was not evaluated at step 0, or not on every prompt.
    """
    tables = []
    for seed in recipe.seeds:
        for run in recipe.runs:
            of_run = evaluations[(evaluations["run"] == run) & (evaluations["seed"] == seed)]
            table = pd.DataFrame(_run_rows(of_run, metrics.get((run, seed), []), recipe))
            tables.append(table.assign(verdict=verdict_of(table, recipe).sentence))
    return pd.concat(tables, ignore_index=True)


def _run_rows(of_run: pd.DataFrame, metrics: Metrics, recipe: DiagnosisRecipe) -> list[dict[str, Any]]:
    """Rows of one run, its steps in order."""
    name = of_run["run"].iloc[0]
    steps = {
        int(rows["step"].iloc[0]): rows.sort_values(["prompt_id", "sample_index"]) for _, rows in of_run.groupby("step")
    }
    if 0 not in steps:
        raise UserError(f"{name} was not evaluated at step 0, where it is the reference policy: run it again.")
    reference = steps[0]
    for step, rows in steps.items():
        if rows["prompt_id"].tolist() != reference["prompt_id"].tolist():
            raise UserError(f"{name} was evaluated on other prompts at step {step} than at step 0: run it again.")
    thresholds = {measure.column: threshold(measure, reference) for measure in MEASURES}
    adjusted = adjusted_p(steps, thresholds, recipe)
    logp_sd = float(reference["logp"].std())
    table = []
    for step, rows in steps.items():
        changes = _pair_changes(metrics, step)
        values = {measure.column: _value(measure, rows) for measure in MEASURES}
        flags = [m.flag for m in MEASURES if adjusted.get((step, m.column), 1.0) < 1 - recipe.confidence]
        if changes["chosen_logp_change"] < -logp_sd and changes["rejected_logp_change"] < 0:
            flags.append(CHOSEN_FALLS)
        by_prompt = rows.groupby("prompt_id")
        prompts = by_prompt.ngroups
        row = {
            "task": recipe.task,
            **{key: rows[key].iloc[0] for key in ("run", "method", "seed", "conservativeness")},
            "step": step,
            "prompts": prompts,
            "completions": len(rows),
            **changes,
            "logp_sd": logp_sd,
        }
        for measure in MEASURES:
            row[measure.column] = values[measure.column]
            if measure.unit == "share":
                interval = score_interval(rows[measure.column].tolist(), rows["prompt_id"].tolist(), recipe.confidence)
                row |= {f"{measure.column}_low": interval.low, f"{measure.column}_high": interval.high}
            row[f"{measure.column}_threshold"] = thresholds[measure.column]
            row[f"{measure.column}_p_holm"] = adjusted.get((step, measure.column), math.nan)
        row["length_ratio"] = values["tokens"] / float(reference["tokens"].mean())
        row |= dict(zip(("entropy", "entropy_se"), _entropy(rows), strict=True))
        for column in ("kl", "reward"):
            means = by_prompt[column].mean()
            row |= {column: means.mean(), f"{column}_se": means.std() / math.sqrt(prompts)}
        table.append({**row, "confidence": recipe.confidence, "flags": "; ".join(flags)})
    return table


def _value(measure: Measure, rows: pd.DataFrame) -> float:
    """A measure of a step: a mean over completions, or distinct texts over completions."""
    if measure.unit == "distinct":
        return float(rows["text_hash"].nunique() / len(rows))
    return float(rows[measure.column].astype(float).mean())


def _entropy(rows: pd.DataFrame) -> tuple[float, float]:
    """Nats per token and standard error over prompts: the sum of -logp over that of tokens, at temperature 1.

    -logp of a sampled token is an unbiased estimate of the entropy of the distribution that it was drawn from, so the sum is
    one of the entropy along the completions; the ratio is consistent.
    """
    sums = rows.assign(surprise=-rows["logp"]).groupby("prompt_id")[["surprise", "tokens"]].sum()
    ratio = sums["surprise"].sum() / sums["tokens"].sum()
    residuals = sums["surprise"] - ratio * sums["tokens"]
    return float(ratio), float(residuals.std() * math.sqrt(len(sums)) / sums["tokens"].sum())


def _pair_changes(metrics: Metrics, step: int) -> dict[str, float]:
    """Change since step 0 of the mean log-probability of held-out chosen and rejected completions.

    Read at the trainer's last validation up to this step, which is `pairs_step`; NaN where it does not log them.
    """
    names = ("chosen_logp", "rejected_logp")
    logged = {int(row["step"]): row for row in metrics if row["split"] == "validation" and {*names} <= row.keys()}
    at = max((known for known in logged if known <= step), default=None)
    if at is None or 0 not in logged:
        return {"pairs_step": math.nan, **{f"{name}_change": math.nan for name in names}}
    return {"pairs_step": at, **{f"{name}_change": float(logged[at][name] - logged[0][name]) for name in names}}


def adjusted_p(
    steps: dict[int, pd.DataFrame], thresholds: dict[str, float], recipe: DiagnosisRecipe
) -> dict[tuple[int, str], float]:
    """Holm-adjusted p of each step and measure that is beyond its threshold; the others count as tests with p = 1.

    Args:
        steps: rows of the evaluations table of a run by step, sorted alike; step 0 is the reference policy.
        thresholds: of each measure, by column.
        recipe: confidence and seed.
    """
    later = [step for step in steps if step > 0]
    tests = [(step, measure) for step in later for measure in MEASURES]
    # Enough for the smallest p to survive the adjustment.
    resamples = max(_RESAMPLES, math.ceil(4 * len(tests) / (1 - recipe.confidence)))
    p = []
    for step, measure in tests:
        beyond = measure.worse * (_value(measure, steps[step]) - thresholds[measure.column]) > 0
        p.append(_p(measure, steps[0], steps[step], recipe.seed, resamples) if beyond else 1.0)
    if not tests:
        return {}
    holm = multipletests(p, method="holm")[1]
    return {(step, m.column): float(q) for (step, m), q, raw in zip(tests, holm, p, strict=True) if raw < 1}


def _p(measure: Measure, reference: pd.DataFrame, rows: pd.DataFrame, seed: int, resamples: int) -> float:
    """Two-sided p, that a step is no other than the reference policy in this."""
    if measure.unit == "distinct":
        return distinct_p(_texts(reference), _texts(rows), seed, resamples)
    means = [one[measure.column].astype(float).groupby(one["prompt_id"]).mean().to_numpy() for one in (reference, rows)]
    return sign_flip_p(means[1] - means[0], seed, resamples)


def _texts(rows: pd.DataFrame) -> list[list[str]]:
    return [group.tolist() for _, group in rows.groupby("prompt_id")["text_hash"]]


def distinct_p(first: Sequence[Sequence[str]], second: Sequence[Sequence[str]], seed: int, resamples: int) -> float:
    """Two-sided p of the permutation test that two policies write equally many distinct texts.

    For each prompt it is drawn which of the two wrote which of the two groups of texts; distinct texts are counted anew over
    all prompts.

    Args:
        first: texts of each prompt by one policy.
        second: as many by the other, in the same order of prompts.
        seed: of the draws.
        resamples: how many.
    """
    codes = pd.factorize(np.array([text for texts in (*first, *second) for text in texts], dtype=object))[0]
    owner = np.repeat(np.tile(np.arange(len(first)), 2), [len(texts) for texts in (*first, *second)])
    of_first = np.arange(len(codes)) < sum(map(len, first))
    rng, observed, extreme = np.random.default_rng(seed), None, 0
    for start in range(0, resamples + 1, _BATCH):
        swapped = rng.random((min(_BATCH, resamples + 1 - start), len(first))) < 0.5
        if observed is None:
            swapped[0] = False  # as it was observed
        mine = of_first ^ swapped[:, owner]
        counts = [_distinct(codes, chosen) for chosen in (mine, ~mine)]
        differences = np.abs(counts[0] - counts[1])
        observed = differences[0] if observed is None else observed
        extreme += int((differences >= observed).sum())
    return extreme / (resamples + 1)


def _distinct(codes: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """How many different codes each row of a mask [rows, texts] chooses."""
    values = np.sort(np.where(chosen, codes, -1), axis=1)
    new = np.diff(values, axis=1, prepend=-1) > 0
    count: np.ndarray = new.sum(axis=1)
    return count


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a run, a sentence, and what helps, in Markdown's code words; empty where nothing is flagged."""

    sentence: str
    helps: str
    flagged: bool


def verdict_of(run: pd.DataFrame, recipe: DiagnosisRecipe) -> Verdict:
    """The verdict on one run and seed.

    Args:
        run: its rows of `diagnosis_table`.
        recipe: says what may be set.
    """
    steps = run["step"].tolist()
    flags = [set(text.split("; ")) - {""} for text in run["flags"]]
    parts = [_flagged(measure, run, flags) for measure in MEASURES if any(measure.flag in each for each in flags)]
    falls = [i for i, each in enumerate(flags) if CHOSEN_FALLS in each]
    pairs = _falling(run, falls) if falls else ""
    measured = f"{len(steps) - 1} steps up to {steps[-1]}"
    if parts:
        word = "Collapsed" if any(_is_collapse(measure, run, flags) for measure in MEASURES) else "Flagged"
        sentence = f"{word}: {', '.join(parts)}{f'; {pairs}' if pairs else ''}."
    elif pairs:
        sentence = f"Its texts do not collapse at {measured}, but {pairs}."
    else:
        sentence = f"No collapse at {measured}."
    if not (parts or falls):
        return Verdict(sentence, "", False)
    first = next(i for i, each in enumerate(flags) if each)
    method = str(run["method"].iloc[0])
    own = recipe.values.get(method, ())
    return Verdict(sentence, _helps(method, own, set().union(*flags), steps[first - 1]), bool(parts))


def _is_collapse(measure: Measure, run: pd.DataFrame, flags: Sequence[set[str]]) -> bool:
    """Whether at a flagged step half of the texts are worse than the reference policy's, or they are twice as long."""
    values = run[measure.column]
    worse = [float(value) for value, each in zip(values, flags, strict=True) if measure.flag in each]
    first = float(values.iloc[0])
    return any(
        value >= 2 * first if measure.unit == "tokens" else measure.worse * (value - first) >= 0.5 for value in worse
    )


def _flagged(measure: Measure, run: pd.DataFrame, flags: Sequence[set[str]]) -> str:
    """What went wrong, from which step on, and how far at the worst of its steps."""
    at = [i for i, each in enumerate(flags) if measure.flag in each]
    steps, values = run["step"].tolist(), run[measure.column].tolist()
    worst = max(at, key=lambda i: measure.worse * values[i])
    start, end, whole = steps[at[0]], steps[at[-1]], len(at) == at[-1] - at[0] + 1
    if whole and end == steps[-1]:
        when = f"from step {start} on"
    else:
        when = f"at steps {start} to {end}" if whole and len(at) > 1 else f"{'' if whole else 'first '}at step {start}"
    value, before = (f"{x:.0f} tokens" if measure.unit == "tokens" else f"{x:.0%}" for x in (values[worst], values[0]))
    of_what = {"endless": " end", "alike": " distinct"}.get(measure.flag, "")
    return f"{measure.words} {when} ({value}{of_what} at step {steps[worst]}, {before} at step 0)"


def _falling(run: pd.DataFrame, at: Sequence[int]) -> str:
    """How far the log-probabilities of held-out pairs fell."""
    last = run.iloc[at[-1]]
    return (
        f"the log-probability of held-out chosen completions falls with that of rejected ones from step "
        f"{int(run['step'].iloc[at[0]])} on (by {-last['chosen_logp_change']:.0f} and {-last['rejected_logp_change']:.0f} nats "
        f"at step {int(last['pairs_step'])}; the reference policy's own completions have a standard deviation of "
        f"{last['logp_sd']:.0f})"
    )


def _helps(method: str, own: Sequence[str], flags: set[str], clean: int) -> str:
    """What helps a run of a method whose objective takes these values, in Markdown; `clean` is the last step without a flag."""
    one = of_group(method)
    found = [f"an earlier step (step {clean} shows none of it)"] if clean > 0 else ["evaluating and stopping earlier"]
    found.append("a lower `learning_rate`")
    if "nll_weight" in own:
        found.append("`nll_weight` above 0")
    if one.varies == "beta" and "reference_logprobs" in one.needs:
        found.append("a larger `beta`")
    if one.varies == "alpha":
        found.append("a smaller `alpha`")
    if one.trainer == "ppo":
        found.append("a smaller `kl_target` or a larger `kl_coef`")
        found += ["a lower `missing_eos_reward`"] if "endless" in flags else []
    if "length_normalized" in own and "too long" in flags:
        found.append("`length_normalized: true`")
    return "; ".join(found)


def diagnosis_page(table: pd.DataFrame, recipe: DiagnosisRecipe) -> str:
    """A Markdown page: a verdict on each run, the last step's numbers, and what is flagged.

    Args:
        table: see `diagnosis_table`.
        recipe: task, runs and seeds.
    """
    several = len(recipe.seeds) > 1
    groups = {
        (str(rows["run"].iloc[0]), int(rows["seed"].iloc[0])): rows
        for _, rows in table.groupby(["seed", "run"], sort=False)
    }
    names = {
        key: escape_markdown(f"{display_name(key[0])}, seed {key[1]}" if several else display_name(key[0]))
        for key in groups
    }
    lines = [
        f"# {escape_markdown(recipe.task)}: diagnosis",
        "",
        *(f"**{caveat}**\n" for caveat in few_prompts(int(table["prompts"].min()))),
        f"Every run's completions of the same {int(table['prompts'].min())} prompts at temperature 1, held against those of step "
        "0, the reference policy's own. Flagged is what is beyond its threshold, and significantly so "
        f"({1 - recipe.confidence:.0%}, adjusted over all measures and steps of a run).",
        "",
        "| run | verdict | what helps |",
        "| --- | --- | --- |",
    ]
    for key, rows in groups.items():
        found = verdict_of(rows, recipe)
        lines.append(f"| {names[key]} | {escape_markdown(found.sentence)} | {found.helps} |")
    lines += ["", "At the last step of each run:", ""]
    lines += [
        "| run | step | chosen | rejected | end | repeat | empty | copy | tokens | entropy | KL | distinct |",
        "| --- |" + " ---: |" * 11,
    ]
    for key, rows in groups.items():
        last = rows.iloc[-1]
        shares = {name: f"{last[name]:.0%}" for name in ("ended", "repeats", "empty", "copies", "distinct")}
        cells = [
            *(names[key], str(int(last["step"]))),
            *(_signed(last[f"{side}_logp_change"]) for side in ("chosen", "rejected")),
            *(shares[name] for name in ("ended", "repeats", "empty", "copies")),
            *(f"{last['tokens']:.0f}", f"{last['entropy']:.2f}", f"{last['kl']:.1f}", shares["distinct"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "chosen, rejected: change of the log-probability of held-out pairs since step 0, nats a completion, where the trainer "
        "logs it; entropy in nats a token, KL in nats a completion.",
        "",
        "| of the reference policy's completions | there | flagged |",
        "| --- | ---: | ---: |",
    ]
    first = table.iloc[0]
    for measure in MEASURES:
        there, beyond = first[measure.column], first[f"{measure.column}_threshold"]
        shown = [f"{x:.1f}" if measure.unit == "tokens" else f"{x:.1%}" for x in (there, beyond)]
        lines.append(
            f"| {_NAMES[measure.column]} | {shown[0]} | {'above' if measure.worse > 0 else 'below'} {shown[1]} |"
        )
    lines.append(
        f"| log-probability, standard deviation | {first['logp_sd']:.1f} | chosen falls by more, rejected too |"
    )
    if several:
        lines += ["", f"The thresholds are those of seed {recipe.seeds[0]}; each seed has its own, in the table."]
    return "\n".join(lines) + "\n"


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.1f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `diagnosis`."""
    parser.add_argument("--evaluations", required=True, type=Path, nargs="+", help="evaluations of each run and seed")
    parser.add_argument(
        "--metrics", type=Path, nargs="*", default=[], help="JSON-lines metrics of each that is trained at once"
    )
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="CSV that is made")
    parser.add_argument("--page", required=True, type=Path, help="Markdown page that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the table and the page; what is flagged is told in the log too."""
    recipe = from_json(DiagnosisRecipe, args.recipe)
    keys = [(run, seed) for seed in recipe.seeds for run in recipe.runs]
    evaluations = pd.concat(
        [
            read_table(path, "evaluations").assign(seed=seed)
            for path, (_, seed) in zip(args.evaluations, keys, strict=True)
        ],
        ignore_index=True,
    )
    logged = [(run, seed) for seed in recipe.seeds for run in recipe.logged]
    metrics = {key: read_metrics(path) for key, path in zip(logged, args.metrics, strict=True)}
    table = diagnosis_table(evaluations, metrics, recipe)
    for (seed, name), rows in table.groupby(["seed", "run"], sort=False):
        found = verdict_of(rows, recipe)
        logger.log(logging.WARNING if found.flagged else logging.INFO, "%s, seed %d: %s", name, seed, found.sentence)
    write_csv(args.out, table)
    write_text(args.page, diagnosis_page(table, recipe))
