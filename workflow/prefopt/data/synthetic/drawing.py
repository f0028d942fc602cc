"""What the synthetic tasks share: a random stream for each row, and raw tables of what was drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from prefopt.data.raw.parsing import Account, RawTables


def row_stream(seed: int, stream: str, i: int) -> random.Random:
    """The random stream of one row, which no count of other rows changes."""
    return random.Random(f"{seed}/{stream}/{i}")


def drawn_tables(
    demonstrations: list[dict[str, Any]],
    pairs: Sequence[tuple[dict[str, Any], bool | None]],
    pretraining: list[str],
    statement: str,
) -> RawTables:
    """Tables of which every row was made and kept.

    Args:
        demonstrations: their rows.
        pairs: rows of preferences, each with whether its label agrees with the higher quality (None for a tie).
        pretraining: documents.
        statement: what a reader must know of them.
    """
    preferences = [row for row, _ in pairs]
    agreements = [agrees for _, agrees in pairs if agrees is not None]
    counts = {
        "raw_demonstrations": len(demonstrations),
        "raw_preferences": len(preferences),
        "pretraining": len(pretraining),
    }
    return RawTables(
        demonstrations=demonstrations,
        preferences=preferences,
        pretraining=pretraining,
        accounts={table: Account(read=count, kept=count) for table, count in counts.items()},
        notes={
            "synthetic": True,
            "statement": statement,
            "annotator_agreement": sum(agreements) / len(agreements) if agreements else None,
        },
    )
