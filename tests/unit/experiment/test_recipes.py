from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import pytest

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_dict, from_json, to_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parent:
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Parent):
    rate: float
    loss: Literal["sigmoid", "ipo"]
    temperatures: tuple[float, ...]
    path: str | None
    splits: dict[str, float]
    exact: bool


VALUES: dict[str, Any] = {
    "seed": 1,
    "rate": 1,
    "loss": "ipo",
    "temperatures": [0, 0.5],
    "path": None,
    "splits": {"train": 1.0},
    "exact": True,
}


def test_round_trip() -> None:
    recipe = from_json(Example, json.dumps(VALUES))
    assert recipe == Example(
        seed=1, rate=1.0, loss="ipo", temperatures=(0.0, 0.5), path=None, splits={"train": 1.0}, exact=True
    )
    assert isinstance(recipe.rate, float) and all(isinstance(value, float) for value in recipe.temperatures)
    assert from_dict(Example, to_dict(recipe)) == recipe


def test_unknown_key() -> None:
    with pytest.raises(UserError, match="Example: unknown key 'sede'; it takes exact, loss, path, rate, seed"):
        from_dict(Example, {**VALUES, "sede": 1})


def test_missing_key() -> None:
    with pytest.raises(UserError, match="Example: the key 'seed' is missing"):
        from_dict(Example, {key: value for key, value in VALUES.items() if key != "seed"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1.5),
        ("seed", True),
        ("seed", "1"),
        ("rate", "fast"),
        ("rate", None),
        ("temperatures", 0.5),
        ("temperatures", ["hot"]),
        ("path", 3),
        ("splits", [1.0]),
        ("exact", 1),
    ],
)
def test_wrong_type(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"Example: {key} is .*, which is not of type "):
        from_dict(Example, {**VALUES, key: value})


def test_a_choice_names_what_is_allowed() -> None:
    with pytest.raises(UserError, match="loss is 'hinge'; allowed: sigmoid, ipo"):
        from_dict(Example, {**VALUES, "loss": "hinge"})


@pytest.mark.parametrize(
    ("text", "message"), [("{", r"not JSON \(.* at character 1\)"), ("[1]", "must be a JSON object, got list")]
)
def test_text_that_is_no_object(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_json(Example, text)
