"""The tables that pass between stages: their schemas, and the manifest that each carries.

A table is one Parquet file. Its manifest lies in the Parquet schema metadata under the key `prefopt`, so that
data and provenance are replaced in one rename and a file says by itself what it is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from prefopt.errors import UserError
from prefopt.files import atomic_path

SCHEMA_VERSION = 1
_MANIFEST_KEY = b"prefopt"
_IDS = pa.list_(pa.int32())

_RAW_DEMONSTRATIONS = [
    ("prompt_id", pa.string()),
    ("prompt", pa.string()),
    ("response", pa.string()),
    ("split", pa.string()),
    ("facts", pa.string()),
]
_RAW_PREFERENCES = [
    ("pair_id", pa.string()),
    ("prompt_id", pa.string()),
    ("prompt", pa.string()),
    ("chosen", pa.string()),
    ("rejected", pa.string()),
    ("split", pa.string()),
    ("source", pa.string()),
]

SCHEMAS: dict[str, pa.Schema] = {
    "raw_demonstrations": pa.schema(_RAW_DEMONSTRATIONS),
    "raw_preferences": pa.schema(_RAW_PREFERENCES),
    "raw_reviews": pa.schema(
        [("review_id", pa.string()), ("text", pa.string()), ("label", pa.int32()), ("split", pa.string())]
    ),
    "pretraining": pa.schema([("text", pa.string())]),
    "demonstrations": pa.schema([*_RAW_DEMONSTRATIONS, ("prompt_ids", _IDS), ("response_ids", _IDS)]),
    "preferences": pa.schema([*_RAW_PREFERENCES, ("prompt_ids", _IDS), ("chosen_ids", _IDS), ("rejected_ids", _IDS)]),
    "prompts": pa.schema(
        [
            ("prompt_id", pa.string()),
            ("prompt", pa.string()),
            ("reference", pa.string()),
            ("split", pa.string()),
            ("facts", pa.string()),
            ("prompt_ids", _IDS),
        ]
    ),
    "reference_logprobs": pa.schema(
        [
            ("pair_id", pa.string()),
            ("chosen_logp", pa.float32()),
            ("rejected_logp", pa.float32()),
            ("chosen_tokens", pa.int32()),
            ("rejected_tokens", pa.int32()),
        ]
    ),
    "samples": pa.schema(
        [
            ("prompt_id", pa.string()),
            ("sample_index", pa.int32()),
            ("method", pa.string()),
            ("temperature", pa.float64()),
            ("split", pa.string()),
            ("text", pa.string()),
            ("tokens", pa.int32()),
            ("token_ids", _IDS),
            ("finish_reason", pa.string()),
            ("logp", pa.float32()),
            ("reference_logp", pa.float32()),
        ]
    ),
    "scores": pa.schema(
        [
            ("prompt_id", pa.string()),
            ("temperature", pa.float64()),
            ("sample_index", pa.int32()),
            ("reward", pa.float32()),
        ]
    ),
    "evaluations": pa.schema(
        [
            ("run", pa.string()),
            ("method", pa.string()),
            ("seed", pa.int32()),
            ("conservativeness", pa.float64()),
            ("step", pa.int32()),
            ("prompt_id", pa.string()),
            ("sample_index", pa.int32()),
            ("reward", pa.float32()),
            ("kl", pa.float32()),
            ("tokens", pa.int32()),
        ]
    ),
    "verdicts": pa.schema(
        [
            ("prompt_id", pa.string()),
            ("method", pa.string()),
            ("temperature", pa.float64()),
            ("sample_index", pa.int32()),
            ("split", pa.string()),
            ("order", pa.string()),
            ("winner", pa.string()),
            ("outcome", pa.string()),
            ("reply", pa.string()),
            ("judge", pa.string()),
            ("cost_usd", pa.float64()),
            ("tokens", pa.int32()),
            ("reference_tokens", pa.int32()),
            ("well_formed", pa.bool_()),
        ]
    ),
    "study_items": pa.schema(
        [
            *((name, pa.string()) for name in ("item_id", "matchup", "prompt_id", "prompt", "facts")),
            *((name, pa.string()) for name in ("first", "second")),
            ("raters", pa.int32()),
        ]
    ),
    "votes": pa.schema(
        [
            *((name, pa.string()) for name in ("rater", "item_id", "matchup", "prompt_id", "prompt")),
            *((name, pa.string()) for name in ("first", "second", "order", "outcome")),
            ("place", pa.int32()),
            ("seconds", pa.float64()),
            ("simulated", pa.bool_()),
        ]
    ),
    "item_verdicts": pa.schema(
        [
            *((name, pa.string()) for name in ("item_id", "matchup", "prompt_id", "order", "winner", "outcome")),
            *((name, pa.string()) for name in ("reply", "judge")),
            ("cost_usd", pa.float64()),
        ]
    ),
    "chat_replies": pa.schema(
        [
            *((name, pa.string()) for name in ("key", "endpoint", "model", "request", "reply", "finish_reason")),
            ("served_model", pa.string()),
            ("prompt_tokens", pa.int64()),
            ("completion_tokens", pa.int64()),
            ("created", pa.string()),
        ]
    ),
}

_KEYS: dict[str, list[str]] = {
    "raw_demonstrations": ["prompt_id"],
    "raw_preferences": ["pair_id"],
    "raw_reviews": ["review_id"],
    "demonstrations": ["prompt_id"],
    "preferences": ["pair_id"],
    "prompts": ["prompt_id"],
    "reference_logprobs": ["pair_id"],
    "samples": ["prompt_id", "method", "temperature", "sample_index"],
    "scores": ["prompt_id", "temperature", "sample_index"],
    "evaluations": ["run", "step", "prompt_id", "sample_index"],
    "chat_replies": ["key"],
    "study_items": ["item_id"],
    "votes": ["rater", "item_id"],
    "item_verdicts": ["item_id", "order"],
    "verdicts": ["prompt_id", "method", "temperature", "sample_index", "order"],
}

Manifest = dict[str, Any]


def package_versions() -> dict[str, str]:
    """Versions of the packages that can change a number."""
    names = ("prefopt", "torch", "transformers", "tokenizers", "datasets", "numpy", "pyarrow")
    return {name: importlib.metadata.version(name) for name in names}


def content_hash(table: pa.Table) -> str:
    """SHA-256 (hex) of a table's rows and column names, independent of chunks, file layout and metadata."""
    digest = hashlib.sha256()
    for name in table.column_names:
        digest.update(name.encode() + b"\0")
        for value in table.column(name).to_pylist():
            digest.update(repr(value).encode() + b"\0")
    return digest.hexdigest()


def write_table(
    path: str | Path, name: str, rows: pd.DataFrame | pa.Table | list[dict[str, Any]], **manifest: Any
) -> Manifest:
    """Writes a table with its manifest, whole or not at all.

    Args:
        path: where the Parquet file appears.
        name: which of `SCHEMAS` the rows must follow.
        rows: a data frame, what `read_rows` gives, or a list of mappings, with exactly the schema's columns in any order.
        **manifest: what else the table should know of itself (recipe, hashes of inputs and models, counts).

    Returns:
        The manifest as written: `table`, `schema_version`, `rows`, `content_hash`, `versions` and `manifest`.

    Raises:
        UserError: a column is missing, unknown or of another type, a key is repeated, or the path cannot be
            written.
    """
    schema = SCHEMAS[name]
    # Every row of a list is looked at: pyarrow would fill what one lacks with nulls.
    named = rows if isinstance(rows, list) else [rows.column_names if isinstance(rows, pa.Table) else rows.columns]
    for columns in named:
        if odd := sorted(set(columns) ^ set(schema.names)):
            raise UserError(f"{path}: the table {name!r} and its rows differ in the column {odd[0]!r}.")
    try:
        if isinstance(rows, list):
            table = pa.Table.from_pylist(rows, schema=schema)
        elif isinstance(rows, pa.Table):
            table = rows.select(schema.names).cast(schema)
        else:
            table = pa.Table.from_pandas(rows[schema.names], schema=schema, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{path}: a row does not fit the table {name!r} ({error}).") from error
    _check_key(path, name, table)
    full: Manifest = {
        "table": name,
        "schema_version": SCHEMA_VERSION,
        "rows": table.num_rows,
        "content_hash": content_hash(table),
        "versions": package_versions(),
        **manifest,
    }
    metadata = {_MANIFEST_KEY: json.dumps(full, sort_keys=True).encode()}
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")
    return full


def read_table(path: str | Path, name: str, **expected: Any) -> pd.DataFrame:
    """Reads a table after checking that it is what the caller takes it for.

    Args:
        path: a Parquet file that `write_table` wrote.
        name: the table's name.
        **expected: manifest entries that must have these values.

    Returns:
        A data frame with the schema's columns, in that order; its manifest is `.attrs["manifest"]`.

    Raises:
        UserError: the file is missing, truncated, another table, lacks a column, is one of several shards, or a
            manifest entry differs.
    """
    rows, manifest = read_rows(path, name, **expected)
    frame = rows.to_pandas()
    frame.attrs["manifest"] = manifest
    return frame


def read_rows(path: str | Path, name: str, **expected: Any) -> tuple[pa.Table, Manifest]:
    """A table's rows as Arrow holds them, and its manifest, after the checks of `read_table`."""
    manifest = read_manifest(path)
    if manifest.get("table") != name:
        raise UserError(f"{path} holds the table {manifest.get('table')!r}, expected {name!r}: pass another file.")
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {manifest['schema_version']}, this code writes {SCHEMA_VERSION}: "
            f"delete it and run its stage again."
        )
    if "shard" in manifest and "shard" not in expected:
        number, count = manifest["shard"]["number"], manifest["shard"]["of"]
        raise UserError(f"{path} is the shard {number}-of-{count} of a table: gather all its shards first.")
    for key, value in expected.items():
        if manifest.get(key) != value:
            raise UserError(
                f"{path} was made with {key} = {manifest.get(key)!r}, but {value!r} is expected here: "
                f"run its stage again."
            )
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}): delete it and run its stage again.") from error
    if missing := [column for column in SCHEMAS[name].names if column not in table.column_names]:
        raise UserError(f"{path} lacks the column {missing[0]!r} of the table {name!r}: run its stage again.")
    if table.num_rows != manifest["rows"]:
        raise UserError(f"{path} has {table.num_rows} rows, its manifest says {manifest['rows']}: run its stage again.")
    return table.select(SCHEMAS[name].names).replace_schema_metadata(None), manifest


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a table, without reading its rows.

    Raises:
        UserError: the file is missing, is not whole Parquet, or carries no manifest.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: run the stage that makes it.")
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        reason = _first_line(error)
        raise UserError(f"{path} is not a whole Parquet file ({reason}): delete it and run its stage again.") from error
    if _MANIFEST_KEY not in metadata:
        raise UserError(f"{path} carries no prefopt manifest: it was not written by this workflow.")
    manifest: Manifest = json.loads(metadata[_MANIFEST_KEY])
    return manifest


def _first_line(error: Exception) -> str:
    """What pyarrow says, without the trace that may follow."""
    return str(error).partition("\n")[0]


def _check_key(path: str | Path, name: str, table: pa.Table) -> None:
    if name not in _KEYS:
        return
    keys = table.select(_KEYS[name]).to_pandas()
    repeated = keys[keys.duplicated()]
    if len(repeated):
        first = dict(repeated.iloc[0])
        raise UserError(f"{path}: the table {name!r} has the key {first} more than once.")
