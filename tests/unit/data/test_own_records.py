"""The stage `records` on sources of the user's own, each in another kind of file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefopt.cli import main
from prefopt.data.records import TABLES
from prefopt.store.files import sha256_of_file
from prefopt.store.tables import read_table

RECIPE: dict[str, Any] = {
    "source": "records",
    **{kind: [] for kind in ("posts", "comparisons", "demonstrations", "preferences", "articles")},
    "hub": {},
    "pairs": {"rule": "best_vs_random", "margin": 0.0},
    "ties": "drop",
    "seed": 0,
    "splits": {"train": 0.7, "validation": 0.1, "test": 0.2},
    "gold_fraction": 0.0,
    "max_malformed": 0,
    "max_record_mb": 1,
    "max_total_mb": 30,
    "embedded": {},
}
NOTHING = dict.fromkeys(("path", "hub", "format", "configuration", "split", "revision", "as", "weight", "count"))


def records(out: Path, *sources: dict[str, Any], **values: Any) -> int:
    """Every raw table; the first status that is not 0."""
    recipe = json.dumps({**RECIPE, "records": [{**NOTHING, **one} for one in sources], **values})
    for table in TABLES:
        made = ["--table", table, "--out", str(out / f"{table}.parquet")]
        if status := main(["records", "--task", "hh", "--form", "hh", "--recipe", recipe, *made]):
            return status
    return 0


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.mark.usefixtures("offline")
def test_every_kind_of_source_in_one_mixture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps({"prompt": f"a{i}", "chosen": "x", "rejected": "y"}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    listed = json.dumps(turns("b0", "x")).replace('"', '""')
    (tmp_path / "b.csv").write_text(f'messages\n"{listed}"\n')
    scored = {"prompt": turns("c0", "")[:1], "responses": [{"text": "x", "score": 1.0}, {"text": "y", "score": 2.0}]}
    pq.write_table(pa.Table.from_pylist([{**scored, "when": None}]), tmp_path / "c.parquet")
    chats = datasets.Dataset.from_list([{"chosen": turns("d0", "x"), "rejected": turns("d0", "y"), "n": 1}])
    datasets.DatasetDict(train=chats, test=chats).save_to_disk(tmp_path / "d")
    (tmp_path / "hub" / "e").mkdir(parents=True)
    pq.write_table(
        pa.table({"prompt": ["e0", "e1"], "completion": ["x", "y"], "label": [True, False]}),
        tmp_path / "hub/e/train.parquet",
    )
    sources = [
        {"path": str(tmp_path / "a.jsonl"), "count": 20},
        {"path": str(tmp_path / "b.csv")},
        {"path": str(tmp_path / "c.parquet")},
        {"path": str(tmp_path / "d"), "split": "test", "as": "test"},
        {"hub": str(tmp_path / "hub"), "split": "train"},
    ]
    assert records(tmp_path / "raw", *sources) == 0
    tables = {name: read_table(tmp_path / "raw" / f"{name}.parquet", schema) for name, schema in TABLES.items()}
    notes = tables["preferences"].attrs["manifest"]["notes"]
    assert [(one["source"], one["format"], one["taken"]) for one in notes["sources"]] == [
        (str(tmp_path / "a.jsonl"), "pairs", 20),
        (str(tmp_path / "b.csv"), "messages", 1),
        (str(tmp_path / "c.parquet"), "scored", 1),
        (f"{tmp_path}/d/test", "pairs", 1),
        (f"{tmp_path}/hub/train", "thumbs", 0),
    ]
    rows = tables["preferences"].set_index("prompt")
    assert rows.loc["c0", ["chosen", "rejected", "messages"]].tolist() == [
        " y",
        " x",
        '[{"content":"c0","role":"user"}]',
    ]
    assert rows.loc["d0", ["split", "source"]].tolist() == ["test", f"{tmp_path}/d/test"]
    assert rows.loc[rows.index.str.startswith("a"), "messages"].eq("").all()
    account = tables["preferences"].attrs["manifest"]["account"]
    assert account == {"read": 34, "kept": 22, "dropped": {"left_out_by_mixing": 10, "unpaired": 2}}
    # Two of each pair, and the thumbs that make none; what is tested on trains nothing.
    account = tables["labels"].attrs["manifest"]["account"]
    tested = 2 * (rows["split"] == "test").sum() + sum(e not in set(tables["labels"]["prompt"]) for e in ("e0", "e1"))
    left = {"left_out_by_mixing": 10, "test_split": tested}
    assert account == {"read": 10 + 2 * 22 + 2, "kept": 46 - tested, "dropped": left}
    (only,) = tables["demonstrations"].to_dict("records")
    assert (only["prompt"], only["response"], only["source"]) == ("b0", " x", str(tmp_path / "b.csv"))
    inputs = tables["preferences"].attrs["manifest"]["inputs"]
    assert inputs[0] == {
        "kind": "records",
        "path": sources[0]["path"],
        "sha256": sha256_of_file(str(sources[0]["path"])),
    }
    assert inputs[3]["path"] == f"{tmp_path}/d/test" and len(inputs[3]["sha256"]) == 64
    assert inputs[4] == {"kind": "records", "name": f"{tmp_path}/hub/train", "revision": None, "pinned": False}
    assert (
        f"warning: {tmp_path}/hub/train is not pinned to a revision: another day may bring other records."
        in caplog.messages
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p"}\n',
            "a.jsonl:2: the row has the fields 'prompt', of the format 'prompts', and the first row is of the format 'pairs'",
        ),
        (
            "a.json",
            '[{"prompt": "p", "chosen": "a"}]',
            "a.json:1: the row has the fields 'chosen', 'prompt', which fit no format of docs",
        ),
        (
            "a.csv",
            "question,answer\nq,a\n",
            "a.csv:1: the row has the fields 'answer', 'question', which fit no format of docs",
        ),
        (
            "a.csv",
            "prompt,completion,label\np,c,maybe\n",
            "a.csv:1: 'label' is 'maybe', which is neither true nor false; correct",
        ),
        (
            "a.csv",
            'prompt,responses,scores\np,"[""a"", ""b""]",[1]\n',
            "a.csv:1: 'scores' is [1], which is not a list of 2",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "x", "content": "p"}]}',
            "a.jsonl:1: message 1 of 'messages': 'role' is 'x', which",
        ),
    ],
)
def test_a_malformed_row_says_file_line_and_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    assert records(tmp_path / "raw", {"path": str(tmp_path / name)}) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "raw").exists()


def test_a_parquet_file_of_no_format_names_its_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"question": ["q"], "label": [1]}), tmp_path / "a.parquet")
    assert records(tmp_path / "raw", {"path": str(tmp_path / "a.parquet")}) == 2
    assert "a.parquet:1: the row has the fields 'label', 'question', which fit no format" in capsys.readouterr().err


ODD: list[Any] = [
    *(
        None,
        True,
        0,
        1,
        -1,
        10**4000,
        1.5,
        float("nan"),
        float("inf"),
        "",
        " ",
        "\u200b",
        "a\r\nb",
        "\ud800",
        "[",
        "true",
    ),
    *([], [None], ["a"], [[]], [{}], [{"role": "user"}], [{"role": "user", "content": "p"}], turns("p", "x")),
    *(
        turns("p", " "),
        [*turns("p", "x"), *turns("q", "y")],
        {},
        {"a": 1},
        {"text": "a", "score": 1},
        [1, 2],
        ["a", "b"],
    ),
    *([{"text": "a", "score": 1}, {"text": "b", "score": 2}], [{"text": "a", "score": "x"}] * 2, "a", "model_b", "tie"),
]
GOOD: dict[str, dict[str, Any]] = {
    "pairs": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "pairs of lists": {"prompt": "p", "chosen": turns("p", "x"), "rejected": turns("p", "y")},
    "winner": {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "a"},
    "winner of conversations": {"conversation_a": turns("p", "x"), "conversation_b": turns("p", "y"), "winner": "b"},
    "scored": {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]},
    "thumbs": {"prompt": "p", "completion": "a", "label": True},
    "prompt_response": {"prompt": "p", "response": "a"},
    "messages": {"messages": turns("p", "x")},
    "prompts": {"prompt": "p"},
    "hh": {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
}


@pytest.mark.parametrize("kind", GOOD)
def test_whatever_a_field_holds_is_read_dropped_or_malformed(kind: str, tmp_path: Path) -> None:
    """Never a crash, and every row is counted, of a named format and of one that is recognised."""
    rows = [GOOD[kind], *({**GOOD[kind], field: value} for field in GOOD[kind] for value in ODD)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for given in (None, kind.partition(" ")[0]):
        source = {"path": str(tmp_path / "a.jsonl"), "format": given}
        assert records(tmp_path / "raw", source, max_malformed=len(rows), ties="both") == 0
        (told,) = read_table(tmp_path / "raw/preferences.parquet", "raw_preferences").attrs["manifest"]["notes"][
            "sources"
        ]
        account = told["rows"]
        assert told["format"] == kind.partition(" ")[0]
        assert account["read"] == len(rows) == account["kept"] + sum(account["dropped"].values())
        assert account["dropped"]["malformed"] >= 15
