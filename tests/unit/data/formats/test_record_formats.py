"""docs/record_formats.md: every format is there, in its order, and each example row becomes what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prefopt.data.formats.mixture import Source, raw_tables
from prefopt.data.formats.recognise import FORMATS, Choices
from prefopt.experiment.config import load_schema

PAGE = Path(__file__).parents[4] / "docs" / "record_formats.md"
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^#|\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
EXAMPLES = [
    (name, *blocks)
    for name, text in SECTIONS.items()
    for blocks in re.findall(r"```json\n(.*?)\n```\n\n```json becomes\n(.*?)\n```", text, re.DOTALL)
]


def rows_of(block: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in block.splitlines()]


def test_the_page_has_every_format_in_the_order_in_which_they_are_tried() -> None:
    assert list(SECTIONS) == list(FORMATS)
    assert {name for name, *_ in EXAMPLES} == set(FORMATS)
    data = load_schema()["$defs"]["task"]["properties"]["data"]["properties"]
    assert set(data["records"]["items"]["properties"]["format"]["enum"]) == {*FORMATS, None}


@pytest.mark.parametrize(("name", "given", "becomes"), EXAMPLES)
def test_an_example_becomes_what_the_page_says(name: str, given: str, becomes: str) -> None:
    records = [(f"page:{number}", row) for number, row in enumerate(rows_of(given), start=1)]
    source = Source(name="page", records=records, format=None, cells=False, side=None, weight=None, count=None)
    tables = raw_tables(
        [source],
        Choices(rule="best_vs_random", margin=0.0, ties="drop", seed=0),
        splits={"train": 0.7, "validation": 0.1, "test": 0.2},
        gold_fraction=0.0,
        max_malformed=0,
    )
    (told,) = tables.notes["sources"]
    assert told["format"] == name
    rows = tables.preferences if FORMATS[name].table == "raw_preferences" else tables.demonstrations
    said = rows_of(becomes)
    assert [{key: row[key] for key in said[0]} for row in rows] == said
