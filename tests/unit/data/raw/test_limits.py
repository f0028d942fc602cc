"""Files that hold more than they seem to."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefopt.data.raw import columns
from prefopt.data.raw.limits import Limits, Meter, size_of
from prefopt.data.raw.sources import read_rows
from prefopt.errors import UserError

MIB = 2**20
FIELDS = ("text", "label")
RECORD = (
    r":{line}: the record holds more than {mib} MiB, the limit data\.max_record_mb: correct the record, or raise it\.$"
)
TOTAL = r": with this file the records hold more than {mib} MiB after decompression, the limit data\.max_total_mb: "


def count(path: Path, limits: Limits) -> int:
    return sum(1 for _ in read_rows([path], FIELDS, limits))


def lines(sizes: list[int]) -> bytes:
    """A JSON line of each of these numbers of bytes, its end included."""
    return b"".join(b'{"text": "' + b"a" * (size - 13) + b'"}\n' for size in sizes)


def repeated(path: Path, value: str, rows: int, **options: Any) -> None:
    """A Parquet file that holds a text once and names it in every row."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd", dictionary_pagesize_limit=2**30, **options)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_is_as_long_as_the_limit_and_no_longer(tmp_path: Path, name: str) -> None:
    pack = gzip.compress if name.endswith("gz") else bytes
    # Of the last line of each file one byte is its end, which is no part of it.
    for sizes, line in (
        ([20, 3 * MIB + 1], 0),
        ([20, 3 * MIB + 2], 2),
        ([99, MIB, MIB, 5 * MIB, 9], 4),
        ([4 * MIB], 1),
    ):
        (tmp_path / name).write_bytes(pack(lines(sizes)))
        if line:
            with pytest.raises(UserError, match=name + RECORD.format(line=line, mib=3)):
                count(tmp_path / name, Limits(3, 99))
        else:
            assert count(tmp_path / name, Limits(3, 99)) == len(sizes)


def test_lines_that_end_with_a_carriage_return_are_measured_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([MIB // 2] * 6).replace(b"\n", b"\r"))
    assert count(tmp_path / "a.jsonl", Limits(1, 99)) == 6


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_all_files_together_hold_no_more_than_the_limit(tmp_path: Path, name: str) -> None:
    """Nothing is handed on before all are measured."""
    text = "a" * (MIB - 100)
    paths = [tmp_path / str(i) / name for i in range(3)]
    for path in paths:
        path.parent.mkdir()
        if name.endswith("parquet"):
            repeated(path, text, 2)
        elif name.endswith("csv"):
            path.write_text(f"text,label\n{text},1\n{text},1\n")
        else:
            whole = json.dumps({"text": text}).encode() + b"\n"
            path.write_bytes(gzip.compress(whole * 2) if name.endswith("gz") else whole * 2)
    assert len(list(read_rows(paths, FIELDS, Limits(1, 6)))) == 6
    with pytest.raises(UserError, match="2/" + name + TOTAL.format(mib=5) + "give fewer records, or raise it"):
        next(read_rows(paths, FIELDS, Limits(1, 5)))


def test_a_row_of_csv_is_as_long_as_the_limit_wherever_its_lines_end(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for field in (
        "a" * MIB,
        '"' + "a\n" * (MIB // 2) + '"',
        '"no end' + " of it\n" * (MIB // 7),
        "a," * (MIB // 2) + "a",
    ):
        path.write_text("text,label\ngood,1\n" + field + ",1\n")
        with pytest.raises(UserError, match="a.csv" + RECORD.format(line=2, mib=1)):
            count(path, Limits(1, 99))
    path.write_text("text,label\n" + "a" * (MIB - 3) + ",1\n")
    assert count(path, Limits(1, 99)) == 1


def test_a_parquet_file_of_little_bytes_and_much_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_BATCH_BYTES", 2**22)
    path = tmp_path / "a.parquet"
    repeated(path, "a" * (20 * MIB), 1000)
    assert path.stat().st_size < 2000
    with pytest.raises(UserError, match="a.parquet" + RECORD.format(line=1, mib=16)):
        count(path, Limits(16, 2048))
    with pytest.raises(UserError, match="a.parquet" + TOTAL.format(mib=200)):
        count(path, Limits(32, 200))
    # A million empty objects in one row, and four million rows of nothing: refused by what the file says of itself.
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
    empty = pa.StructArray.from_arrays([pa.nulls(10**6, pa.string())], names=["text"])
    pq.write_table(pa.table({"text": pa.ListArray.from_arrays([0, 10**6], empty)}), path)
    with pytest.raises(UserError, match="a.parquet" + TOTAL.format(mib=200)):
        count(path, Limits(16, 200))
    repeated(path, "", 4 * 10**6)
    with pytest.raises(UserError, match="a.parquet" + TOTAL.format(mib=200)):
        count(path, Limits(16, 200))


def test_batches_get_smaller_as_columns_get_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = pq.ParquetFile.iter_batches

    def iter_batches(file: pq.ParquetFile, batch_size: int, **options: Any) -> Any:
        sizes.append(batch_size)
        return whole(file, batch_size, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    repeated(tmp_path / "a.parquet", "a" * (20 * MIB), 13)
    assert count(tmp_path / "a.parquet", Limits(32, 999)) == 13
    repeated(tmp_path / "a.parquet", "a", 13, row_group_size=9)
    assert count(tmp_path / "a.parquet", Limits(32, 999)) == 13
    assert sizes == [12, 12, *[1024] * 4]  # once to measure, once to read; the last has two row groups


@pytest.mark.parametrize(
    ("value", "size"),
    [("a" * 100, 100), ("a", 64), (1, 64), (None, 64), (["a", "b"], 192), ({"key": "a" * 80, "b": None}, 64 + 83 + 65)],
)
def test_the_size_of_a_value(value: Any, size: int) -> None:
    assert size_of(value) == size


def test_a_meter_adds_up() -> None:
    meter = Meter(Limits(1, 2))
    meter.add_lines("a", io.BytesIO(b"x\n" * (MIB // 2)))
    meter.add_records("b", [("b:1", "x" * MIB)])
    with pytest.raises(UserError, match=r"^c: with this file the records hold more than 2 MiB"):
        meter.add("c", 1)
    with pytest.raises(UserError, match=r"^d:7: the record holds more than 1 MiB"):
        Meter(Limits(1, 2)).add_records("d", [("d:7", "x" * (MIB + 1))])


@pytest.mark.parametrize("kind", ["line", "lines", "rows"])
def test_a_bomb_ends_in_a_sentence_and_not_in_all_of_the_memory(tmp_path: Path, kind: str) -> None:
    """The stage itself, with two GiB of memory and what the config allows without being asked."""
    path = tmp_path / ("bomb.parquet" if kind == "rows" else "bomb.jsonl.gz")
    if kind == "rows":
        repeated(path, "a" * (10 * MIB), 1000)
    else:
        with gzip.open(path, "wb", compresslevel=1) as file:
            if kind == "line":
                file.write(b'{"text": "')
            for _ in range(300):
                file.write(b"a" * MIB if kind == "line" else b'{"text": "a"}\n' * (MIB // 14))
    recipe = {
        **{"source": "files", "reviews": [str(path)], "hub": {"name": None, "revision": None}, "embedded": {}},
        **{"splits": {"train": 0.7, "validation": 0.1, "test": 0.2}, "max_malformed": 9},
        **{"max_record_mb": 16, "max_total_mb": 200},
    }

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))

    code = (
        "import argparse, sys; from prefopt.data import reviews; from prefopt.errors import UserError\n"
        "try: reviews.run(argparse.Namespace(recipe=sys.argv[1], out_dir='out', out='out', table='reviews'))\n"
        "except UserError as error: print(error)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, json.dumps(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"},
        preexec_fn=small,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    if kind == "line":
        assert found.stdout == (
            f"{path}:1: the record holds more than 16 MiB, the limit data.max_record_mb: correct the record, or raise it.\n"
        )
    else:
        assert found.stdout.startswith(f"{path}: with this file the records hold more than 200 MiB after decompression")


def test_what_a_file_says_of_its_size_adds_up_over_its_groups(tmp_path: Path) -> None:
    """A row is at least 64 bytes, an entry of a list 256, and encoded text what it takes."""
    path, checked = tmp_path / "a.parquet", []
    table = pa.table({"text": ["a"] * 5, "list": [[1, 2, 3]] * 5, "blob": [f"{i}" * 10_000 for i in range(5)]})
    pq.write_table(table, path, row_group_size=3, use_dictionary=False)
    meter = SimpleNamespace(check_total=lambda path, size: checked.append((path, size)))
    with pq.ParquetFile(path) as file:
        for leaf, sizes in ((0, [3 * 64, 5 * 64]), (1, [9 * 256, 15 * 256])):
            columns._check_groups(path, file, [leaf], meter)  # type: ignore[arg-type]
            assert checked == [(path, size) for size in sizes]
            checked.clear()
        columns._check_groups(path, file, [0, 2], meter)  # type: ignore[arg-type]
        assert [size // 10_000 for _, size in checked] == [3, 5]


def test_a_batch_that_is_too_large_is_made_python_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_BATCH_BYTES", 100)
    whole: list[int] = []

    def batch(nbytes: int) -> Any:
        def to_pylist() -> list[int]:
            whole.append(nbytes)
            return [0, 1]

        one_row = {"slice": lambda start, length: SimpleNamespace(to_pylist=lambda: [*range(start, start + length)])}
        return SimpleNamespace(nbytes=nbytes, num_rows=2, to_pylist=to_pylist, **one_row)

    rows = list(columns.python_rows("a", [batch(100), batch(101)]))
    assert rows == [("a:1", 0), ("a:2", 1), ("a:3", 0), ("a:4", 1)] and whole == [100]


def test_fields_may_be_chosen_of_the_columns() -> None:
    assert columns.chosen(lambda names: names[1:], ["a", "b"]) == ["b"]
    assert columns.chosen(["c"], ["a", "b"]) == ["c"] and columns.chosen(None, ["a"]) is None
