"""The stage `win_rates`: from verdicts to the table of win rates, the paired comparisons, and their manifest."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from statsmodels.stats.multitest import multipletests

from prefopt.analysis.caveats import equal_texts, few_prompts, read_facts
from prefopt.analysis.judge_statistics import length_controlled_rate
from prefopt.analysis.statistics import (
    Interval,
    crossed_mean,
    paired_difference,
    score_interval,
    simultaneous_half_widths,
)
from prefopt.analysis.texts import write_csv
from prefopt.analysis.verdicts import KEY, SCORE, read_verdicts, seed_scores, select_temperatures
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.store.files import sha256_of_file, write_text
from prefopt.store.tables import read_table

logger = logging.getLogger(__name__)

COLUMNS = [
    *("task", "run", "method", "temperature", "selected", "n", "wins", "losses", "ties", "invalid", "win_rate"),
    *("ci_low", "ci_high", "band_low", "band_high", "if_invalid_lose", "if_invalid_win"),
    *("first_position_rate", "flip_rate", "mean_tokens", "reference_mean_tokens", "n_longer", "longer_win_rate"),
    *("n_shorter", "shorter_win_rate", "length_controlled_win_rate", "well_formed", "kl_to_reference"),
    *("cost_usd", "judge", "seed"),
]
# Of a table over seeds: figures that are added up, and that are means over seeds.
_SUMMED = ["n", "wins", "losses", "ties", "invalid", "n_longer", "n_shorter", "cost_usd"]
_AVERAGED = [
    *("win_rate", "if_invalid_lose", "if_invalid_win", "first_position_rate", "flip_rate", "mean_tokens"),
    *("reference_mean_tokens", "longer_win_rate", "shorter_win_rate", "length_controlled_win_rate", "well_formed"),
    "kl_to_reference",
]
COMPARISON_COLUMNS = [
    *("task", "run", "temperature", "opponent", "opponent_temperature", "n", "win_rate", "opponent_win_rate"),
    *("difference", "ci_low", "ci_high", "p", "p_holm", "judge", "seeds", "by_one_seed"),
]
JUDGE_COLUMNS = [
    *("judge_accuracy", "judge_accuracy_low", "judge_accuracy_high", "longer_wins_accuracy", "interpretable"),
    "self_agreement",
]

_CHAT = ("template", "served_models", "cost_usd", "repeated")  # what is known of a chat judge

_SELECTION = (
    "Each run's temperature is the one with the highest win rate on the validation prompts (equal: the lower "
    "temperature); all figures of the table are on the test prompts."
)
_WIN_RATE = (
    "(wins + ties / 2) / (n - invalid). The interval is Wilson's over prompts, with the effective number of prompts "
    "where there are ties or several samples a prompt; it holds the trained models fixed. band_low and band_high hold "
    "all of a run's temperatures at once (max-T bootstrap over prompts). if_invalid_lose and if_invalid_win count "
    "every invalid verdict as a loss and as a win."
)
_SEEDS = (
    "The mean over seeds of what is trained and sampled; counts and costs are sums. The interval holds prompts and "
    "training: the variance of the seeds' rates over their number, and that of the prompts' means, with Student's quantile "
    "and Welch and Satterthwaite's degrees of freedom; band_low and band_high are the same at a confidence that Bonferroni "
    "divides by the number of temperatures. between_seed_sd is the standard deviation of the seeds' own rates, each of which "
    "is a row of the table by seed."
)
_COMPARISON_OVER_SEEDS = (
    "Runs at their selected temperatures on the same test prompts, each seed's with the same seed's: the mean difference over "
    "seeds and prompts, its interval as that of the win rates, p of its t-test, p_holm adjusted over the rows of the file. "
    "by_one_seed: the interval leaves zero out, and without the seed that speaks most for it that over the others does not."
)
_ORDER = (
    "first_position_rate: of the verdicts that name a winner, the share won by the text that was shown first. "
    "flip_rate: of the pairs shown in both orders, the share whose two verdicts disagree; such a pair is a tie. "
    "self_agreement: of the pairs judged once more, over all runs, the share with the same verdict."
)
_LENGTH = (
    "longer_win_rate and shorter_win_rate: among completions with more and with fewer tokens than the reference. "
    "length_controlled_win_rate: at equal length, by a logistic regression on tanh of the standardised difference with "
    "Firth's penalty; empty where all completions are longer, or all are shorter, than the reference."
)
_KL = (
    "Nats per completion, EOS included: log-probability under the policy at the row's temperature less that under "
    "the reference policy at temperature 1, averaged over the row's samples. An estimate, which can be negative."
)
_BOUND = (
    "An upper bound: log N - (N-1)/N for the choice of the best of N, plus the mean log-ratio of the chosen samples "
    "between their sampling distribution and the reference at temperature 1 (zero at temperature 1)."
)
_COMPARISON = (
    "Runs at their selected temperatures on the same test prompts: BCa bootstrap over prompts, two-sided p of "
    "the sign-flip permutation test, p_holm adjusted over the rows of the file."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WinRatesRecipe:
    """What the table is to hold."""

    task: str
    confidence: float
    seed: int  # of the bootstrap
    seeds: tuple[int, ...]  # of what was trained and sampled
    runs: tuple[str, ...]  # in the order of the table
    methods: dict[str, str]  # of each run
    n: dict[str, int]  # of each run that is the best of N
    opponents: tuple[str, ...]  # runs that every other is compared with
    judge: dict[str, Any]


def win_rate_table(
    verdicts: pd.DataFrame, samples: pd.DataFrame, recipe: WinRatesRecipe, selected: dict[str, float] | None = None
) -> pd.DataFrame:
    """A row per run and temperature on the test prompts, of one seed, with the columns `COLUMNS`.

    Args:
        verdicts: rows of verdict tables, all runs, splits validation and test.
        samples: rows of samples tables that the verdicts are about.
        recipe: task, runs, confidence, seed.
        selected: the temperature of each run; None selects it by these verdicts.

    Raises:
        UserError: a run has no verdicts, the rows are not all on the same test prompts, or a verdict has no
            sample.
    """
    _check(verdicts, recipe.runs)
    ratios = samples[KEY].assign(log_ratio=samples["logp"].astype(float) - samples["reference_logp"].astype(float))
    joined = verdicts.merge(ratios, on=KEY, how="left", validate="one_to_one", indicator=True)
    if len(orphans := joined[joined["_merge"] != "both"]):
        raise UserError(f"The verdict on {dict(orphans.iloc[0][KEY])} has no sample: run the stage `judge` again.")
    selected = selected or select_temperatures(verdicts)
    test = joined[joined["split"] == "test"]
    rows = []
    for run in recipe.runs:
        of_run = test[test["run"] == run]
        bands = temperature_bands(of_run, recipe.confidence, recipe.seed)
        for temperature in sorted(of_run["temperature"].unique().tolist()):
            group = of_run[of_run["temperature"] == temperature]
            rows.append(
                {
                    "task": recipe.task,
                    "run": run,
                    "method": recipe.methods[run],
                    "temperature": temperature,
                    "selected": temperature == selected[run],
                    **tally(group, recipe.confidence),
                    "band_low": bands[temperature].low,
                    "band_high": bands[temperature].high,
                    **_bounds(group),
                    **_order_figures(group),
                    "mean_tokens": group["tokens"].mean(),
                    "reference_mean_tokens": group["reference_tokens"].mean(),
                    **_length_figures(group),
                    "well_formed": group["well_formed"].astype(float).mean(),
                    "kl_to_reference": group["log_ratio"].mean(skipna=False)
                    + best_of_n_bound(recipe.n.get(run), temperature),
                    "cost_usd": group["cost_usd"].sum(),
                    "judge": group["judge"].iloc[0],
                    "seed": recipe.seed,
                }
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def table_over_seeds(by_seed: pd.DataFrame, verdicts: pd.DataFrame, recipe: WinRatesRecipe) -> pd.DataFrame:
    """A row per run and temperature: what stands in `win_rate_table`, over all seeds.

    Args:
        by_seed: the tables of all seeds, with the column seed.
        verdicts: of all seeds, with the column seed.
        recipe: runs, seeds and confidence.

    Returns:
        The columns of `COLUMNS`, but in place of seed: seeds (how many) and between_seed_sd, NaN for a single one.
    """
    one = by_seed.drop(columns="seed").assign(seeds=len(recipe.seeds), between_seed_sd=math.nan)
    if len(recipe.seeds) == 1:
        return one
    key = ["run", "temperature"]
    groups = by_seed.groupby(key, sort=False)
    rows = one.drop_duplicates(key).set_index(key)
    rows[_SUMMED], rows[_AVERAGED] = groups[_SUMMED].sum(), groups[_AVERAGED].mean()
    test = verdicts[verdicts["split"] == "test"]
    for (run, temperature), group in test.groupby(key):
        scores = seed_scores(group)
        temperatures = test.loc[test["run"] == run, "temperature"].nunique()
        found = crossed_mean(scores, recipe.confidence, 0.0, 1.0)
        band = crossed_mean(scores, 1 - (1 - recipe.confidence) / temperatures, 0.0, 1.0).interval
        ends = [found.interval.low, found.interval.high, band.low, band.high, found.between_seed_sd]
        rows.loc[(run, temperature), ["ci_low", "ci_high", "band_low", "band_high", "between_seed_sd"]] = ends
    return rows.reset_index()[one.columns]


def temperature_bands(group: pd.DataFrame, confidence: float, seed: int) -> dict[float, Interval]:
    """Bands of a run's win rates that hold at all its temperatures at once; NaN where no prompt is valid at all.

    Args:
        group: a run's settled verdicts on the test prompts.
        confidence: e.g. 0.95.
        seed: of the bootstrap.
    """
    scores = group.assign(score=group["outcome"].map(SCORE))
    table = scores.pivot_table(index="prompt_id", columns="temperature", values="score", dropna=False)
    whole = table.dropna()
    if whole.empty:
        return {float(t): Interval(math.nan, math.nan) for t in sorted(set(group["temperature"]))}
    widths = simultaneous_half_widths(whole.to_numpy(dtype=float), confidence, seed)
    return {
        float(temperature): Interval(max(0.0, mean - width), min(1.0, mean + width))
        for temperature, mean, width in zip(whole.columns, whole.mean(), widths, strict=True)
    }


def best_of_n_bound(n: int | None, temperature: float) -> float:
    """log N - (N-1)/N, the bound on KL(best of N || one sample); 0 for a run that is no best of N.

    At temperature 0 there is one completion to choose from, and no choice.
    """
    if n is None or temperature == 0:
        return 0.0
    return math.log(n) - (n - 1) / n


def comparison_table(verdicts: pd.DataFrame, table: pd.DataFrame, recipe: WinRatesRecipe) -> pd.DataFrame:
    """Paired differences of each run to each of the opponents, both at their selected temperatures.

    Args:
        verdicts: as for `win_rate_table`; of several seeds, with the column seed.
        table: what it returned, or `table_over_seeds`.
        recipe: the same.

    Returns:
        The columns `COMPARISON_COLUMNS`, n being prompts with a valid verdict on both, of every seed, on which both win rates
        are; no row where there is but one run.
    """
    chosen = table.drop_duplicates(["run", "temperature"]).query("selected").set_index("run")["temperature"].to_dict()
    scores = {run: _prompt_scores(verdicts, run, chosen[run]) for run in recipe.runs}
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    for opponent in recipe.opponents:
        for run in recipe.runs:
            if run == opponent or (opponent, run) in seen:
                continue
            seen.add((run, opponent))
            both = pd.concat([scores[run], scores[opponent]], axis=1, join="inner").dropna().sort_index()
            both = both[both.groupby("prompt_id").transform("size") == len(recipe.seeds)]
            first, second = both.iloc[:, 0], both.iloc[:, 1]
            result = _difference(first, second, recipe)
            rows.append(
                {
                    "task": recipe.task,
                    "run": run,
                    "temperature": chosen[run],
                    "opponent": opponent,
                    "opponent_temperature": chosen[opponent],
                    "n": first.index.get_level_values("prompt_id").nunique(),
                    "win_rate": first.mean(),
                    "opponent_win_rate": second.mean(),
                    **result,
                    "judge": table["judge"].iloc[0],
                    "seeds": len(recipe.seeds),
                    "by_one_seed": _by_one_seed(first - second, result, recipe),
                }
            )
    comparisons = pd.DataFrame(rows, columns=COMPARISON_COLUMNS)
    if rows and (tested := comparisons["p"].notna()).any():
        comparisons.loc[tested, "p_holm"] = multipletests(comparisons.loc[tested, "p"], method="holm")[1]
    return comparisons


def _difference(first: pd.Series, second: pd.Series, recipe: WinRatesRecipe) -> dict[str, float]:
    """Mean difference of two runs' scores of each seed and prompt, its interval and p."""
    if len(recipe.seeds) == 1:
        one = paired_difference(first.tolist(), second.tolist(), recipe.confidence, recipe.seed)
        return {"difference": one.difference, "ci_low": one.interval.low, "ci_high": one.interval.high, "p": one.p}
    found = crossed_mean((first - second).unstack().to_numpy(float), recipe.confidence, -1.0, 1.0)
    ends = {"ci_low": found.interval.low, "ci_high": found.interval.high}
    return {"difference": found.mean, **ends, "p": found.p}


def _by_one_seed(difference: pd.Series, result: dict[str, float], recipe: WinRatesRecipe) -> bool:
    """Whether a difference that is found is no longer without the seed that speaks most for it."""
    if len(recipe.seeds) < 3 or not (result["ci_low"] > 0 or result["ci_high"] < 0):
        return False
    towards = difference.groupby(level="seed").mean() * (1 if result["difference"] > 0 else -1)
    others = difference.drop(index=towards.idxmax(), level="seed")
    # Over prompts alone: two seeds know nothing of the spread between seeds.
    means = others.groupby(level="prompt_id").mean()
    rest = paired_difference(means.tolist(), [0.0] * len(means), recipe.confidence, recipe.seed)
    return bool(rest.interval.low <= 0 <= rest.interval.high)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `win_rates`."""
    parser.add_argument(
        "--verdicts", required=True, type=Path, nargs="+", help="verdict tables, a run each, seed by seed"
    )
    parser.add_argument(
        "--samples", required=True, type=Path, nargs="+", help="samples tables, a run each, seed by seed"
    )
    parser.add_argument("--summary", required=True, type=Path, help="summary of the data, JSON")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="CSV of win rates that is made")
    parser.add_argument("--by-seed", required=True, type=Path, help="CSV of each seed's win rates that is made")
    parser.add_argument("--comparisons", required=True, type=Path, help="CSV of paired differences that is made")
    parser.add_argument("--manifest", required=True, type=Path, help="JSON manifest of both that is made")


def run(args: argparse.Namespace) -> None:
    """Computes and writes the win rates, the paired comparisons and their manifest."""
    recipe = from_json(WinRatesRecipe, args.recipe)
    frames = [read_verdicts(path) for path in args.verdicts]
    sample_frames = [read_table(path, "samples") for path in args.samples]
    judge = _common_judge(args.verdicts, frames, recipe)
    _check_inputs(args.verdicts, frames, sample_frames)
    summary = read_facts(args.summary)
    verdicts, samples = _of_seeds(frames, recipe), _of_seeds(sample_frames, recipe)

    selected = select_temperatures(verdicts)
    tables = [
        win_rate_table(verdicts[verdicts["seed"] == seed], samples[samples["seed"] == seed], recipe, selected)
        for seed in recipe.seeds
    ]
    by_seed = pd.concat([table.assign(seed=seed) for table, seed in zip(tables, recipe.seeds, strict=True)])
    table = table_over_seeds(by_seed, verdicts, recipe)
    comparisons = comparison_table(verdicts, table, recipe)
    judge |= _chat_figures(frames)
    facts = _prompt_facts(verdicts)
    warnings = [*few_prompts(facts["test_prompts"]), *equal_texts(samples[samples["split"] == "test"], recipe.n)]
    data_warnings = list(summary.get("warnings", []))
    for warning in (*warnings, *data_warnings):
        logger.warning("warning: %s", warning)
    columns = {column: judge.get(column) for column in JUDGE_COLUMNS}
    manifest = {
        "task": recipe.task,
        "judge": judge["judge"],
        **{key: judge[key] for key in (*JUDGE_COLUMNS, "n_held_out", "n_needed", *_CHAT) if key in judge},
        **{word: summary[word] for word in ("title", "reference", "written")},
        **_synthetic(summary),
        "warnings": warnings,
        "data_warnings": data_warnings,
        "seeds": list(recipe.seeds),
        "judge_seeds": sorted({frame.attrs["manifest"]["recipe"]["seed"] for frame in frames}),
        **facts,
        "selection": {"rule": _SELECTION, "temperatures": selected},
        "win_rate": _WIN_RATE if len(recipe.seeds) == 1 else _SEEDS,
        "order": _ORDER,
        "length": _LENGTH,
        "comparisons": _COMPARISON if len(recipe.seeds) == 1 else _COMPARISON_OVER_SEEDS,
        "kl_to_reference": {
            "definition": _KL,
            "bound": _BOUND,
            "rows_that_are_bounds": [
                {"run": run, "temperature": temperature}
                for run, temperature in zip(table["run"], table["temperature"], strict=True)
                if best_of_n_bound(recipe.n.get(run), temperature) > 0
            ],
        },
        "recipe": to_dict(recipe),
        "inputs": {
            "verdicts": _content_hashes(args.verdicts, frames, recipe),
            "samples": _content_hashes(args.samples, sample_frames, recipe),
            "summary": sha256_of_file(args.summary),
        },
    }
    write_csv(args.comparisons, comparisons)
    write_text(args.manifest, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    write_csv(args.by_seed, by_seed.assign(**columns))
    write_csv(args.out, table.assign(**columns))
    shown = table[table["selected"]][["run", "temperature", "n", "win_rate", "ci_low", "ci_high"]]
    logger.info("win rates at the selected temperatures:\n%s", shown.to_string(index=False))


def tally(group: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """Counts of the verdicts' outcomes and the win rate, a tie being half, with its interval over prompts."""
    counts = group["outcome"].value_counts()
    wins, losses, ties, invalid = (int(counts.get(outcome, 0)) for outcome in ("win", "loss", "tie", "invalid"))
    valid = group[group["outcome"] != "invalid"]
    interval = score_interval(valid["outcome"].map(SCORE).tolist(), valid["prompt_id"].tolist(), confidence)
    return {
        "n": len(group),
        "wins": wins,
        "losses": losses,
        "ties": ties,
        "invalid": invalid,
        "win_rate": (wins + ties / 2) / len(valid) if len(valid) else math.nan,
        "ci_low": interval.low,
        "ci_high": interval.high,
    }


def _bounds(group: pd.DataFrame) -> dict[str, float]:
    """The win rate with every invalid verdict a loss, and with every one a win."""
    won = float(group["outcome"].map(SCORE).fillna(0.0).mean())
    return {"if_invalid_lose": won, "if_invalid_win": won + float((group["outcome"] == "invalid").mean())}


def _order_figures(group: pd.DataFrame) -> dict[str, float]:
    decided, flipped = group["decided"].sum(), group["flipped"].dropna()
    return {
        "first_position_rate": group["first_wins"].sum() / decided if decided else math.nan,
        "flip_rate": float(flipped.astype(float).mean()) if len(flipped) else math.nan,
    }


def _length_figures(group: pd.DataFrame) -> dict[str, float]:
    valid = group[group["outcome"] != "invalid"]
    scores = valid["outcome"].map(SCORE).astype(float)
    difference = (valid["tokens"] - valid["reference_tokens"]).astype(float)
    longer, shorter = scores[difference > 0], scores[difference < 0]
    return {
        "n_longer": len(longer),
        "longer_win_rate": longer.mean(),
        "n_shorter": len(shorter),
        "shorter_win_rate": shorter.mean(),
        "length_controlled_win_rate": length_controlled_rate(scores.tolist(), difference.tolist()),
    }


def _prompt_scores(verdicts: pd.DataFrame, run: str, temperature: float) -> pd.Series:
    """Mean score of each seed's valid verdicts on each test prompt; NaN where none is valid."""
    rows = verdicts[(verdicts["run"] == run) & (verdicts["temperature"] == temperature) & (verdicts["split"] == "test")]
    seed = rows["seed"] if "seed" in rows else pd.Series(0, index=rows.index, name="seed")
    return rows["outcome"].map(SCORE).groupby([seed, rows["prompt_id"]]).mean()


def _check(verdicts: pd.DataFrame, runs: Sequence[str]) -> None:
    """Every run is there, and every row of the table will be on the same test prompts."""
    if odd := sorted(set(verdicts["outcome"]) - {*SCORE, "invalid"}):
        raise UserError(f"The verdicts hold the outcome {odd[0]!r}: run the stage `judge` again.")
    if odd := sorted(set(runs) ^ set(verdicts["run"])):
        where = "the verdicts" if odd[0] in runs else "the runs of the recipe"
        raise UserError(f"The run {odd[0]!r} is missing among {where}: pass one verdict table a run.")
    test = verdicts[verdicts["split"] == "test"]
    if test.empty:
        raise UserError("No verdict is on a test prompt: raise the task's evaluation.test_prompts.")
    expected = set(test["prompt_id"])
    for (run, temperature), group in test.groupby(["run", "temperature"]):
        if lacking := sorted(expected - set(group["prompt_id"])):
            raise UserError(
                f"Run {run!r} at temperature {temperature} lacks the test prompt {lacking[0]!r} and "
                f"{len(lacking) - 1} more that another row has: sample and judge it again."
            )
    if lacking := sorted(set(verdicts["run"]) - set(test["run"])):
        raise UserError(f"The run {lacking[0]!r} has no verdict on a test prompt: sample and judge it again.")


def _common_judge(paths: Sequence[Path], frames: Sequence[pd.DataFrame], recipe: WinRatesRecipe) -> dict[str, Any]:
    manifests: list[dict[str, Any]] = [frame.attrs["manifest"] for frame in frames]
    for path, manifest in zip(paths, manifests, strict=True):
        if manifest["judge"] != manifests[0]["judge"]:
            raise UserError(
                f"{path} was judged by {manifest['judge']}, {paths[0]} by {manifests[0]['judge']}: win rates of "
                f"two judges do not go into one table, run the stage `judge` again."
            )
    kind = recipe.judge.get("kind")
    if kind is not None and manifests[0]["judge"].split(":")[0] != kind:
        raise UserError(f"{paths[0]} was judged by {manifests[0]['judge']}, the config says {kind!r}.")
    return manifests[0]


def _chat_figures(frames: Sequence[pd.DataFrame]) -> dict[str, Any]:
    """What chat judges report, over all runs."""
    manifests = [frame.attrs["manifest"] for frame in frames]
    if "template" not in manifests[0]:
        return {}
    repeated, agree = (sum(manifest[key] for manifest in manifests) for key in ("repeated", "repeated_agree"))
    return {
        "repeated": repeated,
        "self_agreement": agree / repeated if repeated else None,
        "cost_usd": sum(manifest["cost_usd"] for manifest in manifests),
        "served_models": sorted({model for manifest in manifests for model in manifest["served_models"]}),
    }


def _check_inputs(paths: Sequence[Path], frames: Sequence[pd.DataFrame], sample_frames: Sequence[pd.DataFrame]) -> None:
    known = {frame.attrs["manifest"]["content_hash"] for frame in sample_frames}
    for path, frame in zip(paths, frames, strict=True):
        if frame.attrs["manifest"]["inputs"]["samples"] not in known:
            raise UserError(f"{path} was made from other samples than those given: run the stage `judge` again.")


def _of_seeds(frames: Sequence[pd.DataFrame], recipe: WinRatesRecipe) -> pd.DataFrame:
    """Tables of all seeds and runs as one, with the column seed."""
    if len(frames) != len(recipe.seeds) * len(recipe.runs):
        raise UserError(
            f"{len(frames)} tables are given, the recipe names {len(recipe.seeds)} seeds of {len(recipe.runs)} runs: pass one "
            f"table a run, all of a seed together."
        )
    of_run = [seed for seed in recipe.seeds for _ in recipe.runs]
    return pd.concat([frame.assign(seed=seed) for frame, seed in zip(frames, of_run, strict=True)], ignore_index=True)


def _content_hashes(
    paths: Sequence[Path], frames: Sequence[pd.DataFrame], recipe: WinRatesRecipe
) -> dict[str, str | dict[str, str]]:
    """By the tables' names, and before them by seed where there are several."""
    hashes = [(path.name, frame.attrs["manifest"]["content_hash"]) for path, frame in zip(paths, frames, strict=True)]
    count = len(recipe.runs)
    of_seeds = {f"seed_{seed}": dict(hashes[i * count : (i + 1) * count]) for i, seed in enumerate(recipe.seeds)}
    return dict(hashes) if len(recipe.seeds) == 1 else dict(of_seeds)


def _prompt_facts(verdicts: pd.DataFrame) -> dict[str, Any]:
    prompts = verdicts.groupby("split")["prompt_id"].nunique()
    decided = int(verdicts["decided"].sum())
    return {
        "test_prompts": int(prompts.get("test", 0)),
        "validation_prompts": int(prompts.get("validation", 0)),
        # Far from one half, the judge prefers a place to a text.
        "first_shown_wins": float(verdicts["first_wins"].sum() / decided) if decided else None,
    }


def _synthetic(summary: dict[str, Any]) -> dict[str, Any]:
    if not summary["synthetic"]:
        return {"synthetic": False}
    note = (
        f"Synthetic: a program wrote the {summary['written']}, and no person was asked; these win rates show "
        "that the methods work as they should, not what people prefer."
    )
    return {"synthetic": True, "note": note}
