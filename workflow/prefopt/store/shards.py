"""A stage's work cut into shards, so that several jobs share it: which part is whose, and what a shard says of itself.

A shard takes whole blocks of work, and what a stage reads or samples at once lies in one block. So every matrix
product has the shape that it has without shards, and the gathered table is the same to the last bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Hashable, Sequence
from typing import Any

from prefopt.errors import UserError

_FORM = re.compile(r"([0-9]+)-of-([0-9]+)")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of `count` shards; `number` counts from 1. A single one is the whole work."""

    number: int
    count: int

    def part(self, blocks: int) -> tuple[int, int]:
        """First and past-the-last of so many blocks that are this shard's: as many as any other's, or one more.

        A shard beyond the number of blocks is empty.
        """
        return blocks * (self.number - 1) // self.count, blocks * self.number // self.count

    def rows(self, groups: Sequence[Hashable], at_once: int = 1) -> list[int]:
        """Rows of a table that are this shard's: whole groups, in blocks of `at_once` by their first appearance.

        Args:
            groups: the group of each row.
            at_once: groups of a block.
        """
        place = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        start, stop = self.part(-(-len(place) // at_once))
        return [row for row, group in enumerate(groups) if start <= place[group] // at_once < stop]

    def manifest(self, rows: Sequence[int]) -> dict[str, Any]:
        """What a shard's manifest says of it: which rows of the whole table it holds, ascending.

        Returns:
            `shard` with `number`, `of` and `rows`, the runs [first, past the last] of consecutive rows; nothing where
            the shard is the whole table.
        """
        if self.count == 1:
            return {}
        runs: list[list[int]] = []
        for row in rows:
            if runs and runs[-1][1] == row:
                runs[-1][1] += 1
            else:
                runs.append([row, row + 1])
        return {"shard": {"number": self.number, "of": self.count, "rows": runs}}


def add_shard_argument(parser: argparse.ArgumentParser) -> None:
    """`--shard` of a stage whose work can be cut."""
    parser.add_argument("--shard", metavar="I-of-N", help="the part of the work to do, e.g. 2-of-5 (default: all)")


def parse_shard(text: str | None) -> Shard:
    """The shard that `--shard` names, the whole work without it.

    Raises:
        UserError: the text is not of the form 2-of-5, or there is no such shard.
    """
    if text is None:
        return Shard(1, 1)
    match = _FORM.fullmatch(text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard is {text!r}; allowed: I-of-N with I from 1 to N, e.g. 2-of-5.")
    return Shard(int(match[1]), int(match[2]))
