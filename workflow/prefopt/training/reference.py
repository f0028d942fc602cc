"""The reference policy as data: its log-probability of every completion of a pair, computed once."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.lm.batching import Row
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import load_policy, tokenizer_hash, weights_hash
from prefopt.lm.precision import DTYPES, autocast
from prefopt.lm.shape import rows_flops, shape_of
from prefopt.lm.sharding import dealt_micro_batches, place
from prefopt.runtime import collectives, processes
from prefopt.runtime.progress import Progress
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.finite import require_finite
from prefopt.store.tables import read_table, write_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceRecipe:
    """How the reference log-probabilities are computed."""

    token_budget: int
    dtype: Literal["float32", "bfloat16"]


def preference_rows(pairs: pd.DataFrame) -> list[Row]:
    """A row for each pair: its prompt, followed by chosen and rejected."""
    columns = (pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"])
    return [
        Row(tuple(prompt.tolist()), (tuple(chosen.tolist()), tuple(rejected.tolist())))
        for prompt, chosen, rejected in zip(*columns, strict=True)
    ]


@torch.no_grad()
def pair_logprobs(
    model: nn.Module, rows: Sequence[Row], token_budget: int, usage: Usage, dtype: str = "float32"
) -> Tensor:
    """Log-probabilities of each row's chosen and rejected completion.

    Returns:
        float32 [n, 2] on the CPU, in the order of `rows`.
    """
    logps = torch.zeros(len(rows), 2)
    shape = shape_of(model)
    device = next(model.parameters()).device
    with Progress("reference", len(rows), "pairs") as progress:
        for batch, counts in dealt_micro_batches(rows, token_budget):
            with autocast(dtype, device):
                sums = completion_logprobs(model, [rows[i] for i in batch]).sums
            if counts:
                logps[batch] = sums.float().view(-1, 2).cpu()
            # The other processes go on at the same pace.
            progress.update(min(len(batch) * processes.count(), len(rows) - progress.done))
    usage.add(len(rows), sum(row.tokens for row in rows), flops=rows_flops(shape, rows))
    return collectives.summed_tensor(logps)


def read_reference(path: str | Path, model: str | Path, pairs: pd.DataFrame) -> pd.DataFrame:
    """Reads cached log-probabilities for exactly these pairs of this reference policy, in their order.

    Args:
        path: the `reference_logprobs` table.
        model: folder of the reference policy that the caller takes the table to be of.
        pairs: the preferences table, with its manifest in `.attrs`.

    Raises:
        UserError: the table was made from other weights, another tokenizer, other lengths or other rows, or a
            pair is not in it exactly once.
    """
    table = read_table(
        path,
        "reference_logprobs",
        model_weights=weights_hash(model),
        model_tokenizer=tokenizer_hash(model),
        lengths=pairs.attrs["manifest"].get("lengths"),
        preferences=pairs.attrs["manifest"]["content_hash"],
    )
    by_pair = table.set_index("pair_id")
    if missing := sorted(set(pairs["pair_id"]) - set(by_pair.index)):
        raise UserError(f"{path} lacks the pair {missing[0]!r}: run the stage `reference` again.")
    if len(by_pair) != len(pairs):
        raise UserError(f"{path} has {len(by_pair)} pairs, the preferences have {len(pairs)}: run it again.")
    return by_pair.loc[pairs["pair_id"]].reset_index()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `reference`."""
    parser.add_argument("--model", required=True, type=Path, help="the reference policy")
    parser.add_argument("--data", required=True, type=Path, help="preferences table")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="reference_logprobs table that is made")


def run(args: argparse.Namespace) -> None:
    """Computes the reference policy's log-probabilities of all pairs and writes the table."""
    recipe = from_json(ReferenceRecipe, args.recipe)
    hashes = {"model_weights": weights_hash(args.model), "model_tokenizer": tokenizer_hash(args.model)}
    pairs = read_table(args.data, "preferences", tokenizer_hash=hashes["model_tokenizer"])
    model = place(load_policy(args.model)[0], recipe.dtype)
    usage = Usage("reference", default_device(), DTYPES[recipe.dtype])
    rows = preference_rows(pairs)
    logps = pair_logprobs(model, rows, recipe.token_budget, usage, recipe.dtype).numpy()
    require_finite(
        *(logps, pairs["pair_id"], "A completion's log-probability"),
        f"look at these pairs of {args.data}, and at the weights of {args.model}",
    )
    table = pd.DataFrame(
        {
            "pair_id": pairs["pair_id"],
            "chosen_logp": logps[:, 0],
            "rejected_logp": logps[:, 1],
            "chosen_tokens": [len(row.completions[0]) for row in rows],
            "rejected_tokens": [len(row.completions[1]) for row in rows],
        }
    )
    used = usage.report()
    if processes.is_main():
        write_table(
            args.out,
            "reference_logprobs",
            table,
            **hashes,
            preferences=pairs.attrs["manifest"]["content_hash"],
            lengths=pairs.attrs["manifest"].get("lengths"),
            recipe=to_dict(recipe),
            used=used,
        )
