"""One loop for every trainer with a fixed set of examples: SFT, Preferred-FT, DPO and the reward model.

A batch of `batch_size` examples is one optimizer step. It is dealt out to the processes that train together and cut
into micro-batches by a token budget, and each micro-batch's summed loss is divided by the whole batch's weight, so that
the step depends neither on the cut nor on the number of processes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.errors import UserError
from prefopt.lm.batching import Row
from prefopt.lm.flops import Shape
from prefopt.lm.precision import autocast
from prefopt.lm.shape import rows_flops, shape_of
from prefopt.lm.sharding import dealt_micro_batches
from prefopt.runtime import collectives, processes
from prefopt.runtime.progress import Progress
from prefopt.runtime.usage import Usage
from prefopt.store.files import write_text
from prefopt.store.finite import require_finite
from prefopt.training.checkpoint import RunFolder, TrainingState
from prefopt.training.optimization import (
    build_optimizer,
    clip_gradients,
    learning_rate_factor,
    set_learning_rate,
)
from prefopt.training.recipe import TrainingRecipe

logger = logging.getLogger(__name__)

_ADVICE = "lower the learning rate or look at these rows"

Metrics = dict[str, float]
# model, indices of examples (and the batch's mean) -> weighted losses [n] and named figures [n], one of each an example
Losses = Callable[..., tuple[Tensor, dict[str, Tensor]]]


@dataclasses.dataclass(frozen=True)
class BatchMean:
    """A figure whose mean over a whole batch all losses of the batch take as a constant, computed before any of them."""

    name: str  # of the figure
    rows: Sequence[Row]  # what is read for it, one for each example
    values: Callable[[nn.Module, Sequence[int]], Tensor]  # model, indices of examples -> the figure, float [n]


@dataclasses.dataclass(frozen=True)
class Examples:
    """A fixed set of training or validation examples and the loss over them.

    `losses(model, indices)` gives each example's loss times its weight, so that a batch's loss is the sum
    over its examples divided by the sum of their weights: weight 1 makes a mean over pairs, a weight of its
    token count a mean over tokens. With a `batch_mean` it is `losses(model, indices, mean)`.
    """

    ids: Sequence[str]
    rows: Sequence[Row]
    weights: Sequence[float]
    losses: Losses
    batch_mean: BatchMean | None = None

    def tokens(self, indices: Sequence[int]) -> int:
        """Tokens that the model reads for these examples, the prompt of a row counted once."""
        return sum(row.tokens for row in [*(self.rows[i] for i in indices), *self._before(indices)])

    def flops(self, shape: Shape, indices: Sequence[int], passes: int) -> int:
        """Operations of learning from these examples: `passes` forward passes' worth, and one of what has no gradients."""
        learnt = rows_flops(shape, [self.rows[i] for i in indices])
        return passes * learnt + rows_flops(shape, self._before(indices))

    def _before(self, indices: Sequence[int]) -> list[Row]:
        return [] if self.batch_mean is None else [self.batch_mean.rows[i] for i in indices]


def steps_of(training: Examples, recipe: TrainingRecipe) -> int:
    """Optimizer steps of a training.

    Raises:
        UserError: the recipe says neither steps nor epochs, or both.
    """
    if (recipe.steps is None) == (recipe.epochs is None):
        raise UserError(f"A training lasts for steps or for epochs; the recipe has {recipe.steps} and {recipe.epochs}.")
    return recipe.steps or (recipe.epochs or 0) * math.ceil(len(training.ids) / recipe.batch_size)


def epoch_batches(examples: int, batch_size: int, seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
    """Indices of each batch of an epoch: every example exactly once, in an order of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(examples, generator=generator).tolist() if shuffle else list(range(examples))
    return [order[start : start + batch_size] for start in range(0, examples, batch_size)]


def train(
    name: str,
    model: nn.Module,
    training: Examples,
    validation: Examples,
    recipe: TrainingRecipe,
    run: RunFolder,
    usage: Usage,
    better: tuple[str, int] = ("loss", -1),
    shuffle: bool = True,
    hook: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains `model` in place; resumes from the run's checkpoint and ends with the weights to publish.

    Args:
        name: shown in progress lines.
        model: float32 parameters; dropout is already off.
        training: what to learn from.
        validation: evaluated before the first step, every `evaluate_every` steps and after the last.
        recipe: see `TrainingRecipe`.
        run: an open run folder.
        usage: counts what is processed.
        better: which validation figure chooses the best checkpoint, and +1 where larger is better, else -1.
        shuffle: whether each epoch takes the examples in an order of its own, or in the given one.
        hook: called with the number of steps made, before the first and after each.

    Returns:
        Metrics, a mapping per training step and evaluation, ready for a JSON-lines file.

    Raises:
        UserError: a loss, another figure of an example or the gradient is not finite: names the examples.
        Interrupted: the process was asked to stop, and has saved a checkpoint.
    """
    # Adam's second moment over some twenty steps, as is usual for language models.
    optimizer = build_optimizer(model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, adam_beta2=0.95)
    total_steps = steps_of(training, recipe)
    state = TrainingState(name, run, model, model, optimizer, recipe.keep)
    shape = shape_of(model)
    # In forward passes: one itself, one for the gradients of what a layer reads, one for those of weights that learn.
    passes = 3 if recipe.adapter is None else 2

    def evaluate_and_keep() -> None:
        figures = evaluate(model, validation, recipe, name, f" in the validation at step {state.step}")
        state.record("validation", figures)
        logger.info("%s: step %d, validation %s", name, state.step, _short(figures))
        figure, sign = better
        state.keep_if_best(sign * figures[figure])

    if state.step == 0:
        evaluate_and_keep()
        if hook is not None:
            hook(0)
    batches = _batches_from(state.step, len(training.ids), recipe, shuffle)
    with Progress(name, total_steps, "steps", done=state.step) as progress:
        for indices in itertools.islice(batches, total_steps - state.step):
            factor = learning_rate_factor(state.step, total_steps, recipe.warmup_steps, recipe.schedule)
            learning_rate = recipe.learning_rate * factor
            set_learning_rate(optimizer, learning_rate)
            when = f" at step {state.step} (learning rate {learning_rate:g})"
            figures = accumulate_gradients(model, training, indices, recipe, name, when)
            figures["grad_norm"] = clip_gradients(model.parameters(), recipe.max_grad_norm)
            require_finite(
                [figures["grad_norm"]] * len(indices),
                [training.ids[i] for i in indices],
                *(f"{name}: the gradient's norm", _ADVICE, when),
            )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            # Passes over validation data are not part of the method.
            flops = training.flops(shape, indices, passes)
            usage.add(len(indices), training.tokens(indices), flops=flops)
            state.record("train", {"learning_rate": learning_rate, **figures})
            progress.update(1, loss=figures["loss"])
            if state.step % recipe.evaluate_every == 0 or state.step == total_steps:
                evaluate_and_keep()
            if hook is not None:
                hook(state.step)
            state.save_if_due(recipe.checkpoint_every, total_steps)
    state.finish()
    return state.metrics


def accumulate_gradients(
    model: nn.Module,
    examples: Examples,
    indices: Sequence[int],
    recipe: TrainingRecipe,
    name: str = "training",
    when: str = "",
) -> Metrics:
    """Adds the gradient of a batch's loss to the parameters' `.grad`, micro-batch by micro-batch.

    Returns:
        The batch's loss and the examples' mean figures.

    Raises:
        UserError: the loss or a figure of an example is not finite; it says `name` and `when`.
    """
    return _mean_figures(model, examples, indices, recipe, name, when)


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Examples, recipe: TrainingRecipe, name: str = "evaluation", when: str = ""
) -> Metrics:
    """The weighted mean loss and the mean figures over all examples, which must be finite for each of them."""
    return _mean_figures(model, examples, range(len(examples.ids)), recipe, name, when)


def write_metrics(path: str | Path, metrics: Sequence[dict[str, Any]]) -> None:
    """Writes metrics as JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in metrics))


def _mean_figures(
    model: nn.Module, examples: Examples, indices: Sequence[int], recipe: TrainingRecipe, name: str, when: str
) -> Metrics:
    """The weighted mean loss and the mean figures over these examples; with gradients, where those are enabled."""
    total_weight = sum(examples.weights[i] for i in indices)
    sums: defaultdict[str, float] = defaultdict(float)
    device = next(model.parameters()).device
    rows = [examples.rows[i] for i in indices]
    of_batch = _batch_mean(model, examples, indices, recipe, name, when)
    of_examples: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(len(indices)))
    for batch, counts in dealt_micro_batches(rows, recipe.token_budget):
        with autocast(recipe.dtype, device):
            losses, figures = examples.losses(model, [indices[i] for i in batch], *of_batch)
        loss = losses.sum() * (counts / total_weight)
        if torch.is_grad_enabled():
            # Gradients of the processes are averaged, and are to be added up.
            (loss * processes.count()).backward()
        sums["loss"] += loss.item()
        for figure, values in figures.items():
            sums[figure] += counts * values.sum().item() / len(indices)
        for figure, values in {"loss": losses, **figures}.items():
            known = of_examples[figure]
            if counts:
                known[batch] = values.detach().float().cpu()
    # Every process learns of every example, so that all stop with the same words.
    every = collectives.summed_tensor(torch.stack([*of_examples.values()]))
    for figure, of_figure in zip(of_examples, every, strict=True):
        require_finite(of_figure, (examples.ids[i] for i in indices), f"{name}: the {figure}", _ADVICE, when)
    return collectives.summed(sums)


@torch.no_grad()
def _batch_mean(
    model: nn.Module, examples: Examples, indices: Sequence[int], recipe: TrainingRecipe, name: str, when: str
) -> tuple[float, ...]:
    """What the losses of a batch take beside their examples: nothing, or the mean over the batch, equal in every process."""
    if examples.batch_mean is None:
        return ()
    figure = examples.batch_mean
    device = next(model.parameters()).device
    of_examples = torch.zeros(len(indices))
    for batch, counts in dealt_micro_batches([figure.rows[i] for i in indices], recipe.token_budget):
        with autocast(recipe.dtype, device):
            values = figure.values(model, [indices[i] for i in batch])
        if counts:
            of_examples[batch] = values.float().cpu()
    every = collectives.summed_tensor(of_examples)
    require_finite(every, (examples.ids[i] for i in indices), f"{name}: the {figure.name}", _ADVICE, when)
    return (every.double().mean().item(),)


def _batches_from(step: int, examples: int, recipe: TrainingRecipe, shuffle: bool) -> Iterator[list[int]]:
    """Batches of all steps after `step`, without an end."""
    steps_per_epoch = math.ceil(examples / recipe.batch_size)
    for epoch in itertools.count(step // steps_per_epoch):
        batches = epoch_batches(examples, recipe.batch_size, recipe.seed, epoch, shuffle)
        yield from batches[max(0, step - epoch * steps_per_epoch) :]


def _short(figures: Metrics) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
