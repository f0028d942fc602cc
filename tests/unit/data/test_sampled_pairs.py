"""Preference pairs among a policy's own completions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prefopt.data import sampled_pairs
from prefopt.data.sampled_pairs import SampledPairsRecipe
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_dict
from prefopt.store.tables import read_table, write_table


def frames(rewards: list[float], ids: list[list[int]]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    prompts = [{"prompt_id": "p", "prompt": "the", "reference": "", "split": "train", "facts": "", "prompt_ids": [7]}]
    key = [{"prompt_id": "p", "temperature": 1.0, "sample_index": i} for i in range(len(rewards))]
    rest: dict[str, Any] = {"run": "sft", "split": "train", "tokens": 1, "finish_reason": "eos"}
    logps = {"logp": 0.0, "reference_logp": 0.0}
    samples = [{**k, **rest, **logps, "text": f"t{i}", "token_ids": ids[i]} for i, k in enumerate(key)]
    scores = [{**k, "reward": reward} for k, reward in zip(key, rewards, strict=True)]
    return tuple(map(pd.DataFrame, (prompts, samples, scores)))  # type: ignore[return-value]


EVERY_TWO = {"pairs": "all", "length_penalty": 0.0, "missing_eos_reward": None, "seed": 0}


def write(folder: Path, tables: tuple[pd.DataFrame, ...], recipe: dict[str, Any] = EVERY_TWO) -> argparse.Namespace:
    prompts, samples, scores = (folder / f"{name}.parquet" for name in ("prompts", "samples", "scores"))
    first = write_table(prompts, "prompts", tables[0], tokenizer_hash="t")
    second = write_table(samples, "samples", tables[1], prompts=first["content_hash"])
    write_table(scores, "scores", tables[2], samples=second["content_hash"])
    return argparse.Namespace(
        prompts=prompts,
        samples=samples,
        scores=scores,
        recipe=json.dumps(recipe),
        out=folder / "pairs.parquet",
        summary=folder / "summary.json",
    )


def test_four_completions_make_six_pairs_of_their_own_tokens(tmp_path: Path) -> None:
    args = write(tmp_path, frames([0.1, 0.4, 0.2, 0.3], [[1], [2, 2], [3], [4]]))
    sampled_pairs.run(args)
    pairs = read_table(args.out, "preferences", tokenizer_hash="t")
    assert pairs["pair_id"].tolist() == ["p-1-0", "p-2-0", "p-3-0", "p-1-2", "p-1-3", "p-3-2"]
    first = pairs.iloc[0]
    assert (first["chosen"], first["chosen_ids"].tolist(), first["rejected_ids"].tolist()) == ("t1", [2, 2], [1])
    summary = json.loads(args.summary.read_text())
    assert summary["splits"] == {"train": 6} and summary["dropped"] == {}
    assert pairs.attrs["manifest"]["summary"] == summary and (summary["read"], summary["kept"]) == (6, 6)
    assert summary["mean_difference_of_rewards"] == pytest.approx((0.3 + 0.1 + 0.2 + 0.2 + 0.1 + 0.1) / 6, abs=1e-6)


def test_ties_and_equal_completions_are_dropped_and_counted(tmp_path: Path) -> None:
    args = write(tmp_path, frames([0.1, 0.1, 0.2, 0.2], [[1], [2], [3], [3]]))
    sampled_pairs.run(args)
    summary = json.loads(args.summary.read_text())
    assert summary["dropped"] == {"equal_rewards": 1, "equal_tokens": 1}
    assert summary["read"] == 6 == summary["kept"] + 2


def test_no_pair_and_a_missing_reward_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"samples\.parquet gives no pair of unequal rewards"):
        sampled_pairs.run(write(tmp_path, frames([0.1, 0.1], [[1], [2]])))
    prompts, samples, scores = frames([0.1, 0.2], [[1], [2]])
    with pytest.raises(UserError, match="1 samples have no reward"):
        sampled_pairs.preference_pairs(prompts, samples, scores.head(1), from_dict(SampledPairsRecipe, EVERY_TWO))


def test_each_prompt_has_pairs_of_its_own_completions_in_its_own_split(tmp_path: Path) -> None:
    prompts, samples, scores = frames([0.2, 0.1, 0.3], [[1], [2], [3]])
    other = {"prompt_id": "a", "prompt": "an", "split": "validation", "prompt_ids": [8, 9]}
    prompts = pd.concat([prompts, prompts.assign(**{k: v for k, v in other.items() if k != "prompt_ids"})])
    prompts["prompt_ids"] = [[7], other["prompt_ids"]]
    # The second prompt's completions, written last to first, with the rewards the other way round.
    samples = pd.concat([samples, samples.iloc[::-1].assign(prompt_id="a", split="validation")])
    scores = pd.concat([scores, scores.assign(prompt_id="a", reward=[0.3, 0.4, 0.1])])
    args = write(tmp_path, (prompts, samples, scores))
    sampled_pairs.run(args)
    pairs = read_table(args.out, "preferences")
    assert pairs["pair_id"].tolist() == ["p-0-1", "p-2-0", "p-2-1", "a-1-0", "a-0-2", "a-1-2"]
    assert pairs["split"].tolist() == ["train"] * 3 + ["validation"] * 3
    assert [ids.tolist() for ids in pairs["prompt_ids"]] == [[7]] * 3 + [[8, 9]] * 3
    assert pairs["prompt"].tolist() == ["the"] * 3 + ["an"] * 3
    row = pairs.iloc[4]
    assert (row["chosen"], row["rejected"], row["source"]) == ("t0", "t2", "sampled")
    assert (row["chosen_ids"].tolist(), row["rejected_ids"].tolist()) == ([1], [3])
    assert json.loads(args.summary.read_text())["splits"] == {"train": 3, "validation": 3}


def test_a_reward_belongs_to_a_temperature(tmp_path: Path) -> None:
    prompts, samples, scores = frames([0.1, 0.2], [[1], [2]])
    with pytest.raises(UserError, match="2 samples have no reward"):
        sampled_pairs.preference_pairs(
            prompts, samples, scores.assign(temperature=0.5), from_dict(SampledPairsRecipe, EVERY_TWO)
        )


@pytest.mark.parametrize("changed", ["prompts", "samples"])
def test_tables_of_other_inputs_are_refused(tmp_path: Path, changed: str) -> None:
    prompts, samples, scores = frames([0.1, 0.2], [[1], [2]])
    args = write(tmp_path, (prompts, samples, scores))
    if changed == "prompts":
        write_table(args.prompts, "prompts", prompts.assign(prompt="another"), tokenizer_hash="t")
    else:
        manifest = read_table(args.samples, "samples").attrs["manifest"]
        write_table(args.samples, "samples", samples.assign(text="x"), prompts=manifest["prompts"])
    with pytest.raises(UserError, match=rf"was made with {changed} = "):
        sampled_pairs.run(args)


def pairs_by(rule: str, folder: Path, rewards: list[float], **values: Any) -> list[str]:
    """Names of the pairs, chosen and then rejected, of completions of one to so many tokens."""
    tables = frames(rewards, [[i] * (i + 1) for i in range(len(rewards))])
    tables[1]["tokens"] = [i + 1 for i in range(len(rewards))]
    args = write(folder, tables, {**EVERY_TWO, "pairs": rule, **values})
    sampled_pairs.run(args)
    found: list[str] = read_table(args.out, "preferences")["pair_id"].tolist()
    return found


def test_the_best_against_the_worst_is_one_pair(tmp_path: Path) -> None:
    assert pairs_by("best_vs_worst", tmp_path, [0.1, 0.4, 0.4, 0.3, 0.1]) == ["p-1-4"], (
        "of equal rewards the first is best"
    )


def test_the_best_against_a_worse_one_is_drawn_by_the_seed(tmp_path: Path) -> None:
    drawn = [pairs_by("best_vs_random", tmp_path, [0.1, 0.4, 0.2, 0.3], seed=seed) for seed in range(40)]
    assert {pair for (pair,) in drawn} == {"p-1-0", "p-1-2", "p-1-3"}
    assert drawn[3] == pairs_by("best_vs_random", tmp_path, [0.1, 0.4, 0.2, 0.3], seed=3)
    # Nothing that is as good as the best is drawn.
    assert {pairs_by("best_vs_random", tmp_path, [0.4, 0.4, 0.2], seed=s)[0] for s in range(9)} == {"p-0-2"}


def test_each_token_takes_its_penalty_from_a_reward(tmp_path: Path) -> None:
    # 0.4 - 2 p, 0.5 - 4 p, 0.1 - p, 0.3 - 3 p for p = 0.1: 0.2, 0.1, 0.0 and 0.0 of completions of 2, 4, 1 and 3 tokens.
    rewards = [0.1, 0.4, 0.29, 0.5]
    assert pairs_by("best_vs_worst", tmp_path, rewards) == ["p-3-0"]
    assert pairs_by("best_vs_worst", tmp_path, rewards, length_penalty=0.1) == ["p-1-2"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["mean_difference_of_rewards"] == pytest.approx(0.2 - (0.29 - 0.3), abs=1e-6)


def test_a_completion_that_did_not_end_has_a_reward_of_its_own(tmp_path: Path) -> None:
    tables = frames([0.9, 0.2, 0.4], [[1], [2], [3]])
    tables[1]["finish_reason"] = ["length", "eos", "stop"]

    def pairs(missing: float | None) -> list[str]:
        recipe = {**EVERY_TWO, "pairs": "best_vs_worst", "missing_eos_reward": missing}
        args = write(tmp_path, tables, recipe)
        sampled_pairs.run(args)
        found: list[str] = read_table(args.out, "preferences")["pair_id"].tolist()
        return found

    assert pairs(None) == ["p-0-1"] and pairs(0.3) == ["p-2-1"] and pairs(-3.0) == ["p-2-0"]


@pytest.mark.parametrize("rule", ["best_vs_worst", "best_vs_random"])
def test_a_prompt_whose_completions_are_worth_the_same_has_no_pair(rule: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gives no pair of unequal rewards"):
        pairs_by(rule, tmp_path, [0.1, 0.1, 0.1])
