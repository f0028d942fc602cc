"""Records of several sources, each of one format, to raw tables: recognised, paired, mixed and split by prompt."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from prefopt.data.formats.examples import Demonstration, Pair, Thumb, tables_of
from prefopt.data.formats.labelled import paired
from prefopt.data.formats.recognise import FORMATS, Choices, Reader
from prefopt.data.raw.parsing import Account, Parser, RawTables
from prefopt.data.raw.record import Records
from prefopt.data.raw.splits import content_hash, position
from prefopt.errors import UserError

Example = TypeVar("Example", Demonstration | Pair, Thumb)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Records of one file, folder or data set, and what is taken of them."""

    name: str  # what each row says of where it is from
    records: Records
    format: str | None  # None is recognised
    cells: bool  # whether a text may hold a list, since a cell of CSV holds nothing else
    side: str | None  # "train" holds nothing back for the test, "test" is nothing else
    weight: float | None  # its share among the sources with weights
    count: int | None  # how many examples are taken at most


@dataclasses.dataclass
class _Read:
    """One source's examples, and what became of its rows."""

    source: Source
    format: str | None
    rows: Account
    examples: list[Demonstration | Pair]
    thumbs: list[Thumb]  # in no pair


def raw_tables(
    sources: Sequence[Source],
    choices: Choices,
    *,
    splits: Mapping[str, float],
    gold_fraction: float,
    max_malformed: int,
) -> RawTables:
    """Parses, mixes and splits all records.

    Prompts alone are of the validation and the test split. Where no record is a demonstration, the chosen responses of
    pairs are, and those of single thumbs that pleased, each prompt once.

    Args:
        sources: see `Source`.
        choices: what a config leaves open of a row.
        splits: share of the prompts of train, validation and test.
        gold_fraction: share of the prompts with pairs that the gold judge is trained and measured on.
        max_malformed: how many malformed records, over all sources, are dropped and counted.

    Raises:
        UserError: more than `max_malformed` records are malformed; names the file and line of the last. Or prompts alone
            are to be trained on.
    """
    parse = Parser(max_malformed)
    read = [_read(source, choices, parse) for source in sources]
    accounts = {"raw_demonstrations": Account(), "raw_preferences": Account()}
    taken = _mixed(read, choices.seed)
    for one, (kept, _) in zip(read, taken, strict=True):
        # A source has one format, and so one table.
        account = accounts[FORMATS[one.format].table if one.format else "raw_demonstrations"]
        dropped = one.rows.dropped + Counter(left_out_by_mixing=len(one.examples) - len(kept))
        account.dropped += dropped
        account.read += dropped.total()
    examples = [example for kept, _ in taken for example in kept]
    thumbs = [thumb for _, single in taken for thumb in single]
    pairs = [example for example in examples if isinstance(example, Pair)]
    demonstrations = [example for example in examples if isinstance(example, Demonstration)]
    if not any(example.response for example in demonstrations):
        good = [(pair.post, pair.chosen, pair.source) for pair in pairs]
        good += [(thumb.post, thumb.response, thumb.source) for thumb in thumbs if thumb.up]
        demonstrations = [*(Demonstration(*one) for one in good), *demonstrations]
    tables = tables_of(
        sorted(demonstrations, key=lambda example: example.response == ""),
        pairs,
        accounts,
        splits=splits,
        gold_fraction=gold_fraction,
        thumbs=thumbs,
        sides=_sides(read, splits),
        repeated="duplicate_prompt",
    )
    left_out = sum(len(one.thumbs) for one in read) - len(thumbs)
    accounts["raw_labels"] = Account(left_out + len(thumbs), len(thumbs), Counter(left_out_by_mixing=left_out))
    tables.notes["sources"] = [_told(one, *kept) for one, kept in zip(read, taken, strict=True)]
    return tables


def _read(source: Source, choices: Choices, parse: Parser) -> _Read:
    reader, account = Reader(choices, source.format, source.cells), Account()
    examples: list[Demonstration | Pair] = []
    thumbs: list[Thumb] = []
    for found in parse(source.records, reader, account):
        account.keep()
        if isinstance(found, Thumb):
            thumbs.append(found)
        else:
            examples += found if isinstance(found, list) else [found]
    pairs, unpaired = paired(thumbs)
    account.kept -= len(unpaired)
    account.dropped += Counter(unpaired=len(unpaired))
    named = [dataclasses.replace(example, source=source.name) for example in (*examples, *pairs)]
    if source.side == "train" and any(isinstance(each, Demonstration) and not each.response for each in named):
        raise UserError(
            f"{source.name} holds prompts alone, on which nothing is trained: set its as to test, or leave it out."
        )
    single = [dataclasses.replace(thumb, source=source.name) for thumb in unpaired]
    return _Read(source, reader.name, account, named, single)


def _mixed(read: Sequence[_Read], seed: int) -> list[tuple[list[Demonstration | Pair], list[Thumb]]]:
    """What is taken of each source: of those with weights as much as the scarcest allows, none of it twice.

    Thumbs that are in no pair are taken as the source's pairs are, in proportion; of a source without any pair they are what
    is counted.
    """
    weights = {i: one.source.weight for i, one in enumerate(read) if one.source.weight is not None}
    sizes = [len(one.examples) or len(one.thumbs) for one in read]
    for i in weights:
        if not sizes[i]:
            raise UserError(
                f"{read[i].source.name} has a weight and no example: leave it out, or see why its rows are dropped."
            )
    scale = min((sizes[i] / weight for i, weight in weights.items()), default=0.0)
    taken = []
    for i, one in enumerate(read):
        # A hair more, since 0.3 * (30 / 0.3) may fall short of 30.
        count = math.floor(weights[i] * scale + 1e-6) if i in weights else one.source.count
        single = None if count is None else math.floor(count / max(1, sizes[i]) * len(one.thumbs) + 1e-6)
        salt = f"mix-{seed}-{i}"
        taken.append((_drawn(one.examples, count, salt), _drawn(one.thumbs, single, salt)))
    return taken


def _drawn(examples: list[Example], count: int | None, salt: str) -> list[Example]:
    """So many examples, in their order; which, hangs on the seed and their texts alone."""
    if count is None or count >= len(examples):
        return examples

    def place(i: int) -> float:
        return position(salt, content_hash("\0".join((examples[i].post.document, *_answers(examples[i])))))

    drawn = set(sorted(range(len(examples)), key=place)[:count])
    return [example for i, example in enumerate(examples) if i in drawn]


def _answers(example: Demonstration | Pair | Thumb) -> tuple[str, ...]:
    return (example.chosen, example.rejected) if isinstance(example, Pair) else (example.response,)


def _sides(read: Sequence[_Read], splits: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The shares of sources that keep out of some split; of one prompt in several sources the first of these decides."""

    def without(name: str) -> dict[str, float]:
        rest = {split: share for split, share in splits.items() if split != name}
        return {split: share / sum(rest.values()) for split, share in rest.items()}

    alone = [one for one in read if any(isinstance(each, Demonstration) and not each.response for each in one.examples)]
    return {
        **{one.source.name: {"test": 1.0} for one in read if one.source.side == "test"},
        **{one.source.name: without("train") for one in alone if one.source.side is None},
        **{one.source.name: without("test") for one in read if one.source.side == "train"},
    }


def _told(one: _Read, kept: Sequence[Demonstration | Pair], thumbs: Sequence[Thumb]) -> dict[str, Any]:
    """What became of a source: its rows, each read or dropped, and its examples and single thumbs, each taken or left."""
    return {
        "source": one.source.name,
        "format": one.format,
        "rows": one.rows.as_dict(),
        "examples": len(one.examples),
        "taken": len(kept),
        "single_thumbs_taken": len(thumbs),
    }
