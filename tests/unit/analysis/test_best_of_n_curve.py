from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prefopt.analysis import best_of_n_curve
from prefopt.analysis.best_of_n_curve import (
    CurveRecipe,
    best_of_n_flops,
    best_of_n_weights,
    curve_table,
    distinct_texts,
    subset_weights,
)
from prefopt.analysis.statistics import score_interval
from prefopt.errors import UserError
from prefopt.generation.subsets import SubsetsRecipe, chosen_candidates
from prefopt.lm.flops import Shape
from prefopt.store.tables import read_table, write_table

RECIPE = CurveRecipe(task="tldr", n=(1, 2, 3), subsets=None, confidence=0.95, seed=0)
POLICY, REWARD_MODEL = Shape(10, 2, 4, 6), Shape(10, 2, 4, 1)


@pytest.mark.parametrize("rewards", [[0.3, -1.0, 2.0, 0.5, 0.4], [1.0, 1.0, 0.0, 2.0, 2.0], [1.0] * 4])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_weights_are_the_shares_of_all_subsets(rewards: list[float], n: int) -> None:
    expected = np.zeros(len(rewards))
    subsets = list(itertools.combinations(range(len(rewards)), n))
    for subset in subsets:
        best = max(rewards[i] for i in subset)
        winners = [i for i in subset if rewards[i] == best]
        for i in winners:
            expected[i] += 1 / len(winners) / len(subsets)
    assert best_of_n_weights(rewards, n) == pytest.approx(expected, abs=1e-12)


def test_weights_by_hand() -> None:
    # Of the three pairs from three candidates, the best is in two and the second best is the best of one.
    assert best_of_n_weights([5.0, 7.0, 6.0], 2).tolist() == pytest.approx([0, 2 / 3, 1 / 3])


def tables(outcomes: dict[str, str], rewards: dict[str, list[float]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Candidates and verdicts of prompts; an outcome is a letter a candidate: w, l, t or i."""
    names = {"w": "win", "l": "loss", "t": "tie", "i": "invalid"}
    keys = [(prompt, 1.0, i) for prompt, letters in outcomes.items() for i in range(len(letters))]
    frame = pd.DataFrame(keys, columns=["prompt_id", "temperature", "sample_index"])
    candidates = frame.assign(
        split="test", tokens=4, reward=[reward for prompt in outcomes for reward in rewards[prompt]]
    )
    verdicts = frame.assign(
        outcome=[names[letter] for letters in outcomes.values() for letter in letters], judge="oracle", split="test"
    )
    return candidates, verdicts


def test_the_curve_by_hand() -> None:
    candidates, verdicts = tables({"a": "wlt", "b": "llw"}, {"a": [3.0, 2.0, 1.0], "b": [3.0, 2.0, 1.0]})
    table = curve_table(candidates, verdicts, {"a": 5, "b": 5}, POLICY, REWARD_MODEL, (1, 2, 3), RECIPE)
    # Prompt a: mean of 1, 0, 1/2; then 2/3 of the first and 1/3 of the second; then the first. b: 1/3, 0, 0.
    assert table["win_rate"].tolist() == pytest.approx([(1 / 2 + 1 / 3) / 2, (2 / 3 + 0) / 2, 1 / 2])
    assert table["reward"].tolist() == pytest.approx([2, 8 / 3, 3])
    assert table["generated_tokens"].tolist() == [4, 8, 12]
    assert table["n"].tolist() == [1, 2, 3]
    assert set(table["confidence"]) == {0.95} and set(table["prompts"]) == {2}
    assert (table["ci_low"] < table["win_rate"]).all() and (table["win_rate"] < table["ci_high"]).all()


def test_different_texts_are_counted_by_temperature() -> None:
    rows = [(1.0, "a", "x"), (1.0, "a", "y"), (1.0, "b", "x"), (1.0, "b", "x"), (0.5, "a", "x"), (0.5, "a", "x")]
    samples = pd.DataFrame(rows, columns=["temperature", "prompt_id", "text"]).assign(split="test")
    other = samples.assign(split="validation", text=[str(i) for i in range(6)])
    assert distinct_texts(pd.concat([samples, other])).to_dict() == {0.5: 1.0, 1.0: 1.5}


def test_an_invalid_verdict_is_left_out_of_the_win_rate() -> None:
    candidates, verdicts = tables({"a": "wil"}, {"a": [1.0, 2.0, 3.0]})
    table = curve_table(candidates, verdicts, {"a": 5}, POLICY, REWARD_MODEL, (1, 2), RECIPE)
    # Two: of the pairs the last is the best twice, the invalid one once, the first never.
    assert table["win_rate"].tolist() == pytest.approx([1 / 2, 0])


@pytest.mark.filterwarnings("error")
def test_a_prompt_whose_best_has_an_invalid_verdict_is_left_out() -> None:
    candidates, verdicts = tables({"a": "wli", "b": "lwt"}, {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]})
    table = curve_table(candidates, verdicts, {"a": 5, "b": 5}, POLICY, REWARD_MODEL, (3,), RECIPE)
    assert table["win_rate"].tolist() == [0.5] and table["prompts"].tolist() == [2]


def test_too_few_candidates_are_named() -> None:
    candidates, verdicts = tables({"a": "wl"}, {"a": [1.0, 2.0]})
    with pytest.raises(UserError, match="prompt 'a' has 2 candidates, the best of 3 needs 3"):
        curve_table(candidates, verdicts, {"a": 5}, POLICY, REWARD_MODEL, (3,), RECIPE)


def test_flops_by_hand() -> None:
    # The prompt: 2 tokens, 3 pairs. A completion of 2 tokens: the policy reads 1 token (3 pairs), the scorer 2 (7).
    prompt = 2 * 10 * 2 + 4 * 2 * 4 * 3
    sampling = 2 * 10 * 1 + 4 * 2 * 4 * 3 + 2 * 6
    scoring = 2 * 10 * 2 + 4 * 2 * 4 * 7 + 2 * 1
    assert best_of_n_flops(2, [2, 2, 2], 1, POLICY, REWARD_MODEL) == prompt + 2 * 6 + sampling
    assert best_of_n_flops(2, [2, 2, 2], 2, POLICY, REWARD_MODEL) == 2 * prompt + 2 * 6 + 2 * (sampling + scoring)


def test_seeded_subsets_tend_to_all_subsets_and_judge_few() -> None:
    rewards = {"a": [3.0, 2.0, 1.0, 5.0, 4.0, 0.0], "b": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    candidates, verdicts = tables({"a": "wlwlwl", "b": "llwlww"}, rewards)
    arguments = ({"a": 5, "b": 5}, POLICY, REWARD_MODEL, (1, 3))
    exact = curve_table(candidates, verdicts, *arguments, RECIPE)
    many = dataclasses.replace(RECIPE, subsets=4000)
    close = curve_table(candidates, verdicts, *arguments, many)
    assert close["win_rate"].tolist() == pytest.approx(exact["win_rate"].tolist(), abs=0.03)
    assert close["reward"].tolist() == pytest.approx(exact["reward"].tolist(), abs=0.08)
    # One subset of each size: at most two candidates a prompt need a verdict, and these are enough.
    recipe = SubsetsRecipe(n=(1, 3), subsets=1, seed=RECIPE.seed)
    chosen = chosen_candidates(candidates, recipe)
    assert len(chosen) <= 4
    few = verdicts.merge(chosen[["prompt_id", "temperature", "sample_index"]])
    one = dataclasses.replace(RECIPE, subsets=1)
    assert (
        curve_table(candidates, few, *arguments, one)["win_rate"].tolist()
        == curve_table(candidates, verdicts, *arguments, one)["win_rate"].tolist()
    )
    with pytest.raises(UserError, match="has no verdict"):
        curve_table(candidates, few.iloc[:1], *arguments, one)


def test_a_subsets_weights_are_shares_of_draws() -> None:
    weights = subset_weights([1.0, 3.0, 2.0], 3, 5, 0, ("p", 1.0))
    assert weights.tolist() == pytest.approx([0, 1, 0])
    assert subset_weights([1.0, 3.0, 2.0], 1, 9, 0, ("p", 1.0)).sum() == pytest.approx(1)
    with pytest.raises(UserError, match="needs 4"):
        subset_weights([1.0, 3.0, 2.0], 4, 1, 0, ("p", 1.0))


def best_of_all(rewards: list[float], values: list[float], n: int) -> float:
    """Mean value of the best of every subset of size n; no two rewards are equal."""
    subsets = list(itertools.combinations(range(len(rewards)), n))
    return sum(values[max(subset, key=lambda i: rewards[i])] for subset in subsets) / len(subsets)


def test_lengths_costs_and_intervals_of_a_row_by_enumeration() -> None:
    outcomes = {"a": "wlwt", "b": "llww", "c": "tlwl"}
    rewards = {"a": [0.4, 0.1, 0.3, 0.2], "b": [0.1, 0.2, 0.3, 0.4], "c": [0.9, 0.8, 0.7, 0.6]}
    candidates, verdicts = tables(outcomes, rewards)
    lengths = {"a": [3, 4, 5, 6], "b": [9, 2, 7, 4], "c": [5, 5, 8, 1]}
    candidates["tokens"] = [length for name in outcomes for length in lengths[name]]
    # Rows in any order, and prompts of another split, change nothing.
    others = candidates.assign(split="validation", prompt_id="v" + candidates["prompt_id"], reward=99.0)
    mixed = pd.concat([others, candidates.sample(frac=1, random_state=0)])
    prompts = {"a": 5, "b": 7, "c": 2}
    recipe = dataclasses.replace(RECIPE, confidence=0.8, seed=17)
    table = curve_table(mixed, verdicts, prompts, POLICY, REWARD_MODEL, (1, 3), recipe)
    score = {"w": 1.0, "t": 0.5, "l": 0.0}
    for row, n in zip(table.to_dict("records"), (1, 3), strict=True):
        of_prompts = {
            name: {
                "score": best_of_all(rewards[name], [score[letter] for letter in outcomes[name]], n),
                "reward": best_of_all(rewards[name], rewards[name], n),
                "tokens": best_of_all(rewards[name], [float(length) for length in lengths[name]], n),
                "flops": best_of_n_flops(prompts[name], lengths[name], n, POLICY, REWARD_MODEL),
            }
            for name in outcomes
        }
        means = pd.DataFrame(of_prompts).mean(axis=1)
        interval = score_interval([found["score"] for found in of_prompts.values()], confidence=0.8)
        assert row == pytest.approx(
            {
                **{"task": "tldr", "n": n, "temperature": 1.0, "prompts": 3, "win_rate": means["score"]},
                **{"ci_low": interval.low, "ci_high": interval.high, "reward": means["reward"]},
                **{"mean_tokens": means["tokens"], "flops": means["flops"], "judge": "oracle", "seed": 17},
                **{"generated_tokens": n * (4.5 + 5.5 + 4.75) / 3, "confidence": 0.8},
            }
        )


def test_the_cost_of_unequal_candidates_is_that_of_their_mean_in_every_subset() -> None:
    """Against each pair of three candidates, written out token by token."""

    def forward(shape: Shape, first: int, stop: int, logits: int) -> int:
        """Reading the tokens first .. stop - 1 of a sequence, each of which sees those before it and itself."""
        pairs = sum(i + 1 for i in range(first, stop))
        return (
            2 * shape.linear * (stop - first)
            + 4 * shape.layers * shape.attention_width * pairs
            + 2 * shape.head * logits
        )

    lengths, prompt = [2, 5, 3], 4
    costs = []
    for pair in itertools.combinations(lengths, 2):
        cost = forward(POLICY, 0, prompt, 1) + forward(REWARD_MODEL, 0, prompt, 0)
        for k in pair:
            cost += forward(POLICY, prompt, prompt + k - 1, k - 1) + forward(REWARD_MODEL, prompt, prompt + k, 1)
        costs.append(cost)
    assert best_of_n_flops(prompt, lengths, 2, POLICY, REWARD_MODEL) == pytest.approx(sum(costs) / 3)
    one = [forward(POLICY, 0, prompt, 1) + forward(POLICY, prompt, prompt + k - 1, k - 1) for k in lengths]
    assert best_of_n_flops(prompt, lengths, 1, POLICY, REWARD_MODEL) == pytest.approx(sum(one) / 3)


def write_stage(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Two prompts with three candidates at each of two temperatures, one policy's single samples, and what judges said."""
    names = ("prompts", "candidates", "scores", "verdicts", "one-sample", "one-sample-verdicts", "out")
    paths = {name: folder / f"{name}.parquet" for name in names}
    common = {"facts": "", "prompt": "x", "reference": "r"}
    prompts = [
        {"prompt_id": name, "split": split, "prompt_ids": [2] * length, **common}
        for name, split, length in (("a", "test", 5), ("b", "test", 3), ("v", "validation", 4))
    ]
    made = write_table(paths["prompts"], "prompts", prompts)
    letters = {"w": "win", "l": "loss"}

    def rows(method: str, outcomes: dict[tuple[str, float], str]) -> tuple[pd.DataFrame, pd.DataFrame]:
        keys = [
            {
                "prompt_id": p,
                "run": method,
                "temperature": t,
                "sample_index": i,
                "split": "validation" if p == "v" else "test",
            }
            for (p, t), outcome in outcomes.items()
            for i in range(len(outcome))
        ]
        outcome = [letters[letter] for given in outcomes.values() for letter in given]
        text = {"tokens": 4, "token_ids": [[3, 1]] * len(keys), "finish_reason": "eos", "logp": -1.0}
        frame = pd.DataFrame(keys)
        samples = frame.assign(**text, reference_logp=-2.0, text=[f"{i % 3}" for i in range(len(keys))])
        said = {"order": "policy_first", "winner": "first", "reply": "", "judge": "oracle:x", "cost_usd": 0.0}
        verdicts = frame.assign(outcome=outcome, **said, tokens=4, reference_tokens=4, well_formed=True)
        return samples, verdicts

    samples, verdicts = rows("sft", {(p, t): "wll" if t == 0.5 else "llw" for p in "abv" for t in (0.5, 1.0)})
    facts = {"prompts": made["content_hash"], "shape": dataclasses.asdict(POLICY)}
    written = write_table(paths["candidates"], "samples", samples, **facts)
    scores = samples[["prompt_id", "temperature", "sample_index"]].assign(reward=[3.0, 2.0, 1.0] * 6)
    of_scores = {"samples": written["content_hash"], "shape": dataclasses.asdict(REWARD_MODEL)}
    write_table(paths["scores"], "scores", scores, **of_scores)
    write_table(paths["verdicts"], "verdicts", verdicts, inputs={"samples": written["content_hash"]})
    # On the validation prompt the lower temperature wins, so that its row stands beside the curve.
    samples, verdicts = rows(
        "dpo", {(p, t): "w" if p != "v" or t == 0.25 else "l" for p in "abv" for t in (0.25, 0.75)}
    )
    shape = dataclasses.asdict(dataclasses.replace(POLICY, linear=1000))
    written = write_table(paths["one-sample"], "samples", samples, **{**facts, "shape": shape})
    write_table(paths["one-sample-verdicts"], "verdicts", verdicts, inputs={"samples": written["content_hash"]})
    recipe = {"task": "tldr", "n": [1, 2], "subsets": None, "confidence": 0.9, "seed": 4}
    return paths, [
        *(part for name in names for part in (f"--{name}", str(paths[name]))),
        "--recipe",
        json.dumps(recipe),
    ]


def run_stage(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    best_of_n_curve.add_arguments(parser)
    best_of_n_curve.run(parser.parse_args(arguments))


def test_the_stage_writes_the_curve_and_the_other_policys_one_sample(tmp_path: Path) -> None:
    paths, arguments = write_stage(tmp_path)
    run_stage(arguments)
    table = pd.read_csv(paths["out"])
    assert list(table.columns[:4]) == ["task", "run", "n", "temperature"]
    assert table[["run", "temperature", "n"]].to_numpy().tolist() == [
        *(["sft", 0.5, 1], ["sft", 0.5, 2], ["sft", 1.0, 1], ["sft", 1.0, 2]),
        ["dpo", 0.25, 1],
    ]
    # Of three candidates the first has the highest reward: it wins at 0.5 and loses at 1.
    assert table["win_rate"].tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 3, 0.0, 1.0], abs=1e-5)
    assert table["reward"].tolist()[:4] == pytest.approx([2, 8 / 3, 2, 8 / 3], abs=1e-5) and math.isnan(
        table["reward"].iloc[4]
    )
    assert table["distinct_texts"].tolist()[:4] == [3.0] * 4 and math.isnan(table["distinct_texts"].iloc[4])
    assert (table["prompts"] == 2).all() and (table["confidence"] == 0.9).all() and (table["seed"] == 4).all()
    costs = [np.mean([best_of_n_flops(p, [4] * 3, n, POLICY, REWARD_MODEL) for p in (5, 3)]) for n in (1, 2)]
    other = dataclasses.replace(POLICY, linear=1000)
    costs += [*costs, np.mean([best_of_n_flops(p, [4], 1, other, REWARD_MODEL) for p in (5, 3)])]
    assert table["flops"].tolist() == pytest.approx(costs)
    # Without another policy the curve stands alone.
    cut = arguments.index("--one-sample")
    run_stage([*arguments[:cut], *arguments[cut + 4 :]])
    assert pd.read_csv(paths["out"])["run"].tolist() == ["sft"] * 4


def test_the_stage_refuses_tables_of_other_samples_and_takes_the_judged_ones(tmp_path: Path) -> None:
    paths, arguments = write_stage(tmp_path)
    candidates = read_table(paths["candidates"], "samples")
    of_candidates = candidates.attrs["manifest"]["content_hash"]
    judged = tmp_path / "judged.parquet"
    # Only the first candidate of each is judged: with subsets of all three it is the best.
    first = candidates["sample_index"] == 0
    written = write_table(judged, "samples", candidates[first], candidates=of_candidates)
    verdicts = read_table(paths["verdicts"], "verdicts")
    few = verdicts[verdicts["sample_index"] == 0]
    recipe = {"task": "tldr", "n": [3], "subsets": 2, "confidence": 0.9, "seed": 4}
    more = [*arguments[:-1], json.dumps(recipe), "--judged", str(judged)]
    with pytest.raises(UserError, match=r"verdicts.parquet was made from other samples than .*judged.parquet"):
        run_stage(more)
    write_table(paths["verdicts"], "verdicts", few, inputs={"samples": written["content_hash"]})
    run_stage(more)
    assert pd.read_csv(paths["out"])["win_rate"].tolist() == pytest.approx([1.0, 0.0, 1.0])
    with pytest.raises(UserError, match=r"verdicts.parquet was made from other samples than .*candidates.parquet"):
        run_stage(arguments)
    write_table(judged, "samples", candidates[first], candidates="0" * 64)
    with pytest.raises(UserError, match=r"judged.parquet was made with candidates = "):
        run_stage(more)
    write_table(paths["verdicts"], "verdicts", verdicts, inputs={"samples": of_candidates})
    scores = read_table(paths["scores"], "scores")
    write_table(paths["scores"], "scores", scores, samples="0" * 64, shape=dataclasses.asdict(REWARD_MODEL))
    with pytest.raises(UserError, match=r"scores.parquet was made with samples = "):
        run_stage(arguments)
