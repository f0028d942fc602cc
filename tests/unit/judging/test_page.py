"""A rater's page as text; tests/browser drives it in a browser."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest

from prefopt.judging.human import page
from prefopt.judging.human.page import rater_page

TITLE = "Which of two <b>texts</b> & 'why'?"
DATA: dict[str, Any] = {
    **{"schema": 1, "study": "s", "rater": "r01", "task": "tldr", "title": TITLE, "question": "Which?"},
    **{"shown": "a post", "prompt_heading": "Post", "simulated": False},
    "items": [{"id": "a", "prompt": "p", "left": "</script><script>alert(1)</script>", "right": "x"}],
}


def test_texts_are_escaped_and_read_back_as_they_were() -> None:
    text = rater_page(DATA)
    (shown,) = re.findall(r"<h1>(.*)</h1>", text)
    assert html.unescape(shown) == TITLE and "<b>" not in text and "alert(1)</script>" not in text
    (data,) = re.findall(r'<script id="data" type="application/json">(.*)</script>', text)
    assert json.loads(data) == DATA


def test_nothing_but_its_own_style_and_script_runs() -> None:
    text, folder = rater_page(DATA), Path(page.__file__).parent
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*)">', text)
    for element, name in (("style", "page.css"), ("script", "page.js")):
        (inline,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
        assert inline == (folder / name).read_text(encoding="utf-8")
        named = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{named}';" in html.unescape(policy)


def test_what_a_page_lacks_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="question"):
        rater_page({name: value for name, value in DATA.items() if name != "question"})
