"""The stage `prepare`: raw tables to token ids of the base model's tokenizer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from prefopt.data.labels import give_mismatched
from prefopt.data.losses import loss_warnings
from prefopt.data.special_tokens import REASON, warn_of_template, with_special_tokens
from prefopt.data.turns import Tokens, tokenize_conversations
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.lm.chat import Chat, Refused, chat_of
from prefopt.lm.continuations import encode_continuations
from prefopt.lm.models import beginning, encode, load_tokenizer, max_positions, tokenizer_hash
from prefopt.runtime.progress import Progress
from prefopt.store.tables import read_manifest, read_table, write_table

logger = logging.getLogger(__name__)

Encode = Callable[[PreTrainedTokenizerBase, Sequence[str]], list[list[int]]]

_TEXTS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareRecipe:
    """Lengths in tokens. A completion, end token included, has room for `max_length - max_prompt_length`."""

    max_prompt_length: int
    max_length: int
    truncation: Literal["keep_start", "keep_end"]  # which end of a plain prompt's body stays
    style: Literal["plain", "chat"] | None  # plain text, or turns by the base's chat template; None: see `base_of`
    system: str | None  # system message of conversations without one
    suffix: str  # the tail of the records' plain prompts, which is never cut
    new_suffix: str | None  # what every plain prompt has in its place; None leaves them as they are
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

    def keep(self, row: dict[str, Any], tokens: Tokens) -> None:
        """Adds a row with its prompt's ids."""
        kept = {name: value for name, value in row.items() if name != "messages"}
        self.rows.append({**kept, "prompt_ids": tokens.prompt})
        self.prompts_cut += tokens.cut

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

    A prompt that does not end with the suffix is all body, unless every prompt gets a new one. Where the tokenizer begins a
    text with BOS, the prompt begins with it, and it is never cut.

    Raises:
        UserError: the suffix alone is longer than `max_prompt_length`.
    """
    distinct = list(dict.fromkeys(prompts))
    bodies = [prompt.removesuffix(recipe.suffix) for prompt in distinct]
    start = beginning(tokenizer)
    suffix = recipe.suffix if recipe.new_suffix is None else recipe.new_suffix
    (suffix_ids,) = encode_continuations(tokenizer, [suffix])
    if len(start) + len(suffix_ids) >= recipe.max_prompt_length:
        raise UserError(
            f"max_prompt_length is {recipe.max_prompt_length}, but {suffix!r} at the end of each prompt takes "
            f"{len(start) + len(suffix_ids)} tokens: raise it."
        )
    encoded = {}
    for prompt, body in zip(distinct, encode_all(tokenizer, bodies), strict=True):
        tail = suffix_ids if recipe.new_suffix is not None or prompt.endswith(recipe.suffix) else []
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


def tokenized(
    base: PreTrainedTokenizerBase | Chat,
    rows: Sequence[Mapping[Any, Any]],
    key: str,
    sides: Sequence[str],
    recipe: PrepareRecipe,
    path: Path,
) -> list[Tokens | str]:
    """Token ids of each row of a raw table, or the reason for which it is dropped.

    Args:
        base: the base's tokenizer, for plain prompts, or its chat.
        rows: of the table.
        key: column of the ids.
        sides: columns of the completions.
        recipe: lengths, and what stands around a prompt.
        path: of the table, for messages.
    """
    texts = ("prompt", *sides)
    if isinstance(base, Chat):
        with_special_tokens(base.tokenizer, rows, key, texts, path, kept=True)
        around: dict[str, Any] = {"suffix": recipe.suffix, "system": recipe.system}
        return tokenize_conversations(base, rows, key, sides, longest=recipe.max_prompt_length, path=path, **around)
    special = with_special_tokens(base, rows, key, texts, path)
    prompts = encode_prompts(base, (row["prompt"] for row in rows), recipe)
    completions = encode_completions(base, (row[side] for row in rows for side in sides))
    return [
        REASON if row[key] in special else Tokens(*prompts[row["prompt"]], [completions[row[side]] for side in sides])
        for row in rows
    ]


def prepare_demonstrations(
    rows: Sequence[Mapping[Any, Any]], tokens: Sequence[Tokens | str], recipe: PrepareRecipe
) -> dict[str, Prepared]:
    """The tables `demonstrations` and `prompts`, of rows and what `tokenized` made of them.

    A response is never cut, so that its end token stays: where one is trained on, a longer one is dropped from the
    demonstrations ("completion_too_long"), and no method is asked to write one either: outside the training split its
    prompt is dropped ("reference_too_long").
    """
    tables = {"demonstrations": Prepared(), "prompts": Prepared()}
    for row, found in zip(rows, tokens, strict=True):
        row = {name: value for name, value in row.items() if name != "source"}
        if isinstance(found, str):
            for table in tables.values():
                table.dropped[found] += 1
            continue
        (response_ids,) = found.completions
        if row["response"] == "":  # a prompt alone, to evaluate on
            tables["demonstrations"].dropped["prompt_alone"] += 1
        elif not recipe.evaluation_only and len(response_ids) > recipe.max_length - recipe.max_prompt_length:
            tables["demonstrations"].dropped["completion_too_long"] += 1
            if row["split"] != "train":
                tables["prompts"].dropped["reference_too_long"] += 1
                continue
        else:
            tables["demonstrations"].keep({**row, "response_ids": response_ids}, found)
        shared = {name: row[name] for name in ("prompt_id", "prompt", "split", "facts")}
        tables["prompts"].keep({**shared, "reference": row["response"].strip()}, found)
    return tables


def prepare_preferences(
    rows: Sequence[Mapping[Any, Any]], tokens: Sequence[Tokens | str], recipe: PrepareRecipe
) -> Prepared:
    """The table `preferences`, of all pairs or of the gold judge's, whose splits become train and test.

    Pairs with a completion that does not fit whole are dropped ("completion_too_long"), and those whose completions have
    the same token ids ("equal_after_tokenization").
    """
    table = Prepared()
    for row, found in zip(rows, tokens, strict=True):
        if isinstance(found, str):
            table.dropped[found] += 1
            continue
        chosen_ids, rejected_ids = found.completions
        if max(len(chosen_ids), len(rejected_ids)) > recipe.max_length - recipe.max_prompt_length:
            table.dropped["completion_too_long"] += 1
        elif chosen_ids == rejected_ids:
            table.dropped["equal_after_tokenization"] += 1
        else:
            ids = {"chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
            table.keep({**row, **ids, "split": row["split"].removeprefix("gold_")}, found)
    return table


def prepare_labels(
    rows: Sequence[Mapping[Any, Any]], tokens: Sequence[Tokens | str], recipe: PrepareRecipe, path: Path
) -> Prepared:
    """The table `labels`: each completion that fits whole, and beside it one of another prompt of its split.

    Raises:
        UserError: see `labels.mismatched`.
    """
    table = Prepared()
    for row, found in zip(rows, tokens, strict=True):
        if isinstance(found, str):
            table.dropped[found] += 1
            continue
        (completion_ids,) = found.completions
        if len(completion_ids) > recipe.max_length - recipe.max_prompt_length:
            table.dropped["completion_too_long"] += 1
        else:
            table.keep({**row, "completion_ids": completion_ids}, found)
    give_mismatched(table.rows, str(path))
    return table


def base_of(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[Any, Any]], recipe: PrepareRecipe, model: Path
) -> PreTrainedTokenizerBase | Chat:
    """The tokenizer where prompts are plain text, and its chat where they are turns of a conversation.

    Where the recipe leaves it open, they are turns if the base has a template and the records messages, as the log says.

    Raises:
        UserError: a chat is asked for that the base's template does not make.
    """
    messages = sum(bool(row["messages"]) for row in rows)
    style = recipe.style
    if style is None:
        style = "chat" if messages and tokenizer.chat_template is not None else "plain"
        if messages or tokenizer.chat_template is not None:
            logger.info(
                "prompts are put as %s: %d of %d records are conversations, and %s has %s chat template (prompt.style says "
                "otherwise)",
                *("turns of a chat" if style == "chat" else "plain text", messages, len(rows), model),
                "no" if tokenizer.chat_template is None else "a",
            )
    if style == "plain":
        warn_of_template(tokenizer, model)
        return tokenizer
    if "strftime_now" in str(tokenizer.chat_template):
        logger.warning(
            "the chat template of %s writes today's date into prompts: on another day there are others", model
        )
    try:
        return chat_of(tokenizer)
    except Refused as problem:
        raise UserError(
            f"Prompts cannot be turns of a chat, since the chat template of {model} does not serve ({problem}): take a "
            f"base with another one, or set prompt.style 'plain'."
        ) from problem


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
    parser.add_argument("--raw", required=True, type=Path, help="raw table of demonstrations, preferences or labels")
    parser.add_argument("--model", required=True, type=Path, help="base model, whose tokenizer is used")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        nargs="+",
        help="tables that are made: demonstrations and prompts of demonstrations, else the one of the same name",
    )


def run(args: argparse.Namespace) -> None:
    """Writes the tokenized tables of one raw table, each whole or not at all."""
    recipe = from_json(PrepareRecipe, args.recipe)
    check_lengths(recipe, args.model)
    tokenizer = load_tokenizer(args.model)
    labels = len(args.out) == 1 and read_manifest(args.raw).get("table") == "raw_labels"
    kind = "raw_demonstrations" if len(args.out) == 2 else "raw_labels" if labels else "raw_preferences"
    raw = read_table(args.raw, kind)
    rows = raw.to_dict("records")
    base = base_of(tokenizer, rows, recipe, args.model)
    tables: dict[str, Prepared]
    if labels:
        tokens = tokenized(base, rows, "example_id", ("completion",), recipe, args.raw)
        tables = {"labels": prepare_labels(rows, tokens, recipe, args.raw)}
    elif len(args.out) == 2:
        tables = prepare_demonstrations(
            rows, tokenized(base, rows, "prompt_id", ("response",), recipe, args.raw), recipe
        )
    else:
        tokens = tokenized(base, rows, "pair_id", ("chosen", "rejected"), recipe, args.raw)
        tables = {"preferences": prepare_preferences(rows, tokens, recipe)}
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
            style="chat" if isinstance(base, Chat) else "plain",
            source=origin["recipe"]["source"],
            raw=origin["content_hash"],
            account=account,
            notes=origin["notes"],
        )
        logger.info("%s: %s", name, json.dumps(account))
