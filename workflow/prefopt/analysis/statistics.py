"""Intervals and tests over prompts: of one win rate, and of two methods on the same prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

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
    first: Sequence[float], second: Sequence[float], confidence: float, seed: int
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

    Returns:
        mean(first - second); NaN where there are no prompts.
    """
    d = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if len(d) == 0:
        return PairedDifference(math.nan, Interval(math.nan, math.nan), math.nan, 0)
    permuted = stats.permutation_test(
        (d,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        rng=np.random.default_rng(seed),
    )
    return PairedDifference(float(d.mean()), _difference_interval(d, confidence, seed), float(permuted.pvalue), len(d))


def _difference_interval(d: np.ndarray, confidence: float, seed: int) -> Interval:
    if np.ptp(d) == 0:
        scaled = score_interval(((d + 1) / 2).tolist(), confidence=confidence)
        return Interval(2 * scaled.low - 1, 2 * scaled.high - 1)
    result = stats.bootstrap(
        (d,),
        np.mean,
        confidence_level=confidence,
        n_resamples=_RESAMPLES,
        method="BCa",
        batch=_BATCH,
        rng=np.random.default_rng(seed),
    )
    return Interval(float(result.confidence_interval.low), float(result.confidence_interval.high))
