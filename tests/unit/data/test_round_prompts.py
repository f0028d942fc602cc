"""The prompts of each round."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prefopt.data.round_prompts import RoundPromptsRecipe, round_prompts, run
from prefopt.errors import UserError
from prefopt.store.tables import read_table, write_table

RECIPE = {"prompts": 3, "validation_prompts": 2, "round": 1, "seed": 0}


def table() -> pd.DataFrame:
    splits = ["train"] * 10 + ["validation"] * 4
    return pd.DataFrame(
        {"prompt_id": f"p{i}", "prompt": "a", "reference": "", "split": split, "facts": "", "prompt_ids": [i]}
        for i, split in enumerate(splits)
    )


def names(**values: Any) -> list[str]:
    found: list[str] = round_prompts(table(), RoundPromptsRecipe(**{**RECIPE, **values}))["prompt_id"].tolist()
    return found


def test_rounds_are_disjoint_while_prompts_last_and_then_begin_anew() -> None:
    rounds = [names(round=number)[:3] for number in range(1, 7)]
    # Ten prompts are enough for three rounds of three; one is left over.
    assert len({name for one in rounds[:3] for name in one}) == 9
    assert len({name for one in rounds[3:] for name in one}) == 9
    assert rounds[:3] != rounds[3:] and all(len(set(one)) == 3 for one in rounds)


def test_a_round_depends_on_its_number_and_seed_alone() -> None:
    assert names(round=2) == names(round=2) != names(round=2, seed=1)
    assert {names(round=number)[3:] == ["p10", "p11"] for number in range(1, 9)} == {True}


def test_all_prompts_may_be_a_round() -> None:
    assert sorted(names(prompts=10, validation_prompts=0)) == sorted(f"p{i}" for i in range(10))
    assert names(prompts=10, round=2) != names(prompts=10)


def test_a_split_with_too_few_prompts_is_named() -> None:
    with pytest.raises(UserError, match=r"^prompts is 11, but a round has 10 of them to draw from: ask for fewer\.$"):
        names(prompts=11)
    with pytest.raises(UserError, match=r"^validation_prompts is 5, but a round has 4 "):
        names(validation_prompts=5)


def test_the_table_is_one_of_prompts_with_the_same_tokenizer(tmp_path: Path) -> None:
    made = write_table(tmp_path / "all.parquet", "prompts", table(), tokenizer_hash="t", style="chat")
    out = tmp_path / "own.parquet"
    run(argparse.Namespace(prompts=tmp_path / "all.parquet", recipe=json.dumps(RECIPE), out=out))
    found = read_table(out, "prompts", tokenizer_hash="t", style="chat", prompts=made["content_hash"], recipe=RECIPE)
    assert found["prompt_id"].tolist() == names()
    # A table that does not say how its prompts are put has plain ones.
    write_table(tmp_path / "plain.parquet", "prompts", table(), tokenizer_hash="t")
    run(argparse.Namespace(prompts=tmp_path / "plain.parquet", recipe=json.dumps(RECIPE), out=out))
    assert read_table(out, "prompts", style="plain")["prompt_id"].tolist() == names()
