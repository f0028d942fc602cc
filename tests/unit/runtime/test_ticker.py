"""A line a minute for each running stage."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefopt.runtime import stage_log, ticker

STEPS = "06:10:33 sft: 223 of 235 steps, 0.0 per second, 3000 s left, loss 3.665\n"
LINE = "223 of 235 steps, 0.004 per second, loss 3.665, 50 min left"


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    ticker.stop()


def write(folder: Path, name: str, text: str = STEPS, ago: float = 0) -> None:
    path = folder / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (time.time() - ago,) * 2)


def test_stages_at_work_have_a_line_here_or_on_another_machine(tmp_path: Path) -> None:
    began = time.time() - 1000
    write(tmp_path, "tldr/dpo")  # no process here writes it
    write(tmp_path, "tldr/killed", ago=121)
    write(tmp_path, "tldr/earlier", ago=2000)
    write(tmp_path, "tldr/done", STEPS + "06:14:00 sft: done\n")
    write(tmp_path, "tldr/begun", "06:14:00 no GPU is asked for\n")
    assert ticker.lines(tmp_path, began, every=60) == [f"tldr/dpo: {LINE}"]
    with (tmp_path / "logs" / "tldr" / "killed.log").open("ab"):
        assert len(ticker.lines(tmp_path, began, every=60)) == 1, "only what a process writes as its output counts"


def test_many_stages_are_counted(tmp_path: Path) -> None:
    for i in range(11):
        write(tmp_path, f"tldr/run_{i:02}", ago=11 - i)
    told = ticker.lines(tmp_path, 0, every=60)
    assert [line.partition(":")[0] for line in told[:-1]] == [f"tldr/run_{i:02}" for i in range(3, 11)]
    assert told[-1] == "and 3 more: python -m prefopt status"


def test_it_tells_until_it_is_stopped_and_keeps_no_process_alive(tmp_path: Path) -> None:
    told: list[str] = []
    again = threading.Event()

    def say(line: str) -> None:
        told.append(line)
        if len(told) == 2:
            again.set()

    ticker.start(say, tmp_path, every=0.01)
    write(tmp_path, "tldr/dpo", ago=-1000)
    assert again.wait(60)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "ticker"]
    assert thread.daemon and set(told) == {f"tldr/dpo: {LINE}"}
    ticker.stop()
    assert not thread.is_alive()


def test_a_fault_in_it_ends_it_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    said = threading.Event()

    def broken(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(ticker, "read_logs", broken)
    ticker.start(lambda line: (told.append(line), said.set())[0], tmp_path, every=0.01)
    assert said.wait(60)
    ticker.stop()
    assert told == ["No progress is shown any more (the disk is gone); the run goes on."]


def test_only_logs_of_this_run_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of thousands of finished stages costs a look at each one's time."""
    write(tmp_path, "tldr/earlier", ago=100)
    monkeypatch.setattr(stage_log, "_read", None)
    assert stage_log.read_logs(tmp_path, since=time.time() - 50) == []
