"""The fingerprint changes with the code that a stage reaches, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt.cli import STAGES
from prefopt.experiment import targets
from prefopt.store import fingerprint as subject
from prefopt.store.fingerprint import fingerprint, reached

SOURCES = {
    "__init__.py": "",
    "stage.py": (
        '"""A stage."""\n\nimport logging\n\nfrom toy import lazy, methods\nfrom toy.errors import UserError\n'
        "from toy.lm import engine\nfrom toy.lm.engine import halve as half\n\nlogger = logging.getLogger(__name__)\n"
        'UNIT = "m"\n\n\ndef add_arguments(parser):\n    parser.add_argument("--x", help="a number", default=1)\n\n\n'
        'def run(x: int) -> int:\n    if x < 0:\n        raise UserError(f"{x} is below {_name()}.")\n'
        '    assert x < 9, "small"\n    logger.info("doubling %s", _name())\n    y = Scale(x).apply()\n'
        "    return engine.double(half(y)) + methods.TABLE[UNIT]()\n\n\n"
        'def _name():\n    return "zero"\n\n\n'
        "class Scale:\n    factor: int\n\n    def __init__(self, x):\n        self.x = x\n\n"
        "    def apply(self):\n        from toy import other\n\n        return other.f() * self.x\n\n\n"
        "def unused():\n    return lazy.g()\n"
    ),
    "errors.py": "class UserError(Exception):\n    pass\n",
    "methods.py": "def metre():\n    return 1\n\n\ndef foot():\n    return 2\n\n\nTABLE = {'m': metre}\n",
    "lm/__init__.py": "",
    "lm/engine.py": "from .core import factor\n\n\ndef double(x):\n    return factor * x\n\n\ndef halve(x):\n    return x / 2\n",
    "lm/core.py": "import toy.registry\n\nfactor = 2\nother_factor = 3\n\ntoy.registry.register('core', 1)\n",
    "registry.py": "known = {}\n\n\ndef register(name, value):\n    known[name] = value\n",
    "lazy.py": "def g():\n    return 1\n",
    "other.py": "def f():\n    return 1\n\n\ndef g():\n    return 1\n",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    for name, source in SOURCES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


def of(module: str, package: Path) -> str:
    """The fingerprint as a new process would see it."""
    for cached in (subject.fingerprint, subject.reached, subject._read, subject._code, subject._path_of):
        cached.cache_clear()
    return fingerprint(module, package)


def changed(package: Path, module: str, before: str, after: str) -> bool:
    old = of("toy.stage", package)
    path = package / module
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    return of("toy.stage", package) != old


@pytest.mark.parametrize(
    ("module", "before", "after"),
    [
        ("stage.py", '"""A stage."""', '"""Another docstring,\nof two lines."""'),
        ("stage.py", "-> int:\n", '-> int:\n    """Doubles."""\n    # why\n\n'),
        ("stage.py", "engine.double(half(y))", "engine.double(  # a comment\n        half(y)\n    )"),
        ("stage.py", "x: int) -> int", "x: float) -> float"),
        ("stage.py", "is below", "lies below"),
        ("stage.py", 'f"{x} is below {_name()}."', '_name() + "!"'),
        ("stage.py", '"doubling %s", _name()', '"twice %d", x'),
        ("stage.py", '    logger.info("doubling %s", _name())\n', ""),
        ("stage.py", '"zero"', '"nought"'),
        ("stage.py", '"small"', '"too large"'),
        ("stage.py", "a number", "some number"),
        ("stage.py", "return lazy.g()", "return 3"),
        ("methods.py", "return 2", "return 3"),
        ("methods.py", "TABLE =", "def inch():\n    return 3\n\n\nTABLE ="),
        ("lm/core.py", "factor = 2\n", "# the factor\nfactor = 2\n\n\n"),
        ("lm/core.py", "other_factor = 3", "other_factor = 4"),
        ("lazy.py", "return 1", "return 2"),
        ("other.py", "def g():\n    return 1", "def g():\n    return 2"),
    ],
)
def test_what_code_says_and_what_is_not_reached_change_nothing(
    package: Path, module: str, before: str, after: str
) -> None:
    assert not changed(package, module, before, after)


@pytest.mark.parametrize(
    ("module", "before", "after"),
    [
        ("stage.py", "double(half(y))", "double(half(y) + 1)"),
        ("stage.py", "x < 0", "x <= 0"),
        ("stage.py", "x < 9", "x < 8"),
        ("stage.py", "raise UserError", "raise ValueError"),
        ("stage.py", "self.x = x", "self.x = x + 1"),
        ("stage.py", "factor: int", "factor: float"),
        ("stage.py", "default=1", "default=2"),
        ("stage.py", 'UNIT = "m"', 'UNIT = "ft"'),
        ("methods.py", "return 1", "return 3"),
        ("methods.py", "{'m': metre}", "{'m': metre, 'ft': foot}"),
        ("lm/engine.py", "x / 2", "x // 2"),
        ("lm/core.py", "factor = 2", "factor = 3"),
        ("lm/core.py", "factor = 2", 'factor = "# no comment"'),
        ("lm/core.py", "'core', 1", "'core', 2"),
        ("lm/__init__.py", "", "print()\n"),
        ("registry.py", "known[name] = value", "known[name] = None"),
        ("other.py", "return 1", "return 2"),
    ],
)
def test_an_edit_of_what_is_reached_changes_it(package: Path, module: str, before: str, after: str) -> None:
    assert changed(package, module, before, after)


def test_all_of_a_module_without_a_stage_is_reached(package: Path) -> None:
    assert set(reached("toy.other", package)) == {"toy:", "toy.other:", "toy.other:f", "toy.other:g"}


def test_a_module_that_is_handed_on_is_reached_as_a_whole(package: Path) -> None:
    (package / "stage.py").write_text("from toy import other\n\n\ndef run():\n    return vars(other)\n")
    assert {"toy.other:f", "toy.other:g"} <= set(reached("toy.stage", package))


def test_an_unknown_module_is_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"prefopt\.nonsense"):
        fingerprint("prefopt.nonsense")


def test_stages_of_this_package_reach_what_they_compute_with_and_no_more() -> None:
    dpo, win_rates = reached("prefopt.training.preference"), reached("prefopt.analysis.win_rates")
    assert {"prefopt.objectives:dpo_loss", "prefopt.lm.logprobs:completion_logprobs"} <= set(dpo)
    assert "prefopt.objectives:ppo_value_loss" not in dpo
    assert not any(name.startswith(("prefopt.experiment.config:", "prefopt.cli:", "prefopt.lm.")) for name in win_rates)


def test_every_stage_has_a_fingerprint_of_its_own() -> None:
    prints = {fingerprint(module) for module, _ in STAGES.values()}
    assert len(prints) == len(STAGES)


def test_what_is_named_apart_is_left_out_with_what_it_alone_reaches(package: Path) -> None:
    whole = set(reached("toy.stage", package))
    assert whole - set(reached("toy.stage", package, frozenset({"toy.stage:Scale"}))) >= {
        "toy.stage:Scale",
        "toy.other:f",
    }
    assert "toy.lm.core:factor" in reached("toy.stage", package, frozenset({"toy.stage:Scale"}))


def test_records_and_judges_of_one_kind_leave_the_code_of_others_out() -> None:
    """Every definition that a plan names apart is there to be left out."""
    config = {"tasks": {task: {"form": task, "data": {"source": "embedded"}} for task in ("tldr", "hh", "cnndm")}}
    every = set(reached("prefopt.data.records"))
    for task, reader in {"tldr": "posts", "hh": "dialogues", "cnndm": "news"}.items():
        apart = targets.other_readers(config, task)
        assert len(apart) == 6 and apart <= every
        kept = set(reached("prefopt.data.records", apart=apart))
        assert f"prefopt.data.synthetic.{reader}:generate" in kept and not kept & apart
        assert "prefopt.data.formats.recognise:FORMATS" not in kept
    apart = targets.other_readers({"tasks": {"hh": {"data": {"source": "records"}}}}, "hh")
    kept = set(reached("prefopt.data.records", apart=apart))
    assert "prefopt.data.formats.recognise:FORMATS" in kept and "prefopt.data.formats.hh:parse_pair" in kept
    assert len(apart) == 6 and not kept & apart
    for stage in ("prefopt.judging.stage", "prefopt.judging.items"):
        every = set(reached(stage))
        for kind in ("oracle", "reward_model", "human", "chat", "recorded"):
            apart = targets.other_judges({"kind": kind})
            assert len(apart) == 3 and apart <= every
        assert "prefopt.judging.endpoint:Endpoint" not in reached(stage, apart=targets.other_judges({"kind": "oracle"}))
