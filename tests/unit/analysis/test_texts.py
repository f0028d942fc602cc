"""What others wrote, in files that other programs open."""

from __future__ import annotations

import csv
import io
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prefopt.analysis.texts import escape_markdown, neutral_cell, visible, write_csv

SIGNS = "=+-@＝＋－＠"


def test_escape_shows_every_character() -> None:
    assert escape_markdown(" a < b\n*c* ") == "a &#60; b<br>&#42;c&#42;"
    assert escape_markdown("x\x1b[31m\u202ey\tz") == "x\ufffd&#91;31m\ufffdy z"
    assert escape_markdown("ça va, très bien: 3.5") == "ça va, très bien: 3.5"
    assert escape_markdown("# one #") == "&#35; one &#35;"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me@x.org", "me&#64;<wbr>x&#46;org"),
        ("mailto:me@x.org", "mailto:me&#64;<wbr>x&#46;org"),
        ("https://x.org", "https&#58;//x&#46;org"),
        ("www.x.org and x.org.", "www&#46;x&#46;org and x&#46;org."),
        ("<me@x.org>", "&#60;me&#64;<wbr>x&#46;org&#62;"),
    ],
)
def test_addresses_are_no_links(text: str, expected: str) -> None:
    """Tried with cmark-gfm and markdown-it's linkify: neither makes a link of what is expected here."""
    assert escape_markdown(text) == expected


UNSEEN = (
    "\u00ad\u061c\u180e\u200b\u200c\u200d\u200e\u200f\u2060\u2063\u2066\u206f\ufeff\ufff9\U000e0001\U000e0041\U000e007f"
)
IGNORABLE = "\u034f\u115f\u1160\u17b4\u180b\u3164\ufe00\ufe0f\uffa0\U000e0100\U000e01ef"


@pytest.mark.parametrize("character", [*UNSEEN, *IGNORABLE, "\x00", "\x7f", "\x85", "\ud83d"])
def test_what_has_no_shape_is_shown(character: str) -> None:
    for text in (f"a{character}b", character, f"{character}x", f"1{character}"):
        assert visible(text) == text.replace(character, "\ufffd")
    assert character not in escape_markdown(f"a{character}b") and character not in neutral_cell(f"a{character}b")


def test_every_format_control_and_surrogate_character_is_shown() -> None:
    for code in range(0x110000):
        character = chr(code)
        if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\n\r\t":
            assert visible(f"a{character}b") == "a\ufffdb", hex(code)


@pytest.mark.parametrize(
    "emoji",
    [
        "\u2764\ufe0f",
        "\U0001f469\u200d\U0001f52c",
        "\U0001f469\U0001f3fd\u200d\U0001f52c",
        "\u2764\ufe0f\u200d\U0001f525",
    ],
)
def test_an_emoji_stays_whole(emoji: str) -> None:
    assert visible(f"a {emoji} b") == f"a {emoji} b"
    assert visible(f"{emoji}\u200db") == f"{emoji}\ufffdb"


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize(
    "before", ["", " ", "\t", "\r", "\n", "\u00a0", '"', ' " ', "\u2003", "\x0b\x0c", "\x85", "\u2028"]
)
def test_a_cell_that_would_be_a_formula_begins_with_an_apostrophe(sign: str, before: str) -> None:
    cell = neutral_cell(f"{before}{sign}1+1")
    assert cell.startswith("'") and cell.endswith(f"{sign}1+1")
    assert neutral_cell(cell) == cell, "once is enough"


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize(
    "inner", ["ok\r", "ok\n", "ok\r\n", "ok\u2028", "ok\x0b", "ok;", "ok,", "ok|", 'ok; "', "ok\t"]
)
def test_no_reader_finds_a_cell_within_a_cell(sign: str, inner: str) -> None:
    cell = neutral_cell(f"{inner}{sign}1+1")
    assert len(cell.splitlines()) == 1 and "\t" not in cell
    for separator in ";,|":
        for part in cell.split(separator):
            assert not part.strip(' "').startswith(tuple(SIGNS))


def test_plain_cells_stay_as_they_are() -> None:
    for text in ("dpo T=0.25 vs ppo T=0", "chat:gpt-4o/tldr_simple@0", "a, b; c", "", "'quoted'", "über"):
        assert neutral_cell(text) == text


def test_csv_quotes_text_and_headers_and_leaves_numbers(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table = pd.DataFrame(
        {"=a": ["=1+1", ' @"x"', None], "kl": [-0.5, float("nan"), 1e-7], "n": [1, 20, 300], "on": [True, False, True]}
    )
    write_csv(path, table.assign(flip=pd.array([True, None, False], dtype="boolean"), f=np.float32([0.1, 1e9, 2])))
    assert path.read_text() == (
        '"\'=a","kl","n","on","flip","f"\n'
        '"\'=1+1",-0.5,1,True,True,0.1\n'
        '"\' @""x""",,20,False,,1e+09\n'
        ",1e-07,300,True,False,2\n"
    )
    back = pd.read_csv(path)
    assert back["on"].tolist() == [True, False, True] and back["kl"].isna().tolist() == [False, True, False]
    assert back["'=a"].tolist()[:2] == ["'=1+1", '\' @"x"']


def test_a_hostile_table_keeps_its_rows_and_columns(tmp_path: Path) -> None:
    hostile = ["a\r=1", 'b"\n"=2', "c\r\n\t=3", "d;=4", "\u2028=5", "\x00=6", "\ud83d"]
    write_csv(tmp_path / "t.csv", pd.DataFrame({"text": pd.Series(hostile, dtype=object), "n": range(7)}))
    text = (tmp_path / "t.csv").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 8
    rows = list(csv.reader(io.StringIO(text)))
    assert [row[1] for row in rows] == ["n", *map(str, range(7))]
