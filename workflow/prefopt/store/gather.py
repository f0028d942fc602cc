"""The stage `gather`: the shards of a table back into the table that the stage would have written in one piece."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefopt.errors import UserError
from prefopt.store.tables import Manifest, read_manifest, read_rows, write_table

logger = logging.getLogger(__name__)

# Of a shard only, or made anew for the table.
_OWN = ("shard", "rows", "content_hash", "used")
# What stages count of the rows that they made.
_COUNTED = ("stopped", "texts_cut_to_fit", "calls_made", "cost_usd", "repeated", "repeated_agree")
# Names that each shard may have some of.
_NAMES = ("served_models",)
_USED_SUMS = ("examples", "tokens", "generated_tokens", "flops", "seconds", "device_seconds")
BY_TEMPERATURE = "by_temperature"  # in `used`, what each temperature took
_USED_LARGEST = ("threads", "world_size", "models", "peak_memory_mib", "vllm_difference")


def gather(paths: Sequence[Path]) -> tuple[str, pa.Table, Manifest]:
    """The table that shards make together, its rows in the order of the table made in one piece.

    Args:
        paths: every shard of one table, in any order.

    Returns:
        The table's name, its rows, and what its manifest holds beyond what `write_table` adds.

    Raises:
        UserError: a file is no shard, the shards are of different work, or one is missing or there twice.
    """
    manifests = [read_manifest(path) for path in paths]
    _check_complete(paths, manifests)
    for path, manifest in zip(paths[1:], manifests[1:], strict=True):
        if difference := _first_difference(_facts(manifests[0]), _facts(manifest)):
            key, here, there = difference
            raise UserError(
                f"{path} is a shard of other work than {paths[0]}: {key} is {there!r} in it and {here!r} there; make "
                f"all shards of a table with the same values, inputs and versions."
            )
    name = manifests[0]["table"]
    table = _ordered(paths, name, manifests)
    manifest = {key: value for key, value in _facts(manifests[0]).items() if key not in ("table", "schema_version")}
    del manifest["versions"]
    for key in _COUNTED:
        if key in manifests[0]:
            manifest[key] = sum(each[key] for each in manifests)
    for key in _NAMES:
        if key in manifests[0]:
            manifest[key] = sorted({value for each in manifests for value in each[key]})
    if "used" in manifests[0]:
        manifest["used"] = total_usage([each["used"] for each in manifests])
    return name, table, manifest


def total_usage(used: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the jobs of all shards took together.

    Args:
        used: what `Usage.report` gave for each.

    Returns:
        Counts and seconds summed, as if one job had run after another; the largest memory, threads and models; of
        anything else the common value, or where shards differ (devices, say) the list of their values.
    """
    total: dict[str, Any] = {}
    parts = [each[BY_TEMPERATURE] for each in used if BY_TEMPERATURE in each]
    if parts:
        names = dict.fromkeys(name for part in parts for name in part)
        total[BY_TEMPERATURE] = {name: total_usage([part[name] for part in parts if name in part]) for name in names}
    for key in (key for key in used[0] if key != BY_TEMPERATURE):
        values = [each[key] for each in used]
        if key in _USED_SUMS:
            total[key] = round(sum(values), 2)
        elif key in _USED_LARGEST:
            total[key] = max(values)
        else:
            distinct = [value for i, value in enumerate(values) if value not in values[:i]]
            total[key] = distinct[0] if len(distinct) == 1 else distinct
    if {"tokens", "seconds", "tokens_per_second"} <= total.keys():
        total["tokens_per_second"] = round(total["tokens"] / max(total["seconds"], 0.01), 1)
    return total


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `gather`."""
    parser.add_argument("--parts", required=True, type=Path, nargs="+", help="every shard of one table")
    parser.add_argument("--out", required=True, type=Path, help="table that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the table of all shards."""
    name, table, manifest = gather(args.parts)
    write_table(args.out, name, table, **manifest)
    logger.info("%d rows of %d shards", table.num_rows, len(args.parts))


def _facts(manifest: Manifest) -> Manifest:
    """What all shards of a table have in common: its kind, recipe, hashes of inputs and models, versions."""
    apart = {*_OWN, *_COUNTED, *_NAMES}
    return {key: value for key, value in manifest.items() if key not in apart}


def _check_complete(paths: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    for path, manifest in zip(paths, manifests, strict=True):
        if "shard" not in manifest:
            raise UserError(f"{path} is a whole table and no shard of one: give the files that --shard made.")
        count, expected = manifest["shard"]["of"], manifests[0]["shard"]["of"]
        if count != expected:
            raise UserError(
                f"{path} is one of {count} shards and {paths[0]} one of {expected}: give the shards of one cut."
            )
    seen = Counter(manifest["shard"]["number"] for manifest in manifests)
    for number in range(1, expected + 1):
        if seen[number] != 1:
            found = f"there {seen[number]} times" if seen[number] else "missing"
            raise UserError(
                f"The shard {number}-of-{expected} is {found} among {paths[0]} and the others: give each shard once."
            )


def _ordered(paths: Sequence[Path], name: str, manifests: Sequence[Manifest]) -> pa.Table:
    """The rows of all shards, each at its place in the whole table."""
    pieces: list[tuple[int, int, pa.Table]] = []
    for path, manifest in zip(paths, manifests, strict=True):
        rows, _ = read_rows(path, name, shard=manifest["shard"])
        offset = 0
        for start, stop in manifest["shard"]["rows"]:
            pieces.append((start, stop, rows.slice(offset, stop - start)))
            offset += stop - start
        if offset != rows.num_rows:
            raise UserError(f"{path} has {rows.num_rows} rows and says where {offset} belong: make the shard again.")
        empty = rows.slice(0, 0)
    pieces.sort(key=lambda piece: piece[:2])
    end = 0
    for start, stop, _ in pieces:
        if start != end:
            found = "missing" if start > end else "there twice"
            raise UserError(
                f"Row {min(start, end)} of the table is {found} in {paths[0]} and the others: make all shards again."
            )
        end = stop
    return pa.concat_tables([empty, *(piece for _, _, piece in pieces)])


def _first_difference(here: Any, there: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key, dotted, in which two manifests differ, and its two values."""
    if isinstance(here, dict) and isinstance(there, dict):
        for name in sorted({*here, *there}):
            if found := _first_difference(here.get(name), there.get(name), f"{key}.{name}".lstrip(".")):
                return found
        return None
    return None if here == there else (key, here, there)
