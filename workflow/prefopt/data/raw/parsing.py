"""What every source of a task hands on: its records in one shape, and an account of what became of each."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from prefopt.data.raw.record import Malformed, Records
from prefopt.errors import UserError

logger = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")


class Unusable(Exception):
    """A well-formed record that cannot be used; the message is the reason under which it is counted."""


@dataclasses.dataclass
class Account:
    """What became of the records of one table: `read` = `kept` + all of `dropped`."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)

    def drop(self, reason: str) -> None:
        """Counts one record that was read and is not kept."""
        self.read += 1
        self.dropped[reason] += 1

    def keep(self) -> None:
        """Counts one record that was read and is kept."""
        self.read += 1
        self.kept += 1

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, for a manifest."""
        return {"read": self.read, "kept": self.kept, "dropped": dict(sorted(self.dropped.items()))}


@dataclasses.dataclass
class RawTables:
    """One task's records before a tokenizer has seen them; rows follow `tables.SCHEMAS`."""

    demonstrations: list[dict[str, Any]]  # raw_demonstrations
    preferences: list[dict[str, Any]]  # raw_preferences, split train | validation | test | gold_train | gold_test
    pretraining: list[str]  # documents to pretrain a base model on, without the task's own format
    accounts: dict[str, Account]  # per table; of raw_labels that of completions in no pair, where there may be any
    notes: dict[str, Any]  # what a reader should know: synthetic or real, known label noise, warnings
    labels: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # raw_labels of completions in no pair


class Parser:
    """Parses records of every format; counts the malformed ones of all files together."""

    def __init__(self, max_malformed: int) -> None:
        self._limit = max_malformed
        self._count = 0

    def __call__(
        self, records: Records, parse: Callable[[Mapping[str, Any]], Parsed], account: Account
    ) -> Iterator[Parsed]:
        """What `parse` makes of each record; those that it cannot use are dropped from the account.

        Args:
            records: see `data.sources`.
            parse: raises `Malformed`, or `Unusable`.
            account: of the table that the records are for.

        Raises:
            UserError: more than `max_malformed` records are malformed; names the file and line of the last.
        """
        for where, row in records:
            try:
                if isinstance(row, Malformed):
                    raise row
                parsed = parse(row)
            except Unusable as reason:
                account.drop(str(reason))
            except Malformed as problem:
                self._count += 1
                if self._count > self._limit:
                    raise UserError(
                        f"{where}: {problem}; correct the record, or raise data.max_malformed, now {self._limit}."
                    ) from problem
                logger.warning("%s: %s; the record is dropped", where, problem)
                account.drop("malformed")
            else:
                yield parsed
