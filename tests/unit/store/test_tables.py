from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefopt.errors import UserError
from prefopt.store.tables import (
    SCHEMA_VERSION,
    SCHEMAS,
    content_hash,
    read_csv,
    read_manifest,
    read_rows,
    read_table,
    write_table,
)

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


SCORES = [{"prompt_id": f"p{i}", "temperature": 0.5, "sample_index": 0, "reward": i / 4} for i in range(3)]


def scores_with(**values: Any) -> pa.Table:
    """The rows of a scores table with other columns."""
    table = pa.Table.from_pylist(SCORES)
    for name, column in values.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (scores_with(reward=pa.array([0.0, 0.25, 0.75])), "was changed after it was made"),
        (scores_with().take([1, 0, 2]), "was changed after it was made"),
        (scores_with(prompt_id=pa.array(["p0", "p1", "P2"])), "was changed after it was made"),
        (scores_with(temperature=pa.array([0, 1, 1])), "was changed after it was made"),
        (scores_with(prompt_id=pa.array(["p0", "p1", "p1"])), r"has the key .*'p1'.* more than once"),
        (
            scores_with(reward=pa.array([0.0, None, 0.5])),
            r"row 1 of the table 'scores' \(prompt_id 'p1', temperature 0\.5, sample_index 0\) has no value in the "
            r"column 'reward'",
        ),
        (scores_with(sample_index=pa.array([0, 0, None])), "row 2 .* has no value in the column 'sample_index'"),
        (scores_with(reward=pa.array([0.0, 0.25, float("inf")])), "row 2 .* has inf in the column 'reward'"),
        (scores_with(reward=pa.array([float("nan"), 0.25, 0.5])), "row 0 .* has no value in the column 'reward'"),
        (scores_with(reward=pa.array(["a", "b", "c"])), "a row does not fit the table 'scores'"),
        (scores_with(sample_index=pa.array([0, 0, 2**40])), "a row does not fit the table 'scores'"),
        (scores_with(prompt_id=pa.array([b"\xff", b"p1", b"p2"])), "does not fit the table|was changed"),
        (scores_with(prompt_id=pa.array([["p0"], ["p1"], ["p2"]])), "a row does not fit the table 'scores'"),
    ],
)
def test_rows_that_were_changed_after_writing(tmp_path: Path, table: pa.Table, message: str) -> None:
    path = tmp_path / "scores.parquet"
    write_table(path, "scores", SCORES)
    rewrite(path, table)
    with pytest.raises(UserError, match=rf"scores\.parquet.*{message}"):
        read_table(path, "scores")


def test_the_same_rows_in_other_types_and_layout_are_the_same_table(tmp_path: Path) -> None:
    """What a copy by another tool may do to a file: the caller gets the schema's types."""
    path = tmp_path / "scores.parquet"
    write_table(path, "scores", SCORES)
    before, _ = read_rows(path, "scores")
    table = scores_with(prompt_id=pa.array(["p0", "p1", "p2"], pa.large_string()), sample_index=pa.array([0.0, 0, 0]))
    pq.write_table(table.replace_schema_metadata(pq.read_schema(path).metadata), path, row_group_size=1)
    after, _ = read_rows(path, "scores")
    assert after.schema == before.schema == SCHEMAS["scores"] and after.equals(before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{not JSON", "its manifest is broken: delete it and run its stage again"),
        (b"", "its manifest is broken"),
        (b"\xff\xfe", "its manifest is broken"),
        (b"[1, 2]", "its manifest is broken"),
        (b"[" * 100_000, "its manifest is broken"),
        (b'{"table": "prompts", "shard": 3}', "its manifest is broken"),
        (b'{"table": "prompts", "shard": {"number": 1, "of": 2, "rows": [[1]]}}', "its manifest is broken"),
        (b'{"table": "prompts"}', "its manifest lacks 'schema_version': delete it and run its stage again"),
        (b'{"table": "prompts", "schema_version": 2}', "its manifest lacks 'rows'"),
        (b'{"table": "prompts", "schema_version": 2, "rows": 3}', "its manifest lacks 'content_hash'"),
        (b"{}", "holds the table None, expected 'prompts'"),
    ],
)
def test_a_broken_manifest(path: Path, content: bytes, message: str) -> None:
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"prefopt": content}), path)
    with pytest.raises(UserError, match=rf"prompts\.parquet:? {message}"):
        read_table(path, "prompts")


def test_a_manifest_says_what_it_lacks_when_it_is_asked(path: Path) -> None:
    frame = read_table(path, "prompts")
    copied = pd.concat([frame, frame], ignore_index=True).attrs["manifest"]  # deeply, by pandas
    with pytest.raises(UserError, match=r"prompts\.parquet: its manifest lacks 'used'"):
        copied["used"]
    assert copied.get("used") is None and copied["tokenizer_hash"] == "abc"


@pytest.mark.parametrize("name", SCHEMAS)
def test_only_these_columns_may_lack_a_value(name: str) -> None:
    nullable = {
        "samples": ["reference_logp"],
        "evaluations": ["conservativeness", "learned_reward"],
        "verdicts": ["well_formed"],
    }
    assert [field.name for field in SCHEMAS[name] if field.nullable] == nullable.get(name, [])


def test_a_column_that_may_lack_a_value_holds_none_for_nan_however_it_is_given(tmp_path: Path) -> None:
    row = {
        **{"run": "r", "method": "preferred_ft", "seed": 0, "conservativeness": float("nan"), "step": 0},
        **{"prompt_id": "p", "sample_index": 0, "reward": 1.0, "kl": 0.5, "tokens": 3},
        **{"logp": -2.0, "ended": True, "repeats": False, "copies": False, "empty": False, "text_hash": "a"},
        "learned_reward": None,
    }
    hashes = {
        write_table(tmp_path / "a.parquet", "evaluations", rows)["content_hash"]
        for rows in ([row], [{**row, "conservativeness": None}], pd.DataFrame([row]))
    }
    assert len(hashes) == 1
    assert read_rows(tmp_path / "a.parquet", "evaluations")[0].column("conservativeness").null_count == 1
    with pytest.raises(UserError, match="has inf in the column 'conservativeness'"):
        write_table(tmp_path / "a.parquet", "evaluations", [{**row, "conservativeness": float("inf")}])


@pytest.mark.parametrize("as_frame", [False, True])
def test_a_list_without_one_of_its_values(tmp_path: Path, as_frame: bool) -> None:
    rows = [{**ROWS[0], "prompt_ids": [1, None, 2]}]
    with pytest.raises(UserError, match="a list in the column 'prompt_ids' of the table 'prompts' lacks one"):
        write_table(tmp_path / "a.parquet", "prompts", pd.DataFrame(rows) if as_frame else rows)


def test_the_content_hash_tells_apart_what_looks_alike() -> None:
    """Boundaries of texts and lists, nulls and empty values, types."""
    columns = [
        *(pa.array(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc", ""], ["abc", None], [None, "abc"])),
        *(
            pa.array(lists, pa.list_(pa.int32()))
            for lists in ([[1, 2], []], [[1], [2]], [[1, 2], None], [[1, None], []])
        ),
        *(pa.array([1, 0], kind) for kind in (pa.int32(), pa.int64(), pa.float32(), pa.float64())),
        *(pa.array(flags) for flags in ([True, False], [True, None])),
        pa.array([1, None], pa.int32()),
    ]
    assert len({content_hash(pa.table({"a": column})) for column in columns}) == len(columns)


@pytest.mark.parametrize("cut", [1, 2])
def test_the_content_hash_sees_neither_slices_nor_what_lies_under_a_null(cut: int) -> None:
    rows = [("a", [1, 2], 1.5, True), (None, None, None, None), ("ä", [], 0.5, False), ("", [3], -1.0, True)]
    names = ("text", "ids", "number", "flag")
    types = (pa.string(), pa.list_(pa.int32()), pa.float32(), pa.bool_())
    whole = pa.table([pa.array(c, t) for c, t in zip(zip(*rows, strict=True), types, strict=True)], names=names)
    pieces = pa.concat_tables([whole.slice(0, cut), whole.slice(cut)])
    padded = pa.concat_tables([whole, whole]).combine_chunks().slice(4)
    hidden = pa.Array.from_buffers(  # a null whose number is 7
        *(pa.float32(), 4, [pa.py_buffer(b"\x0d"), pa.py_buffer(np.array([1.5, 7, 0.5, -1], np.float32).tobytes())])
    )
    under = whole.set_column(2, "number", hidden)
    assert {content_hash(table) for table in (pieces, padded, under)} == {content_hash(whole)}
    empty = pa.table({"a": pa.chunked_array([], pa.string())})
    assert content_hash(empty) == content_hash(pa.table({"a": pa.array([], pa.string())}))


def test_the_content_hash_is_this(path: Path) -> None:
    """A change of it needs another SCHEMA_VERSION, and the hash of the shipped base's text."""
    expected = "35aadca40dce97666f7710970b595191286154d5262c1f80f56610ca7df38697"
    assert (SCHEMA_VERSION, read_manifest(path)["content_hash"]) == (2, expected)


def test_a_folder_above_that_looks_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    write_table(tmp_path / "seed=1" / "a.parquet", "scores", SCORES)
    assert read_table(tmp_path / "seed=1" / "a.parquet", "scores")["reward"].tolist() == [0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist: run the stage that makes it"),
        (b"", r"is not whole CSV \(No columns to parse from file\): delete it and run its stage again"),
        (bytes(30), r"is not whole CSV \(it holds zero bytes\): delete it"),
        (b"\xff\xfe,b\n1,2\n", r"is not whole CSV \(.*\): delete it"),
        (b'a,b\n"1,2\n', r"is not whole CSV \(.*\): delete it"),
    ],
)
def test_csv_that_is_not_whole(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.csv {said}"):
        read_csv(tmp_path / "a.csv")


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,x\n")
    assert read_csv(tmp_path / "a.csv").to_dict("records") == [{"a": 1, "b": "x"}]
