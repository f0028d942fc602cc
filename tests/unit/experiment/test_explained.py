"""Where the values of a config come from."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from prefopt.errors import UserError
from prefopt.experiment import explained
from prefopt.experiment.explained import merged, origins
from prefopt.experiment.like import DEFAULTS


def write(path: Path, values: object) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def overlays(tmp_path: Path) -> list[Path]:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    records = {"source": "records", "records": [str(tmp_path / "pairs.jsonl")]}
    first = {"seeds": [1, 2], "tasks": {"tldr": {"dpo": {"beta": 0.3, "learning_rate": 1e-5}}}}
    second = {"tasks": {"tldr": {"dpo": {"beta": 0.4}}, "own": {"like": "tldr", "data": records, "dpo": {"epochs": 7}}}}
    return [write(tmp_path / "first.yaml", first), write(tmp_path / "second.yaml", second)]


def test_each_value_comes_from_the_last_file_that_says_it(overlays: list[Path]) -> None:
    found = {key: (value, where) for key, value, where in origins([DEFAULTS, *overlays])}
    assert found["seeds"] == ([1, 2], "first.yaml")
    assert found["tasks.tldr.dpo.beta"] == (0.4, "second.yaml")
    assert found["tasks.tldr.dpo.learning_rate"] == (1e-5, "first.yaml")
    assert found["tasks.tldr.dpo.batch_size"][1] == "config.yaml"
    assert found["tasks.tldr.dpo.label_smoothing"] == (0.0, "default")
    assert found["tasks.tldr.base.source"] == ("shipped", "derived (null in config.yaml)")
    assert found["tasks.own.dpo.epochs"] == (7, "second.yaml")
    assert found["tasks.own.dpo.beta"] == (0.4, "second.yaml, of tasks.tldr")
    assert found["tasks.own.data.source"] == ("records", "second.yaml")
    assert found["tasks.own.base.source"] == ("scratch", "derived (null in config.yaml, of tasks.tldr)")


def test_it_prints_what_is_asked_for(overlays: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    explained.add_arguments(parser)
    explained.run(parser.parse_args(["tasks.tldr.by_step", "seeds", "--configfile", *map(str, overlays)]))
    lines = capsys.readouterr().out.splitlines()
    assert "tasks.tldr.by_step.temperatures: [1.0]  # config.yaml" in lines and "seeds: [1, 2]  # first.yaml" in lines
    assert all(line.startswith(("tasks.tldr.by_step.", "seeds: ")) for line in lines)
    with pytest.raises(UserError, match=r"no key 'tasks.tldr.dp': config/README.md lists them"):
        explained.run(parser.parse_args(["tasks.tldr.dp"]))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml cannot be read"):
        merged([DEFAULTS, tmp_path / "missing.yaml"])


@pytest.mark.parametrize("tasks", ["[]", "null", "3"])
def test_a_config_that_is_not_right_is_refused(tasks: str, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(f"tasks: {tasks}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^tasks is .*; allowed: a section"):
        list(origins([DEFAULTS, tmp_path / "odd.yaml"]))
