"""A rater's page in a real Chromium: voting by keyboard, closing, reopening, exporting, hostile texts, accessibility."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `test` installs playwright")
axe_playwright = pytest.importorskip("axe_playwright_python.sync_playwright")

from prefopt.judging.human.page import rater_page  # noqa: E402
from prefopt.judging.human.study import SCHEMA, StudyRecipe, assign, study_hash, study_items  # noqa: E402
from prefopt.judging.human.votes import VotesRecipe, count, read_answers  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian: apt-get install chromium)"),
]

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "<!-- <img src=x onerror='window.hacked = 1'>",
    "]]> {{ 7*7 }} ${7*7} &lt;b&gt; \\u003c",
    "\u202egnidaer sdrawkcab\u202c \u2067x\u2069",
    "a\x00b\x07c",
    "long " * 4000,
    "=1+1\r\n\u2028next",
    "un\u200bseen\u200e \u200f\u061c\ufeff\u00ad\u2063\u3164\U000e0041\ufe0f\u200d",
    "\u2764\ufe0f \U0001f469\u200d\U0001f52c \U0001f44d\U0001f3fd kept",
]
# Each character of these that stands outside an emoji is shown as U+FFFD.
UNSEEN = "\x00\x07\u202e\u202c\u2067\u2069\u200b\u200e\u200f\u061c\ufeff\u00ad\u2063\u3164\U000e0041\ufe0f\u200d"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A browser whose profile outlives it; call it to open one."""
    with sync_api.sync_playwright() as playwright:

        def launch(**options: Any) -> Any:
            return playwright.chromium.launch_persistent_context(
                str(tmp_path / "profile"), executable_path=CHROMIUM, args=["--no-sandbox"], **options
            )

        yield launch


def write(tmp_path: Path, items: list[dict[str, str]], **changes: Any) -> str:
    data = {
        **{"schema": SCHEMA, "study": "s" * 64, "rater": "r01", "task": "tldr", "title": "Which text is better?"},
        **{
            "question": "Which summary is better?",
            "shown": "a post",
            "prompt_heading": "Post",
            "simulated": False,
            "items": items,
            **changes,
        },
    }
    path = tmp_path / "r01.html"
    path.write_text(rater_page(data), encoding="utf-8")
    return path.as_uri()


def item(i: int, **texts: str) -> dict[str, str]:
    return {"id": f"{i:016x}", "prompt": f"post {i}", "left": f"left {i}", "right": f"right {i}", **texts}


def study() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Key and shown items of a study of 22 comparisons, two repeats and a check for one rater: 25 in all."""
    prompts = pd.DataFrame(
        {"prompt_id": f"p{i}", "prompt": f"post {i}", "reference": f"reference {i}", "split": "test", "facts": ""}
        for i in range(30)
    )
    samples = pd.DataFrame(
        {
            **{"prompt_id": f"p{i}", "run": method, "temperature": 0.0, "split": "test", "sample_index": 0},
            "text": f" {method} {i}",
        }
        for i in range(30)
        for method in ("good", "bad")
    )
    side = {"temperature": 0.0}
    recipe = StudyRecipe(
        task="tldr",
        suffix="",
        title="t",
        question="q",
        shown="a post",
        prompt_heading="Post",
        matchups=(
            {
                "first": {"run": "good", **side},
                "second": {"run": "bad", **side},
                "items": 22,
                "raters_per_item": 1,
            },
        ),
        judgments_per_rater=22,
        swapped_repeats=2,
        attention_checks=1,
        seed=0,
        simulated=False,
    )
    items, _ = study_items(samples, prompts, recipe)
    secret = "5" * 64
    assignment = assign(items, prompts, recipe, secret)
    rows = assignment["r01"]
    key = {"schema": SCHEMA, "study": study_hash(assignment, secret), "raters": assignment}
    return key, rows


def test_a_study_is_voted_through_by_keyboard_closed_reopened_exported_and_scored(tmp_path: Path, browser: Any) -> None:
    key, rows = study()
    assert len(rows) == 25
    shown = [{name: row[name] for name in ("id", "prompt", "left", "right")} for row in rows]
    address = write(tmp_path, shown, study=key["study"])

    def press(page: Any, row: dict[str, Any]) -> None:
        """Votes for the good text, or for the reference of a check, by what is on the screen."""
        assert page.inner_text("#prompt") == row["prompt"]
        texts = [page.inner_text("#left"), page.inner_text("#right")]
        wanted = f"reference {row['prompt'].split()[1]}"
        good = [text.startswith("good") or text == wanted for text in texts]
        assert sum(good) == 1
        page.keyboard.press("1" if good[0] else "2")

    context = browser()
    page = context.new_page()
    page.goto(address)
    page.keyboard.press("Enter")  # the start button has the focus
    for row in rows[:10]:
        press(page, row)
    # A slip, taken back twice: the last answer and the one before.
    page.keyboard.press("0")
    page.keyboard.press("u")
    page.keyboard.press("U")
    press(page, rows[9])
    assert page.inner_text("#count") == "10 of 25 answered"
    context.close()

    context = browser(accept_downloads=True)
    page = context.new_page()
    page.goto(address)
    assert "10 of 25 answers are kept in this browser" in page.inner_text("#notice")
    page.keyboard.press("Enter")
    for row in rows[10:]:
        press(page, row)
    assert "that was the last one" in page.inner_text("#done-heading")
    with page.expect_download() as waiting:
        page.click("#export")
    assert waiting.value.suggested_filename == "tldr-r01.json"
    export = json.loads(Path(waiting.value.path()).read_text())
    assert export["complete"] is True and len(export["votes"]) == 25

    # The export goes back into a browser that has forgotten everything.
    page.evaluate("localStorage.clear()")
    page.goto(address)
    page.set_input_files("#import", waiting.value.path())
    sync_api.expect(page.locator("#notice")).to_have_text(re.compile("^25 answers"))
    page.click("#start")
    assert page.is_visible("#done")
    context.close()

    recipe = VotesRecipe(min_seconds=0.0, failed_checks_allowed=0, simulated=False)
    checked = count(read_answers(export, key, "export"), key, recipe)
    assert len(checked.votes) == 22
    assert {vote["outcome"] for vote in checked.votes} == {"win"}
    assert not checked.drops
    assert (checked.figures["checks_failed"], checked.figures["repeats_agree"]) == (0, 2)


def test_hostile_texts_are_shown_and_do_nothing(tmp_path: Path, browser: Any) -> None:
    context = browser()
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.on("request", lambda request: faults.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(write(tmp_path, [item(i, prompt=t, left=t, right=t) for i, t in enumerate(HOSTILE)], title="<b>t</b>"))
    assert page.inner_text("h1") == "<b>t</b>"
    page.click("#start")
    for text in HOSTILE:
        for place in ("prompt", "left", "right"):
            found = page.evaluate(f"document.getElementById('{place}').textContent")
            expected = text.replace("\r\n", "\n")
            for mark in "" if expected.endswith("kept") else UNSEEN:
                expected = expected.replace(mark, "\ufffd")
            assert found == expected
            assert page.evaluate(f"document.getElementById('{place}').childElementCount") == 0
        # Nothing is wider than the window.
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.keyboard.press("s")
    assert page.evaluate("window.hacked") is None
    assert page.is_visible("#done")
    assert faults == []
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1200, 800), (320, 640)])  # the latter is 640 pixels at 200% zoom
def test_nothing_keeps_anybody_out(tmp_path: Path, browser: Any, scheme: str, width: int, height: int) -> None:
    context = browser(color_scheme=scheme, viewport={"width": width, "height": height})
    page = context.new_page()
    page.goto(write(tmp_path, [item(0, prompt="a long post " * 200), item(1)]))
    axe = axe_playwright.Axe()
    for step in ("#start", "[data-vote=left]", "[data-vote=tie]"):
        found = axe.run(page).response["violations"]
        assert [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found] == []
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.click(step)
    assert page.is_visible("#done")
    assert axe.run(page).violations_count == 0
    context.close()


def test_the_keyboard_alone_suffices_without_shortcuts(tmp_path: Path, browser: Any) -> None:
    context = browser()
    page = context.new_page()
    page.goto(write(tmp_path, [item(0), item(1)]))
    page.uncheck("#shortcuts")
    page.focus("#start")
    page.keyboard.press("Enter")
    page.keyboard.press("1")  # switched off
    assert page.inner_text("#count") == "0 of 2 answered"
    seen = []
    for _ in range(6):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.dataset.vote || document.activeElement.id"))
    assert seen[:5] == ["prompt", "left", "tie", "right", "skip"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    assert page.inner_text("#count") == "1 of 2 answered"
    assert page.evaluate("document.activeElement.id") == "item-heading"
    assert page.inner_text("#status") != ""
    context.close()


def test_a_browser_that_keeps_nothing_says_so(tmp_path: Path, browser: Any) -> None:
    context = browser()
    context.add_init_script("Storage.prototype.setItem = () => { throw new Error('blocked'); }")
    page = context.new_page()
    page.goto(write(tmp_path, [item(0), item(1)]))
    page.click("#start")
    page.keyboard.press("2")
    assert "do not close the page before you have exported" in page.inner_text("#status")
    assert page.inner_text("#count") == "1 of 2 answered"
    page.on("dialog", lambda dialog: dialog.accept())
    context.close()


def test_only_answers_that_the_page_could_give_are_taken_from_a_file(tmp_path: Path, browser: Any) -> None:
    context = browser()
    page = context.new_page()
    page.goto(write(tmp_path, [item(i) for i in range(9)]))
    odd: list[Any] = ["constructor", "toString", "__proto__", ["left"], None]
    votes = [{"id": f"{i:016x}", "vote": vote, "seconds": 3} for i, vote in enumerate(odd)]
    votes += [{"id": f"{5 + i:016x}", "vote": "left", "seconds": s} for i, s in enumerate(["4", True, -1])]
    votes += [{"id": f"{8:016x}", "vote": "tie", "seconds": 2.5}]
    given = {"schema": SCHEMA, "study": "s" * 64, "rater": "r01", "votes": votes}
    (tmp_path / "export.json").write_text(json.dumps(given))
    page.set_input_files("#import", str(tmp_path / "export.json"))
    sync_api.expect(page.locator("#notice")).to_have_text("1 answers were read. Start goes on after them.")
    stored = json.loads(page.evaluate("localStorage.getItem(Object.keys(localStorage)[0])"))
    assert stored == {"votes": [votes[-1]]}
    context.close()


def test_another_studys_export_is_refused(tmp_path: Path, browser: Any) -> None:
    context = browser()
    page = context.new_page()
    page.goto(write(tmp_path, [item(0)]))
    for name, text in (
        ("a", json.dumps({"schema": SCHEMA, "study": "x", "rater": "r01", "votes": []})),
        ("b", "no json"),
    ):
        (tmp_path / f"{name}.json").write_text(text)
        page.set_input_files("#import", str(tmp_path / f"{name}.json"))
        sync_api.expect(page.locator("#notice")).to_contain_text("nothing was changed")
        page.evaluate("document.getElementById('notice').textContent = ''")
    context.close()
