"""`python -m prefopt power`: which difference of win rates so many prompts and seeds can show, and how many show a given one.

Two runs are compared on the same prompts. With s seeds each and n prompts, the difference of their win rates has the variance

    (v1 + v2 - 2 r sqrt(v1 v2)) / n + 2 d^2 / s,    v = p (1 - p),

r being how far the two runs win on the same prompts and d the standard deviation of a run's win rate between trainings
(`results/TASK_winrates_by_seed.csv` of an earlier run tells it). With one seed the second part is left out, as the tables leave
it out: such a comparison speaks of two trained policies and not of two methods. Seeds that sample anew on each prompt make
the first part smaller than is counted here.
"""

from __future__ import annotations

import argparse
import math

from scipy.optimize import brentq
from scipy.stats import norm

_MOST_PROMPTS = 1_000_000


def standard_error(
    rates: tuple[float, float], prompts: float, seeds: int = 1, correlation: float = 0.0, seed_sd: float = 0.0
) -> float:
    """Of the difference of two win rates on the same prompts.

    Args:
        rates: of the two runs, in (0, 1).
        prompts: how many.
        seeds: trainings of each run.
        correlation: of the two runs' wins over prompts, in [-1, 1].
        seed_sd: standard deviation of a run's win rate between trainings, as a share.
    """
    first, second = (rate * (1 - rate) for rate in rates)
    of_prompts = (first + second - 2 * correlation * math.sqrt(first * second)) / prompts
    return math.sqrt(max(0.0, of_prompts) + (2 * seed_sd**2 / seeds if seeds > 1 else 0.0))


def power(difference: float, error: float, confidence: float = 0.95) -> float:
    """The chance that an interval around the difference leaves zero out, by the normal distribution."""
    bound = norm.isf((1 - confidence) / 2)
    shift = difference / error
    return float(norm.sf(bound - shift) + norm.cdf(-bound - shift))


def detectable(
    rate: float, prompts: int, wanted: float = 0.8, confidence: float = 0.95, **others: float
) -> float | None:
    """The smallest advantage over a win rate that is shown with the power wanted; None where even a rate of 1 is not.

    Args:
        rate: of the run with the lower one.
        prompts: how many.
        wanted: power.
        confidence: of the interval.
        others: see `standard_error`.
    """

    def missing(difference: float) -> float:
        error = standard_error((rate, rate + difference), prompts, **others)  # type: ignore[arg-type]
        return power(difference, error, confidence) - wanted

    low, high = 1e-6, 1 - rate - 1e-6
    return float(brentq(missing, low, high)) if missing(high) > 0 else None


def needed_prompts(
    rates: tuple[float, float], wanted: float = 0.8, confidence: float = 0.95, **others: float
) -> int | None:
    """Fewest prompts on which the difference of two rates is shown with the power wanted; None where no number does.

    Args:
        rates: of the two runs.
        wanted: power.
        confidence: of the interval.
        others: see `standard_error`.
    """
    difference = abs(rates[0] - rates[1])

    def missing(prompts: float) -> float:
        return power(difference, standard_error(rates, prompts, **others), confidence) - wanted  # type: ignore[arg-type]

    if difference == 0 or missing(_MOST_PROMPTS) < 0:
        return None
    return 2 if missing(2) >= 0 else math.ceil(brentq(missing, 2, _MOST_PROMPTS))


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command `power`."""
    parser.add_argument("--rate", type=_share, default=0.6, help="win rate of the weaker run")
    parser.add_argument("--difference", type=_share, help="of the win rates, that is to be shown")
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 200, 500, 1000], help="how many there may be")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 3, 5], help="trainings of each run")
    parser.add_argument("--correlation", type=float, default=0.3, help="of the two runs' wins over the same prompts")
    parser.add_argument("--seed-sd", type=float, default=0.02, help="standard deviation of a rate between trainings")
    parser.add_argument("--power", type=_share, default=0.8, help="chance that the difference is shown")
    parser.add_argument("--confidence", type=_share, default=0.95, help="of the interval")


def run(args: argparse.Namespace) -> None:
    """Prints the smallest difference that is shown, for each number of prompts and seeds, or the prompts that show one."""
    others = {"correlation": args.correlation, "seed_sd": args.seed_sd}
    print(
        f"A win rate of {args.rate:.0%} against a higher one on the same prompts, wins correlated by {args.correlation:g}, "
        f"{args.seed_sd:.1%} between trainings; shown with a chance of {args.power:.0%} at {args.confidence:.0%} confidence:"
    )
    for seeds in args.seeds:
        trained = "1 seed (of these two policies alone)" if seeds == 1 else f"{seeds} seeds"
        if args.difference is not None:
            rates = (args.rate, min(args.rate + args.difference, 1 - 1e-9))
            found = needed_prompts(rates, args.power, args.confidence, seeds=seeds, **others)
            print(f"  {trained}: " + ("no number of prompts, take more seeds" if found is None else f"{found} prompts"))
            continue
        shown = (detectable(args.rate, one, args.power, args.confidence, seeds=seeds, **others) for one in args.prompts)
        points = [
            f"{n} prompts {'none' if one is None else f'{100 * one:.1f}'}"
            for n, one in zip(args.prompts, shown, strict=True)
        ]
        print(f"  {trained}: points of difference: " + ", ".join(points))
