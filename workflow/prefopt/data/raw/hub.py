"""Records of data sets: of a hub, or of a folder that `datasets` has saved."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefopt.data.raw.columns import BATCH_ROWS, Fields, chosen, measured, python_rows
from prefopt.data.raw.limits import UNLIMITED, Limits, Meter
from prefopt.data.raw.opened import ENDINGS, first_line, readable
from prefopt.data.raw.record import Record
from prefopt.errors import UserError

_PACKED = (
    *(pa.types.is_dictionary, pa.types.is_run_end_encoded, pa.types.is_string_view, pa.types.is_binary_view),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)


def hub_rows(
    name: str,
    kind: str | None,
    revision: str | None = None,
    fields: Fields = None,
    limits: Limits = UNLIMITED,
    split: str | None = None,
    exact: bool = False,
) -> Iterator[Record]:
    """Records of a hub's data set.

    Args:
        name: the data set's name on the hub, or a local folder in a layout that `datasets` loads.
        kind: "posts" or "comparisons". Of a data set with several configurations the one of this name is taken;
            so is a folder of this name, as in the branches that a hub has converted to Parquet.
        revision: commit or branch; None is the newest, which is not pinned.
        fields: as for `read_rows`; of a hub's data set the columns that they name are read whole.
        limits: as for `read_rows`.
        split: which of its splits, also a part of one ("train[:1000]"); None is all.
        exact: `kind` names a configuration, or is None where there is one alone.

    Yields:
        Where a record stands ("name/split:row", from 1), and the record, or a `Malformed` where it cannot be read.

    Raises:
        UserError: the data set cannot be reached, holds a loading script, has no configuration or split of that name,
            or is larger than the limits allow.
    """
    import datasets

    try:
        if exact:
            loaded = datasets.load_dataset(name, kind, revision=revision, split=split)
        else:
            loaded = _load(datasets, name, str(kind), revision)
    except RuntimeError as error:
        # datasets < 4 ran a repository's Python; newer releases raise a bare RuntimeError.
        if "script" not in str(error):
            raise
        raise UserError(
            f"{name} holds a loading script, which `datasets` no longer runs: download its files and set data.source "
            f"to 'files', or name a revision that was converted to Parquet, such as refs/convert/parquet."
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{name} (revision {revision or 'not pinned'}) cannot be loaded ({first_line(error)}): check the name, "
            f"the revision and the network, or set data.source to 'files'."
        ) from error
    yield from _rows_of(name, loaded, split, fields, limits)


def saved_rows(
    path: str | Path, split: str | None = None, fields: Fields = None, limits: Limits = UNLIMITED
) -> Iterator[Record]:
    """Records of a folder that `save_to_disk` of `datasets` has made.

    Args:
        path: the folder, of one split or of several.
        split: which of several; None is all.
        fields: as for `read_rows`; the columns that they name are read whole.
        limits: as for `read_rows`.

    Yields:
        Where a record stands ("folder/split:row", or "folder:row", from 1), and the record, or a `Malformed` where it
        cannot be read.

    Raises:
        UserError: the folder is none, lacks the split, is damaged, or is larger than the limits allow.
    """
    import datasets

    with readable(path):
        try:
            _check_folder(Path(path))
            loaded = datasets.load_from_disk(str(path))
        except (FileNotFoundError, LookupError, TypeError, AttributeError, struct.error) as error:
            raise UserError(
                f"{path} is no folder that `datasets` has saved ({first_line(error)}): name one, or files that end in "
                f"{ENDINGS}."
            ) from error
        if split is not None and not isinstance(loaded, Mapping):
            raise UserError(f"{path} has no split {split!r}: it has one alone, so leave data.records.split out.")
        if split is not None and split not in loaded:
            raise UserError(f"{path} has no split {split!r}: name one of {', '.join(loaded)}.")
        yield from _rows_of(path, loaded if split is None else loaded[split], split, fields, limits)


def _rows_of(name: str | Path, loaded: Any, split: str | None, fields: Fields, limits: Limits) -> Iterator[Record]:
    meter = Meter(limits)
    splits = loaded if isinstance(loaded, Mapping) else {split: loaded}
    for each, rows in splits.items():
        where = f"{name}/{each}" if each else str(name)
        if (wanted := chosen(fields, rows.column_names)) is not None:
            named = {field.partition(".")[0] for field in wanted}
            # Where it has none of them all are read, so that its rows count as malformed.
            rows = rows.select_columns([c for c in rows.column_names if c in named] or rows.column_names)
        tables = rows.with_format("arrow").iter(batch_size=BATCH_ROWS)
        batches = (batch for table in tables for batch in table.to_batches())
        for record in python_rows(where, measured(where, batches, meter)):
            meter.add_records(where, [record])
            yield record


def _load(datasets: Any, name: str, kind: str, revision: str | None) -> Any:
    configurations = datasets.get_dataset_config_names(name, revision=revision)
    if kind in configurations:
        return datasets.load_dataset(name, kind, revision=revision)
    if len(configurations) > 1:
        raise UserError(f"{name} has the configurations {', '.join(configurations)}, but none named {kind!r}.")
    try:
        return datasets.load_dataset(name, data_dir=kind, revision=revision)
    except FileNotFoundError:
        return datasets.load_dataset(name, revision=revision)


def _check_folder(path: Path) -> None:
    """Raises UserError where loading a folder could do more than map its files: a file elsewhere, or what a few bytes of
    Arrow could say a million times and `datasets` never writes."""
    for state in path.rglob("state.json"):
        for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]:
            if Path(file["filename"]).name != file["filename"] or not file["filename"].endswith(".arrow"):
                raise UserError(
                    f"{state} names the file {file['filename']!r}, which is none of its folder: save it again."
                )
    for file in sorted(path.rglob("*.arrow")):
        with pa.memory_map(str(file)) as source:
            schema = pa.ipc.open_stream(source).schema
            source.seek(0)
            packed = any(_is_compressed(message) for message in pa.ipc.MessageReader.open_stream(source))
        if packed or not all(_is_plain(field.type) for field in schema):
            raise UserError(f"{file} holds compressed batches or packed columns, which are not read: save it again.")


def _is_plain(kind: pa.DataType) -> bool:
    """Whether each value of a column takes its own place."""
    if any(test(kind) for test in _PACKED):
        return False
    return all(_is_plain(kind.field(i).type) for i in range(kind.num_fields))


def _is_compressed(message: pa.ipc.Message) -> bool:
    """Whether the batch of an Arrow message is (Message.fbs of Arrow's format; pyarrow does not say)."""
    if message.type != "record batch":
        return False
    data = message.metadata.to_pybytes()
    header = _slot(data, _at(data, 0, "<I"), 2)
    return _slot(data, header + _at(data, header, "<I"), 3) != 0


def _slot(message: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table lies; 0 where it is left out."""
    names = table - _at(message, table, "<i")
    if 4 + 2 * number >= _at(message, names, "<H"):
        return 0
    offset = _at(message, names + 4 + 2 * number, "<H")
    return table + offset if offset else 0


def _at(message: bytes, place: int, kind: str) -> int:
    (value,) = struct.unpack_from(kind, message, place)
    return int(value)
