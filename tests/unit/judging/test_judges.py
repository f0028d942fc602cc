"""The judge that a recipe makes: of which kind, from what, and what must be given for it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prefopt.errors import UserError
from prefopt.experiment.targets import PROMPTS
from prefopt.judging import chat, endpoint, people, reward_model, serving, verdict_store
from prefopt.judging.judges import JudgeRecipe, build_judge
from prefopt.judging.oracle import OracleJudge
from prefopt.judging.templates import read_template

GIVEN = argparse.Namespace(
    gold_model=Path("gold"),
    gold_accuracy=Path("gold.parquet"),
    template=PROMPTS / "tldr_simple.txt",
    votes=Path("votes.parquet"),
)
TABLE = pd.DataFrame()
CHAT: dict[str, Any] = {
    **{"serve": None, "base_url": "http://judge", "model": "m", "api_key_env": "KEY", "prompt": "tldr_simple"},
    **{
        "temperature": 0.0,
        "seed": None,
        "max_tokens": 50,
        "max_tokens_parameter": "max_tokens",
        "structured_output": False,
    },
    **{"parse_retries": 2, "concurrency": 4, "requests_per_minute": 30.0, "timeout": 5.0, "max_retries": 3},
    **{"store": "replies.sqlite", "budget_usd": 1.0, "prices": {"m": {"input": 2.0, "output": 8.0}}},
}

LIMITS = {"timeout": 5.0, "max_retries": 3, "requests_per_minute": 30.0, "max_tokens": 50}


def recipe(kind: Any, values: dict[str, Any] | None = None) -> JudgeRecipe:
    shown: dict[str, Any] = {"order": "random", "seed": 0, "repeat": 0.25, "suffix": "TL;DR:", "token_budget": 77}
    return JudgeRecipe(kind=kind, chat=values, **shown)


@dataclasses.dataclass
class Made:
    """What something was made from."""

    values: tuple[Any, ...]
    options: dict[str, Any]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(*values: Any, **options: Any) -> Made:
        return Made(values, options)

    made: Callable[..., Made] = recorded
    for module, name in (
        *((reward_model, "load_judge"), (people, "load_votes"), (chat, "ChatJudge")),
        *((endpoint, "Endpoint"), (serving, "ServedEndpoint"), (verdict_store, "VerdictStore")),
    ):
        monkeypatch.setattr(module, name, made)


def test_a_judge_is_made_from_what_its_kind_takes() -> None:
    assert isinstance(build_judge(GIVEN, recipe("oracle"), TABLE), OracleJudge)
    gold: Any = build_judge(GIVEN, recipe("reward_model"), TABLE)
    assert gold.values[0] == Path("gold") and gold.values[1] == Path("gold.parquet")
    assert gold.values[2] is TABLE and gold.values[3] == 77
    assert build_judge(GIVEN, recipe("human"), TABLE) == Made((Path("votes.parquet"),), {})


def test_a_chat_judge_asks_its_endpoint_and_a_recorded_one_nobody() -> None:
    expected = (chat.ChatRecipe(**CHAT), read_template(GIVEN.template), "TL;DR:")
    asked = Made(("http://judge", "m", "KEY"), LIMITS)
    store = Made(("replies.sqlite",), {"create": True})
    assert build_judge(GIVEN, recipe("chat", CHAT), TABLE) == Made((*expected, store, asked, 0.25), {})
    store = Made(("replies.sqlite",), {"create": False})
    assert build_judge(GIVEN, recipe("recorded", CHAT), TABLE) == Made((*expected, store, None, 0.25), {})


def test_a_served_judge_is_known_by_engine_and_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    serve = {"model": str(tmp_path), "engine": "vllm", "program": None, "gpus": 1}
    served = serving.ServeRecipe(**serve)  # type: ignore[arg-type]
    known = chat.ChatRecipe(**{**CHAT, "serve": serve, "base_url": serving.address(served)})
    for kind, asked in (("chat", Made((served,), LIMITS)), ("recorded", None)):
        made: Any = build_judge(GIVEN, recipe(kind, {**CHAT, "serve": serve, "base_url": "served:vllm"}), TABLE)
        assert (made.values[0], made.values[4]) == (known, asked)


@pytest.mark.parametrize(
    ("kind", "lacking", "option"),
    [
        ("reward_model", "gold_model", "--gold-model"),
        ("reward_model", "gold_accuracy", "--gold-accuracy"),
        ("human", "votes", "--votes"),
        ("chat", "template", "--template"),
        ("recorded", "template", "--template"),
    ],
)
def test_what_is_lacking_is_named(kind: str, lacking: str, option: str) -> None:
    given = argparse.Namespace(**{**vars(GIVEN), lacking: None})
    with pytest.raises(UserError, match=f"^The judge {kind} needs {option}\\.$"):
        build_judge(given, recipe(kind, CHAT), TABLE)
    # No other kind needs it.
    assert isinstance(build_judge(given, recipe("oracle"), TABLE), OracleJudge)
