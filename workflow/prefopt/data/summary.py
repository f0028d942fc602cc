"""The stage `summary`: what became of every record of a task, over all the stages that drop some."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from prefopt.data.losses import loss_warnings
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.store.files import write_text
from prefopt.store.tables import read_manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummaryRecipe:
    """How figures speak of the task."""

    title: str
    reference: str  # what a completion is held against
    written: str  # what a program wrote where the records are synthetic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `summary`."""
    parser.add_argument("--tables", required=True, type=Path, nargs="+", help="prepared tables, each named as its file")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="JSON file that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the account of each table, as the stage `prepare` put it into the table, and all their warnings.

    Raises:
        UserError: the prompts of one table are turns of a chat and those of another plain text.
    """
    manifests = {path.stem: read_manifest(path) for path in args.tables}
    first = next(iter(manifests.values()))
    # A table without rows tells nothing of how prompts are put.
    styles = {name: manifest["style"] for name, manifest in manifests.items() if manifest["rows"]}
    if len(set(styles.values())) > 1:
        put = ", ".join(f"{name} {style}" for name, style in styles.items())
        raise UserError(
            f"The prompts of the tables are put in different ways ({put}), as some records are conversations and others "
            f"not: set tasks.{first['task']}.prompt.style."
        )
    accounts = {name: manifest["account"] for name, manifest in manifests.items()}
    told = dict.fromkeys(text for each in manifests.values() for text in each["notes"]["warnings"])
    summary = {
        "task": first["task"],
        **to_dict(from_json(SummaryRecipe, args.recipe)),
        "source": first["source"],
        "synthetic": first["notes"]["synthetic"],
        "tables": accounts,
        **({"sources": first["notes"]["sources"]} if "sources" in first["notes"] else {}),
        "warnings": [*told, *loss_warnings(first["task"], accounts)],
    }
    write_text(args.out, json.dumps(summary, indent=1) + "\n")
