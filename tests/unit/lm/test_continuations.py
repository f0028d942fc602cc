"""Prompt and completion are tokenized apart, and together they are the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sentencepiece
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from prefopt.data.prefixes import PrefixesRecipe, split_reviews
from prefopt.data.prepare import PrepareRecipe, encode_completions, encode_prompts
from prefopt.generation.sample import SampleRecipe, sample_rows
from prefopt.judging.reward_model import completion_ids
from prefopt.lm import continuations
from prefopt.lm.continuations import decode_continuation, encode_continuations
from prefopt.lm.models import beginning, decode, encode, load_tokenizer, tokenizer_hash
from prefopt.lm.verify import use_engine
from prefopt.runtime.usage import Usage
from prefopt.training.pretrain import train_tokenizer

SHARED = Path(__file__).parents[4] / "shared"
SUFFIX = "\n\nTL;DR:"
TEXTS = [" a good dog", "a good dog", "\n\ntwo lines", ") done", "  two spaces", "", "caf\u00e9 \U0001f408"]
RECIPE = PrepareRecipe(
    **{
        "max_prompt_length": 30,
        "max_length": 60,
        "truncation": "keep_start",
        "suffix": SUFFIX,
        "evaluation_only": False,
    },
    **{"style": None, "system": None, "new_suffix": None},  # type: ignore[arg-type]
)


def sentencepiece_folder(folder: Path, **options: object) -> Path:
    """A model folder with a tokenizer of sentencepiece's kind, as Llama 2's is."""
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text("\n".join(f"title {i} my good dog ate number {i} red shoes; TL;DR: a good dog" for i in range(200)))
    common = {"model_type": "bpe", "byte_fallback": True, "character_coverage": 1.0, "vocab_size": 360}
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    as_is = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), **{**common, **ids, **as_is, **options}
    )
    text.unlink()
    LlamaConfig(vocab_size=360).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """It puts a space before every text."""
    return load_tokenizer(sentencepiece_folder(tmp_path_factory.mktemp("spm") / "m"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """It does not."""
    return load_tokenizer(sentencepiece_folder(tmp_path_factory.mktemp("spm") / "m", add_dummy_prefix=False))


@pytest.fixture(scope="module")
def bytes_(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return train_tokenizer(["title my good dog ate 1 red shoes; TL;DR: a good dog\n\n\n\n"] * 3, 300)


@pytest.fixture(params=["llama", "gemma", "bytes_", "models/stories260K", "tokenizers/gpt2", "tokenizers/gpt-neox-20b"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if "/" not in request.param:
        made: PreTrainedTokenizerBase = request.getfixturevalue(request.param)
        return made
    if not SHARED.is_dir():
        pytest.skip("the tokenizers (../shared) are not here")
    return load_tokenizer(SHARED / request.param)


@pytest.mark.parametrize("before", ["title 7 my dog", "ends with a line\n", "x", "ends:"])
def test_together_they_are_the_text(tokenizer: PreTrainedTokenizerBase, before: str) -> None:
    (start,) = encode(tokenizer, [before])
    for text, ids in zip(TEXTS, encode_continuations(tokenizer, TEXTS), strict=True):
        # The tokenizer of stories260K keeps one of several spaces, and none at the end of a text.
        wanted = text.replace("  ", " ") if "stories260K" in tokenizer.name_or_path else text
        assert decode(tokenizer, [*start, *ids]).removeprefix(decode(tokenizer, start)) == wanted
        assert decode_continuation(tokenizer, start, ids) == wanted
        assert decode_continuation(tokenizer, start[-1:], ids) == wanted


def test_a_tokenizer_that_adds_nothing_is_left_alone(
    gemma: PreTrainedTokenizerBase, bytes_: PreTrainedTokenizerBase
) -> None:
    for each in (gemma, bytes_):
        assert encode_continuations(each, TEXTS) == encode(each, TEXTS)


@pytest.mark.parametrize("merged", [None, "a a", "a\n", "a)"])
def test_a_tokenizer_adds_something_if_it_does_so_anywhere(merged: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of single characters, one pair of which may be one token."""

    def encode(tokenizer: None, texts: Sequence[str]) -> list[list[int]]:
        return [[0] if text == merged else [ord(letter) for letter in text] for text in texts]

    monkeypatch.setattr(continuations, "encode", encode)
    assert continuations._adds_something(None) == (merged is not None)


def test_prompt_suffix_and_completion_have_the_spaces_of_the_text(llama: PreTrainedTokenizerBase) -> None:
    assert encode(llama, ["dog"]) != encode_continuations(llama, ["dog"])
    prompts = ["title 3 my dog" + SUFFIX, "no suffix"]
    encoded = encode_prompts(llama, prompts, RECIPE)
    completions = encode_completions(llama, [" a good dog", "\na dog"])
    for prompt in prompts:
        for text, ids in completions.items():
            assert llama.decode([*encoded[prompt].ids, *ids[:-1]]) == prompt + text
            assert ids[-1] == llama.eos_token_id == 2
    assert completion_ids(llama, "a good dog") == completions[" a good dog"]


def test_a_review_and_its_prefix(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "my good dog ate 7 red shoes; a good dog ate a dog"
    recipe = PrefixesRecipe(min_prefix=2, max_prefix=6, max_length=200)
    rows = [{"review_id": f"r{i}", "text": text, "label": 1, "split": "train"} for i in range(20)]
    kept, _, _ = split_reviews(tokenizer, rows, recipe)
    assert len({len(row["prompt_ids"]) for row in kept}) > 2
    for row in kept:
        assert row["prompt"] + row["response"] == text
        assert decode_continuation(tokenizer, row["prompt_ids"], row["response_ids"]) == row["response"]


def test_half_a_character_before_a_completion(bytes_: PreTrainedTokenizerBase) -> None:
    (ids,) = encode(bytes_, ["\U0001f408 dog"])
    assert decode_continuation(bytes_, ids[:1], ids[1:]) == decode(bytes_, ids[1:])
    assert decode_continuation(bytes_, [], ids) == "\U0001f408 dog"


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Byte-level, and its own call begins with <s>, as Llama 3's does."""
    folder = tmp_path_factory.mktemp("bos")
    made = train_tokenizer(["title my good dog ate 1 red shoes; TL;DR: a good dog"] * 3, 300)
    made.add_special_tokens({"bos_token": "<s>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    made.save_pretrained(folder)
    return load_tokenizer(folder)


def test_a_prompt_begins_with_bos_once(with_bos: PreTrainedTokenizerBase, bytes_: PreTrainedTokenizerBase) -> None:
    bos = with_bos.bos_token_id
    assert beginning(with_bos) == [bos] and beginning(bytes_) == []
    text = "my good dog" + SUFFIX
    ids, cut = encode_prompts(with_bos, [text], RECIPE)[text]
    assert ids[0] == bos and ids.count(bos) == 1 and not cut
    assert ids == with_bos("my good dog")["input_ids"] + encode(with_bos, [SUFFIX])[0]
    # It takes a token of the prompt's room, and is never cut.
    long = "my good dog " * 30 + SUFFIX
    for truncation in ("keep_start", "keep_end"):
        recipe = PrepareRecipe(**{**vars(RECIPE), "truncation": truncation})
        ids, cut = encode_prompts(with_bos, [long], recipe)[long]
        assert len(ids) == 30 and ids[0] == bos and ids.count(bos) == 1 and cut
    (completion,) = encode_completions(with_bos, [" a good dog"]).values()
    assert bos not in completion
    rows = [{"review_id": "r", "text": "my good dog ate 7 red shoes; a good dog", "label": 1, "split": "train"}]
    (row,), _, _ = split_reviews(with_bos, rows, PrefixesRecipe(min_prefix=3, max_prefix=3, max_length=9))
    assert row["prompt_ids"][0] == bos and len(row["prompt_ids"]) == 4 and len(row["response_ids"]) == 5
    assert row["prompt"] + row["response"] == decode(with_bos, with_bos(rows[0]["text"])["input_ids"][:9])


def test_what_a_tokenizer_begins_and_ends_with_is_part_of_its_hash(
    with_bos: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    first = tokenizer_hash(with_bos.name_or_path)
    assert first.endswith(f", BOS {with_bos.bos_token_id}, EOS 0")
    other = load_tokenizer(with_bos.name_or_path)
    other.eos_token = "<s>"
    other.save_pretrained(tmp_path / "eos")
    assert (tmp_path / "eos" / "tokenizer.json").is_file()
    assert tokenizer_hash(tmp_path / "eos") == first.replace("EOS 0", f"EOS {with_bos.bos_token_id}")
    other = load_tokenizer(with_bos.name_or_path)
    other.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    other.save_pretrained(tmp_path / "bos")
    assert tokenizer_hash(tmp_path / "bos").endswith(", BOS none, EOS 0")


def test_a_tokenizer_is_the_same_in_other_files(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A base's own files, and the tokenizer.json that is written beside a model that was trained from it."""
    if not tokenizer.name_or_path:
        tokenizer.save_pretrained(tmp_path / "base")
        tokenizer = load_tokenizer(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_hash(tmp_path / "saved") == tokenizer_hash(tokenizer.name_or_path)


def test_the_text_of_a_sample_keeps_its_first_space(llama: PreTrainedTokenizerBase) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = use_engine(LlamaForCausalLM(LlamaConfig(vocab_size=360, **shape)).eval())
    (start,) = encode(llama, ["title 7 my dog"])
    prompts = pd.DataFrame({"prompt_id": ["p"], "split": ["test"], "prompt_ids": [np.array(start)]})
    counts = {"train_prompts": 0, "validation_prompts": 0, "test_prompts": 1, "max_new_tokens": 5, "n": 60}
    recipe = SampleRecipe(temperatures=(1.0,), stop=(), token_budget=512, dtype="float32", seed=0, vllm=None, **counts)
    rows = sample_rows(model, llama, prompts, "sft", recipe, Usage("test", torch.device("cpu"), "float32"))
    for row in rows:
        assert "title 7 my dog" + row["text"] == decode(llama, [*start, *row["token_ids"]])
    assert any(row["text"].startswith(" ") for row in rows)
