"""Best-of-N from a table of candidates."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from prefopt.analysis.best_of_n_curve import subset_weights
from prefopt.errors import UserError
from prefopt.generation import best_of_n as best
from prefopt.generation import subsets
from prefopt.generation.best_of_n import best_of_n
from prefopt.generation.sample import SampleRecipe, chosen_prompts, prompt_seed
from prefopt.generation.score import _pieces
from prefopt.lm.batching import Row
from prefopt.lm.logprobs import completion_logprobs
from prefopt.runtime.usage import default_device
from prefopt.store.files import stable_hash
from prefopt.store.tables import read_table, write_table
from tiny_models import make_model

KEY = ["prompt_id", "temperature", "sample_index"]


def candidate(prompt_id: str, temperature: float, index: int, **values: Any) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "temperature": temperature, "sample_index": index, "run": "sft", **values}


CANDIDATES = pd.DataFrame(
    [candidate(p, t, i, text=f"{p}{t}{i}") for p in "ab" for t in (0.0, 0.5, 1.0) for i in range(1 if t == 0 else 4)]
)
REWARDS = {("a", 0.5): [0, 3, 1, 9], ("a", 1.0): [5, 5, 5, 5], ("b", 0.5): [-3, -2, -1, 0], ("b", 1.0): [1, 2, 3, 0]}
SCORES = pd.DataFrame(
    [
        {"prompt_id": p, "temperature": t, "sample_index": i, "reward": float(r)}
        for (p, t), rewards in REWARDS.items()
        for i, r in enumerate(rewards)
    ]
)
GREEDY = CANDIDATES[CANDIDATES["temperature"] == 0].assign(text="greedy")


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, {"a0.50", "a1.00", "b0.50", "b1.00"}),
        (3, {"a0.51", "a1.00", "b0.52", "b1.02"}),
        (4, {"a0.53", "a1.00", "b0.53", "b1.02"}),
    ],
)
def test_the_highest_reward_of_the_first_n_wins_and_ties_go_to_the_earlier(n: int, expected: set[str]) -> None:
    rows = best_of_n(CANDIDATES, SCORES, GREEDY, n, "best")
    above = rows[rows["temperature"] > 0]
    assert set(above["text"]) == expected
    assert set(rows["sample_index"]) == {0}
    assert set(rows["run"]) == {"best"}


def test_temperature_zero_is_the_greedy_completion() -> None:
    rows = best_of_n(CANDIDATES, SCORES, GREEDY, 4, "best")
    assert rows[rows["temperature"] == 0]["text"].tolist() == ["greedy", "greedy"]


def test_too_few_candidates_are_refused() -> None:
    with pytest.raises(UserError, match="best-of-5 needs 5"):
        best_of_n(CANDIDATES, SCORES, GREEDY, 5, "best")


def test_a_candidate_without_a_score_is_refused() -> None:
    with pytest.raises(UserError, match="without a score"):
        best_of_n(CANDIDATES, SCORES.iloc[1:], GREEDY, 4, "best")


def test_a_prompts_seed_depends_on_itself_alone() -> None:
    seeds = {prompt_seed(s, p, t) for s in (0, 1) for p in "ab" for t in (0.5, 1.0)}
    assert len(seeds) == 8
    assert prompt_seed(0, "a", 0.5) == prompt_seed(0, "a", 0.5) < 2**56


def test_prompts_are_chosen_by_split_and_number() -> None:
    splits = ["test", "train", "validation", "test", "validation", "test"]
    prompts = pd.DataFrame({"prompt_id": list("abcdef"), "split": splits})
    common = {
        "temperatures": (0.0,),
        "stop": (),
        "n": 1,
        "max_new_tokens": 1,
        "token_budget": 1,
        "dtype": "float32",
        "seed": 0,
        "vllm": None,
    }
    recipe = SampleRecipe(**common, train_prompts=0, validation_prompts=1, test_prompts=2)
    assert chosen_prompts(prompts, recipe)["prompt_id"].to_dict() == {0: "c", 1: "a", 2: "d"}


def test_rows_are_cut_within_the_budget() -> None:
    assert _pieces(10, [5, 5, 5, 5], 21) == [(0, 2), (2, 4)]
    assert _pieces(10, [50, 5], 21) == [(0, 1), (1, 2)]
    assert _pieces(10, [5], 100) == [(0, 1)]


def rows_of(outcomes: dict[tuple[str, str, float], list[float]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Candidates and their scores, by prompt, split and temperature."""
    keys = [(key, i, reward) for key, rewards in outcomes.items() for i, reward in enumerate(rewards)]
    candidates = pd.DataFrame(
        {"prompt_id": prompt, "sample_index": i, "run": "sft", "temperature": temperature, "split": split}
        | {"text": f"{prompt}{temperature}{i}", "tokens": 2 + i, "token_ids": [3 + i, 1], "finish_reason": "eos"}
        | {"logp": -1.0, "reference_logp": None}
        for (prompt, split, temperature), i, _ in keys
    )
    return candidates, candidates[KEY].assign(reward=[reward for _, _, reward in keys])


def drawn_best(rewards: list[float], n: int, subsets: int, seed: int, name: list[Any]) -> list[int]:
    """Which candidate is the best of each drawn subset."""
    rng = np.random.default_rng(int(stable_hash([seed, n, *name]), 16) % 2**64)
    draws = [sorted(rng.choice(len(rewards), size=n, replace=False).tolist()) for _ in range(subsets)]
    return [max(draw, key=lambda i: (rewards[i], -i)) for draw in draws]


def test_the_weights_are_the_shares_of_the_draws_and_ties_go_to_the_earlier() -> None:
    rewards = [1.0, 2.0, 2.0, 0.5, 2.0]
    for n, draws, seed in ((1, 7, 0), (2, 8, 1), (3, 40, 2)):
        weights = subset_weights(rewards, n, draws, seed, ("p", 0.5))
        chosen = drawn_best(rewards, n, draws, seed, ["p", 0.5])
        assert weights.tolist() == pytest.approx([chosen.count(i) / draws for i in range(5)])
    assert subset_weights(rewards, 5, 3, 0, ("p", 0.5)).tolist() == pytest.approx([0, 1, 0, 0, 0])


def test_the_stage_keeps_what_some_subset_chooses_on_test_prompts(tmp_path: Path) -> None:
    rewards = {
        **{("b", "test", 0.5): [0.1, 0.4, 0.3, 0.2, 0.6, 0.5], ("b", "test", 1.0): [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]},
        **{("a", "test", 0.5): [0.2, 0.2, 0.2, 0.2, 0.2, 0.2], ("c", "validation", 0.5): [1.0] * 6},
    }
    candidates, scores = rows_of(rewards)
    written = write_table(tmp_path / "c.parquet", "samples", candidates, prompts="p" * 64)
    write_table(tmp_path / "s.parquet", "scores", scores, samples=written["content_hash"])
    values = {"n": [2, 4], "subsets": 3, "seed": 5}
    parser = argparse.ArgumentParser()
    subsets.add_arguments(parser)
    paths = [tmp_path / name for name in ("c.parquet", "s.parquet", "out.parquet")]
    arguments = ["--candidates", str(paths[0]), "--scores", str(paths[1]), "--out", str(paths[2])]
    subsets.run(parser.parse_args([*arguments, "--recipe", json.dumps(values)]))
    expected = {
        (prompt, temperature, i)
        for (prompt, split, temperature), of_prompt in rewards.items()
        if split == "test"
        for n in (2, 4)
        for i in drawn_best(of_prompt, n, 3, 5, [prompt, temperature])
    }
    table = read_table(paths[2], "samples", candidates=written["content_hash"], prompts="p" * 64, recipe=values)
    chosen = [(row.prompt_id, row.temperature, row.sample_index) for row in table.itertuples()]
    assert chosen == sorted(expected) and 6 <= len(chosen) < 18
    assert table["text"].tolist() == [f"{prompt}{temperature}{i}" for prompt, temperature, i in chosen]
    write_table(tmp_path / "s.parquet", "scores", scores, samples="0" * 64)
    with pytest.raises(UserError, match="was made with samples = "):
        subsets.run(parser.parse_args([*arguments, "--recipe", json.dumps(values)]))
    # A score is of one run's candidates.
    written = write_table(paths[0], "samples", pd.concat([candidates, candidates.assign(run="another")]), prompts="p")
    write_table(paths[1], "scores", scores, samples=written["content_hash"])
    with pytest.raises(pd.errors.MergeError, match="not unique in left dataset"):
        subsets.run(parser.parse_args([*arguments, "--recipe", json.dumps(values)]))


def test_the_stage_writes_the_best_with_their_reference_log_probability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = pd.DataFrame(
        {"prompt_id": name, "prompt": name, "reference": "r", "split": "test", "facts": "", "prompt_ids": ids}
        for name, ids in (("a", [2, 3, 4]), ("b", [5]))
    )
    candidates, scores = rows_of({("a", "test", 0.5): [0.0, 2.0, 9.0], ("b", "test", 0.5): [3.0, 1.0, 9.0]})
    greedy, _ = rows_of({("a", "test", 0.0): [0.0], ("b", "test", 0.0): [0.0], ("b", "test", 0.5): [0.0]})
    model = make_model("llama", engine=True)
    loaded: list[Any] = []

    def load(path: Path, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, None]:
        loaded.append((path.name, device, dtype))
        return model, None

    monkeypatch.setattr(best, "load_policy", load)
    monkeypatch.setattr(best, "tokenizer_hash", lambda path: f"tokenizer of {path.name}")
    monkeypatch.setattr(best, "weights_hash", lambda path: f"weights of {path.name}")
    paths = {name: tmp_path / f"{name}.parquet" for name in ("candidates", "scores", "greedy", "prompts", "out")}
    made = write_table(paths["prompts"], "prompts", prompts, tokenizer_hash="tokenizer of ref")
    facts = {"prompts": made["content_hash"], "model_weights": "w"}
    of_candidates = write_table(paths["candidates"], "samples", candidates, **facts)
    of_scores = {"samples": of_candidates["content_hash"], "reward_weights": "r"}
    written = write_table(paths["scores"], "scores", scores, **of_scores)
    write_table(paths["greedy"], "samples", greedy.assign(text="greedy", token_ids=[[9, 8, 1]] * 3), **facts)
    parser = argparse.ArgumentParser()
    best.add_arguments(parser)
    recipe = {"token_budget": 8, "dtype": "float32"}
    named = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    arguments = [
        *named,
        "--reference-model",
        str(tmp_path / "ref"),
        "--run",
        "mine",
        "--n",
        "2",
        "--recipe",
        json.dumps(recipe),
    ]
    best.run(parser.parse_args(arguments))
    provenance = {**facts, "candidates": of_candidates["content_hash"], "scores": written["content_hash"]}
    provenance |= {"reference_weights": "weights of ref", "reward_weights": "r", "best_of_n": 2, "recipe": recipe}
    table = read_table(paths["out"], "samples", **provenance)
    assert loaded == [("ref", default_device(), torch.float32)]
    # The second of prompt a and the first of b; the third has the highest reward and is none of the first two.
    assert table["text"].tolist() == ["greedy", "greedy", "a0.51", "b0.50"]
    assert table["run"].tolist() == ["mine"] * 4 and table["sample_index"].tolist() == [0] * 4
    with torch.no_grad():
        rows = [Row(p, (c,)) for p, c in (([2, 3, 4], [9, 8, 1]), ([5], [9, 8, 1]), ([2, 3, 4], [4, 1]), ([5], [3, 1]))]
        expected = [completion_logprobs(model, [row]).sums.item() for row in rows]
    assert table["reference_logp"].tolist() == pytest.approx(expected, abs=1e-4)
    for name, table_name, rows, wrong in (
        ("scores", "scores", scores, {**of_scores, "samples": "0" * 64}),
        ("greedy", "samples", greedy, {**facts, "prompts": "0" * 64}),
        ("prompts", "prompts", prompts, {"tokenizer_hash": "another"}),
    ):
        before = paths[name].read_bytes()
        write_table(paths[name], table_name, rows, **wrong)
        with pytest.raises(UserError, match="was made with"):
            best.run(parser.parse_args(arguments))
        paths[name].write_bytes(before)
