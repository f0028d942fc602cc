"""Single labelled completions: pairs taken apart, mismatched completions, and the table of both."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_prepare import TABLES, WORDS, recipe
from test_records import RECIPE
from transformers import LlamaConfig, PreTrainedTokenizerBase

from prefopt.cli import main
from prefopt.data.labels import mismatched, taken_apart
from prefopt.data.prepare import Prepared, prepare_labels, tokenized
from prefopt.errors import UserError
from prefopt.lm.models import load_tokenizer
from prefopt.store.tables import read_manifest, read_table, write_table
from prefopt.training.pretrain import train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(["my cat ate the red shoe"], 300).save_pretrained(folder)
    LlamaConfig(max_position_embeddings=2000, vocab_size=300).save_pretrained(folder)
    return folder


def test_a_pair_is_a_desirable_and_an_undesirable_completion() -> None:
    pair = {"pair_id": "a", "prompt_id": "p", "prompt": "post", "chosen": " x", "rejected": " y"}
    shared = {"prompt_id": "p", "prompt": "post", "split": "train", "source": "s", "messages": ""}
    assert list(taken_apart([{**pair, "split": "train", "source": "s", "messages": ""}])) == [
        {**shared, "example_id": "a-chosen", "completion": " x", "label": True},
        {**shared, "example_id": "a-rejected", "completion": " y", "label": False},
    ]


def test_pairs_of_tokens_are_taken_apart_with_a_completion_of_another_prompt_of_their_split(tmp_path: Path) -> None:
    """Of two prompts each example has one of the other's: the two of training, and the two of validation."""
    rows = [
        {"pair_id": f"pair{i}", "prompt_id": f"p{i}", "prompt": f"post {i}", "chosen": " x", "rejected": " y"}
        | {"split": split, "source": "sampled", "prompt_ids": [i], "chosen_ids": [10 + i, 1], "rejected_ids": [20 + i]}
        for i, split in enumerate(["train", "train", "validation", "validation"])
    ]
    pairs, out = tmp_path / "pairs.parquet", tmp_path / "labels.parquet"
    write_table(pairs, "preferences", rows, tokenizer_hash="t", samples="s")
    assert main(["pair_labels", "--data", str(pairs), "--out", str(out)]) == 0
    table = read_table(out, "labels", tokenizer_hash="t", preferences=read_manifest(pairs)["content_hash"])
    assert table["example_id"].tolist() == [f"pair{i}-{side}" for i in range(4) for side in ("chosen", "rejected")]
    assert (
        table["label"].tolist() == [True, False] * 4 and table["split"].tolist() == ["train"] * 4 + ["validation"] * 4
    )
    assert [ids.tolist() for ids in table["completion_ids"]] == [
        ids for i in range(4) for ids in ([10 + i, 1], [20 + i])
    ]
    other = {i: {((10 + j), 1) for j in [i ^ 1]} | {(20 + j,) for j in [i ^ 1]} for i in range(4)}
    for prompt, ids in zip(table["prompt_ids"], table["mismatched_ids"], strict=True):
        assert tuple(ids.tolist()) in other[prompt[0]]
    assert len({tuple(ids.tolist()) for ids in table["mismatched_ids"]}) == 8


@pytest.mark.parametrize(
    "counts", [[1, 1], [2, 2], [3, 3], [1] * 7, [5, 1, 1, 1, 1, 1], [2] * 20, [3, 1, 2], [4, 3, 1], [6, 2, 2, 2]]
)
def test_every_completion_is_taken_once_and_by_another_prompt(counts: list[int]) -> None:
    prompts = [f"p{i}" for i, count in enumerate(counts) for _ in range(count)]
    found = mismatched(prompts, "data")
    assert sorted(found) == list(range(len(prompts)))
    assert all(prompts[i] != prompts[other] for i, other in enumerate(found))


def test_the_order_of_the_prompts_names_changes_nothing() -> None:
    prompts = [f"p{i % 6}" for i in range(12)]
    found = mismatched(prompts, "data")
    turned = mismatched(prompts[::-1], "data")
    assert Counter((prompts[i], prompts[other]) for i, other in enumerate(found)) == Counter(
        (prompts[::-1][i], prompts[::-1][other]) for i, other in enumerate(turned)
    )


def test_a_prompt_with_more_than_half_of_the_examples() -> None:
    with pytest.raises(UserError, match=r"^3 of 5 examples of data are of the prompt 'p', more than half, so that"):
        mismatched(["p", "q", "p", "p", "r"], "data")
    with pytest.raises(UserError, match=r"^2 of 2 examples of data are of the prompt 'p', more than half"):
        mismatched(["p", "p"], "data")


def label(number: int, **values: Any) -> dict[str, Any]:
    row = {"example_id": f"e{number}", "prompt_id": f"p{number}", "prompt": f"post {number}", "label": number % 2 == 0}
    return {**row, "completion": f" cat {number}", "messages": "", "split": "train", "source": "s", **values}


def labels_of(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> Prepared:
    tokens = tokenized(tokenizer, rows, "example_id", ("completion",), recipe(), Path("raw"))
    return prepare_labels(rows, tokens, recipe(), Path("raw"))


def test_mismatched_completions_are_of_the_same_split_and_fit(model: Path) -> None:
    rows = [*(label(i) for i in range(5)), *(label(i, split="validation") for i in range(5, 8))]
    rows.append(label(8, completion=" my cat" * 20))
    table = labels_of(load_tokenizer(model), rows)
    assert table.summary(9, {}) == {
        **{"read": 9, "kept": 8, "dropped": {"completion_too_long": 1}, "prompts_cut": 0},
        "splits": {"train": 5, "validation": 3},
    }
    for split in ("train", "validation"):
        own = [row for row in table.rows if row["split"] == split]
        assert sorted(row["completion_ids"] for row in own) == sorted(row["mismatched_ids"] for row in own)
        assert all(row["completion_ids"] != row["mismatched_ids"] for row in own)
    with pytest.raises(UserError, match=r"^2 of 3 examples of raw, split 'train', are of the prompt 'p0'"):
        labels_of(load_tokenizer(model), [label(0), label(1), label(2, prompt_id="p0")])


@pytest.mark.parametrize("chat", [False, True])
def test_a_task_of_thumbs_alone(model: Path, tmp_path: Path, chat: bool) -> None:
    """Not one pair: labels to learn from, what pleased as demonstrations and references, and empty tables of pairs."""
    base = tmp_path / "base"
    shutil.copytree(model, base)
    if chat:
        tokenizer = load_tokenizer(base)
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
        tokenizer.save_pretrained(base)

    def prompt(i: int) -> Any:
        return [{"role": "user", "content": f"cat {i}"}] if chat else f"cat {i}"

    thumbs = [{"prompt": prompt(i), "completion": f"shoe {i}", "label": i % 3 > 0} for i in range(60)]
    (tmp_path / "thumbs.jsonl").write_text("\n".join(map(json.dumps, thumbs)))
    nothing = dict.fromkeys(("path", "hub", "format", "configuration", "split", "revision", "as", "weight", "count"))
    sources = [{**nothing, "path": str(tmp_path / "thumbs.jsonl")}]
    text = json.dumps({**RECIPE, "source": "records", "records": sources, "gold_fraction": 0.0})
    for name in ("demonstrations", "preferences", "gold_preferences", "labels"):
        table = ["--table", name, "--out", str(tmp_path / f"raw/{name}.parquet")]
        assert main(["records", "--task", "own", "--form", "tldr", "--recipe", text, *table]) == 0
        names = ["demonstrations", "prompts"] if name == "demonstrations" else [name]
        made = ["--out", *(str(tmp_path / f"{each}.parquet") for each in names)]
        lengths = ["--model", str(base), "--recipe", json.dumps(vars(recipe(suffix="")))]
        assert main(["prepare", "--raw", str(tmp_path / f"raw/{name}.parquet"), *lengths, *made]) == 0
    tables = [str(tmp_path / f"{name}.parquet") for name in (*TABLES, "labels")]
    words = ["--recipe", json.dumps(WORDS), "--out", str(tmp_path / "summary.json")]
    assert main(["summary", "--tables", *tables, *words]) == 0
    counts = json.loads((tmp_path / "summary.json").read_text())["tables"]
    labels = read_table(tmp_path / "labels.parquet", "labels")
    assert counts["preferences"]["kept"] == counts["gold_preferences"]["kept"] == 0
    assert counts["labels"]["read"] == 60 and counts["labels"]["dropped"].keys() == {"test_split"}
    assert counts["demonstrations"]["kept"] == 40
    held_back = set(read_table(tmp_path / "prompts.parquet", "prompts").query("split == 'test'")["prompt"])
    assert len(held_back) > 2 and not held_back & set(labels["prompt"])
    assert all(row.label == (int(row.completion.split()[-1]) % 3 > 0) for row in labels.itertuples())
    assert (labels["completion_ids"].map(list) != labels["mismatched_ids"].map(list)).all()
    assert {ids[-1] for ids in labels["completion_ids"]} == {load_tokenizer(base).eos_token_id}


def test_the_stages_make_the_table_of_embedded_pairs(model: Path, tmp_path: Path) -> None:
    made = {"pairs": 6, "validation_pairs": 3, "gold_pairs": 2}
    values = {**RECIPE, "source": "embedded", "embedded": {**dict.fromkeys(RECIPE["embedded"], 0), **made}}
    for name in ("preferences", "labels"):
        table = ["--table", name, "--out", str(tmp_path / f"raw/{name}.parquet")]
        assert main(["records", "--task", "tldr", "--form", "tldr", "--recipe", json.dumps(values), *table]) == 0
    lengths = vars(recipe(max_prompt_length=1000, max_length=2000))
    arguments = ["--raw", str(tmp_path / "raw/labels.parquet"), "--model", str(model), "--recipe", json.dumps(lengths)]
    assert main(["prepare", *arguments, "--out", str(tmp_path / "labels.parquet")]) == 0
    labels, pairs = (
        read_table(tmp_path / "labels.parquet", "labels"),
        read_table(tmp_path / "raw/preferences.parquet", "raw_preferences"),
    )
    account = read_table(tmp_path / "raw/labels.parquet", "raw_labels").attrs["manifest"]["account"]
    assert account == {"read": 22, "kept": 18, "dropped": {"reserved_for_gold": 4}}
    assert labels.attrs["manifest"]["account"]["read"] == 22
    assert set(labels["completion"]) <= {*pairs["chosen"], *pairs["rejected"]}
    assert labels["label"].tolist() == [name.endswith("-chosen") for name in labels["example_id"]]
