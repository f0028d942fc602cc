"""Builds the judge that a config names."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_dict
from prefopt.judging.judge import Judge, OrderRule
from prefopt.judging.oracle import OracleJudge


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """Who judges, and in which order the two texts are shown."""

    kind: Literal["oracle", "reward_model", "chat", "recorded", "human"]
    order: OrderRule
    seed: int  # of the random order
    repeat: float  # share of the pairs that a chat judge judges once more
    suffix: str  # last line of the task's prompts, which a chat judge does not see
    token_budget: int  # per micro-batch of a judge that is a model
    chat: dict[str, Any] | None  # of the kinds chat and recorded


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """What a judge of some kind is made from."""
    parser.add_argument("--gold-model", type=Path, help="the judge's model, for the kind reward_model")
    parser.add_argument("--gold-accuracy", type=Path, help="its held_out_scores table")
    parser.add_argument("--template", type=Path, help="the judge's prompt, for the kinds chat and recorded")
    parser.add_argument("--votes", type=Path, help="votes table, for the kind human")


def build_judge(args: argparse.Namespace, recipe: JudgeRecipe, prompts: pd.DataFrame) -> Judge:
    """The judge of a recipe.

    Args:
        args: values of `add_judge_arguments`.
        recipe: its kind and values.
        prompts: the prompts table.

    Raises:
        UserError: an argument of its kind is missing, or the judge cannot be made from it.
    """
    # Each branch imports what only it needs: torch, the client of the endpoint.
    match recipe.kind:
        case "oracle":
            return OracleJudge()
        case "reward_model":
            from prefopt.judging.reward_model import load_judge

            gold_model, accuracy = (_argument(args, recipe, f"gold_{name}") for name in ("model", "accuracy"))
            return load_judge(gold_model, accuracy, prompts, recipe.token_budget)
        case "human":
            from prefopt.judging.people import load_votes

            return load_votes(_argument(args, recipe, "votes"))
        case "chat" | "recorded":
            return _chat_judge(recipe, _argument(args, recipe, "template"))


def _chat_judge(recipe: JudgeRecipe, template: Path) -> Judge:
    from prefopt.judging.chat import ChatJudge, ChatRecipe
    from prefopt.judging.endpoint import Endpoint
    from prefopt.judging.templates import read_template
    from prefopt.judging.verdict_store import VerdictStore

    chat, serve = from_dict(ChatRecipe, recipe.chat or {}), None
    if chat.serve is not None:
        from prefopt.judging.serving import ServedEndpoint, ServeRecipe, address

        serve = from_dict(ServeRecipe, chat.serve)
        chat = dataclasses.replace(chat, base_url=address(serve))
    endpoint: Endpoint | None = None
    if recipe.kind == "chat":
        limits = {key: getattr(chat, key) for key in ("timeout", "max_retries", "requests_per_minute", "max_tokens")}
        own = (chat.base_url, chat.model, chat.api_key_env)
        endpoint = Endpoint(*own, **limits) if serve is None else ServedEndpoint(serve, **limits)
    store = VerdictStore(chat.store, create=recipe.kind == "chat")
    return ChatJudge(chat, read_template(template), recipe.suffix, store, endpoint, recipe.repeat)


def _argument(args: argparse.Namespace, recipe: JudgeRecipe, name: str) -> Path:
    value: Path | None = getattr(args, name)
    if value is None:
        raise UserError(f"The judge {recipe.kind} needs --{name.replace('_', '-')}.")
    return value
