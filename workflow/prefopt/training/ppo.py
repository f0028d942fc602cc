"""PPO against the learned reward with a per-token KL penalty, as in the summarization experiment (section 6).

Policy, value network, reference policy and reward model are four models. The value network starts from the reward
model and shares nothing with the policy. Dropout is off in all of them, so the first update has ratio 1 and KL 0.
Each prompt is sampled several times, and the engine reads it once for all its completions.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from prefopt import objectives
from prefopt.errors import UserError
from prefopt.lm.batching import Row, micro_batches
from prefopt.lm.logprobs import completion_hidden_states, completion_logprobs, pad_flat
from prefopt.lm.models import load_policy, load_scorer, score_head, tokenizer_hash
from prefopt.lm.sampling import sample
from prefopt.progress import Progress
from prefopt.recipes import from_json
from prefopt.tables import read_table
from prefopt.training import stage
from prefopt.training.checkpoint import RunFolder, TrainingState
from prefopt.training.optimization import (
    autocast,
    build_optimizer,
    learning_rate_factor,
    set_learning_rate,
)
from prefopt.training.reward import score_rows
from prefopt.training.sft import split_of
from prefopt.usage import Usage, default_device

logger = logging.getLogger(__name__)


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
    kl_coef: float
    gamma: float
    lam: float
    clip: float
    value_clip: float
    value_coef: float
    missing_eos_reward: float  # replaces the reward of a completion that did not end
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
    seed: int


@dataclasses.dataclass(frozen=True)
class Models:
    """The four models of PPO; only policy and value are trained."""

    policy: nn.Module
    value: nn.Module
    reference: nn.Module
    reward: nn.Module


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
    ended: Tensor  # bool [n], whether EOS was sampled


def roll_out(
    models: Models, prompts: Sequence[Sequence[int]], recipe: PPORecipe, eos_id: int, seeds: Sequence[int]
) -> Rollouts:
    """Samples completions and computes their scores, values and reference log-probabilities.

    Args:
        models: see `Models`.
        prompts: token ids of each prompt.
        recipe: temperature, samples per prompt, lengths.
        eos_id: ends a completion.
        seeds: one for each prompt.
    """
    sampled = sample(
        models.policy,
        [list(prompt) for prompt in prompts],
        n=recipe.samples_per_prompt,
        temperature=recipe.temperature,
        max_new_tokens=recipe.max_new_tokens,
        eos_id=eos_id,
        seeds=list(seeds),
    )
    rows = [
        Row(tuple(prompt), tuple(tuple(completion.token_ids) for completion in completions))
        for prompt, completions in zip(prompts, sampled, strict=True)
    ]
    completions = [completion for group in sampled for completion in group]
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    logps = pad_flat(torch.cat([torch.as_tensor(c.logps) for c in completions]).float(), lengths)
    ended = torch.tensor([completion.finish_reason == "eos" for completion in completions])
    scores = score_rows(models.reward, rows, recipe.token_budget, recipe.dtype).flatten()
    return Rollouts(
        rows=rows,
        mask=torch.arange(logps.shape[1]) < lengths.unsqueeze(1),
        logps=logps,
        reference_logps=_token_logps(models.reference, rows, recipe),
        values=_values(models.value, rows, recipe),
        scores=torch.where(ended, scores, recipe.missing_eos_reward),
        ended=ended,
    )


def update(
    models: Models,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    recipe: PPORecipe,
    generator: torch.Generator,
) -> dict[str, float]:
    """PPO's optimizer steps on one set of rollouts.

    Args:
        models: policy and value are changed in place.
        optimizer: over both.
        rollouts: see `roll_out`.
        recipe: clips, coefficients, epochs and minibatches.
        generator: orders the rows of each epoch.

    Returns:
        Means over all tokens and steps: `loss`, `policy_loss`, `value_loss`, `clip_fraction`, `ratio`,
        `grad_norm`; `first_ratio` is the first minibatch's, which must be 1.
    """
    rewards = objectives.per_token_rewards(
        rollouts.scores, rollouts.logps, rollouts.reference_logps, rollouts.mask, recipe.kl_coef
    )
    advantages, returns = objectives.generalized_advantages(
        rewards, rollouts.values, rollouts.mask, recipe.gamma, recipe.lam
    )
    advantages = objectives.whiten(advantages, rollouts.mask)
    parameters = [*models.policy.parameters(), *models.value.parameters()]
    sums: defaultdict[str, float] = defaultdict(float)
    steps = 0
    for _ in range(recipe.epochs):
        order = torch.randperm(len(rollouts.rows), generator=generator)
        for minibatch in order.chunk(recipe.minibatches):
            figures = _accumulate(models, rollouts, advantages, returns, minibatch.tolist(), recipe)
            figures["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if steps == 0:
                sums["first_ratio"] = figures["ratio"]
            steps += 1
            for name, value in figures.items():
                sums[name] += value
    return {name: value if name == "first_ratio" else value / steps for name, value in sums.items()}


def describe(rollouts: Rollouts) -> dict[str, float]:
    """Reward, KL to the reference (nats per completion), entropy estimate (nats per token), lengths, EOS rate."""
    mask = rollouts.mask
    log_ratio = ((rollouts.logps - rollouts.reference_logps) * mask).sum(dim=1)
    return {
        "reward": rollouts.scores.mean().item(),
        "kl": log_ratio.mean().item(),
        "entropy": -objectives.masked_mean(rollouts.logps, mask).item(),
        "tokens": mask.sum(dim=1).float().mean().item(),
        "ended": rollouts.ended.float().mean().item(),
    }


def train(
    models: Models,
    training: pd.DataFrame,
    validation: pd.DataFrame,
    recipe: PPORecipe,
    eos_id: int,
    run: RunFolder,
    usage: Usage,
) -> list[dict[str, Any]]:
    """Trains policy and value in place; resumes from the run's checkpoint.

    Args:
        models: see `Models`.
        training: rows of the prompts table to sample for.
        validation: rows of the prompts table to evaluate on, by reward - kl_coef * KL.
        recipe: see `PPORecipe`.
        eos_id: ends a completion.
        run: an open run folder.
        usage: counts completions and tokens.

    Returns:
        Metrics, a mapping per update and evaluation.

    Raises:
        UserError: the loss is not finite.
    """
    both = nn.ModuleList([models.policy, models.value])
    optimizer = build_optimizer(both, "adamw", recipe.learning_rate, adam_eps=recipe.adam_eps)
    prompts = [ids.tolist() for ids in training["prompt_ids"]]
    state = TrainingState("ppo", run, both, models.policy, optimizer, recipe.keep)

    def evaluate_and_keep() -> None:
        # The same seeds at every evaluation: common random numbers make the checkpoints comparable.
        once = dataclasses.replace(recipe, samples_per_prompt=1)
        held_out = [ids.tolist() for ids in validation["prompt_ids"]]
        figures = describe(roll_out(models, held_out, once, eos_id, range(len(held_out))))
        state.record("validation", figures)
        logger.info("ppo: update %d, validation reward %.3f, KL %.2f", state.step, figures["reward"], figures["kl"])
        state.keep_if_best(figures["reward"] - recipe.kl_coef * figures["kl"])

    if state.step == 0:
        evaluate_and_keep()
    with Progress("ppo", recipe.updates, "updates", done=state.step) as progress:
        while state.step < recipe.updates:
            factor = learning_rate_factor(state.step, recipe.updates, recipe.warmup_steps, recipe.schedule)
            learning_rate = recipe.learning_rate * factor
            set_learning_rate(optimizer, learning_rate)
            chosen = prompts_of_update(len(prompts), recipe.prompts_per_update, recipe.seed, state.step)
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + state.step)
            seeds = torch.randint(2**62, (len(chosen),), generator=generator).tolist()
            rollouts = roll_out(models, [prompts[i] for i in chosen], recipe, eos_id, seeds)
            figures = {**describe(rollouts), **update(models, optimizer, rollouts, recipe, generator)}
            if not math.isfinite(figures["loss"]):
                names = ", ".join(training["prompt_id"].iloc[i] for i in chosen)
                raise UserError(
                    f"ppo: the loss is {figures['loss']} at update {state.step} (learning rate {learning_rate:g}; "
                    f"prompts {names}): lower the learning rate or look at these prompts."
                )
            state.step += 1
            usage.add(rollouts.mask.shape[0], sum(row.tokens for row in rollouts.rows))
            state.record("train", {"learning_rate": learning_rate, **figures})
            progress.update(1, reward=figures["reward"], kl=figures["kl"])
            if state.step % recipe.evaluate_every == 0 or state.step == recipe.updates:
                evaluate_and_keep()
            if state.step % recipe.checkpoint_every == 0 and state.step < recipe.updates:
                state.save()
    state.finish()
    return state.metrics


def prompts_of_update(prompts: int, per_update: int, seed: int, done: int) -> list[int]:
    """Indices of an update's prompts: consecutive pieces of seeded permutations, so that none is favoured."""
    indices: list[int] = []
    for position in range(done * per_update, (done + 1) * per_update):
        epoch, offset = divmod(position, prompts)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        indices.append(int(torch.randperm(prompts, generator=generator)[offset]))
    return indices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `ppo`."""
    stage.add_arguments(parser)
    parser.add_argument("--model", required=True, type=Path, help="the reference policy, also the start")
    parser.add_argument("--reward-model", required=True, type=Path, help="the learned reward")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")


def run(args: argparse.Namespace) -> None:
    """Trains a PPO policy from the reference policy and publishes it."""
    recipe = from_json(PPORecipe, args.recipe)
    table = read_table(args.prompts, "prompts", tokenizer_hash=tokenizer_hash(args.model))
    training = split_of(table, "train", args.prompts)
    validation = split_of(table, "validation", args.prompts).head(recipe.validation_prompts)
    device = default_device()
    policy, tokenizer = load_policy(args.model, device=device)
    models = Models(
        policy=policy,
        value=load_scorer(args.reward_model, device=device),
        reference=load_policy(args.model, device=device)[0],
        reward=load_scorer(args.reward_model, device=device),
    )
    usage = Usage("ppo", device, torch.float32)
    identity = stage.describe_run(
        __name__,
        recipe,
        {
            "prompts": table.attrs["manifest"]["content_hash"],
            **stage.model_hashes("reference", args.model),
            **stage.model_hashes("reward", args.reward_model),
        },
    )
    with stage.open_run(args.work, identity, models.policy, models.value) as folder:
        metrics = train(models, training, validation, recipe, tokenizer.eos_token_id, folder, usage)
        stage.publish(args, policy, tokenizer, identity, metrics, usage, folder)


def _accumulate(
    models: Models,
    rollouts: Rollouts,
    advantages: Tensor,
    returns: Tensor,
    minibatch: Sequence[int],
    recipe: PPORecipe,
) -> dict[str, float]:
    """Adds the gradient of a minibatch's loss, a mean over its tokens, and returns its figures."""
    k = recipe.samples_per_prompt
    device = next(models.policy.parameters()).device
    rows = [rollouts.rows[i] for i in minibatch]
    total_tokens = sum(len(completion) for row in rows for completion in row.completions)
    sums: defaultdict[str, float] = defaultdict(float)
    for micro_batch in micro_batches(rows, recipe.token_budget):
        part = [rows[i] for i in micro_batch]
        completions = [minibatch[i] * k + j for i in micro_batch for j in range(k)]
        mask = rollouts.mask[completions]
        old_logps, old_values, advantage, target = (
            values[completions][mask].to(device) for values in (rollouts.logps, rollouts.values, advantages, returns)
        )
        with autocast(recipe.dtype, device):
            logps = completion_logprobs(models.policy, part, temperature=recipe.temperature).tokens
            values = _flat_values(models.value, part)
        policy_losses, clipped = objectives.ppo_policy_loss(logps, old_logps, advantage, recipe.clip)
        value_losses = objectives.ppo_value_loss(values, old_values, target, recipe.value_clip)
        loss = (policy_losses.sum() + recipe.value_coef * value_losses.sum()) / total_tokens
        loss.backward()
        sums["loss"] += loss.item()
        sums["policy_loss"] += policy_losses.sum().item() / total_tokens
        sums["value_loss"] += value_losses.sum().item() / total_tokens
        sums["clip_fraction"] += clipped.sum().item() / total_tokens
        sums["ratio"] += torch.exp(logps.detach() - old_logps).sum().item() / total_tokens
    return dict(sums)


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
    return _by_micro_batch(rows, recipe, device, lambda part: _flat_values(model, part))


def _flat_values(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    predicting, _ = completion_hidden_states(model, rows)
    return score_head(model)(predicting).float().squeeze(-1)


def _by_micro_batch(rows: Sequence[Row], recipe: PPORecipe, device: torch.device, compute: Any) -> Tensor:
    """Runs `compute(rows) -> [tokens]` within the token budget and pads the results in the order of `rows`."""
    k = recipe.samples_per_prompt
    lengths = torch.tensor([len(completion) for row in rows for completion in row.completions])
    padded = torch.zeros(len(lengths), int(lengths.max()))
    mask = torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
    for micro_batch in micro_batches(rows, recipe.token_budget):
        completions = [i * k + j for i in micro_batch for j in range(k)]
        with autocast(recipe.dtype, device):
            flat = compute([rows[i] for i in micro_batch]).float().cpu()
        part = padded[completions]
        part[mask[completions]] = flat
        padded[completions] = part
    return padded
