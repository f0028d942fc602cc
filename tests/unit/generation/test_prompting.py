"""Examples before a prompt, and stop strings."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from prefopt.errors import UserError
from prefopt.generation.prompting import cut_at_stop, with_shots
from prefopt.lm.models import decode
from prefopt.training.pretrain import train_tokenizer

STOP = ["\n\nHuman:"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["\n\nHuman: yes or no\n\nAssistant: no or yes"] * 3, 300)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    result: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return result


def test_a_completion_ends_before_the_stop_string(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = ids(tokenizer, " yes\n\nHuman: no\n\nAssistant: yes")
    kept, stopped = cut_at_stop(tokenizer, whole, STOP)
    assert stopped and decode(tokenizer, kept) == " yes" and kept == whole[: len(kept)]


def test_a_completion_without_a_stop_string_keeps_its_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = [*ids(tokenizer, " yes\nHuman"), tokenizer.eos_token_id]
    assert cut_at_stop(tokenizer, whole, STOP) == (whole, False)
    assert cut_at_stop(tokenizer, whole, []) == (whole, False)


def test_a_completion_that_begins_with_it_keeps_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    kept, stopped = cut_at_stop(tokenizer, ids(tokenizer, "\n\nHuman: yes"), STOP)
    assert stopped and len(kept) == 1


def table(tokenizer: PreTrainedTokenizerFast) -> pd.DataFrame:
    rows = [("a", "train", " one", "yes"), ("b", "train", " two", "no"), ("c", "test", " three", "?")]
    frame = pd.DataFrame(rows, columns=["prompt_id", "split", "prompt", "reference"])
    frame["prompt_ids"] = [np.array(ids(tokenizer, text)) for text in frame["prompt"]]
    return frame


def test_the_same_examples_come_before_every_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    frame = table(tokenizer)
    test = frame[frame["split"] == "test"]
    asked, cut = with_shots(test, frame, 2, tokenizer, room=1000, seed=0)
    text = decode(tokenizer, asked["prompt_ids"].iloc[0])
    assert text in (" one yes two no three", " two no one yes three") and cut == 0
    assert with_shots(test, frame, 0, tokenizer, room=1, seed=0)[0] is test


def test_what_is_too_long_is_cut_at_the_start(tokenizer: PreTrainedTokenizerFast) -> None:
    frame = table(tokenizer)
    test = frame[frame["split"] == "test"]
    asked, cut = with_shots(test, frame, 2, tokenizer, room=6, seed=0)
    assert cut == 1 and len(asked["prompt_ids"].iloc[0]) == 6
    assert asked["prompt_ids"].iloc[0].tolist()[-2:] == test["prompt_ids"].iloc[0].tolist()[-2:]
    with pytest.raises(UserError, match="3 examples are to come before each prompt, but the training split has 2"):
        with_shots(test, frame, 3, tokenizer, room=1000, seed=0)


def test_bos_comes_once_before_the_examples(tokenizer: PreTrainedTokenizerFast) -> None:
    made = train_tokenizer(["\n\nHuman: yes or no\n\nAssistant: no or yes"] * 3, 300)
    made.add_special_tokens({"bos_token": "<s>"})
    bos = made.bos_token_id
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    frame = table(made)
    frame["prompt_ids"] = [np.array([bos, *ids]) for ids in frame["prompt_ids"]]
    test = frame[frame["split"] == "test"]
    plain = table(tokenizer)
    whole, _ = with_shots(plain[plain["split"] == "test"], plain, 2, tokenizer, room=1000, seed=0)
    asked, cut = with_shots(test, frame, 2, made, room=1000, seed=0)
    assert asked["prompt_ids"].iloc[0].tolist() == [bos, *whole["prompt_ids"].iloc[0].tolist()] and cut == 0
    asked, cut = with_shots(test, frame, 2, made, room=6, seed=0)
    assert asked["prompt_ids"].iloc[0].tolist() == [bos, *whole["prompt_ids"].iloc[0].tolist()[-5:]] and cut == 1


def test_the_examples_are_seeded_training_prompts_without_replacement(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [(f"p{i}", "train" if i % 2 else "test", f" {word}", word) for i, word in enumerate("abcdefghij")]
    frame = pd.DataFrame(rows, columns=["prompt_id", "split", "prompt", "reference"])
    frame["prompt_ids"] = [np.array(ids(tokenizer, text)) for text in frame["prompt"]]
    test = frame[frame["split"] == "test"]
    seen = set()
    for seed in range(6):
        asked, cut = with_shots(test, frame, 3, tokenizer, room=1000, seed=seed)
        chosen = [2 * i + 1 for i in np.random.default_rng(seed).choice(5, size=3, replace=False)]
        before = "".join(f"{rows[i][2]} {rows[i][3]}" for i in chosen)
        texts = [decode(tokenizer, prompt) for prompt in asked["prompt_ids"]]
        assert texts == [f"{before}{prompt}" for prompt in test["prompt"]] and cut == 0
        assert asked["prompt_id"].tolist() == test["prompt_id"].tolist() and asked.index.equals(test.index)
        seen.add(before)
    assert len(seen) > 1
    # What fits exactly is not cut, and the caller's own table stays as it was.
    longest = len(asked["prompt_ids"].iloc[0])
    assert with_shots(test, frame, 3, tokenizer, room=longest, seed=5)[1] == 0
    assert with_shots(test, frame, 3, tokenizer, room=longest - 1, seed=5)[1] == 5
    assert [len(prompt) for prompt in test["prompt_ids"]] == [len(ids(tokenizer, text)) for text in test["prompt"]]


def test_the_first_of_several_stop_strings_cuts(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = ids(tokenizer, " yes or no\n\nAssistant: x\n\nHuman: y")
    for stops in (["\n\nHuman:", "\n\nAssistant:"], ["\n\nAssistant:", "\n\nHuman:"]):
        kept, stopped = cut_at_stop(tokenizer, whole, stops)
        assert stopped and decode(tokenizer, kept) == " yes or no"
