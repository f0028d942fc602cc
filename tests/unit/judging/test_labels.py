"""Labels of a policy's own completions by a judge: the share of their comparisons that they win."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from longer import RECIPE, LongerWins
from prefopt.data import sampled_pairs
from prefopt.judging import labels
from prefopt.store.gather import gather
from prefopt.store.tables import read_manifest, read_table, write_table


def prompts(count: int = 2) -> pd.DataFrame:
    rows = [
        {
            **{"prompt_id": f"p{i}", "prompt": f"post {i}", "reference": "", "split": "train", "facts": f"f{i}"},
            **{"prompt_ids": [1, 2]},
        }
        for i in range(count)
    ]
    return pd.DataFrame(rows)


def samples(*texts: Sequence[str]) -> pd.DataFrame:
    """Completions of p0, p1, ..."""
    rows = [
        {
            **{"prompt_id": f"p{i}", "sample_index": k, "run": "mine", "temperature": 1.0, "split": "train"},
            **{"text": text, "tokens": 3, "token_ids": [*text.encode()], "finish_reason": "eos"},
            **{"logp": -1.0, "reference_logp": -1.0},
        }
        for i, each in enumerate(texts)
        for k, text in enumerate(each)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("rule", "shown"), [("random", 2), ("both", 4)])
def test_equal_texts_count_as_much_as_a_pair_that_is_shown(rule: Any, shown: int) -> None:
    """By hand: each short one has a tie and a loss, whether a pair is shown once or twice."""
    judge = LongerWins()
    shares, _ = labels.shares_won(judge, samples(["a", "a", "bbb"]), prompts(), rule, 0)
    assert shares == [0.25, 0.25, 1.0] and len(judge.shown) == shown


def test_a_pairs_order_is_drawn_by_the_places_of_both_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[tuple[str, str, float, int]] = []
    monkeypatch.setattr(labels, "judge_pairs", lambda judge, pairs, rule, seed: keys.extend(p.key for p in pairs) or [])
    labels.shares_won(LongerWins(), samples(["a", "bb", "ccc"]), prompts(), "random", 0)
    assert keys == [("p0", "mine", 1.0, number) for number in (0 * 3 + 1, 0 * 3 + 2, 1 * 3 + 2)]


@pytest.mark.parametrize("rule", ["random", "both"])
def test_every_two_completions_of_a_prompt_are_compared(rule: Any) -> None:
    """By hand: of p0 the longest beats both others, which are as long as each other; of p1 the texts are equal."""
    judge = LongerWins()
    shares, verdicts = labels.shares_won(judge, samples(["aa", "bbb", "cc"], ["x", "x"]), prompts(), rule, 0)
    assert shares == [0.25, 1.0, 0.25, 0.5, 0.5]
    assert len(judge.shown) == len(verdicts) == (6 if rule == "both" else 3), "equal texts are not shown"
    assert {(one.prompt_id, one.prompt, one.facts) for one in judge.shown} == {("p0", "post 0", "f0")}
    assert {frozenset((one.first, one.second)) for one in judge.shown} == {
        frozenset(pair) for pair in (("aa", "bbb"), ("aa", "cc"), ("bbb", "cc"))
    }


def test_the_order_is_drawn_for_each_pair() -> None:
    judge = LongerWins()
    labels.shares_won(judge, samples(*[["a", "bb", "ccc"]] * 40), prompts(40), "random", 0)
    shorter_first = [len(one.first) < len(one.second) for one in judge.shown]
    assert 40 < sum(shorter_first) < 80 and len(shorter_first) == 120
    first = [one.first for one in judge.shown[:12]]
    other = LongerWins()
    labels.shares_won(other, samples(*[["a", "bb", "ccc"]] * 40), prompts(40), "random", 1)
    assert [one.first for one in other.shown[:12]] != first


def test_a_reply_without_a_winner_counts_as_a_tie_and_a_completion_alone_as_half() -> None:
    shares, verdicts = labels.shares_won(LongerWins(), samples(["", "a"], ["alone"]), prompts(), "random", 0)
    assert shares == [0.5, 0.5, 0.5] and [one["outcome"] for one in verdicts] == ["invalid"]


def test_the_stage_and_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(labels, "build_judge", lambda *values: LongerWins())
    written = prompts(40)
    write_table(tmp_path / "prompts.parquet", "prompts", written, tokenizer_hash="t")
    hashed = read_manifest(tmp_path / "prompts.parquet")["content_hash"]
    rows = samples(*[["", "a", "bb"]] * 40)
    write_table(tmp_path / "samples.parquet", "samples", rows, prompts=hashed)
    given = {"samples": tmp_path / "samples.parquet", "prompts": tmp_path / "prompts.parquet"}

    def scores(name: str, shard: str | None) -> Path:
        out = tmp_path / name
        labels.run(argparse.Namespace(**given, recipe=json.dumps(RECIPE), shard=shard, out=out))
        return out

    with caplog.at_level(logging.INFO):
        whole = scores("whole.parquet", None)
    assert "longer:1 compared 120 pairs of completions: {'invalid': 80, 'loss'" in caplog.text
    assert "80 replies name no winner; their pairs count as ties." in caplog.text
    table = read_table(whole, "scores", samples=read_manifest(given["samples"])["content_hash"])
    assert table["reward"].tolist() == [0.5, 0.25, 0.75] * 40
    told = read_manifest(whole)
    assert (told["judge"], told["judge_accuracy"], told["recipe"]) == ("longer:1", 0.6, RECIPE)
    parts = [scores(f"{number}.parquet", f"{number}-of-3") for number in (1, 2, 3)]
    name, together, _ = gather(parts)
    assert name == "scores" and together.to_pandas()["reward"].tolist() == table["reward"].tolist()
    # The best is chosen against the worst: 0.75 against 0.25.
    read = [read_table(path, name) for name, path in reversed(given.items())]
    recipe = sampled_pairs.SampledPairsRecipe(
        pairs="best_vs_worst", length_penalty=0.0, missing_eos_reward=None, seed=0
    )
    pairs, _, gaps = sampled_pairs.preference_pairs(*read, table, recipe)
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {("bb", "a")} and set(gaps) == {0.5}
