from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.errors import UserError
from prefopt.judging import accuracy, reward_model
from prefopt.judging.judge import Comparison
from prefopt.judging.reward_model import RewardModelJudge, completion_ids, load_judge
from prefopt.lm.batching import Row
from prefopt.lm.models import new_scorer, save_model, tokenizer_hash
from prefopt.runtime.usage import Usage
from prefopt.store.tables import read_table, write_table

EOS = 0


class Characters:
    """A tokenizer with a token a character."""

    eos_token_id = EOS

    def __call__(self, texts: list[str], **options: bool) -> dict[str, list[list[int]]]:
        assert not options["add_special_tokens"]
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Replaces the model: a completion's score is its largest token id. Returns the rows that were scored."""
    seen: list[Row] = []

    def score_rows(model: Any, rows: Sequence[Row], token_budget: int) -> torch.Tensor:
        assert len({len(row.completions) for row in rows}) == 1
        seen.extend(rows)
        return torch.tensor([[float(max(c)) for c in row.completions] for row in rows])

    monkeypatch.setattr(reward_model, "score_rows", score_rows)
    return seen


def judge(limit: int | None = None, **accuracy: Any) -> RewardModelJudge:
    model: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=limit))
    tokenizer: Any = Characters()
    usage = Usage("judge", torch.device("cpu"), "float32")
    prompt_ids = {"p": [5, 6, 7], "q": [8]}
    return RewardModelJudge(model, tokenizer, "abcdef0123456789", prompt_ids, 100, accuracy, usage)


def test_the_higher_score_wins_and_equal_scores_tie(scored: list[Row]) -> None:
    comparisons = [
        Comparison("p", "", "", " ab", " abc"),
        Comparison("p", "", "", " abc", " ab"),
        Comparison("p", "", "", " ba", " ab"),
        Comparison("q", "", "", " z", " a"),
    ]
    verdicts = judge().compare(comparisons)
    assert [v.winner for v in verdicts] == ["second", "first", "tie", "first"]
    assert verdicts[0].reply == "first 98, second 99"


def test_each_text_is_scored_once_after_its_prompt_and_ends_with_eos(scored: list[Row]) -> None:
    judge().compare([Comparison("p", "", "", "ab", f" {letter}") for letter in "xyzzy"])
    (row,) = scored
    assert list(row.prompt) == [5, 6, 7]
    assert len(row.completions) == 4
    assert all(completion[0] == ord(" ") and completion[-1] == EOS for completion in row.completions)


def test_equal_texts_are_scored_once_whatever_spaces_stand_around_them_and_tie(scored: list[Row]) -> None:
    (verdict,) = judge().compare([Comparison("p", "", "", " ab", "ab\n")])
    assert [len(row.completions) for row in scored] == [1] and verdict.winner == "tie"


def test_texts_are_cut_to_the_models_length_and_keep_eos(scored: list[Row]) -> None:
    made = judge(limit=7)
    made.compare([Comparison("p", "", "", " abcdef", " a")])
    assert [len(c) for c in scored[0].completions] == [4, 3]
    assert list(scored[0].completions[0]) == [ord(" "), ord("a"), ord("b"), EOS]
    assert made.report()["texts_cut_to_fit"] == 1


def test_a_score_that_is_no_number_gives_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        reward_model, "score_rows", lambda model, rows, budget: torch.full((len(rows), 2), float("nan"))
    )
    (verdict,) = judge().compare([Comparison("p", "", "", " a", " b")])
    assert verdict.winner == "invalid"


def test_an_unknown_prompt_is_refused(scored: list[Row]) -> None:
    with pytest.raises(UserError, match="lacks prompt 'r'"):
        judge().compare([Comparison("r", "", "", " a", " b")])


def test_the_name_begins_with_the_kind() -> None:
    assert judge().name == "reward_model:abcdef012345"


def test_a_completion_has_one_leading_space_and_eos() -> None:
    tokenizer: Any = Characters()
    for text in ("ab", " ab", "  ab\n"):
        assert completion_ids(tokenizer, text) == [32, 97, 98, EOS]
    assert completion_ids(tokenizer, " ") == [EOS]


def test_a_trained_judge_from_files(tmp_path: Path) -> None:
    """The whole path with a tiny Llama: tables, tokenizer, scores; each sample against itself is a tie."""
    torch.manual_seed(0)
    pieces = Tokenizer(BPE({c: i for i, c in enumerate(["<eos>", *sorted(ByteLevel.alphabet())])}, []))
    pieces.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    save_model(tmp_path / "base", LlamaForCausalLM(config), tokenizer, {})
    scorer, _ = new_scorer(tmp_path / "base", seed=1)
    gold = tmp_path / "gold"
    save_model(gold, scorer, tokenizer, {})
    expected = {"tokenizer_hash": tokenizer_hash(gold)}
    row = {"prompt_id": "p", "prompt": "ab", "prompt_ids": [65, 66], "facts": ""}
    pair = {**row, "chosen": "c", "rejected": "d", "source": "", "chosen_ids": [70, 0], "rejected_ids": [71, 9, 0]}
    del pair["facts"]
    pair_rows = [{**pair, "pair_id": f"{split}{i}", "split": split} for split in ("train", "test") for i in range(3)]
    write_table(tmp_path / "pairs.parquet", "preferences", pair_rows, **expected)
    prompt = {**row, "reference": "ef", "split": "test"}
    write_table(tmp_path / "prompts.parquet", "prompts", [prompt], **expected)
    prompts = read_table(tmp_path / "prompts.parquet", "prompts")

    recipe = json.dumps({"token_budget": 64, "confidence": 0.9})
    measured = tmp_path / "accuracy.parquet"
    paths = {"gold_model": gold, "gold_data": tmp_path / "pairs.parquet", "out": measured}
    accuracy.run(argparse.Namespace(**paths, recipe=recipe))
    table = read_table(measured, "held_out_scores")
    assert table["pair_id"].tolist() == ["test0", "test1", "test2"]
    assert table[["chosen_tokens", "rejected_tokens"]].to_numpy().tolist() == [[2, 3]] * 3

    made = load_judge(gold, measured, prompts, token_budget=64)
    assert made.report()["n_held_out"] == 3
    assert made.report()["longer_wins_accuracy"] == 0.0
    assert made.report()["judge_accuracy"] == float(table.at[0, "chosen_score"] > table.at[0, "rejected_score"])
    forward, backward, same = made.compare(
        [Comparison("p", "", "", *texts) for texts in ((" ef", " gh"), (" gh", " ef"), (" ef", "ef"))]
    )
    assert {forward.winner, backward.winner} == {"first", "second"}
    assert same.winner == "tie"

    chats = write_table(tmp_path / "chats.parquet", "prompts", [prompt], **expected, style="chat")
    assert chats["style"] == "chat"
    with pytest.raises(UserError, match="was trained on plain prompts and the policies on chat ones"):
        load_judge(gold, measured, read_table(tmp_path / "chats.parquet", "prompts"), 64)
    other, _ = new_scorer(tmp_path / "base", seed=2)
    save_model(tmp_path / "other", other, tokenizer, {})
    with pytest.raises(UserError, match=r"accuracy\.parquet was made with weights_hash"):
        load_judge(tmp_path / "other", measured, prompts, 64)
    write_table(tmp_path / "prompts.parquet", "prompts", [prompt], tokenizer_hash="other")
    with pytest.raises(UserError, match="another tokenizer"):
        load_judge(gold, measured, read_table(tmp_path / "prompts.parquet", "prompts"), 64)
    write_table(tmp_path / "pairs.parquet", "preferences", pair_rows[:3], **expected)
    with pytest.raises(UserError, match="no comparison in the split 'test'"):
        accuracy.run(argparse.Namespace(**paths, recipe=recipe))
    write_table(tmp_path / "pairs.parquet", "preferences", pair_rows, tokenizer_hash="other")
    with pytest.raises(UserError, match="tokenizer"):
        accuracy.run(argparse.Namespace(**paths, recipe=recipe))
