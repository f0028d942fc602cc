"""What chat judges replied, kept for ever: a call that was paid for is never made again.

One SQLite file in WAL mode, a row a reply, a transaction a row, so that a kill loses at most the calls in flight and
several jobs may write at once. (WAL needs a local disk, not a network file system.) What was recorded can be read on a
disk that cannot be written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import logging
import numbers
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pandas as pd

from prefopt.errors import UserError
from prefopt.store.files import canonical_json, stable_hash

MOST_TOKENS = 10**9  # of a reply that can be; what is above is no count
REFUSED = "refused"  # finish_reason of a call that the endpoint would not answer; it cost nothing
UNREADABLE = "unreadable"  # finish_reason of an answer that is none of the chat protocol, or never came

_VERSION = 1  # of the table's layout
_WAIT = 60.0  # seconds for another job's transaction
_BUSY_WAIT = 5.0  # seconds of it without a word
_POLL = 0.1  # seconds between two looks at whether another job has its reply
_WORD_AFTER = 10.0  # seconds of such looks until it is said
_WORD_EVERY = 60.0
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
_COUNTS = {"prompt_tokens": "request", "completion_tokens": "reply"}
# Earlier versions stored whatever an endpoint reported: what is no count of tokens is read as an estimate, rather high.
_READ = {
    count: f"CASE WHEN typeof({count}) = 'integer' AND {count} BETWEEN 0 AND {MOST_TOKENS} THEN {count} "
    f"ELSE (length(CAST({text} AS BLOB)) + 2) / 3 END"
    for count, text in _COUNTS.items()
}
_SELECT = ", ".join(_READ.get(name, name) for name in _COLUMNS)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What an endpoint answered.

    Attributes:
        text: the reply, "" where there was none; of `REFUSED` and `UNREADABLE` the endpoint's words.
        finish_reason: "stop", "length" ...; "" where the endpoint does not say; `REFUSED`, `UNREADABLE`.
        served_model: the model that the endpoint names.
        prompt_tokens: tokens read, as billed, or estimated where the endpoint does not say.
        completion_tokens: tokens written, likewise.
    """

    text: str
    finish_reason: str
    served_model: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def says_something(self) -> bool:
        """Whether a model wrote anything, a verdict or not."""
        return bool(self.text.strip()) and self.finish_reason not in (REFUSED, UNREADABLE)


class VerdictStore:
    """The store at a path, made where there is none.

    Args:
        path: the SQLite file.
        create: False: the file must be there, and is only read.

    Raises:
        UserError: the file is missing where it must be there, is no store, or one of a later version.
    """

    def __init__(self, path: str | Path, create: bool = True) -> None:
        self._path = Path(path)
        if not create and not self._path.is_file():
            raise UserError(f"{path} does not exist: give the store that holds the recorded verdicts.")
        self._lock = threading.Lock()
        self._locks: int | None = None
        self._lockless = False
        try:
            self._connection = self._open() if create else self._open_to_read()
            self._check_layout()
            self._connection.execute(f"PRAGMA busy_timeout = {_BUSY_WAIT * 1000:.0f}")
            if create:
                # Kept open: closing any descriptor of it would drop this process's locks.
                self._locks = os.open(f"{path}.locks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{path} cannot be used as a store of verdicts ({error}){_advice(error)}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        if self._locks is not None:
            os.close(self._locks)

    @contextlib.contextmanager
    def alone(self, request: Mapping[str, Any]) -> Iterator[None]:
        """While this is open no other process is in it for the same request, so that two never pay for one reply.

        A lock on one byte of a file, which the kernel releases if the process dies. It is polled for: blocking calls
        of several threads would look like a deadlock to the kernel. Who waits says so. Where the file system knows no
        locks it goes on without, and says so too.
        """
        place = int(stable_hash(request)[:12], 16)
        locked = self._take(place)
        try:
            yield
        finally:
            if locked and self._locks is not None:
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)

    def get(self, request: Mapping[str, Any]) -> Reply | None:
        """The reply to a request, or None where it was never stored."""
        rows = self._execute(
            f"SELECT reply, finish_reason, served_model, {_READ['prompt_tokens']}, {_READ['completion_tokens']} "
            f"FROM replies WHERE key = ?",
            (stable_hash(request),),
        )
        return Reply(*rows[0]) if rows else None

    def put(self, request: Mapping[str, Any], reply: Reply) -> None:
        """Keeps a reply, whatever it holds; of two replies to one request the first stays.

        Args:
            request: endpoint, model, messages, parameters ...: all that the reply depends on.
            reply: what was answered.

        Raises:
            UserError: the disk is full.
        """
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._insert(
            (
                *(stable_hash(request), request["endpoint"], request["model"], canonical_json(request)),
                *(reply.text, reply.finish_reason, reply.served_model),
                *(reply.prompt_tokens, reply.completion_tokens, created),
            )
        )

    def put_lost(self, request: Mapping[str, Any], reply: Reply) -> None:
        """Keeps what a call that gave no reply may cost, beside the request, which stays open: it is asked again."""
        number = 1
        while self.get(lost := {**request, "lost": number}):
            number += 1
        self.put(lost, reply)

    def tokens(self, endpoint: str, model: str) -> tuple[float, float]:
        """Tokens read and written by a model in all replies that are stored."""
        # TOTAL counts in floats, which no count makes overflow.
        query = (
            f"SELECT TOTAL({_READ['prompt_tokens']}), TOTAL({_READ['completion_tokens']}) FROM replies "
            f"WHERE endpoint = ? AND model = ?"
        )
        read, written = self._execute(query, (endpoint, model))[0]
        return read, written

    def export(self) -> pd.DataFrame:
        """All rows, by key: a `chat_replies` table."""
        rows = self._execute(f"SELECT {_SELECT} FROM replies ORDER BY key", ())
        return pd.DataFrame(rows, columns=list(_COLUMNS))

    def add(self, rows: pd.DataFrame) -> int:
        """Takes rows of a `chat_replies` table, all or none; what is there already stays.

        Returns:
            How many were new.

        Raises:
            UserError: a row is not what a store would export, so that it was altered.
        """
        taken = list(rows[list(_COLUMNS)].itertuples(index=False, name=None))
        for row in taken:
            if odd := _odd(dict(zip(_COLUMNS, row, strict=True))):
                raise UserError(f"The recorded reply {row[0]} {odd}: the table was altered.")
        before = self._execute("SELECT COUNT(*) FROM replies", ())[0][0]
        for row in taken:
            self._insert(row)
        count: int = self._execute("SELECT COUNT(*) FROM replies", ())[0][0] - before
        return count

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = self._connect(self._path.absolute().as_uri())
        connection.execute("PRAGMA journal_mode=WAL")
        if not connection.execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'replies'").fetchone()[0]:
            connection.execute(_CREATE)
            connection.execute(f"PRAGMA user_version = {_VERSION}")
        return connection

    def _open_to_read(self) -> sqlite3.Connection:
        """Opens a file that may stand on a disk that cannot be written, where WAL's own files cannot be made."""
        address = self._path.absolute().as_uri()
        try:
            connection = self._connect(f"{address}?mode=ro")
            connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            return connection
        except sqlite3.OperationalError:
            beside = self._path.with_name(f"{self._path.name}-wal")
            if beside.exists() and beside.stat().st_size:
                raise  # It holds replies that are not in the file yet.
            return self._connect(f"{address}?mode=ro&immutable=1")

    def _connect(self, address: str) -> sqlite3.Connection:
        return sqlite3.connect(address, uri=True, timeout=_WAIT, check_same_thread=False, isolation_level=None)

    def _check_layout(self) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            raise UserError(
                f"{self._path} was made by a later version of this workflow (layout {version}, this one knows "
                f"{_VERSION}): update, or give another store."
            )
        found = [row[1] for row in self._connection.execute("PRAGMA table_info(replies)")]
        if missing := [name for name in _COLUMNS if name not in found]:
            raise UserError(
                f"{self._path} is no store of verdicts: its table `replies` lacks {', '.join(missing)}; give another "
                f"path in judge.chat.store."
            )

    def _take(self, place: int) -> bool:
        """Waits for the lock on a byte.

        Returns:
            False where there are no locks.
        """
        if self._locks is None or self._lockless:
            return False
        start = time.monotonic()
        word = _WORD_AFTER
        while True:
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                return True
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    with self._lock:
                        if not self._lockless:
                            logger.warning(
                                "%s: the file system has no locks (%s), so that two jobs that ask the same at once "
                                "both pay; judge in one job at a time, or put judge.chat.store on a local disk.",
                                *(self._path, error.strerror),
                            )
                        self._lockless = True
                    return False
            if time.monotonic() - start > word:
                logger.warning(
                    "%s: waiting for %.0f s for another process that asks for the same reply; if it was stopped, let "
                    "it go on or end it.",
                    *(self._path, time.monotonic() - start),
                )
                word += _WORD_EVERY
            time.sleep(_POLL)

    def _insert(self, row: tuple[Any, ...]) -> None:
        self._execute(
            f"INSERT INTO replies ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))}) "
            f"ON CONFLICT (key) DO NOTHING",
            row,
        )

    def _execute(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        start = time.monotonic()
        while True:
            try:
                with self._lock:
                    return self._connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                waited = time.monotonic() - start
                if _code(error) != sqlite3.SQLITE_BUSY or waited > _WAIT:
                    raise UserError(f"{self._path}: the store of verdicts failed ({error}){_advice(error)}.") from error
                logger.warning(
                    "%s: waiting for %.0f s for another process that writes to it; if it was stopped, let it go on or "
                    "end it.",
                    *(self._path, waited),
                )


def _odd(row: Mapping[str, Any]) -> str:
    """What is wrong with a row of a `chat_replies` table, "" if nothing is."""
    if empty := [name for name in _COLUMNS if name not in _COUNTS and not isinstance(row[name], str)]:
        return f"has no {empty[0]}"
    for name in _COUNTS:
        count = row[name]
        if not isinstance(count, numbers.Integral) or not 0 <= int(count) <= MOST_TOKENS:
            return f"has {name} {count}"
    try:
        request = json.loads(row["request"])
        address = stable_hash(request)
    except (ValueError, RecursionError):
        return "has a request that is no JSON"
    if not isinstance(request, dict) or address != row["key"]:
        return "does not belong to its request"
    for name in ("endpoint", "model"):
        if request.get(name) != row[name]:
            return f"has another {name} than its request"
    return ""


def _code(error: Exception) -> int:
    """SQLite's primary code of an error."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _advice(error: Exception) -> str:
    """What is true of the store after an error, and what to do."""
    match _code(error):
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return (
                "; the file is damaged or no store: put a copy in its place, import an exported table into a new one, or "
                "save what can be read by `sqlite3 FILE .recover`"
            )
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED | sqlite3.SQLITE_PROTOCOL:
            return (
                "; another process holds it, perhaps one that was stopped, or its file system has no locks: put it on a "
                "local disk"
            )
        case sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR:
            return "; what it holds is safe, make room or look after its disk"
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN:
            return "; copy it, with the -wal file beside it, to a disk that can be written"
    return ""
