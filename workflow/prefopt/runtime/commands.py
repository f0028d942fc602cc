"""The command line of a rule, in the one place where values meet the shell.

A rule writes its stage and the values that it gives, as in `model_stage("sft --model {params.model}")`. Here every value
is quoted, whatever it holds, and the command is completed: which Python runs it, what stands in its environment, where
it logs. Nothing of this machine stands in a command, so that a moved checkout reruns nothing: it comes from variables
that `environment` gives.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

Config = dict[str, Any]

# Whoever tells a job to end (Slurm before a time limit) tells the shell too. It would die at once, the job would count
# as over, and what a trainer is still saving would be killed; with a trap the shell waits for the trainer.
_WAIT = "trap : TERM USR1; "
# Without -P the working folder stands first on the path of imports, and a file there named like a module would run.
_PYTHON = 'PREFOPT_CODE={params.code} PYTHONPATH="$PREFOPT_PYTHONPATH" "$PREFOPT_PYTHON" -P -m prefopt '
_LOG = " > {log} 2>&1"
_DEVICES = "--threads {threads} --gpus {resources.gpu} --nodes {resources.nodes} "


def table_stage(words: str, stdin: str = "", folders: Mapping[str, str] | None = None) -> str:
    """The command of a stage that runs no model.

    Args:
        words: the stage and its arguments, with Snakemake's `{values}`.
        stdin: what it reads from standard input, for a value that is longer than an argument can be.
        folders: see `quoted`.
    """
    return quoted(_WAIT + _env(keys=False) + _PYTHON + words + _LOG + (f" <<< {stdin}" if stdin else ""), folders)


def model_stage(words: str, folders: Mapping[str, str] | None = None) -> str:
    """The command of a stage that runs a model, with the job's threads and GPUs."""
    return quoted(_WAIT + _env(keys=False) + _PYTHON + _DEVICES + words + _LOG, folders)


def judging_stage(words: str) -> str:
    """The same of a stage that judges, which alone is given the judges' keys, and may leave its GPUs to a server."""
    return quoted(_WAIT + _env(keys=True) + _PYTHON + _DEVICES + "{params.lease} " + words + _LOG)


def quoted(command: str, folders: Mapping[str, str] | None = None) -> str:
    """A command whose every `{value}` Snakemake quotes: one word of the shell, or each item of a list one.

    Args:
        command: text with values.
        folders: what stands for a `{name}` among them, the same in every job.
    """
    text = ""
    for literal, field, spec, conversion in Formatter().parse(command):
        text += _plain(literal)
        if field is not None:
            if spec or conversion:
                raise ValueError(f"{{{field}}} has a format of its own in {command!r}")
            text += _plain(shlex.quote(folders[field])) if folders and field in folders else f"{{{field}:q}}"
    return text


def _plain(text: str) -> str:
    """A text in which Snakemake finds no values."""
    return text.replace("{", "{{").replace("}", "}}")


def environment(package: Path, python: str, config: Config, inherited: Mapping[str, str]) -> dict[str, str]:
    """What the commands' variables hold.

    Args:
        package: the folder that holds `prefopt`.
        python: the interpreter.
        config: a resolved config.
        inherited: the environment of Snakemake. Its own path of imports follows the package; an entry that is empty
            or relative means the working folder and is left out.
    """
    entries = inherited.get("PYTHONPATH", "").split(os.pathsep)
    path = dict.fromkeys([str(package), *(entry for entry in entries if Path(entry).is_absolute())])
    # Two configs of one outer workflow share the variables.
    unset = dict.fromkeys([*inherited.get("PREFOPT_UNSET", "").split(), *_unset(key_variables(config))])
    return {
        "PREFOPT_PYTHON": python,
        "PREFOPT_PYTHONPATH": os.pathsep.join(path),
        "PREFOPT_UNSET": " ".join(unset),
    }


def key_variables(config: Config) -> list[str]:
    """Names of the environment variables that hold the key of some judge."""
    sections = [section for section in config["tasks"].values() if "judge" in section]
    judges = [judge for section in sections for judge in (section["judge"], *section["other_judges"].values())]
    names = {judge["chat"]["api_key_env"] for judge in judges if judge.get("chat")}
    return sorted(name for name in names if name)


def _unset(names: Iterable[str]) -> list[str]:
    return [f"--unset={name}" for name in names]


def _env(keys: bool) -> str:
    # The variable holds several words, and names of variables alone.
    return "" if keys else "env $PREFOPT_UNSET "


def option(name: str, value: str | Sequence[str]) -> list[str]:
    """The words of an option, `--name value ...`; a path that begins with a dash is no option."""
    values = [value] if isinstance(value, str) else list(value)
    return [f"--{name.replace('_', '-')}", *(path_word(str(one)) for one in values)]


def path_word(path: str) -> str:
    """The same path, which no command takes for an option."""
    return f"./{path}" if path.startswith("-") else path
