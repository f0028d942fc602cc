"""Prompts and answers of a chat: token ids equal those of TRL's preprocessing, for each of its chat templates."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from prefopt.lm.chat import Chat, Refused, chat_of, exchange
from prefopt.lm.models import load_tokenizer

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[peers]'")
datasets = pytest.importorskip("datasets")

SHARED = Path(__file__).parents[3] / "shared"
TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8") for path in (Path(trl.__file__).parent).glob("chat_templates/*")
}
TEMPLATES.pop("README")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the tokenizers (../shared) are not here"),
]

# Templates that show no answer given as text, since they are of models that see pictures: they are refused.
PICTURES = {"idefics3", "idefics3_training", "smolvlm", "smolvlm_training", "llava_next", "llava_next_training"}
# Templates that refuse a system message.
NO_SYSTEM = {"gemma", "gemma_training"}
# Templates that put no token behind the last answer: there EOS is put, which TRL leaves out.
NO_END = {"glm4moe"}
_CONTROL = re.compile(r"<[|｜]?[^<>\s{}'\"]*[|｜]?>|\[/?[A-Z_]+\]")

QUESTIONS = ("Why is the sky blue?", "And at night:\n\n\tdark?", "Say 'it' in 日本語 🐈 — x < y > z")
ANSWERS = ("Light scatters.", "No light 1234.", "空が 青い")
CHOSEN, REJECTED = "Blue light scatters\nmost.", "I don't know"


@functools.cache
def bare_tokenizer(base: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(SHARED / "tokenizers" / base)


def tokenizer_of(name: str, base: str) -> PreTrainedTokenizerBase:
    """A tokenizer of `shared` with a template and the tokens that it writes, and BOS and EOS of its own."""
    tokenizer = copy.deepcopy(bare_tokenizer(base))
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(_CONTROL.findall(TEMPLATES[name])))})
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def conversation(system: str | None, turns: int) -> list[dict[str, str]]:
    said = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in list(zip(QUESTIONS, ANSWERS, strict=True))[:turns]:
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return said[:-1]


@pytest.fixture(params=["gpt2", "gpt-neox-20b"])
def base(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def prepared(trainer: str, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the preparation of a TRL trainer makes of a data set."""
    own = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    args = SimpleNamespace(
        dataset_text_field="text",
        shuffle_dataset=False,
        dataset_num_proc=None,
        max_length=None,
        truncation_mode="keep_start",
        assistant_only_loss=False,
    )
    made = {"packing": False, "formatting_func": None} if trainer == "SFTTrainer" else {}
    method = getattr(trl, trainer)._prepare_dataset
    found: list[dict[str, Any]] = method(
        own, datasets.Dataset.from_list(rows), tokenizer, args, dataset_name="train", **made
    ).to_list()
    return found


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_ids_masks_and_lengths_equal_those_of_trl(name: str, base: str) -> None:
    tokenizer = tokenizer_of(name, base)
    if name in PICTURES:
        with pytest.raises(Refused, match=r"leaves out|has no attribute"):
            chat_of(tokenizer)
        return
    chat = chat_of(tokenizer)
    prompts = [conversation(None, turns) for turns in (1, 3)]
    for prompt in (conversation("Be brief.", turns) for turns in (1, 3)):
        if name in NO_SYSTEM:
            with pytest.raises(Refused, match="System role not supported"):
                exchange(chat, prompt, [CHOSEN])
        else:
            prompts.append(prompt)
    pairs = [{"prompt": p, "chosen": assistant(CHOSEN), "rejected": assistant(REJECTED)} for p in prompts]
    for prompt, theirs in zip(prompts, prepared("DPOTrainer", tokenizer, pairs), strict=True):
        asked, (chosen, rejected) = exchange(chat, prompt, [CHOSEN, REJECTED])
        assert asked == theirs["prompt_ids"]
        assert (
            asked.count(tokenizer.bos_token_id)
            == asked[:1].count(tokenizer.bos_token_id)
            == ("bos_token" in TEMPLATES[name])
        )
        assert_cut(chat, name, chosen, theirs["chosen_ids"])
        assert_cut(chat, name, rejected, theirs["rejected_ids"])
    rows = [{"prompt": p, "completion": assistant(CHOSEN)} for p in prompts]
    for prompt, theirs in zip(prompts, prepared("SFTTrainer", tokenizer, rows), strict=True):
        asked, (response,) = exchange(chat, prompt, [CHOSEN])
        masked = [place for place, label in enumerate(theirs["labels"]) if label != -100]
        assert masked == list(range(len(asked), len(theirs["input_ids"])))
        assert theirs["input_ids"][: len(asked)] == asked
        assert_cut(chat, name, response, theirs["input_ids"][len(asked) :])


def assert_cut(chat: Chat, name: str, ours: list[int], theirs: list[int]) -> None:
    """Ours are theirs up to the end of the turn; behind it stands a new line, or Phi-3's end of the conversation."""
    if name in NO_END:
        assert ours == [*theirs, chat.tokenizer.eos_token_id] and chat.end is None
        return
    assert chat.end is not None and ours[-1] == chat.end and ours.count(chat.end) == 1
    assert theirs[: len(ours)] == ours
    assert chat.tokenizer.decode(theirs[len(ours) :]) in ("", "\n", "\n</s>")
