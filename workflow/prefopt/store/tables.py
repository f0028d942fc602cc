"""The tables that pass between stages: their schemas, and the manifest that each carries.

A table is one Parquet file. Its manifest lies in the Parquet schema metadata under the key `prefopt`, so that
data and provenance are replaced in one rename and a file says by itself what it is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefopt.errors import UserError
from prefopt.store import provenance
from prefopt.store.files import atomic_path

SCHEMA_VERSION = 2  # 1 had another content hash
_IDS = pa.list_(pa.field("item", pa.int32(), nullable=False))

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
_RAW_LABELS = [
    ("example_id", pa.string()),
    ("prompt_id", pa.string()),
    ("prompt", pa.string()),
    ("completion", pa.string()),
    ("label", pa.bool_()),
    ("split", pa.string()),
    ("source", pa.string()),
]


def _schema(columns: list[tuple[str, pa.DataType]], nullable: Sequence[str] = ()) -> pa.Schema:
    """A schema in which only the columns named may lack a value."""
    return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in columns])


# The prompt's turns where it is a conversation, a JSON list of objects with role and content; "" of a plain text.
_MESSAGES = ("messages", pa.string())

SCHEMAS: dict[str, pa.Schema] = {
    "raw_demonstrations": _schema([*_RAW_DEMONSTRATIONS, ("source", pa.string()), _MESSAGES]),
    "raw_preferences": _schema([*_RAW_PREFERENCES, _MESSAGES]),
    "raw_labels": _schema([*_RAW_LABELS, _MESSAGES]),
    "raw_reviews": _schema(
        [("review_id", pa.string()), ("text", pa.string()), ("label", pa.int32()), ("split", pa.string())]
    ),
    "pretraining": _schema([("text", pa.string())]),
    "ngrams": _schema([("ngram", pa.string()), ("idf", pa.float64()), ("weight", pa.float64())]),
    "demonstrations": _schema([*_RAW_DEMONSTRATIONS, ("prompt_ids", _IDS), ("response_ids", _IDS)]),
    "preferences": _schema([*_RAW_PREFERENCES, ("prompt_ids", _IDS), ("chosen_ids", _IDS), ("rejected_ids", _IDS)]),
    # `mismatched_ids` are a completion of another prompt.
    "labels": _schema([*_RAW_LABELS, ("prompt_ids", _IDS), ("completion_ids", _IDS), ("mismatched_ids", _IDS)]),
    "prompts": _schema(
        [
            ("prompt_id", pa.string()),
            ("prompt", pa.string()),
            ("reference", pa.string()),
            ("split", pa.string()),
            ("facts", pa.string()),
            ("prompt_ids", _IDS),
        ]
    ),
    "reference_logprobs": _schema(
        [
            ("pair_id", pa.string()),
            ("chosen_logp", pa.float32()),
            ("rejected_logp", pa.float32()),
            ("chosen_tokens", pa.int32()),
            ("rejected_tokens", pa.int32()),
        ]
    ),
    "reference_label_logprobs": _schema(
        [
            ("example_id", pa.string()),
            ("completion_logp", pa.float32()),
            ("mismatched_logp", pa.float32()),
            ("completion_tokens", pa.int32()),
            ("mismatched_tokens", pa.int32()),
        ]
    ),
    "samples": _schema(
        [
            ("prompt_id", pa.string()),
            ("sample_index", pa.int32()),
            ("run", pa.string()),
            ("temperature", pa.float64()),
            ("split", pa.string()),
            ("text", pa.string()),
            ("tokens", pa.int32()),
            ("token_ids", _IDS),
            ("finish_reason", pa.string()),
            ("logp", pa.float32()),
            ("reference_logp", pa.float32()),
        ],
        nullable=["reference_logp"],  # of samples without a reference policy
    ),
    "scores": _schema(
        [
            ("prompt_id", pa.string()),
            ("temperature", pa.float64()),
            ("sample_index", pa.int32()),
            ("reward", pa.float32()),
        ]
    ),
    "evaluations": _schema(
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
            ("logp", pa.float32()),
            *((name, pa.bool_()) for name in ("ended", "repeats", "copies", "empty")),
            ("text_hash", pa.string()),
            ("learned_reward", pa.float32()),
        ],
        nullable=["conservativeness", "learned_reward"],  # of methods that have none, of runs without a reward model
    ),
    "verdicts": _schema(
        [
            ("prompt_id", pa.string()),
            ("run", pa.string()),
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
        ],
        nullable=["well_formed"],  # of texts of no grammar
    ),
    "study_items": _schema(
        [
            *((name, pa.string()) for name in ("item_id", "matchup", "prompt_id", "prompt", "facts")),
            *((name, pa.string()) for name in ("first", "second")),
            ("raters", pa.int32()),
        ]
    ),
    "votes": _schema(
        [
            *((name, pa.string()) for name in ("rater", "item_id", "matchup", "prompt_id", "prompt")),
            *((name, pa.string()) for name in ("first", "second", "order", "outcome")),
            ("place", pa.int32()),
            ("seconds", pa.float64()),
            ("simulated", pa.bool_()),
        ]
    ),
    "item_verdicts": _schema(
        [
            *((name, pa.string()) for name in ("item_id", "matchup", "prompt_id", "order", "winner", "outcome")),
            *((name, pa.string()) for name in ("reply", "judge")),
            ("cost_usd", pa.float64()),
        ]
    ),
    # Of a gold reward model, on comparisons that it was not trained on.
    "held_out_scores": _schema(
        [
            ("pair_id", pa.string()),
            ("prompt_id", pa.string()),
            ("chosen_score", pa.float64()),
            ("rejected_score", pa.float64()),
            ("chosen_tokens", pa.int32()),
            ("rejected_tokens", pa.int32()),
        ]
    ),
    "chat_replies": _schema(
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
    "raw_labels": ["example_id"],
    "raw_reviews": ["review_id"],
    "ngrams": ["ngram"],
    "demonstrations": ["prompt_id"],
    "preferences": ["pair_id"],
    "labels": ["example_id"],
    "prompts": ["prompt_id"],
    "reference_logprobs": ["pair_id"],
    "reference_label_logprobs": ["example_id"],
    "samples": ["prompt_id", "run", "temperature", "sample_index"],
    "scores": ["prompt_id", "temperature", "sample_index"],
    "evaluations": ["run", "step", "prompt_id", "sample_index"],
    "held_out_scores": ["pair_id"],
    "chat_replies": ["key"],
    "study_items": ["item_id"],
    "votes": ["rater", "item_id"],
    "item_verdicts": ["item_id", "order"],
    "verdicts": ["prompt_id", "run", "temperature", "sample_index", "order"],
}

Manifest = dict[str, Any]


class _ReadManifest(Manifest):
    """The manifest of a table that was read; asking it for what it does not say is a `UserError`."""

    def __init__(self, path: str | Path, values: Manifest) -> None:
        super().__init__(values)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._path}: its manifest lacks {key!r}: delete it and run its stage again.")


def package_versions() -> dict[str, str]:
    """Versions of the packages that can change a number."""
    names = ("prefopt", "torch", "transformers", "tokenizers", "datasets", "numpy", "pyarrow")
    return {name: importlib.metadata.version(name) for name in names}


def content_hash(table: pa.Table) -> str:
    """SHA-256 (hex) of a table's rows, types and column names, independent of chunks, file layout and metadata."""
    digest = hashlib.sha256()
    for name in table.column_names:
        column = table.column(name)
        digest.update(f"{name}\0{_kind(column.type)}\0".encode())
        # A hash of each part, since chunks come one after the other and may lie anywhere.
        parts = [hashlib.sha256() for _ in _parts(pa.array([], column.type))]
        for chunk in column.chunks:
            for part, piece in zip(parts, _parts(chunk), strict=True):
                part.update(piece)
        for part in parts:
            digest.update(part.digest())
    return digest.hexdigest()


def _kind(kind: pa.DataType) -> str:
    """A type's name, without those of its fields."""
    return f"list<{_kind(kind.value_type)}>" if pa.types.is_list(kind) else str(kind)


def _parts(values: pa.Array) -> list[memoryview]:
    """What makes up an array: which values are there, the length of each where lengths differ, and the values.

    Raises:
        TypeError: values of such a type are in no table.
    """
    there = values.is_valid().to_numpy(zero_copy_only=False).astype(np.uint8)
    if pa.types.is_list(values.type):
        lengths = values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype("<i8")
        return [there.data, lengths.data, *_parts(values.flatten())]
    if pa.types.is_string(values.type):
        texts = values.fill_null("").cast(pa.large_string())
        _, places, data = texts.buffers()
        ends = np.frombuffer(places or bytes(8), np.int64)[texts.offset : texts.offset + len(texts) + 1]
        return [there.data, np.diff(ends).astype("<i8").data, memoryview(data or b"")[ends[0] : ends[-1]]]
    if pa.types.is_boolean(values.type):
        return [there.data, values.fill_null(False).to_numpy(zero_copy_only=False).astype(np.uint8).data]
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        numbers = values.fill_null(0).to_numpy(zero_copy_only=False)
        return [there.data, np.ascontiguousarray(numbers, numbers.dtype.newbyteorder("<")).data]
    raise TypeError(f"no table holds values of the type {values.type}")


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
        UserError: a column is missing, unknown or of another type, a value is missing or not finite, a key is
            repeated, or the path cannot be written.
    """
    schema = SCHEMAS[name]
    # Every row of a list is looked at: pyarrow would fill what one lacks with nulls.
    named = rows if isinstance(rows, list) else [rows.column_names if isinstance(rows, pa.Table) else rows.columns]
    for columns in named:
        if odd := sorted(set(columns) ^ set(schema.names)):
            raise UserError(f"{path}: the table {name!r} and its rows differ in the column {odd[0]!r}.")
    table = _checked(path, name, rows)
    full: Manifest = {
        "table": name,
        "schema_version": SCHEMA_VERSION,
        "rows": table.num_rows,
        "content_hash": content_hash(table),
        "versions": package_versions(),
        **provenance.stamp(),
        **manifest,
    }
    metadata = {provenance.TABLE_KEY: json.dumps(full, sort_keys=True).encode()}
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
        UserError: the file is missing, truncated, another table, lacks a column, is one of several shards, a
            manifest entry differs, or the rows are not those that were written.
    """
    rows, manifest = read_rows(path, name, **expected)
    frame = rows.to_pandas()
    frame.attrs["manifest"] = manifest
    return frame


def split_of(table: pd.DataFrame, split: str, path: str | Path) -> pd.DataFrame:
    """The rows of a split.

    Raises:
        UserError: there are none.
    """
    rows = table[table["split"] == split]
    if rows.empty:
        raise UserError(f"{path} has no row in the split {split!r}: give more records or change the splits.")
    return rows


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
        # Not `pq.read_table`, which takes a folder `beta=0.1` above the file for a column.
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow.names
            if missing := [column for column in SCHEMAS[name].names if column not in found]:
                raise UserError(f"{path} lacks the column {missing[0]!r} of the table {name!r}: run its stage again.")
            if file.metadata.num_rows != manifest["rows"]:
                raise UserError(
                    f"{path} has {file.metadata.num_rows} rows, its manifest says {manifest['rows']}: run its stage "
                    f"again."
                )
            table = file.read(columns=SCHEMAS[name].names).select(SCHEMAS[name].names)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}): delete it and run its stage again.") from error
    table = _checked(path, name, table)
    if content_hash(table) != manifest["content_hash"]:
        raise UserError(
            f"{path} was changed after it was made (its rows are not those of its content hash): delete it and run "
            f"its stage again."
        )
    return table, manifest


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a table, without reading its rows.

    Raises:
        UserError: the file is missing, is not whole Parquet, or carries no manifest or a broken one. A key that the
            manifest lacks is one when it is asked for.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: run the stage that makes it.")
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        reason = _first_line(error)
        raise UserError(f"{path} is not a whole Parquet file ({reason}): delete it and run its stage again.") from error
    if provenance.TABLE_KEY not in metadata:
        raise UserError(f"{path} carries no prefopt manifest: it was not written by this workflow.")
    try:
        values = json.loads(metadata[provenance.TABLE_KEY])
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not _is_shard(values.get("shard")):
        raise UserError(f"{path}: its manifest is broken: delete it and run its stage again.")
    return _ReadManifest(path, values)


def _is_shard(value: Any) -> bool:
    """Whether this is what `Shard.manifest` writes, or nothing."""
    if value is None:
        return True
    if not isinstance(value, dict) or not {"number", "of", "rows"} <= value.keys():
        return False
    runs = value["rows"]
    if not isinstance(runs, list) or not all(isinstance(run, list) and len(run) == 2 for run in runs):
        return False
    return all(type(number) is int for number in (value["number"], value["of"], *(end for run in runs for end in run)))


def _first_line(error: Exception) -> str:
    """What pyarrow says, without the trace that may follow."""
    return str(error).partition("\n")[0]


def read_csv(path: str | Path) -> pd.DataFrame:
    """What a CSV file of this workflow holds.

    Raises:
        UserError: it is not there, is empty, or holds no text.
    """
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run the stage that makes it.") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not whole CSV ({_first_line(error)}): delete it and run its stage again."
        ) from error
    with Path(path).open("rb") as file:
        names = file.readline()
    if b"\0" in names:  # what a power cut may leave
        raise UserError(f"{path} is not whole CSV (it holds zero bytes): delete it and run its stage again.")
    return frame


def _checked(path: str | Path, name: str, rows: pd.DataFrame | pa.Table | list[dict[str, Any]]) -> pa.Table:
    """Rows as a table of exactly this schema; NaN is no value.

    Raises:
        UserError: a value is of another type, one is missing or not finite where the schema wants one, or a key is
            repeated.
    """
    schema = SCHEMAS[name]
    # Without the columns' own demand for values, so that what lacks one is named here.
    loose = pa.schema([field.with_nullable(True) for field in schema])
    try:
        if isinstance(rows, list):
            table = pa.Table.from_pylist(rows, schema=loose)
        elif isinstance(rows, pa.Table):
            table = rows.select(schema.names).cast(loose)
        else:
            table = pa.Table.from_pandas(rows[schema.names], schema=loose, preserve_index=False)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path}: a row does not fit the table {name!r} ({_first_line(error)}).") from error
    for i, field in enumerate(schema):
        column = table.column(field.name)
        if pa.types.is_list(field.type) and pc.list_flatten(column).null_count:
            raise UserError(
                f"{path}: a list in the column {field.name!r} of the table {name!r} lacks one of its values."
            )
        if pa.types.is_floating(field.type):
            column = pc.if_else(pc.is_nan(column), None, column)
            table = table.set_column(i, field.with_nullable(True), column)
            odd = pc.is_inf(column).fill_null(not field.nullable)
        elif field.nullable or column.null_count == 0:
            continue
        else:
            odd = column.is_null()
        if (place := pc.index(odd, True).as_py()) >= 0:
            value = "no value" if (found := column[place].as_py()) is None else found
            key = ", ".join(f"{key} {table.column(key)[place].as_py()!r}" for key in _KEYS.get(name, []))
            raise UserError(
                f"{path}: row {place} of the table {name!r} ({key or 'which has no key'}) has {value} in the column "
                f"{field.name!r}, where each needs a finite one."
            )
    _check_key(path, name, table)
    return table.cast(schema).replace_schema_metadata(None)


def _check_key(path: str | Path, name: str, table: pa.Table) -> None:
    if name not in _KEYS:
        return
    keys = table.select(_KEYS[name]).to_pandas()
    repeated = keys[keys.duplicated()]
    if len(repeated):
        first = dict(repeated.iloc[0])
        raise UserError(f"{path}: the table {name!r} has the key {first} more than once.")
