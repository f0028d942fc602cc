"""Records of JSON: an object a line, or a list of objects."""

from __future__ import annotations

import io
import json
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt.data.raw.limits import Meter
from prefopt.data.raw.opened import text_lines
from prefopt.data.raw.record import Malformed, Record
from prefopt.errors import UserError

_CHUNK = 2**20
_BLANK = re.compile(r"[ \t\r\n]*")
_BRACKET_OR_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"|["\[\]{}]', re.DOTALL)
# How far before the end of what was read an error may stand that more text would mend: half a literal or an escape.
_HALF = 16


def is_list(path: str | Path) -> bool:
    """Whether a file is one JSON list, whose first character is a bracket, and not an object a line."""
    with text_lines(path) as lines:
        return _Text(path, lines).next() == "["


def line_rows(path: str | Path) -> Iterator[Record]:
    """Records of a file that holds one a line; blank lines are skipped, and counted as lines."""
    with text_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(line.removeprefix("\ufeff"))  # files that were put together


def list_rows(path: str | Path, meter: Meter) -> Iterator[Record]:
    """Records of a file that is one JSON list, each decoded apart; one stands in the line that it begins in.

    Raises:
        UserError: the file is no JSON list, or a record is larger than the limits allow.
    """
    with text_lines(path) as lines:
        text = _Text(path, lines)
        text.take("[")
        while text.next() != "]":
            yield f"{path}:{text.line}", _element(text, meter)
            if text.next() != "]":
                text.take(",")
        text.take("]")
        text.take("")


class _Text:
    """What of a file was read and is not yet used."""

    def __init__(self, path: str | Path, file: io.TextIOBase) -> None:
        self.text, self.at, self.line = "", 0, 1
        self._path, self._file = path, file

    def more(self) -> bool:
        """Reads on, twice as far each time; whether there was anything."""
        self.text, self.at = self.text[self.at :], 0
        part = self._file.read(max(_CHUNK, len(self.text)))
        self.text += part
        return part != ""

    def next(self) -> str:
        """The first character that is no white space; "" at the end."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            self.use(blank.end() if blank else self.at)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def use(self, end: int) -> None:
        """Counts the lines up to there."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def take(self, expected: str) -> None:
        """Raises UserError where another character comes next."""
        if (found := self.next()) != expected:
            raise self.broken(f"{found or 'its end'!r} stands where {expected or 'its end'!r} is expected")
        self.use(self.at + len(expected))

    def broken(self, reason: str) -> UserError:
        """What to say of a file that is no JSON."""
        return UserError(f"{self._path}:{self.line}: the list is not JSON ({reason}): correct the file.")

    def check(self, meter: Meter, size: int) -> None:
        """Raises UserError where what comes next is larger than a record may be."""
        meter.check_record(f"{self._path}:{self.line}", size)


def _element(text: _Text, meter: Meter) -> Any:
    """The next value of a list. A reader that met a field twice could not say where the record ends, so that is noted."""
    problems: list[str] = []
    decoder = json.JSONDecoder(
        object_pairs_hook=lambda pairs: _noted(problems, pairs), parse_int=lambda digits: _whole(problems, digits)
    )
    while True:
        problems.clear()
        try:
            value, end = decoder.raw_decode(text.text, text.at)
            length, whole = end - text.at, end < len(text.text)
            if whole or not text.more():
                break
        except json.JSONDecodeError as error:
            text.check(meter, len(text.text) - text.at)
            cut = error.pos >= len(text.text) - _HALF or error.msg.startswith("Unterminated string")
            left = len(text.text) - error.pos  # stays the same where nothing more is read
            if not cut or not text.more():
                text.use(len(text.text) - left)
                raise text.broken(error.msg) from error
        except RecursionError:
            _skip(text, meter)
            return Malformed("the record is nested too deep")
    text.check(meter, length)
    end = text.at + length
    try:
        text.text[text.at : end].encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        problems.append(f"the record is not UTF-8 ({error.reason})")
    text.use(end)
    if problems:
        return Malformed(problems[0])
    return value if isinstance(value, dict) else Malformed(f"the list holds {type(value).__name__}, not a JSON object")


def _skip(text: _Text, meter: Meter) -> None:
    """Goes on to the end of a record that is nested too deep to be decoded: to where all its brackets are closed."""
    depth, at = 0, text.at
    while True:
        for found in _BRACKET_OR_STRING.finditer(text.text, at):
            at = found.end()
            if found[0] == '"':  # a string whose end is not read yet
                at = found.start()
                break
            depth += (found[0] in "[{") - (found[0] in "]}")
            if depth == 0:
                text.check(meter, at - text.at)
                text.use(at)
                return
        text.check(meter, len(text.text) - text.at)
        at -= text.at
        if not text.more():
            raise text.broken("its end stands where a bracket is to be closed")


def _noted(problems: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    try:
        return _object(pairs)
    except Malformed as problem:
        problems.append(str(problem))
        return {}


def _whole(problems: list[str], digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        problems.append(f"the record holds a number of more than {sys.get_int_max_str_digits()} digits")
        return 0


def _parse(line: str) -> Any:
    try:
        line.encode("utf-8", "surrogateescape").decode()
        row = json.loads(line, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return Malformed(f"the line is not UTF-8 ({error.reason})")
    except json.JSONDecodeError as error:
        return Malformed(f"the line is not JSON ({error.msg} at character {error.pos + 1})")
    except Malformed as problem:
        return problem
    except ValueError:
        return Malformed(f"the line holds a number of more than {sys.get_int_max_str_digits()} digits")
    except RecursionError:
        return Malformed("the line is nested too deep")
    return row if isinstance(row, dict) else Malformed(f"the line holds {type(row).__name__}, not a JSON object")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two values they take, so none is."""
    row = dict(pairs)
    if len(row) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise Malformed(f"the field {reprlib.repr(twice)} stands twice in one object")
    return row
