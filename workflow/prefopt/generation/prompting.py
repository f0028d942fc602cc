"""What is put before a prompt, and where a completion is cut: examples for a base model, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.lm.continuations import encode_continuations
from prefopt.lm.models import beginning, decode


def with_shots(
    prompts: pd.DataFrame, table: pd.DataFrame, shots: int, tokenizer: PreTrainedTokenizerBase, room: int, seed: int
) -> tuple[pd.DataFrame, int]:
    """Prompts after examples: training prompts, each with its reference completion, the same for every prompt.

    Args:
        prompts: rows of the prompts table.
        table: the whole prompts table, whose training split the examples are drawn from.
        shots: number of examples; 0 changes nothing.
        tokenizer: encodes the reference completions.
        room: tokens that examples and prompt may take together; what is too much is cut at the start.
        seed: draws the examples.

    Returns:
        The prompts with their new `prompt_ids`, and how many of them were cut.

    Raises:
        UserError: the training split has fewer prompts than `shots`.
    """
    if shots == 0:
        return prompts, 0
    start = beginning(tokenizer)  # which every prompt has, and a text but once
    training = table[table["split"] == "train"]
    if len(training) < shots:
        raise UserError(f"{shots} examples are to come before each prompt, but the training split has {len(training)}.")
    chosen = training.iloc[np.random.default_rng(seed).choice(len(training), size=shots, replace=False)]
    references = encode_continuations(tokenizer, [f" {text}" for text in chosen["reference"]])
    examples = [
        token
        for ids, reference in zip(chosen["prompt_ids"], references, strict=True)
        for token in (*ids.tolist()[len(start) :], *reference)
    ]
    whole = [[*examples, *ids.tolist()[len(start) :]] for ids in prompts["prompt_ids"]]
    cut = sum(len(start) + len(ids) > room for ids in whole)
    kept = [np.array([*start, *ids[len(start) - room :]]) for ids in whole]
    result = prompts.copy()
    result["prompt_ids"] = pd.Series(kept, index=prompts.index, dtype=object)
    return result, cut


def cut_at_stop(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[str]) -> tuple[list[int], bool]:
    """The tokens of a completion before the first stop string, and whether there was one.

    A token that holds the end of the completion and the start of the stop string goes with the stop string. At least
    one token stays, as no completion is without tokens.
    """
    text = decode(tokenizer, ids)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    if not places:
        return list(ids), False
    kept = len(ids)
    while kept > 1 and len(decode(tokenizer, ids[:kept])) > min(places):
        kept -= 1
    return list(ids[:kept]), True
