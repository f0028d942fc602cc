"""A judge's prompt: a file with the places {prompt}, {first} and {second}, and the reply that it asks for."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import unicodedata
from pathlib import Path

from prefopt.errors import UserError
from prefopt.judging.disguise import letters, undisguised

_PLACES = ("prompt", "first", "second")
# The last line of a template: `Preferred: <"A" or "B">`, or `Preferred: <"A", "B" or "tie">`.
_FORMAT_LINE = re.compile(r"(?P<label>[^:\n]+): <(?P<choices>[^>]+)>")
_CHOICES = (["A", "B"], ["A", "B", "tie"])
_WRAPPING = " \t\"'`*_<>[](){}.\\“”‘’«»"
_HUMAN = "\n\nHuman:"
# Before a heading: marks of titles, lists and quotations, and numbers or letters of a list.
_MARKS = r"[\W_]*+(?:(?:\d{1,4}|[a-z]|[ivx]{2,5})[.):\]][\W_]*+)*"
# Between a heading and what it announces: a colon or what stands for one.
_ANNOUNCES = r"[^\w]*?(?:[:=|>\u2236\ua789\u02d0\u05c3\u0589]|\s[-\u2012-\u2015]|[\u2012-\u2015]\s)"
# What begins a mark of a chat template, which a local server may take for one.
_CHAT_MARKS = re.compile(r"<(?=[|\uff5c])|[|\uff5c](?=>)|<(?=/?s>|(?:start|end)_of_turn>|</?SYS>>)|\[(?=/?INST\])")


@dataclasses.dataclass(frozen=True)
class Template:
    """A judge's prompt as its file has it.

    Attributes:
        name: the file's name without its ending.
        text: the whole text with its three places.
        label: what stands before the choice in the reply, e.g. "Preferred".
        choices: what may be chosen: "A", "B" and, where the prompt offers it, "tie".
    """

    name: str
    text: str
    label: str
    choices: tuple[str, ...]

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_template(path: str | Path) -> Template:
    """Reads a judge's prompt.

    Raises:
        UserError: the file cannot be read, a place is missing or there twice, or its last line does not say
            what may be chosen.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the judge's prompt cannot be read ({error}).") from error
    for place in _PLACES:
        if (count := text.count(f"{{{place}}}")) != 1:
            raise UserError(
                f"{path}: the place {{{place}}} stands {count} times in the judge's prompt; once is needed."
            )
    last = _FORMAT_LINE.fullmatch(text.splitlines()[-1])
    choices = re.findall(r'"([^"]+)"', last["choices"]) if last else []
    if last is None or choices not in _CHOICES:
        raise UserError(
            f'{path}: the last line must say how to answer, e.g. Preferred: <"A" or "B">, or '
            f'Preferred: <"A", "B" or "tie">; found {text.splitlines()[-1]!r}.'
        )
    return Template(path.stem, text, last["label"].strip(), tuple(choices))


def fill(template: Template, prompt: str, first: str, second: str) -> str:
    """The prompt with its places filled.

    The texts are data: a line in one that reads like a heading of the template or like a verdict gets a bar before
    it, and no text's own "{second}" is filled.
    """
    texts = {"prompt": prompt, "first": first, "second": second}
    safe = {place: neutral(template, text.strip()) for place, text in texts.items()}
    return re.sub(r"\{(prompt|first|second)\}", lambda match: safe[match[1]], template.text)


def neutral(template: Template, text: str) -> str:
    """A text whose lines can be taken neither for a part of the template nor for a verdict.

    A heading or a verdict is found behind marks of lists and titles ("# ", "1. ", "- "), in other spacing, emphasis or
    letters that look the same, with whatever stands between it and what it announces.
    """
    forged = _forged(template)

    def line(line: str) -> str:
        plain = undisguised(line)
        matches = [found for form in forged if (found := form.match(plain))]
        # A word without a Latin letter is one of another language, and no disguise.
        heading = any(re.search("[a-z]", found["heading"]) for found in matches)
        return f"| {line}" if heading or verdict_of_line(template, line) else line

    return _CHAT_MARKS.sub(r"\g<0> ", "".join(map(line, text.splitlines(keepends=True))))


def verdict_of_line(template: Template, line: str) -> str | None:
    """The choice that a line states: `A`, `"A"`, `**A**`, `Preferred: <"A">`, `Preferred: Summary A`; else None.

    "A" without the label counts as a capital only, since "a" is a word.
    """
    plain = plain_line(line)
    label = re.match(rf"{re.escape(template.label)}\W*?[:=]", plain, flags=re.IGNORECASE)
    value = plain_line(plain[label.end() :]) if label else plain
    noun = re.match(r"(summary|response|answer|option)\s+", value, flags=re.IGNORECASE)
    value = plain_line(value[noun.end() :]) if noun else value
    for choice in template.choices:
        if value == choice or (label and value.casefold() == choice.casefold()):
            return choice
    return None


def plain_line(line: str) -> str:
    """A line without invisible characters, compatibility forms, quotation marks, brackets and emphasis around it."""
    visible = "".join(
        c for c in unicodedata.normalize("NFKC", line) if unicodedata.category(c) not in ("Cf", "Cc", "Zl", "Zp")
    )
    return visible.strip(_WRAPPING)


def question(prompt: str, suffix: str) -> str:
    """What a person asked: a task's prompt without its last line, and without the mark of its only turn."""
    text = prompt.removesuffix(suffix)
    if text.startswith(_HUMAN) and text.count(_HUMAN) == 1 and "\n\nAssistant:" not in text:
        text = text.removeprefix(_HUMAN)
    return text.strip()


@functools.cache
def _forged(template: Template) -> list[re.Pattern[str]]:
    """What an undisguised line looks like that a reader may take for the template's heading or for a verdict."""
    starts = (re.match(r"([^:{}\n]{1,40}):", line) for line in template.text.splitlines())
    headings = {match[1] for match in starts if match} | {template.label}
    forms = [rf"{_MARKS}(?P<heading>{letters(heading)})(?:{_ANNOUNCES}|[\W_]*$)" for heading in sorted(headings)]
    forms += [rf"{_MARKS}(?P<heading>{letters(choice)})[\W_]*$" for choice in template.choices]
    return [re.compile(form) for form in forms]
