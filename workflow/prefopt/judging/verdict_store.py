"""What chat judges replied, kept for ever: a call that was paid for is never made again.

One SQLite file in WAL mode, a row a reply, a transaction a row, so that a kill loses at most the calls in flight and
several jobs may write at once. (WAL needs a local disk, not a network file system.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pandas as pd

from prefopt.errors import UserError
from prefopt.files import canonical_json, stable_hash

_WAIT = 60.0  # seconds for another job's transaction
_POLL = 0.1  # seconds between two looks at whether another job has its reply
_CREATE = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY,
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    request TEXT NOT NULL,
    reply TEXT NOT NULL,
    finish_reason TEXT NOT NULL,
    served_model TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    created TEXT NOT NULL
) WITHOUT ROWID
"""
_COLUMNS = (
    *("key", "endpoint", "model", "request", "reply", "finish_reason", "served_model"),
    *("prompt_tokens", "completion_tokens", "created"),
)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What an endpoint answered.

    Attributes:
        text: the reply, never empty in the store.
        finish_reason: "stop", "length" ...; "" where the endpoint does not say.
        served_model: the model that the endpoint names.
        prompt_tokens: tokens read, as billed.
        completion_tokens: tokens written, as billed.
    """

    text: str
    finish_reason: str
    served_model: str
    prompt_tokens: int
    completion_tokens: int


class VerdictStore:
    """The store at a path, made where there is none.

    Args:
        path: the SQLite file.
        create: False: the file must be there.

    Raises:
        UserError: the file is missing where it must be there, or is no store.
    """

    def __init__(self, path: str | Path, create: bool = True) -> None:
        self._path = Path(path)
        if not create and not self._path.is_file():
            raise UserError(f"{path} does not exist: give the store that holds the recorded verdicts.")
        self._lock = threading.Lock()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_WAIT, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(_CREATE)
            # Kept open: closing any descriptor of it would drop this process's locks.
            self._locks = os.open(f"{path}.locks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{path} cannot be used as a store of verdicts ({error}).") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        os.close(self._locks)

    @contextlib.contextmanager
    def alone(self, request: Mapping[str, Any]) -> Iterator[None]:
        """While this is open no other process is in it for the same request, so that two never pay for one reply.

        A lock on one byte of a file, which the kernel releases if the process dies. It is polled for: blocking calls
        of several threads would look like a deadlock to the kernel.
        """
        place = int(stable_hash(request)[:12], 16)
        while True:
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                break
            except OSError:
                time.sleep(_POLL)
        try:
            yield
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)

    def get(self, request: Mapping[str, Any]) -> Reply | None:
        """The reply to a request, or None where it was never stored."""
        rows = self._execute(
            "SELECT reply, finish_reason, served_model, prompt_tokens, completion_tokens FROM replies WHERE key = ?",
            (stable_hash(request),),
        )
        return Reply(*rows[0]) if rows else None

    def put(self, request: Mapping[str, Any], reply: Reply) -> None:
        """Keeps a reply; of two replies to one request the first stays.

        Args:
            request: endpoint, model, messages, parameters ...: all that the reply depends on.
            reply: not empty.

        Raises:
            ValueError: the reply is empty.
            UserError: the disk is full.
        """
        if not reply.text.strip():
            raise ValueError("an empty reply is not stored")
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._insert(
            (
                *(stable_hash(request), request["endpoint"], request["model"], canonical_json(request)),
                *(reply.text, reply.finish_reason, reply.served_model),
                *(reply.prompt_tokens, reply.completion_tokens, created),
            )
        )

    def tokens(self, endpoint: str, model: str) -> tuple[int, int]:
        """Tokens read and written by a model in all replies that are stored."""
        query = "SELECT SUM(prompt_tokens), SUM(completion_tokens) FROM replies WHERE endpoint = ? AND model = ?"
        read, written = self._execute(query, (endpoint, model))[0]
        return read or 0, written or 0

    def export(self) -> pd.DataFrame:
        """All rows, by key: a `chat_replies` table."""
        rows = self._execute(f"SELECT {', '.join(_COLUMNS)} FROM replies ORDER BY key", ())
        return pd.DataFrame(rows, columns=list(_COLUMNS))

    def add(self, rows: pd.DataFrame) -> int:
        """Takes rows of a `chat_replies` table; what is there already stays.

        Returns:
            How many were new.

        Raises:
            UserError: a row's key is not that of its request, so that it was altered.
        """
        before = self._execute("SELECT COUNT(*) FROM replies", ())[0][0]
        for row in rows[list(_COLUMNS)].itertuples(index=False, name=None):
            request = json.loads(row[_COLUMNS.index("request")])
            if stable_hash(request) != row[0]:
                raise UserError(f"The recorded reply {row[0]} does not belong to its request: the table was altered.")
            self._insert(row)
        count: int = self._execute("SELECT COUNT(*) FROM replies", ())[0][0] - before
        return count

    def _insert(self, row: tuple[Any, ...]) -> None:
        self._execute(f"INSERT OR IGNORE INTO replies VALUES ({', '.join('?' * len(_COLUMNS))})", row)

    def _execute(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"{self._path}: the store of verdicts failed ({error}); what it holds is safe.") from error
