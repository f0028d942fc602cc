"""Tasks of the user's own: what each takes over from another, see `like` in the config."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import yaml

from prefopt.experiment.tasks import RECORD_FILES, TASKS
from prefopt.resources import DEFAULTS

Config = dict[str, Any]

NAME = r"[a-z][a-z0-9_]*"  # of a task
# Names of files that would be another task's, and of folders that hold a seed's results.
_TAKEN = re.compile(r".*_(scores|true_rewards|subsets|verdicts|curve|samples)|seed_[0-9]+|all")
# Of the prompts, so many are set aside for a judge that takes an oracle's place.
GOLD_FRACTION = 0.3


def take_over(tasks: Config) -> tuple[Config, list[str], list[str]]:
    """The sections of all tasks, each merged over that of the task which it is like.

    What stands in the section itself comes first, then that of the task named by `like`, which may be like a third. A
    shipped task that the config leaves out is taken as config/config.yaml has it. Records are never taken over: a section
    that says where its own come from reads no file and no data set of the other task, and an oracle, which knows embedded
    records alone, gives way to a reward model on pairs that nothing else sees.

    Args:
        tasks: a config's section `tasks`.

    Returns:
        The sections, with `form`, the shipped task that each is like in the end, in place of `like`; a sentence for
        each thing that falls away; and one for each thing that is wrong. Both without the leading "tasks.".
    """
    found: list[str] = []
    lines: list[str] = []

    def section(name: str, above: tuple[str, ...]) -> Config | None:
        given = tasks[name] if tasks.get(name) is not None or name not in TASKS else _defaults()[name]
        own = {key: copy.deepcopy(value) for key, value in given.items() if key != "like"}
        if name in TASKS:
            own.setdefault("form", name)
        if "like" not in given:
            return own
        like = given["like"]
        if not isinstance(like, str) or (like not in TASKS and not isinstance(tasks.get(like), dict)):
            named = ", ".join(
                sorted({*TASKS, *(name for name, value in tasks.items() if isinstance(value, dict))} - {name})
            )
            found.append(f"{name}.like is {_show(like)}; allowed: another task, which are {named}.")
            return None
        if like in (name, *above):
            found.append(f"{name}.like is {like!r}, which is like {name} itself; name a task that is not.")
            return None
        other = section(like, (*above, name))
        return None if other is None else _over(other, own, like, name, [] if above else lines)

    made = {name: section(name, ()) if isinstance(own, dict) else own for name, own in tasks.items()}
    found += [
        f"{name} is no name for a task; allowed: small letters, digits and underscores, a letter first, and no name that "
        f"files of another task have (it may not end with _scores, _subsets, _verdicts, _curve or _samples)."
        for name, own in tasks.items()
        if isinstance(own, dict) and "like" in own and (not re.fullmatch(NAME, name) or _TAKEN.fullmatch(name))
    ]
    wrong = {sentence.partition(".")[0].partition(" ")[0] for sentence in found}
    return {name: own for name, own in made.items() if own is not None or name not in wrong}, lines, found


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, str) else "no text"


def _over(other: Config, own: Config, like: str, name: str, lines: list[str]) -> Config:
    """A section merged over the one that it is like."""
    data = own.get("data")
    if isinstance(data, dict) and "source" in data and isinstance(other.get("data"), dict):
        brought = (*RECORD_FILES, "hub", "records")
        other["data"] = {key: value for key, value in other["data"].items() if key not in brought}
    merged = _merged(other, own)
    merged.pop("words", None)
    if "words" in own:
        merged["words"] = own["words"]
    source = merged["data"].get("source") if isinstance(merged.get("data"), dict) else "embedded"
    judge = merged.get("judge")
    if source != "embedded" and "judge" not in own and isinstance(judge, dict) and judge.get("kind") == "oracle":
        merged["judge"] = {"kind": "reward_model"}
        line = f"{name}.judge is a reward model in place of the oracle of {like}, which knows embedded records alone"
        if "models_of" not in merged and "gold_fraction" not in merged["data"]:
            merged["data"]["gold_fraction"] = GOLD_FRACTION
            line += f"; data.gold_fraction, {GOLD_FRACTION:g} of the prompts, is set aside for it"
        lines.append(f"{line}.")
    return merged


def _merged(below: Any, above: Any) -> Any:
    """Sections key by key, `above` over `below`; anything else is replaced."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


@functools.cache
def _defaults() -> Config:
    tasks: Config = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))["tasks"]
    return tasks
