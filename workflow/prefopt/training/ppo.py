"""PPO against a reward with a per-token KL penalty: the learned reward, or the true one (PPO-GT in section 6.1).

Policy, value network, reference policy and reward model are four models. The value network starts from the reward
model, where there is one, and shares nothing with the policy. Dropout is off in all of them, so the first update has
ratio 1 and KL 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt import objectives
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.lm.batching import Row
from prefopt.lm.chat import end_tokens
from prefopt.lm.flops import reading_flops, sampling_flops
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import check_tokenizer, load_policy, load_scorer, new_scorer, tokenizer_hash
from prefopt.lm.precision import autocast
from prefopt.lm.shape import shape_of
from prefopt.lm.sharding import dealt_micro_batches, place, recompute_activations
from prefopt.rewards.true_reward import TrueReward, load_true_reward, reward_hash
from prefopt.runtime import collectives, processes
from prefopt.runtime.progress import Progress
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.finite import require_finite
from prefopt.store.tables import read_table, split_of
from prefopt.training import by_step, stage
from prefopt.training.checkpoint import RunFolder, TrainingState
from prefopt.training.evaluation import completed_texts
from prefopt.training.optimization import (
    build_optimizer,
    clip_gradients,
    learning_rate_factor,
    set_learning_rate,
)
from prefopt.training.rollouts import (
    ADVICE,
    Models,
    PPORecipe,
    Reward,
    Rollouts,
    describe,
    flat_values,
    learned_reward,
    normalized,
    require_finite_rollouts,
    roll_out,
)

logger = logging.getLogger(__name__)


def update(
    models: Models,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    recipe: PPORecipe,
    kl_coef: float,
    generator: torch.Generator,
) -> dict[str, float]:
    """PPO's optimizer steps on one set of rollouts.

    Args:
        models: policy and value are changed in place.
        optimizer: over both.
        rollouts: see `roll_out`.
        recipe: clips, coefficients, epochs and minibatches.
        kl_coef: weight of the KL penalty in this update.
        generator: orders the rows of each epoch.

    Returns:
        Means over all tokens and steps: `loss`, `policy_loss`, `value_loss`, `clip_fraction`, `ratio`,
        `grad_norm`; `first_ratio` is the first minibatch's, which must be 1.
    """
    rewards = objectives.per_token_rewards(
        rollouts.scores, rollouts.logps, rollouts.reference_logps, rollouts.mask, kl_coef
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
            figures["grad_norm"] = clip_gradients(parameters, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if steps == 0:
                sums["first_ratio"] = figures["ratio"]
            steps += 1
            for name, value in figures.items():
                sums[name] += value
    return {name: value if name == "first_ratio" else value / steps for name, value in sums.items()}


def train(
    models: Models,
    training: pd.DataFrame,
    validation: pd.DataFrame | None,
    recipe: PPORecipe,
    ends: Sequence[int],
    run: RunFolder,
    usage: Usage,
    hook: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains policy and value in place; resumes from the run's checkpoint.

    Args:
        models: see `Models`.
        training: rows of the prompts table to sample for.
        validation: rows of the prompts table to evaluate on, by reward - kl_coef * KL; None does not.
        recipe: see `PPORecipe`.
        ends: the tokens each of which ends a completion.
        run: an open run folder.
        usage: counts completions and tokens.
        hook: called with the number of updates made, before the first and after each.

    Returns:
        Metrics, a mapping per update and evaluation.

    Raises:
        UserError: a number of a completion, or a figure of an update, is not finite: names the prompts.
        Interrupted: the process was asked to stop, and has saved a checkpoint.
    """
    both = nn.ModuleList([models.policy, models.value])
    optimizer = build_optimizer(both, "adamw", recipe.learning_rate, adam_eps=recipe.adam_eps)
    prompts = [ids.tolist() for ids in training["prompt_ids"]]
    state = TrainingState("ppo", run, both, models.policy, optimizer, recipe.keep)
    order = PromptOrder(len(prompts), recipe.seed)
    # The metrics hold what an adaptive weight and the normalization depend on, so that a resumed run knows it.
    made = [row for row in state.metrics if row["split"] == "train"]
    kl_coef = made[-1]["next_kl_coef"] if made else recipe.kl_coef
    moments = [(row["reward"], row["reward_variance"]) for row in made]

    def evaluate_and_keep() -> None:
        if validation is None:
            return
        # The same seeds at every evaluation: common random numbers make the checkpoints comparable.
        once = dataclasses.replace(recipe, samples_per_prompt=1)
        held_out = [ids.tolist() for ids in validation["prompt_ids"]]
        rollouts = roll_out(models, held_out, once, ends, range(len(held_out)))
        require_finite_rollouts(rollouts, validation["prompt_id"], f" in the validation at update {state.step}")
        figures = describe(rollouts)
        state.record("validation", figures)
        logger.info("ppo: update %d, validation reward %.3f, KL %.2f", state.step, figures["reward"], figures["kl"])
        state.keep_if_best(figures["reward"] - recipe.kl_coef * figures["kl"])

    if state.step == 0:
        evaluate_and_keep()
        if hook is not None:
            hook(0)
    with Progress("ppo", recipe.updates, "updates", done=state.step) as progress:
        while state.step < recipe.updates:
            factor = learning_rate_factor(state.step, recipe.updates, recipe.warmup_steps, recipe.schedule)
            learning_rate = recipe.learning_rate * factor
            set_learning_rate(optimizer, learning_rate)
            chosen = order.of_update(recipe.prompts_per_update, state.step)
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + state.step)
            seeds = torch.randint(2**62, (len(chosen),), generator=generator).tolist()
            rollouts = roll_out(models, [prompts[i] for i in chosen], recipe, ends, seeds)
            names = training["prompt_id"].iloc[chosen]
            when = f" at update {state.step} (learning rate {learning_rate:g})"
            require_finite_rollouts(rollouts, names, when)
            figures = describe(rollouts)
            moments.append((figures["reward"], figures["reward_variance"]))
            if recipe.normalize_rewards:
                rollouts = normalized(rollouts, moments)
            figures |= update(models, optimizer, rollouts, recipe, kl_coef, generator)
            figures["kl_coef"] = kl_coef
            if recipe.kl_target is not None:
                completions = len(rollouts.scores)
                kl_coef = objectives.adapted_kl_coef(
                    kl_coef, figures["kl"], recipe.kl_target, completions, recipe.kl_horizon
                )
            figures["next_kl_coef"] = kl_coef
            for figure, value in figures.items():
                require_finite([value] * len(names), names, f"ppo: the {figure}", ADVICE, when)
            state.step += 1
            usage.add(
                *(rollouts.mask.shape[0], sum(row.tokens for row in rollouts.rows)),
                flops=update_flops(models, rollouts.rows, recipe.epochs),
                generated=int(rollouts.mask.sum()),
            )
            state.record("train", {"learning_rate": learning_rate, **figures})
            progress.update(1, reward=figures["reward"], kl=figures["kl"])
            if state.step % recipe.evaluate_every == 0 or state.step == recipe.updates:
                evaluate_and_keep()
            if hook is not None:
                hook(state.step)
            state.save_if_due(recipe.checkpoint_every, recipe.updates)
    state.finish()
    return state.metrics


def update_flops(models: Models, rows: Sequence[Row], epochs: int) -> int:
    """Operations of one update: sampling, one pass of reference, value and reward, and the optimizer's passes.

    The reward is taken to cost as much as the value network, which has the reward model's shape; a true reward is
    the environment's and costs nothing here.
    """
    policy, value = shape_of(models.policy), shape_of(models.value)
    total = 0
    for row in rows:
        prompt, lengths = len(row.prompt), [len(completion) for completion in row.completions]
        total += sampling_flops(policy, prompt, lengths)
        total += reading_flops(policy, prompt, lengths) * (1 + 3 * epochs)  # the reference has the policy's shape
        total += reading_flops(value, prompt, lengths) * (1 + models.learned_reward + 3 * epochs)
    return total


class PromptOrder:
    """Which prompts each update takes: consecutive pieces of seeded permutations, so that none is favoured.

    Args:
        prompts: how many there are.
        seed: of the permutations, one of which serves for each pass over the prompts.
    """

    def __init__(self, prompts: int, seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._permutation = functools.lru_cache(maxsize=2)(self._permutation_of_pass)

    def of_update(self, count: int, done: int) -> list[int]:
        """Indices of the `count` prompts of the update that `done` others came before."""
        places = (divmod(place, self._prompts) for place in range(done * count, (done + 1) * count))
        return [self._permutation(number)[offset] for number, offset in places]

    def _permutation_of_pass(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        indices: list[int] = torch.randperm(self._prompts, generator=generator).tolist()
        return indices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `ppo`."""
    stage.add_arguments(parser)
    parser.add_argument("--model", required=True, type=Path, help="the reference policy, also the start")
    parser.add_argument("--reward-model", type=Path, help="the learned reward, unless the recipe names the true one")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    by_step.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Trains a PPO policy from the reference policy and publishes it."""
    recipe = from_json(PPORecipe, args.recipe)
    table = read_table(args.prompts, "prompts", tokenizer_hash=tokenizer_hash(args.model))
    training, validation = split_of(table, "train", args.prompts), None
    if recipe.validation_prompts:
        validation = split_of(table, "validation", args.prompts).head(recipe.validation_prompts)
    models, tokenizer, true_reward = _models(args, recipe)
    ends = end_tokens(tokenizer, models.policy)
    usage = Usage("ppo", default_device(), recipe.dtype, models=4 if models.learned_reward else 3)
    inputs = {"prompts": table.attrs["manifest"]["content_hash"], **stage.model_hashes("reference", args.model)}
    if models.learned_reward:
        inputs |= stage.model_hashes("reward", args.reward_model)
    elif (hashed := reward_hash(args.true_reward_model)) is not None:
        inputs["true_reward"] = hashed
    identity = stage.describe_run(__name__, recipe, inputs | by_step.inputs_of(args))
    with stage.open_run(args.work, identity, models.policy, models.value) as folder:
        shared = (models.reference, true_reward, models.reward if models.learned_reward else None)
        watcher = by_step.watcher(args, models.policy, tokenizer, folder, recipe.updates, *shared)
        metrics = train(models, training, validation, recipe, ends, folder, usage, hook=watcher)
        if watcher is not None:
            watcher.publish(identity, usage)
        stage.publish(args, models.policy, tokenizer, identity, metrics, usage, folder)


def _models(args: argparse.Namespace, recipe: PPORecipe) -> tuple[Models, PreTrainedTokenizerBase, TrueReward | None]:
    """The models of PPO, the policy's tokenizer, and the true reward where that is learned from.

    Each is placed before the next is loaded, so that the host holds one at a time. The value network starts from the
    reward model; where there is none it has a head of its own on the policy's layers.
    """

    def placed(model: PreTrainedModel, trained: bool = False) -> PreTrainedModel:
        if trained and recipe.activation_checkpointing:
            recompute_activations(model)
        return place(model, recipe.dtype)

    policy, tokenizer = load_policy(args.model)
    policy = placed(policy, trained=True)
    true_reward: TrueReward | None = None
    if recipe.true_reward is not None:
        true_reward = load_true_reward(folder=args.true_reward_model, device=default_device(), **recipe.true_reward)
        reward, value = _rewarded_by(true_reward, tokenizer), new_scorer(args.model, seed=recipe.seed)[0]
    elif args.reward_model is None:
        raise UserError("PPO learns from a reward model, unless its recipe names a true reward; give --reward-model.")
    else:
        check_tokenizer(args.reward_model, args.model)
        reward = learned_reward(placed(load_scorer(args.reward_model)), recipe)
        value = load_scorer(args.reward_model)
    value = placed(value, trained=True)
    reference = placed(load_policy(args.model)[0])
    return Models(policy, value, reference, reward, learned_reward=true_reward is None), tokenizer, true_reward


def _rewarded_by(true_reward: TrueReward, tokenizer: PreTrainedTokenizerBase) -> Reward:
    """The true reward of rows of token ids."""
    return lambda rows: true_reward(completed_texts(tokenizer, rows)).view(len(rows), -1)


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
    for micro_batch, counts in dealt_micro_batches(rows, recipe.token_budget):
        part = [rows[i] for i in micro_batch]
        completions = [minibatch[i] * k + j for i in micro_batch for j in range(k)]
        mask = rollouts.mask[completions]
        old_logps, old_values, advantage, target = (
            values[completions][mask].to(device) for values in (rollouts.logps, rollouts.values, advantages, returns)
        )
        with autocast(recipe.dtype, device):
            logps = completion_logprobs(models.policy, part, temperature=recipe.temperature).tokens
            values = flat_values(models.value, part)
        policy_losses, clipped = objectives.ppo_policy_loss(logps, old_logps, advantage, recipe.clip)
        value_losses = objectives.ppo_value_loss(values, old_values, target, recipe.value_clip)
        share = counts / total_tokens
        loss = (policy_losses.sum() + recipe.value_coef * value_losses.sum()) * share
        # Gradients of the processes are averaged, and are to be added up.
        (loss * processes.count()).backward()
        sums["loss"] += loss.item()
        sums["policy_loss"] += policy_losses.sum().item() * share
        sums["value_loss"] += value_losses.sum().item() * share
        sums["clip_fraction"] += clipped.sum().item() * share
        sums["ratio"] += torch.exp(logps.detach() - old_logps).sum().item() * share
    return collectives.summed(sums)
