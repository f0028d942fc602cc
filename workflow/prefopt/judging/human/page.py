"""A rater's page: one HTML file with everything in it, which needs no network and says nothing of who wrote a text."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2

_FOLDER = Path(__file__).parent


def rater_page(data: dict[str, Any]) -> str:
    """The page.

    Args:
        data: schema, study, rater, task, title, question, shown (what a prompt is, in words), prompt_heading,
            simulated (whether a program votes, so that nobody's answers count), and items with id, prompt, left and
            right. It is written into the page as JSON, with `<`, `>` and `&` as
            escapes, so that no text of it can end the element that it lies in.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined
    )
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        data=data,
        style=style,
        script=script,
        style_hash=_source_hash(style),
        script_hash=_source_hash(script),
    )


def _source_hash(text: str) -> str:
    """As a content security policy names an inline style or script: nothing else runs."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
