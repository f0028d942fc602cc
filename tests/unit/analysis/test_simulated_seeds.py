"""Intervals over seeds and prompts hold the truth as often as they say, by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from prefopt.analysis.statistics import Interval, MeanOverSeeds, crossed_mean, mean_over_seeds

_STUDIES = 400


def drawn(
    rng: np.random.Generator, seeds: int, prompts: int, spread: float, rate: float, difficulty: np.ndarray
) -> np.ndarray:
    """Scores of trainings [seeds, prompts]: some prompts are hard for all of them, and a tenth of the verdicts are ties."""
    centre = stats.norm.ppf(rate) * np.sqrt(2)
    chance = stats.norm.cdf(centre + difficulty) + spread * rng.standard_normal((seeds, 1))
    wins = (rng.random((seeds, prompts)) < chance).astype(float)
    return np.where(rng.random((seeds, prompts)) < 0.1, 0.5, wins)


@pytest.mark.parametrize(("seeds", "most"), [(3, 0.99), (5, 0.975)])
@pytest.mark.parametrize("prompts", [64, 256])
def test_an_interval_over_seeds_holds_the_truth(seeds: int, most: float, prompts: int) -> None:
    """Spread between seeds of 0 to 6 points, win rates of a half and of four fifths."""
    rng, held = np.random.default_rng(seeds + prompts), []
    for spread, rate in itertools.product((0.0, 0.02, 0.04, 0.06), (0.5, 0.8)):
        truth, inside = 0.9 * rate + 0.05, 0
        for _ in range(_STUDIES):
            scores = drawn(rng, seeds, prompts, spread, rate, rng.standard_normal(prompts))
            interval = crossed_mean(scores, 0.95, 0.0, 1.0).interval
            inside += interval.low <= truth <= interval.high
        held.append(inside / _STUDIES)
    # The mean over the eight settings has a standard error of 0.4 points, one of them one of a point.
    assert 0.935 < np.mean(held) < most and min(held) > 0.91, held


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_difference_without_an_effect_is_seldom_found(seeds: int) -> None:
    rng, found, studies = np.random.default_rng(seeds), 0, 0
    for prompts, spread in itertools.product((64, 256), (0.0, 0.03, 0.06)):
        for _ in range(_STUDIES):
            difficulty = rng.standard_normal(prompts)
            first, second = (drawn(rng, seeds, prompts, spread, 0.6, difficulty) for _ in range(2))
            found += crossed_mean(first - second, 0.95, -1.0, 1.0).p < 0.05
            studies += 1
    assert found / studies < 0.065


def test_a_true_difference_of_ten_points_is_found() -> None:
    rng, found = np.random.default_rng(0), 0
    for _ in range(200):
        difficulty = rng.standard_normal(256)
        first, second = (drawn(rng, 3, 256, 0.01, rate, difficulty) for rate in (0.7, 0.6))
        found += crossed_mean(first - second, 0.95, -1.0, 1.0).p < 0.05
    assert found / 200 > 0.65


def test_by_hand() -> None:
    """Two seeds on two prompts, without the added prompts: variance 0.02 / 2 between seeds, 0.01 over prompts."""
    result = mean_over_seeds([0.4, 0.6], 0.1, 3, 0.95)
    assert result.mean == pytest.approx(0.5) and result.between_seed_sd == pytest.approx(0.02**0.5)
    freedom = 0.02**2 / (0.01**2 / 1 + 0.01**2 / 2)
    half = stats.t.ppf(0.975, freedom) * 0.02**0.5
    assert (result.interval.low, result.interval.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert result.p == pytest.approx(2 * stats.t.sf(0.5 / 0.02**0.5, freedom))
    scores = np.array([[1.0, 0.0, 1.0, np.nan], [1.0, 0.0, 0.5, 1.0]])
    means = np.array([1.0, 0.0, 0.75])
    error = np.append(means, [0.0, 1.0]).std() / 3**0.5
    expected = mean_over_seeds([2 / 3, 0.5], error, 3, 0.9)
    found = crossed_mean(scores, 0.9, 0.0, 1.0)
    assert found.mean == pytest.approx(7 / 12) and found.p == pytest.approx(expected.p)
    assert found.interval.low == pytest.approx(max(0.0, expected.interval.low))


@pytest.mark.parametrize(("twice", "variance"), [(0.0, 0.0035), (0.0008, 0.0031), (0.004, 0.0025)])
def test_what_both_parts_hold_is_taken_out_of_five_seeds(twice: float, variance: float) -> None:
    """A variance of 0.005 / 5 between seeds and 0.0025 over prompts less half of what is in both, at least that over prompts."""
    found = mean_over_seeds([0.4, 0.5, 0.6, 0.5, 0.5], 0.05, 20, 0.9, twice)
    freedom = 0.0035**2 / (0.001**2 / 4 + 0.0025**2 / 19)
    half = stats.t.ppf(0.95, freedom) * variance**0.5
    assert (found.interval.low, found.interval.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert found.p == pytest.approx(2 * stats.t.sf(0.5 / variance**0.5, freedom))
    assert found.between_seed_sd == pytest.approx(0.005**0.5)
    assert mean_over_seeds([0.4, 0.5, 0.6], 0.05, 20, 0.9, twice) == mean_over_seeds([0.4, 0.5, 0.6], 0.05, 20, 0.9)


def test_without_any_variance_a_mean_is_certain() -> None:
    half, zero = (mean_over_seeds([value] * 2, 0.0, 9, 0.95) for value in (0.5, 0.0))
    assert half == MeanOverSeeds(0.5, 0.0, Interval(0.5, 0.5), 0.0)
    assert zero == MeanOverSeeds(0.0, 0.0, Interval(0.0, 0.0), 1.0)


def test_equal_scores_have_a_width_and_none_have_none() -> None:
    every = crossed_mean(np.ones((3, 64)), 0.95, 0.0, 1.0)
    assert every.interval.high == 1.0 and 0.9 < every.interval.low < 0.97
    none = crossed_mean(np.full((2, 3), np.nan), 0.95, 0.0, 1.0)
    assert np.isnan([none.mean, none.between_seed_sd, none.interval.low, none.p]).all()
    assert mean_over_seeds([0.5, 0.5], 0.0, 9, 0.95).interval.low == 0.5


def test_with_more_seeds_what_prompts_and_seeds_share_is_counted_less() -> None:
    rng = np.random.default_rng(1)
    scores = (rng.random((6, 200)) < 0.5).astype(float)
    found = crossed_mean(scores, 0.95, 0.0, 1.0)
    # Without any common difficulty nor spread it is as wide as an interval over all 1,200 verdicts, and a half more at most.
    width = (found.interval.high - found.interval.low) / (2 * 1.96 * (0.25 / 1200) ** 0.5)
    assert 0.95 < width < 1.6
