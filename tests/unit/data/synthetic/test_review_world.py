"""The embedded reviews and their exact rule."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from prefopt.data.synthetic import review_world as world


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("the plot was superb .", 2),
        ("the plot was superb . and the cast is superb .", 2),  # praise counts once
        ("what a dull hero ! the music was dull .", -2),  # blame each time
        ("Superb plot, DULL ending; funny though", 2 - 1 + 1),
        ("superbly ordinary", 0),  # another word, and a neutral one
        ("", 0),
    ],
)
def test_rule_by_hand(text: str, total: int) -> None:
    assert world.sum_of_grades(text) == total
    assert world.true_reward(text) == pytest.approx(1 / (1 + math.exp(-total / 7)))


def test_a_review_has_as_many_opinions_as_sentences_and_repeats_none() -> None:
    for seed in range(200):
        review = world.write_review(random.Random(seed))
        words = [w for w in review.replace(",", " ").split() if any(w in o for o in world.OPINIONS.values())]
        assert len(words) == len(set(words)) == sum(review.count(mark) for mark in ".!") in world.SENTENCES
        assert world.sum_of_grades(review) == sum(g for g, o in world.OPINIONS.items() for w in words if w in o)


def test_the_writer_is_seeded_and_both_labels_are_frequent() -> None:
    reviews = [world.write_review(random.Random(seed)) for seed in range(1000)]
    assert reviews[3] == world.write_review(random.Random(3)) and len(set(reviews)) == 1000
    assert 0.25 < np.mean([world.label(review) for review in reviews]) < 0.45


def distribution_of_the_sum() -> tuple[np.ndarray, np.ndarray]:
    """Sums of grades and their probabilities, by convolution; that no word is repeated is left out."""
    lowest, highest = -2 * max(world.SENTENCES), 2 * max(world.SENTENCES)
    probability = np.zeros(highest - lowest + 1)
    for mood in world.MOODS:
        shares = np.array([p for _, p in sorted(world.grade_probabilities(mood).items())])
        for sentences in world.SENTENCES:
            whole = np.array([1.0])
            for _ in range(sentences):
                whole = np.convolve(whole, shares)
            start = -2 * sentences - lowest
            probability[start : start + len(whole)] += whole / len(world.MOODS) / len(world.SENTENCES)
    return np.arange(lowest, highest + 1), probability


def test_the_reward_of_the_optimal_policy_rises_beyond_the_largest_target_of_the_sweep() -> None:
    sums, probability = distribution_of_the_sum()
    rewards = 1 / (1 + np.exp(-sums / world.SCALE))
    kls, values = [], []
    for beta in np.geomspace(10, 1e-3, 400):
        log_weights = np.log(probability) + rewards / beta
        weights = np.exp(log_weights - log_weights.max())
        weights /= weights.sum()
        kls.append(
            float((weights * np.log(weights / probability, where=weights > 0, out=np.zeros_like(weights))).sum())
        )
        values.append(float((weights * rewards).sum()))
    reward_at = {kl: float(np.interp(kl, kls, values)) for kl in (0, 3, 6, 9, 12, 15)}
    assert reward_at[0] == pytest.approx(0.436, abs=0.003)
    assert [reward_at[kl] for kl in (3, 6, 9, 12)] == pytest.approx([0.780, 0.864, 0.906, 0.930], abs=0.003)
    assert reward_at[15] - reward_at[12] > 0.01

    # The writer itself, who repeats no word, has nearly that distribution.
    drawn = [world.sum_of_grades(world.write_review(random.Random(seed))) for seed in range(4000)]
    assert np.mean(drawn) == pytest.approx((sums * probability).sum(), abs=0.3)
    assert np.std(drawn) == pytest.approx(
        np.sqrt((sums**2 * probability).sum() - (sums * probability).sum() ** 2), rel=0.15
    )
