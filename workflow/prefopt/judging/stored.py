"""The commands `store export` and `store import`: verdicts of a chat judge as a Parquet file, to keep and to share."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from prefopt.judging.verdict_store import VerdictStore
from prefopt.store.tables import read_table, write_table

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command `store`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, summary in (
        ("export", "the store's replies to a Parquet file"),
        ("import", "a Parquet file's replies into the store; what it has stays"),
    ):
        subparser = actions.add_parser(action, help=summary, description=summary)
        subparser.add_argument("--store", required=True, type=Path, help="SQLite file (judge.chat.store)")
        subparser.add_argument("--table", required=True, type=Path, help="Parquet file")


def run(args: argparse.Namespace) -> None:
    """Exports or imports."""
    if args.action == "export":
        with VerdictStore(args.store, create=False) as store:
            rows = store.export()
        write_table(args.table, "chat_replies", rows)
        logger.info("%s: %d replies of %d models", args.table, len(rows), rows["model"].nunique())
    else:
        rows = read_table(args.table, "chat_replies")
        with VerdictStore(args.store) as store:
            logger.info("%s: %d of %d replies were new", args.store, store.add(rows), len(rows))
