from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from made_up import make_files, make_frames
from prefopt.analysis import examples
from prefopt.analysis.examples import ExamplesRecipe, examples_page, shorten
from prefopt.errors import UserError

OUTCOMES = {
    "sft": {0.0: ("w", "wlll"), 1.0: ("l", "wwll")},
    "dpo": {0.0: ("l", "tttt"), 1.0: ("w", "wiww")},
}
SELECTED = {"sft": 0.0, "dpo": 1.0}


def recipe(**changes: Any) -> ExamplesRecipe:
    values = {"task": "tldr", "runs": ("sft", "dpo"), "count": 2, "seed": 0, "max_characters": 60, "against": ""}
    return ExamplesRecipe(**{**values, **changes})


def prompts(post: str = "a post", reference: str = " the reference") -> pd.DataFrame:
    return pd.DataFrame(
        [{"prompt_id": f"test-{i}", "prompt": post, "reference": reference, "split": "test"} for i in range(4)]
    )


@pytest.fixture
def texts() -> pd.DataFrame:
    verdicts, samples = make_frames(OUTCOMES)
    keys = ["run", "prompt_id", "temperature", "sample_index"]
    return verdicts.merge(samples[[*keys, "text", "finish_reason"]], on=keys)


def test_each_prompt_shows_reference_and_every_method_with_its_verdict(texts: pd.DataFrame) -> None:
    page = examples_page(prompts(), texts, SELECTED, recipe(count=4))
    assert page.count("## ") == 4
    assert page.count("**Reference**") == 4
    assert page.count("SFT (T = 0)") == page.count("DPO (T = 1)") == 4
    assert page.count("better than the reference") == 1 + 3  # wlll at 0, wiww at 1
    assert page.count("no verdict") == 1
    assert "dpo says 3" in page


def test_the_choice_depends_on_the_seed_alone(texts: pd.DataFrame) -> None:
    assert examples_page(prompts(), texts, SELECTED, recipe()) == examples_page(
        prompts().iloc[::-1], texts.sample(frac=1, random_state=0), SELECTED, recipe()
    )
    pages = {examples_page(prompts(), texts, SELECTED, recipe(seed=seed)).split("\n", 3)[3] for seed in range(9)}
    assert len(pages) > 1


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "a | b | c",
        "[click](javascript:alert(1))",
        "![x](https://example.invalid/p.png)",
        "see https://example.invalid and www.example.invalid",
        "`code` **bold** _it_ ~~s~~ $x$",
        "\\| \\` &lt;b&gt;",
        "# heading first",
        "- item\n1. item",
        "line\n\n# heading\n| a | b |\n```\nfence",
        "write to me@example.invalid or @somebody",
        "un\u200bseen\u061c\ufeff\U000e0041",
    ],
)
def test_hostile_text_stays_text(texts: pd.DataFrame, hostile: str) -> None:
    texts["text"] = hostile
    page = examples_page(prompts(hostile, hostile), texts, SELECTED, recipe(count=1, max_characters=500))
    body = page.replace("<br>", "")
    body = body.replace("&#64;<wbr>", "")
    for markup in ("<", "`", "](", "![", "://", "www.", "\\", "~~", "$", "&lt;", "@", "\u200b", "\ufeff", "\U000e0041"):
        assert markup not in body
    table_rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table_rows) == 2 + 3
    assert {line.count("|") for line in table_rows} == {5}
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "# tldr: examples",
        next(line for line in page.splitlines() if line.startswith("## 1")),
    ]


def test_long_texts_are_cut_and_say_so() -> None:
    text = "a" * 75 + "b" * 25
    assert shorten(text, 40) == "a" * 30 + " […60 characters left out…] " + "b" * 10
    assert shorten("short", 40) == "short"


def test_a_method_without_texts_is_refused(texts: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="every run"):
        examples_page(prompts(), texts[texts["run"] == "sft"], SELECTED, recipe())


def test_the_stage(tmp_path: Path) -> None:
    made = make_files(tmp_path, OUTCOMES)
    rows = [
        {
            "task": "tldr",
            "run": method,
            "temperature": temperature,
            "selected": SELECTED[method] == temperature,
            "win_rate": 0.5,
            "ci_low": 0.4,
            "ci_high": 0.6,
            "band_low": 0.3,
            "band_high": 0.7,
            "flip_rate": float("nan"),
            "invalid": 0,
            "judge": "chat:<b>@me/[x](y)\u200b@0",
        }
        for method in SELECTED
        for temperature in (0.0, 1.0)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "w.csv", index=False)
    parser = argparse.ArgumentParser()
    examples.add_arguments(parser)
    text = json.dumps({**recipe().__dict__, "runs": ["sft", "dpo"]})
    inputs = ["--prompts", *made["prompts"], "--samples", *made["samples"], "--verdicts", *made["verdicts"]]
    out = tmp_path / "examples.md"
    examples.run(
        parser.parse_args([*inputs, "--win-rates", str(tmp_path / "w.csv"), "--recipe", text, "--out", str(out)])
    )
    page = out.read_text()
    assert "Judge: chat:&#60;b&#62;&#64;<wbr>me/&#91;x&#93;(y)\ufffd&#64;<wbr>0." in page
    assert "> **Prompt.** SUBREDDIT: r/x<br><br>POST: post test-" in page


def test_verdicts_against_a_run_say_so_and_no_reference_is_counted(texts: pd.DataFrame) -> None:
    page = examples_page(prompts(), texts, SELECTED, recipe(count=1, against="SFT (T = 0)"))
    assert "Verdicts are against SFT (T = 0)." in page
    (row,) = [line for line in page.splitlines() if line.startswith("| **Reference** |")]
    assert row.endswith("|  |  |")
    assert "**Reference**" not in examples_page(prompts(reference=""), texts, SELECTED, recipe(against="SFT (T = 0)"))
