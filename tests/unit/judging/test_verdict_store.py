from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefopt.errors import UserError
from prefopt.judging import stored
from prefopt.judging.verdict_store import Reply, VerdictStore
from prefopt.tables import read_table, write_table

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
    stored.run(parser.parse_args(["export", "--store", str(tmp_path / "a.sqlite"), "--table", str(table)]))
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
