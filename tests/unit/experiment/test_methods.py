"""What follows from a method's entry."""

from __future__ import annotations

from prefopt.experiment import methods
from prefopt.experiment.methods import METHODS


def test_the_papers_cast() -> None:
    papers = ["dpo", "ppo_gt", "ppo_gt_trl", "ppo", "unlikelihood", "preferred_ft"]
    assert methods.swept() == [*papers, "simpo", "orpo", "kto", "iterative_dpo"]
    assert [name for name in METHODS if METHODS[name].opponent] == ["sft", "preferred_ft", "dpo"]
    assert methods.names("transfers") == [
        "base",
        "sft",
        "preferred_ft",
        "dpo",
        "simpo",
        "orpo",
        "kto",
        "iterative_dpo",
        "ppo",
    ]
    assert methods.trained() == ["sft", "preferred_ft", "dpo", "simpo", "orpo", "kto", "iterative_dpo", "ppo"]
    assert methods.trained_by("ppo") == ["ppo", "ppo_gt", "ppo_gt_trl"]
    assert methods.swept()[:6] == ["dpo", "ppo_gt", "ppo_gt_trl", "ppo", "unlikelihood", "preferred_ft"]
    assert methods.swept()[6:] == ["simpo", "orpo", "kto", "iterative_dpo"]


def test_names_with_a_number() -> None:
    assert [methods.n_of(name) for name in ("best_of_128", "best_of_n", "my_best_of_2", "dpo")] == [
        128,
        None,
        None,
        None,
    ]


def test_what_a_run_may_say_of_its_methods_section() -> None:
    section = {"n": {}, "source": {}, "path": {}, "epochs": {}}
    assert list(methods.own_values("best_of_n", section)) == ["n"]
    assert list(methods.own_values("sft", section)) == ["n", "epochs"]


def test_the_labels_of_a_run_say_what_is_made_before_it() -> None:
    assert methods.needs_of("iterative_dpo", {"labels": "reward_model"}) == ("reward_model",)
    assert methods.needs_of("iterative_dpo", {"labels": "implicit"}) == ()
    assert methods.needs_of("dpo", {"beta": 0.1}) == ("reference_logprobs",)
