"""What every source of a task hands on: its records in one shape, and an account of what became of each."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any


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
    accounts: dict[str, Account]  # per table
    notes: dict[str, Any]  # what a reader should know: synthetic or real, known label noise, warnings
