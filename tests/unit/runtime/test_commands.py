"""The commands of rules: what values become in a real shell."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from snakemake.utils import format as snakemake_format

from prefopt.runtime.commands import environment, judging_stage, key_variables, model_stage, option, quoted, table_stage

RULES = Path(__file__).parents[3] / "workflow" / "rules"
ODD = [
    "a b",
    "it's",
    '"',
    "x;touch RAN;#",
    "$(touch RAN)",
    "`touch RAN`",
    "-rf",
    "größe 文",
    "{1}",
    "a\nb",
    "*",
    "~",
    "\\",
]
STAGES = ("table_stage", "model_stage", "judging_stage", "quoted")


class Values:
    """Stands in for Snakemake's `input`, `params` and so on."""

    def __init__(self, **values: object) -> None:
        self.__dict__ |= values


def words_of(command: str, folder: Path) -> list[str]:
    """What a program is given by a command of bash, whose first word is replaced."""
    script = f"show() {{ printf '%s\\0' \"$@\"; }}; {command}"
    result = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, capture_output=True, check=True)
    return result.stdout.decode().split("\0")[:-1]


def test_every_value_is_one_word_of_the_shell(tmp_path: Path) -> None:
    command = snakemake_format(
        quoted("show {input} --out {output.x} {params.none} {threads}"),
        input=ODD,
        output=Values(x="$(touch RAN) '"),
        params=Values(none=[]),
        threads=2,
    )
    assert words_of(command, tmp_path) == [*ODD, "--out", "$(touch RAN) '", "2"]
    assert list(tmp_path.iterdir()) == []


def test_braces_of_the_shell_stay_and_a_format_of_ones_own_is_refused() -> None:
    assert quoted("a {{b}} {c}") == "a {{b}} {c:q}"
    with pytest.raises(ValueError, match=r"\{params\.x\} has a format of its own"):
        quoted("{params.x:q}")


def test_an_option_takes_a_path_with_a_leading_dash_as_its_value() -> None:
    assert option("true_reward_model", "-my model") == ["--true-reward-model", "./-my model"]
    assert option("votes", ["a", "-b"]) == ["--votes", "a", "./-b"]


@pytest.mark.parametrize("make", [table_stage, model_stage, judging_stage])
def test_a_stage_starts_with_a_safe_path_and_only_a_judge_has_the_keys(make: object) -> None:
    command = make("sft --model {params.model}")  # type: ignore[operator]
    assert ' "$PREFOPT_PYTHON" -P -m prefopt ' in command
    assert command.endswith("sft --model {params.model:q} > {log:q} 2>&1")
    assert ("env $PREFOPT_UNSET " in command) == (make is not judging_stage)


def test_what_is_longer_than_an_argument_can_be_is_read_from_standard_input(tmp_path: Path) -> None:
    value = "it's $(x) " * 20_000
    command = snakemake_format(
        table_stage("records --recipe -", stdin="{params.recipe}"),
        params=Values(recipe=value, code="abc"),
        log=["a b.log"],
    )
    (tmp_path / "fake").write_text("#!/bin/bash\nshift 3\nprintf '%s ' \"$@\"\ncat\n")
    (tmp_path / "fake").chmod(0o755)
    variables = {"PREFOPT_PYTHON": "./fake", "PREFOPT_PYTHONPATH": "", "PREFOPT_UNSET": ""}
    script = tmp_path / "script.sh"
    script.write_text(command)
    subprocess.run(["bash", "-eu", script], cwd=tmp_path, env={**os.environ, **variables}, check=True)
    assert (tmp_path / "a b.log").read_text() == f"records --recipe - {value}\n"


def chat(variable: str | None) -> dict[str, object]:
    return {"kind": "chat", "chat": {"api_key_env": variable}}


def test_the_environment_unsets_every_judges_key_and_keeps_the_working_folder_off_the_path() -> None:
    tldr = {"judge": {"kind": "oracle"}, "other_judges": {"a": chat("KEY_A"), "b": chat(None)}}
    config = {"tasks": {"tldr": tldr, "hh": {"judge": chat("KEY_H"), "other_judges": {}}, "imdb": {"runs": {}}}}
    assert key_variables(config) == ["KEY_A", "KEY_H"]
    inherited = {"PYTHONPATH": ":/site:.:lib:", "PREFOPT_UNSET": "--unset=KEY_H --unset=OUTER"}
    assert environment(Path("/a b/workflow"), "/bin/python", config, inherited) == {
        "PREFOPT_PYTHON": "/bin/python",
        "PREFOPT_PYTHONPATH": "/a b/workflow:/site",
        "PREFOPT_UNSET": "--unset=KEY_H --unset=OUTER --unset=KEY_A",
    }


def test_a_key_is_gone_and_a_planted_module_does_not_run_in_a_stage_that_does_not_judge(tmp_path: Path) -> None:
    (tmp_path / "prefopt.py").write_text("raise SystemExit('planted')")
    package = tmp_path / "package" / "prefopt"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import os\nprint(os.environ.get('KEY_A'), os.environ.get('OTHER'))\n")
    config = {"tasks": {"tldr": {"judge": chat("KEY_A"), "other_judges": {}}}}
    variables = environment(package.parent, sys.executable, config, {"PYTHONPATH": ":"})
    seen = {}
    for make in (table_stage, model_stage, judging_stage):
        values = {
            "log": "log",
            "threads": 1,
            "resources": Values(gpu=0, nodes=1),
            "params": Values(code="abc", lease=[]),
        }
        command = snakemake_format(make("x"), **values)
        keys = {"KEY_A": "sk-1", "OTHER": "2"}
        subprocess.run(
            ["bash", "-eu", "-c", command], cwd=tmp_path, env={**os.environ, **variables, **keys}, check=True
        )
        seen[make.__name__] = (tmp_path / "log").read_text()
    assert seen == {"table_stage": "None 2\n", "model_stage": "None 2\n", "judging_stage": "sk-1 2\n"}


@pytest.mark.parametrize("folder", [*ODD, "work"])
def test_a_folder_that_is_known_before_any_job_is_quoted_too(folder: str, tmp_path: Path) -> None:
    command = snakemake_format(quoted("show --work {work}/{x}", {"work": folder}), x="a b")
    assert words_of(command, tmp_path) == ["--work", f"{folder}/a b"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted(RULES.glob("*.smk")), ids=lambda path: path.stem)
def test_every_rule_is_quoted_in_one_place(path: Path) -> None:
    blocks = re.findall(r"^ +shell:\n((?: {8}.*\n)+)", path.read_text(), re.MULTILINE)
    assert len(blocks) == path.read_text().count("shell:")
    for block in blocks:
        tree = ast.parse(f"({block})", mode="eval").body
        terms = [tree.left, tree.right] if isinstance(tree, ast.BinOp) else [tree]
        for term in terms:
            assert isinstance(term, ast.Call) and isinstance(term.func, ast.Name) and term.func.id in STAGES, block
            # What the function makes of it is the only way for a value to the shell.
            assert all(isinstance(ast.literal_eval(word), str) for word in term.args), block
