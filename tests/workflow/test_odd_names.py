"""A run whose folder, records, model, prompt and votes have names that a shell, a parser of options or Python would take
for something else."""

from __future__ import annotations

import argparse
import dataclasses
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
from running import REPOSITORY, only, overlay, snakemake

from prefopt.judging.human import study
from prefopt.store.tables import read_table, write_table
from test_human import export, recipe, world

ODD = "größe; 'a' \"b\" $(touch RAN) `touch RAN` & *"
KEY = "sk-odd-names"
# Run by every Python that starts: what a stage is given, and whether the key is there.
WITNESS = """
import json, os, sys
if "prefopt" in sys.orig_argv:
    words = sys.orig_argv[sys.orig_argv.index("prefopt") + 1:]
    with open({path!r}, "a") as file:
        print(json.dumps([words, "ODD_KEY" in os.environ]), file=file)
"""
STAGES = ("records", "prepare", "sample", "judge", "human_votes")


class Judge(http.server.BaseHTTPRequestHandler):
    """An endpoint that prefers the first text, and remembers the keys that it was shown."""

    keys: ClassVar[set[str | None]] = set()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.keys.add(self.headers["Authorization"])
        message = {"role": "assistant", "content": "Short.\nPreferred: A"}
        self.answer(
            {
                **{"id": "x", "object": "chat.completion", "created": 0, "model": "m"},
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
            }
        )

    def answer(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def judge() -> Iterator[str]:
    """The address of the endpoint."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def write_records(folder: Path) -> dict[str, list[str]]:
    """Posts and comparisons in files with odd names; the second begins with a dash."""
    posts, comparisons = f"posts {ODD}.jsonl", f"-c {ODD}.jsonl"
    with (folder / posts).open("w") as first, (folder / comparisons).open("w") as second:
        for i in range(30):
            post = {"id": f"p{i}", "title": f"title {i}", "post": f"text number {i} about things", "subreddit": "x"}
            print(json.dumps({**post, "summary": f"summary {i}"}), file=first)
            texts = [{"text": f" good {i}"}, {"text": f" bad {i}"}]
            print(json.dumps({"info": post, "summaries": texts, "choice": i % 2}), file=second)
    return {"posts": [posts], "comparisons": [comparisons]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an odd name, and in it files named like modules that a stage imports."""
    place = tmp_path / ODD
    place.mkdir()
    # Some that Snakemake itself does not import; its own path is not this workflow's.
    for name in ("openai", "torch", "transformers", "tokenizers", "prefopt"):
        (place / f"{name}.py").write_text("raise SystemExit('a planted module ran')\n")
    (tmp_path / "witness").mkdir()
    (tmp_path / "witness" / "sitecustomize.py").write_text(WITNESS.format(path=str(tmp_path / "stages")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "witness"))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("ODD_KEY", KEY)
    return place


def witnessed(place: Path) -> dict[str, tuple[list[str], bool]]:
    """The words that each stage was given, and whether the key was in its environment, in the order of their starts."""
    lines = [json.loads(line) for line in (place / "stages").read_text().splitlines()]
    return {next(word for word in words if word in STAGES): (words, key) for words, key in lines}


def value_of(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


@pytest.mark.workflow
def test_no_name_is_run_and_every_file_is_read(tmp_path: Path, folder: Path, judge: str) -> None:
    model, prompt = f"-model {ODD}", f"-prompt {ODD}.txt"
    shutil.copytree(REPOSITORY / "workflow" / "models" / "tldr_base", folder / model)
    shutil.copy(REPOSITORY / "workflow" / "prompts" / "tldr_concise.txt", folder / prompt)
    chat = {"base_url": judge, "model": "m", "api_key_env": "ODD_KEY", "prompt": prompt}
    tldr = {
        "runs": only("tldr", "sft"),
        "data": {"source": "files", **write_records(folder), "gold_fraction": 0.3},
        "base": {"source": "path", "path": model},
        "sft": {"source": "path", "path": model},
        "sampling": {"temperatures": [0.0], "max_new_tokens": 4},
        "evaluation": {"validation_prompts": 2, "test_prompts": 2},
        "judge": {"kind": "chat", "chat": {**chat, "prices": {"m": {"input": 0, "output": 0}}}},
        "human": None,
    }
    path = overlay(folder, {"tasks": {"tldr": tldr, "cnndm": None}}, name=f"-my {ODD}.yaml")
    target = "results/verdicts/tldr/sft.parquet"
    result = snakemake("--cores", "1", "--show-failed-logs", target, "--configfile", path, folder=folder)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert set(pd.read_parquet(folder / target)["winner"]) == {"first"}
    seen = witnessed(tmp_path)
    assert list(seen) == ["records", "prepare", "sample", "judge"]
    assert [stage for stage, (_, key) in seen.items() if key] == ["judge"]
    assert value_of(seen["prepare"][0], "--model") == value_of(seen["sample"][0], "--model") == f"./{model}"
    assert value_of(seen["judge"][0], "--template") == f"./{prompt}"
    assert Judge.keys == {f"Bearer {KEY}"}
    assert not list(tmp_path.rglob("RAN"))


def make_study(folder: Path) -> dict[str, Any]:
    """A study of made-up samples, without its pages; returns its key."""
    samples, prompts = world()
    content = write_table(folder / "prompts.parquet", "prompts", prompts)["content_hash"]
    write_table(folder / "samples.parquet", "samples", samples, prompts=content)
    made = folder / "results" / "human" / "tldr"
    study.run(
        argparse.Namespace(
            **{"recipe": json.dumps(dataclasses.asdict(recipe())), "prompts": folder / "prompts.parquet"},
            **{"samples": [folder / "samples.parquet"], "secret": folder / "secret", "pages": folder / "pages"},
            **{"items": made / "items.parquet", "key": made / "key.json"},
        )
    )
    return study.read_key(made / "key.json")


@pytest.mark.workflow
def test_a_raters_file_is_counted_whatever_its_name(tmp_path: Path, folder: Path) -> None:
    key = make_study(folder)
    votes = folder / "human" / "votes" / "tldr"
    votes.mkdir(parents=True)
    names = [f"-tldr-r01 (1) {ODD};#.json", "tldr-r02;touch RAN;#.json"]
    for name, rater in zip(names, ("r01", "r02"), strict=True):
        (votes / name).write_text(json.dumps(export(key, rater)))
    path = overlay(folder, {"tasks": {"tldr": {"human": {"simulated_raters": None}}}})
    target = "results/human/tldr/votes.parquet"
    words = (target, "--allowed-rules", "human_votes", "--rerun-triggers", "mtime", "--show-failed-logs")
    result = snakemake("--cores", "1", *words, "--configfile", path, folder=folder)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    counted = read_table(folder / target, "votes", study=key["study"])
    assert counted["rater"].value_counts().to_dict() == {"r01": 25, "r02": 25}
    told, _ = witnessed(tmp_path)["human_votes"]
    first = told.index("--exports") + 1
    assert told[first : first + 2] == [f"human/votes/tldr/{name}" for name in names]
    assert not list(tmp_path.rglob("RAN"))
