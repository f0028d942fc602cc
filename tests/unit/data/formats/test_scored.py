"""Scored responses: the pairs of each rule, and what is malformed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from prefopt.data.formats.scored import parse_scored
from prefopt.data.raw.parsing import Unusable
from prefopt.data.raw.record import Malformed

ROW = {"prompt": "Hi?", "responses": ["a", "b", "c", "d"], "scores": [1, 3, 3.0, 2.5]}


def texts(row: dict[str, Any], rule: str, margin: float = 0.0, seed: int = 0) -> list[str]:
    return [pair.chosen.strip() + pair.rejected.strip() for pair in parse_scored(row, rule, margin, seed)]


def test_all_are_each_against_each_worse_one() -> None:
    assert texts(ROW, "all") == ["bd", "ba", "cd", "ca", "da"]
    assert texts(ROW, "all", margin=0.5) == ["bd", "ba", "cd", "ca", "da"]
    assert texts(ROW, "all", margin=0.6) == ["ba", "ca", "da"]
    assert texts(ROW, "all", margin=2) == ["ba", "ca"]


def test_objects_with_text_and_score_are_the_same() -> None:
    rows = [{"text": text, "score": score} for text, score in zip(ROW["responses"], ROW["scores"], strict=True)]  # type: ignore[call-overload]
    assert texts({"prompt": "Hi?", "responses": rows}, "all") == texts(ROW, "all")


def test_the_best_stands_against_a_worse_one_that_the_seed_draws() -> None:
    drawn = Counter(pair for i in range(400) for pair in texts({**ROW, "prompt": f"Hi {i}?"}, "best_vs_random"))
    assert drawn.total() == 400, "one pair each"
    assert set(drawn) == {"bd", "ba"} and 150 < drawn["bd"] < 250
    again = [texts({**ROW, "prompt": f"Hi {i}?"}, "best_vs_random", seed=1)[0] for i in range(99)]
    assert again != [texts({**ROW, "prompt": f"Hi {i}?"}, "best_vs_random")[0] for i in range(99)]
    assert texts(ROW, "best_vs_random") == texts(ROW, "best_vs_random")
    assert texts(ROW, "best_vs_random", margin=1) == ["ba"]


@pytest.mark.parametrize("rule", ["all", "best_vs_random"])
def test_no_two_are_far_enough_apart(rule: str) -> None:
    for row, margin in ((ROW, 2.1), ({**ROW, "scores": [1, 1, 1, 1]}, 0), ({**ROW, "responses": ["a"] * 4}, 0)):
        with pytest.raises(Unusable, match=r"^scores_too_close$"):
            parse_scored(row, rule, margin, 0)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"prompt": 3}, "'prompt' is 3, which is not text"),
        ({"responses": "a"}, "'responses' is 'a', which is not a list of two responses or more"),
        ({"responses": ["a"]}, "'responses' is ['a'], which is not a list of two responses or more"),
        ({"scores": None}, "'scores' is None, which is not a list of 4 scores"),
        ({"scores": [1, 2, 3]}, "'scores' is [1, 2, 3], which is not a list of 4 scores"),
        ({"responses": ["a", "b", "c", 4]}, "response 4: 'text' is 4, which is not text"),
        ({"responses": ["a", {"text": "b", "score": 1}, "c", "d"]}, "response 2: 'text' is {"),
        ({"scores": [1, "2", 3, 4]}, "response 2: 'score' is '2', which is not a finite number"),
        ({"scores": [1, True, 3, 4]}, "response 2: 'score' is True, which is not a finite number"),
        ({"scores": [1, 2, float("nan"), 4]}, "response 3: 'score' is nan, which is not a finite number"),
        ({"scores": [1, 2, float("inf"), 4]}, "response 3: 'score' is inf, which is not a finite number"),
        ({"scores": [1, 2, 10**999, 4]}, "response 3: 'score' is 1000"),
        ({"responses": [{"text": "a", "score": 1}, {"text": "b"}]}, "response 2: the field 'score' is missing"),
        ({"responses": [{"score": 1}, {"text": "b"}]}, "response 1: the field 'text' is missing"),
    ],
)
def test_malformed_scores(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(Malformed) as error:
        parse_scored({**ROW, **values}, "all", 0.0, 0)
    assert str(error.value).startswith(problem)
    with pytest.raises(Malformed, match="the field 'responses' is missing"):
        parse_scored({"prompt": "Hi?"}, "all", 0.0, 0)
    with pytest.raises(Malformed, match="the field 'scores' is missing"):
        parse_scored({"prompt": "Hi?", "responses": ["a", "b"]}, "all", 0.0, 0)


def test_an_empty_response_makes_the_row_unusable() -> None:
    with pytest.raises(Unusable, match=r"^empty_text$"):
        parse_scored({**ROW, "responses": ["a", " ", "c", "d"]}, "all", 0.0, 0)
