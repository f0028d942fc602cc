"""A record as every reader hands it on: where it stands, and what it holds."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

# U+0085 is left out: where it stands in English text it is a mangled ellipsis.
_LINE_END = re.compile("\r\n|[\r\u2028\u2029]")


class Malformed(Exception):
    """A record that does not follow its format; the message says what is wrong, without the place."""


Record = tuple[str, Any]  # "file:line", and the record (a mapping) or the `Malformed` that stands in its place
Records = Iterable[Record]


def text_of(row: Mapping[str, Any], name: str) -> str:
    """A field that must hold text; its lines end with "\\n", whichever way they did.

    Raises:
        Malformed: the field is missing, holds something else, or half a character.
    """
    value = field_of(row, name)
    if not isinstance(value, str):
        raise Malformed(f"{name!r} is {reprlib.repr(value)}, which is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no table can hold it
        raise Malformed(f"{name!r} holds half a character at position {error.start}") from error
    return value if value.isascii() and "\r" not in value else _LINE_END.sub("\n", value)


def field_of(row: Mapping[str, Any], name: str) -> Any:
    """A field of any kind; raises Malformed where it is missing."""
    if name not in row:
        raise Malformed(f"the field {name!r} is missing")
    return row[name]
