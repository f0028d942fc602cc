"""Do the intervals and tests keep what they promise? 2,000 simulated studies each (kappa: 300), with known truth."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from prefopt.analysis.judge_statistics import agreement
from prefopt.analysis.statistics import paired_difference, score_interval, simultaneous_half_widths

STUDIES = 2000


def holds(truth: float, low: float, high: float) -> bool:
    return low <= truth <= high


@pytest.mark.parametrize(("rate", "prompts"), [(0.5, 256), (0.61, 256), (0.9, 200), (0.3, 90)])
def test_the_interval_of_plain_verdicts(rate: float, prompts: int) -> None:
    rng = np.random.default_rng(0)
    wins = rng.binomial(prompts, rate, size=STUDIES)
    intervals = {k: score_interval([1.0] * k + [0.0] * (prompts - k)) for k in set(wins.tolist())}
    covered = np.mean([holds(rate, intervals[k].low, intervals[k].high) for k in wins.tolist()])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("shares", [(0.5, 0.2, 0.3), (0.1, 0.8, 0.1), (0.85, 0.1, 0.05)])
def test_the_interval_with_ties(shares: tuple[float, float, float]) -> None:
    """Win, tie and loss shares; a pair judged in both orders is scored like this."""
    rng = np.random.default_rng(1)
    truth = shares[0] + shares[1] / 2
    scores = rng.choice([1.0, 0.5, 0.0], p=shares, size=(STUDIES, 200))
    covered = np.mean([holds(truth, *_ends(score_interval(row.tolist()))) for row in scores])
    assert 0.93 <= covered <= 0.97


def test_the_interval_of_several_samples_a_prompt() -> None:
    """Four samples of a prompt share its difficulty; pretending that they are independent would cover far less."""
    rng = np.random.default_rng(2)
    prompts, samples = 100, 4
    names = np.repeat(np.arange(prompts), samples).tolist()
    difficulty = rng.beta(1.2, 0.8, size=(STUDIES, prompts))
    scores = (rng.random((STUDIES, prompts, samples)) < difficulty[..., None]).astype(float).reshape(STUDIES, -1)
    clustered = np.mean([holds(0.6, *_ends(score_interval(row.tolist(), names))) for row in scores])
    assert 0.93 <= clustered <= 0.97
    naive = np.mean([holds(0.6, *_ends(score_interval(row.tolist()))) for row in scores[:500]])
    assert naive < 0.88


def test_the_interval_of_a_paired_difference() -> None:
    """Two methods on the same 120 prompts, whose verdicts are dependent."""
    rng = np.random.default_rng(3)
    shared = rng.random((STUDIES, 120, 1))
    own = rng.random((STUDIES, 120, 2))
    # A verdict follows the prompt's own number with chance 0.5, else its own.
    use = np.where(rng.random((STUDIES, 120, 2)) < 0.5, shared, own)
    scores = (use < np.array([0.6, 0.5])).astype(float)
    found = [
        paired_difference(row[:, 0].tolist(), row[:, 1].tolist(), 0.95, seed=i, resamples=499)
        for i, row in enumerate(scores)
    ]
    assert 0.93 <= np.mean([holds(0.1, r.interval.low, r.interval.high) for r in found]) <= 0.97


def test_the_bands_hold_all_temperatures_at_once() -> None:
    """Five temperatures on the same 150 prompts; separate intervals would not hold them all."""
    rng = np.random.default_rng(4)
    rates = np.array([0.62, 0.62, 0.59, 0.52, 0.38])
    use = np.where(rng.random((STUDIES, 150, 5)) < 0.5, rng.random((STUDIES, 150, 1)), rng.random((STUDIES, 150, 5)))
    scores = (use < rates).astype(float)
    widths = np.array([simultaneous_half_widths(row, 0.95, seed=i, resamples=300) for i, row in enumerate(scores)])
    error = np.abs(scores.mean(axis=1) - rates)
    assert 0.93 <= np.mean((error <= widths).all(axis=1)) <= 0.97
    separate = 1.96 * np.sqrt(rates * (1 - rates) / 150)
    assert np.mean((error <= separate).all(axis=1)) < 0.87


def test_the_family_wise_error_of_the_corrected_comparisons() -> None:
    """Six methods that are all alike, each compared with one of them: seldom does any difference look significant."""
    rng = np.random.default_rng(5)
    use = np.where(rng.random((STUDIES, 80, 6)) < 0.4, rng.random((STUDIES, 80, 1)), rng.random((STUDIES, 80, 6)))
    scores = (use < 0.55).astype(float)
    false = 0
    for i, row in enumerate(scores):
        ps = [_sign_flip_p(row[:, k] - row[:, 0], seed=i) for k in range(1, 6)]
        false += len(ps) * min(ps) < 0.05  # Holm's smallest; multipletests takes its time
    assert multipletests(ps, method="holm")[1].min() == pytest.approx(min(1.0, len(ps) * min(ps)))
    assert false / STUDIES <= 0.065


def _sign_flip_p(differences: np.ndarray, seed: int) -> float:
    """`paired_difference`'s test; for scores of 0 and 1 it is McNemar's exact one, which is quick."""
    return _mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))


@functools.cache
def _mcnemar(wins: int, losses: int) -> float:
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def test_the_sign_flip_test_is_mcnemars_for_plain_verdicts() -> None:
    rng = np.random.default_rng(6)
    for i in range(5):
        first, second = (rng.random((2, 60)) < np.array([[0.65], [0.5]])).astype(float)
        exact = _sign_flip_p(first - second, seed=i)
        assert paired_difference(first.tolist(), second.tolist(), 0.95, seed=i).p == pytest.approx(exact, abs=0.015)


def test_the_interval_of_kappa() -> None:
    """Two judges who copy the truth with chance 0.7 and guess otherwise: kappa is 0.49."""
    rng = np.random.default_rng(7)
    truth = rng.integers(0, 2, size=(300, 150, 1))
    guess = rng.integers(0, 2, size=(300, 150, 2))
    says = np.where(rng.random((300, 150, 2)) < 0.7, truth, guess)
    words = np.array(["loss", "win"])[says]
    found = [
        agreement(row[:, 0].tolist(), row[:, 1].tolist(), list(range(150)), 0.95, seed=i, resamples=250)
        for i, row in enumerate(words)
    ]
    assert np.mean([result.kappa for result in found]) == pytest.approx(0.49, abs=0.015)
    # 300 studies: within three standard errors of 95%.
    assert 0.912 <= np.mean([holds(0.49, *_ends(result.kappa_interval)) for result in found]) <= 0.988
    assert np.mean([holds(0.745, *_ends(result.rate_interval)) for result in found]) >= 0.912


def _ends(interval: object) -> tuple[float, float]:
    return interval.low, interval.high  # type: ignore[attr-defined]
