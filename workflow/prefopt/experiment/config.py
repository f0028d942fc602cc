"""A config, checked and completed.

The Snakefile and every command that plans a run resolve a config by `resolve`, so that they see the same values.
Only the standard library, yaml and jsonschema are imported: the Snakefile is read again in every remote job.
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from prefopt.errors import UserError
from prefopt.experiment import methods, targets
from prefopt.experiment.checks import fill_served, judges, leave_out_embedded, leave_out_untrained, problems
from prefopt.experiment.like import take_over
from prefopt.experiment.tasks import TASKS
from prefopt.resources import SCHEMA

Config = dict[str, Any]

logger = logging.getLogger(__name__)

# PyYAML follows YAML 1.1, where 5e-5 without a point is text, and Snakemake's `--config` leaves all within brackets text.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WHOLE = re.compile(r"[-+]?\d+")


def resolve(config: Mapping[str, Any], files: Iterable[str | Path] = ()) -> Config:
    """The config with every default filled in and every value checked.

    What belongs to embedded records falls away where a task has others, with a line in the log.

    Args:
        config: config/config.yaml with overlays merged over it; paths in it are relative to the working directory.
        files: the files that it was merged from, in which a key must not stand twice: YAML would keep the last.

    Returns:
        A new config in which every key of the schema has a value and `base.source` is not null. Resolving it
        again changes nothing.

    Raises:
        UserError: an unknown, missing or doubled key, a wrong type, an impossible value, or values that exclude each
            other. All that is wrong is said at once, a line each: a sentence that names the key, the value and what
            is allowed. A text that may be a key of an endpoint is not shown.
    """
    found = [sentence for path in files for sentence in doubled_keys(path)]
    try:
        resolved, odd = _text_keys(copy.deepcopy(dict(config)))
    except RecursionError:
        raise UserError("the config nests without end: an alias of YAML may stand within what it names.") from None
    taken_over: list[str] = []
    if isinstance(resolved.get("tasks"), dict):
        resolved["tasks"], taken_over, wrong = take_over(resolved["tasks"])
        odd += [f"tasks.{sentence}" for sentence in wrong]
    schema = _schema_for(resolved)
    resolved = _complete(resolved, schema)
    found += odd + list(_schema_problems(resolved, schema))
    for line in taken_over:
        logger.warning("tasks.%s", line)
    for task, section in resolved["tasks"].items() if isinstance(resolved.get("tasks"), dict) else ():
        if any(re.match(rf"tasks\.{re.escape(task)}\b", sentence) for sentence in found):
            continue  # values that are no values cannot be held against each other
        _name(section, task)
        for judge in judges(section).values():
            fill_served(judge, resolved)
        if (vllm := targets.vllm(section)) is not None and vllm["gpus"] is None:
            vllm["gpus"] = min(1, resolved["compute"]["gpus"])
        if "ceiling" not in section:  # a sweep's methods have an order of their own
            section["runs"] = _in_order(section["runs"])
        embedded = section["data"]["source"] == "embedded"
        if "base" in section and section["base"]["source"] is None:
            section["base"]["source"] = "shipped" if embedded else "scratch"
        if embedded and section.get("frontier", {}).get("reward", "") is None:
            section["frontier"]["reward"] = "oracle"
        left_out = leave_out_embedded(section)
        if not any(re.match(rf"tasks\.{section.get('models_of')}\b", sentence) for sentence in found):
            left_out += leave_out_untrained(section, resolved["tasks"])
        for line in left_out:
            logger.warning("tasks.%s.%s", task, line)
        found += [f"tasks.{task}.{problem}" for problem in problems(section, task, resolved)]
    if found:
        raise UserError("\n".join(dict.fromkeys(found)))
    return resolved


@functools.cache
def load_schema() -> dict[str, Any]:
    """The JSON schema of a config, which is read once and not to be changed."""
    schema: dict[str, Any] = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    for name in schema["$defs"]["methods"]:
        if methods.METHODS[name].reported:
            schema["$defs"]["task"]["properties"][name] = _section(schema["$defs"], name)
        if methods.METHODS[name].swept:
            schema["$defs"]["frontier"]["properties"][name] = _section(schema["$defs"], name, swept=True)
    for task in schema["properties"]["tasks"]["properties"].values():
        if "x-runs" in task["properties"]["runs"]:
            task["properties"]["runs"] = _runs(task["properties"]["runs"], task["properties"])
    return schema


def objective_values(name: str) -> list[str]:
    """The values of a method that its objective takes, of a method that learns from pairs by one."""
    own = load_schema()["$defs"]["methods"][name]["properties"]
    return [key for key in own if not (methods.METHODS[name].rounds and key in round_values())]


def round_values() -> list[str]:
    """The values of a run that is trained in rounds that are none of its trainer's."""
    return list(load_schema()["$defs"]["rounds"])


def _section(schemas: dict[str, Any], name: str, swept: bool = False) -> dict[str, Any]:
    """The schema of a method's section: its own values, and those of its trainer or, in a sweep, of a run of one."""
    method, varied = schemas["methods"][name], methods.METHODS[name].varies if swept else None
    own = {
        key: {**value, "x-optional": True} if key == varied else value for key, value in method["properties"].items()
    }
    # A run in rounds is evaluated at the end of each, whatever its trainer does meanwhile.
    by_interval = swept and not methods.METHODS[name].rounds
    shared = schemas["optimization"] | schemas["interval"] if by_interval else schemas["training"]
    shared = {**shared, **schemas["adapter"]}
    if swept and "keep" in shared:  # the weights that are evaluated are those that a round ends with
        shared["keep"] = {**shared["keep"], "default": "last"}
    for key, default in method.get("x-defaults", {}).items():
        shared[key] = {**shared[key], "default": default}
    return {
        "type": "object",
        "additionalProperties": False,
        "x-optional": True,
        "description": method["description"],
        "properties": {**own, **shared},
    }


def _schema_for(config: Config) -> dict[str, Any]:
    """The schema with a section for each task of the config's own, that of the task which it is like in the end."""
    schema = load_schema()
    known: dict[str, Any] = schema["properties"]["tasks"]["properties"]
    given = config["tasks"] if isinstance(config.get("tasks"), dict) else {}
    forms = {name: section.get("form") for name, section in given.items() if isinstance(section, dict)}
    own = {name: known[form] for name, form in forms.items() if name not in known and form in known}
    tasks = {**schema["properties"]["tasks"], "properties": {**known, **own}}
    return {**schema, "properties": {**schema["properties"], "tasks": tasks}}


def _name(section: Config, task: str) -> None:
    """Gives a task the words that it does not say itself: a shipped one those of the paper's."""
    words, own = section["words"], task not in TASKS
    words["title"] = words["title"] or (task if own else TASKS[task].title)
    if "reference" in words:
        reference = "the reference" if own else TASKS[task].reference
        words["reference"] = words["reference"] or _held_against(section["evaluation"]["against"]) or reference


def _held_against(against: Config | None) -> str:
    """A run's completions in words; nothing where the reference text is meant."""
    if against is None:
        return ""
    run, method = against["run"], methods.METHODS.get(against["run"])
    return f"{method.label if method else run} (T = {against['temperature']:g})"


def _in_order(runs: Config) -> Config:
    """Runs by method, the one that is called as its method before others: Snakemake puts an overlay's keys first."""
    known = list(methods.METHODS)

    def place(run: str) -> tuple[int, bool]:
        name = runs[run].get("method", run)
        return known.index(name) if name in known else len(known), run != name

    return {run: runs[run] for run in sorted(runs, key=place)}


def _runs(schema: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """The schema of a task's runs: each holds a method, and values that the method's section may hold."""
    which = schema["x-runs"]
    names = methods.swept() if which == "swept" else methods.names(which)
    values = {name: methods.own_values(name, sections.get(name, {}).get("properties", {})) for name in names}
    of_method = [
        {
            "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
            "then": {"additionalProperties": False, "properties": {"method": {}, **keys}},
        }
        for name, keys in values.items()
    ]
    run = {
        "type": ["object", "null"],
        "x-allowed": "a section with method and values of it, or null, which leaves the run out",
        "required": ["method"],
        "properties": {"method": {"enum": names, "description": "What is trained, sampled or chosen."}},
        "x-values": values,
        "allOf": of_method,
    }
    return {**schema, "additionalProperties": run}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything in a config that is not a section."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from leaves(below, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _complete(value: Any, schema: Mapping[str, Any]) -> Any:
    """Fills in defaults, and reads values as their type: 1 as 1.0 where a fraction is meant, "5e-5" as a number."""
    value = _of_text(value, schema)
    if isinstance(value, dict) and "properties" in schema:
        for key, below in schema["properties"].items():
            if below.get("x-optional") and key in value and _of_text(value[key], below) is None:
                del value[key]  # an overlay leaves the section out
            elif key in value:
                value[key] = _complete(value[key], below)
            elif "default" in below:
                value[key] = _complete(copy.deepcopy(below["default"]), below)
            elif "properties" in below and not below.get("x-optional"):
                value[key] = _complete({}, below)
        own = schema.get("x-values", {}).get(str(value.get("method")), {})
        value |= {key: _complete(value[key], below) for key, below in own.items() if key in value}
    elif isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        of_each, leaves_out = schema["additionalProperties"], schema.get("x-null-leaves-out")
        completed = {key: _complete(below, of_each) for key, below in value.items()}
        value = {key: below for key, below in completed.items() if below is not None or not leaves_out}
    elif isinstance(value, str) and "x-short" in schema:
        value = _complete({schema["x-short"]: value}, schema)
    elif isinstance(value, list) and "items" in schema:
        value = [_complete(item, schema["items"]) for item in value]
    elif "number" in _types(schema) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    elif schema.get("type") == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    return value


def _of_text(value: Any, schema: Mapping[str, Any]) -> Any:
    """A text as the number, truth or null that it says, where no text is meant."""
    types = _types(schema)
    if not isinstance(value, str) or "string" in types or "x-short" in schema or value in schema.get("enum", ()):
        return value
    if value == "null":
        return None
    if "boolean" in types and value in ("true", "false"):
        return value == "true"
    if "integer" in types and _WHOLE.fullmatch(value):
        return int(value)
    if {"integer", "number"} & {*types} and _NUMBER.fullmatch(value):
        return float(value)
    return value


def doubled_keys(path: str | Path) -> list[str]:
    """A sentence for each key that stands twice in one section of a YAML or JSON file."""
    try:
        top = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []  # whoever loads it says so
    found: list[str] = []
    waiting = [("", top)]
    walked = set()
    while waiting:
        place, node = waiting.pop()
        if node is None or id(node) in walked:
            continue  # an alias
        walked.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(place, item) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            first: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                here = f"{place}.{_word(str(key.value))}".lstrip(".")
                line = key.start_mark.line + 1
                if key.tag != "tag:yaml.org,2002:merge" and (key.tag, str(key.value)) in first:
                    found.append(
                        f"{here} stands twice in {path}, in lines {first[key.tag, str(key.value)]} and {line}; "
                        f"keep one, since the first would be lost."
                    )
                first.setdefault((key.tag, str(key.value)), line)
                waiting.append((here, value))
    return sorted(found)


def _text_keys(value: Any, path: str = "") -> tuple[Any, list[str]]:
    """A config without keys that are no text, and a sentence for each of them."""
    found: list[str] = []
    if isinstance(value, Mapping):
        kept = {}
        for key, below in value.items():
            if isinstance(key, str):
                kept[key], odd = _text_keys(below, f"{path}.{key}".lstrip("."))
                found += odd
            else:
                found.append(
                    f"{path or 'the config'} holds the key {_show(key)}, which is no text: write on, off, yes and no in "
                    f"quotes, and a decimal point where a comma stands."
                )
        return kept, found
    if isinstance(value, list):
        items = [_text_keys(item, f"{path}[{i}]") for i, item in enumerate(value)]
        return [item for item, _ in items], [sentence for _, odd in items for sentence in odd]
    return value, found


def _schema_problems(config: Config, schema: Mapping[str, Any]) -> Iterator[str]:
    errors = jsonschema.Draft202012Validator(schema).iter_errors(config)
    for error in sorted(errors, key=lambda error: [str(part) for part in error.absolute_path]):
        yield from _sentences(error)
    yield from _not_finite(config)
    yield from _missing(config, schema, "")


def _not_finite(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _not_finite(below, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _not_finite(item, f"{path}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path} is {value}; allowed: a finite number."


def _sentences(error: jsonschema.ValidationError) -> Iterator[str]:
    """What an error of the schema says, a sentence for each key."""
    path, schema = _dotted(error.absolute_path), _schema_of(error)
    instance: Any = error.instance
    if error.validator == "additionalProperties":
        known = sorted(schema["properties"])
        for unknown in sorted(key for key in instance if key not in known):
            near = difflib.get_close_matches(unknown, known, n=1)
            hint = f"did you mean {near[0]!r}? Allowed" if near else "allowed"
            found = f"{path}.{_word(unknown)} ({_kind(instance[unknown])})".lstrip(".")
            others = ", and any name with `like`, the task that it takes over" if path == "tasks" else ""
            yield f"{found} is not a key; {hint}: {', '.join(known)}{others}."
    elif error.validator == "required":
        for lacking in schema["required"]:
            if lacking not in instance:
                yield f"{path}.{lacking} is missing; allowed: {_allowed(schema['properties'][lacking])}."
    elif error.validator == "minProperties":
        yield f"{path} holds nothing; leave at least one in."
    elif error.validator == "uniqueItems":
        yield f"{path} is {_show(instance)}, where one stands twice; each may stand once."
    else:
        yield f"{path} is {_found(error)}; allowed: {_allowed(schema)}."


def _schema_of(error: jsonschema.ValidationError) -> dict[str, Any]:
    schema: Any = error.schema
    return dict(schema)


def _found(error: jsonschema.ValidationError) -> str:
    """The wrong value, unless it may be a key of an endpoint that was pasted where something else belongs."""
    schema = _schema_of(error)
    place = list(error.absolute_path)[2:3]
    of_judge = place in (["judge"], ["other_judges"]) and "propertyNames" not in error.absolute_schema_path
    if isinstance(error.instance, str | list) and ("x-secret" in schema or (of_judge and "enum" not in schema)):
        return "no allowed value (which is not shown, as it may hold a key)"
    return _show(error.instance)


def _kind(value: Any) -> str:
    """The value of a key that is not known; no text, which may be a key of an endpoint."""
    if isinstance(value, str | list):
        return "a text, which is not shown" if isinstance(value, str) else "a list"
    return _show(value)


def _missing(config: Config, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, below in schema["properties"].items():
        here = f"{path}.{key}".lstrip(".")
        if key not in config and below.get("x-optional"):
            continue
        if key not in config:
            yield f"{here} is missing; allowed: {_allowed(below)}."
        elif "properties" in below and isinstance(config[key], dict):
            yield from _missing(config[key], below, here)


def _word(key: str) -> str:
    """A key as it stands in a message, without what a terminal would obey."""
    return key if key.isprintable() else repr(key)


def _dotted(parts: Any) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


def _show(value: Any) -> str:
    """A value as the user will recognise it."""
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


def _allowed(schema: Mapping[str, Any]) -> str:
    """What a schema allows, in words."""
    if "x-allowed" in schema:
        return str(schema["x-allowed"])
    if "enum" in schema:
        return _or(["null" if option is None else str(option) for option in schema["enum"]])
    return _or([_TYPES[name](schema) for name in _types(schema)])


def _types(schema: Mapping[str, Any]) -> list[str]:
    types = schema.get("type", [])
    return types if isinstance(types, list) else [types]


def _or(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _filled(schema: Mapping[str, Any]) -> str:
    return " of at least one" if schema.get("minItems") else ""


def _bounds(schema: Mapping[str, Any]) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {schema[key]}" for key, word in words.items() if key in schema]
    return f" {' and '.join(bounds)}" if bounds else ""


_TYPES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "integer": lambda schema: f"a whole number{_bounds(schema)}",
    "number": lambda schema: f"a number{_bounds(schema)}",
    "string": lambda schema: "text",
    "boolean": lambda schema: "true or false",
    "null": lambda schema: "null",
    "array": lambda schema: (
        f"a list{' of at least one' if schema.get('minItems') else ''}: {_allowed(schema['items'])}"
    ),
    "object": lambda schema: f"a section with the keys {', '.join(sorted(schema['properties']))}",
}
