"""A config, checked and completed, and the recipe of each stage read from it.

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

from prefopt.errors import UserError
from prefopt.files import canonical_json

SCHEMA = Path(__file__).parents[1] / "schemas" / "config.schema.yaml"

# The last line of a task's prompts, which a cut never removes.
PROMPT_SUFFIX = {"tldr": "\n\nTL;DR:"}

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
        if section["base"]["source"] is None:
            section["base"]["source"] = "shipped" if section["data"]["source"] == "embedded" else "scratch"
        for check in _CHECKS:
            for problem in check(section):
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


def stage_recipe(config: Config, task: str, stage: str) -> Config:
    """The values that a stage of a task is started with: the JSON object of its `--recipe`.

    Args:
        config: a resolved config.
        task: key of `tasks`.
        stage: a rule's name; `candidates` and `gold_reward_model` are the stages `sample` and `reward` with values of
            their own.
    """
    return _RECIPES[stage](config, config["tasks"][task], task)


def recipe_json(config: Config, task: str, stage: str) -> str:
    """`stage_recipe` as text: equal values give equal text."""
    return canonical_json(stage_recipe(config, task, stage))


def _training(config: Config, section: Config, **others: Any) -> Config:
    """The recipe of a trainer: its section less what only the rules read, and what all trainers share."""
    values = {key: value for key, value in section.items() if key not in ("source", "path", "name", "revision")}
    return {**_engine(config), **values, "seed": _seed(config, section), **others}


def _seed(config: Config, section: Config) -> int:
    seed: int = config["seed"] if section["seed"] is None else section["seed"]
    return seed


def _engine(config: Config) -> Config:
    return {key: config["compute"][key] for key in ("dtype", "token_budget")}


def _sampling(config: Config, task: Config, **others: Any) -> Config:
    prompts = {key: task["evaluation"][key] for key in ("validation_prompts", "test_prompts")}
    return {**_engine(config), **task["sampling"], **prompts, "n": 1, "seed": _seed(config, task["sampling"]), **others}


_RECIPES: dict[str, Callable[[Config, Config, str], Config]] = {
    "records": lambda config, task, name: task["data"],
    "pretrain": lambda config, task, name: _training(config, task["pretrain"]),
    "prepare": lambda config, task, name: {**task["lengths"], "suffix": PROMPT_SUFFIX[name]},
    "sft": lambda config, task, name: _training(config, task["sft"], completion="response"),
    "preferred_ft": lambda config, task, name: _training(config, task["preferred_ft"], completion="chosen"),
    "reference": lambda config, task, name: _engine(config),
    "dpo": lambda config, task, name: _training(config, task["dpo"]),
    "reward_model": lambda config, task, name: _training(config, task["reward_model"]),
    "gold_reward_model": lambda config, task, name: _training(config, task["gold_reward_model"]),
    "ppo": lambda config, task, name: _training(config, task["ppo"]),
    "sample": lambda config, task, name: _sampling(config, task),
    # At temperature 0 all candidates would be equal; Best-of-N takes the greedy completion there.
    "candidates": lambda config, task, name: _sampling(
        config,
        task,
        n=task["best_of_n"]["n"],
        temperatures=[temperature for temperature in task["sampling"]["temperatures"] if temperature > 0],
    ),
    "score": lambda config, task, name: _engine(config),
    "best_of_n": lambda config, task, name: _engine(config),
    "judge": lambda config, task, name: {**task["judge"], "token_budget": config["compute"]["token_budget"]},
    "win_rates": lambda config, task, name: {
        "task": name,
        "confidence": task["evaluation"]["confidence"],
        "seed": config["seed"],
        "methods": task["methods"],
        "judge": task["judge"],
    },
    "best_of_n_curve": lambda config, task, name: {
        "task": name,
        "n": [n for n in task["best_of_n"]["curve"] if n <= task["best_of_n"]["n"]],
        "confidence": task["evaluation"]["confidence"],
        "seed": config["seed"],
    },
    "examples": lambda config, task, name: {
        "task": name,
        "methods": task["methods"],
        "count": task["evaluation"]["examples"],
        "seed": config["seed"],
        "max_characters": task["evaluation"]["example_characters"],
    },
}


def _complete(value: Any, schema: Mapping[str, Any]) -> Any:
    """Fills in defaults, and reads numbers as their type: 1 as 1.0 where a fraction is meant, "5e-5" as a number."""
    if isinstance(value, dict) and "properties" in schema:
        for key, below in schema["properties"].items():
            if key in value:
                value[key] = _complete(value[key], below)
            elif "default" in below:
                value[key] = copy.deepcopy(below["default"])
            elif "properties" in below:
                value[key] = _complete({}, below)
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
        if error.validator == "uniqueItems":
            raise UserError(f"{path} is {_show(error.instance)}, where one stands twice; each may stand once.")
        raise UserError(f"{path} is {_show(error.instance)}; allowed: {_allowed(error.schema)}.")
    for path, value in leaves(config):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise UserError(f"{path} is {item}; allowed: a finite number.")
    _check_complete(config, schema, "")


def _check_complete(config: Config, schema: Mapping[str, Any], path: str) -> None:
    for key, below in schema["properties"].items():
        here = f"{path}.{key}".lstrip(".")
        if key not in config:
            raise UserError(f"{here} is missing; allowed: {_allowed(below)}.")
        if "properties" in below:
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


# Checks of values against each other. Each yields sentences without the leading "tasks.NAME.".


def _check_data(task: Config) -> Iterator[str]:
    data = task["data"]
    total = sum(data["splits"].values())
    if abs(total - 1) > 1e-6:
        shares = " + ".join(f"{share:g}" for share in data["splits"].values())
        yield f"data.splits is {shares} = {total:g}; allowed: shares that add up to 1."
    if data["source"] == "files":
        if not data["posts"] + data["demonstrations"]:
            yield "data.source is 'files', but data.posts and data.demonstrations are empty; give one a path."
        if not data["comparisons"] + data["preferences"]:
            yield "data.source is 'files', but data.comparisons and data.preferences are empty; give one a path."
        for key in ("posts", "comparisons", "demonstrations", "preferences"):
            for path in data[key]:
                if not Path(path).is_file():
                    yield f"data.{key} names {path!r}; no such file is seen from the working directory."
    if data["source"] == "hub":
        for key in ("posts", "comparisons"):
            if data["hub"][key] is None:
                yield f"data.hub.{key} is null; with data.source 'hub' it must be the name of a data set."


def _check_judge(task: Config) -> Iterator[str]:
    kind, data = task["judge"]["kind"], task["data"]
    if kind == "oracle" and data["source"] != "embedded":
        yield (
            f"judge.kind is 'oracle', which needs data.source 'embedded' and not {data['source']!r}; "
            f"allowed here: reward_model."
        )
    if kind == "reward_model" and data["source"] == "embedded":
        for key in ("gold_pairs", "gold_test_pairs"):
            if data["embedded"][key] == 0:
                yield f"data.embedded.{key} is 0; with judge.kind 'reward_model' it must be at least 1."
    if kind == "reward_model" and data["source"] != "embedded" and data["gold_fraction"] == 0:
        yield "data.gold_fraction is 0; with judge.kind 'reward_model' it must be above 0, e.g. 0.5."


def _check_methods(task: Config) -> Iterator[str]:
    for index, method in enumerate(task["methods"]):
        if match := re.fullmatch(r"best_of_(\d+)", method):
            if int(match[1]) > task["best_of_n"]["n"]:
                yield (
                    f"methods[{index}] is {method!r}, but best_of_n.n is {task['best_of_n']['n']}; "
                    f"allowed: best_of_N with N up to that."
                )
            if not any(temperature > 0 for temperature in task["sampling"]["temperatures"]):
                yield f"methods[{index}] is {method!r}, which needs a temperature above 0 in sampling.temperatures."


def _check_lengths(task: Config) -> Iterator[str]:
    lengths, longest = task["lengths"], task["pretrain"]["max_positions"]
    if lengths["max_prompt_length"] >= lengths["max_length"]:
        yield (
            f"lengths.max_prompt_length is {lengths['max_prompt_length']}; allowed: less than "
            f"lengths.max_length, which is {lengths['max_length']}."
        )
    if task["base"]["source"] in ("scratch", "shipped"):
        if lengths["max_length"] > longest:
            yield (
                f"lengths.max_length is {lengths['max_length']}; allowed: at most the base's "
                f"pretrain.max_positions, which is {longest}."
            )
        for section in ("sampling", "ppo"):
            tokens = task[section]["max_new_tokens"]
            if lengths["max_prompt_length"] + tokens > longest:
                yield (
                    f"{section}.max_new_tokens is {tokens}; allowed: at most {longest - lengths['max_prompt_length']}, "
                    f"so that it fits into pretrain.max_positions after a prompt of lengths.max_prompt_length."
                )


def _check_models(task: Config) -> Iterator[str]:
    shape = task["pretrain"]
    if shape["hidden_size"] % shape["heads"]:
        yield f"pretrain.hidden_size is {shape['hidden_size']}; allowed: a multiple of pretrain.heads, {shape['heads']}."
    for section in ("base", "sft"):
        model = task[section]
        if model["source"] == "path" and model["path"] is None:
            yield f"{section}.path is null; with {section}.source 'path' it must be a local folder of a model."
        elif model["source"] == "path" and not (Path(model["path"]) / "config.json").is_file():
            yield f"{section}.path is {model['path']!r}, where no config.json lies; it must be a folder of a model."
        if model["source"] == "hub" and model["name"] is None:
            yield f"{section}.name is null; with {section}.source 'hub' it must be the name of a model there."
    if task["ppo"]["minibatches"] > task["ppo"]["prompts_per_update"]:
        yield (
            f"ppo.minibatches is {task['ppo']['minibatches']}; allowed: at most ppo.prompts_per_update, "
            f"which is {task['ppo']['prompts_per_update']}."
        )
    if task["dpo"]["loss"] == "ipo" and task["dpo"]["label_smoothing"] > 0:
        yield f"dpo.label_smoothing is {task['dpo']['label_smoothing']}; with dpo.loss 'ipo' it must be 0."


def _check_evaluation(task: Config) -> Iterator[str]:
    if task["data"]["source"] == "embedded":
        for key in ("validation_prompts", "test_prompts"):
            wanted, made = task["evaluation"][key], task["data"]["embedded"][key]
            if wanted > made:
                yield f"evaluation.{key} is {wanted}; allowed: at most data.embedded.{key}, which is {made}."


_CHECKS = (_check_data, _check_judge, _check_methods, _check_lengths, _check_models, _check_evaluation)
