"""Tries changes that mutmut has made, each in a fork of one process that has found the tests and imported what they need.

    cd LAB/mutants && PYTHONPATH=. python trial.py CHANGES.json CODES.json PROCESSES TEST ...

`CHANGES.json` lists the changes, `CODES.json` gets an exit code of each. Every test runs once without a change, to see
which functions it runs and how long it takes; a change is tried by those that run its function, the quickest first, up to
the first that fails.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

NO_TEST = 33


class Trial:
    """A pytest plugin: in place of running the tests once it runs them for each change."""

    def __init__(self, changes: list[str], processes: int) -> None:
        """Holds what is to be tried, so many at once."""
        self.changes, self.processes = changes, processes
        self.codes: dict[str, int] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Tries every change, if no test fails without one."""
        with tempfile.TemporaryDirectory() as folder:
            seen = Path(folder, "seen.json")
            unchanged = forked(lambda: run_unchanged(session.items, seen))
            if os.waitstatus_to_exitcode(os.waitpid(unchanged, 0)[1]):
                return True
            seconds, functions = json.loads(seen.read_text(encoding="utf-8"))
        quickest_first = sorted(session.items, key=lambda item: seconds[item.nodeid])
        children: dict[int, str] = {}
        for change in self.changes:
            tests = [item for item in quickest_first if change.rpartition("__mutmut_")[0] in functions[item.nodeid]]
            if not tests:
                self.codes[change] = NO_TEST
                continue
            if len(children) == self.processes:
                self.wait(children)
            limit = 60 + 20 * sum(seconds[item.nodeid] for item in tests)
            children[forked(functools.partial(run_changed, change, tests, round(limit)))] = change
        while children:
            self.wait(children)
        return True

    def wait(self, children: dict[int, str]) -> None:
        """Notes how the next of the running processes has ended."""
        process, status = os.wait()
        self.codes[children.pop(process)] = os.waitstatus_to_exitcode(status)


def run_unchanged(tests: list[pytest.Item], seen: Path) -> int:
    """Runs tests as they are, writes the seconds and the functions of each, and tells by 1 that one fails."""
    from mutmut.state import state  # which wants a project around it

    os.environ["MUTANT_UNDER_TEST"] = "stats"
    seconds, functions = {}, {}
    for test, following in zip(tests, [*tests[1:], None], strict=True):
        state()._stats.clear()
        start = time.perf_counter()
        if fails(test, following):
            return 1
        seconds[test.nodeid], functions[test.nodeid] = time.perf_counter() - start, sorted(state()._stats)
    seen.write_text(json.dumps([seconds, functions]), encoding="utf-8")
    return 0


def run_changed(change: str, tests: list[pytest.Item], limit: int) -> int:
    """Runs tests with a change until one fails, which is told by 1; after so many seconds a signal ends it."""
    os.environ["MUTANT_UNDER_TEST"] = change
    signal.alarm(limit)
    return int(any(fails(test, following) for test, following in zip(tests, [*tests[1:], None], strict=True)))


def fails(test: pytest.Item, following: pytest.Item | None) -> bool:
    """Runs a test."""
    test.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
    return bool(test.session.testsfailed)


def forked(work: Callable[[], int]) -> int:
    """Does work in a child process, whose exit code it gives, and returns its id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return process


if __name__ == "__main__":
    changes, codes, processes, *selected = sys.argv[1:]
    trial = Trial(json.loads(Path(changes).read_text(encoding="utf-8")), int(processes))
    os.environ["MUTANT_UNDER_TEST"] = ""  # mutmut's trampoline looks here for the change to run
    pytest.main(["-q", "-p", "no:cacheprovider", "--tb=short", *selected], [trial])
    Path(codes).write_text(json.dumps(trial.codes), encoding="utf-8")
