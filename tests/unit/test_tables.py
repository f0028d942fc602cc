from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefopt.errors import UserError
from prefopt.tables import SCHEMA_VERSION, SCHEMAS, content_hash, read_manifest, read_table, write_table

ROWS: list[dict[str, Any]] = [
    {"prompt_id": f"p{i}", "prompt": "ä", "reference": "r", "split": "test", "facts": "", "prompt_ids": [i, 2]}
    for i in range(3)
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.parquet"
    write_table(path, "prompts", ROWS, tokenizer_hash="abc")
    return path


def rewrite(path: Path, table: pa.Table) -> None:
    """Writes rows under the manifest that the file has."""
    pq.write_table(table.replace_schema_metadata(pq.read_schema(path).metadata), path)


def test_round_trip(path: Path) -> None:
    frame = read_table(path, "prompts", tokenizer_hash="abc")
    assert list(frame.columns) == SCHEMAS["prompts"].names
    assert [row | {"prompt_ids": row["prompt_ids"].tolist()} for row in frame.to_dict("records")] == ROWS
    assert frame["prompt_ids"][0].dtype == "int32"
    manifest = frame.attrs["manifest"]
    assert manifest == read_manifest(path)
    assert manifest["rows"] == 3 and manifest["table"] == "prompts" and manifest["schema_version"] == SCHEMA_VERSION
    assert {"torch", "transformers", "pyarrow"} <= manifest["versions"].keys()


def test_a_frame_and_a_list_give_the_same_table(path: Path, tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS)[["split", "prompt_ids", "prompt_id", "prompt", "reference", "facts"]]
    other = write_table(tmp_path / "other.parquet", "prompts", frame)
    assert other["content_hash"] == read_manifest(path)["content_hash"]
    assert read_table(tmp_path / "other.parquet", "prompts")["prompt_id"].tolist() == ["p0", "p1", "p2"]


def test_an_empty_table(tmp_path: Path) -> None:
    write_table(tmp_path / "empty.parquet", "verdicts", [])
    frame = read_table(tmp_path / "empty.parquet", "verdicts")
    assert len(frame) == 0 and list(frame.columns) == SCHEMAS["verdicts"].names


def test_the_content_hash_sees_rows_order_and_names_but_not_the_layout() -> None:
    table = pa.table({"a": [1, 2, 3], "b": ["x", "y", "z"]})
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert content_hash(table) == content_hash(chunked) == content_hash(table.replace_schema_metadata({b"k": b"v"}))
    others = [table.slice(0, 2), table.take([1, 0, 2]), table.rename_columns(["a", "c"]), table.select(["b", "a"])]
    assert len({content_hash(other) for other in [table, *others]}) == 5


def test_a_truncated_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"prompts\.parquet is not a whole Parquet file"):
        read_table(path, "prompts")


def test_rows_that_are_damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)  # the first pages; the footer with the schema stays
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"(?s)prompts\.parquet cannot be read .* run its stage again"):
        read_table(path, "prompts")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts\.parquet does not exist: run the stage"):
        read_table(tmp_path / "prompts.parquet", "prompts")


def test_a_missing_column(path: Path) -> None:
    rewrite(path, pq.read_table(path).drop_columns(["split"]))
    with pytest.raises(UserError, match=r"prompts\.parquet lacks the column 'split'"):
        read_table(path, "prompts")


def test_missing_rows(path: Path) -> None:
    rewrite(path, pq.read_table(path).slice(0, 2))
    with pytest.raises(UserError, match="has 2 rows, its manifest says 3"):
        read_table(path, "prompts")


def test_another_table(path: Path) -> None:
    with pytest.raises(UserError, match="holds the table 'prompts', expected 'samples'"):
        read_table(path, "samples")


def test_another_schema_version(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", "prompts", ROWS, schema_version=0)
    with pytest.raises(UserError, match=f"has schema version 0, this code writes {SCHEMA_VERSION}"):
        read_table(tmp_path / "a.parquet", "prompts")


def test_a_parquet_file_of_others(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="carries no prefopt manifest"):
        read_table(tmp_path / "a.parquet", "prompts")


def test_a_manifest_entry_that_differs_names_both_sides(path: Path) -> None:
    with pytest.raises(UserError, match="made with tokenizer_hash = 'abc', but 'def' is expected"):
        read_table(path, "prompts", tokenizer_hash="def")
    with pytest.raises(UserError, match="made with lengths = None, but 512 is expected"):
        read_table(path, "prompts", lengths=512)


@pytest.mark.parametrize("as_frame", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "differ in the column 'extra'"),
        ({"prompt_ids": "abc"}, "a row does not fit the table 'prompts'"),
        ({"prompt_id": "p1"}, "has the key {'prompt_id': 'p1'} more than once"),
    ],
)
def test_rows_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str, as_frame: bool) -> None:
    rows = [{**ROWS[0], **change}, *ROWS[1:]]
    with pytest.raises(UserError, match=message):
        write_table(tmp_path / "a.parquet", "prompts", pd.DataFrame(rows) if as_frame else rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lacking", [range(3), [1]])
def test_rows_that_lack_a_column(tmp_path: Path, lacking: Sequence[int]) -> None:
    rows = [
        {key: value for key, value in row.items() if key != "facts" or i not in lacking} for i, row in enumerate(ROWS)
    ]
    with pytest.raises(UserError, match="differ in the column 'facts'"):
        write_table(tmp_path / "a.parquet", "prompts", rows)


def test_a_key_of_several_columns(tmp_path: Path) -> None:
    row = {"prompt_id": "p", "temperature": 0.5, "sample_index": 0, "reward": 1.0}
    write_table(tmp_path / "a.parquet", "scores", [row, {**row, "temperature": 1.0}, {**row, "sample_index": 1}])
    with pytest.raises(UserError, match=r"'temperature': .*0\.5.* more than once"):
        write_table(tmp_path / "a.parquet", "scores", [row, {**row, "reward": 2.0}])


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(UserError, match="results cannot be created"):
        write_table(tmp_path / "results" / "a.parquet", "prompts", ROWS)
