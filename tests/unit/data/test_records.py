from __future__ import annotations

import gzip
import json
import logging
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prefopt.cli import main
from prefopt.data.formats.reviews import raw_reviews
from prefopt.data.raw.limits import Limits
from prefopt.data.raw.sources import read_rows
from prefopt.data.records import TABLES, RecordsRecipe, read_records
from prefopt.experiment.recipes import from_json
from prefopt.store.files import sha256_of_file
from prefopt.store.tables import read_table, write_table

SHARED = Path(__file__).parents[4] / "shared" / "data"
real_records = pytest.mark.skipif(not SHARED.is_dir(), reason="the real records (../shared/data) are not here")

EMBEDDED = {
    "seed": 0,
    "demonstrations": 30,
    "validation_prompts": 5,
    "test_prompts": 8,
    "pairs": 20,
    "validation_pairs": 5,
    "gold_pairs": 6,
    "gold_test_pairs": 4,
    "pretraining_documents": 12,
}
RECIPE: dict[str, Any] = {
    "source": "files",
    "posts": [],
    "comparisons": [],
    "demonstrations": [],
    "preferences": [],
    "articles": [],
    "records": [],
    "pairs": {"rule": "best_vs_random", "margin": 0.0},
    "ties": "drop",
    "seed": 0,
    "hub": {"posts": None, "posts_revision": None, "comparisons": None, "comparisons_revision": None},
    "splits": {"train": 0.7, "validation": 0.1, "test": 0.2},
    "gold_fraction": 0.5,
    "max_malformed": 0,
    "max_record_mb": 1,
    "max_total_mb": 30,
    "embedded": EMBEDDED,
}


def records(out: Path, task: str = "tldr", **values: Any) -> int:
    """Every raw table; the first status that is not 0."""
    recipe = json.dumps({**RECIPE, **values})
    for table in TABLES:
        made = ["--table", table, "--out", str(out / f"{table}.parquet")]
        if status := main(["records", "--task", task, "--form", task, "--recipe", recipe, *made]):
            return status
    return 0


def own_files(folder: Path, posts: int) -> dict[str, list[str]]:
    demonstrations = [{"prompt": f"post {i}", "response": f"summary {i}"} for i in range(posts)]
    preferences = [{"prompt": f"post {i}", "chosen": "good", "rejected": "bad"} for i in range(posts)]
    paths = {}
    for name, rows in {"demonstrations": demonstrations, "preferences": preferences}.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        paths[name] = [str(path)]
    return paths


def test_embedded(tmp_path: Path) -> None:
    assert records(tmp_path, source="embedded") == 0
    tables = {name: read_table(tmp_path / f"{name}.parquet", table) for name, table in TABLES.items()}
    assert Counter(tables["demonstrations"]["split"]) == {"train": 30, "validation": 5, "test": 8}
    assert Counter(tables["training/demonstrations"]["split"]) == {"train": 30, "validation": 5}
    assert Counter(tables["preferences"]["split"]) == {"train": 20, "validation": 5}
    assert Counter(tables["gold_preferences"]["split"]) == {"gold_train": 6, "gold_test": 4}
    assert len(tables["pretraining"]) == 12
    assert (
        Counter(tables["labels"]["split"]) == {"train": 40, "validation": 10} and tables["labels"]["label"].sum() == 25
    )
    elsewhere = {"training/demonstrations": {"test_split": 8}, "preferences": {"reserved_for_gold": 10}}
    elsewhere["labels"] = {"reserved_for_gold": 20}
    for name, table in tables.items():
        manifest = table.attrs["manifest"]
        assert manifest["notes"]["synthetic"] is True and "Synthetic" in manifest["notes"]["statement"]
        dropped = elsewhere.get(name, {})
        read = len(table) + sum(dropped.values())
        assert manifest["account"] == {"read": read, "kept": len(table), "dropped": dropped}
        assert manifest["recipe"]["embedded"] == EMBEDDED and manifest["inputs"] == []


def test_files_of_ones_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = own_files(tmp_path, 300)
    with caplog.at_level(logging.INFO):
        assert records(tmp_path / "raw", gold_fraction=0.25, **paths) == 0
    table = read_table(tmp_path / "raw" / "preferences.parquet", "raw_preferences")
    manifest = table.attrs["manifest"]
    assert manifest["inputs"] == [
        {"kind": kind, "path": paths[kind][0], "sha256": sha256_of_file(paths[kind][0])} for kind in sorted(paths)
    ]
    assert manifest["notes"]["warnings"] == [] and manifest["notes"]["synthetic"] is False
    gold = read_table(tmp_path / "raw" / "gold_preferences.parquet", "raw_preferences")
    assert gold["split"].str.startswith("gold_").all() and not table["split"].str.startswith("gold_").any()
    reserved = len(gold)
    assert manifest["account"] == {"read": 300, "kept": 300 - reserved, "dropped": {"reserved_for_gold": reserved}}
    assert gold.attrs["manifest"]["account"] == {"read": reserved, "kept": reserved, "dropped": {}}
    demonstrations = read_table(tmp_path / "raw" / "demonstrations.parquet", "raw_demonstrations")
    training = read_table(tmp_path / "raw" / "training" / "demonstrations.parquet", "raw_demonstrations")
    kept = demonstrations[demonstrations["split"] != "test"].reset_index(drop=True)
    assert training.equals(kept) and 0 < len(training) < len(demonstrations)
    assert demonstrations.attrs["manifest"]["account"]["dropped"] == {"reserved_for_gold": reserved}
    assert f"demonstrations: 300 read, {300 - reserved} kept; dropped: reserved_for_gold {reserved}" in caplog.messages
    assert f"preferences: 300 read, {300 - reserved} kept; dropped: reserved_for_gold {reserved}" in caplog.messages
    assert f"gold_preferences: {reserved} read, {reserved} kept; dropped: none" in caplog.messages


def test_few_test_prompts_are_a_warning_in_log_and_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert records(tmp_path / "raw", **own_files(tmp_path, 20)) == 0
    notes = read_table(tmp_path / "raw" / "demonstrations.parquet", "raw_demonstrations").attrs["manifest"]["notes"]
    (warning,) = notes["warnings"]
    assert warning.startswith("the test split has ") and "fewer than 20" in warning
    assert f"warning: {warning}" in caplog.messages


def test_a_bad_record_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "posts.jsonl.gz"
    good = {"id": "t3_1", "subreddit": "cats", "title": "t", "post": "p", "summary": "s"}
    path.write_bytes(gzip.compress(f"{json.dumps(good)}\n{{not JSON\n".encode()))
    assert records(tmp_path / "raw", posts=[str(path)]) == 2
    error = capsys.readouterr().err
    assert f"prefopt records: {path}:2: the line is not JSON" in error and "Traceback" not in error
    assert not (tmp_path / "raw").exists()
    assert records(tmp_path / "raw", posts=[str(path)], max_malformed=1) == 0
    table = read_table(tmp_path / "raw" / "demonstrations.parquet", "raw_demonstrations")
    assert table.attrs["manifest"]["account"] == {"read": 2, "kept": 1, "dropped": {"malformed": 1}}


POST = {"id": "t3_1", "subreddit": "cats", "title": "t", "post": "p"}
GOOD: dict[str, dict[str, Any]] = {
    "posts": {**POST, "summary": "s"},
    "demonstrations": {"prompt": "p", "response": "r"},
    "comparisons": {"info": POST, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1},
    "preferences": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "hh": {side: f"\n\nHuman: hi\n\nAssistant: {side}" for side in ("chosen", "rejected")},
    "articles": {"article": "a", "highlights": "h"},
    "reviews": {"text": "t", "label": 1},
}
ODD: list[Any] = [
    *(None, True, 0, 1, -1, 2, 10**4000, 1.0, float("nan"), float("inf")),
    *(
        "",
        " ",
        "x",
        "\0",
        "\ud83d",
        "a\udc00",
        "\r",
        "\u2028",
        "\ufeff",
        "\u200b",
        "\x1b[2J",
        "pos",
        "TL;DR:",
        "SUBREDDIT:",
    ),
    *("\n\nHuman:", "\n\nAssistant:", "\n\nHuman: a\n\nAssistant:", "\n\nAssistant: a\n\nHuman: b\n\nAssistant: c"),
    *([], [[]], ["a", "b"], {}, {"text": "a"}, [{"text": "a"}], [{"text": "a"}] * 3, [{"text": "a"}, {"text": ["b"]}]),
]


def changed(row: Any) -> list[Any]:
    """The row with each part of it, one at a time, left out or replaced by something odd."""
    parts = list(row.items()) if isinstance(row, dict) else list(enumerate(row)) if isinstance(row, list) else []
    rows = []
    for key, value in parts:
        for odd in [*ODD, *changed(value)]:
            copy = dict(row) if isinstance(row, dict) else list(row)
            copy[key] = odd
            rows.append(copy)
        if isinstance(row, dict):
            rows.append({name: part for name, part in row.items() if name != key})
    return rows


@pytest.mark.parametrize("kind", GOOD)
def test_whatever_a_field_holds_is_read_dropped_or_malformed(kind: str, tmp_path: Path) -> None:
    """Every row is accounted for, and what is kept can be written."""
    rows = [GOOD[kind], *changed(GOOD[kind])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = [(where, row) for where, row in read_rows([tmp_path / "a.jsonl"])]
    assert len(records) == len(rows) > 60
    if kind == "reviews":
        content, account = raw_reviews(records, RECIPE["splits"], len(rows))
        write_table(tmp_path / "a.parquet", "raw_reviews", content)
    else:
        task = {"hh": "hh", "articles": "cnndm"}.get(kind, "tldr")
        values = {**RECIPE, "source": "files", "max_malformed": len(rows), "gold_fraction": 0.0}
        values |= {"comparisons" if kind == "hh" else kind: [str(tmp_path / "a.jsonl")]}
        tables, _ = read_records(task, from_json(RecordsRecipe, json.dumps(values)))
        write_table(
            tmp_path / "d.parquet",
            "raw_demonstrations",
            [{"messages": "", "source": "", **row} for row in tables.demonstrations],
        )
        write_table(tmp_path / "p.parquet", "raw_preferences", [{"messages": "", **row} for row in tables.preferences])
        write_table(tmp_path / "t.parquet", "pretraining", [{"text": text} for text in tables.pretraining])
        name = "preferences" if kind in ("comparisons", "preferences", "hh") else "demonstrations"
        content, account = getattr(tables, name), tables.accounts[f"raw_{name}"]
    assert account.read == len(rows) == account.kept + account.dropped.total()
    assert account.kept == len(content) >= 1 and account.dropped["malformed"] >= 15


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"posts": ["nowhere.jsonl"]}, "nowhere.jsonl does not exist"),
        ({"splits": {"train": 1.0}}, "splits has the keys train"),
        ({"source": "hub"}, "hub.posts is None"),
        ({"source": "net"}, "source is 'net'; allowed: embedded, files, hub"),
        ({"gold": 1}, "unknown key 'gold'"),
    ],
)
def test_what_a_user_can_put_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], message: str
) -> None:
    assert records(tmp_path / "raw", **values) == 2
    assert message in capsys.readouterr().err


def test_a_hub_that_is_not_pinned_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(name: str, kind: str, revision: str | None, *_: Any) -> list[tuple[str, Any]]:
        assert (name, kind, revision) in {("me/posts", "posts", None), ("me/pairs", "comparisons", "abc")}
        post = {"id": "t3_1", "subreddit": "cats", "title": "t", "post": "p"}
        if kind == "posts":
            return [(f"{name}/train:1", {**post, "summary": "s"})]
        return [(f"{name}/train:1", {"info": post, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0})]

    monkeypatch.setattr("prefopt.data.records.hub_rows", rows)
    hub = {"posts": "me/posts", "posts_revision": None, "comparisons": "me/pairs", "comparisons_revision": "abc"}
    assert records(tmp_path, source="hub", hub=hub, gold_fraction=0.0) == 0
    manifest = read_table(tmp_path / "preferences.parquet", "raw_preferences").attrs["manifest"]
    assert manifest["inputs"] == [
        {"kind": "posts", "name": "me/posts", "revision": None, "pinned": False},
        {"kind": "comparisons", "name": "me/pairs", "revision": "abc", "pinned": True},
    ]
    assert manifest["notes"]["warnings"][0].startswith("me/posts is not pinned")
    assert manifest["rows"] == 1


@real_records
def test_real_records(tmp_path: Path) -> None:
    """Every kept row can be found in the published records, and no post is in two splits."""
    files = {kind: SHARED / f"tldr_{kind}.jsonl.gz" for kind in ("posts", "comparisons")}
    read = {
        kind: [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        for kind, path in files.items()
    }
    assert records(tmp_path, **{kind: [str(path)] for kind, path in files.items()}) == 0
    demonstrations = read_table(tmp_path / "demonstrations.parquet", "raw_demonstrations")
    preferences = read_table(tmp_path / "preferences.parquet", "raw_preferences")
    assert demonstrations.attrs["manifest"]["account"] == {"read": 342, "kept": 342, "dropped": {}}
    account = {"read": 1154, "kept": 557, "dropped": {"reserved_for_gold": 597}}
    assert preferences.attrs["manifest"]["account"] == account
    assert Counter(demonstrations["split"]) == {"train": 227, "validation": 39, "test": 76}
    gold = read_table(tmp_path / "gold_preferences.parquet", "raw_preferences")
    assert Counter(preferences["split"]) == {"train": 397, "validation": 45, "test": 115}
    assert Counter(gold["split"]) == {"gold_train": 433, "gold_test": 164}
    preferences = pd.concat([preferences, gold])
    # 676 different posts, one of which is there with and without its id.
    posts = preferences.drop_duplicates("prompt_id")["split"]
    assert Counter(posts) == {"train": 231, "validation": 33, "test": 58, "gold_train": 261, "gold_test": 93}

    split_of_post = defaultdict(set)
    for row in [*demonstrations.itertuples(), *preferences.itertuples()]:
        body = row.prompt.partition("\n\nTITLE: ")[2]
        split_of_post[row.prompt_id].add(row.split)
        split_of_post[body].add(row.split)
    assert all(len(splits) == 1 for splits in split_of_post.values())

    references = {post["id"]: post for post in read["posts"]}
    for row in demonstrations.itertuples():
        post = references[row.prompt_id]
        assert row.response == " " + post["summary"].strip()
        assert row.prompt.endswith(f"TITLE: {post['title'].strip()}\n\nPOST: {post['post'].strip()}\n\nTL;DR:")

    def texts(record: dict[str, Any]) -> tuple[str, str, str]:
        chosen, rejected = (record["summaries"][side]["text"] for side in (record["choice"], 1 - record["choice"]))
        return record["info"]["post"].strip(), " " + chosen.strip(), " " + rejected.strip()

    kept = [
        (row.prompt.partition("\n\nPOST: ")[2].removesuffix("\n\nTL;DR:"), row.chosen, row.rejected)
        for row in preferences.itertuples()
    ]
    assert Counter(kept) == Counter(map(texts, read["comparisons"]))

    pretraining = set(read_table(tmp_path / "pretraining.parquet", "pretraining")["text"])
    for row in demonstrations.itertuples():
        assert (row.response.strip() in pretraining) == (row.split == "train")


@real_records
def test_news_comparisons_are_not_tldr(tmp_path: Path) -> None:
    assert records(tmp_path, comparisons=[str(SHARED / "cnndm_comparisons.jsonl.gz")]) == 0
    manifest = read_table(tmp_path / "preferences.parquet", "raw_preferences").attrs["manifest"]
    assert manifest["account"] == {"read": 309, "kept": 0, "dropped": {"no_post": 309}}


def test_other_tasks_read_their_own_kinds_and_a_hubs_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def rows(*arguments: Any) -> list[tuple[str, dict[str, str]]]:
        asked.append(arguments)
        return [(f"x:{i}", {"article": f"article {i}", "highlights": "short"}) for i in range(30)]

    monkeypatch.setattr("prefopt.data.records.hub_rows", rows)
    hub = {"articles": "someone/news", "articles_revision": "abc", "articles_configuration": "3.0.0"}
    assert records(tmp_path, "cnndm", source="hub", hub=hub, gold_fraction=0.0) == 0
    assert asked == [("someone/news", "3.0.0", "abc", ("article", "highlights"), Limits(1, 30))] * len(TABLES)
    assert len(read_table(tmp_path / "demonstrations.parquet", "raw_demonstrations")) == 30
    assert len(read_table(tmp_path / "preferences.parquet", "raw_preferences")) == 0


@pytest.mark.parametrize("task", ["hh", "cnndm"])
def test_other_embedded_tasks(tmp_path: Path, task: str) -> None:
    assert records(tmp_path, task, source="embedded") == 0
    rows = read_table(tmp_path / "demonstrations.parquet", "raw_demonstrations")
    assert len(rows) == (43 if task == "hh" else 13) and rows["facts"].str.startswith("{").all()
