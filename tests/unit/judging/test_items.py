"""A judge's verdicts on the pairs that people compare."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import pandas as pd
import pytest

from longer import RECIPE as ANY_ORDER
from longer import LongerWins
from prefopt.judging import items
from prefopt.judging.judge import Comparison, order_of
from prefopt.judging.judges import JudgeRecipe
from prefopt.store.tables import read_manifest, read_table, write_table

RECIPE = {**ANY_ORDER, "order": "both"}


def study_items(count: int) -> pd.DataFrame:
    """Items of one matchup; the first text is the longer one of even items alone."""
    rows = [
        {
            **{"item_id": f"i{k}", "matchup": "a-b", "prompt_id": f"p{k}", "prompt": f"post {k}", "facts": f"f{k}"},
            **{"first": "two words" if k % 2 == 0 else "one", "second": "a word", "raters": 1},
        }
        for k in range(count)
    ]
    return pd.DataFrame(rows)


def test_an_item_is_judged_with_its_first_text_in_the_place_of_the_policys() -> None:
    judge = LongerWins()
    verdicts = items.judge_items(judge, study_items(2), "both", 0)
    assert verdicts[["item_id", "matchup", "prompt_id", "judge", "reply"]].to_numpy().tolist() == [
        [f"i{k}", "a-b", f"p{k}", "longer:1", "by length"] for k in (0, 0, 1, 1)
    ]
    assert verdicts["order"].tolist() == ["policy_first", "reference_first"] * 2
    assert verdicts["winner"].tolist() == ["first", "second", "second", "first"]
    assert verdicts["outcome"].tolist() == ["win", "win", "loss", "loss"]
    assert judge.shown[:2] == [
        Comparison("p0", "post 0", "f0", "two words", "a word"),
        Comparison("p0", "post 0", "f0", "a word", "two words"),
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_is_drawn_from_seed_prompt_and_matchup(seed: int) -> None:
    orders = items.judge_items(LongerWins(), study_items(40), "random", seed)["order"].tolist()
    assert orders == [order_of(seed, f"p{k}", "a-b", 0.0, 0) for k in range(40)]
    assert len(set(orders)) == 2


def test_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prompts = pd.DataFrame(
        {
            **{"prompt_id": ["p0"], "prompt": ["post 0"], "reference": [""], "split": ["test"], "facts": ["f0"]},
            "prompt_ids": [[1, 2]],
        }
    )
    write_table(tmp_path / "prompts.parquet", "prompts", prompts, tokenizer_hash="t")
    write_table(tmp_path / "items.parquet", "study_items", study_items(3), study="the-study")
    args = argparse.Namespace(
        **{"items": tmp_path / "items.parquet", "prompts": tmp_path / "prompts.parquet"},
        **{"recipe": json.dumps(RECIPE), "out": tmp_path / "verdicts.parquet"},
    )

    def build_judge(given: argparse.Namespace, recipe: JudgeRecipe, table: pd.DataFrame) -> LongerWins:
        assert given is args and recipe == JudgeRecipe(**RECIPE) and table["prompt_id"].tolist() == ["p0"]
        return LongerWins()

    monkeypatch.setattr(items, "build_judge", build_judge)
    with caplog.at_level(logging.INFO):
        items.run(args)
    assert caplog.messages == ["longer:1 judged 3 items: {'loss': 2, 'win': 4}"]
    verdicts = read_table(args.out, "item_verdicts", study="the-study")
    assert verdicts["outcome"].tolist() == ["win", "win", "loss", "loss", "win", "win"]
    told = read_manifest(args.out)
    assert (told["recipe"], told["judge_accuracy"]) == (RECIPE, 0.6)
