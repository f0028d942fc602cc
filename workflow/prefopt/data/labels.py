"""Single labelled completions: pairs taken apart, and for each example a completion of another prompt.

The stage `pair_labels` makes them of pairs that are tokens already, those of a sweep.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.data.raw.splits import position
from prefopt.errors import UserError
from prefopt.store.tables import read_table, write_table

_SHARED = ("prompt_id", "prompt", "split", "source", "messages", "prompt_ids")


def taken_apart(pairs: Iterable[Mapping[Any, Any]]) -> Iterator[dict[str, Any]]:
    """Two labelled rows for each row of raw_preferences or preferences: chosen is desirable, rejected is not."""
    for pair in pairs:
        shared = {name: pair[name] for name in _SHARED if name in pair}
        for side in ("chosen", "rejected"):
            made = {"example_id": f"{pair['pair_id']}-{side}", "completion": pair[side], "label": side == "chosen"}
            ids = {"completion_ids": pair[f"{side}_ids"]} if f"{side}_ids" in pair else {}
            yield {**shared, **made, **ids}


def give_mismatched(rows: Sequence[dict[str, Any]], what: str) -> None:
    """Gives each row the completion of another prompt of its split, `mismatched_ids`.

    Raises:
        UserError: see `mismatched`.
    """
    for split in dict.fromkeys(row["split"] for row in rows):
        own = [row for row in rows if row["split"] == split]
        others = mismatched([row["prompt_id"] for row in own], f"{what}, split {split!r},")
        for row, other in zip(own, others, strict=True):
            row["mismatched_ids"] = own[other]["completion_ids"]


def mismatched(prompts: Sequence[str], what: str) -> list[int]:
    """For each example another one, of another prompt; each is taken once, so that both have the same completions.

    The prompts stand in an order of their hashes, and each example takes what stands as many places on as the most
    frequent prompt has examples.

    Args:
        prompts: names of the examples' prompts, at least one.
        what: whose they are, for a message.

    Returns:
        Indices into `prompts`.

    Raises:
        UserError: more than half of the examples are of one prompt.
    """
    ((most, shift),) = Counter(prompts).most_common(1)
    if 2 * shift > len(prompts):
        raise UserError(
            f"{shift} of {len(prompts)} examples of {what} are of the prompt {most!r}, more than half, so that not each can "
            f"have a completion of another prompt: give more prompts, or change data.splits."
        )
    order = sorted(range(len(prompts)), key=lambda i: (position("mismatched", prompts[i]), prompts[i], i))
    found = [0] * len(prompts)
    for place, i in enumerate(order):
        found[i] = order[(place + shift) % len(order)]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `pair_labels`."""
    parser.add_argument("--data", required=True, type=Path, help="preferences table")
    parser.add_argument("--out", required=True, type=Path, help="labels table that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the labels table of a preferences table."""
    pairs = read_table(args.data, "preferences")
    rows = list(taken_apart(pairs.to_dict("records")))
    give_mismatched(rows, str(args.data))
    manifest = pairs.attrs["manifest"]
    write_table(
        *(args.out, "labels", rows),
        tokenizer_hash=manifest["tokenizer_hash"],
        lengths=manifest.get("lengths"),
        preferences=manifest["content_hash"],
    )
