"""Every format of records, once: the fields that it is recognised by, and what reads a row of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefopt.data.formats import answers, cnn_dailymail, hh, labelled, scored, tldr
from prefopt.data.formats.examples import Demonstration, Pair, Thumb
from prefopt.data.raw.conversations import readable
from prefopt.data.raw.record import Malformed

Example = Demonstration | Pair | Thumb
Row = Mapping[str, Any]
_DEMONSTRATIONS = "raw_demonstrations"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What a config leaves open of a row: `data.pairs`, `data.ties` and `data.seed`."""

    rule: str
    margin: float
    ties: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Format:
    """How a format is recognised, and read."""

    fields: tuple[tuple[str, ...], ...]  # that all are there, of one of these lists
    parse: Callable[[Row, Choices], Example | list[Pair]]
    table: str = "raw_preferences"  # in whose account a row counts that gives nothing
    fits: Callable[[Row], bool] = lambda row: True  # what else must hold


# What answers a prompt, or judges an answer: beside a prompt it is half of a format.
_ANSWERS = {
    *("chosen", "rejected", "response", "completion", "label", "messages"),
    *("responses", "scores", "response_a", "response_b", "winner"),
}
# In the order in which they are tried: one that asks for more comes before one that asks for less.
FORMATS: dict[str, Format] = {
    "tldr_comparisons": Format((("info", "summaries", "choice"),), lambda row, _: tldr.parse_comparison(row)),
    "tldr_posts": Format(
        (("subreddit", "title", "post", "summary"),), lambda row, _: tldr.parse_post(row), _DEMONSTRATIONS
    ),
    "cnn_dailymail": Format(
        (("article", "highlights"),), lambda row, _: cnn_dailymail.parse_article(row), _DEMONSTRATIONS
    ),
    "winner": Format(
        (("conversation_a", "conversation_b", "winner"), ("prompt", "response_a", "response_b", "winner")),
        lambda row, choices: labelled.parse_winner(row, choices.ties),
    ),
    "scored": Format(
        (("prompt", "responses"),),
        lambda row, choices: scored.parse_scored(row, choices.rule, choices.margin, choices.seed),
    ),
    "thumbs": Format((("prompt", "completion", "label"),), lambda row, _: labelled.parse_thumb(row)),
    "hh": Format(
        (("chosen", "rejected"),),
        lambda row, _: _transcripts(row),
        fits=lambda row: row.get("prompt") is None and isinstance(row["chosen"], str),
    ),
    "pairs": Format((("chosen", "rejected"),), lambda row, _: answers.parse_pair(row)),
    "prompt_response": Format(
        (("prompt", "response"), ("prompt", "completion")),
        lambda row, _: answers.parse_demonstration(row),
        _DEMONSTRATIONS,
    ),
    "messages": Format((("messages",),), lambda row, _: answers.parse_conversation(row), _DEMONSTRATIONS),
    "prompts": Format(
        (("prompt",),),
        lambda row, _: answers.parse_prompt(row),
        _DEMONSTRATIONS,
        lambda row: not _ANSWERS & _present(row),
    ),
}
_FIELDS = {field for each in FORMATS.values() for fields in each.fields for field in fields}
# Fields that are read where they are there.
_OPTIONAL = {"id", "prompt", "scores"}


def recognised(row: Row) -> str | None:
    """The name of a row's format, the first that its fields fit; None where it is of none. null is no field."""
    present = _present(row)
    for name, each in FORMATS.items():
        if any(present.issuperset(fields) for fields in each.fields) and each.fits(row):
            return name
    return None


def fields_read(columns: Sequence[str]) -> Sequence[str]:
    """The columns that any format reads; all of them where they fit none, so that an error can say what was found."""
    fitting = any(set(columns).issuperset(fields) for each in FORMATS.values() for fields in each.fields)
    return [name for name in columns if name in _FIELDS | _OPTIONAL] if fitting else columns


class Reader:
    """Reads the rows of one source: of the format that is named, else of that of its first row."""

    def __init__(self, choices: Choices, name: str | None = None, cells: bool = False) -> None:
        self.name = name
        self._choices, self._named, self._cells = choices, name is not None, cells

    def __call__(self, row: Row) -> Example | list[Pair]:
        """What a row holds.

        Raises:
            Malformed: the row is of no format, or of another than the first, or not as its format asks.
            Unusable: see the format.
        """
        if self._cells:
            row = {name: _cell(name, value) for name, value in row.items()}
        if not self._named:
            found = recognised(row)
            if found is None:
                raise Malformed(f"the row has {_said(row)}, which fit no format of docs/record_formats.md")
            if self.name is not None and found != self.name:
                raise Malformed(
                    f"the row has {_said(row)}, of the format {found!r}, and the first row is of the format {self.name!r}"
                )
            self.name = found
        return FORMATS[str(self.name)].parse(row, self._choices)


def _transcripts(row: Row) -> Pair:
    """A pair of transcripts, whose prompt is known as the same turns are where they come as messages."""
    pair = hh.parse_pair(row)
    known = tldr.own_post(readable(hh.turns(pair.prompt)) or pair.prompt)
    post = dataclasses.replace(known, prompt=pair.prompt, document=pair.prompt.strip())
    return Pair(post, pair.chosen, pair.rejected, "")


def _present(row: Row) -> set[str]:
    return {name for name, value in row.items() if value is not None}


def _said(row: Row) -> str:
    return f"the fields {', '.join(map(repr, sorted(_present(row))))}" if _present(row) else "no field"


def _cell(name: str, value: Any) -> Any:
    """A cell of CSV that holds a list as JSON: of messages in any field, of anything in those that hold nothing else."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    turns = isinstance(found, list) and all(isinstance(item, dict) and "role" in item for item in found)
    return found if name in ("responses", "scores") or (turns and found) else value
