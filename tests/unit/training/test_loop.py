"""The training loop: data order, accumulation, resuming, failing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prefopt.errors import UserError
from prefopt.lm.models import load_policy
from prefopt.lm.shape import rows_flops, shape_of
from prefopt.runtime.usage import Usage
from prefopt.store.tables import read_table
from prefopt.training import loop
from prefopt.training.checkpoint import RunFolder
from prefopt.training.optimization import learning_rate_factor
from prefopt.training.recipe import TrainingRecipe
from prefopt.training.sft import table_examples
from tiny_task import TRAINING, Task

RECIPE = TrainingRecipe(**TRAINING)


@pytest.fixture
def usage() -> Usage:
    return Usage("test", torch.device("cpu"), "float32")


@pytest.fixture
def examples(task: Task) -> loop.Examples:
    return table_examples(read_table(task.demonstrations, "demonstrations"), "prompt_id", "response_ids")


def run_folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "work", {"run": 1}, needed_bytes=0)


def test_every_example_once_an_epoch_in_another_order_each_epoch() -> None:
    first, second = (loop.epoch_batches(10, 4, seed=0, epoch=epoch) for epoch in (0, 1))
    assert [len(batch) for batch in first] == [4, 4, 2]
    for batches in (first, second):
        assert sorted(i for batch in batches for i in batch) == list(range(10))
    assert first != second
    assert first == loop.epoch_batches(10, 4, seed=0, epoch=0)


def test_gradient_and_figures_do_not_depend_on_the_micro_batches(task: Task, examples: loop.Examples) -> None:
    gradients, figures = [], []
    for budget in (10_000, 30):
        model, _ = load_policy(task.model)
        recipe = dataclasses.replace(RECIPE, token_budget=budget)
        figures.append(loop.accumulate_gradients(model, examples, range(8), recipe))
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert figures[0]["loss"] > 1 and figures[0] == pytest.approx(figures[1], rel=1e-4)
    assert figures[0].keys() == {"loss", "logp"}
    for one, many in zip(*gradients, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6)


def test_loss_is_the_mean_over_tokens_of_the_whole_batch(task: Task, examples: loop.Examples) -> None:
    model, _ = load_policy(task.model)
    figures = loop.evaluate(model, examples, RECIPE)
    with torch.no_grad():
        total, tokens = 0.0, 0
        for row in examples.rows:
            ids = torch.tensor([[*row.prompt, *row.completions[0]]])
            logps = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            total -= logps[-len(row.completions[0]) :].sum().item()
            tokens += len(row.completions[0])
    assert figures["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_steps_evaluations_rates_and_what_was_used_by_hand(
    task: Task, examples: loop.Examples, usage: Usage, tmp_path: Path
) -> None:
    """16 rows by 6 are 3 batches an epoch, the last of 4; 5 steps are an epoch and two batches of the next."""
    model, _ = load_policy(task.model)
    recipe = dataclasses.replace(RECIPE, batch_size=6, evaluate_every=2, max_grad_norm=1e-3, schedule="linear")
    recipe = dataclasses.replace(recipe, epochs=None, steps=5)
    made: list[int] = []
    with run_folder(tmp_path) as opened:
        metrics = loop.train("test", model, examples, examples, recipe, opened, usage, hook=made.append)
    assert made == [0, 1, 2, 3, 4, 5]
    training = [row for row in metrics if row["split"] == "train"]
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in metrics if row["split"] == "validation"] == [0, 2, 4, 5]
    # Two steps of warm-up, then down to 0 at step 5.
    assert [row["learning_rate"] for row in training] == pytest.approx([5e-4, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])
    assert min(row["grad_norm"] for row in training) > 0.1  # before it was cut
    batches = [*loop.epoch_batches(16, 6, 0, 0), *loop.epoch_batches(16, 6, 0, 1)[:2]]
    read = [examples.rows[i] for batch in batches for i in batch]
    assert usage.examples == len(read) == 28
    assert usage.tokens == sum(len(row.prompt) + len(row.completions[0]) for row in read)
    assert usage.flops == 3 * rows_flops(shape_of(model), read)


@pytest.mark.parametrize(("better", "kept"), [(("loss", -1), 2), (("loss", 1), 1)])
def test_the_figure_and_its_sign_choose_what_is_kept(
    better: tuple[str, int], kept: int, task: Task, examples: loop.Examples, usage: Usage, tmp_path: Path
) -> None:
    model, _ = load_policy(task.model)
    scripted = iter([1.0, 1.5, 0.5, 0.75])  # before the first step and after each of three
    recipe = dataclasses.replace(RECIPE, evaluate_every=1, keep="best", token_budget=10_000)
    recipe = dataclasses.replace(recipe, epochs=None, steps=3)

    def losses(model: nn.Module, indices: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.full((len(examples.ids),), next(scripted)), {}

    validation = dataclasses.replace(examples, losses=losses, weights=[1.0] * len(examples.ids))  # type: ignore[arg-type]
    weights: list[torch.Tensor] = []

    def keep(step: int) -> None:
        weights.append(next(model.parameters()).detach().clone())

    with run_folder(tmp_path) as opened:
        loop.train(*("test", model, examples, validation, recipe, opened, usage), better=better, hook=keep)
    assert [torch.equal(next(model.parameters()), each) for each in weights] == [step == kept for step in range(4)]


def test_examples_come_in_the_given_order_where_they_are_not_shuffled() -> None:
    assert loop.epoch_batches(5, 2, seed=3, epoch=1, shuffle=False) == [[0, 1], [2, 3], [4]]
    assert loop.epoch_batches(5, 5, seed=3, epoch=0) != loop.epoch_batches(5, 5, seed=4, epoch=0)


def test_a_training_takes_them_in_that_order_and_tells_the_loss_of_each_step(
    task: Task, examples: loop.Examples, usage: Usage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(RECIPE, batch_size=8, epochs=2, evaluate_every=100, token_budget=10_000)
    given: list[list[int]] = []
    told: list[float] = []

    def losses(model: nn.Module, indices: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        given.append([*indices])
        return examples.losses(model, indices)

    monkeypatch.setattr(loop.Progress, "update", lambda self, count, **figures: told.append(figures["loss"]))
    watched = dataclasses.replace(examples, losses=losses)  # type: ignore[arg-type]
    with run_folder(tmp_path) as opened:
        model, _ = load_policy(task.model)
        metrics = loop.train("test", model, watched, examples, recipe, opened, usage, shuffle=False)
    assert [sorted(batch) for batch in given] == [[*range(8)], [*range(8, 16)]] * 2
    assert told == [row["loss"] for row in metrics if row["split"] == "train"]


def test_a_gradient_is_multiplied_by_the_processes_over_which_it_is_averaged(
    task: Task, examples: loop.Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradient() -> torch.Tensor:
        model, _ = load_policy(task.model)
        loop.accumulate_gradients(model, examples, range(4), RECIPE)
        return next(model.parameters()).grad  # type: ignore[return-value]

    alone = gradient()
    monkeypatch.setattr(loop, "processes", SimpleNamespace(count=lambda: 3))
    torch.testing.assert_close(gradient(), 3 * alone)


class Killed(Exception):
    """Stands for a process that dies between two steps."""


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("killed_after", [1, 4, 7])
def test_a_killed_run_resumes_to_the_same_bits(
    keep: str, killed_after: int, task: Task, examples: loop.Examples, usage: Usage, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, keep=keep)

    def run(folder: Path, stop_after: int | None) -> tuple[nn.Module, list[dict[str, object]]]:
        model, _ = load_policy(task.model)
        calls = 0

        def losses(model: nn.Module, indices: object) -> object:
            nonlocal calls
            if torch.is_grad_enabled():
                calls += 1
                if stop_after is not None and calls > stop_after:
                    raise Killed
            return examples.losses(model, indices)  # type: ignore[arg-type]

        watched = dataclasses.replace(examples, losses=losses)  # type: ignore[arg-type]
        with run_folder(folder) as opened:
            return model, loop.train("test", model, watched, examples, recipe, opened, usage)

    whole, whole_metrics = run(tmp_path / "whole", None)
    with pytest.raises(Killed):
        run(tmp_path / "killed", killed_after)
    resumed, resumed_metrics = run(tmp_path / "killed", None)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert resumed_metrics == whole_metrics
    assert [row["step"] for row in whole_metrics if row["split"] == "train"] == list(range(1, 9))


def test_training_lowers_the_loss_and_best_is_the_lowest(
    task: Task, examples: loop.Examples, usage: Usage, tmp_path: Path
) -> None:
    model, _ = load_policy(task.model)
    # A rate so high that the loss does not fall steadily.
    recipe = dataclasses.replace(RECIPE, keep="best", learning_rate=0.03, epochs=4, evaluate_every=1)
    with run_folder(tmp_path) as opened:
        metrics = loop.train("test", model, examples, examples, recipe, opened, usage)
    losses = [row["loss"] for row in metrics if row["split"] == "validation"]
    assert min(losses) < losses[0] - 0.5
    assert loop.evaluate(model, examples, recipe)["loss"] == pytest.approx(min(losses), rel=1e-6)


def test_a_loss_that_is_not_finite_names_step_rate_and_rows(
    task: Task, examples: loop.Examples, usage: Usage, tmp_path: Path
) -> None:
    model, _ = load_policy(task.model)
    broken = dataclasses.replace(
        examples, losses=lambda model, indices: (examples.losses(model, indices)[0] * float("nan"), {})
    )
    with run_folder(tmp_path) as opened, pytest.raises(UserError, match=r"nan at step 0 .*0\.0005.* p\d+") as error:
        loop.train("sft", model, broken, examples, RECIPE, opened, usage)
    assert str(error.value).count("p") >= 4


def test_two_processes_never_share_a_run(tmp_path: Path) -> None:
    with (
        run_folder(tmp_path),
        pytest.raises(UserError, match="in use by another training process"),
        run_folder(tmp_path),
    ):
        pass
    with run_folder(tmp_path):
        pass


def test_another_recipe_has_another_folder(tmp_path: Path) -> None:
    assert RunFolder(tmp_path, {"beta": 0.1}, 0).path != RunFolder(tmp_path, {"beta": 0.2}, 0).path


def test_a_full_disk_is_noticed_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MiB are needed"), RunFolder(tmp_path, {}, needed_bytes=2**60):
        pass


def test_warm_up_and_schedules() -> None:
    assert [learning_rate_factor(step, 10, 4, "constant") for step in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1, 1, 1]
    assert [learning_rate_factor(step, 10, 0, "linear") for step in (0, 5)] == [1.0, 0.5]
    assert learning_rate_factor(7, 10, 4, "cosine") == pytest.approx(0.5)


def test_metrics_are_json_lines(tmp_path: Path) -> None:
    loop.write_metrics(tmp_path / "m.jsonl", [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}])
    assert [json.loads(line)["loss"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [0.5, 0.25]
