"""Conversations by a chat template: what is trained on, where it ends, and what is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import GenerationConfig, PreTrainedTokenizerBase

from prefopt.lm.chat import (
    Chat,
    Refused,
    TextNotKept,
    answer_ids,
    answer_text,
    chat_of,
    encoded,
    end_tokens,
    exchange,
    finish_reason,
    keep_end_tokens,
    prompt_ids,
    render,
    special_tokens,
)
from prefopt.lm.models import decode, encode, load_tokenizer
from prefopt.training.pretrain import train_tokenizer
from tiny_models import make_model

SHARED = Path(__file__).parents[4] / "shared"
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Gemma's: no system message, turns in order, spaces taken off.
STRICT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen 3's and DeepSeek R1's: an empty thought before the last answer; a thought that the prompt alone opens.
EMPTY_THOUGHT = CHATML.replace(
    "m['content']", "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']"
)
OPEN_THOUGHT = CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
# As Phi-3's: EOS at the end of the conversation, behind the end of the turn.
TWO_ENDS = CHATML.replace("{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add")
# As Command R's: the end of the answer, then that of the turn.
END_OF_ANSWER = CHATML.replace("m['content'] + '<|im_end|>\n'", "m['content'] + '</a><|im_end|>'")
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {
    **{"chatml": CHATML, "strict": STRICT, "empty_thought": EMPTY_THOUGHT, "open_thought": OPEN_THOUGHT},
    **{"two_ends": TWO_ENDS, "end_of_answer": END_OF_ANSWER, "no_end": NO_END},
}
TOKENS = ["<|im_start|>", "<|im_end|>", "<s>", "</a>"]
USER = {"role": "user", "content": "my cat"}


def tokenizer_with(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer(["user assistant system my cat ate the red shoe\n answers"], 300)
    tokenizer.add_special_tokens({"bos_token": "<s>", "extra_special_tokens": TOKENS})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def chat_with(template: str) -> Chat:
    return chat_of(tokenizer_with(template))


def text(chat: Chat, ids: list[int]) -> str:
    whole: str = chat.tokenizer.decode(ids, skip_special_tokens=False)
    return whole


def said(*turns: str) -> list[dict[str, str]]:
    """Turns, each "role: content"."""
    return [{"role": role, "content": content} for role, _, content in (turn.partition(": ") for turn in turns)]


def test_a_prompt_and_its_answers_to_the_end_of_the_turn() -> None:
    chat = chat_with(CHATML)
    prompt, answers = exchange(chat, said("system: be brief", "user: my cat"), ["ate", "the red shoe"])
    assert text(chat, prompt) == (
        "<s><|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nmy cat<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [text(chat, ids) for ids in answers] == ["ate<|im_end|>", "the red shoe<|im_end|>"]
    assert prompt == prompt_ids(chat, said("system: be brief", "user: my cat"))
    assert prompt.count(chat.tokenizer.bos_token_id) == 1 and prompt[0] == chat.tokenizer.bos_token_id
    # One tokenization of the whole, as transformers' own.
    whole = chat.tokenizer.apply_chat_template(said("system: be brief", "user: my cat", "assistant: ate"))["input_ids"]
    assert whole[: len(prompt) + len(answers[0])] == prompt + answers[0]


@pytest.mark.parametrize(
    ("name", "end", "answer"),
    [
        ("chatml", "<|im_end|>", "ate<|im_end|>"),
        ("strict", "<|im_end|>", "ate<|im_end|>"),
        ("empty_thought", "<|im_end|>", "<think>\n\n</think>\n\nate<|im_end|>"),
        ("open_thought", "<|im_end|>", "ate<|im_end|>"),
        ("two_ends", "<|im_end|>", "ate<|im_end|>"),
        ("end_of_answer", "<|im_end|>", "ate</a><|im_end|>"),
        ("no_end", None, " ate\n<|endoftext|>"),  # of one token with the space at the prompt's end
    ],
)
def test_where_an_answer_ends(name: str, end: str | None, answer: str) -> None:
    chat = chat_with(TEMPLATES[name])
    assert (None if chat.end is None else chat.tokenizer.convert_ids_to_tokens(chat.end)) == end
    prompt, (ids,) = exchange(chat, [USER], ["ate"])
    assert text(chat, ids) == answer
    assert answer_text(chat, prompt, ids) == (" ate" if end else " ate\n")
    assert answer_text(chat, prompt, ids[-1:]) == ""
    assert answer_ids(chat, "ate") == ids, "whatever it answers"
    ends = end_tokens(chat.tokenizer, make_model("llama", engine=False))
    eos = chat.tokenizer.eos_token_id
    assert ends == ((eos,) if chat.end is None else (eos, chat.end))


def test_an_answer_that_was_cut_is_whole_and_an_end_that_is_no_special_token_is_none_of_it() -> None:
    tokenizer = tokenizer_with(CHATML.replace("<|im_end|>", "<end>"))
    tokenizer.add_tokens(["<end>"])
    chat = chat_of(tokenizer)
    prompt, (ids,) = exchange(chat, [USER], ["the red shoe"])
    assert text(chat, ids) == "the red shoe<end>" and "<end>" not in special_tokens(tokenizer)
    assert answer_text(chat, prompt, ids) == answer_text(chat, prompt, ids[:-1]) == " the red shoe"
    assert answer_text(chat, prompt, []) == ""


def test_a_generation_prompt_that_an_answer_does_not_follow_is_no_part_of_the_prompt() -> None:
    chat = chat_with(OPEN_THOUGHT)
    prompt, _ = exchange(chat, [USER], ["ate", "the"])
    assert text(chat, prompt).endswith("<|im_start|>assistant\n")
    assert text(chat, prompt_ids(chat, [USER])) == text(chat, prompt) + "<think>\n"


NASTY: list[tuple[str, list[dict[str, str]], str, str]] = [
    # A template, a conversation with its answer, and what the model reads; or, after "!", why it is refused.
    ("chatml", said("user: "), "ate", "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n|ate<|im_end|>"),
    ("chatml", said("user: my cat"), "", "<|im_start|>user\nmy cat<|im_end|>\n<|im_start|>assistant\n|<|im_end|>"),
    (
        "strict",
        said("user:   my cat \n\n"),
        "ate",
        "<|im_start|>user\nmy cat<|im_end|>\n<|im_start|>assistant\n|ate<|im_end|>",
    ),
    ("strict", said("system: be brief", "user: my cat"), "ate", "!System role not supported"),
    ("strict", said("user: my cat", "assistant: ate"), "the", "!Conversation roles must alternate"),
    ("strict", said("user: my", "user: cat"), "ate", "!Conversation roles must alternate"),
    ("strict", said("assistant: my cat"), "ate", "!Conversation roles must alternate"),
    (
        "chatml",
        said("user: my cat", "assistant: ate"),
        "the",
        "<|im_start|>user\nmy cat<|im_end|>\n<|im_start|>assistant\nate<|im_end|>\n<|im_start|>assistant\n|the<|im_end|>",
    ),
    (
        "chatml",
        said("user: my cat", "tool: the shoe"),
        "ate",
        "<|im_start|>user\nmy cat<|im_end|>\n<|im_start|>tool\nthe shoe<|im_end|>\n<|im_start|>assistant\n|ate<|im_end|>",
    ),
    ("strict", said("user: my cat", "tool: the shoe", "tool: red"), "ate", "!Conversation roles must alternate"),
    (
        "chatml",
        said('user: my "cat"\nate'),
        '"the"\nshoe',
        '<|im_start|>user\nmy "cat"\nate<|im_end|>\n<|im_start|>assistant\n|"the"\nshoe<|im_end|>',
    ),
]


@pytest.mark.parametrize(("name", "turns", "answer", "expected"), NASTY)
def test_nasty_conversations_are_right_or_refused_by_name(
    name: str, turns: list[dict[str, str]], answer: str, expected: str
) -> None:
    chat = chat_with(TEMPLATES[name])
    if expected.startswith("!"):
        with pytest.raises(Refused) as error:
            exchange(chat, turns, [answer])
        assert str(error.value) == expected[1:]
        return
    prompt, (ids,) = exchange(chat, turns, [answer])
    assert text(chat, prompt) + "|" + text(chat, ids) == "<s>" + expected


def test_a_template_that_leaves_a_turn_out_is_refused() -> None:
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    with pytest.raises(Refused, match=r"^it leaves out or changes what turn 2, of the tool, says$"):
        exchange(chat_with(silent), said("user: my cat", "tool: the shoe"), ["ate"])
    parts = CHATML.replace("m['content']", "m['content'][0]['text']")
    with pytest.raises(Refused, match="has no attribute 'text'"):
        chat_with(parts)


def test_a_template_that_puts_earlier_turns_otherwise_is_refused() -> None:
    counting = "{{ messages | length }}" + CHATML
    with pytest.raises(Refused, match="puts the turns before an answer otherwise than the same turns alone"):
        exchange(chat_with(counting), [USER], ["ate"])


def test_templates_that_do_not_serve() -> None:
    for template, problem in (
        (None, "there is none"),
        ("{{ bos_token }}" + CHATML, "it begins a conversation with <s> twice"),
        (
            "{% for m in messages %}{{ m['role'] }}{% endfor %}",
            "it leaves out or changes what turn 1, of the user, says",
        ),
        ("{{ nothing.there }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__' of 'str' object is unsafe"),
    ):
        with pytest.raises(Refused) as error:
            chat_with(template)  # type: ignore[arg-type]
        assert problem in str(error.value)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>", "<s>", "</a>"])
def test_special_tokens_in_a_users_text_stay_text(token: str) -> None:
    chat = chat_with(CHATML)
    plain, (bare,) = exchange(chat, said("user: my cat"), ["ate"])
    for turns, answer in ((said(f"user: my {token} cat{token}"), "ate"), (said("user: my cat"), f"{token}ate {token}")):
        prompt, (ids,) = exchange(chat, turns, [answer])
        special = set(chat.tokenizer.all_special_ids)
        for found, expected in ((prompt, plain), (ids, bare)):
            assert [i for i in found if i in special] == [i for i in expected if i in special]
        assert text(chat, prompt) == text(chat, plain).replace("my cat", turns[0]["content"])
        assert text(chat, ids) == answer + "<|im_end|>"
        assert answer_ids(chat, answer) == ids


def test_a_text_that_cannot_be_told_from_the_template() -> None:
    chat = chat_with(CHATML)
    with pytest.raises(Refused, match="characters for private use"):
        prompt_ids(chat, said("user: \U000f0001 <s>"))
    assert prompt_ids(chat, said("user: \U000f0001")), "these alone are taken"
    # Where a tokenizer takes spaces off behind its special tokens, the parts differ from the whole.
    tokenizer = tokenizer_with(CHATML.replace("'\n' + m['content']", "' ' + m['content']"))
    tokenizer.add_tokens([AddedToken("user", rstrip=True, special=True)], special_tokens=True)
    odd = chat_of(tokenizer)
    with pytest.raises(TextNotKept, match="cannot be told from the template's own"):
        exchange(odd, said("user: my <s> cat"), ["ate"])


def test_the_ends_of_a_model(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML)
    eos, end, other = tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|im_end|>", "</a>"])
    model: Any = copy.copy(make_model("llama", engine=False))
    for named, expected in ((None, []), (eos, []), (other, [other]), ([other, end, eos], [other])):
        model.generation_config = GenerationConfig(eos_token_id=named)
        assert end_tokens(tokenizer, model) == (eos, end, *expected)
    # A letter that a class names by default ends nothing.
    model.generation_config = GenerationConfig(eos_token_id=40)
    assert end_tokens(tokenizer, model) == (eos, end)
    keep_end_tokens(model, tokenizer)
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [eos, end]
    tokenizer.chat_template = None
    model.generation_config = GenerationConfig(eos_token_id=40)
    keep_end_tokens(model, tokenizer)
    assert end_tokens(tokenizer, model) == (eos,) and model.generation_config.eos_token_id == 40


def test_which_token_ended_a_completion() -> None:
    tokenizer = tokenizer_with(CHATML)
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert finish_reason(tokenizer, [5, eos], "eos") == "eos"
    assert finish_reason(tokenizer, [5, end], "eos") == "end:<|im_end|>"
    assert finish_reason(tokenizer, [5, 6], "length") == "length"


def test_what_is_rendered_without_special_tokens_in_texts_is_the_text_itself() -> None:
    chat = chat_with(CHATML)
    rendered = render(chat, [USER], generation=True)
    assert rendered == "<s><|im_start|>user\nmy cat<|im_end|>\n<|im_start|>assistant\n"
    assert encoded(chat, [rendered]) == [prompt_ids(chat, [USER])]
    assert decode(chat.tokenizer, prompt_ids(chat, [USER])) == "user\nmy cat\nassistant\n"
    assert special_tokens(chat.tokenizer) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</a>", "<s>"]
    assert not set(encode(chat.tokenizer, [rendered])[0]) & set(chat.tokenizer.all_special_ids)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the tokenizers (../shared) are not here")
def test_the_ids_of_the_documentation() -> None:
    tokenizer = load_tokenizer(SHARED / "tokenizers" / "gpt2")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML.removeprefix("{{ bos_token }}")
    turns = said("system: Be brief.", "user: Is <|im_end|> a word?")
    prompt, (chosen, rejected) = exchange(chat_of(tokenizer), turns, ["No.", "It is."])
    page = (Path(__file__).parents[3] / "docs" / "chat.md").read_text(encoding="utf-8")
    for name, ids in {"prompt": prompt, "chosen": chosen, "rejected": rejected}.items():
        assert f"| {name} | {' '.join(map(str, ids))} |\n" in page
