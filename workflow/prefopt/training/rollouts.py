"""PPO's rollouts: completions of the policy with their rewards, values and log-probabilities.

Each prompt is sampled several times, and the engine reads it once for all its completions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefopt import objectives
from prefopt.lm.batching import Row
from prefopt.lm.engine import score_head
from prefopt.lm.logprobs import completion_hidden_states, completion_logprobs, pad_flat
from prefopt.lm.precision import autocast
from prefopt.lm.sampling import Completion, sample
from prefopt.lm.sharding import dealt_micro_batches, gathered, within
from prefopt.rewards.learned import score_rows
from prefopt.runtime import collectives
from prefopt.store.finite import require_finite

ADVICE = "lower the learning rate or look at these prompts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPORecipe:
    """One update: sample, score, then `epochs` passes over the rollouts in `minibatches` optimizer steps each."""

    updates: int
    prompts_per_update: int
    samples_per_prompt: int
    epochs: int
    minibatches: int
    temperature: float  # of rollouts; log-probabilities of policy and reference are taken at it
    max_new_tokens: int
    kl_coef: float  # weight of the KL penalty, the first one where it adapts
    kl_target: float | None  # nats per completion that an adaptive weight aims at; None keeps the weight
    kl_horizon: float  # completions over which the weight grows by a fifth where the KL is far too large
    normalize_rewards: bool  # rewards less their mean so far, in units of their standard deviation so far
    gamma: float
    lam: float
    clip: float
    value_clip: float
    value_coef: float
    true_reward: dict[str, Any] | None  # kind, max_length and batch_size of the true reward; None learns from a model's
    missing_eos_reward: float | None  # replaces the reward of a completion that did not end; None keeps it
    learning_rate: float
    schedule: Literal["constant", "cosine", "linear"]
    warmup_steps: int  # updates
    adam_eps: float
    max_grad_norm: float
    validation_prompts: int
    evaluate_every: int  # updates
    checkpoint_every: int  # updates
    keep: Literal["best", "last"]
    token_budget: int
    dtype: Literal["float32", "bfloat16"]
    activation_checkpointing: bool  # a layer's activations are computed again in the backward pass
    seed: int


# Rows of k completions each -> float32 [rows, k] on the CPU, the reward of each completion.
Reward = Callable[[Sequence[Row]], Tensor]


@dataclasses.dataclass(frozen=True)
class Models:
    """The four models of PPO, the reward's as a function; only policy and value are trained."""

    policy: nn.Module
    value: nn.Module
    reference: nn.Module
    reward: Reward
    learned_reward: bool = True  # whether the reward is a model's


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Completions sampled from the policy, and all that is known of them before the update.

    `n` = rows * samples_per_prompt completions, those of a row adjacent; tensors are on the CPU.
    """

    rows: list[Row]
    mask: Tensor  # bool [n, T]
    logps: Tensor  # float32 [n, T], under the policy that sampled
    reference_logps: Tensor  # float32 [n, T]
    values: Tensor  # float32 [n, T], before each token
    scores: Tensor  # float32 [n], the reward of the whole completion
    ended: Tensor  # bool [n], whether an end token was sampled


def learned_reward(model: nn.Module, recipe: PPORecipe) -> Reward:
    """The reward that a reward model gives."""
    return lambda rows: score_rows(model, rows, recipe.token_budget, recipe.dtype)


def roll_out(
    models: Models, prompts: Sequence[Sequence[int]], recipe: PPORecipe, ends: Sequence[int], seeds: Sequence[int]
) -> Rollouts:
    """Samples completions and computes their scores, values and reference log-probabilities.

    Args:
        models: see `Models`.
        prompts: token ids of each prompt.
        recipe: temperature, samples per prompt, lengths.
        ends: the tokens each of which ends a completion.
        seeds: one for each prompt.
    """
    sampled = _sampled(models.policy, prompts, recipe, ends, seeds)
    rows = [
        Row(tuple(prompt), tuple(tuple(completion.token_ids) for completion in completions))
        for prompt, completions in zip(prompts, sampled, strict=True)
    ]
    completions = [completion for group in sampled for completion in group]
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    logps = pad_flat(torch.cat([torch.as_tensor(c.logps) for c in completions]).float(), lengths)
    ended = torch.tensor([completion.finish_reason == "eos" for completion in completions])
    scores = models.reward(rows).flatten()
    if recipe.missing_eos_reward is not None:
        scores = torch.where(ended, scores, recipe.missing_eos_reward)
    return Rollouts(
        rows=rows,
        mask=torch.arange(logps.shape[1]) < lengths.unsqueeze(1),
        logps=logps,
        reference_logps=_token_logps(models.reference, rows, recipe),
        values=_values(models.value, rows, recipe),
        scores=scores,
        ended=ended,
    )


def _sampled(
    policy: nn.Module, prompts: Sequence[Sequence[int]], recipe: PPORecipe, ends: Sequence[int], seeds: Sequence[int]
) -> list[list[Completion]]:
    """Completions of each prompt; each process samples for its part of the prompts."""
    own = collectives.in_turn(list(range(len(prompts))))
    with gathered(policy), autocast(recipe.dtype, next(policy.parameters()).device):
        completions = sample(
            policy,
            [list(prompts[i]) for i in own],
            n=recipe.samples_per_prompt,
            temperature=recipe.temperature,
            max_new_tokens=recipe.max_new_tokens,
            ends=ends,
            seeds=[seeds[i] for i in own],
        )
    return collectives.collected(completions, len(prompts))


def require_finite_rollouts(rollouts: Rollouts, names: Iterable[str], when: str) -> None:
    """Raises UserError where a log-probability, a value or a reward is not finite: names the prompts.

    Args:
        rollouts: see `roll_out`.
        names: prompt_id of each row.
        when: for the message (see `require_finite`).
    """
    numbers = {
        "log-probability": rollouts.logps,
        "log-probability under the reference policy": rollouts.reference_logps,
        "value": rollouts.values,
        "reward": rollouts.scores,
    }
    ids = list(names)
    for what, values in numbers.items():
        require_finite(values.view(len(ids), -1), ids, f"ppo: a completion's {what}", ADVICE, when)


def describe(rollouts: Rollouts) -> dict[str, float]:
    """Reward, KL to the reference (nats per completion), entropy estimate (nats per token), lengths, EOS rate."""
    mask = rollouts.mask
    log_ratio = ((rollouts.logps - rollouts.reference_logps) * mask).sum(dim=1)
    return {
        "reward": rollouts.scores.mean().item(),
        "reward_variance": rollouts.scores.var(correction=0).item(),
        "kl": log_ratio.mean().item(),
        "entropy": -objectives.masked_mean(rollouts.logps, mask).item(),
        "tokens": mask.sum(dim=1).float().mean().item(),
        "ended": rollouts.ended.float().mean().item(),
    }


def normalized(rollouts: Rollouts, moments: Sequence[tuple[float, float]]) -> Rollouts:
    """The rollouts with scores less the mean and over the standard deviation of all updates' scores so far.

    Args:
        rollouts: of the present update.
        moments: mean and variance of the scores of each update so far, the present one included; every update has
            as many completions.
    """
    means, variances = torch.tensor(moments, dtype=torch.float64).unbind(dim=1)
    spread = (variances.mean() + means.var(correction=0)).sqrt().clamp(min=1e-8)
    return dataclasses.replace(rollouts, scores=((rollouts.scores - means.mean()) / spread).float())


def flat_values(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """The value before every completion token, float32 [tokens]: rows in order, completions in order."""

    def values() -> Tensor:
        predicting, _ = completion_hidden_states(model, rows)
        of_tokens: Tensor = score_head(model)(predicting).float().squeeze(-1)
        return of_tokens

    return within(model, values)


@torch.no_grad()
def _token_logps(model: nn.Module, rows: Sequence[Row], recipe: PPORecipe) -> Tensor:
    """Log-probability of every completion token at the rollouts' temperature, float32 [n, T] on the CPU."""
    return _by_micro_batch(
        rows,
        recipe,
        next(model.parameters()).device,
        lambda part: completion_logprobs(model, part, temperature=recipe.temperature).tokens,
    )


@torch.no_grad()
def _values(model: nn.Module, rows: Sequence[Row], recipe: PPORecipe) -> Tensor:
    """The value before every completion token, float32 [n, T] on the CPU."""
    device = next(model.parameters()).device
    return _by_micro_batch(rows, recipe, device, lambda part: flat_values(model, part))


def _by_micro_batch(rows: Sequence[Row], recipe: PPORecipe, device: torch.device, compute: Any) -> Tensor:
    """Runs `compute(rows) -> [tokens]` within the token budget and pads the results in the order of `rows`."""
    k = recipe.samples_per_prompt
    lengths = torch.tensor([len(completion) for row in rows for completion in row.completions])
    padded = torch.zeros(len(lengths), int(lengths.max()))
    mask = torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
    for micro_batch, counts in dealt_micro_batches(rows, recipe.token_budget):
        with autocast(recipe.dtype, device):
            flat = compute([rows[i] for i in micro_batch]).float().cpu()
        if counts:
            completions = [i * k + j for i in micro_batch for j in range(k)]
            part = padded[completions]
            part[mask[completions]] = flat
            padded[completions] = part
    return collectives.summed_tensor(padded)
