"""Supervised fine-tuning on reference completions, and Preferred-FT on the chosen completion of each pair."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
from torch import Tensor, nn

from prefopt.experiment.recipes import from_json
from prefopt.lm.batching import Row
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import tokenizer_hash
from prefopt.store.tables import read_table, split_of
from prefopt.training import by_step, stage
from prefopt.training.fine_tuning import fine_tune
from prefopt.training.loop import Examples
from prefopt.training.recipe import TrainingRecipe

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTRecipe(TrainingRecipe):
    """`response` reads demonstrations (SFT), `chosen` reads preferences (Preferred-FT)."""

    completion: Literal["response", "chosen"]


def completion_examples(
    ids: Sequence[str], prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> Examples:
    """One completion after each prompt, with the token-mean negative log-likelihood as the loss.

    Args:
        ids: name of each example, for messages.
        prompts: token ids of each prompt.
        completions: token ids of each completion, EOS included.
    """
    rows = [Row(tuple(prompt), (tuple(completion),)) for prompt, completion in zip(prompts, completions, strict=True)]

    def losses(model: nn.Module, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        sums = completion_logprobs(model, [rows[i] for i in indices]).sums
        return -sums, {"logp": sums.detach()}

    return Examples(ids, rows, [float(len(row.completions[0])) for row in rows], losses)


def table_examples(table: pd.DataFrame, id_column: str, completion_column: str) -> Examples:
    """`completion_examples` of a table's rows."""
    return completion_examples(
        table[id_column].tolist(),
        [ids.tolist() for ids in table["prompt_ids"]],
        [ids.tolist() for ids in table[completion_column]],
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `sft`."""
    stage.add_arguments(parser)
    parser.add_argument("--model", required=True, type=Path, help="model to start from")
    parser.add_argument("--data", required=True, type=Path, help="demonstrations or preferences table")
    by_step.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Fine-tunes `--model` on `--data` and publishes the result."""
    recipe = from_json(SFTRecipe, args.recipe)
    name, id_column = ("demonstrations", "prompt_id") if recipe.completion == "response" else ("preferences", "pair_id")
    table = read_table(args.data, name, tokenizer_hash=tokenizer_hash(args.model))
    column = f"{recipe.completion}_ids"
    training = table_examples(split_of(table, "train", args.data), id_column, column)
    validation = table_examples(split_of(table, "validation", args.data), id_column, column)
    inputs = {"data": table.attrs["manifest"]["content_hash"], **stage.model_hashes("model", args.model)}
    fine_tune(args, __name__, "sft", recipe, training, validation, inputs)
