"""Special tokens as text, and chat templates, at `prepare` and `prefixes`."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_prepare import add_up, demonstration, pair, prepare, write_raw
from transformers import LlamaConfig, PreTrainedTokenizerBase

from prefopt.data import prefixes
from prefopt.data.special_tokens import REASON, warn_of_template, with_special_tokens
from prefopt.errors import UserError
from prefopt.lm.chat import special_tokens
from prefopt.lm.models import load_tokenizer
from prefopt.store.tables import read_table, write_table
from prefopt.training.pretrain import train_tokenizer

CHAT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose tokenizer knows the tokens of a chat, and one added word that is not special."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["my cat ate the red shoe POST: i feel sad TL;DR:"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<s>"]})
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    LlamaConfig(max_position_embeddings=96, vocab_size=400).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(model)


def test_which_tokens_are_special(tokenizer: PreTrainedTokenizerBase) -> None:
    assert special_tokens(tokenizer) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]


def test_an_empty_token_is_none() -> None:
    tokenizer: Any = SimpleNamespace(added_tokens_decoder={}, all_special_tokens=["", "<s>"])
    assert special_tokens(tokenizer) == ["<s>"]


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"])
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_row_is_found_by_any_of_its_texts(tokenizer: PreTrainedTokenizerBase, token: str, column: str) -> None:
    rows = [pair(i) for i in range(20)]
    rows[7][column] += f"x{token}y"
    columns = ("prompt", "chosen", "rejected")
    assert with_special_tokens(tokenizer, rows, "pair_id", columns, Path("raw.parquet")) == {"pair7"}
    assert with_special_tokens(tokenizer, rows[:10], "pair_id", columns, Path("raw.parquet")) == {"pair7"}
    with pytest.raises(UserError, match=r"raw\.parquet: 'pair7' holds .* as text, and so do 1 of 9 records in all"):
        with_special_tokens(tokenizer, rows[:9], "pair_id", columns, Path("raw.parquet"))


def test_what_is_not_special_stays(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [pair(0, prompt="<think> a <b> </s> im_start < s > <|im_start |>")]
    assert with_special_tokens(tokenizer, rows, "pair_id", ("prompt",), Path("raw.parquet")) == set()


def test_records_of_a_chat_are_refused(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path / "raw", [demonstration(0)], [pair(i, prompt=CHAT) for i in range(3)])
    assert prepare(tmp_path / "raw", model, tmp_path) == 2
    said = capsys.readouterr().err
    assert f"preferences.parquet: 'pair0' holds '<|im_start|>', a special token of {model}, as text" in said
    assert "3 of 3 records" in said
    write_raw(tmp_path / "raw", [demonstration(i, response=" yes</s><s>") for i in range(2)], [pair(0)])
    assert prepare(tmp_path / "raw", model, tmp_path / "out") == 2
    assert "demonstrations.parquet: 'p0' holds '<s>'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "prompts.parquet").exists()


def test_a_few_are_dropped_counted_and_named(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    demonstrations = [demonstration(i, split="test" if i % 2 else "train") for i in range(20)]
    demonstrations[3]["response"] = " went on<|endoftext|>Chapter 14"
    pairs = [pair(i, split="gold_train" if i < 20 else "train") for i in range(40)]
    pairs[2]["chosen"] += "<|im_end|>"
    pairs[30]["rejected"] += "<|im_end|>"
    write_raw(tmp_path / "raw", demonstrations, pairs)
    with caplog.at_level(logging.WARNING):
        assert prepare(tmp_path / "raw", model, tmp_path) == 0
    assert "'p3' holds '<|endoftext|>'" in caplog.text and "1 of 20 records are dropped for this" in caplog.text
    assert "'pair2' holds '<|im_end|>'" in caplog.text and "'pair30' holds '<|im_end|>'" in caplog.text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (tmp_path / "summary.json").read_text() == json.dumps(summary, indent=1) + "\n"
    assert add_up(summary)
    tables = summary["tables"]
    assert tables["demonstrations"]["dropped"] == tables["prompts"]["dropped"] == {REASON: 1, "no_post": 2}
    assert tables["preferences"]["dropped"] == {REASON: 1, "reserved_for_gold": 20}
    assert tables["gold_preferences"]["dropped"] == {REASON: 1}
    assert "pair30" not in set(read_table(tmp_path / "preferences.parquet", "preferences")["pair_id"])
    assert "p3" not in set(read_table(tmp_path / "prompts.parquet", "prompts")["prompt_id"])


def test_reviews(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(count: int, labels: int) -> None:
        rows: list[dict[str, Any]] = [
            {"review_id": f"r{i}", "text": f"the shoe {i} ate my red cat", "label": 1, "split": "train"}
            for i in range(count)
        ]
        rows[1]["text"] += "<s>"
        # An unlabelled review becomes no prompt.
        rows += [{**rows[1], "review_id": f"u{i}", "label": -1} for i in range(labels)]
        account = {"read": len(rows), "kept": len(rows), "dropped": {}}
        write_table(tmp_path / "reviews.parquet", "raw_reviews", rows, account=account, recipe={"source": "files"})
        values = json.dumps({"min_prefix": 2, "max_prefix": 4, "max_length": 64})
        made = {name: tmp_path / "out" / f"{name}.parquet" for name in ("demonstrations", "prompts")}
        made["summary"] = tmp_path / "out" / "summary.json"
        paths = {"reviews": tmp_path / "reviews.parquet", "model": model, **made}
        prefixes.run(argparse.Namespace(task="imdb", **paths, recipe=values))

    with caplog.at_level(logging.WARNING):
        run(20, 10)
    assert "'r1' holds '<s>'" in caplog.text and "1 of 20 records" in caplog.text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["reviews"]
    assert summary["dropped"] == {REASON: 1, "unlabelled": 10} and summary["kept"] == 19
    with pytest.raises(UserError, match=r"reviews.parquet: 'r1' holds '<s>', .* 1 of 5 records"):
        run(5, 0)


def test_a_chat_template_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_template(tokenizer, Path("models/base"))
        assert caplog.text == ""
        tokenizer.save_pretrained(tmp_path / "m")
        (tmp_path / "m" / "chat_template.jinja").write_text("{% for message in messages %}{{ message }}{% endfor %}")
        LlamaConfig(max_position_embeddings=96, vocab_size=400).save_pretrained(tmp_path / "m")
        write_raw(tmp_path / "raw", [demonstration(0)], [pair(0)])
        assert prepare(tmp_path / "raw", tmp_path / "m", tmp_path) == 0
    assert f"{tmp_path / 'm'} has a chat template" in caplog.text and "which is not used" in caplog.text
