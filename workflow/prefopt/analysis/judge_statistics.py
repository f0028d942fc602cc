"""What tells about judges: how far two agree, and what is left of a win rate at equal length."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
import statsmodels.api as sm
from statsmodels.stats.inter_rater import cohens_kappa

from prefopt.analysis.statistics import Interval, score_interval


def length_controlled_rate(scores: Sequence[float], length_differences: Sequence[float]) -> float:
    """Win rate if both texts were equally long, by a logistic regression on the standardised length difference.

    logit P(win) = b0 + b1 tanh(d / sd(d)), and the answer is sigma(b0); the form is that of AlpacaEval's
    length-controlled win rate. Two half observations, a win and a loss of equal length, keep it finite.

    Args:
        scores: in [0, 1], a tie 1/2.
        length_differences: tokens of the judged text less those of its opponent.

    Returns:
        NaN where there are no scores; the plain rate (with the two half observations) where all lengths differ
        alike.
    """
    s, d = np.asarray(scores, dtype=np.float64), np.asarray(length_differences, dtype=np.float64)
    if len(s) == 0:
        return math.nan
    scaled = np.tanh(d / d.std()) if d.std() > 0 else np.zeros_like(d)
    design = np.column_stack([np.ones(len(s) + 2), np.concatenate([scaled, [0.0, 0.0]])])
    weights = np.concatenate([np.ones(len(s)), [0.5, 0.5]])
    # A ridge far below the data's weight keeps b1 finite where length decides every verdict.
    model = sm.GLM(np.concatenate([s, [1.0, 0.0]]), design, family=sm.families.Binomial(), freq_weights=weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of perfect separation, which the ridge allows for
        b0 = float(model.fit_regularized(alpha=[0.0, 1e-3], L1_wt=0.0).params[0])
    return 1 / (1 + math.exp(-b0))


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the same pairs."""

    n: int
    rate: float
    rate_interval: Interval
    kappa: float
    kappa_interval: Interval


def agreement(
    first: Sequence[str],
    second: Sequence[str],
    clusters: Sequence[Hashable],
    confidence: float,
    seed: int,
    resamples: int = 2000,
) -> Agreement:
    """Raw agreement and Cohen's kappa of two judges' outcomes on the same pairs.

    Raw agreement has `score_interval` over clusters, kappa the percentile bootstrap over clusters. Kappa is NaN
    where both judges always say the same one thing, since nothing is left to agree on beyond chance; resamples
    where that happens are left out.

    Args:
        first: outcomes of one judge.
        second: the other's, in the same order.
        clusters: the prompt (or item) of each pair.
        confidence: e.g. 0.95.
        seed: of the bootstrap.
        resamples: how many.
    """
    labels = sorted({*first, *second})
    codes = [np.array([labels.index(value) for value in column]) for column in (first, second)]
    n = len(codes[0])
    if n == 0:
        empty = Interval(math.nan, math.nan)
        return Agreement(0, math.nan, empty, math.nan, empty)
    same = (codes[0] == codes[1]).astype(float)
    groups = pd.factorize(np.asarray(clusters, dtype=object))[0]
    # A table of counts for each cluster; resampling clusters sums tables.
    tables = np.zeros((groups.max() + 1, len(labels), len(labels)))
    np.add.at(tables, (groups, codes[0], codes[1]), 1)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(tables), np.full(len(tables), 1 / len(tables)), size=resamples)
    kappas = np.array([kappa_of(table) for table in np.einsum("rc,cij->rij", drawn, tables)])
    kappas = kappas[~np.isnan(kappas)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(kappas, [tail, 1 - tail]) if len(kappas) else (math.nan, math.nan)
    return Agreement(
        n,
        float(same.mean()),
        score_interval(same.tolist(), list(clusters), confidence),
        kappa_of(tables.sum(axis=0)),
        Interval(float(low), float(high)),
    )


def kappa_of(table: np.ndarray) -> float:
    """Cohen's kappa of a square table of counts; NaN where chance alone gives full agreement."""
    if (table.sum(axis=0) @ table.sum(axis=1)) == table.sum() ** 2:
        return math.nan
    return float(cohens_kappa(table, return_results=False))
