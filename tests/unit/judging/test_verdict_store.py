from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefopt.errors import UserError
from prefopt.judging import stored, verdict_store
from prefopt.judging.verdict_store import Reply, VerdictStore
from prefopt.store.files import stable_hash
from prefopt.store.tables import read_table, write_table

REPLY = Reply("Preferred: A", "stop", "m-2", 100, 7)


def request(**changes: Any) -> dict[str, Any]:
    return {
        **{"endpoint": "http://x/v1", "model": "m", "template": "t", "messages": [{"role": "user", "content": "?"}]},
        **{"parameters": {"temperature": 0.0}, "repeat": 0, "attempt": 0, **changes},
    }


def test_a_reply_is_found_by_all_that_it_depends_on(tmp_path: Path) -> None:
    with VerdictStore(tmp_path / "s.sqlite") as store:
        assert store.get(request()) is None
        store.put(request(), REPLY)
        assert store.get(request()) == REPLY
        for change in (
            *({"endpoint": "http://y/v1"}, {"model": "n"}, {"template": "u"}, {"messages": []}),
            *({"parameters": {"temperature": 1.0}}, {"repeat": 1}, {"attempt": 1}),
        ):
            assert store.get(request(**change)) is None
        store.put(request(), Reply("other", "stop", "m", 1, 1))
        assert store.get(request()) == REPLY  # the first stays
        store.put(request(repeat=1), REPLY)
        assert store.tokens("http://x/v1", "m") == (200, 14)
        assert store.tokens("http://x/v1", "n") == (0, 0)


def test_what_was_paid_is_stored_whatever_it_holds(tmp_path: Path) -> None:
    with VerdictStore(tmp_path / "s.sqlite") as store:
        empty = Reply(" \n", "length", "", 1, 0)
        store.put(request(), empty)
        assert store.get(request()) == empty
        # A row that cannot be stored is not lost without a word.
        with pytest.raises(UserError, match=r"the store of verdicts failed \(NOT NULL constraint"):
            store.put(request(repeat=1), Reply("A", "stop", "m", None, 1))  # type: ignore[arg-type]


def test_several_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from prefopt.judging.verdict_store import Reply, VerdictStore\n"
        "with VerdictStore(sys.argv[2]) as store:\n"
        "    for i in range(100):\n"
        "        request = {'endpoint': 'e', 'model': sys.argv[3], 'i': i}\n"
        "        store.put(request, Reply('A', 'stop', 'm', 1, 1))\n"
    )
    package = str(Path(__file__).parents[3] / "workflow")
    path = str(tmp_path / "s.sqlite")

    def writer(name: str) -> int:
        return subprocess.run([sys.executable, "-c", code, package, path, name], check=True).returncode

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert list(pool.map(writer, "abc")) == [0, 0, 0]
    with VerdictStore(path) as store:
        assert len(store.export()) == 300


def test_two_jobs_never_ask_the_same_at_once(tmp_path: Path) -> None:
    """Three processes want the same twenty replies, each of which takes a while: twenty are made."""
    code = (
        "import sys, time; sys.path[:0] = [sys.argv[1]]\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from prefopt.judging.verdict_store import Reply, VerdictStore\n"
        "store = VerdictStore(sys.argv[2])\n"
        "def ask(i):\n"
        "    request = {'endpoint': 'e', 'model': 'm', 'i': i}\n"
        "    with store.alone(request):\n"
        "        if store.get(request) is None:\n"
        "            time.sleep(0.05)\n"
        "            store.put(request, Reply('A', 'stop', 'm', 1, 1))\n"
        "            return 1\n"
        "    return 0\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    print(sum(pool.map(ask, range(20))))\n"
    )
    package, path = str(Path(__file__).parents[3] / "workflow"), str(tmp_path / "s.sqlite")
    command = [sys.executable, "-c", code, package, path]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sum(int(job.communicate()[0]) for job in jobs) == 20


def test_export_and_import_keep_every_reply(tmp_path: Path) -> None:
    with VerdictStore(tmp_path / "a.sqlite") as store:
        for attempt in range(3):
            store.put(request(attempt=attempt), REPLY)
    parser = argparse.ArgumentParser()
    stored.add_arguments(parser)
    table = tmp_path / "t.parquet"
    args = parser.parse_args(["export", "--store", str(tmp_path / "a.sqlite"), "--table", str(table)])
    assert vars(args) == {"action": "export", "store": tmp_path / "a.sqlite", "table": table}
    stored.run(args)
    for _ in range(2):  # a second time changes nothing
        stored.run(parser.parse_args(["import", "--store", str(tmp_path / "b.sqlite"), "--table", str(table)]))
    with VerdictStore(tmp_path / "b.sqlite") as other:
        assert other.get(request(attempt=2)) == REPLY
        assert len(other.export()) == 3


def test_an_altered_row_is_refused(tmp_path: Path) -> None:
    with VerdictStore(tmp_path / "a.sqlite") as store:
        store.put(request(), REPLY)
        rows = store.export()
        rows["request"] = json.dumps(request(model="other"))
        write_table(tmp_path / "t.parquet", "chat_replies", rows)
        with pytest.raises(UserError, match="was altered"):
            store.add(read_table(tmp_path / "t.parquet", "chat_replies"))


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.sqlite").write_text("this is a text, long enough to be no database at all" * 20)
    with pytest.raises(UserError, match="cannot be used as a store"):
        VerdictStore(tmp_path / "x.sqlite")
    with pytest.raises(UserError, match="does not exist"):
        VerdictStore(tmp_path / "none.sqlite", create=False)


def table(tmp_path: Path, **changes: Any) -> Any:
    """One exported reply with other cells, as an import reads it."""
    with VerdictStore(tmp_path / "from.sqlite") as store:
        store.put(request(), REPLY)
        rows = store.export()
    for name, value in changes.items():
        rows[name] = value
    write_table(tmp_path / "t.parquet", "chat_replies", rows)
    return read_table(tmp_path / "t.parquet", "chat_replies")


OTHER = json.dumps(request(), indent=1)  # the same request, in other white space


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"endpoint": "http://y/v1"}, "has another endpoint than its request"),
        ({"model": "cheap"}, "has another model than its request"),
        ({"prompt_tokens": -5}, "has prompt_tokens -5"),
        ({"completion_tokens": 2**62}, "has completion_tokens 4611686018427387904"),
        ({"request": "{"}, "has a request that is no JSON"),
        ({"request": "[" * 100_000}, "has a request that is no JSON"),
        ({"request": '{"a": NaN}'}, "has a request that is no JSON"),
        ({"request": "9" * 6000}, "has a request that is no JSON"),
        ({"request": "[]"}, "does not belong to its request"),
        ({"key": "0" * 64}, "does not belong to its request"),
    ],
)
def test_an_import_takes_what_a_store_exports(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    rows = table(tmp_path, **changes)
    with VerdictStore(tmp_path / "to.sqlite") as store:
        with pytest.raises(UserError, match=said):
            store.add(rows)
        assert len(store.export()) == 0
        assert store.add(table(tmp_path, request=OTHER)) == 1


def test_columns_in_another_order_are_filled_rightly(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    connection = sqlite3.connect(path)
    connection.execute(
        "CREATE TABLE replies (created TEXT, reply TEXT, key TEXT PRIMARY KEY, model TEXT, endpoint TEXT, request TEXT, "
        "served_model TEXT, finish_reason TEXT, completion_tokens INTEGER, prompt_tokens INTEGER, note TEXT)"
    )
    connection.close()
    with VerdictStore(path) as store:
        store.put(request(), REPLY)
        assert store.get(request()) == REPLY
        assert store.tokens("http://x/v1", "m") == (100, 7)


def test_a_store_of_another_layout_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with VerdictStore(path) as store:
        store.put(request(), REPLY)
        assert store._connection.execute("PRAGMA user_version").fetchone() == (1,)
        store._connection.execute("PRAGMA user_version = 2")
    for create in (True, False):
        with pytest.raises(UserError, match=r"made by a later version of this workflow \(layout 2, this one knows 1\)"):
            VerdictStore(path, create)
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE replies (key TEXT, reply TEXT)")
    connection.close()
    with pytest.raises(UserError, match="is no store of verdicts: its table `replies` lacks endpoint, model, request"):
        VerdictStore(other)


def test_a_damaged_store_says_so(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with VerdictStore(path) as store:
        for attempt in range(200):
            store.put(request(attempt=attempt), REPLY)
        store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as handle:
        handle.seek(4096 * 2)
        handle.write(b"\xff" * 4096 * 12)
    with (
        pytest.raises(UserError, match="the file is damaged or no store") as caught,
        VerdictStore(path, False) as store,
    ):
        store.export()
    assert "safe" not in str(caught.value)


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """A user who may write nothing, also where the tests are run by root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("open_elsewhere", [False, True])
def test_a_store_on_a_disk_that_cannot_be_written_is_replayed(open_elsewhere: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = VerdictStore(folder / "s.sqlite")
        writer.put(request(), REPLY)
        if not open_elsewhere:
            writer.__exit__()
        folder.chmod(0o555)
        for path in folder.iterdir():
            path.chmod(0o444)
        try:
            with nobody():
                before = sorted(path.name for path in folder.iterdir())
                with VerdictStore(folder / "s.sqlite", create=False) as store:
                    assert store.get(request()) == REPLY
                    with pytest.raises(UserError, match="the store of verdicts failed"):
                        store.put(request(attempt=1), REPLY)
                assert sorted(path.name for path in folder.iterdir()) == before
                with pytest.raises(UserError, match="cannot be used as a store of verdicts"):
                    VerdictStore(folder / "s.sqlite")
        finally:
            folder.chmod(0o755)


def test_without_locks_it_goes_on_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with VerdictStore(tmp_path / "s.sqlite") as store:
        for attempt in range(2):
            with store.alone(request(attempt=attempt)):
                store.put(request(attempt=attempt), REPLY)
        assert len(store.export()) == 2
    assert len(caplog.messages) == 1
    assert re.search("the file system has no locks .No locks available.*local disk", caplog.messages[0])


def test_each_request_has_a_byte_of_its_own_that_is_locked_and_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(fcntl, "lockf", lambda file, what, length, start: calls.append((what, length, start)))
    requests = [request(attempt=attempt) for attempt in (0, 1, 0)]
    with VerdictStore(tmp_path / "s.sqlite") as store:
        for one in requests:
            with store.alone(one):
                assert len(calls) % 2 == 1
    places = [int(stable_hash(one)[:12], 16) for one in requests]
    assert places[0] != places[1]
    whats = (fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN)
    assert calls == [(what, 1, place) for place in places for what in whats]


def test_who_waits_for_a_stopped_process_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from prefopt.judging.verdict_store import VerdictStore\n"
        "store = VerdictStore(sys.argv[2])\n"
        "with store.alone({'i': 1}):\n"
        "    store._connection.execute('BEGIN IMMEDIATE')\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    package, path = str(Path(__file__).parents[3] / "workflow"), tmp_path / "s.sqlite"
    monkeypatch.setattr(verdict_store, "_WORD_AFTER", 0.2)
    monkeypatch.setattr(verdict_store, "_BUSY_WAIT", 0.1)
    monkeypatch.setattr(verdict_store, "_WAIT", 0.5)
    with VerdictStore(path) as store:
        command = [sys.executable, "-c", code, package, str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            holder.send_signal(signal.SIGSTOP)
            try:
                with pytest.raises(
                    UserError, match=r"is locked.; another process holds it, perhaps one that was stopped"
                ):
                    store.put(request(), REPLY)
                assert "waiting for 0 s for another process that writes to it" in caplog.text
                thread = threading.Thread(target=lambda: store.alone({"i": 1}).__enter__(), daemon=True)
                thread.start()
                thread.join(0.6)
                assert thread.is_alive() and "for another process that asks for the same reply" in caplog.text
            finally:
                holder.send_signal(signal.SIGCONT)
                holder.communicate("")
            thread.join(5)
            assert not thread.is_alive()
