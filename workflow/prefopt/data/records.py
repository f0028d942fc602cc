"""The stage `records`: a task's raw records, embedded, from files or from a hub, to a raw table."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from prefopt.data.formats import cnn_dailymail, hh, mixture, tldr
from prefopt.data.formats.recognise import Choices, fields_read
from prefopt.data.labels import taken_apart
from prefopt.data.raw.hub import hub_rows, saved_rows
from prefopt.data.raw.limits import Limits
from prefopt.data.raw.opened import kind_of
from prefopt.data.raw.parsing import Account, RawTables
from prefopt.data.raw.record import Records
from prefopt.data.raw.sources import describe_files, read_rows
from prefopt.data.synthetic import dialogues, news, posts
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.experiment.tasks import source_name
from prefopt.store.contents import content_of
from prefopt.store.tables import write_table

logger = logging.getLogger(__name__)

# The raw tables and their schemas. What is trained on stands apart from the test prompts, and from the gold judge's pairs.
TABLES = {
    "demonstrations": "raw_demonstrations",
    "training/demonstrations": "raw_demonstrations",
    "preferences": "raw_preferences",
    "gold_preferences": "raw_preferences",
    "labels": "raw_labels",
    "pretraining": "pretraining",
}
# Fewer test prompts than this give win rates that say next to nothing.
FEW_TEST_PROMPTS = 20
# Kinds of records of each task with the fields that are read, and its generator.
_FILE_KINDS = {"tldr": tldr.FIELDS, "hh": hh.FIELDS, "cnndm": cnn_dailymail.FIELDS}
_GENERATORS = {"tldr": posts.generate, "hh": dialogues.generate, "cnndm": news.generate}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordsRecipe:
    """Where the records come from and how they are split; a source reads its own keys alone."""

    source: Literal["embedded", "files", "hub", "records"]
    records: tuple[dict[str, Any], ...]  # each with path or hub, and what `_source` reads
    pairs: dict[str, Any]  # rule and margin by which scored responses make pairs
    ties: Literal["drop", "both"]
    seed: int  # of what is drawn among records
    posts: tuple[str, ...]
    comparisons: tuple[str, ...]
    demonstrations: tuple[str, ...]
    preferences: tuple[str, ...]
    articles: tuple[str, ...]
    hub: dict[str, Any]  # name, NAME_revision and perhaps NAME_configuration of each kind
    splits: dict[str, float]  # share of the prompts: train, validation, test
    gold_fraction: float  # share of the pairs' posts that the gold judge is trained and measured on
    max_malformed: int  # malformed records that are dropped and counted before one stops the stage
    max_record_mb: int  # MiB of a record, and of all records of one kind, that are read at most
    max_total_mb: int
    embedded: dict[str, int]  # seed and sizes, see `prefopt.data.synthetic.posts.generate`


def read_records(form: str, recipe: RecordsRecipe) -> tuple[RawTables, list[dict[str, Any]]]:
    """The raw tables of the recipe's source, and what they were read from (for a manifest).

    Raises:
        UserError: records are missing, unreachable, larger than the limits, or malformed beyond `max_malformed`.
    """
    if recipe.source == "embedded":
        return _GENERATORS[form](recipe.embedded), []
    allowed = Limits(recipe.max_record_mb, recipe.max_total_mb)
    if recipe.source == "records":
        return mixed_records(recipe, allowed), [_described(one) for one in recipe.records]
    if recipe.source == "files":
        paths = {kind: getattr(recipe, kind) for kind in _FILE_KINDS[form]}
        inputs: list[dict[str, Any]] = [
            {"kind": kind, **entry} for kind in paths for entry in describe_files(paths[kind])
        ]
        records = {kind: read_rows(paths[kind], fields, allowed) for kind, fields in _FILE_KINDS[form].items()}
    else:
        named = {
            kind: (_hub_name(recipe, kind), recipe.hub.get(f"{kind}_revision"))
            for kind in _FILE_KINDS[form]
            if kind in recipe.hub
        }
        inputs = [
            {"kind": kind, "name": name, "revision": revision, "pinned": revision is not None}
            for kind, (name, revision) in named.items()
        ]
        records = {
            kind: hub_rows(
                name, recipe.hub.get(f"{kind}_configuration") or kind, revision, _FILE_KINDS[form][kind], allowed
            )
            for kind, (name, revision) in named.items()
        }
    return _raw_tables(form, records, recipe), inputs


def mixed_records(recipe: RecordsRecipe, allowed: Limits) -> RawTables:
    """The raw tables of `data.records`, which are of any format."""
    return mixture.raw_tables(
        [_source(one, allowed) for one in recipe.records],
        Choices(rule=recipe.pairs["rule"], margin=recipe.pairs["margin"], ties=recipe.ties, seed=recipe.seed),
        splits=recipe.splits,
        gold_fraction=recipe.gold_fraction,
        max_malformed=recipe.max_malformed,
    )


def _source(one: Mapping[str, Any], allowed: Limits) -> mixture.Source:
    path, hub = one["path"], one["hub"]
    if path is None:
        records: Records = hub_rows(
            hub, one["configuration"], one["revision"], fields_read, allowed, one["split"], exact=True
        )
    elif Path(path).is_dir():
        records = saved_rows(path, one["split"], fields_read, allowed)
    else:
        records = read_rows([path], fields_read, allowed)
    return mixture.Source(
        name=source_name(dict(one)),
        records=records,
        format=one["format"],
        cells=path is not None and kind_of(path) == "csv",
        side=one["as"],
        weight=one["weight"],
        count=one["count"],
    )


def _described(one: Mapping[str, Any]) -> dict[str, Any]:
    """A source, for a manifest."""
    name = source_name(dict(one))
    if one["path"] is None:
        return {"kind": "records", "name": name, "revision": one["revision"], "pinned": one["revision"] is not None}
    if Path(one["path"]).is_dir():
        return {"kind": "records", "path": name, "sha256": content_of({"records": one["path"]})}
    return {"kind": "records", **describe_files([one["path"]])[0]}


def _raw_tables(form: str, records: Mapping[str, Records], recipe: RecordsRecipe) -> RawTables:
    limit = recipe.max_malformed
    if form == "cnndm":
        share = recipe.splits["validation"] / (recipe.splits["validation"] + recipe.splits["test"])
        return cnn_dailymail.raw_tables(records["articles"], validation_share=share, max_malformed=limit)
    options: dict[str, Any] = {"splits": recipe.splits, "gold_fraction": recipe.gold_fraction, "max_malformed": limit}
    if form == "hh":
        return hh.raw_tables(records["comparisons"], **options)
    return tldr.raw_tables(records, **options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `records`."""
    parser.add_argument("--task", required=True, help="whose records they are, for the manifest")
    parser.add_argument("--form", required=True, choices=list(_GENERATORS), help="the shipped task that it is like")
    parser.add_argument("--table", required=True, choices=list(TABLES), help="which of the raw tables is made")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="raw table that is made")


def run(args: argparse.Namespace) -> None:
    """Writes one raw table, whole or not at all. Each is made by a job of its own, so that another leaves it alone."""
    recipe = from_json(RecordsRecipe, args.recipe)
    tables, inputs = read_records(args.form, recipe)
    schema, content, account = _table(args.table, tables, recipe.source)
    warnings = _warnings(args.table, content, inputs)
    for warning in warnings:
        logger.warning("warning: %s", warning)
    if account["read"] != account["kept"] + sum(account["dropped"].values()) or account["kept"] != len(content):
        raise AssertionError(f"the account of {args.table} does not add up: {account}, {len(content)} rows")
    write_table(
        args.out,
        schema,
        content,
        task=args.task,
        recipe=to_dict(recipe),
        inputs=inputs,
        account=account,
        notes={**tables.notes, "warnings": warnings},
    )
    reasons = ", ".join(f"{reason} {count}" for reason, count in account["dropped"].items())
    logger.info("%s: %d read, %d kept; dropped: %s", args.table, account["read"], account["kept"], reasons or "none")


def _table(name: str, tables: RawTables, source: str) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """Schema, rows and account of one table. What another table holds in its stead is dropped from its account."""
    schema = TABLES[name]
    account = tables.accounts["raw_preferences" if name == "labels" else schema].as_dict()
    if name == "pretraining":
        return schema, [{"text": text} for text in tables.pretraining], account
    rows = tables.demonstrations if schema == "raw_demonstrations" else tables.preferences
    rows = [{"messages": "", "source": source, **row} for row in rows]  # what not every format says
    if name == "labels":
        rows = [*taken_apart(rows), *tables.labels]
        # Here thumbs without a counterpart are rows like others.
        dropped = Counter(account["dropped"]) + tables.accounts.get("raw_labels", Account()).dropped
        del dropped["unpaired"]
        account = {"read": dropped.total() + len(rows), "dropped": dropped}
    gold = [row for row in rows if row["split"].startswith("gold_")]
    if name == "gold_preferences":
        return schema, gold, {"read": len(gold), "kept": len(gold), "dropped": {}}
    learnt = name in ("training/demonstrations", "labels")
    kept = [row for row in rows if row["split"] != "test"] if learnt else rows
    kept = [row for row in kept if not row["split"].startswith("gold_")]
    elsewhere = {"test_split": len(rows) - len(gold) - len(kept), "reserved_for_gold": len(gold)}
    dropped = Counter(account["dropped"]) + Counter(elsewhere)
    return schema, kept, {**account, "kept": len(kept), "dropped": dict(sorted(dropped.items()))}


def _hub_name(recipe: RecordsRecipe, kind: str) -> str:
    name = recipe.hub.get(kind)
    if not isinstance(name, str):
        raise UserError(f"hub.{kind} is {name!r}: with the source 'hub' it must name a data set.")
    return name


def _warnings(table: str, rows: list[dict[str, Any]], inputs: list[dict[str, Any]]) -> list[str]:
    warnings = [
        f"{entry['name']} is not pinned to a revision: another day may bring other records."
        for entry in inputs
        if entry.get("pinned") is False
    ]
    test_prompts = sum(row["split"] == "test" for row in rows) if table == "demonstrations" else FEW_TEST_PROMPTS
    if test_prompts < FEW_TEST_PROMPTS:
        warnings.append(
            f"the test split has {test_prompts} prompts, fewer than {FEW_TEST_PROMPTS}: win rates on it say little."
        )
    return warnings
