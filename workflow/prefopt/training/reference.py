"""The reference policy as data: its log-probability of every completion that is learned from, computed once."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.lm.batching import Row
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import load_policy, tokenizer_hash, weights_hash
from prefopt.lm.precision import autocast
from prefopt.lm.shape import rows_flops, shape_of
from prefopt.lm.sharding import dealt_micro_batches, place
from prefopt.runtime import collectives, processes
from prefopt.runtime.progress import Progress
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.finite import require_finite
from prefopt.store.tables import read_manifest, read_table, write_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceRecipe:
    """How the reference log-probabilities are computed."""

    token_budget: int
    dtype: Literal["float32", "bfloat16"]


class Cached(NamedTuple):
    """What is cached of a table: two completions after the prompt of each row."""

    table: str  # that is made
    key: str  # column that names a row, in both tables
    sides: tuple[str, str]  # the completions, as columns are called by them


CACHED = {
    "preferences": Cached("reference_logprobs", "pair_id", ("chosen", "rejected")),
    "labels": Cached("reference_label_logprobs", "example_id", ("completion", "mismatched")),
}


def rows_of(table: pd.DataFrame, sides: Sequence[str]) -> list[Row]:
    """A row for each row of a table: its prompt, followed by these completions."""
    completions = (table[f"{side}_ids"] for side in sides)
    return [
        Row(tuple(prompt.tolist()), tuple(tuple(ids.tolist()) for ids in each))
        for prompt, *each in zip(table["prompt_ids"], *completions, strict=True)
    ]


def preference_rows(pairs: pd.DataFrame) -> list[Row]:
    """A row for each pair: its prompt, followed by chosen and rejected."""
    return rows_of(pairs, CACHED["preferences"].sides)


@torch.no_grad()
def pair_logprobs(
    model: nn.Module, rows: Sequence[Row], token_budget: int, usage: Usage, dtype: str = "float32"
) -> Tensor:
    """Log-probabilities of each row's two completions.

    Returns:
        float32 [n, 2] on the CPU, in the order of `rows`.
    """
    logps = torch.zeros(len(rows), 2)
    shape = shape_of(model)
    device = next(model.parameters()).device
    with Progress("reference", len(rows), "rows") as progress:
        for batch, counts in dealt_micro_batches(rows, token_budget):
            with autocast(dtype, device):
                sums = completion_logprobs(model, [rows[i] for i in batch]).sums
            if counts:
                logps[batch] = sums.float().view(-1, 2).cpu()
            # The other processes go on at the same pace.
            progress.update(min(len(batch) * processes.count(), len(rows) - progress.done))
    usage.add(len(rows), sum(row.tokens for row in rows), flops=rows_flops(shape, rows))
    return collectives.summed_tensor(logps)


def read_reference(path: str | Path, model: str | Path, data: pd.DataFrame) -> pd.DataFrame:
    """Reads cached log-probabilities for exactly these rows of this reference policy, in their order.

    Args:
        path: the `reference_logprobs` table of pairs, or the `reference_label_logprobs` of labels.
        model: folder of the reference policy that the caller takes the table to be of.
        data: the preferences or labels table, with its manifest in `.attrs`.

    Returns:
        A data frame with the index of `data`.

    Raises:
        UserError: the table was made from other weights, another tokenizer, other lengths or other rows, or a
            row is not in it exactly once.
    """
    manifest = data.attrs["manifest"]
    name = manifest["table"]
    cached = CACHED[name]
    table = read_table(
        path,
        cached.table,
        model_weights=weights_hash(model),
        model_tokenizer=tokenizer_hash(model),
        lengths=manifest.get("lengths"),
        **{name: manifest["content_hash"]},
    )
    by_key = table.set_index(cached.key)
    what = cached.key.removesuffix("_id")
    if missing := sorted(set(data[cached.key]) - set(by_key.index)):
        raise UserError(f"{path} lacks the {what} {missing[0]!r}: run the stage `reference` again.")
    if len(by_key) != len(data):
        raise UserError(f"{path} has {len(by_key)} {what}s, the {name} have {len(data)}: run it again.")
    return by_key.loc[data[cached.key]].reset_index().set_index(data.index)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `reference`."""
    parser.add_argument("--model", required=True, type=Path, help="the reference policy")
    parser.add_argument("--data", required=True, type=Path, help="preferences or labels table")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="table of log-probabilities that is made")


def run(args: argparse.Namespace) -> None:
    """Computes the reference policy's log-probabilities of all completions and writes the table."""
    recipe = from_json(ReferenceRecipe, args.recipe)
    hashes = {"model_weights": weights_hash(args.model), "model_tokenizer": tokenizer_hash(args.model)}
    name = "labels" if read_manifest(args.data).get("table") == "labels" else "preferences"
    cached = CACHED[name]
    data = read_table(args.data, name, tokenizer_hash=hashes["model_tokenizer"])
    model = place(load_policy(args.model)[0], recipe.dtype)
    usage = Usage("reference", default_device(), recipe.dtype)
    rows = rows_of(data, cached.sides)
    logps = pair_logprobs(model, rows, recipe.token_budget, usage, recipe.dtype).numpy()
    require_finite(
        *(logps, data[cached.key], "A completion's log-probability"),
        f"look at these {cached.key.removesuffix('_id')}s of {args.data}, and at the weights of {args.model}",
    )
    columns: dict[str, Any] = {cached.key: data[cached.key]}
    for i, side in enumerate(cached.sides):
        columns[f"{side}_logp"] = logps[:, i]
        columns[f"{side}_tokens"] = [len(row.completions[i]) for row in rows]
    used = usage.report()
    if processes.is_main():
        write_table(
            args.out,
            cached.table,
            pd.DataFrame(columns),
            **hashes,
            **{name: data.attrs["manifest"]["content_hash"]},
            lengths=data.attrs["manifest"].get("lengths"),
            recipe=to_dict(recipe),
            used=used,
        )
