"""Records as conversations of the base's chat template: token ids of what is asked and of each answer."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.data.formats.hh import ASSISTANT, HUMAN
from prefopt.data.special_tokens import REASON
from prefopt.errors import UserError
from prefopt.lm.chat import Chat, Message, Refused, TextNotKept, exchange, prompt_ids
from prefopt.runtime.progress import Progress

logger = logging.getLogger(__name__)

REFUSED, TOO_LONG = "refused_by_template", "prompt_too_long"
# More than this share of a table is no accident.
_MOST = 0.1
_TURN = re.compile(f"({HUMAN}|{ASSISTANT})")
_ROLES = {HUMAN: "user", ASSISTANT: "assistant"}


class Tokens(NamedTuple):
    """A record's token ids, and whether its prompt lost something."""

    prompt: list[int]
    cut: bool
    completions: list[list[int]]


def turns_of(row: Mapping[Any, Any], suffix: str, system: str | None) -> list[Message]:
    """The turns of a record's prompt: its messages, an HH dialogue's turns, or one user's turn of its text.

    Args:
        row: of a raw table.
        suffix: the tail of the task's plain prompts, which stands in no turn.
        system: a system message for conversations without one.
    """
    turns: list[Message] = json.loads(row["messages"]) if row["messages"] else _of_text(row["prompt"], suffix)
    if system is None or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": system}, *turns]


def tokenize_conversations(
    chat: Chat,
    rows: Sequence[Mapping[Any, Any]],
    key: str,
    sides: Sequence[str],
    *,
    suffix: str,
    system: str | None,
    longest: int,
    path: Path,
) -> list[Tokens | str]:
    """Token ids of each row, or the reason for which it is dropped.

    A prompt that is too long loses its oldest turns, each whole and up to the next of the user; system messages stay.

    Args:
        chat: the base's.
        rows: of a raw table.
        key: column of the ids.
        sides: columns of the answers.
        suffix: see `turns_of`.
        system: see `turns_of`.
        longest: tokens of a prompt.
        path: of the table, for messages.

    Raises:
        UserError: the template refuses more than a tenth of the rows; names the first.
    """
    found: list[Tokens | str] = []
    refused: dict[str, str] = {}
    parted = Counter[str]()
    with Progress("tokenize", len(rows), "conversations") as progress:
        for row in rows:
            try:
                fitting = _fitting(chat, turns_of(row, suffix, system), longest)
                if fitting is None:
                    found.append(TOO_LONG)
                else:
                    turns, asked, cut = fitting
                    prompt, completions = exchange(chat, turns, [row[side].removeprefix(" ") for side in sides])
                    parted[chat.tokenizer.decode(asked[len(prompt) :])] += 1
                    found.append(Tokens(prompt, cut, completions))
            except TextNotKept:
                found.append(REASON)
            except Refused as problem:
                refused[row[key]] = str(problem)
                found.append(REFUSED)
            progress.update(1)
    _tell_refused(chat, refused, len(rows), path)
    for end, count in parted.items():
        if end:
            logger.warning(
                "%s: the template of %s ends %d prompts with %r and goes on otherwise where an answer follows: there the "
                "answer begins before it, in training and in sampling",
                *(path, chat.tokenizer.name_or_path, count, end),
            )
    return found


def _of_text(prompt: str, suffix: str) -> list[Message]:
    text = prompt.removesuffix(suffix)
    if not text.startswith((HUMAN, ASSISTANT)):
        return [{"role": "user", "content": text.strip()}]
    _, *parts = _TURN.split(text)
    return [{"role": _ROLES[name], "content": said.strip()} for name, said in zip(*[iter(parts)] * 2, strict=True)]


def _fitting(chat: Chat, turns: Sequence[Message], longest: int) -> tuple[Sequence[Message], list[int], bool] | None:
    """The most of the last turns that fit, their token ids, and whether there are others; None where none do."""
    for number, kept in enumerate(_ever_shorter(turns)):
        ids = prompt_ids(chat, kept)
        if len(ids) <= longest:
            return kept, ids, number > 0
    return None


def _ever_shorter(turns: Sequence[Message]) -> Iterator[Sequence[Message]]:
    yield turns
    first = next((place for place, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    for place in range(first + 1, len(turns)):
        if turns[place]["role"] == "user":
            yield [*turns[:first], *turns[place:]]


def _tell_refused(chat: Chat, refused: Mapping[str, str], rows: int, path: Path) -> None:
    if not refused:
        return
    first, problem = next(iter(refused.items()))
    told = f"{path}: the chat template of {chat.tokenizer.name_or_path} does not take {first!r} ({problem})"
    if len(refused) > _MOST * rows:
        raise UserError(
            f"{told}, and so with {len(refused)} of {rows} records in all: give conversations that it takes, a base with "
            f"another template, or prompt.style 'plain'."
        )
    logger.warning("%s; %d of %d records are dropped for this (%s)", told, len(refused), rows, REFUSED)
