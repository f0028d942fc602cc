"""What a report opens with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from docutils.core import publish_parts
from docutils.utils import SystemMessage

from prefopt.analysis import answers_directive
from prefopt.analysis.answers import answers
from prefopt.errors import UserError

MANIFEST: dict[str, Any] = {
    **{"judge": "oracle:v1", "test_prompts": 192, "title": "Posts", "reference": "the reference summary"},
    **{"written": "posts", "synthetic": True, "seeds": [0], "warnings": [], "recipe": {"confidence": 0.95}},
}


def win_rates(folder: Path, rows: list[tuple[str, float, bool, float, float, float]], **manifest: Any) -> Path:
    """A table of win rates with its manifest: run, temperature, selected, win rate, its interval."""
    table = pd.DataFrame(rows, columns=["run", "temperature", "selected", "win_rate", "ci_low", "ci_high"])
    table = table.assign(task="tldr", n=192, invalid=0, flip_rate=None, band_low=0.0, band_high=1.0)
    table.to_csv(folder / "tldr_winrates.csv", index=False)
    (folder / "tldr_winrates.manifest.json").write_text(json.dumps({**MANIFEST, **manifest}))
    return folder / "tldr_winrates.csv"


def test_the_run_that_wins_most_at_its_chosen_temperature_and_those_that_are_near(tmp_path: Path) -> None:
    rows = [
        ("sft", 0.25, True, 0.637, 0.57, 0.70),
        ("dpo", 0.0, False, 0.95, 0.90, 0.97),
        ("dpo", 0.25, True, 0.8754, 0.83, 0.92),
        ("ppo", 0.5, True, 0.83, 0.77, 0.874),
    ]
    (answer,) = answers([win_rates(tmp_path, rows), tmp_path / "compute.csv"])
    assert answer.question == "Posts: whose texts are most often preferred to the reference summary?"
    assert answer.sentence == (
        "DPO with 88% [83, 92] at temperature 0.25, of 192 test prompts. "
        "Intervals that overlap with this one: PPO with 83% [77, 87]."
    )
    assert answer.note == (
        "Judge: oracle:v1. 95% intervals over prompts. Synthetic: posts and the judge are a program; no person was asked."
    )
    assert answer.caveats == [] and answer.figure == tmp_path / "tldr_winrates.svg"


def test_what_takes_from_the_answer_stands_beside_it(tmp_path: Path) -> None:
    path = win_rates(
        tmp_path, [("dpo", 0.0, True, 0.9, 0.8, 1.0), ("sft", 0.0, True, 0.5, 0.4, 0.6)], warnings=["Few."]
    )
    (answer,) = answers([path])
    assert answer.caveats == ["Few."] and answer.sentence.endswith("No other run's interval overlaps with this one.")
    path.write_text("task\n")
    with pytest.raises(UserError, match="lacks the column 'run'"):
        list(answers([path]))


def test_how_far_the_first_methods_frontier_is_above_the_others(tmp_path: Path) -> None:
    table = pd.DataFrame(
        [
            ("dpo", "ppo", 1, 0.374, 0.312, 0.451),
            ("dpo", "ppo_gt", 1, -0.11, -0.18, 0.02),
            ("dpo", "unlikelihood", 1, None, None, None),
            ("ppo", "ppo_gt", 1, 0.2, 0.1, 0.3),
        ],
        columns=["method", "other", "seeds", "area", "area_low", "area_high"],
    )
    table.to_csv(tmp_path / "imdb_dominance.csv", index=False)
    (answer,) = answers([tmp_path / "imdb_dominance.csv"])
    assert answer.question == "imdb: which method gives more reward at the same KL to the reference policy?"
    assert answer.sentence == (
        "The frontier of DPO is above that of PPO by an area of 0.37 [0.31, 0.45]; "
        "below that of PPO-GT by an area of 0.11 [-0.02, 0.18]."
    )
    assert answer.note == "Areas in reward times nats, with intervals over prompts."
    assert answer.figure == tmp_path / "imdb_frontier.svg"
    (tmp_path / "data" / "imdb").mkdir(parents=True)
    (tmp_path / "data" / "imdb" / "summary.json").write_text('{"task": "imdb", "synthetic": true, "warnings": []}')
    (answer,) = answers([tmp_path / "imdb_dominance.csv"])
    assert answer.note.endswith("Synthetic: reviews are by a program; no person was asked.")
    table.assign(area=None).to_csv(tmp_path / "imdb_dominance.csv", index=False)
    assert list(answers([tmp_path / "imdb_dominance.csv"])) == []


def test_the_directive_writes_them_as_text_with_the_figure_inside(tmp_path: Path) -> None:
    answers_directive.register()
    path = win_rates(tmp_path, [("my_", 0.0, True, 0.9, 0.8, 1.0)], title="*Posts* <b>", warnings=["`Few`."])
    path.with_suffix(".svg").write_text("<svg/>")

    def page(content: str) -> str:
        settings = {"halt_level": 2}  # a warning of docutils is an error
        html: str = publish_parts(f".. answers::\n\n{content}\n\nEnd.", writer="html", settings_overrides=settings)[
            "body"
        ]
        return html

    html = page(f"\n   {path}\n\n   {tmp_path / 'other.svg'}\n")
    assert "<strong>*Posts* &lt;b&gt;: whose texts" in html and "</strong> my_ with 90% [80, 100]" in html
    assert 'src="data:image/svg+xml;base64,PHN2Zy8+"' in html and 'alt="*Posts* &lt;b&gt;: whose' in html
    assert "<strong>`Few`.</strong>" in html and html.rstrip().endswith("<p>End.</p>")
    assert page("") == "<p>End.</p>\n"
    with pytest.raises((UserError, SystemMessage)):
        page(f"   {tmp_path / 'none_winrates.csv'}\n")
