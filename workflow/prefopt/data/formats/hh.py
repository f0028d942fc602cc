"""Anthropic HH transcripts to raw tables (Bai et al. 2022).

A record holds two transcripts, `chosen` and `rejected`, of turns that begin with "\\n\\nHuman:" or "\\n\\nAssistant:". The
prompt is what both share up to the last turn of the assistant, and what each says in that turn are the completions.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from prefopt.data.raw.conversations import Message
from prefopt.data.raw.parsing import Account, Parser, RawTables, Unusable
from prefopt.data.raw.record import Malformed, Records, text_of
from prefopt.data.raw.splits import PostKeys, check_shares, content_hash, gold_split_of, identity, is_blank, split_of

# What is read of each kind of file.
FIELDS: dict[str, tuple[str, ...]] = {"comparisons": ("chosen", "rejected")}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_STATEMENT = "Real records, not synthetic; split by prompt."


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt that ends with `ASSISTANT` and two completions, which start with a space."""

    prompt: str
    chosen: str
    rejected: str

    @property
    def turns(self) -> int:
        """Turns of the human."""
        return self.prompt.count(HUMAN)


def parse_pair(row: Mapping[str, Any]) -> Pair:
    """The prompt and the completions of a record.

    A turn begins where its name stands after an empty line, also where a speaker only quotes it: the transcripts do
    not say which is meant, and a policy that learned from them ends its turn there.

    Raises:
        Malformed: a transcript is missing, is no text, or does not begin with a turn.
        Unusable: "equal", "differ_before_last_turn", "no_assistant_turn", "ends_with_human" or "empty_last_turn".
    """
    chosen, rejected = (_transcript(row, name) for name in ("chosen", "rejected"))
    if chosen.rstrip() == rejected.rstrip():
        raise Unusable("equal")
    first, second = _last_turn(chosen), _last_turn(rejected)
    if first[0] != second[0]:
        raise Unusable("differ_before_last_turn")
    completions = [text.strip() for text in (first[1], second[1])]
    if any(map(is_blank, completions)):
        raise Unusable("empty_last_turn")
    if completions[0] == completions[1]:
        raise Unusable("equal")
    return Pair(first[0], f" {completions[0]}", f" {completions[1]}")


def turns(transcript: str) -> list[Message]:
    """The turns of a transcript as messages, without one that says nothing yet."""
    marks = list(_TURN.finditer(transcript))
    ends = [*(mark.start() for mark in marks[1:]), len(transcript)]
    said = [(mark[1], transcript[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]
    return [{"role": _ROLES[name], "content": text} for name, text in said if text]


def _transcript(row: Mapping[str, Any], name: str) -> str:
    # The published transcripts begin with the empty line; some copies have lost it.
    value = "\n\n" + text_of(row, name).strip("\n")
    if not value.startswith((HUMAN, ASSISTANT)):
        raise Malformed(f"{name!r} begins with {reprlib.repr(value.strip())}, not with a turn")
    return value


def _last_turn(transcript: str) -> tuple[str, str]:
    """The transcript up to and with the name of its last turn, and what is said there.

    Raises:
        Unusable: the last turn is the human's, or there is none of the assistant.
    """
    *_, last = _TURN.finditer(transcript)
    if last[1] == "Human":
        raise Unusable("ends_with_human" if ASSISTANT in transcript else "no_assistant_turn")
    return transcript[: last.end()], transcript[last.end() :]


def raw_tables(records: Records, *, splits: Mapping[str, float], gold_fraction: float, max_malformed: int) -> RawTables:
    """Parses all records and splits them by prompt.

    A share `gold_fraction` of the prompts is reserved for the gold judge, as in `prefopt.data.formats.tldr`. Demonstrations
    are the other prompts with the chosen completion, each prompt once; those of the validation and the test split,
    on which methods are compared, have one turn only (section 6).

    Args:
        records: see `data.sources`.
        splits: share of the prompts of train, validation and test.
        gold_fraction: share of the prompts.
        max_malformed: how many malformed records are dropped and counted.

    Raises:
        UserError: more than `max_malformed` records are malformed; names the file and line of the last.
    """
    check_shares(splits)
    accounts = {"raw_demonstrations": Account(), "raw_preferences": Account()}
    pairs = list(Parser(max_malformed)(records, parse_pair, accounts["raw_preferences"]))
    keys = PostKeys.of(pair.prompt for pair in pairs)

    def place(pair: Pair) -> tuple[str, str]:
        key = keys.key(pair.prompt)
        return key, gold_split_of(key, gold_fraction) or split_of(key, splits)

    placed = [(pair, *place(pair)) for pair in pairs]
    return tables_of_pairs(placed, accounts, {"synthetic": False, "statement": _STATEMENT})


def tables_of_pairs(
    placed: Iterable[tuple[Pair, str, str]], accounts: dict[str, Account], notes: dict[str, Any]
) -> RawTables:
    """The tables of pairs with the key and the split of each one's prompt."""
    placed = list(placed)
    preferences: dict[str, dict[str, Any]] = {}
    demonstrations: dict[str, dict[str, Any]] = {}
    documents: dict[str, None] = {}
    seen = set()
    for pair, key, split in placed:
        pair_id = f"{key}-{content_hash(pair.chosen + chr(0) + pair.rejected)}"
        content = (key, identity(pair.chosen), identity(pair.rejected))
        if content in seen:
            accounts["raw_preferences"].drop("duplicate_pair")
        else:
            seen.add(content)
            accounts["raw_preferences"].keep()
            texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            preferences[pair_id] = {"pair_id": pair_id, "prompt_id": key, **texts, "split": split, "source": "hh"}
        if split.startswith("gold_"):
            accounts["raw_demonstrations"].drop("reserved_for_gold")
        elif key in demonstrations:
            accounts["raw_demonstrations"].drop("duplicate_prompt")
        elif split != "train" and pair.turns > 1:
            accounts["raw_demonstrations"].drop("more_than_one_turn")
        else:
            accounts["raw_demonstrations"].keep()
            row = {"prompt_id": key, "prompt": pair.prompt, "response": pair.chosen, "split": split, "facts": ""}
            demonstrations[key] = row
        if split == "train":
            documents[pair.prompt.strip() + pair.chosen] = None
    accounts["pretraining"] = Account(read=len(documents), kept=len(documents))
    return RawTables(list(demonstrations.values()), list(preferences.values()), list(documents), accounts, notes)
