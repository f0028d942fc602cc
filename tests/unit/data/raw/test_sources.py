from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefopt.data.formats.tldr import Pair, parse_comparison, parse_post
from prefopt.data.raw.hub import hub_rows
from prefopt.data.raw.limits import Limits
from prefopt.data.raw.opened import first_line
from prefopt.data.raw.record import Malformed, text_of
from prefopt.data.raw.sources import describe_files, read_rows
from prefopt.errors import UserError

ROWS = [{"prompt": "ä", "list": [{"a": 1}, {"a": None}]}, {"prompt": "b", "list": []}, {"prompt": "c", "list": None}]

# The features of openai/summarize_from_feedback, configuration "comparisons".
TEXT = pa.string()
INFO = pa.struct([(name, TEXT) for name in ("id", "post", "title", "subreddit", "site", "article")])
COMPARISONS = pa.schema(
    [
        ("info", INFO),
        ("summaries", pa.list_(pa.struct([("text", TEXT), ("policy", TEXT), ("note", TEXT)]))),
        ("choice", pa.int32()),
        ("worker", TEXT),
        ("batch", TEXT),
        ("split", TEXT),
        ("extra", pa.struct([("confidence", pa.int32())])),
    ]
)


def comparison(number: int, **info: str | None) -> dict[str, Any]:
    post = {"id": f"t3_{number}", "post": "post", "title": "title", "subreddit": "cats", "site": None, "article": None}
    return {
        "info": {**post, **info},
        "summaries": [{"text": f" {side}", "policy": "ref", "note": None} for side in ("zero", "one")],
        "choice": 1,
        "worker": "w",
        "batch": "b",
        "split": "train",
        "extra": {"confidence": None},
    }


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((text + "\n").encode()))
    write_parquet(tmp_path / "a.parquet", ROWS)
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        path = tmp_path / name
        assert list(read_rows([path])) == [(f"{path}:{number}", row) for number, row in enumerate(ROWS, start=1)]


def test_files_are_read_one_after_another_and_blank_lines_count(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n  \n{"a": 2}\n')
    (tmp_path / "b.jsonl").write_text('{"a": 3}')
    rows = list(read_rows([tmp_path / "a.jsonl", str(tmp_path / "b.jsonl")]))
    assert [(where.rpartition("/")[2], row["a"]) for where, row in rows] == [
        ("a.jsonl:1", 1),
        ("a.jsonl:4", 2),
        ("b.jsonl:1", 3),
    ]


def test_a_malformed_line_stands_between_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}\n')
    rows = list(read_rows([path]))
    assert [rows[0][1], rows[4][1]] == [{"a": 1}, {"a": 2}]
    problems = {where: str(row) for where, row in rows if isinstance(row, Malformed)}
    assert problems == {
        f"{path}:2": "the line is not JSON (Expecting value at character 8)",
        f"{path}:3": "the line holds list, not a JSON object",
        f"{path}:4": "the line is not UTF-8 (invalid start byte)",
    }


def read(path: Path, fields: Sequence[str] | None = None) -> list[Any]:
    """The records of one file; in place of a malformed one what is said of it. Places are checked here."""
    found = list(read_rows([path], fields))
    assert [where for where, _ in found] == [f"{path}:{number}" for number in range(1, len(found) + 1)]
    return [str(row) if isinstance(row, Malformed) else row for _, row in found]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("9" * 4301, "the line holds a number of more than 4300 digits"),
        ("-" + "1" * 5000, "the line holds a number of more than 4300 digits"),
        ("[" * 100_000 + "]" * 100_000, "the line is nested too deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "the line is nested too deep"),
        ('1, "n": 2', "the field 'n' stands twice in one object"),
        ('{"b": 1, "c": 2, "b": 1}', "the field 'b' stands twice in one object"),
        ("nan", "the line is not JSON (Expecting value at character 18)"),
    ],
    ids=["digits", "negative", "lists", "objects", "twice", "twice within", "no value"],
)
def test_what_a_field_that_nobody_reads_may_not_hold(tmp_path: Path, value: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1}\n{"text": 2, "n": ' + value + '}\n{"text": 3}\n')
    assert read(path, ["text"]) == [{"text": 1}, problem, {"text": 3}]


def test_numbers_of_every_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": NaN, "b": -Infinity, "c": 1e999, "d": {"7" * 4300}}}')
    (row,) = read(path)
    assert row["a"] != row["a"] and (row["b"], row["c"]) == (-float("inf"), float("inf"))
    assert row["d"] == int("7" * 4300)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_end_as_they_like(tmp_path: Path, end: str, mark: str) -> None:
    """A line separator within a text (U+2028) is legal JSON, and ends no line."""
    lines = [mark + '{"text": "a\u2028b"}', mark + '{"text": "c\\r\\nd"}', ' \t{"text": "e"} ']
    (tmp_path / "a.jsonl").write_bytes(end.join(lines).encode())
    assert read(tmp_path / "a.jsonl") == [{"text": "a\u2028b"}, {"text": "c\r\nd"}, {"text": "e"}]
    rows = ["text,label", '"a\nb",1', 'c,"2"']
    (tmp_path / "a.csv").write_bytes((mark + end.join(rows)).encode())
    assert read(tmp_path / "a.csv") == [{"text": "a\nb", "label": "1"}, {"text": "c", "label": "2"}]


@pytest.mark.parametrize("encoding", ["UTF-16-LE", "UTF-16-BE", "UTF-32-LE", "UTF-32-BE"])
@pytest.mark.parametrize("file", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_wide_text_is_refused_by_name(tmp_path: Path, encoding: str, file: str) -> None:
    encoded = '\ufeff{"a": 1}\n'.encode(encoding)
    (tmp_path / file).write_bytes(gzip.compress(encoded) if file.endswith("gz") else encoded)
    with pytest.raises(UserError, match=rf"{file} is {encoding[:6]} text: save it as UTF-8\.$"):
        read(tmp_path / file)


def test_a_row_of_csv_is_read_or_malformed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "long " * 100_000
    rows = [
        f'"{long}",1',  # more than the 131,072 characters that Python takes without being asked
        "",
        "one field",
        "a,1,and more",
        '"a"b,1',
        '"he said ""no""\r\n\r\nand went",0',
        "z\udcff,1",
        "\0,1",
        '"the end is',
        "missing,1",
    ]
    path.write_bytes("\n".join(["text,label", *rows]).encode("utf-8", "surrogateescape"))
    few = "the row has not as many fields as the header"
    assert read(path) == [
        {"text": long, "label": "1"},
        few,
        few,
        "the row is not CSV (',' expected after '\"')",
        {"text": 'he said "no"\r\n\r\nand went', "label": "0"},
        "the row is not UTF-8",
        {"text": "\0", "label": "1"},
        "the row is not CSV (unexpected end of data)",
    ]


def test_a_column_that_stands_twice_is_refused_if_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,x,x\na,1,2,3\n")
    (tmp_path / "b.csv").write_text("text,label,text\na,1,2\n")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "b.parquet")
    assert read(tmp_path / "a.csv", ["text", "label"]) == [{"text": "a", "label": "1", "x": "3"}]
    for name in ("b.csv", "b.parquet"):
        with pytest.raises(UserError, match=rf"{name} has the column 'text' twice: leave one out\.$"):
            read(tmp_path / name, ["text", "label"])
    (tmp_path / "c.csv").write_text('"text,label\na,1\n')
    with pytest.raises(UserError, match=r"c\.csv: the row is not CSV \(unexpected end of data\); correct its header"):
        read(tmp_path / "c.csv")


def test_of_parquet_only_what_is_read_is_decoded(tmp_path: Path) -> None:
    """Dates beyond Python's years stand in columns and fields that nobody reads, and make rows malformed elsewhere."""
    dates = pa.array([2**62, 0], pa.timestamp("us"))
    text = pa.array(["a", "b"])
    info = pa.StructArray.from_arrays([text, dates], names=["id", "when"])
    lists = pa.ListArray.from_arrays([0, 1, 2], pa.StructArray.from_arrays([text, dates], names=["text", "when"]))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"when": dates, "text": text, "info": info, "summaries": lists}), path)
    assert read(path, ["text", "info.id", "summaries.text", "choice"]) == [
        {"text": x, "info": {"id": x}, "summaries": [{"text": x}]} for x in ("a", "b")
    ]
    # Text where objects are expected is read, so that its row can be refused.
    assert read(path, ["text.id"]) == [{"text": "a"}, {"text": "b"}]
    assert read(path, ["post"]) == [{}, {}]
    first, second = read(path, ["when", "text"])
    assert first == "the row cannot be read (date value out of range)"
    assert second["text"] == "b" and second["when"].year == 1970


def test_text_that_is_not_utf8_is_malformed_in_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"b"]).buffers())
    pq.write_table(pa.table({"text": broken}), path)
    first, second, third = read(path)
    assert second.startswith("the row cannot be read (") and (first, third) == ({"text": "a"}, {"text": "b"})


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "'text' is None, which is not text"),
        (["a"], "'text' is ['a'], which is not text"),
        (b"a", "'text' is b'a', which is not text"),
        (float("nan"), "'text' is nan, which is not text"),
        ("ab\ud83d", "'text' holds half a character at position 2"),
        ("\udc00", "'text' holds half a character at position 0"),
    ],
)
def test_what_is_no_text(value: Any, problem: str) -> None:
    with pytest.raises(Malformed) as error:
        text_of({"text": value}, "text")
    assert str(error.value) == problem
    with pytest.raises(Malformed, match=r"^the field 'text' is missing$"):
        text_of({"Text": value}, "text")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("a\r\n\r\nb\rc\n", "a\n\nb\nc\n"),
        ("a\u2028b\u2029c", "a\nb\nc"),
        ("wait\x85 \0\v\f\xa0\u200b e\u0301 \U0001f600", "wait\x85 \0\v\f\xa0\u200b e\u0301 \U0001f600"),
        ("", ""),
    ],
)
def test_a_text_stays_as_it_is_but_for_the_ends_of_its_lines(given: str, text: str) -> None:
    assert text_of({"a": given}, "a") == text


def test_an_error_without_words_is_called_by_its_name() -> None:
    assert first_line(MemoryError()) == "MemoryError"
    assert first_line(ValueError("half\na line")) == "half"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl does not exist"):
        list(read_rows([tmp_path / "a.jsonl"]))
    with pytest.raises(UserError, match=r"a\.txt is of an unknown kind: name a file that ends in \.jsonl"):
        list(read_rows([tmp_path / "a.txt"]))
    whole = gzip.compress(json.dumps({"a": list(range(1000))}).encode() * 9)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "plain.jsonl.gz").write_text('{"a": 1}')
    (tmp_path / "a.parquet").write_text("PAR1, or not")
    for name in ("cut.jsonl.gz", "plain.jsonl.gz", "a.parquet"):
        with pytest.raises(UserError, match=f"{name} cannot be read to its end .*: replace the file"):
            list(read_rows([tmp_path / name]))


def test_files_are_described_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    (entry,) = describe_files([tmp_path / "a.jsonl"])
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert entry == {"path": str(tmp_path / "a.jsonl"), "sha256": empty}
    with pytest.raises(UserError, match="does not exist"):
        describe_files([tmp_path / "b.jsonl"])


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("described", [True, False], ids=["configurations", "folders"])
def test_comparisons_of_a_hub(tmp_path: Path, described: bool) -> None:
    """Both layouts: configurations named in the README, and the folders of a branch converted to Parquet."""
    folder = tmp_path / "summarize_from_feedback"
    article = comparison(3, post=None, subreddit=None, article="news", site="cnn")
    write_parquet(folder / "comparisons/train/0000.parquet", [comparison(1), comparison(2, id=None)], COMPARISONS)
    write_parquet(folder / "comparisons/validation/0000.parquet", [article], COMPARISONS)
    write_parquet(folder / "axis/test/0000.parquet", [{"axis": "other features"}])
    if described:
        kinds = [f"- config_name: {kind}\n  data_dir: {kind}\n" for kind in ("axis", "comparisons")]
        (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(kinds)}---\n")
    rows = list(hub_rows(str(folder), "comparisons"))
    assert [where for where, _ in rows] == [f"{folder}/train:1", f"{folder}/train:2", f"{folder}/validation:1"]
    pairs = [parse_comparison(row) for _, row in rows[:2]]
    assert all(isinstance(pair, Pair) and (pair.chosen, pair.rejected) == (" one", " zero") for pair in pairs)
    assert [pair.post.post_id for pair in pairs] == ["t3_1", None]
    assert rows[2][1] == article
    with pytest.raises(Exception, match="no_post"):
        parse_comparison(rows[2][1])


@pytest.mark.usefixtures("offline")
def test_posts_of_a_hub(tmp_path: Path) -> None:
    row = {"id": "t3_1", "subreddit": "cats", "title": "t", "post": "p", "summary": "s"}
    write_parquet(tmp_path / "tldr/data/train-00000-of-00001.parquet", [row])
    write_parquet(tmp_path / "tldr/data/test-00000-of-00001.parquet", [{**row, "id": "t3_2"}])
    rows = list(hub_rows(str(tmp_path / "tldr"), "posts"))
    assert [parse_post(row).post.post_id for _, row in rows] == ["t3_1", "t3_2"]


@pytest.mark.usefixtures("offline")
def test_of_a_hub_too_only_what_is_read_is_decoded_and_measured(tmp_path: Path) -> None:
    table = pa.table({"when": pa.array([2**62, 0], pa.timestamp("us")), "text": ["a", "b" * 2**20]})
    (tmp_path / "hub").mkdir()
    pq.write_table(table, tmp_path / "hub" / "train.parquet")
    rows = [row for _, row in hub_rows(str(tmp_path / "hub"), "reviews", None, ("text", "label"))]
    assert rows == [{"text": "a"}, {"text": "b" * 2**20}]
    (_, bad), (_, good) = hub_rows(str(tmp_path / "hub"), "reviews", None, ("review", "label"))
    assert str(bad) == "the row cannot be read (date value out of range)" and good["text"] == "b" * 2**20
    with pytest.raises(UserError, match=r"hub/train:2: the record holds more than 1 MiB"):
        list(hub_rows(str(tmp_path / "hub"), "reviews", None, ("text",), Limits(1, 9)))


@pytest.mark.usefixtures("offline")
def test_a_hub_that_gives_no_records(tmp_path: Path) -> None:
    folder = tmp_path / "summarize"
    write_parquet(folder / "a/train.parquet", [{"a": 1}])
    write_parquet(folder / "b/train.parquet", [{"b": 1}])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_dir: a\n- config_name: b\n  data_dir: b\n---\n"
    )
    with pytest.raises(UserError, match="summarize has the configurations a, b, but none named 'posts'"):
        list(hub_rows(str(folder), "posts"))
    script = tmp_path / "scripted"
    script.mkdir()
    (script / "scripted.py").write_text("raise SystemExit('a loading script was run')\n")
    with pytest.raises(UserError, match=r"scripted holds a loading script.*'files'.* refs/convert/parquet"):
        list(hub_rows(str(script), "posts"))
    with pytest.raises(UserError, match=r"nobody/nothing \(revision not pinned\) cannot be loaded \(Couldn't reach"):
        list(hub_rows("nobody/nothing", "posts"))
    with pytest.raises(UserError, match=r"nobody/nothing \(revision abc\)"):
        list(hub_rows("nobody/nothing", "posts", "abc"))
