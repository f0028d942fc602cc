"""The stage `best_of_n_curve`: what the best of N candidates is worth, for every N, and what it costs (Fig. 4).

The candidates of a prompt are exchangeable, so the best of the first N is one of many equally good estimates. The table
holds their mean over all subsets of size N, which is free of the luck of the draw and has the smallest variance; where
a judge is paid, over seeded subsets (`prefopt.generation.subsets`), whose best candidates alone are judged.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prefopt.analysis.statistics import score_interval
from prefopt.analysis.texts import write_csv
from prefopt.analysis.verdicts import SCORE, read_verdicts
from prefopt.analysis.win_rates import select_temperatures
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.lm.flops import Shape, attended_pairs, forward_flops
from prefopt.store.files import stable_hash
from prefopt.store.tables import read_table

_KEY = ["prompt_id", "temperature", "sample_index"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurveRecipe:
    """Which N the table holds."""

    task: str
    n: tuple[int, ...]
    subsets: int | None  # seeded subsets of each size; None: all subsets
    confidence: float
    seed: int


def best_of_n_weights(rewards: Sequence[float], n: int) -> np.ndarray:
    """Chance of each candidate to be the best of a random subset of size n; equal rewards share theirs.

    Args:
        rewards: of the m candidates of one prompt.
        n: size of the subset, at most m.

    Returns:
        float64 [m], their sum is 1. With k candidates of at most a candidate's reward, and no ties, the chance is
        C(k - 1, n - 1) / C(m, n).
    """
    values = np.asarray(rewards, dtype=np.float64)
    if n == 1:
        return np.full(len(values), 1 / len(values))
    total = math.comb(len(values), n)
    weights = np.zeros(len(values))
    below = 0
    for value in np.unique(values):
        equal = values == value
        upto = below + int(equal.sum())
        # Subsets whose best has this reward: all of what is not above it, less all of what is below it.
        weights[equal] = (math.comb(upto, n) - math.comb(below, n)) / total / (upto - below)
        below = upto
    return weights


def subset_weights(rewards: Sequence[float], n: int, subsets: int, seed: int, name: Sequence[object]) -> np.ndarray:
    """Share of seeded random subsets of size n of which each candidate is the best; equal rewards: the earlier one.

    Args:
        rewards: of the candidates of one prompt.
        n: size of a subset.
        subsets: how many are drawn.
        seed: of the draw.
        name: prompt and temperature, so that each has draws of its own.

    Returns:
        float64 [candidates], their sum is 1.

    Raises:
        UserError: there are fewer than n candidates.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if len(values) < n:
        raise UserError(
            f"prompt {name[0]!r} has {len(values)} candidates, the best of {n} needs {n}: raise best_of_n.n."
        )
    rng = np.random.default_rng(int(stable_hash([seed, n, *name]), 16) % 2**64)
    weights = np.zeros(len(values))
    for _ in range(subsets):
        drawn = np.sort(rng.choice(len(values), size=n, replace=False))
        weights[drawn[values[drawn].argmax()]] += 1 / subsets
    return weights


def curve_table(
    candidates: pd.DataFrame,
    verdicts: pd.DataFrame,
    prompt_tokens: dict[str, int],
    policy: Shape,
    reward_model: Shape,
    n_values: Sequence[int],
    recipe: CurveRecipe,
) -> pd.DataFrame:
    """A row per temperature and N over the test prompts.

    Args:
        candidates: columns prompt_id, temperature, sample_index, split, tokens, reward (only N = 1 can do without).
        verdicts: the candidates' verdicts; with seeded subsets only their best candidates need one.
        prompt_tokens: length of each prompt.
        policy: shape of the model that sampled.
        reward_model: shape of the model that scored.
        n_values: the values of N.
        recipe: task, confidence and seed.

    Returns:
        task, n, temperature, prompts, win_rate, ci_low, ci_high, reward, mean_tokens (of the chosen completion),
        generated_tokens and flops (both per prompt, over all N candidates, their scores included), confidence, judge,
        seed.

    Raises:
        UserError: a prompt has fewer candidates than the largest N, or a candidate that counts has no verdict.
    """
    test = candidates[candidates["split"] == "test"].sort_values(_KEY)
    judged = test.merge(verdicts[[*_KEY, "outcome"]], on=_KEY, how="left", validate="one_to_one")
    rows = []
    for temperature, at in judged.groupby("temperature"):
        for n in n_values:
            of_prompts = [
                _one_prompt(str(name), group, _weights(str(name), group, n, recipe))
                for name, group in at.groupby("prompt_id")
            ]
            found = pd.DataFrame(of_prompts)
            valid = found["score"].dropna()
            interval = score_interval(valid.tolist(), confidence=recipe.confidence)
            costs = [
                best_of_n_flops(prompt_tokens[name], lengths, n, policy, reward_model)
                for name, lengths in zip(found["prompt_id"], found["lengths"], strict=True)
            ]
            rows.append(
                {
                    "task": recipe.task,
                    "n": n,
                    "temperature": temperature,
                    "prompts": len(found),
                    "win_rate": valid.mean(),
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "reward": found["reward"].mean(),
                    "mean_tokens": found["tokens"].mean(),
                    "generated_tokens": n * found["lengths"].map(np.mean).mean(),
                    "flops": np.mean(costs),
                    "confidence": recipe.confidence,
                    "judge": verdicts["judge"].iloc[0],
                    "seed": recipe.seed,
                }
            )
    return pd.DataFrame(rows)


def _weights(prompt_id: str, candidates: pd.DataFrame, n: int, recipe: CurveRecipe) -> np.ndarray:
    """Chance of each of a prompt's candidates to be the best of n."""
    if len(candidates) < n:
        raise UserError(
            f"prompt {prompt_id!r} has {len(candidates)} candidates, the best of {n} needs {n}: raise "
            f"tasks.NAME.best_of_n.n."
        )
    rewards = candidates["reward"].tolist()
    if recipe.subsets is None or len(candidates) == 1:
        return best_of_n_weights(rewards, n)
    name = (prompt_id, float(candidates["temperature"].iloc[0]))
    return subset_weights(rewards, n, recipe.subsets, recipe.seed, name)


def _one_prompt(prompt_id: str, candidates: pd.DataFrame, weights: np.ndarray) -> dict[str, Any]:
    """Expected figures of the candidate that is chosen with these chances; an invalid verdict has no score."""
    if (candidates["outcome"].isna() & (weights > 0)).any():
        raise UserError(f"A candidate of prompt {prompt_id!r} has no verdict: run the stage `judge_candidates` again.")
    scores = candidates["outcome"].map(SCORE).to_numpy(dtype=np.float64)
    known = ~np.isnan(scores)
    share = weights[known].sum()
    return {
        "prompt_id": prompt_id,
        "score": float(weights[known] @ scores[known] / share) if share > 0 else math.nan,
        "reward": float(weights @ candidates["reward"].to_numpy(dtype=np.float64)),
        "tokens": float(weights @ candidates["tokens"].to_numpy(dtype=np.float64)),
        "lengths": candidates["tokens"].tolist(),
    }


def distinct_texts(samples: pd.DataFrame) -> pd.Series:
    """How many different texts a test prompt's candidates are, on average, by temperature.

    Where it is 1, there is nothing to choose and the curve is level.
    """
    texts = samples[samples["split"] == "test"].groupby(["temperature", "prompt_id"])["text"].nunique()
    return texts.groupby("temperature").mean()


def best_of_n_flops(prompt: int, lengths: Sequence[int], n: int, policy: Shape, reward_model: Shape) -> float:
    """Operations of sampling n completions of a prompt and, where there is a choice, of scoring them.

    Args:
        prompt: tokens of the prompt, which each model reads once.
        lengths: tokens of the candidates, EOS included; the n are a random subset of them.
        n: how many are sampled.
        policy: samples; it never reads a completion's last token.
        reward_model: scores, reading every token, at the last one.
    """
    own = [length - 1 for length in lengths]
    pairs = attended_pairs(prompt, [])
    sampling = sum(forward_flops(policy, k, attended_pairs(prompt, [k]) - pairs, k) for k in own)
    scoring = sum(forward_flops(reward_model, k, attended_pairs(prompt, [k]) - pairs, 1) for k in lengths)
    total = forward_flops(policy, prompt, pairs, 1) + sampling * n / len(lengths)
    if n > 1:
        total += forward_flops(reward_model, prompt, pairs, 0) + scoring * n / len(lengths)
    return total


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `best_of_n_curve`."""
    parser.add_argument("--candidates", required=True, type=Path, help="samples table of candidates")
    parser.add_argument("--scores", required=True, type=Path, help="their scores table")
    parser.add_argument("--judged", type=Path, help="the candidates that were judged (default: all)")
    parser.add_argument("--verdicts", required=True, type=Path, help="their verdicts table")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    parser.add_argument(
        "--one-sample", type=Path, help="samples table of a policy to compare with, one sample a prompt"
    )
    parser.add_argument("--one-sample-verdicts", type=Path, help="its verdicts table")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="CSV that is made")


def run(args: argparse.Namespace) -> None:
    """Computes and writes the curve, and beside it the other policy's one sample at its selected temperature."""
    recipe = from_json(CurveRecipe, args.recipe)
    prompts = read_table(args.prompts, "prompts")
    lengths = dict(zip(prompts["prompt_id"], prompts["prompt_ids"].map(len), strict=True))
    samples, verdicts = _samples_and_verdicts(args.candidates, args.verdicts, prompts, args.judged)
    scores = read_table(args.scores, "scores", samples=samples.attrs["manifest"]["content_hash"])
    reward_model = Shape(**scores.attrs["manifest"]["shape"])
    candidates = samples[[*_KEY, "split", "tokens"]].merge(scores, on=_KEY, validate="one_to_one")
    policy = Shape(**samples.attrs["manifest"]["shape"])
    tables = [curve_table(candidates, verdicts, lengths, policy, reward_model, recipe.n, recipe)]
    tables[0]["run"] = samples["run"].iloc[0]
    tables[0]["distinct_texts"] = tables[0]["temperature"].map(distinct_texts(samples))
    if args.one_sample is not None:
        samples, verdicts = _samples_and_verdicts(args.one_sample, args.one_sample_verdicts, prompts)
        policy = Shape(**samples.attrs["manifest"]["shape"])
        one = curve_table(samples.assign(reward=math.nan), verdicts, lengths, policy, reward_model, (1,), recipe)
        name = str(samples["run"].iloc[0])
        selected = one[one["temperature"] == select_temperatures(verdicts)[name]]
        tables.append(selected.assign(run=name))
    table = pd.concat(tables, ignore_index=True)
    write_csv(args.out, table[["task", "run", *table.columns.drop(["task", "run"])]])


def _samples_and_verdicts(
    samples: Path, verdicts: Path, prompts: pd.DataFrame, judged: Path | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    table = read_table(samples, "samples", prompts=prompts.attrs["manifest"]["content_hash"])
    source = table.attrs["manifest"]
    if judged is not None:
        source = read_table(judged, "samples", candidates=source["content_hash"]).attrs["manifest"]
    found = read_verdicts(verdicts)
    if found.attrs["manifest"]["inputs"]["samples"] != source["content_hash"]:
        raise UserError(
            f"{verdicts} was made from other samples than {judged or samples}: run the stage `judge` again."
        )
    return table, found
