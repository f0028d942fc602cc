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
    "analysis.diagnosis": {"path": "out page", "paths": "evaluations", "text": "recipe"},
    "analysis.dominance": {"path": "out", "paths": "evaluations", "text": "recipe"},
    "analysis.frontier": {"path": "ceiling out", "paths": "scores evaluations", "text": "recipe"},
    "analysis.human_agreement": {"path": "out", "paths": "votes verdicts", "text": "recipe"},
    "analysis.judge_agreement": {"path": "out", "paths": "verdicts", "text": "recipe"},
    "analysis.optimal_frontier": {"path": "out", "paths": "scores", "text": "recipe"},
    "analysis.overoptimization": {"path": "table fits", "paths": "evaluations summaries out", "text": "recipe"},
    "analysis.win_rates": {
        "path": "summary out by-seed comparisons manifest",
        "paths": "verdicts samples",
        "text": "recipe",
    },
    "analysis.figures": {"path": "win-rates by-seed manifest", "paths": "out"},
    "analysis.win_rate_by_step": {"path": "summary table", "paths": "verdicts samples out", "text": "recipe"},
    "data.prefixes": {"path": "reviews model demonstrations prompts summary", "text": "task recipe"},
    "data.prepare": {"path": "raw model", "paths": "out", "text": "recipe"},
    "data.records": {"path": "out", "text": "task recipe", "form": "form", "table": "table"},
    "data.reviews": {"path": "out", "text": "recipe", "reviews": "table"},
    "data.round_prompts": {"path": "prompts out", "text": "recipe"},
    "data.sampled_pairs": {"path": "samples scores prompts out summary", "text": "recipe"},
    "data.summary": {"path": "out", "paths": "tables", "text": "recipe"},
    "generation.best_of_n": {
        **{"path": "candidates scores greedy prompts reference-model out", "number": "n"},
        "text": "run recipe",
    },
    "generation.evaluations": {"path": "samples prompts reference-model out", "text": "recipe"},
    "generation.implicit_rewards": {"path": "model reference-model prompts samples out", "text": "recipe"},
    "generation.sample": {"path": "model prompts out", "text": "run recipe"},
    "generation.score": {"path": "model prompts samples out", "text": "recipe"},
    "generation.subsets": {"path": "candidates scores out", "text": "recipe"},
    "judging.accuracy": {"path": "gold-model gold-data out", "text": "recipe"},
    "judging.human.simulated": {"path": "key items out", "text": "recipe"},
    "judging.human.study": {"path": "prompts pages items key", "paths": "samples", "text": "recipe"},
    "judging.human.votes": {"path": "key items out raters", "paths": "exports", "text": "recipe"},
    "judging.items": {"path": "items prompts out", "text": "recipe"},
    "judging.labels": {"path": "samples prompts out", "text": "recipe"},
    "judging.stage": {"path": "samples prompts demonstrations out", "text": "recipe"},
    "rewards.stage": {"path": "samples prompts out", "text": "recipe"},
    "training.classifier": {"path": "model reviews table work out metrics", "text": "recipe"},
    "training.kto": {"path": "model data reference work out metrics", "text": "recipe"},
    "training.preference": {"path": "model data work out metrics", "text": "recipe"},
    "training.ngrams": {"path": "model reviews table out", "text": "recipe"},
    "training.model_card": {"path": "model out"},
    "training.ppo": {"path": "model prompts work out metrics", "text": "recipe"},
    "training.pretrain": {"path": "text work out metrics", "text": "recipe"},
    "training.reference": {"path": "model data out", "text": "recipe"},
    "training.reward": {"path": "model data demonstrations work out metrics", "text": "recipe"},
    "training.round_evaluations": {"path": "model sampled-prompts", "paths": "rounds", "text": "by-step run"},
    "training.sft": {"path": "model data work out metrics", "text": "recipe"},
}
JUDGE: dict[str, tuple[str, Any]] = dict.fromkeys(("gold-model", "gold-accuracy", "template", "votes"), ("path", None))
BY_STEP: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("by-step", "run"), ("text", None)),
    **dict.fromkeys(("sampled-prompts", "samples", "evaluations", "true-reward-model"), ("path", None)),
}
# Options that may be left out: as what they are read, and what then stands for them.
OPTIONAL: dict[str, dict[str, tuple[str, Any]]] = {
    "analysis.best_of_n_curve": dict.fromkeys(("judged", "one-sample", "one-sample-verdicts"), ("path", None)),
    "analysis.compute": dict.fromkeys(
        ("models", "reference", "rounds", "rewards", "samples", "written", "candidates", "win-rates", "curves", "runs"),
        ("paths", []),
    ),
    "analysis.diagnosis": {"metrics": ("paths", [])},
    "analysis.overoptimization": dict.fromkeys(("candidates", "scores", "true"), ("paths", [])),
    "generation.evaluations": dict.fromkeys(("true-reward-model", "reward-model"), ("path", None)),
    "generation.sample": {
        **dict.fromkeys(("reference-model", "earlier"), ("path", None)),
        "shard": ("text", None),
        "shots": ("number", 0),
    },
    "generation.score": {"shard": ("text", None)},
    "generation.implicit_rewards": {"shard": ("text", None)},
    "judging.human.study": {"secret": ("path", None)},
    "judging.items": JUDGE,
    "judging.labels": {**JUDGE, "shard": ("text", None)},
    "judging.stage": {
        **JUDGE,
        **dict.fromkeys(("selected-by", "against"), ("path", None)),
        "against-temperature": ("fraction", None),
        "shard": ("text", None),
    },
    "rewards.stage": {"true-reward-model": ("path", None), "shard": ("text", None)},
    **dict.fromkeys(("training.kto", "training.sft"), BY_STEP),
    "training.round_evaluations": dict.fromkeys(
        ("samples", "evaluations", "true-reward-model", "reward-model"), ("path", None)
    ),
    "training.ppo": {**BY_STEP, "reward-model": ("path", None)},
    "training.preference": {**BY_STEP, **dict.fromkeys(("reference", "reference-model"), ("path", None))},
}
# One of several words.
CHOICES = {"form": "tldr", "table": "preferences", "reviews": "pretraining"}
GIVEN = {
    "path": ["3"],
    "paths": ["3", "4"],
    "text": ["3"],
    "number": ["3"],
    "fraction": ["0.3"],
    **{k: [v] for k, v in CHOICES.items()},
}
READ: dict[str, Any] = {
    "path": Path("3"),
    "paths": [Path("3"), Path("4")],
    "text": "3",
    "number": 3,
    "fraction": 0.3,
    **CHOICES,
}


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
    for name in [name for name, kind in required.items() if kind in CHOICES]:
        with pytest.raises(SystemExit):
            read({**required, name: "text"})
        assert f"argument --{name}: invalid choice: '3'" in capsys.readouterr().err
