"""What each stage takes on its command line: what must be given, as what it is read, and what stands for the rest."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest

# Options that must be given, by what they are read as; "+" takes several.
STAGES: dict[str, dict[str, str]] = {
    "analysis.best_of_n_curve": {"path": "candidates scores verdicts prompts out", "text": "recipe"},
    "analysis.compute": {"path": "out", "text": "recipe"},
    "analysis.dominance": {"path": "out", "paths": "evaluations", "text": "recipe"},
    "analysis.frontier": {"path": "ceiling out", "paths": "scores evaluations", "text": "recipe"},
    "analysis.human_agreement": {"path": "out", "paths": "votes verdicts", "text": "recipe"},
    "analysis.judge_agreement": {"path": "out", "paths": "verdicts", "text": "recipe"},
    "analysis.optimal_frontier": {"path": "out", "paths": "scores", "text": "recipe"},
    "analysis.win_rates": {
        "path": "summary out by-seed comparisons manifest",
        "paths": "verdicts samples",
        "text": "recipe",
    },
    "data.prefixes": {"path": "reviews model demonstrations prompts summary", "text": "task recipe"},
    "data.sampled_pairs": {"path": "samples scores prompts out summary"},
    "generation.best_of_n": {
        **{"path": "candidates scores greedy prompts reference-model out", "number": "n"},
        "text": "run recipe",
    },
    "generation.sample": {"path": "model prompts out", "text": "run recipe"},
    "generation.score": {"path": "model prompts samples out", "text": "recipe"},
    "generation.subsets": {"path": "candidates scores out", "text": "recipe"},
    "judging.human.votes": {"path": "key items out raters", "paths": "exports", "text": "recipe"},
}
# Options that may be left out: as what they are read, and what then stands for them.
OPTIONAL: dict[str, dict[str, tuple[str, Any]]] = {
    "analysis.best_of_n_curve": dict.fromkeys(("judged", "one-sample", "one-sample-verdicts"), ("path", None)),
    "analysis.compute": dict.fromkeys(
        ("models", "reference", "samples", "candidates", "win-rates", "curves", "runs"), ("paths", [])
    ),
    "generation.sample": {
        **dict.fromkeys(("reference-model", "earlier"), ("path", None)),
        "shard": ("text", None),
        "shots": ("number", 0),
    },
    "generation.score": {"shard": ("text", None)},
}
GIVEN = {"path": ["3"], "paths": ["3", "4"], "text": ["3"], "number": ["3"]}
READ: dict[str, Any] = {"path": Path("3"), "paths": [Path("3"), Path("4")], "text": "3", "number": 3}


def parser_of(stage: str) -> argparse.ArgumentParser:
    # The error of an option that is left out, and no abbreviations.
    parser = argparse.ArgumentParser(allow_abbrev=False)
    importlib.import_module(f"prefopt.{stage}").add_arguments(parser)
    return parser


@pytest.mark.parametrize("stage", STAGES)
def test_the_options_of_a_stage(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = {name: kind for kind, names in STAGES[stage].items() for name in names.split()}
    optional = OPTIONAL.get(stage, {})
    parser = parser_of(stage)

    def read(names: dict[str, str]) -> dict[str, Any]:
        return vars(parser.parse_args([part for name, kind in names.items() for part in (f"--{name}", *GIVEN[kind])]))

    def values(names: dict[str, str]) -> dict[str, Any]:
        return {name.replace("-", "_"): READ[kind] for name, kind in names.items()}

    given = {name: kind for name, (kind, _) in optional.items()}
    assert read({**required, **given}) == values({**required, **given})
    assert read(required) == values(required) | {name.replace("-", "_"): value for name, (_, value) in optional.items()}
    for name in required:
        with pytest.raises(SystemExit):
            read({other: kind for other, kind in required.items() if other != name})
        assert f"the following arguments are required: --{name}" in capsys.readouterr().err
