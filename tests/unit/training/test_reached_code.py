"""What a stage runs is what its fingerprint holds: every trainer is watched while it trains."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import every_trainer
import prefopt
from prefopt.store.fingerprint import reached
from tiny_task import Task

# What is called for a log line alone.
SPOKEN = {"prefopt.training.loop:_short"}
PACKAGE = str(Path(prefopt.__file__).parent)


def executed(call: Callable[[], Any]) -> set[str]:
    """The package's functions and classes that run, as `reached` names them."""
    found: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            found.add(f"{frame.f_globals['__name__']}:{code.co_qualname.partition('.')[0]}")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    # Comprehensions and lambdas of a module, and imports, which run its definitions.
    return {name for name in found if "<" not in name}


@pytest.mark.parametrize("name", ["adapter", "reference", "dpo", "kto", "reward", "ppo", "pretrain", "classifier"])
def test_every_function_that_a_trainer_runs_is_in_its_fingerprint(name: str, task: Task, tmp_path: Path) -> None:
    every_trainer.make_inputs(task.folder, tmp_path)
    ran = executed(lambda: every_trainer.run(name, task.folder, tmp_path, **few(name)))
    assert len(ran) > 30
    assert ran - SPOKEN <= set(reached(every_trainer.MODULES[name].__name__))


def few(name: str) -> dict[str, int]:
    """Values of a short run."""
    return {"reference": {}, "ppo": {"updates": 1}}.get(name, {"epochs": 1})
