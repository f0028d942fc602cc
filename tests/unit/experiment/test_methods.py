"""What follows from a method's entry."""

from __future__ import annotations

import re

import pytest

from prefopt.experiment import methods
from prefopt.experiment.methods import METHODS


def test_the_stages_of_every_method() -> None:
    stages = {
        **{"base": [], "base_2shot": [], "sft": ["sft"], "preferred_ft": ["preferred_ft"]},
        **{"dpo": ["sft", "reference_logprobs", "dpo"], "ppo": ["sft", "reward_model", "ppo"]},
        **{"best_of_128": ["sft", "reward_model"]},
    }
    assert {name: methods.stages_of(name, "sft") for name in stages} == stages
    assert methods.stages_of("dpo", "preferred_ft") == ["preferred_ft", "reference_logprobs", "dpo"]


def test_the_papers_cast() -> None:
    assert methods.swept() == ["dpo", "ppo_gt", "ppo_gt_trl", "ppo", "unlikelihood", "preferred_ft"]
    assert methods.names("opponent") == ["sft", "preferred_ft", "dpo"]
    assert set(methods.sampled()) == {"base", "base_2shot", "sft", "preferred_ft", "dpo", "ppo"}
    assert methods.trained_by("ppo") == ["ppo", "ppo_gt", "ppo_gt_trl"]
    assert {name: METHODS[name].models for name in methods.swept()} == {
        **{"dpo": 2, "unlikelihood": 2, "preferred_ft": 2, "ppo": 4, "ppo_gt": 3, "ppo_gt_trl": 3},
    }


@pytest.mark.parametrize(
    ("name", "n", "section"),
    [("best_of_128", 128, "best_of_n"), ("best_of_n", None, "best_of_n"), ("dpo", None, "dpo")],
)
def test_names_with_a_number(name: str, n: int | None, section: str) -> None:
    assert (methods.n_of(name), methods.section_of(name)) == (n, section)
    assert methods.method_of(name) is METHODS[section]


def test_what_the_schema_allows() -> None:
    def takes(which: str, name: str) -> bool:
        return re.search(methods.allowed(which)["pattern"], name) is not None

    assert (
        takes("reported", "best_of_4") and not takes("reported", "best_of_0") and not takes("reported", "unlikelihood")
    )
    assert takes("transfers", "dpo") and not takes("transfers", "best_of_4") and not takes("transfers", "base_2shot")
    assert takes("side", "reference") and not takes("reported", "reference") and not takes("side", "dpo\n")
    assert methods.allowed("swept") == {"enum": methods.swept()}
    assert methods.allowed("reference") == {"enum": ["sft", "preferred_ft"]}
