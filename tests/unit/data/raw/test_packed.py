"""Every kind of file in every packing, and what holds more than it seems to."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefopt.data.raw.limits import Limits
from prefopt.data.raw.record import Malformed
from prefopt.data.raw.sources import read_rows
from prefopt.errors import UserError

MIB = 2**20
ROWS = [{"text": "ä\nb", "label": "1"}, {"text": "c", "label": "2"}]


def zstd(data: bytes) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(data)
    return stream.getvalue().to_pybytes()


PACKINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def content(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind == "parquet":
        stream = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), stream)
        return stream.getvalue().to_pybytes()
    if kind == "csv":
        return "\n".join(["text,label", *(f'"{row["text"]}",{row["label"]}' for row in rows)]).encode()
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    return (f"[{', '.join(lines)}]" if kind == "json" else "\n".join(lines)).encode()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_is_read_in_every_packing(tmp_path: Path, kind: str, packing: str) -> None:
    path = tmp_path / f"a.{kind}{packing}"
    path.write_bytes(PACKINGS[packing](content(kind, ROWS)))
    assert [row for _, row in read_rows([path])] == ROWS


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_is_measured_in_every_packing(tmp_path: Path, kind: str, packing: str) -> None:
    path = tmp_path / f"a.{kind}{packing}"
    path.write_bytes(PACKINGS[packing](content(kind, [{"text": "a", "label": "1"}, {"text": "b" * MIB, "label": "2"}])))
    with pytest.raises(UserError, match=rf"a\.{kind}{packing}:\d: the record holds more than 1 MiB"):
        list(read_rows([path], limits=Limits(1, 99)))
    many = [{"text": "b" * (MIB // 2), "label": str(i)} for i in range(9)]
    path.write_bytes(PACKINGS[packing](content(kind, many)))
    assert len(list(read_rows([path], limits=Limits(1, 5)))) == 9
    with pytest.raises(UserError, match=rf"a\.{kind}{packing}: with this file the records hold more than 4 MiB"):
        next(iter(read_rows([path], limits=Limits(1, 4))))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.json.zst", "a.csv.gz", "a.parquet.zst"])
def test_a_file_that_was_cut_is_not_read_as_a_shorter_one(tmp_path: Path, name: str) -> None:
    kind, packing = name.split(".")[1:]
    whole = PACKINGS[f".{packing}"](content(kind, [{"text": f"{i}" * 99, "label": "1"} for i in range(99)]))
    (tmp_path / name).write_bytes(whole[:-5])
    with pytest.raises(UserError, match=f"{name} cannot be read to its end .*: replace the file"):
        list(read_rows([tmp_path / name]))


def test_frames_that_were_put_together_are_all_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(b'{"a": 1}\n') + zstd(b'{"a": 2}\n'))
    assert [row["a"] for _, row in read_rows([tmp_path / "a.jsonl.zst"])] == [1, 2]


def listed(path: Path, text: bytes, record_mb: int = 1) -> list[Any]:
    path.write_bytes(text)
    found = list(read_rows([path], limits=Limits(record_mb, 99)))
    return [(where.rpartition(":")[2], str(row) if isinstance(row, Malformed) else row) for where, row in found]


def test_a_record_of_a_list_stands_in_the_line_that_it_begins_in(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert listed(path, b'\xef\xbb\xbf \n[\n  {"a":\n 1},\r\n\r\n{"a": 2}\n,{"a": "]}"}]\n\n') == [
        ("3", {"a": 1}),
        ("6", {"a": 2}),
        ("7", {"a": "]}"}),
    ]
    assert listed(path, b"[]") == []
    # Some write an object a line under this ending.
    assert listed(path, b'{"a": 1}\n\n{"a": 2}\n[3]') == [
        ("1", {"a": 1}),
        ("3", {"a": 2}),
        ("4", "the line holds list, not a JSON object"),
    ]


def test_a_malformed_record_of_a_list_stands_between_the_others(tmp_path: Path) -> None:
    digits = b"7" * 4301
    text = b'[{"a": 1},\n[2], 3, null,\n{"b": {"a": 1, "a": 2}},{"a": "\xff"},{"a": ' + digits + b'},\n{"a": 4}]'
    assert listed(tmp_path / "a.json", text) == [
        ("1", {"a": 1}),
        ("2", "the list holds list, not a JSON object"),
        ("2", "the list holds int, not a JSON object"),
        ("2", "the list holds NoneType, not a JSON object"),
        ("3", "the field 'a' stands twice in one object"),
        ("3", "the record is not UTF-8 (invalid start byte)"),
        ("3", "the record holds a number of more than 4300 digits"),
        ("4", {"a": 4}),
    ]


def test_a_record_of_a_list_that_is_nested_too_deep_is_malformed(tmp_path: Path) -> None:
    deep = b'{"a": ' + b"[" * 100_000 + b'"]}\\"' + b" " * MIB + b'"' + b"]" * 100_000 + b', "b": "\\\\"}'
    for between in (deep, b"[" * 10**6 + b"]" * 10**6, b'{"a":' * 10**5 + b"1" + b"}" * 10**5):
        text = b'[{"a": 1},\n' + between + b',\n{"a": 4}]'
        assert listed(tmp_path / "a.json", text, 9) == [
            ("1", {"a": 1}),
            ("2", "the record is nested too deep"),
            ("3", {"a": 4}),
        ]
    with pytest.raises(UserError, match=r"a\.json:2: the record holds more than 1 MiB"):
        listed(tmp_path / "a.json", b'[{"a": 1},\n' + deep + b"]")
    with pytest.raises(UserError, match=r"a\.json:2: the list is not JSON \(its end stands where a bracket is"):
        listed(tmp_path / "a.json", b'[{"a": 1},\n' + b"[" * 100_000 + b'"' + b"x" * 2 * MIB, 9)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'[{"a": 1}\n {"a": 2}]', "2: the list is not JSON ('{' stands where ',' is expected)"),
        (b'[{"a": 1},\n\n', "3: the list is not JSON (Expecting value)"),
        (b'[{"a": 1}', "1: the list is not JSON ('its end' stands where ',' is expected)"),
        (b'[{"a": "b', "1: the list is not JSON (Unterminated string starting at)"),
        (b'[{"a": 1}]\n]', "2: the list is not JSON (']' stands where 'its end' is expected)"),
        (b'[\n{"a": 1,\n b: 2}, ' + b" " * 99 + b"]", "3: the list is not JSON (Expecting property name"),
        (b'[{"a": 1},\n' + b"a" * 3 * MIB, "2: the list is not JSON (Expecting value)"),
    ],
)
def test_a_list_that_is_none_says_where(tmp_path: Path, text: bytes, problem: str) -> None:
    with pytest.raises(UserError) as error:
        listed(tmp_path / "a.json", text)
    assert f"a.json:{problem}" in str(error.value) and str(error.value).endswith(": correct the file.")


@pytest.mark.parametrize("size", [10, 2**20 - 14, 2**20 - 13, 2**20 - 12, 2**20 - 11, 2**20 - 1, 2**20, 3 * 2**20])
def test_a_record_may_lie_across_what_is_read_at_once(tmp_path: Path, size: int) -> None:
    rows = [{"a": "é" * size, "n": 123}, {"a": '\\"\u2028\U0001f600' * 9, "n": 45}, {"a": "x" * size, "n": 6}]
    text = json.dumps(rows).encode()
    assert [row for _, row in listed(tmp_path / "a.json", text, 99)] == rows
    assert [row for _, row in listed(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False).encode(), 99)] == rows


def test_an_ending_alone_makes_the_kind(tmp_path: Path) -> None:
    for name in ("a.jsonl.zip", "a.gz", "jsonl", "a.jsonl.gz.gz", "a.JSONL"):
        with pytest.raises(
            UserError, match=r"is of an unknown kind: name a file that ends in \.jsonl, \.json, \.csv or"
        ):
            list(read_rows([tmp_path / name]))
