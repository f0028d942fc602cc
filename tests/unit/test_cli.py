"""The command line: a stage a subcommand, one sentence for what a user can put right."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt import cli
from prefopt.runtime.launch import launch


@pytest.mark.parametrize("stage", list(cli.STAGES))
def test_every_stage_has_a_module_with_arguments_and_run(stage: str) -> None:
    module = importlib.import_module(cli.STAGES[stage][0])
    assert callable(module.run)
    arguments = _given(stage) if stage != "store" else ["store", "export", "--store", "s", "--table", "t"]
    assert cli.build_parser(stage).parse_args(["--threads", "2", *arguments]).stage == stage


def _given(stage: str) -> list[str]:
    """The stage with a value for each of its required arguments."""
    parser = cli.build_parser(stage)
    subparser = parser._subparsers._group_actions[0].choices[stage]  # type: ignore[union-attr, index]
    required = [action for action in subparser._actions if action.required]
    # Of several that exclude each other one is required.
    required += [group._group_actions[0] for group in subparser._mutually_exclusive_groups if group.required]
    # A positional argument has no option, only its value.
    values = ((*action.option_strings[:1], (action.choices or ["1"])[0]) for action in required)
    return [stage, *(word for pair in values for word in pair)]


def test_a_user_error_is_one_sentence_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = '{"token_budget": 4, "dtype": "float32"}'
    arguments = ["best_of_n", "--candidates", "no.parquet", "--scores", "s", "--greedy", "g", "--recipe", recipe]
    assert (
        cli.main([*arguments, "--prompts", "p", "--reference-model", "m", "--run", "r", "--n", "4", "--out", "o"]) == 2
    )
    assert (
        capsys.readouterr().err.strip() == "prefopt best_of_n: no.parquet does not exist: run the stage that makes it."
    )


def test_a_recipe_with_an_unknown_key_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = '{"dtype": "float32", "m": 1}'
    arguments = ["best_of_n", "--candidates", "c", "--scores", "s", "--greedy", "g", "--recipe", recipe]
    assert (
        cli.main([*arguments, "--prompts", "p", "--reference-model", "m", "--run", "r", "--n", "4", "--out", "o"]) == 2
    )
    assert "BestOfNRecipe: unknown key 'm'; it takes dtype, token_budget." in capsys.readouterr().err


def test_gpus_are_taken_before_the_stage_and_none_is_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cli.main(["--gpus", "0", "store", "export", "--store", "no.sqlite", "--table", "t"]) == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert "no.sqlite does not exist" in capsys.readouterr().err


def test_a_recipe_can_come_by_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"odd": 1}'))
    assert (
        cli.main(
            ["records", "--task", "tldr", "--form", "tldr", "--recipe", "-", "--table", "preferences", "--out", "o"]
        )
        == 2
    )
    assert "RecordsRecipe: unknown key 'odd'" in capsys.readouterr().err


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with files named like modules, which end whatever imports them."""
    for name in ("pyarrow", "openai", "argparse", "pandas"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(99)\n")
    monkeypatch.chdir(tmp_path)
    package = Path(cli.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(package))
    return tmp_path


@pytest.mark.parametrize("flags", [["-P"], []], ids=["as the rules start it", "by hand"])
def test_a_module_of_the_working_folder_does_not_run(planted: Path, flags: list[str]) -> None:
    stage = ["gather", "--parts", "no.parquet", "--out", "o"]
    words = [sys.executable, *flags, "-m", "prefopt", *stage]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.stderr.endswith("prefopt gather: no.parquet does not exist: run the stage that makes it.\n")
    assert result.returncode == 2


def test_a_module_of_the_working_folder_does_not_run_in_one_of_several_processes(planted: Path) -> None:
    assert launch(["--help"], 2) == 0


def test_a_job_of_a_rule_ends_its_log_with_a_word(tmp_path: Path) -> None:
    """`status` tells by it that a stage is done, in a folder that was copied too."""
    command = [sys.executable, "-m", "prefopt", "power", "--prompts", "100", "--seeds", "1"]
    environment = {key: value for key, value in os.environ.items() if key != "PREFOPT_CODE"}
    by_hand, of_rule = (
        subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, check=True).stderr
        for more in ({}, {"PREFOPT_CODE": "hash"})
    )
    assert by_hand == "" and of_rule[9:] == "power: done\n"
