"""A stage's recipe: the resolved values that it was started with, as a frozen dataclass.

Defaults live in `workflow/schemas/config.schema.yaml` alone; a recipe has none, so that a value cannot
differ between the config and the code.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any, TypeVar

from prefopt.errors import UserError

Recipe = TypeVar("Recipe")


def from_json(recipe_type: type[Recipe], text: str) -> Recipe:
    """Builds a recipe from the JSON object that `--recipe` holds.

    Raises:
        UserError: the text is not a JSON object, a key is unknown or missing, or a value has the wrong type.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--recipe is not JSON ({error.msg} at character {error.pos}).") from error
    if not isinstance(values, dict):
        raise UserError(f"--recipe must be a JSON object, got {type(values).__name__}.")
    return from_dict(recipe_type, values)


def from_dict(recipe_type: type[Recipe], values: dict[str, Any]) -> Recipe:
    """Builds a recipe from a mapping that must name exactly the recipe's fields (see `from_json`)."""
    hints = typing.get_type_hints(recipe_type)
    name = recipe_type.__name__
    if unknown := sorted(values.keys() - hints.keys()):
        raise UserError(f"{name}: unknown key {unknown[0]!r}; it takes {', '.join(sorted(hints))}.")
    if missing := sorted(hints.keys() - values.keys()):
        raise UserError(f"{name}: the key {missing[0]!r} is missing.")
    return recipe_type(**{key: _coerce(name, key, hints[key], value) for key, value in values.items()})


def to_dict(recipe: Any) -> dict[str, Any]:
    """The recipe as a JSON-ready mapping, for manifests and hashes."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _coerce(name: str, key: str, hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise UserError(f"{name}: {key} is {value!r}; allowed: {', '.join(map(str, arguments))}.")
    if type(None) in arguments:
        if value is None:
            return None
        (hint,) = [option for option in arguments if option is not type(None)]
        return _coerce(name, key, hint, value)
    if origin is tuple and isinstance(value, list):
        items = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_coerce(name, key, hint, item) for hint, item in zip(items, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{name}: {key} is {value!r}, which is not of type {getattr(hint, '__name__', hint)}.")
