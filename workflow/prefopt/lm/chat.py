"""Conversations as a model's own chat template puts them, and the tokens that end what the model says.

The template is data: transformers renders it in jinja's sandbox, once for each conversation, and the rendered text is
tokenized as a whole and without further special tokens, as TRL does. What of it is the assistant's last turn is found by
rendering the same conversation without that turn.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.lm.continuations import decode_continuation
from prefopt.lm.loading import reason_of
from prefopt.lm.models import decode, encode

Message = Mapping[str, str]  # role and content

# The first of the characters that stand for special tokens in users' texts while a template renders them.
_STAND_INS = 0xF0000
_USER, _ANSWER = "prefopt asks", "prefopt answers"
_THOUGHT = "</think>"


class Refused(ValueError):
    """Why a template does not take a conversation."""


class TextNotKept(Refused):
    """A text holds special tokens, which cannot be kept as text."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template, and what the template does with an assistant's last turn."""

    tokenizer: PreTrainedTokenizerBase
    special: tuple[str, ...]  # special tokens, the longest first
    end: int | None  # the token that ends the turn; None where the template puts none
    opening: str  # what stands before the answer in the turn's decoded tokens, e.g. of an empty thought


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a tokenizer keeps for itself, the longest first."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*added, *map(str, tokenizer.all_special_tokens)} - {""}, key=lambda token: (-len(token), token))


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """A tokenizer's chat, by a conversation of one question and one answer.

    Raises:
        Refused: there is no template, it fails, or it shows no answer.
    """
    if tokenizer.chat_template is None:
        raise Refused("there is none (chat_template of the tokenizer)")
    chat = Chat(tokenizer, tuple(special_tokens(tokenizer)), None, "")
    turns = [{"role": "user", "content": _USER}]
    asked, whole = render(chat, turns, generation=True), render(chat, [*turns, _of_assistant(_ANSWER)])
    before, _, after = whole.rpartition(_ANSWER)
    start, opened, ends = encoded(chat, [asked, before[len(common_start(asked, before)) :], after])
    if start[:2] == [tokenizer.bos_token_id] * 2:
        raise Refused(f"it begins a conversation with {tokenizer.bos_token} twice")
    return dataclasses.replace(chat, end=_end_of_turn(tokenizer, ends), opening=decode(tokenizer, opened).strip())


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end a completion: EOS, the template's end of turn, and those of the generation config.

    What the config names and the tokenizer has as ordinary text (the default of a class, say) ends nothing.
    """
    ends = [tokenizer.eos_token_id]
    if getattr(tokenizer, "chat_template", None) is not None:
        try:
            chat = chat_of(tokenizer)
        except Refused:  # which only who uses the template must know
            chat = None
        ends += [] if chat is None or chat.end is None else [chat.end]
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, list) else [] if named is None else [named]
    ends += [token for token in named if token in tokenizer.added_tokens_decoder]
    return tuple(dict.fromkeys(map(int, ends)))


def keep_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the end tokens into a model's generation config, so that transformers' `generate` ends as sampling here."""
    ends = end_tokens(tokenizer, model)
    if len(ends) > 1 and model.can_generate():
        model.generation_config.eos_token_id = list(ends)


def finish_reason(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], reason: str) -> str:
    """Why a completion ended: "length", "eos", or "end:" and the token where it was another one."""
    if reason != "eos" or ids[-1] == tokenizer.eos_token_id:
        return reason
    return f"end:{tokenizer.convert_ids_to_tokens(int(ids[-1]))}"


def render(chat: Chat, turns: Sequence[Message], *, generation: bool = False) -> str:
    """The text of a conversation, on request with the generation prompt, which begins the assistant's next turn.

    Special tokens in the turns are stand-ins in it (see `encoded`).

    Raises:
        Refused: the template fails on it, or leaves a turn out.
    """
    neutral = [{"role": turn["role"], "content": _with_stand_ins(chat, turn["content"])} for turn in turns]
    try:
        text: str = chat.tokenizer.apply_chat_template(neutral, tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # of the template, which may do anything that jinja's sandbox allows
        raise Refused(reason_of(error)) from error
    for number, turn in enumerate(neutral, start=1):
        content = turn["content"].rpartition(_THOUGHT)[2].strip()  # an earlier thought may be left out
        if content not in text and json.dumps(content)[1:-1] not in text:
            raise Refused(f"it leaves out or changes what turn {number}, of the {turn['role']}, says")
    return text


def encoded(chat: Chat, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts: a special token is one where the template put it, and text where a user did.

    Where a user's text holds one, the template's special tokens and the texts between them are tokenized by themselves,
    if without the user's this gives the same as the whole does.

    Raises:
        TextNotKept: it does not.
    """
    bare = [_without_stand_ins(chat, text) for text in texts]
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    found: list[list[int]] = chat.tokenizer(bare, **options)["input_ids"]
    for place, (text, without) in enumerate(zip(texts, bare, strict=True)):
        if text != without:
            if _in_parts(chat, without) != found[place]:
                raise TextNotKept("it holds special tokens as text, which cannot be told from the template's own")
            found[place] = _in_parts(chat, text)
    return found


def prompt_ids(chat: Chat, turns: Sequence[Message]) -> list[int]:
    """Token ids of a conversation and the generation prompt (errors are those of `render` and `encoded`)."""
    (ids,) = encoded(chat, [render(chat, turns, generation=True)])
    return ids


def exchange(chat: Chat, turns: Sequence[Message], answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt, the same for all its answers, and of each answer as the assistant's turn.

    An answer ends with the token that ends the turn; what the template puts behind it, a new line as a rule, is left out,
    and where the template puts none, EOS is put. Where a conversation with its answer does not begin with the prompt's
    tokens (a template that opens a thought in the generation prompt alone), the answer begins where they part, as in TRL.

    Raises:
        Refused: as `render` and `encoded`; the turns are put otherwise where an answer follows.
    """
    asked, wholes = render(chat, turns, generation=True), [render(chat, [*turns, _of_assistant(a)]) for a in answers]
    alone = len(common_start(render(chat, turns), asked))
    if any(len(common_start(asked, whole)) < alone for whole in wholes):
        raise Refused("it puts the turns before an answer otherwise than the same turns alone")
    first, *rest = encoded(chat, [asked, *wholes])
    start = min(len(common_start(first, ids)) for ids in rest)
    return first[:start], [_ended(chat, ids[start:]) for ids in rest]


def answer_ids(chat: Chat, answer: str) -> list[int]:
    """Token ids of an answer as the assistant's turn, whatever it answers (errors are those of `exchange`)."""
    _, (ids,) = exchange(chat, [{"role": "user", "content": _USER}], [answer])
    return ids


def answer_text(chat: Chat, before: Sequence[int], ids: Sequence[int]) -> str:
    """The answer in an assistant's turn of these tokens, after one space as all completions, if there is one.

    What the template puts before the answer is left out.
    """
    last = chat.tokenizer.eos_token_id if chat.end is None else chat.end  # which need not be a special token
    own = ids[:-1] if len(ids) and ids[-1] == last else ids
    said = decode_continuation(chat.tokenizer, before, own).lstrip()
    answer = said.removeprefix(chat.opening).lstrip()
    return f" {answer}" if answer else ""


def common_start(one: Any, other: Any) -> Any:
    """What two texts, or two lists of tokens, begin with."""
    if other[: len(one)] == one:
        return one
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return one[: sum(1 for _ in pairs)]


def _of_assistant(answer: str) -> Message:
    return {"role": "assistant", "content": answer}


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int | None:
    """The last of the first special tokens that stand together after an answer.

    Command R ends the answer and then the turn, Phi-3 the turn and, on the next line, the conversation.
    """
    special = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    runs = itertools.groupby(ids, key=lambda token: token in special)
    return next((list(run)[-1] for found, run in runs if found), None)


def _ended(chat: Chat, ids: list[int]) -> list[int]:
    last = chat.tokenizer.eos_token_id if chat.end is None else chat.end
    places = [place for place, token in enumerate(ids) if token == last]
    return ids[: places[-1] + 1] if places else [*ids, last]


def _with_stand_ins(chat: Chat, text: str) -> str:
    if not any(token in text for token in chat.special):
        return text
    if _stand_ins(len(chat.special)).search(text):
        raise Refused("a text holds both special tokens and characters for private use")
    return _pattern(chat).sub(lambda match: chr(_STAND_INS + chat.special.index(match[0])), text)


def _without_stand_ins(chat: Chat, text: str) -> str:
    return text if text.isascii() else _stand_ins(len(chat.special)).sub("", text)


@functools.cache
def _stand_ins(count: int) -> re.Pattern[str]:
    return re.compile(f"[{chr(_STAND_INS)}-{chr(_STAND_INS + max(count, 1) - 1)}]")


def _pattern(chat: Chat) -> re.Pattern[str]:
    return re.compile("(" + "|".join(map(re.escape, chat.special)) + ")")


def _in_parts(chat: Chat, text: str) -> list[int]:
    """Token ids of a text, its special tokens and what is between them each by itself; stand-ins are plain text."""
    back = {_STAND_INS + place: token for place, token in enumerate(chat.special)}
    ids: list[int] = []
    for place, part in enumerate(_pattern(chat).split(text)):
        if place % 2:
            ids.append(chat.tokenizer.convert_tokens_to_ids(part))
        elif part:
            ids += encode(chat.tokenizer, [part.translate(back)])[0]
    return ids
