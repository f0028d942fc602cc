"""Texts that somebody else wrote, in files that other programs open: nothing in them is run, rendered or unseen."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.store.files import atomic_path

REPLACEMENT = "\ufffd"
# Characters without a shape that are of no category of such (Unicode's Default_Ignorable_Code_Point).
_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)
_UNSEEN_CATEGORIES = {"Cc", "Cf", "Cs"}
# Within an emoji: what joins two pictures, and what asks for the coloured one.
_JOINER, _PRESENTATION = "\u200d", {"\ufe0e", "\ufe0f"}

# Characters that Markdown takes for markup within a line, those that would leave a table's cell or tag, and what makes
# a link of an address without any markup.
_MARKUP = re.compile(r"[\\`*_\[\]<>|~&$#]|(?<=\w):(?=//)|(?<=[^\W_])\.(?=[^\W\d_])")

# Spreadsheets run a cell that begins with one of these, also in full width, after white space or quotes; some readers
# take other separators, or the end of a line within quotes, for the beginning of a cell.
_BEGINNING = re.compile(r"""[\s"]*[=+\-@＝＋－＠]""")
_INNER_BEGINNING = re.compile(r"""([;,|])([\s"]*)(?=[=+\-@＝＋－＠])""")


def visible(text: str) -> str:
    """A text with every character that has no shape of its own as U+FFFD, tabs as spaces; line ends stay.

    Control characters, direction marks, zero widths, tags, half surrogates and variation selectors change how a text
    is shown, or mark it unseen. Within an emoji they are part of the picture and stay.
    """
    return "".join(_shown(text, i) for i in range(len(text)))


def _shown(text: str, i: int) -> str:
    character = text[i]
    if character == "\t":
        return " "
    if character in "\n\r" or not _unseen(character):
        return character
    before, after = text[i - 1 : i], text[i + 1 : i + 2]
    if character in _PRESENTATION and _is_picture(before):
        return character
    if character == _JOINER and _is_picture(after):
        skipped = text[:i].rstrip("\ufe0e\ufe0f\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")
        if i - len(skipped) <= 1 and _is_picture(skipped[-1:]):
            return character
    return REPLACEMENT


def _unseen(character: str) -> bool:
    return unicodedata.category(character) in _UNSEEN_CATEGORIES or bool(_IGNORABLE.match(character))


def _is_picture(character: str) -> bool:
    return character != "" and unicodedata.category(character) == "So"


def escape_markdown(text: str) -> str:
    """Text on one line that Markdown and HTML show as it is: markup as character references, newlines as <br>.

    What has no shape is shown, see `visible`. An `@` stands apart from what follows it: some renderers look for mail
    addresses after they have read the character references.
    """
    lines = [visible(line) for line in text.strip().splitlines()]
    escaped = [_MARKUP.sub(lambda match: f"&#{ord(match.group())};", line) for line in lines]
    return "<br>".join(line.replace("@", "&#64;<wbr>") for line in escaped)


def neutral_cell(text: str) -> str:
    """A cell of CSV that no reader takes for a formula, or for more rows than one.

    An apostrophe goes before what a spreadsheet would run; line ends become spaces, and what has no shape is shown.
    """
    line = visible(" ".join(text.splitlines()))
    line = _INNER_BEGINNING.sub(r"\1\2'", line)
    return f"'{line}" if _BEGINNING.match(line) else line


def write_csv(path: str | Path, table: pd.DataFrame) -> None:
    """Writes a table as CSV, whole or not at all: numbers in six digits, what is missing empty, all text neutral.

    Text and headers are quoted, so that a reader who splits at other characters finds no cell in them.
    """
    rows: list[tuple[Any, ...]] = [tuple(table.columns), *table.itertuples(index=False, name=None)]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(",".join(map(_cell, row)) + "\n" for row in rows), encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return '"' + neutral_cell(value).replace('"', '""') + '"'
    if pd.isna(value):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
