"""The calculator of prompts and seeds, against simulated comparisons."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest
from scipy.stats import norm

from prefopt.analysis import power
from prefopt.analysis.power import detectable, needed_prompts, standard_error


def test_a_standard_error_by_hand() -> None:
    assert standard_error((0.5, 0.5), 100) == pytest.approx(math.sqrt(0.5 / 100))
    assert standard_error((0.5, 0.5), 100, correlation=0.5) == pytest.approx(math.sqrt(0.25 / 100))
    assert standard_error((0.5, 0.5), 100, correlation=1.0, seeds=4, seed_sd=0.02) == pytest.approx(math.sqrt(2e-4))
    assert standard_error((0.5, 0.5), 100, correlation=1.0, seeds=1, seed_sd=0.02) == 0.0


def test_the_textbook_number_of_prompts() -> None:
    """(z_.975 + z_.8)^2 (p1 q1 + p2 q2) / d^2 for independent samples of equal size."""
    expected = (1.959964 + 0.841621) ** 2 * (0.6 * 0.4 + 0.7 * 0.3) / 0.1**2
    assert needed_prompts((0.6, 0.7)) == math.ceil(expected) == 354


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (3, 0.03)])
def test_a_detectable_difference_is_detected_so_often(seeds: int, seed_sd: float) -> None:
    """Prompts of which some are easy for both; an interval by the true standard error."""
    rng, prompts, rate = np.random.default_rng(0), 300, 0.6
    easy = 0.25  # of the prompts are won by both, so that wins are correlated
    difference = 0.09
    first, second = ((r - easy) / (1 - easy) for r in (rate, rate + difference))
    covariance = easy + (1 - easy) * first * second - rate * (rate + difference)
    spread = math.sqrt(rate * (1 - rate) * (rate + difference) * (1 - rate - difference))
    error = standard_error((rate, rate + difference), prompts, seeds, covariance / spread, seed_sd)
    found = []
    for _ in range(4000):
        both = rng.random(prompts) < easy
        wins = [
            np.mean(both | (rng.random((seeds, prompts)) < chance + rng.normal(0, seed_sd, (seeds, 1)) / (1 - easy)))
            for chance in (first, second)
        ]
        found.append(wins[1] - wins[0])
    if seeds == 1:
        assert np.std(found) == pytest.approx(error, rel=0.04)
        shown = np.mean(np.abs(found) > 1.959964 * error)
        assert power.power(difference, error) == pytest.approx(shown, abs=0.02)
    else:
        # Several seeds draw their samples anew on each prompt, so that the part of prompts is at most what is said.
        assert error * 0.7 < np.std(found) < error * 1.02


def test_what_is_detectable_needs_so_many_prompts() -> None:
    found = detectable(0.6, 200, correlation=0.3, seeds=3, seed_sd=0.02)
    assert found is not None
    assert needed_prompts((0.6, 0.6 + found), correlation=0.3, seeds=3, seed_sd=0.02) in (200, 201)
    assert detectable(0.95, 20) is None, "0.05 more is not shown by twenty prompts"
    assert needed_prompts((0.6, 0.62), seeds=2, seed_sd=0.05) is None, "the trainings alone differ by more"
    assert needed_prompts((0.6, 0.6)) is None


def test_the_power_of_a_normal_difference() -> None:
    """Without a difference it is the chance of an error, and at 1.96 standard errors a half and a little of the other tail."""
    assert power.power(0.0, 1.0) == pytest.approx(0.05)
    assert power.power(0.0, 2.0, confidence=0.9) == pytest.approx(0.1)
    assert power.power(1.959964, 1.0) == pytest.approx(0.5 + norm.cdf(-2 * 1.959964), abs=1e-6)


def test_the_fewest_prompts_are_two() -> None:
    assert needed_prompts((0.001, 0.999)) == 2


def test_what_is_asked_unless_it_is_said() -> None:
    parser = argparse.ArgumentParser()
    power.add_arguments(parser)
    expected = {"rate": 0.6, "difference": None, "prompts": [100, 200, 500, 1000], "seeds": [1, 3, 5]}
    expected |= {"correlation": 0.3, "seed_sd": 0.02, "power": 0.8, "confidence": 0.95}
    assert vars(parser.parse_args([])) == expected
    said = (
        "--rate 0.5 --difference 0.2 --prompts 7 --seeds 2 --correlation 0.1 --seed-sd 0.3 --power 0.9 --confidence 0.8"
    )
    given = {"rate": 0.5, "difference": 0.2, "prompts": [7], "seeds": [2], "correlation": 0.1, "seed_sd": 0.3}
    assert vars(parser.parse_args(said.split())) == {**given, "power": 0.9, "confidence": 0.8}


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    power.add_arguments(parser)
    power.run(parser.parse_args(["--prompts", "200", "--seeds", "1", "3"]))
    alone = detectable(0.6, 200, correlation=0.3)
    three = detectable(0.6, 200, correlation=0.3, seeds=3, seed_sd=0.02)
    assert alone is not None and three is not None
    assert capsys.readouterr().out.splitlines() == [
        "A win rate of 60% against a higher one on the same prompts, wins correlated by 0.3, 2.0% between trainings; "
        "shown with a chance of 80% at 95% confidence:",
        f"  1 seed (of these two policies alone): points of difference: 200 prompts {100 * alone:.1f}",
        f"  3 seeds: points of difference: 200 prompts {100 * three:.1f}",
    ]
    power.run(parser.parse_args(["--difference", "0.1", "--correlation", "0", "--seeds", "1", "--rate", "0.6"]))
    assert capsys.readouterr().out.splitlines()[1:] == ["  1 seed (of these two policies alone): 354 prompts"]
    power.run(
        parser.parse_args(["--difference", "0.02", "--seed-sd", "0.05", "--seeds", "2", "1", "--correlation", "0"])
    )
    few = needed_prompts((0.6, 0.62))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  2 seeds: no number of prompts, take more seeds",
        f"  1 seed (of these two policies alone): {few} prompts",
    ]
    power.run(parser.parse_args(["--rate", "0.95", "--prompts", "20", "2000", "--seeds", "1"]))
    points = detectable(0.95, 2000, correlation=0.3)
    assert points is not None and capsys.readouterr().out.splitlines()[1:] == [
        f"  1 seed (of these two policies alone): points of difference: 20 prompts none, 2000 prompts {100 * points:.1f}"
    ]
    with pytest.raises(SystemExit):
        parser.parse_args(["--rate", "60"])
