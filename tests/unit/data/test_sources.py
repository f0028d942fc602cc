from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefopt.data.sources import Malformed, describe_files, hub_rows, read_rows
from prefopt.data.tldr import Pair, parse_comparison, parse_post
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


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`datasets` keeps its copies in the test's folder and asks nobody."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


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
