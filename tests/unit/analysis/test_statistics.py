from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from statsmodels.stats.proportion import proportion_confint

from prefopt.analysis.statistics import paired_difference, score_interval, simultaneous_half_widths


@pytest.mark.parametrize(("wins", "n"), [(156, 256), (7, 20), (0, 20), (20, 20), (1, 1)])
def test_without_ties_it_is_wilsons_interval(wins: int, n: int) -> None:
    interval = score_interval([1.0] * wins + [0.0] * (n - wins))
    assert (interval.low, interval.high) == pytest.approx(proportion_confint(wins, n, method="wilson"), abs=1e-9)


def test_the_paper_like_row_by_hand() -> None:
    # 61% of 256: p = 156/256, z = 1.959964, z^2/n = 0.0150058; centre (p + 0.0075029) / 1.0150058 = 0.6077577
    interval = score_interval([1.0] * 156 + [0.0] * 100)
    assert (interval.low + interval.high) / 2 == pytest.approx(0.6077577, abs=1e-6)
    assert (interval.low, interval.high) == pytest.approx((0.548414, 0.667102), abs=1e-6)


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_rows_without_variation_have_an_interval_of_some_width(score: float) -> None:
    interval = score_interval([score] * 30)
    assert 0 <= interval.low <= score <= interval.high <= 1
    assert interval.high - interval.low > 0.05


def test_rounding_leaves_no_end_outside_of_what_scores_can_be() -> None:
    for confidence in (0.5, 0.95):  # at 14 wins and 0.5 the formula gives 1 + 2e-16
        for n in range(1, 40):
            assert score_interval([1.0] * n, confidence=confidence).high == 1.0
            assert score_interval([0.0] * n, confidence=confidence).low == 0.0


def test_ties_narrow_and_agreement_within_a_prompt_widens() -> None:
    def width(scores: list[float], clusters: list[int] | None = None) -> float:
        interval = score_interval(scores, clusters)
        return interval.high - interval.low

    decided = [1.0, 0.0] * 50
    assert width([1.0, 0.0] * 25 + [0.5] * 50) < width(decided)
    four_samples = [score for score in decided for _ in range(4)]
    prompts = [i for i in range(100) for _ in range(4)]
    assert width(four_samples, prompts) == pytest.approx(width(decided), rel=1e-9)
    assert width(four_samples) < 0.55 * width(decided)


def test_prompts_are_told_apart_by_more_than_their_words() -> None:
    scores = [1.0, 0.0, 1.0, 1.0]
    assert score_interval(scores, [1, "1", ("a", 1), ("a", 2)]) == score_interval(scores)


def test_no_scores_no_interval() -> None:
    assert math.isnan(score_interval([]).low) and math.isnan(score_interval([]).high)


@pytest.mark.parametrize(("n", "p", "ties"), [(128, 0.6, 0.0), (128, 0.6, 0.3), (40, 0.93, 0.1)])
def test_coverage_of_the_interval(n: int, p: float, ties: float) -> None:
    rng = np.random.default_rng(0)
    draws = rng.choice([0.0, 0.5, 1.0], p=[(1 - ties) * (1 - p), ties, (1 - ties) * p], size=(600, n))
    truth = (1 - ties) * p + ties / 2
    intervals = [score_interval(row.tolist()) for row in draws]
    assert 0.925 <= np.mean([i.low <= truth <= i.high for i in intervals]) <= 0.985


def test_coverage_with_several_samples_a_prompt() -> None:
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(400):
        quality = rng.beta(1.5, 1.0, size=100)  # mean 0.6
        scores = (rng.random((100, 4)) < quality[:, None]).astype(float).ravel()
        interval = score_interval(scores.tolist(), np.repeat(np.arange(100), 4).tolist())
        covered.append(interval.low <= 0.6 <= interval.high)
    assert 0.92 <= np.mean(covered) <= 0.985


def test_paired_difference_by_hand_and_against_mcnemar() -> None:
    # 100 prompts: both win 30, only the first 25, only the second 10, none 35.
    first = [1.0] * 30 + [1.0] * 25 + [0.0] * 10 + [0.0] * 35
    second = [1.0] * 30 + [0.0] * 25 + [1.0] * 10 + [0.0] * 35
    result = paired_difference(first, second, 0.95, seed=0)
    assert result.difference == pytest.approx(0.15)
    assert result.prompts == 100
    assert result.p == pytest.approx(binomtest(25, 35).pvalue, abs=0.006)
    # d = (b - c) / n, SE = sqrt(b + c - (b - c)^2 / n) / n = 0.0572
    assert (result.interval.low, result.interval.high) == pytest.approx((0.15 - 0.112, 0.15 + 0.112), abs=0.012)
    assert paired_difference(first, second, 0.95, seed=0) == result


def bca(d: np.ndarray, confidence: float, seed: int, resamples: int) -> list[float]:
    """The bias-corrected and accelerated bootstrap of a mean, written out (Efron and Tibshirani, chapter 14)."""
    n = len(d)
    means = d[np.random.default_rng(seed).integers(0, n, (resamples, n))].mean(axis=1)
    z0 = norm.ppf(((means < d.mean()).mean() + (means <= d.mean()).mean()) / 2)
    left_out = np.array([np.delete(d, i).mean() for i in range(n)])
    u = left_out.mean() - left_out
    acceleration = (u**3).sum() / (6 * (u**2).sum() ** 1.5)
    z = [z0 + norm.ppf(level) for level in ((1 - confidence) / 2, (1 + confidence) / 2)]
    return [float(np.quantile(means, norm.cdf(z0 + x / (1 - acceleration * x)))) for x in z]


def test_the_interval_of_a_difference_is_the_bootstrap_over_prompts_at_the_confidence_asked_for() -> None:
    first, second = [1.0, 1.0, 0.5, 0.0, 1.0, 1.0, 0.5, 1.0, 0.0, 1.0], [0.0, 1.0, 0.5, 0.5, 0.0] * 2
    for confidence, seed, resamples in ((0.8, 3, 400), (0.95, 4, 900)):
        found = paired_difference(first, second, confidence, seed, resamples)
        expected = bca(np.array(first) - np.array(second), confidence, seed, resamples)
        assert [found.interval.low, found.interval.high] == pytest.approx(expected)
        # Of 10 prompts the 1024 signs are drawn at random, and the p-value is a share of the draws and the data.
        assert 0 < found.p < 1 and found.p * (resamples + 1) / 2 == pytest.approx(round(found.p * (resamples + 1) / 2))
    assert len({paired_difference(first, second, 0.8, seed, 400).interval.low for seed in range(4)}) > 1


def test_equal_methods_and_constant_differences() -> None:
    same = paired_difference([1.0, 0.0, 0.5] * 20, [1.0, 0.0, 0.5] * 20, 0.95, seed=0)
    assert (same.difference, same.p) == (0.0, 1.0)
    assert -0.2 < same.interval.low < 0 < same.interval.high < 0.2
    always = paired_difference([1.0] * 40, [0.0] * 40, 0.95, seed=0)
    assert always.difference == 1.0
    assert 0.8 < always.interval.low < always.interval.high == 1.0
    assert always.p < 0.001


def test_no_common_prompts() -> None:
    found = paired_difference([], [], 0.95, seed=0)
    assert found.prompts == 0 and math.isnan(found.p) and math.isnan(found.difference)
    assert math.isnan(found.interval.low) and math.isnan(found.interval.high)


@pytest.mark.parametrize(("wins", "n", "confidence"), [(7, 20, 0.9), (15, 20, 0.99), (0, 7, 0.5)])
def test_the_confidence_is_the_one_asked_for(wins: int, n: int, confidence: float) -> None:
    interval = score_interval([1.0] * wins + [0.0] * (n - wins), confidence=confidence)
    assert (interval.low, interval.high) == pytest.approx(
        proportion_confint(wins, n, alpha=1 - confidence, method="wilson"), abs=1e-9
    )


def by_hand(clusters: list[list[float]], z2: float) -> tuple[float, float]:
    """Wilson's interval with the effective number, written out over clusters of any size."""
    scores = [score for cluster in clusters for score in cluster]
    n, size = len(scores), len(scores) / len(clusters)
    # z^2 / 2 clusters of wins and as many of losses, of average size.
    total = n + z2 * size
    p = (sum(scores) + z2 / 2 * size) / total
    squares = sum(sum(score - p for score in cluster) ** 2 for cluster in clusters)
    squares += z2 / 2 * (size * (1 - p)) ** 2 + z2 / 2 * (size * p) ** 2
    effective = p * (1 - p) / (squares / total**2) - z2
    mean = sum(scores) / n
    root = math.sqrt(mean * (1 - mean) / effective + z2 / (4 * effective**2))
    middle, half, scale = mean + z2 / (2 * effective), math.sqrt(z2) * root, 1 + z2 / effective
    return (middle - half) / scale, (middle + half) / scale


@pytest.mark.parametrize(
    "clusters",
    [
        [[1.0, 0.5], [0.0], [1.0, 1.0, 0.0], [0.5], [0.0, 0.0]],
        [[1.0]] * 5 + [[0.5]] * 3 + [[0.0]] * 9,
        [[1.0, 1.0, 1.0]] * 4 + [[0.0, 0.5, 1.0]] * 3 + [[0.0]],
    ],
)
def test_ties_and_uneven_clusters_by_hand(clusters: list[list[float]]) -> None:
    names = [i for i, cluster in enumerate(clusters) for _ in cluster]
    interval = score_interval([score for cluster in clusters for score in cluster], names)
    assert (interval.low, interval.high) == pytest.approx(by_hand(clusters, 1.959964**2), abs=1e-6)


def test_a_constant_difference_has_the_interval_of_its_score() -> None:
    # All wins of 40: Wilson's low end is 40 / (40 + z^2), and a difference of one is a score of one.
    always = paired_difference([1.0] * 40, [0.0] * 40, 0.95, seed=0)
    assert always.interval.low == pytest.approx(2 * 40 / (40 + 1.959964**2) - 1, abs=1e-6)
    half = paired_difference([1.0] * 40, [0.5] * 40, 0.95, seed=0)
    scaled = score_interval([0.75] * 40)
    assert (half.interval.low, half.interval.high) == pytest.approx((2 * scaled.low - 1, 2 * scaled.high - 1))
    assert half.difference == 0.5
    turned = paired_difference([0.5] * 40, [1.0] * 40, 0.95, seed=0)
    assert turned.difference == -0.5 and turned.interval.low == pytest.approx(-half.interval.high)


def test_one_prompt_proves_nothing() -> None:
    found = paired_difference([1.0], [0.0], 0.95, seed=0)
    interval = score_interval([1.0])
    assert (found.difference, found.p, found.prompts) == (1.0, 1.0, 1)
    assert (found.interval.low, found.interval.high) == pytest.approx((2 * interval.low - 1, 1.0))


def test_the_sign_flip_test_enumerates_few_prompts() -> None:
    # Differences 1, 1, 1/2, -1/2: of 16 signs four reach a sum of 2 on either side, and four more of 3 or -3 do not exist.
    found = paired_difference([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.5, 0.5], 0.95, seed=0)
    sums = [a + b + c / 2 + d / 2 for a in (-1, 1) for b in (-1, 1) for c in (-1, 1) for d in (-1, 1)]
    assert found.p == pytest.approx(sum(abs(total) >= 2 for total in sums) / 16)
    assert found.difference == 0.5 and found.prompts == 4


def test_the_bands_are_the_max_t_bootstrap() -> None:
    """Against the same resamples, taken one by one."""
    scores = np.random.default_rng(3).integers(0, 3, size=(30, 3)) / 2
    widths = simultaneous_half_widths(scores, 0.9, seed=5, resamples=1500)
    rng = np.random.default_rng(5)
    counts = np.vstack([rng.multinomial(30, np.full(30, 1 / 30), size=size) for size in (1000, 500)])
    errors = []
    for column in scores.T:
        padded = [*column, 0.0, 1.0]
        errors.append(np.std(padded) / math.sqrt(30))
    largest = []
    for count in counts:
        means = [np.average(column, weights=count) for column in scores.T]
        largest.append(max(abs(m - column.mean()) / e for m, column, e in zip(means, scores.T, errors, strict=True)))
    quantile = np.quantile(largest, 0.9)
    assert quantile > 1.645
    assert widths == pytest.approx(quantile * np.array(errors))
    # Of one column of few prompts the bootstrap is too narrow: the normal quantile is the least.
    narrow = simultaneous_half_widths(np.array([[1.0], [0.0], [1.0]]), 0.5, seed=0, resamples=200)
    assert narrow.item() >= 0.6745 * np.std([1, 0, 1, 0, 1]) / math.sqrt(3) - 1e-4
