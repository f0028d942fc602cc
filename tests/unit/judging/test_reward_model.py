from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.errors import UserError
from prefopt.judging import reward_model
from prefopt.judging.judge import Comparison
from prefopt.judging.reward_model import RewardModelJudge, completion_ids, held_out_accuracy, load_judge
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


def pairs(rows: Sequence[tuple[list[int], list[int]]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"prompt_id": f"p{i}", "prompt_ids": np.array([1]), "chosen_ids": np.array(c), "rejected_ids": np.array(r)}
            for i, (c, r) in enumerate(rows)
        ]
    )


def test_accuracy_on_held_out_pairs_by_hand(scored: list[Row]) -> None:
    right_and_longer, wrong_and_equal = ([9, 1, EOS], [2, EOS]), ([2, EOS], [9, EOS])
    tie_and_shorter = ([3, EOS], [3, 1, EOS])
    table = pairs([right_and_longer] * 7 + [wrong_and_equal] * 2 + [tie_and_shorter])
    facts = held_out_accuracy(torch.nn.Identity(), table, 100)
    assert facts["judge_accuracy"] == pytest.approx(0.75)  # (7 + 1/2) / 10
    assert facts["longer_wins_accuracy"] == pytest.approx(0.8)  # (7 + 2/2) / 10
    assert facts["n_held_out"] == 10
    assert facts["judge_accuracy_low"] < 0.5 < 0.75 < facts["judge_accuracy_high"]
    assert facts["interpretable"] is False


def test_enough_right_answers_make_it_interpretable_and_a_wrong_judge_is_told_from_chance(
    scored: list[Row],
) -> None:
    right, wrong = ([9, EOS], [2, EOS]), ([2, EOS], [9, EOS])
    good = held_out_accuracy(torch.nn.Identity(), pairs([right] * 70 + [wrong] * 30), 100)
    assert (good["judge_accuracy_low"], good["judge_accuracy_high"]) == pytest.approx((0.604, 0.781), abs=1e-3)
    assert good["interpretable"] is True
    bad = held_out_accuracy(torch.nn.Identity(), pairs([wrong] * 70 + [right] * 30), 100)
    assert bad["judge_accuracy_high"] < 0.5 and bad["interpretable"] is False


def test_a_judge_that_is_not_surely_better_than_the_longer_one_wins_is_not_interpretable(scored: list[Row]) -> None:
    right_and_longer, right_and_shorter = ([9, 1, EOS], [2, EOS]), ([9, EOS], [2, 1, EOS])
    wrong_and_longer, wrong_and_shorter = ([2, 1, EOS], [9, EOS]), ([2, EOS], [9, 1, EOS])
    # Of a hundred pairs the judge alone is right in the second number, the longer one alone in the third.
    for counts, interpretable in (((50, 20, 12, 18), False), ((50, 20, 3, 27), True), ((62, 8, 0, 30), True)):
        kinds = (right_and_longer, right_and_shorter, wrong_and_longer, wrong_and_shorter)
        rows = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
        facts = held_out_accuracy(torch.nn.Identity(), pairs(rows), 100)
        assert facts["judge_accuracy"] == pytest.approx(0.7)
        assert facts["longer_wins_accuracy"] == pytest.approx((counts[0] + counts[2]) / 100)
        assert facts["judge_accuracy_low"] == pytest.approx(0.604, abs=1e-3)
        assert facts["interpretable"] is interpretable
        assert (facts["n_needed"] > 100) is not interpretable


def test_how_many_held_out_pairs_would_tell(scored: list[Row]) -> None:
    """Of equally long texts, of which the longer one is a coin: z^2 p (1 - p) / (p - 1/2)^2 = 380 for p = 0.55."""
    right, wrong = ([9, EOS], [2, EOS]), ([2, EOS], [9, EOS])
    few = held_out_accuracy(torch.nn.Identity(), pairs([right] * 110 + [wrong] * 90), 100)
    assert few["interpretable"] is False
    assert few["n_needed"] == pytest.approx(380, rel=0.05)
    for times, enough in ((0.9, False), (1.1, True)):
        some = pairs([right] * round(0.55 * 380 * times) + [wrong] * round(0.45 * 380 * times))
        assert held_out_accuracy(torch.nn.Identity(), some, 100)["interpretable"] is enough
    assert held_out_accuracy(torch.nn.Identity(), pairs([right, wrong]), 100)["n_needed"] is None


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

    made = load_judge(gold, tmp_path / "pairs.parquet", prompts, token_budget=64)
    assert made.report()["n_held_out"] == 3
    assert made.report()["longer_wins_accuracy"] == 0.0
    assert made.report()["judge_accuracy"] in (0.0, 1.0)
    forward, backward, same = made.compare(
        [Comparison("p", "", "", *texts) for texts in ((" ef", " gh"), (" gh", " ef"), (" ef", "ef"))]
    )
    assert {forward.winner, backward.winner} == {"first", "second"}
    assert same.winner == "tie"

    write_table(tmp_path / "pairs.parquet", "preferences", pair_rows[:3], **expected)
    with pytest.raises(UserError, match="no comparison in the split 'test'"):
        load_judge(gold, tmp_path / "pairs.parquet", prompts, token_budget=64)
    write_table(tmp_path / "prompts.parquet", "prompts", [prompt], tokenizer_hash="other")
    write_table(tmp_path / "pairs.parquet", "preferences", pair_rows, **expected)
    with pytest.raises(UserError, match="another tokenizer"):
        load_judge(gold, tmp_path / "pairs.parquet", read_table(tmp_path / "prompts.parquet", "prompts"), 64)
