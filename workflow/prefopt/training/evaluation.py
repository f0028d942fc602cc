"""What a policy is worth on held-out prompts: the true reward of its own samples and their exact KL."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.generation.measures import completion_measures
from prefopt.lm.batching import Row, micro_batches
from prefopt.lm.chat import end_tokens
from prefopt.lm.continuations import decode_continuation
from prefopt.lm.kl import completion_kls
from prefopt.lm.precision import autocast
from prefopt.lm.sampling import Completion, sample
from prefopt.rewards.true_reward import TrueReward
from prefopt.store.finite import require_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """How a checkpoint is evaluated: sampled at temperature 1, as the KL and the optimal frontier are defined."""

    prompts: int  # the first of the test split
    samples_per_prompt: int
    max_new_tokens: int
    seed: int
    token_budget: int
    dtype: Literal["float32", "bfloat16"]


def evaluate_policy(
    policy: PreTrainedModel,
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: pd.DataFrame,
    true_reward: TrueReward,
    recipe: EvaluationRecipe,
    learned: Callable[[Sequence[Row]], Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Samples the policy and measures reward and KL of each sample.

    Every call draws with the same random numbers, which makes checkpoints and policies comparable.

    Args:
        policy: what is evaluated.
        reference: the reference policy.
        tokenizer: of both.
        prompts: rows of the prompts table.
        true_reward: of whole texts.
        recipe: see `EvaluationRecipe`.
        learned: the reward that the policy learns from, where that is a reward model's, of rows [n, k].

    Returns:
        A mapping a sample: prompt_id, sample_index, reward, kl (nats per completion), tokens, logp, what
        `completion_measures` gives, and learned_reward, NaN where there is none.

    Raises:
        UserError: one of these is not finite: names the prompts.
    """
    prompt_ids = [tuple(ids.tolist()) for ids in prompts["prompt_ids"]]
    generator = torch.Generator().manual_seed(recipe.seed)
    device = next(policy.parameters()).device
    with autocast(recipe.dtype, device):
        sampled = sample(
            policy,
            prompt_ids,
            n=recipe.samples_per_prompt,
            temperature=1.0,
            max_new_tokens=recipe.max_new_tokens,
            ends=end_tokens(tokenizer, policy),
            seeds=torch.randint(2**62, (len(prompts),), generator=generator).tolist(),
        )
    rows = [
        Row(prompt, tuple(tuple(completion.token_ids) for completion in completions))
        for prompt, completions in zip(prompt_ids, sampled, strict=True)
    ]
    kls = torch.empty(len(rows), recipe.samples_per_prompt)
    for batch in micro_batches(rows, recipe.token_budget):
        with autocast(recipe.dtype, device):
            kls[batch] = completion_kls(policy, reference, [rows[i] for i in batch]).view(len(batch), -1)
    rewards = true_reward(completed_texts(tokenizer, rows)).view(len(rows), -1)
    logps, learned_rewards = _logps(sampled), None if learned is None else learned(rows)
    for what, values in (("log-probability", logps), ("KL", kls), ("true reward", rewards)):
        require_finite(
            *(values, prompts["prompt_id"], f"An evaluated sample's {what}"),
            "the policy has come apart, so lower the learning rate, or look at these prompts",
        )
    return [
        {
            "prompt_id": prompt_id,
            "sample_index": k,
            "reward": float(rewards[i, k]),
            "kl": float(kls[i, k]),
            "tokens": len(completion.token_ids),
            "logp": float(logps[i, k]),
            **completion_measures(
                *(prompt, completion.token_ids),
                decode_continuation(tokenizer, prompt, completion.token_ids),
                completion.finish_reason == "eos",
            ),
            "learned_reward": math.nan if learned_rewards is None else float(learned_rewards[i, k]),
        }
        for i, (prompt_id, prompt) in enumerate(zip(prompts["prompt_id"], prompt_ids, strict=True))
        for k, completion in enumerate(sampled[i])
    ]


def _logps(sampled: Sequence[Sequence[Completion]]) -> Tensor:
    """Log-probability of each prompt's completions as they were sampled, [prompts, n]."""
    return torch.tensor([[sum(completion.logps) for completion in group] for group in sampled])


def completed_texts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[str]:
    """Prompt and completion as one text, for every completion of every row."""
    ids = [[*row.prompt, *completion] for row in rows for completion in row.completions]
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts
