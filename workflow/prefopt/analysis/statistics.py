"""Intervals and tests over prompts: of one win rate, of several at once, and of two methods on the same prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

# Standard errors on either side of a 95% interval.
Z_95 = float(stats.norm.ppf(0.975))
_RESAMPLES = 9999
_BATCH = 1000  # resamples held in memory at once


@dataclasses.dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Mean difference of two methods' scores on the same prompts, with its interval and two-sided p-value."""

    difference: float
    interval: Interval
    p: float
    prompts: int


def score_interval(
    scores: Sequence[float], clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> Interval:
    """Wilson's interval for a mean of scores in [0, 1], with ties and several scores a prompt allowed for.

    Wilson's interval of p and n_eff, where n_eff = p (1 - p) / Var(p) is the number of independent wins and
    losses that would be known as precisely. p and Var(p) (over clusters) are taken for this after z^2/2 clusters
    of wins and as many of losses, of average size, have been added, so that n_eff exists for all-win, all-loss
    and all-tie rows too. With one score of 0 or 1 a cluster n_eff = n: exactly Wilson's interval. Ties narrow it,
    scores that agree within a prompt widen it.

    Args:
        scores: each in [0, 1]: win 1, tie 1/2, loss 0.
        clusters: which prompt each score belongs to; None: each its own.
        confidence: e.g. 0.95.

    Returns:
        The interval; [nan, nan] where there are no scores.
    """
    s = np.asarray(scores, dtype=np.float64)
    n = len(s)
    if n == 0:
        return Interval(math.nan, math.nan)
    codes = np.arange(n) if clusters is None else pd.factorize(np.asarray(clusters, dtype=object))[0]
    z2 = float(stats.norm.ppf(0.5 + confidence / 2)) ** 2
    size = n / (codes.max() + 1)
    total = n + size * z2
    p = (s.sum() + size * z2 / 2) / total
    sums = np.bincount(codes, weights=s - p)
    variance = ((sums**2).sum() + z2 / 2 * size**2 * ((1 - p) ** 2 + p**2)) / total**2
    effective = p * (1 - p) / variance - z2
    mean = float(s.mean())
    centre = (mean + z2 / (2 * effective)) / (1 + z2 / effective)
    half = math.sqrt(z2 * mean * (1 - mean) / effective + (z2 / (2 * effective)) ** 2) / (1 + z2 / effective)
    # Rounding must not leave the mean of an all-win or all-loss row outside.
    return Interval(float(min(mean, max(0.0, centre - half))), float(max(mean, min(1.0, centre + half))))


def paired_difference(
    first: Sequence[float], second: Sequence[float], confidence: float, seed: int, resamples: int = _RESAMPLES
) -> PairedDifference:
    """Difference of the mean scores of two methods, prompt by prompt.

    The interval is the BCa bootstrap over prompts; where all differences are equal, and a bootstrap has no
    width, it is `score_interval` of (difference + 1) / 2. The p-value is that of the sign-flip permutation test,
    which for scores of 0 and 1 is McNemar's.

    Args:
        first: score in [0, 1] of each prompt, one method.
        second: the other method's, in the same order.
        confidence: e.g. 0.95.
        seed: of the bootstrap and the permutations.
        resamples: of each.

    Returns:
        mean(first - second); NaN where there are no prompts.
    """
    d = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if len(d) == 0:
        return PairedDifference(math.nan, Interval(math.nan, math.nan), math.nan, 0)
    interval = _difference_interval(d, confidence, seed, resamples)
    return PairedDifference(float(d.mean()), interval, sign_flip_p(d, seed, resamples), len(d))


def sign_flip_p(differences: np.ndarray, seed: int, resamples: int = _RESAMPLES) -> float:
    """Two-sided p of the sign-flip permutation test that the mean difference is zero; for 0, 1 and -1 McNemar's.

    Args:
        differences: float [prompts], at least one.
        seed: of the permutations.
        resamples: how many; all of them where there are no more.
    """
    if len(differences) == 1:  # which scipy does not permute; either sign is as extreme
        return 1.0
    permuted = stats.permutation_test(
        (differences,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=_BATCH,
        rng=np.random.default_rng(seed),
    )
    return float(permuted.pvalue)


def _difference_interval(d: np.ndarray, confidence: float, seed: int, resamples: int) -> Interval:
    if np.ptp(d) == 0:
        scaled = score_interval(((d + 1) / 2).tolist(), confidence=confidence)
        return Interval(2 * scaled.low - 1, 2 * scaled.high - 1)
    result = stats.bootstrap(
        (d,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        method="BCa",
        batch=_BATCH,
        rng=np.random.default_rng(seed),
    )
    return Interval(float(result.confidence_interval.low), float(result.confidence_interval.high))


def simultaneous_half_widths(
    scores: np.ndarray, confidence: float, seed: int, resamples: int = _RESAMPLES
) -> np.ndarray:
    """Half-widths of bands that hold all means of a row of columns at once, with the given confidence.

    The max-T bootstrap: prompts are resampled for all columns together, and the quantile of the largest deviation,
    in units of each column's standard error, replaces the normal one. So the best column of a temperature sweep is
    allowed for. Standard errors are taken after a win and a loss have been added to each column, so that a column
    of equal scores has a width as well.

    Args:
        scores: [prompts, columns] in [0, 1].
        confidence: e.g. 0.95.
        seed: of the resamples.
        resamples: how many.

    Returns:
        [columns].
    """
    n = len(scores)
    padded = np.vstack([scores, np.zeros(scores.shape[1]), np.ones(scores.shape[1])])
    errors = padded.std(axis=0) / math.sqrt(n)
    rng = np.random.default_rng(seed)
    centred = scores - scores.mean(axis=0)
    largest = np.empty(resamples)
    for start in range(0, resamples, _BATCH):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(_BATCH, resamples - start))
        largest[start : start + len(counts)] = np.abs(counts @ centred / n / errors).max(axis=1)
    # With few prompts the bootstrap is narrower than the normal quantile of one column, which is the least possible.
    quantile = max(float(np.quantile(largest, confidence)), float(stats.norm.ppf(0.5 + confidence / 2)))
    widths: np.ndarray = quantile * errors
    return widths


@dataclasses.dataclass(frozen=True)
class MeanOverSeeds:
    """A mean over seeds and prompts, and what is known of it as both are drawn anew."""

    mean: float
    between_seed_sd: float  # of the seeds' own means
    interval: Interval
    p: float  # two-sided, that the mean is zero


def mean_over_seeds(
    estimates: Sequence[float], error: float, prompts: int, confidence: float, twice: float = 0.0
) -> MeanOverSeeds:
    """The mean of a figure over trainings with several seeds, all measured on the same prompts.

    Its variance is that between the seeds' figures over their number, plus that over prompts. What prompts and seeds
    have in common is in both; for three seeds, whose own variance is hardly known, it stays so, for more the part
    (S - 3) / (S - 1) of it is taken out. The quantile is Student's with Welch and Satterthwaite's degrees of freedom.
    `tests/unit/analysis/test_simulated_seeds.py` holds the coverage of this choice.

    Args:
        estimates: of each seed, at least two.
        error: standard error over prompts of their mean.
        prompts: how many there are.
        confidence: e.g. 0.95.
        twice: the variance that both parts hold.
    """
    values = np.asarray(estimates, dtype=np.float64)
    seeds, mean = len(values), float(values.mean())
    between, within = float(values.var(ddof=1)) / seeds, error**2
    variance = max(between + within - twice * max(0, seeds - 3) / (seeds - 1), within)
    if not variance > 0:
        return MeanOverSeeds(mean, 0.0, Interval(mean, mean), 1.0 if mean == 0 else 0.0)
    freedom = (between + within) ** 2 / (between**2 / (seeds - 1) + within**2 / max(1, prompts - 1))
    half = float(stats.t.ppf(0.5 + confidence / 2, freedom)) * math.sqrt(variance)
    p = float(2 * stats.t.sf(abs(mean) / math.sqrt(variance), freedom))
    return MeanOverSeeds(mean, math.sqrt(between * seeds), Interval(mean - half, mean + half), p)


def crossed_mean(scores: np.ndarray, confidence: float, lowest: float, highest: float) -> MeanOverSeeds:
    """`mean_over_seeds` of scores of every seed on every prompt.

    As in `simultaneous_half_widths` a prompt of the lowest and one of the highest score are added to the variance over
    prompts, so that equal scores have a width as well.

    Args:
        scores: [seeds, prompts]; a prompt with a NaN counts for no seed.
        confidence: e.g. 0.95.
        lowest: least score that there can be.
        highest: largest score that there can be.

    Returns:
        The interval lies within the range of scores; all is NaN where no prompt has a score of every seed.
    """
    whole = scores[:, ~np.isnan(scores).any(axis=0)]
    seeds, prompts = whole.shape
    if prompts == 0:
        return MeanOverSeeds(math.nan, math.nan, Interval(math.nan, math.nan), math.nan)
    padded = np.append(whole.mean(axis=0), [lowest, highest])
    residual = whole - whole.mean(axis=0) - whole.mean(axis=1, keepdims=True) + whole.mean()
    twice = (residual**2).sum() / ((seeds - 1) * max(1, prompts - 1)) / (seeds * prompts)
    error = padded.std() / math.sqrt(prompts)
    found = mean_over_seeds(whole.mean(axis=1).tolist(), error, prompts, confidence, twice)
    low, high = max(lowest, found.interval.low), min(highest, found.interval.high)
    return dataclasses.replace(found, interval=Interval(low, high))
