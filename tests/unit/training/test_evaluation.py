"""The true reward and the exact KL of a policy's own samples."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from prefopt.lm.batching import Row
from prefopt.lm.kl import completion_kls
from prefopt.lm.models import load_policy
from prefopt.tables import read_table
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
    assert evaluate_policy(policy, reference, tokenizer, prompts, reward_of_length, RECIPE) == rows


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
