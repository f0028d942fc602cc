"""What a table or model says of what made it, against the job that would make it."""

from __future__ import annotations

import argparse
import base64
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefopt.experiment.verify import _changed, _compared, unrecorded
from prefopt.store import provenance
from prefopt.store.fingerprint import fingerprint
from prefopt.store.tables import read_manifest, write_table

RECIPE = {"learning_rate": 0.1, "checkpoint_every": 10, "judge": {"kind": "oracle", "token_budget": 5}}
ROWS = [{"text": "one"}]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFOPT_CODE", raising=False)


def make(path: str, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, str]] = ROWS, **arguments: Any) -> None:
    """Writes a table as a stage does."""
    monkeypatch.setenv("PREFOPT_CODE", "abc")
    provenance.begin("pretrain", "prefopt.errors", argparse.Namespace(**arguments))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_table(path, "pretraining", rows)


def job(output: str, *inputs: str, values: dict[str, Any] | None = None, **params: Any) -> SimpleNamespace:
    asked = {} if values is None else {"values": json.dumps(values)}
    shellcmd = params.pop("shellcmd", "prefopt pretrain > log 2>&1")
    made = {"code": "abc", **asked, **params}
    return SimpleNamespace(output=[output], input=list(inputs), params=made, shellcmd=shellcmd)


def test_a_table_says_what_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    write_table("by_hand.parquet", "pretraining", ROWS)
    assert provenance.made_by("by_hand.parquet") is None
    before = {"out": Path("by_hand.parquet"), "earlier": Path("by_hand.parquet")}
    write_table("text.parquet", "pretraining", ROWS)
    texts = [Path("text.parquet"), Path("gone")]
    make("made.parquet", monkeypatch, recipe=json.dumps(RECIPE), texts=texts, n=1, **before)
    assert provenance.made_by("made.parquet") == {
        "stage": "pretrain",
        "recipe": RECIPE,
        "by_step": None,
        "brought": {},
        "code": "abc",
        "inputs": {"text.parquet": read_manifest("text.parquet")["content_hash"]},
    }
    monkeypatch.delenv("PREFOPT_CODE")
    provenance.begin("pretrain", "prefopt.errors", argparse.Namespace())
    assert provenance.stamp()["made_by"]["code"] == fingerprint("prefopt.errors")


def test_what_is_as_asked_for_and_what_has_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    make("results/a.parquet", monkeypatch, recipe=json.dumps(RECIPE))
    Path("results/figure.svg").write_text("<svg/>")
    # How often it saves, and what an oracle does not read, change no result.
    asked = {"learning_rate": 0.1, "judge": {"kind": "oracle"}}
    said = dict(
        _compared([job("results/a.parquet", values=asked), job("results/figure.svg"), job("results/b.parquet")])
    )
    assert said == {
        "results/a.parquet": "as asked for",
        "results/figure.svg": "without a record of their own (figures, reports)",
        "results/b.parquet": "not made yet",
    }


def test_other_values_code_and_inputs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    make("results/in.parquet", monkeypatch)
    make("results/a.parquet", monkeypatch, recipe=json.dumps({"beta": 0.1}), data=Path("results/in.parquet"))
    same = job("results/a.parquet", "results/in.parquet", values={"beta": 0.1})
    assert dict(_compared([same])) == {"results/a.parquet": "as asked for"}
    other = job("results/a.parquet", "results/in.parquet", values={"beta": 0.5}, code="def")
    make("results/in.parquet", monkeypatch, [{"text": "two"}])
    assert dict(_compared([other])) == {
        "results/a.parquet": "beta 0.1, asked for 0.5; its stage's code has changed; made of another results/in.parquet"
    }


def test_what_the_user_brought_is_known_by_its_content_wherever_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    base, posts = Path("my base"), Path("posts.jsonl")
    base.mkdir()
    (base / "config.json").write_text("{}")
    posts.write_text("one")
    recipe = {"source": "files", "posts": ["posts.jsonl"], "articles": []}
    make("results/a.parquet", monkeypatch, recipe=json.dumps(recipe), base=base, style="plain")

    def said(*words: str, **values: Any) -> str:
        command = shlex.join(["prefopt", "prepare", *words]) + " > logs/a.log 2>&1"
        one = job("results/a.parquet", recipe=json.dumps({**recipe, **values}), shellcmd=command)
        return dict(_compared([one]))["results/a.parquet"]

    assert said("--base", "my base", "--style", "chat") == "as asked for"
    base.rename("moved")
    posts.rename("moved.jsonl")
    assert said("--base", "moved", posts=["moved.jsonl"]) == "as asked for"
    Path("moved", "chat_template.jinja").write_text("{{ messages }}")
    assert said("--base", "moved", posts=["moved.jsonl"]) == "made of another moved"
    Path("moved.jsonl").write_text("two")
    assert said("--base", "moved", posts=["moved.jsonl"]) == "made of another moved; made of another records"


def test_values_of_sampling_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    make("results/s.parquet", monkeypatch, recipe="{}", by_step='{"points": 4}')
    assert dict(_compared([job("results/s.parquet", values={}, by_step_values='{"points": 8}')])) == {
        "results/s.parquet": "by_step.points 4, asked for 8"
    }


def test_a_shard_speaks_of_the_table_that_it_became(monkeypatch: pytest.MonkeyPatch) -> None:
    make("results/samples/tldr/dpo.parquet", monkeypatch, recipe='{"n": 1}')
    shards = [job(f"results/shards/samples/tldr/dpo/{i}-of-2.parquet", values={"n": 2}) for i in (1, 2)]
    shards.append(job("results/samples/tldr/dpo.parquet", shards[0].output[0], code="of gather"))
    assert dict(_compared(shards)) == {"results/samples/tldr/dpo.parquet": "n 1, asked for 2"}


def test_where_two_recipes_differ() -> None:
    found, asked = {"a": {"b": 1, "c": [1]}, "d": 2, "gone": None}, {"a": {"b": 1, "c": [2]}, "d": 2, "e": 3}
    assert list(_changed(found, asked)) == ["a.c [1], asked for [2]", "e None, asked for 3"]


def test_results_that_snakemake_has_no_record_of() -> None:
    model, table = Path("results/models/tldr/dpo"), Path("results/samples/tldr/dpo.parquet")
    for folder in (model, table.parent, Path(".snakemake/metadata")):
        folder.mkdir(parents=True)
    (model / "manifest.json").write_text("{}")
    table.write_bytes(b"")
    assert unrecorded() == 2
    (Path(".snakemake/metadata") / base64.urlsafe_b64encode(str(model).encode()).decode()).write_text("{}")
    assert unrecorded() == 1
