"""A config, checked and completed.

The Snakefile and every command that plans a run resolve a config by `resolve`, so that they see the same values.
Only the standard library, yaml and jsonschema are imported: the Snakefile is read again in every remote job.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from prefopt.checks import problems
from prefopt.errors import UserError

SCHEMA = Path(__file__).parents[1] / "schemas" / "config.schema.yaml"

Config = dict[str, Any]

# PyYAML follows YAML 1.1, where 5e-5 without a point is text.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def resolve(config: Mapping[str, Any]) -> Config:
    """The config with every default filled in and every value checked.

    Args:
        config: config/config.yaml with overlays merged over it; paths in it are relative to the working directory.

    Returns:
        A new config in which every key of the schema has a value and `base.source` is not null. Resolving it
        again changes nothing.

    Raises:
        UserError: an unknown or missing key, a wrong type, an impossible value, or values that exclude each
            other; one sentence that names the key, the value and what is allowed.
    """
    schema = load_schema()
    resolved = _complete(copy.deepcopy(dict(config)), schema)
    _check_schema(resolved, schema)
    for task, section in resolved["tasks"].items():
        if "base" in section and section["base"]["source"] is None:
            section["base"]["source"] = "shipped" if section["data"]["source"] == "embedded" else "scratch"
        for problem in problems(section, task):
            raise UserError(f"tasks.{task}.{problem}")
    return resolved


def load_schema() -> dict[str, Any]:
    """The JSON schema of a config."""
    schema: dict[str, Any] = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    return schema


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything in a config that is not a section."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from leaves(below, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _complete(value: Any, schema: Mapping[str, Any]) -> Any:
    """Fills in defaults, and reads numbers as their type: 1 as 1.0 where a fraction is meant, "5e-5" as a number."""
    if isinstance(value, dict) and "properties" in schema:
        for key, below in schema["properties"].items():
            if below.get("x-optional") and key in value and value[key] is None:
                del value[key]  # an overlay leaves the section out
            elif key in value:
                value[key] = _complete(value[key], below)
            elif "default" in below:
                value[key] = _complete(copy.deepcopy(below["default"]), below)
            elif "properties" in below and not below.get("x-optional"):
                value[key] = _complete({}, below)
    elif isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        kept = {key: below for key, below in value.items() if below is not None or not schema.get("x-null-leaves-out")}
        value = {key: _complete(below, schema["additionalProperties"]) for key, below in kept.items()}
    elif isinstance(value, list) and "items" in schema:
        value = [_complete(item, schema["items"]) for item in value]
    elif "number" in _types(schema) and _is_number(value):
        value = float(value)
    elif schema.get("type") == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    return value


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return _EXPONENT.fullmatch(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_schema(config: Config, schema: Mapping[str, Any]) -> None:
    errors = jsonschema.Draft202012Validator(schema).iter_errors(config)
    for error in sorted(errors, key=lambda error: [str(part) for part in error.absolute_path]):
        path = _dotted(error.absolute_path)
        if error.validator == "additionalProperties":
            known = sorted(error.schema["properties"])
            unknown = sorted(str(key) for key in error.instance if key not in known)[0]
            near = difflib.get_close_matches(unknown, known, n=1)
            hint = f"did you mean {near[0]!r}? Allowed" if near else "allowed"
            found = f"{path}.{unknown} ({_show(error.instance[unknown])})".lstrip(".")
            raise UserError(f"{found} is not a key; {hint}: {', '.join(known)}.")
        if error.validator == "required":
            lacking = next(key for key in error.schema["required"] if key not in error.instance)
            raise UserError(f"{path}.{lacking} is missing; allowed: {_allowed(error.schema['properties'][lacking])}.")
        if error.validator == "uniqueItems":
            raise UserError(f"{path} is {_show(error.instance)}, where one stands twice; each may stand once.")
        # A key that was pasted where its variable's name belongs must not be printed.
        secret = "no allowed value (which is not shown, as it may hold a key)"
        found = secret if error.schema.get("x-secret") else _show(error.instance)
        raise UserError(f"{path} is {found}; allowed: {_allowed(error.schema)}.")
    for path, value in leaves(config):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise UserError(f"{path} is {item}; allowed: a finite number.")
    _check_complete(config, schema, "")


def _check_complete(config: Config, schema: Mapping[str, Any], path: str) -> None:
    for key, below in schema["properties"].items():
        here = f"{path}.{key}".lstrip(".")
        if key not in config and below.get("x-optional"):
            continue
        if key not in config:
            raise UserError(f"{here} is missing; allowed: {_allowed(below)}.")
        if "properties" in below and config[key] is not None:
            _check_complete(config[key], below, here)


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
