from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerBase

from prefopt.cli import main
from prefopt.data.prepare import (
    Prepared,
    PrepareRecipe,
    encode,
    encode_prompts,
    prepare_demonstrations,
    prepare_preferences,
    tokenized,
)
from prefopt.errors import UserError
from prefopt.lm.models import load_tokenizer, tokenizer_hash
from prefopt.store.tables import read_table, write_table
from prefopt.training.pretrain import EOS, train_tokenizer

SHARED = Path(__file__).parents[4] / "shared"
SUFFIX = "\n\nTL;DR:"
TEXT = "SUBREDDIT: r/cats TITLE: my cat ate the red shoe POST: i feel sad, should i buy a new one? TL;DR: cat shoe"
TABLES = ("demonstrations", "preferences", "gold_preferences", "prompts")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer and the config of a model of 96 positions."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer([TEXT], 300).save_pretrained(folder)
    LlamaConfig(max_position_embeddings=96, vocab_size=300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(model)


WORDS = {"title": "Posts", "reference": "the reference", "written": "posts"}


def recipe(**values: Any) -> PrepareRecipe:
    lengths: dict[str, Any] = {
        "max_prompt_length": 40,
        "max_length": 60,
        "truncation": "keep_start",
        **{"suffix": SUFFIX, "style": None, "system": None, "new_suffix": None},
        "evaluation_only": False,
    }
    return PrepareRecipe(**{**lengths, **values})


def demonstration(number: int, **values: Any) -> dict[str, Any]:
    row = {"prompt_id": f"p{number}", "prompt": f"post {number}{SUFFIX}", "response": " my cat"}
    return {**row, "split": "train", "facts": "", "messages": "", "source": "s", **values}


def pair(number: int, **values: Any) -> dict[str, Any]:
    row = {"pair_id": f"pair{number}", "prompt_id": f"p{number}", "prompt": f"post {number}{SUFFIX}"}
    row |= {"chosen": " my cat", "rejected": " the shoe", "messages": ""}
    return {**row, "split": "train", "source": "comparisons", **values}


def demonstrations_of(tokenizer: Any, rows: list[dict[str, Any]], **values: Any) -> dict[str, Prepared]:
    tokens = tokenized(tokenizer, rows, "prompt_id", ("response",), recipe(**values), Path("raw"))
    return prepare_demonstrations(rows, tokens, recipe(**values))


def preferences_of(tokenizer: Any, rows: list[dict[str, Any]], **values: Any) -> Prepared:
    tokens = tokenized(tokenizer, rows, "pair_id", ("chosen", "rejected"), recipe(**values), Path("raw"))
    return prepare_preferences(rows, tokens, recipe(**values))


def write_raw(folder: Path, demonstrations: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> None:
    notes = {"synthetic": False, "statement": "Made up.", "warnings": ["beware"]}
    common = {"task": "tldr", "recipe": {"source": "files"}, "notes": notes}
    gold = [row for row in pairs if row["split"].startswith("gold_")]
    tables: dict[str, tuple[list[dict[str, Any]], dict[str, int]]] = {
        "demonstrations": (demonstrations, {"no_post": 2}),
        "preferences": ([row for row in pairs if row not in gold], {"reserved_for_gold": len(gold)}),
        "gold_preferences": (gold, {}),
    }
    for name, (rows, dropped) in tables.items():
        account = {"read": len(rows) + sum(dropped.values()), "kept": len(rows), "dropped": dropped}
        write_table(folder / f"{name}.parquet", f"raw_{name.removeprefix('gold_')}", rows, account=account, **common)


def prepare(raw: Path, model: Path, out: Path, **values: Any) -> int:
    """Every table and the summary; the first status that is not 0."""
    text = json.dumps(vars(recipe(**values)))
    for made in (("demonstrations", "prompts"), ("preferences",), ("gold_preferences",)):
        paths = [str(out / f"{name}.parquet") for name in made]
        inputs = ["--raw", str(raw / f"{made[0]}.parquet"), "--model", str(model), "--recipe", text]
        if status := main(["prepare", *inputs, "--out", *paths]):
            return status
    tables = [str(out / f"{name}.parquet") for name in TABLES]
    return main(["summary", "--tables", *tables, "--recipe", json.dumps(WORDS), "--out", str(out / "summary.json")])


def add_up(summary: dict[str, Any]) -> bool:
    return all(
        table["read"] == table["kept"] + sum(table["dropped"].values())
        and table["kept"] == sum(table["splits"].values())
        for table in summary["tables"].values()
    )


@pytest.mark.parametrize(("truncation", "kept"), [("keep_start", slice(0, 12)), ("keep_end", slice(-12, None))])
def test_a_cut_leaves_the_suffix(tokenizer: PreTrainedTokenizerBase, truncation: str, kept: slice) -> None:
    body = "".join(chr(97 + i % 26) for i in range(200))
    body_ids, suffix_ids = encode(tokenizer, [body, SUFFIX])
    longest = 12 + len(suffix_ids)
    prompts = [body + SUFFIX, "short" + SUFFIX, body]
    values = recipe(max_prompt_length=longest, max_length=longest + 9, truncation=truncation)
    encoded = encode_prompts(tokenizer, prompts, values)
    assert encoded[prompts[0]] == (body_ids[kept] + suffix_ids, True)
    assert encoded[prompts[1]] == (encode(tokenizer, ["short"])[0] + suffix_ids, False)
    # Without the suffix all of the prompt is cut, as a whole.
    whole = body_ids[:longest] if truncation == "keep_start" else body_ids[-longest:]
    assert encoded[body] == (whole, True)


def test_a_prompt_of_exactly_the_length_is_not_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    body_ids, suffix_ids = encode(tokenizer, ["my cat ate the red shoe", SUFFIX])
    exact = len(body_ids) + len(suffix_ids)
    for truncation in ("keep_start", "keep_end"):
        for longest, cut in ((exact, False), (exact - 1, True)):
            values = recipe(max_prompt_length=longest, truncation=truncation)
            ((ids, was_cut),) = encode_prompts(tokenizer, ["my cat ate the red shoe" + SUFFIX], values).values()
            assert len(ids) == longest and was_cut is cut


def test_a_prompt_that_has_no_room_for_its_suffix(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"max_prompt_length is 2, but .* takes \d+ tokens: raise it"):
        encode_prompts(tokenizer, ["a" + SUFFIX], recipe(max_prompt_length=2))


def special_tokenizers() -> list[Any]:
    names = ["tokenizers/gpt2", "tokenizers/gpt-neox-20b", "models/stories260K"]
    skip = pytest.mark.skipif(not SHARED.is_dir(), reason="the tokenizers (../shared) are not here")
    return [None, *(pytest.param(name, marks=skip) for name in names)]


@pytest.mark.parametrize("name", special_tokenizers())
def test_special_tokens_in_a_text_are_text(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    if name is not None:
        tokenizer = load_tokenizer(SHARED / name)
    text = f" a {tokenizer.eos_token} b <|endoftext|> c <s> d </s><unk> e"
    (ids,) = encode(tokenizer, [text])
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == text.strip()


def test_every_prompt_that_is_evaluated_has_a_reference_with_a_length(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        demonstration(i, response=" x" * (5 if i < 3 else 60), split=split)
        for i, split in enumerate(["train", "validation", "test", "train", "validation", "test"])
    ]
    tables = demonstrations_of(tokenizer, rows)
    assert [row["prompt_id"] for row in tables["demonstrations"].rows] == ["p0", "p1", "p2"]
    assert [row["prompt_id"] for row in tables["prompts"].rows] == ["p0", "p1", "p2", "p3"]
    assert tables["demonstrations"].dropped == {"completion_too_long": 3}
    assert tables["prompts"].dropped == {"reference_too_long": 2}


def test_a_prompt_alone_is_evaluated_on_and_demonstrates_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        demonstration(0),
        demonstration(1, response="", split="validation"),
        demonstration(2, response="", split="test"),
    ]
    for evaluation_only in (False, True):
        tables = demonstrations_of(tokenizer, rows, evaluation_only=evaluation_only)
        assert [row["prompt_id"] for row in tables["demonstrations"].rows] == ["p0"]
        assert [(row["split"], row["reference"]) for row in tables["prompts"].rows] == [
            ("train", "my cat"),
            ("validation", ""),
            ("test", ""),
        ]
        assert tables["demonstrations"].dropped == {"prompt_alone": 2} and not tables["prompts"].dropped


def test_a_response_ends_with_eos_or_is_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    eos = tokenizer.eos_token_id
    room = 20
    letters = "zqxjkvbpygfwmucldrhsni"
    (ids,) = encode(tokenizer, [" " + letters])
    fits = next(n for n in range(1, 23) if len(encode(tokenizer, [" " + letters[:n]])[0]) == room - 1)
    rows = [demonstration(0, response=" " + letters[:fits]), demonstration(1, response=" " + letters[: fits + 1])]
    rows.append(demonstration(2, response=" a shoe", split="test"))
    assert len(ids) >= room
    tables = demonstrations_of(tokenizer, rows)
    kept = tables["demonstrations"]
    assert [row["prompt_id"] for row in kept.rows] == ["p0", "p2"]
    assert kept.dropped == {"completion_too_long": 1}
    assert len(kept.rows[0]["response_ids"]) == room
    for row in kept.rows:
        assert row["response_ids"][-1] == eos and eos not in row["response_ids"][:-1] + row["prompt_ids"]
        assert tokenizer.decode(row["response_ids"][:-1]) == row["response"]
        assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]
    # A long reference stays an opponent: nothing of it is trained on.
    assert [row["prompt_id"] for row in tables["prompts"].rows] == ["p0", "p1", "p2"]
    assert tables["prompts"].rows[1]["reference"] == letters[: fits + 1]


def test_pairs_are_kept_dropped_or_reserved(tokenizer: PreTrainedTokenizerBase) -> None:
    long = " " + "x" * 30
    rows = [
        pair(0),
        pair(1, chosen=long),
        pair(2, rejected=long),
        pair(3, split="gold_train"),
        pair(4, split="gold_test"),
        pair(5, split="gold_test", rejected=long),
        pair(6, split="test"),
    ]
    gold_rows = [row for row in rows if row["split"].startswith("gold_")]
    pairs = preferences_of(tokenizer, [row for row in rows if row not in gold_rows])
    gold = preferences_of(tokenizer, gold_rows)
    assert [(row["pair_id"], row["split"]) for row in pairs.rows] == [("pair0", "train"), ("pair6", "test")]
    assert pairs.dropped == {"completion_too_long": 2}
    assert [(row["pair_id"], row["split"]) for row in gold.rows] == [("pair3", "train"), ("pair4", "test")]
    assert gold.dropped == {"completion_too_long": 1}
    first = pairs.rows[0]
    assert tokenizer.decode(first["chosen_ids"]) == " my cat" + EOS
    assert tokenizer.decode(first["rejected_ids"]) == " the shoe" + EOS


def test_pairs_that_a_tokenizer_cannot_tell_apart() -> None:
    class Coarse:
        """Knows letters, and takes all else for one token."""

        eos_token_id = 0
        added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012
        all_special_tokens = ("<eos>",)

        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ord(c) if c.isascii() else 1 for c in text] for text in texts]}

    rows = [pair(0, chosen=" \u2603", rejected=" \u2604"), pair(1, chosen=" a", rejected=" \u2604")]
    table = preferences_of(Coarse(), rows)
    assert [row["pair_id"] for row in table.rows] == ["pair1"]
    assert table.dropped == {"equal_after_tokenization": 1}


def test_the_stage(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = "my cat ate the red shoe " * 9 + SUFFIX
    demonstrations = [
        demonstration(0),
        demonstration(1, prompt=long, split="test"),
        demonstration(2, response=" x" * 30),
    ]
    pairs = [pair(0), pair(1, prompt=long, split="validation"), pair(2, split="gold_train", prompt=long)]
    write_raw(tmp_path / "raw", demonstrations, pairs)
    assert prepare(tmp_path / "raw", model, tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    prompts = {"read": 5, "kept": 3, "dropped": {"no_post": 2}, "splits": {"test": 1, "train": 2}, "prompts_cut": 1}
    dropped = {"completion_too_long": 1, "no_post": 2}
    assert summary == {
        "task": "tldr",
        **WORDS,
        "source": "files",
        "synthetic": False,
        "tables": {
            "demonstrations": {**prompts, "kept": 2, "dropped": dropped, "splits": {"test": 1, "train": 1}},
            "preferences": {
                **{"read": 3, "kept": 2, "dropped": {"reserved_for_gold": 1}},
                **{"splits": {"train": 1, "validation": 1}, "prompts_cut": 1},
            },
            "gold_preferences": {"read": 1, "kept": 1, "dropped": {}, "splits": {"train": 1}, "prompts_cut": 1},
            "prompts": prompts,
        },
        "warnings": [
            "beware",
            "1 of 5 records of demonstrations (20%) are lost: they have a completion that does not fit; raise "
            "tasks.tldr.lengths.max_length.",
            "2 of 5 records of demonstrations (40%) are lost: they are dropped for the reason no_post.",
            "2 of 5 records of prompts (40%) are lost: they are dropped for the reason no_post.",
        ],
    }
    assert all(warning in caplog.text for warning in summary["warnings"][1:])
    assert add_up(summary)
    for name in TABLES:
        table = read_table(
            tmp_path / f"{name}.parquet",
            "preferences" if name == "gold_preferences" else name,
            tokenizer_hash=tokenizer_hash(model),
            lengths=vars(recipe()),
        )
        assert table["prompt_ids"].map(len).max() == 40
        assert table.attrs["manifest"]["account"] == summary["tables"][name]
        assert table.attrs["manifest"]["notes"]["statement"] == "Made up."
        if "pref" in name:
            raw = read_table(tmp_path / "raw" / f"{name}.parquet", "raw_preferences").attrs["manifest"]
            assert table.attrs["manifest"]["raw"] == raw["content_hash"]


def test_lengths_beyond_the_model(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path / "raw", [demonstration(0)], [pair(0)])
    assert prepare(tmp_path / "raw", model, tmp_path, max_length=96) == 0
    assert prepare(tmp_path / "raw", model, tmp_path, max_length=97) == 2
    assert f"max_length is 97, but the model in {model} has 96 positions" in capsys.readouterr().err
    assert prepare(tmp_path / "raw", model, tmp_path, max_prompt_length=60) == 2
    assert "max_prompt_length is 60 and max_length 60" in capsys.readouterr().err
    assert prepare(tmp_path / "raw", tmp_path, tmp_path) == 2
    assert "is not a model folder" in capsys.readouterr().err


def test_gpt2_says_positions_in_other_words(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, tmp_path / "gpt2")
    GPT2Config(n_positions=50).save_pretrained(tmp_path / "gpt2")
    write_raw(tmp_path / "raw", [demonstration(0)], [pair(0)])
    assert prepare(tmp_path / "raw", tmp_path / "gpt2", tmp_path) == 2
    assert "has 50 positions" in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real records (../shared) are not here")
def test_real_records(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(SHARED / "tokenizers" / "gpt2", model)
    GPT2Config().save_pretrained(model)
    records = {
        **{kind: [str(SHARED / f"data/tldr_{kind}.jsonl.gz")] for kind in ("posts", "comparisons")},
        **{"source": "files", "demonstrations": [], "preferences": [], "articles": [], "hub": {}, "embedded": {}},
        **{"splits": {"train": 0.7, "validation": 0.1, "test": 0.2}, "gold_fraction": 0.5, "max_malformed": 0},
        **{"max_record_mb": 16, "max_total_mb": 2048, "records": [], "pairs": {}, "ties": "drop", "seed": 0},
    }
    raw = tmp_path / "raw"
    for table in ("demonstrations", "preferences", "gold_preferences"):
        out = ["--table", table, "--out", str(raw / f"{table}.parquet")]
        assert main(["records", "--task", "tldr", "--form", "tldr", "--recipe", json.dumps(records), *out]) == 0
    lengths = {"max_prompt_length": 256, "max_length": 296}  # room for 40 tokens of a summary
    assert prepare(raw, model, tmp_path, truncation="keep_start", **lengths) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert add_up(summary)
    # More than a tenth of three tables has a completion that does not fit.
    fault = "are lost: they have a completion that does not fit; raise tasks.tldr.lengths.max_length."
    assert summary["warnings"] == [
        f"72 of 342 records of demonstrations (21%) {fault}",
        f"241 of 1,154 records of preferences (21%) {fault}",
        f"268 of 597 records of gold_preferences (45%) {fault}",
    ]
    assert {name: table["read"] for name, table in summary["tables"].items()} == {
        **{"demonstrations": 342, "prompts": 342, "preferences": 1154, "gold_preferences": 597},
    }
    assert {name: table["kept"] for name, table in summary["tables"].items()} == {
        **{"demonstrations": 270, "prompts": 325, "preferences": 316, "gold_preferences": 329},
    }
    assert summary["tables"]["preferences"]["dropped"] == {"completion_too_long": 241, "reserved_for_gold": 597}
    # Of 72 long summaries 17 lie outside the training split: their prompts are not used for evaluation.
    assert summary["tables"]["prompts"]["dropped"] == {"reference_too_long": 17}
    tokenizer = load_tokenizer(model)
    eos = tokenizer.eos_token_id
    (suffix_ids,) = encode(tokenizer, [SUFFIX])
    splits = defaultdict(set)
    seen: Counter[str] = Counter()
    for name in TABLES:
        schema = "preferences" if name == "gold_preferences" else name
        for row in read_table(tmp_path / f"{name}.parquet", schema).to_dict("records"):
            prompt_ids = row["prompt_ids"].tolist()
            assert len(prompt_ids) <= 256 and prompt_ids[-len(suffix_ids) :] == suffix_ids
            assert row["prompt"].startswith(tokenizer.decode(prompt_ids[:-20]))
            for side in {"response", "chosen", "rejected"} & row.keys():
                ids = row[f"{side}_ids"].tolist()
                assert len(ids) <= 40 and ids[-1] == eos and eos not in ids[:-1]
                assert tokenizer.decode(ids[:-1]) == row[side]
            splits[row["prompt_id"]].add(f"gold_{row['split']}" if name == "gold_preferences" else row["split"])
            seen[name] += 1
    assert all(len(found) == 1 for found in splits.values())
    assert seen == {name: table["kept"] for name, table in summary["tables"].items()}
