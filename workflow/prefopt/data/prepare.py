"""The stage `prepare`: raw tables to token ids of the base model's tokenizer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from prefopt.data.losses import loss_warnings
from prefopt.data.special_tokens import REASON, warn_of_template, with_special_tokens
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.lm.continuations import encode_continuations
from prefopt.lm.models import beginning, encode, load_tokenizer, max_positions, tokenizer_hash
from prefopt.runtime.progress import Progress
from prefopt.store.tables import read_table, write_table

logger = logging.getLogger(__name__)

Encode = Callable[[PreTrainedTokenizerBase, Sequence[str]], list[list[int]]]

_TEXTS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareRecipe:
    """Lengths in tokens. A completion, EOS included, has room for `max_length - max_prompt_length`."""

    max_prompt_length: int
    max_length: int
    truncation: Literal["keep_start", "keep_end"]  # which end of a prompt's body stays
    suffix: str  # the prompt's tail, which is never cut
    evaluation_only: bool  # nothing is trained on these records, so a long response is no reason to drop one


class Prompt(NamedTuple):
    """A tokenized prompt, and whether it lost something."""

    ids: list[int]
    cut: bool


@dataclasses.dataclass
class Prepared:
    """One table: its rows, what was dropped here, and how many of the kept rows have a cut prompt."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    prompts_cut: int = 0

    def keep(self, row: dict[str, Any], prompt: Prompt) -> None:
        """Adds a row with its prompt's ids."""
        kept = {name: value for name, value in row.items() if name != "messages"}
        self.rows.append({**kept, "prompt_ids": prompt.ids})
        self.prompts_cut += prompt.cut

    def summary(self, read: int, dropped_before: dict[str, int]) -> dict[str, Any]:
        """The table's part of summary.json: `read` = `kept` + all `dropped`."""
        dropped = Counter(dropped_before) + self.dropped
        if read != len(self.rows) + dropped.total():
            raise AssertionError(f"{read} records were read, {len(self.rows)} kept, and dropped: {dict(dropped)}")
        return {
            "read": read,
            "kept": len(self.rows),
            "dropped": dict(sorted(dropped.items())),
            "splits": dict(sorted(Counter(row["split"] for row in self.rows).items())),
            "prompts_cut": self.prompts_cut,
        }


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], encode: Encode = encode) -> list[list[int]]:
    """Token ids of many texts, each the beginning of one or (`encode_continuations`) what follows, with progress."""
    ids: list[list[int]] = []
    with Progress("tokenize", len(texts), "texts") as progress:
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = texts[start : start + _TEXTS_AT_ONCE]
            ids.extend(encode(tokenizer, part))
            progress.update(len(part))
    return ids


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str], recipe: PrepareRecipe
) -> dict[str, Prompt]:
    """Each distinct prompt's ids: body and suffix, tokenized separately, the body cut to make both fit.

    A prompt that does not end with the suffix is all body. Where the tokenizer begins a text with BOS, the prompt begins
    with it, and it is never cut.

    Raises:
        UserError: the suffix alone is longer than `max_prompt_length`.
    """
    distinct = list(dict.fromkeys(prompts))
    bodies = [prompt.removesuffix(recipe.suffix) for prompt in distinct]
    start = beginning(tokenizer)
    (suffix_ids,) = encode_continuations(tokenizer, [recipe.suffix])
    if len(start) + len(suffix_ids) >= recipe.max_prompt_length:
        raise UserError(
            f"max_prompt_length is {recipe.max_prompt_length}, but {recipe.suffix!r} at the end of each prompt takes "
            f"{len(start) + len(suffix_ids)} tokens: raise it."
        )
    encoded = {}
    for prompt, body in zip(distinct, encode_all(tokenizer, bodies), strict=True):
        tail = suffix_ids if prompt.endswith(recipe.suffix) else []
        room = recipe.max_prompt_length - len(start) - len(tail)
        kept = body[:room] if recipe.truncation == "keep_start" else body[max(len(body) - room, 0) :]
        encoded[prompt] = Prompt([*start, *kept, *tail], len(kept) < len(body))
    return encoded


def encode_completions(tokenizer: PreTrainedTokenizerBase, completions: Iterable[str]) -> dict[str, list[int]]:
    """Each distinct completion's ids, EOS at the end."""
    distinct = list(dict.fromkeys(completions))
    return {
        text: [*ids, tokenizer.eos_token_id]
        for text, ids in zip(distinct, encode_all(tokenizer, distinct, encode_continuations), strict=True)
    }


def prepare_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[Any, Any]],
    recipe: PrepareRecipe,
    special: Collection[str] = (),
) -> dict[str, Prepared]:
    """The tables `demonstrations` and `prompts`.

    A response is never cut, so that its EOS stays: where one is trained on, a longer one is dropped from the demonstrations
    ("completion_too_long"), and no method is asked to write one either: outside the training split its prompt is dropped
    ("reference_too_long"). Both drop the rows whose `prompt_id` is in `special` ("special_token_in_text").
    """
    prompts = encode_prompts(tokenizer, (row["prompt"] for row in rows), recipe)
    responses = encode_completions(tokenizer, (row["response"] for row in rows))
    tables = {"demonstrations": Prepared(), "prompts": Prepared()}
    for row in rows:
        prompt, response_ids = prompts[row["prompt"]], responses[row["response"]]
        row = {name: value for name, value in row.items() if name != "source"}
        if row["prompt_id"] in special:
            for table in tables.values():
                table.dropped[REASON] += 1
            continue
        if row["response"] == "":  # a prompt alone, to evaluate on
            tables["demonstrations"].dropped["prompt_alone"] += 1
        elif not recipe.evaluation_only and len(response_ids) > recipe.max_length - recipe.max_prompt_length:
            tables["demonstrations"].dropped["completion_too_long"] += 1
            if row["split"] != "train":
                tables["prompts"].dropped["reference_too_long"] += 1
                continue
        else:
            tables["demonstrations"].keep({**row, "response_ids": response_ids}, prompt)
        shared = {name: row[name] for name in ("prompt_id", "prompt", "split", "facts")}
        tables["prompts"].keep({**shared, "reference": row["response"].strip()}, prompt)
    return tables


def prepare_preferences(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[Any, Any]],
    recipe: PrepareRecipe,
    special: Collection[str] = (),
) -> Prepared:
    """The table `preferences`, of all pairs or of the gold judge's, whose splits become train and test.

    Pairs with a completion that does not fit whole are dropped ("completion_too_long"), those whose completions have
    the same token ids ("equal_after_tokenization"), and those whose `pair_id` is in `special`
    ("special_token_in_text").
    """
    prompts = encode_prompts(tokenizer, (row["prompt"] for row in rows), recipe)
    completions = encode_completions(tokenizer, (row[side] for row in rows for side in ("chosen", "rejected")))
    table = Prepared()
    for row in rows:
        chosen_ids, rejected_ids = completions[row["chosen"]], completions[row["rejected"]]
        if row["pair_id"] in special:
            table.dropped[REASON] += 1
        elif max(len(chosen_ids), len(rejected_ids)) > recipe.max_length - recipe.max_prompt_length:
            table.dropped["completion_too_long"] += 1
        elif chosen_ids == rejected_ids:
            table.dropped["equal_after_tokenization"] += 1
        else:
            ids = {"chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
            table.keep({**row, **ids, "split": row["split"].removeprefix("gold_")}, prompts[row["prompt"]])
    return table


def check_lengths(recipe: PrepareRecipe, model: Path) -> None:
    """Raises UserError where the lengths exclude each other or exceed the model's positions."""
    if not 0 < recipe.max_prompt_length < recipe.max_length:
        raise UserError(
            f"max_prompt_length is {recipe.max_prompt_length} and max_length {recipe.max_length}: "
            f"a prompt must leave room for its completion."
        )
    if not (model / "config.json").is_file():
        raise UserError(f"{model} is not a model folder (it has no config.json): run the stage that makes it.")
    positions = max_positions(model)
    if positions is not None and recipe.max_length > positions:
        raise UserError(
            f"max_length is {recipe.max_length}, but the model in {model} has {positions} positions: "
            f"lower max_length or take another model."
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `prepare`."""
    parser.add_argument("--raw", required=True, type=Path, help="raw table of demonstrations or of preferences")
    parser.add_argument("--model", required=True, type=Path, help="base model, whose tokenizer is used")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        nargs="+",
        help="tables that are made: demonstrations and prompts of demonstrations, preferences of preferences",
    )


def run(args: argparse.Namespace) -> None:
    """Writes the tokenized tables of one raw table, each whole or not at all."""
    recipe = from_json(PrepareRecipe, args.recipe)
    check_lengths(recipe, args.model)
    tokenizer = load_tokenizer(args.model)
    raw = read_table(args.raw, "raw_demonstrations" if len(args.out) == 2 else "raw_preferences")
    rows = raw.to_dict("records")
    warn_of_template(tokenizer, args.model)
    tables: dict[str, Prepared]
    if len(args.out) == 2:
        special = with_special_tokens(tokenizer, rows, "prompt_id", ("prompt", "response"), args.raw)
        tables = prepare_demonstrations(tokenizer, rows, recipe, special)
    else:
        special = with_special_tokens(tokenizer, rows, "pair_id", ("prompt", "chosen", "rejected"), args.raw)
        tables = {"preferences": prepare_preferences(tokenizer, rows, recipe, special)}
    origin = raw.attrs["manifest"]
    for path, (name, table) in zip(args.out, tables.items(), strict=True):
        account = table.summary(origin["account"]["read"], origin["account"]["dropped"])
        for warning in loss_warnings(origin["task"], {path.stem: account}):
            logger.warning("warning: %s", warning)
        write_table(
            path,
            name,
            table.rows,
            task=origin["task"],
            recipe=to_dict(recipe),
            lengths=to_dict(recipe),
            tokenizer_hash=tokenizer_hash(args.model),
            source=origin["recipe"]["source"],
            raw=origin["content_hash"],
            account=account,
            notes=origin["notes"],
        )
        logger.info("%s: %s", name, json.dumps(account))
