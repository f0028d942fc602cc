"""The command `config`: every value of a config as a run sees it, and where each comes from."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.experiment.config import resolve
from prefopt.resources import DEFAULTS

Config = dict[str, Any]

_NOWHERE = object()


def merged(overlays: Sequence[Path | Config]) -> Config:
    """What Snakemake makes of its configfile and of overlays, files or what they hold, by its own functions."""
    from snakemake.utils import update_config

    config: Config = {}
    for one in overlays:
        update_config(config, _read(one) if isinstance(one, Path) else copy.deepcopy(one))
    return config


def _read(path: Path) -> Config:
    from snakemake.common.configfile import load_configfile
    from snakemake.exceptions import WorkflowError

    try:
        found: Config = load_configfile(path)
    except (WorkflowError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): name another file.") from error
    return found


def origins(files: Sequence[Path]) -> Iterator[tuple[str, Any, str]]:
    """Each value of the resolved config: its key, itself, and where it comes from.

    That is the last file that says it; for a task of the user's own also the file that says it of the task which it is
    like; the schema's default; or `derived`, where a file says another value or nothing is a default of it.

    Args:
        files: config/config.yaml and overlays over it.

    Raises:
        UserError: the config is not right.
    """
    raw = [(path.name, _read(path)) for path in files]
    given = merged(files)
    resolved = resolve(given, files[1:])
    likes = {name: one["like"] for name, one in given["tasks"].items() if isinstance(one, dict) and "like" in one}
    for parts, value in _leaves(resolved):
        yield ".".join(parts), value, _origin(parts, value, raw, likes)


def _origin(parts: tuple[str, ...], value: Any, raw: list[tuple[str, Config]], likes: Mapping[str, str]) -> str:
    places, said = [(parts, "")], set[str]()
    while len(parts) > 2 and parts[0] == "tasks" and parts[1] in likes and parts[1] not in said:
        said.add(parts[1])
        parts = ("tasks", likes[parts[1]], *parts[2:])
        places.append((parts, f", of tasks.{parts[1]}"))
    for place, words in places:
        for name, config in reversed(raw):
            found = _at(config, place)
            if found is _NOWHERE:
                continue
            return f"{name}{words}" if found == value else f"derived ({json.dumps(found)} in {name}{words})"
    return "default"


def _leaves(section: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, str(key)))
        else:
            yield (*above, str(key)), value


def _at(config: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        if not isinstance(config, dict) or part not in config:
            return _NOWHERE
        config = config[part]
    return config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command `config`."""
    parser.add_argument(
        "keys", nargs="*", help="keys to show, with all below them, such as tasks.tldr.dpo (default: all)"
    )
    parser.add_argument(
        "--configfile", nargs="+", type=Path, default=[], help="overlays of config/config.yaml, as Snakemake takes them"
    )


def run(args: argparse.Namespace) -> None:
    """Prints a line for each value.

    Raises:
        UserError: the config is not right, or has nothing under a key that is asked for.
    """
    rows = list(origins([DEFAULTS, *args.configfile]))
    for key in args.keys:
        if not any(f"{name}.".startswith(f"{key}.") for name, _, _ in rows):
            raise UserError(f"the config has no key {key!r}: config/README.md lists them.")
    for name, value, where in rows:
        if not args.keys or any(f"{name}.".startswith(f"{key}.") for key in args.keys):
            print(f"{name}: {json.dumps(value, ensure_ascii=False)}  # {where}")
