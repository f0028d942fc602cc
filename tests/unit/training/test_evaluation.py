"""The true reward and the exact KL of a policy's own samples."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest
import torch

from prefopt.lm.batching import Row
from prefopt.lm.kl import completion_kls
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import load_policy
from prefopt.lm.sampling import sample
from prefopt.store.tables import read_table
from prefopt.training.evaluation import EvaluationRecipe, completed_texts, evaluate_policy
from tiny_task import Task

RECIPE = EvaluationRecipe(prompts=4, samples_per_prompt=3, max_new_tokens=8, seed=0, token_budget=64, dtype="float32")


def reward_of_length(texts: list[str]) -> torch.Tensor:
    return torch.tensor([float(len(text)) for text in texts])


def test_a_policy_that_is_its_reference_has_no_divergence_and_the_same_samples_again(task: Task) -> None:
    policy, tokenizer = load_policy(task.model)
    reference, _ = load_policy(task.model)
    prompts = read_table(task.prompts, "prompts").head(4)
    rows = evaluate_policy(policy, reference, tokenizer, prompts, reward_of_length, RECIPE)
    assert [(row["prompt_id"], row["sample_index"]) for row in rows] == [
        (f"p{i}", k) for i in range(4) for k in range(3)
    ]
    assert max(abs(row["kl"]) for row in rows) < 1e-5
    assert {row["tokens"] for row in rows} <= set(range(1, 9))
    again = evaluate_policy(policy, reference, tokenizer, prompts, reward_of_length, RECIPE)
    pd.testing.assert_frame_equal(pd.DataFrame(again), pd.DataFrame(rows))


def test_reward_is_of_prompt_and_completion_and_kl_of_the_completion(task: Task) -> None:
    policy, tokenizer = load_policy(task.model)
    reference, _ = load_policy(task.model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    prompts: pd.DataFrame = read_table(task.prompts, "prompts").head(2)
    seen: list[str] = []

    def reward(texts: list[str]) -> torch.Tensor:
        seen.extend(texts)
        return reward_of_length(texts)

    rows = evaluate_policy(policy, reference, tokenizer, prompts, reward, RECIPE)
    assert [row["reward"] for row in rows] == [len(text) for text in seen]
    for i, prompt in enumerate(prompts["prompt"]):
        assert all(text.startswith(prompt) for text in seen[3 * i : 3 * i + 3])
    assert min(row["kl"] for row in rows) > 0

    ids = tuple(tokenizer(seen[0].removeprefix(prompts["prompt"][0]), add_special_tokens=False)["input_ids"])
    assert completed_texts(tokenizer, [Row(tuple(prompts["prompt_ids"][0].tolist()), (ids,))]) == [seen[0]]
    if rows[0]["tokens"] == len(ids):
        row = Row(tuple(prompts["prompt_ids"][0].tolist()), (ids,))
        assert completion_kls(policy, reference, [row]).item() == pytest.approx(rows[0]["kl"], rel=1e-4)


def test_a_text_is_rewarded_as_it_was_written(task: Task) -> None:
    _, tokenizer = load_policy(task.model)
    # Though the tokenizer's own way is to clean up.
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    prompt, completion = "my dog , he", " said : i ' m sad ."
    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, completion)]
    row = Row(ids[0], ((*ids[1], tokenizer.eos_token_id),))
    assert completed_texts(tokenizer, [row]) == [prompt + completion]


@pytest.mark.parametrize("budget", [10_000, 20])
def test_every_number_belongs_to_its_own_sample(budget: int, task: Task) -> None:
    """Reward, KL and tokens of each sample, whatever the micro-batches, against the sample drawn again."""
    policy, tokenizer = load_policy(task.model)
    reference, _ = load_policy(task.model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    prompts = read_table(task.prompts, "prompts").head(4)
    recipe = dataclasses.replace(RECIPE, token_budget=budget)
    seeds = torch.randint(2**62, (4,), generator=torch.Generator().manual_seed(RECIPE.seed)).tolist()
    ids = [row.tolist() for row in prompts["prompt_ids"]]
    drawn = sample(policy, ids, n=3, temperature=1.0, max_new_tokens=8, ends=[tokenizer.eos_token_id], seeds=seeds)
    completions = [(tuple(i), tuple(c.token_ids)) for i, group in zip(ids, drawn, strict=True) for c in group]
    # The place of a text among all of them.
    rows = evaluate_policy(policy, reference, tokenizer, prompts, lambda texts: torch.arange(float(len(texts))), recipe)
    assert [row["reward"] for row in rows] == list(range(12))
    assert [row["tokens"] for row in rows] == [len(completion) for _, completion in completions]
    kls = [completion_kls(policy, reference, [Row(prompt, (completion,))]).item() for prompt, completion in completions]
    assert max(kls) - min(kls) > 0.01
    assert [row["kl"] for row in rows] == pytest.approx(kls, rel=1e-4)


def test_the_learned_reward_and_the_likelihood_are_of_each_sample(task: Task) -> None:
    policy, tokenizer = load_policy(task.model)
    prompts = read_table(task.prompts, "prompts").head(2)
    seen: list[Row] = []

    def learned(rows: list[Row]) -> torch.Tensor:
        seen.extend(rows)
        return torch.arange(6.0).view(2, 3)

    rows = evaluate_policy(policy, policy, tokenizer, prompts, reward_of_length, RECIPE, learned)
    assert [row["learned_reward"] for row in rows] == list(range(6))
    assert [row["tokens"] for row in rows] == [len(ids) for row in seen for ids in row.completions]
    assert [row["logp"] for row in rows] == pytest.approx(completion_logprobs(policy, seen).sums.tolist(), rel=1e-4)
    ends = [ids[-1] == tokenizer.eos_token_id for row in seen for ids in row.completions]
    assert [row["ended"] for row in rows] == ends
    without = evaluate_policy(policy, policy, tokenizer, prompts, reward_of_length, RECIPE)
    assert all(math.isnan(row.pop("learned_reward")) for row in without)
    assert without == [{key: row[key] for key in row if key != "learned_reward"} for row in rows]


def test_another_seed_draws_other_samples(task: Task) -> None:
    policy, tokenizer = load_policy(task.model)
    prompts = read_table(task.prompts, "prompts").head(2)
    texts: list[list[str]] = []

    def reward(given: list[str]) -> torch.Tensor:
        texts.append(given)
        return reward_of_length(given)

    for seed in (0, 1):
        recipe = dataclasses.replace(RECIPE, seed=seed)
        evaluate_policy(policy, policy, tokenizer, prompts, reward, recipe)
    assert not set(texts[0]) & set(texts[1])


def test_a_text_is_prompt_and_completion_without_special_tokens(task: Task) -> None:
    tokenizer = load_policy(task.model)[1]
    prompt, one, two = (tuple(tokenizer(text)["input_ids"]) for text in ("my dog", " ate .", " is sad"))
    eos = tokenizer.eos_token_id
    rows = [Row(prompt, ((*one, eos), two)), Row(two, (one,))]
    assert completed_texts(tokenizer, rows) == ["my dog ate .", "my dog is sad", " is sad ate ."]
