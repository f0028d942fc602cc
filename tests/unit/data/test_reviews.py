"""Film reviews from every source."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prefopt.data import reviews
from prefopt.data.formats.reviews import parse_review, raw_reviews
from prefopt.data.raw.limits import Limits
from prefopt.data.raw.record import Malformed
from prefopt.data.raw.splits import content_hash, split_of
from prefopt.data.synthetic import reviews as synthetic
from prefopt.data.synthetic.reviews import generate
from prefopt.errors import UserError
from prefopt.store.tables import read_manifest, read_table

DATA = Path(__file__).parents[3] / ".." / "shared" / "data"
SPLITS = {"train": 0.5, "validation": 0.2, "test": 0.3}
RECIPE: dict[str, Any] = {
    "source": "files",
    "reviews": [],
    "hub": {"name": None, "revision": None},
    "splits": SPLITS,
    "max_malformed": 0,
    "max_record_mb": 1,
    "max_total_mb": 9,
    "embedded": {"seed": 0, "train": 20, "validation": 5, "test": 6, "unlabelled": 10},
}


def run(folder: Path, **values: Any) -> pd.DataFrame:
    recipe = json.dumps({**RECIPE, **values})
    for table in reviews.TABLES:
        reviews.run(argparse.Namespace(recipe=recipe, table=table, out=folder / f"{table}.parquet"))
    return read_table(folder / "reviews.parquet", "raw_reviews")


def test_embedded_reviews_are_seeded_and_none_stands_twice(tmp_path: Path) -> None:
    rows = run(tmp_path, source="embedded")
    assert rows["split"].value_counts().to_dict() == {"train": 30, "test": 6, "validation": 5}
    assert (rows["label"] == -1).sum() == 10 and rows["text"].is_unique
    assert rows.equals(run(tmp_path / "again", source="embedded"))
    pretraining = read_table(tmp_path / "pretraining.parquet", "pretraining")
    assert set(pretraining["text"]) == set(rows.loc[rows["split"] == "train", "text"])
    training = read_table(tmp_path / "training" / "reviews.parquet", "raw_reviews")
    assert training.equals(rows[rows["split"] != "test"].reset_index(drop=True))
    account = training.attrs["manifest"]["account"]
    assert account == {"read": 41, "kept": 35, "dropped": {"test_split": 6}}


def test_training_reviews_do_not_depend_on_test_reviews(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the writer repeats itself: then it is the test review that is drawn anew."""
    monkeypatch.setattr(synthetic.review_world, "write_review", lambda rng: f"review {rng.randrange(60)}")
    whole, training = (generate({**RECIPE["embedded"], "test": count}) for count in (6, 0))
    assert whole[: len(training)] == training and len({row["text"] for row in whole}) == 41


def test_a_larger_count_changes_no_other_review() -> None:
    small, large = generate(RECIPE["embedded"]), generate({**RECIPE["embedded"], "train": 25})
    assert all(row in large for row in small)


@pytest.mark.parametrize(
    ("given", "label"), [(1, 1), (0, 0), (-1, -1), ("pos", 1), ("Negative", 0), ("1", 1), (None, -1), ("", -1)]
)
def test_labels(given: Any, label: int) -> None:
    assert parse_review({"text": "fine", "label": given}).label == label


def test_line_breaks_of_html_become_lines() -> None:
    assert parse_review({"text": " Good.<br /><br />Bad. <BR>End", "label": 1}).text == "Good.\n\nBad.\nEnd"


@pytest.mark.parametrize("row", [{"text": 3, "label": 1}, {"label": 1}, {"text": "x", "label": 7}])
def test_a_malformed_record_stops_the_stage_or_is_counted(row: dict[str, Any]) -> None:
    records = [("f.jsonl:1", row), ("f.jsonl:2", {"text": "good", "label": 1})]
    with pytest.raises(UserError, match=r"^f\.jsonl:1: .*raise data\.max_malformed, now 0\.$"):
        raw_reviews(records, SPLITS, 0)
    rows, account = raw_reviews([*records, ("f.jsonl:3", Malformed("no JSON"))], SPLITS, 2)
    assert len(rows) == 1 and account.as_dict() == {"read": 3, "kept": 1, "dropped": {"malformed": 2}}


def test_a_text_stands_in_one_split_alone_and_labelled_before_unlabelled() -> None:
    texts = [("a:1", {"text": "same", "label": -1}), ("a:2", {"text": "same", "label": 0}), ("a:3", {"text": " "})]
    rows, account = raw_reviews(texts, SPLITS, 0)
    assert [(row["text"], row["label"]) for row in rows] == [("same", 0)]
    assert account.as_dict() == {"read": 3, "kept": 1, "dropped": {"duplicate_text": 1, "empty_text": 1}}


def test_a_text_in_other_white_space_is_the_same_text() -> None:
    texts = [
        "Good.\n\nBad\u00e9.",
        "Good.<br />Bad\u00e9.",
        " Good.\r\nBade\u0301. ",
        "Good.\u200bBad\u00e9.",
        "Good. Bad.",
    ]
    rows, account = raw_reviews([(f"f:{i}", {"text": t, "label": 1}) for i, t in enumerate(texts)], SPLITS, 0)
    assert [row["text"] for row in rows] == [texts[0], texts[4]]
    names = [content_hash(text) for text in (texts[0], "Good.\nBad\u00e9.", "Good.\nBade\u0301.", texts[3])]
    assert [row["review_id"] for row in rows] == [min(names), content_hash(texts[4])]
    assert account.as_dict() == {"read": 5, "kept": 2, "dropped": {"duplicate_text": 3}}


def test_a_text_of_blanks_is_read_at_once() -> None:
    """The pattern for HTML's line breaks does not try every way to share a megabyte of blanks."""
    assert parse_review({"text": "a" + " " * 10**6 + "b<br", "label": 1}).text.endswith(" b<br")


def test_half_a_character_is_malformed() -> None:
    with pytest.raises(Malformed, match=r"^'text' holds half a character at position 4$"):
        parse_review({"text": "good\ud83d", "label": 1})


def test_unlabelled_reviews_are_to_pretrain_on_and_are_no_ones_evaluation(tmp_path: Path) -> None:
    rows = [(f"f:{i}", {"text": f"text {i}", "label": -1}) for i in range(30)]
    content, _ = raw_reviews(rows, SPLITS, 0)
    assert {row["split"] for row in content} == {"train"} and len(content) == 30
    names = [name for name in (f"text {i}" for i in range(99)) if split_of(content_hash(name), SPLITS) != "train"]
    path = tmp_path / "a.jsonl"
    labelled = [{"text": name, "label": 1} for name in names]
    path.write_text("\n".join(map(json.dumps, [*labelled, {"text": "more", "label": None}])))
    with pytest.raises(UserError, match=r"No labelled review is in the split 'train'"):
        run(tmp_path / "out", reviews=[str(path)])


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_files_of_every_kind_give_the_same_rows(tmp_path: Path, ending: str) -> None:
    frame = pd.DataFrame(
        {"text": [f'review "{i}", really\nlong' for i in range(40)], "label": [i % 2 for i in range(40)]}
    )
    path = tmp_path / f"mine.{ending}"
    write = {
        "csv": lambda: frame.to_csv(path, index=False),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "parquet": lambda: frame.to_parquet(path),
    }
    write[ending]()
    rows = run(tmp_path / "out", reviews=[str(path)])
    assert sorted(rows["text"]) == sorted(frame["text"]) and rows["label"].sum() == 20
    assert set(rows["split"]) == {"train", "validation", "test"}


def test_a_hub_is_read_at_its_revision_which_all_tables_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def hub_rows(*given: Any) -> Any:
        asked.append(given)
        return [(f"hub:{i}", {"text": f"text {i}", "label": i % 2}) for i in range(40)]

    monkeypatch.setattr(reviews, "hub_rows", hub_rows)
    hub = {"name": "somebody/reviews", "revision": "abc"}
    assert len(run(tmp_path, source="hub", hub=hub)) == 40
    assert asked == [("somebody/reviews", "reviews", "abc", ("text", "label"), Limits(1, 9))] * 3
    for table in reviews.TABLES:
        told = read_manifest(tmp_path / f"{table}.parquet")
        assert told["inputs"] == [{"kind": "reviews", **hub, "pinned": True}]
        assert told["recipe"] == {**RECIPE, "source": "hub", "hub": hub}


def test_a_csv_row_with_too_few_fields_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("text,label\nonly a text\n")
    with pytest.raises(UserError, match=r"mine\.csv:1: the row has not as many fields as the header"):
        run(tmp_path / "out", reviews=[str(path)])


def test_too_few_reviews_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("text,label\ngood,1\n")
    with pytest.raises(UserError, match=r"No labelled review is in the split '(train|validation)'"):
        run(tmp_path / "out", reviews=[str(path)])


@pytest.mark.skipif(not DATA.is_dir(), reason="the real records are not here")
def test_real_reviews(tmp_path: Path) -> None:
    frame = pd.read_parquet(DATA / "imdb_train.parquet").head(1500)
    path = tmp_path / "some.parquet"
    frame.to_parquet(path)
    rows = run(tmp_path / "out", reviews=[str(path)])
    account = read_manifest(tmp_path / "out" / "reviews.parquet")["account"]
    assert account["read"] == 1500 == account["kept"] + sum(account["dropped"].values())
    assert account["kept"] == frame["text"].nunique() == len(rows)
    assert not rows["text"].str.contains("<br", regex=False).any()
