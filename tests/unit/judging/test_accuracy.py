"""How often a gold reward model agrees with people; the stage itself runs in `test_reward_model.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from prefopt.judging import accuracy
from prefopt.lm.batching import Row
from prefopt.runtime.usage import Usage

EOS = 0


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the model: a completion's score is its largest token id."""

    def score_rows(model: Any, rows: Sequence[Row], token_budget: int) -> torch.Tensor:
        return torch.tensor([[float(max(c)) for c in row.completions] for row in rows])

    monkeypatch.setattr(accuracy, "score_rows", score_rows)


def pairs(rows: Sequence[tuple[list[int], list[int]]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "pair_id": str(i),
                "prompt_id": f"p{i}",
                "prompt_ids": np.array([1]),
                "chosen_ids": np.array(c),
                "rejected_ids": np.array(r),
            }
            for i, (c, r) in enumerate(rows)
        ]
    )


def agreement(pairs: pd.DataFrame) -> dict[str, Any]:
    usage = Usage("judge_accuracy", torch.device("cpu"), "float32")
    return accuracy.agreement_with_people(accuracy.held_out_scores(torch.nn.Identity(), pairs, 100, usage), 0.95)


def test_accuracy_on_held_out_pairs_by_hand(scored: None) -> None:
    right_and_longer, wrong_and_equal = ([9, 1, EOS], [2, EOS]), ([2, EOS], [9, EOS])
    tie_and_shorter = ([3, EOS], [3, 1, EOS])
    table = pairs([right_and_longer] * 7 + [wrong_and_equal] * 2 + [tie_and_shorter])
    facts = agreement(table)
    assert facts["judge_accuracy"] == pytest.approx(0.75)  # (7 + 1/2) / 10
    assert facts["longer_wins_accuracy"] == pytest.approx(0.8)  # (7 + 2/2) / 10
    assert facts["n_held_out"] == 10
    assert facts["judge_accuracy_low"] < 0.5 < 0.75 < facts["judge_accuracy_high"]
    assert facts["interpretable"] is False


def test_enough_right_answers_make_it_interpretable_and_a_wrong_judge_is_told_from_chance(
    scored: None,
) -> None:
    right, wrong = ([9, EOS], [2, EOS]), ([2, EOS], [9, EOS])
    good = agreement(pairs([right] * 70 + [wrong] * 30))
    assert (good["judge_accuracy_low"], good["judge_accuracy_high"]) == pytest.approx((0.604, 0.781), abs=1e-3)
    assert good["interpretable"] is True
    bad = agreement(pairs([wrong] * 70 + [right] * 30))
    assert bad["judge_accuracy_high"] < 0.5 and bad["interpretable"] is False


def test_a_judge_that_is_not_surely_better_than_the_longer_one_wins_is_not_interpretable(scored: None) -> None:
    right_and_longer, right_and_shorter = ([9, 1, EOS], [2, EOS]), ([9, EOS], [2, 1, EOS])
    wrong_and_longer, wrong_and_shorter = ([2, 1, EOS], [9, EOS]), ([2, EOS], [9, 1, EOS])
    # Of a hundred pairs the judge alone is right in the second number, the longer one alone in the third.
    for counts, interpretable in (((50, 20, 12, 18), False), ((50, 20, 3, 27), True), ((62, 8, 0, 30), True)):
        kinds = (right_and_longer, right_and_shorter, wrong_and_longer, wrong_and_shorter)
        rows = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
        facts = agreement(pairs(rows))
        assert facts["judge_accuracy"] == pytest.approx(0.7)
        assert facts["longer_wins_accuracy"] == pytest.approx((counts[0] + counts[2]) / 100)
        assert facts["judge_accuracy_low"] == pytest.approx(0.604, abs=1e-3)
        assert facts["interpretable"] is interpretable
        assert (facts["n_needed"] > 100) is not interpretable


def test_how_many_held_out_pairs_would_tell(scored: None) -> None:
    """Of equally long texts, of which the longer one is a coin: z^2 p (1 - p) / (p - 1/2)^2 = 380 for p = 0.55."""
    right, wrong = ([9, EOS], [2, EOS]), ([2, EOS], [9, EOS])
    few = agreement(pairs([right] * 110 + [wrong] * 90))
    assert few["interpretable"] is False
    assert few["n_needed"] == pytest.approx(380, rel=0.05)
    for times, enough in ((0.9, False), (1.1, True)):
        some = pairs([right] * round(0.55 * 380 * times) + [wrong] * round(0.45 * 380 * times))
        assert agreement(some)["interpretable"] is enough
    assert agreement(pairs([right, wrong]))["n_needed"] is None
