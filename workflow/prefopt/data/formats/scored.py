"""Rows of a prompt with several scored responses, to pairs by a rule."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from prefopt.data.formats.answers import prompt_of
from prefopt.data.formats.examples import Pair, completion
from prefopt.data.raw.parsing import Unusable
from prefopt.data.raw.record import Malformed, field_of, text_of
from prefopt.data.raw.splits import position


def parse_scored(row: Mapping[str, Any], rule: str, margin: float, seed: int) -> list[Pair]:
    """`prompt, responses`, which are objects with `text` and `score`, or texts with as many `scores`.

    Args:
        row: the record.
        rule: "best_vs_random", the best against a worse one that the seed draws; or "all", each against each worse one.
        margin: how far apart the scores of a pair must be at least.
        seed: of what is drawn; the other rows of a file change nothing.

    Raises:
        Malformed: a field is missing or of the wrong kind.
        Unusable: "scores_too_close" where no two scores are so far apart; or see `answers.prompt_of`.
    """
    post, answers = prompt_of(row), _answers(row)
    ranked = sorted(answers, key=lambda answer: -answer[1])

    def worse(than: tuple[str, float]) -> list[str]:
        apart = [(text, than[1] - score) for text, score in ranked if text != than[0]]
        return [text for text, distance in apart if distance > 0 and distance >= margin]

    if rule == "all":
        found = [(good[0], bad) for good in ranked for bad in worse(good)]
    else:
        best, others = ranked[0], worse(ranked[0])
        drawn = math.floor(position(f"pairs-{seed}", post.document) * len(others))
        found = [(best[0], text) for text in others[drawn : drawn + 1]]
    if not found:
        raise Unusable("scores_too_close")
    return [Pair(post, good, bad, "") for good, bad in found]


def _answers(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Each response, which starts with a space, with its score."""
    responses = field_of(row, "responses")
    if not isinstance(responses, list) or len(responses) < 2:
        raise Malformed(f"'responses' is {reprlib.repr(responses)}, which is not a list of two responses or more")
    if all(isinstance(response, Mapping) for response in responses):
        rows = responses
    else:
        scores = field_of(row, "scores")
        if not isinstance(scores, list) or len(scores) != len(responses):
            raise Malformed(f"'scores' is {reprlib.repr(scores)}, which is not a list of {len(responses)} scores")
        rows = [{"text": text, "score": score} for text, score in zip(responses, scores, strict=True)]
    found = []
    for number, response in enumerate(rows, start=1):
        try:
            found.append((completion(text_of(response, "text")), _score(response)))
        except Malformed as problem:
            raise Malformed(f"response {number}: {problem}") from problem
    return found


def _score(response: Mapping[str, Any]) -> float:
    score = field_of(response, "score")
    try:
        if not isinstance(score, bool) and isinstance(score, int | float) and math.isfinite(score):
            return float(score)
    except OverflowError:  # a whole number of hundreds of digits
        pass
    raise Malformed(f"'score' is {reprlib.repr(score)}, which is not a finite number")
