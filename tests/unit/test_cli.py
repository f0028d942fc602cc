"""The command line: a stage a subcommand, one sentence for what a user can put right."""

from __future__ import annotations

import importlib
import os

import pytest

from prefopt import cli


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
    # A positional argument has no option, only its value.
    values = ((*action.option_strings[:1], (action.choices or ["1"])[0]) for action in required)
    return [stage, *(word for pair in values for word in pair)]


def test_a_user_error_is_one_sentence_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = '{"token_budget": 4, "dtype": "float32"}'
    arguments = ["best_of_n", "--candidates", "no.parquet", "--scores", "s", "--greedy", "g", "--recipe", recipe]
    assert cli.main([*arguments, "--prompts", "p", "--reference-model", "m", "--n", "4", "--out", "o"]) == 2
    assert (
        capsys.readouterr().err.strip() == "prefopt best_of_n: no.parquet does not exist: run the stage that makes it."
    )


def test_a_recipe_with_an_unknown_key_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = '{"dtype": "float32", "m": 1}'
    arguments = ["best_of_n", "--candidates", "c", "--scores", "s", "--greedy", "g", "--recipe", recipe]
    assert cli.main([*arguments, "--prompts", "p", "--reference-model", "m", "--n", "4", "--out", "o"]) == 2
    assert "BestOfNRecipe: unknown key 'm'; it takes dtype, token_budget." in capsys.readouterr().err


def test_gpus_are_taken_before_the_stage_and_none_is_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cli.main(["--gpus", "0", "store", "export", "--store", "no.sqlite", "--table", "t"]) == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert "no.sqlite does not exist" in capsys.readouterr().err
