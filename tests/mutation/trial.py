"""Tries changes that mutmut has made, each in a fork of one process that has found the tests and imported what they need.

    cd LAB/mutants && PYTHONPATH=. python trial.py CHANGES.json CODES.json PROCESSES

`CHANGES.json` lists the changes, `CODES.json` gets mutmut's exit code of each. The tests are those of which mutmut has
seen that they run the changed function, the quickest first, up to the first that fails.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

NO_TEST = 33


class Trial:
    """A pytest plugin: in place of running the tests once it runs them for each change."""

    def __init__(self, changes: list[str], processes: int) -> None:
        """Reads what mutmut has seen of the tests."""
        seen = json.loads(Path("mutmut-stats.json").read_text(encoding="utf-8"))
        self.seconds: dict[str, float] = seen["duration_by_test"]
        self.tests: dict[str, list[str]] = seen["tests_by_mangled_function_name"]
        self.changes, self.processes = changes, processes
        self.codes: dict[str, int] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Tries every change, if no test fails without one."""
        items = {item.nodeid: item for item in session.items}
        unchanged = forked(functools.partial(self.attempt, session, "", self.seconds, items))
        if os.waitstatus_to_exitcode(os.waitpid(unchanged, 0)[1]):
            return True
        children: dict[int, str] = {}
        for change in self.changes:
            names = self.tests.get(change.rpartition("__mutmut_")[0])
            if not names:
                self.codes[change] = NO_TEST
                continue
            if len(children) == self.processes:
                self.wait(children)
            children[forked(functools.partial(self.attempt, session, change, names, items))] = change
        while children:
            self.wait(children)
        return True

    def wait(self, children: dict[int, str]) -> None:
        """Notes how the next of the running processes has ended."""
        process, status = os.wait()
        self.codes[children.pop(process)] = os.waitstatus_to_exitcode(status)

    def attempt(self, session: pytest.Session, change: str, names: Iterable[str], items: dict[str, pytest.Item]) -> int:
        """Runs tests with a change until one fails, which is told by 1; one that hangs is ended by a signal."""
        os.environ["MUTANT_UNDER_TEST"] = change
        signal.alarm(round(60 + 20 * sum(self.seconds[name] for name in names)))
        quickest_first = [items[name] for name in sorted(names, key=self.seconds.__getitem__)]
        for item, following in zip(quickest_first, [*quickest_first[1:], None], strict=True):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                return 1
        return 0


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
    trial = Trial(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[3]))
    os.environ["MUTANT_UNDER_TEST"] = ""  # mutmut's trampoline looks here for the change to run
    pytest.main(
        ["-q", "-p", "no:cacheprovider", "--tb=no", *sorted({name.split("::")[0] for name in trial.seconds})], [trial]
    )
    Path(sys.argv[2]).write_text(json.dumps(trial.codes), encoding="utf-8")
