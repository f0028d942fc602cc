"""KTO: one estimate of the KL for a whole batch, by brute force, in micro-batches and as a stage."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from prefopt.errors import UserError
from prefopt.lm.models import load_policy, tokenizer_hash, weights_hash
from prefopt.lm.shape import rows_flops, shape_of
from prefopt.lm.verify import use_engine
from prefopt.store.tables import read_manifest, read_table
from prefopt.training import kto, loop, reference
from tiny_task import TRAINING, Task, recipe

VALUES: dict[str, Any] = {"beta": 0.5, "desirable_weight": 1.25, "undesirable_weight": 0.75}
RECIPE = kto.KTORecipe(**TRAINING, **VALUES)


@pytest.fixture(scope="module")
def reference_table(task: Task) -> Path:
    out = task.folder / "reference_labels.parquet"
    arguments = {"model": task.model, "data": task.labels, "out": out}
    reference.run(argparse.Namespace(**arguments, recipe='{"token_budget": 128, "dtype": "float32"}'))
    return out


@pytest.fixture
def moved(task: Task) -> PreTrainedModel:
    """A policy that is not the reference any more."""
    model, _ = load_policy(task.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def examples_of(task: Task, reference_table: Path, recipe: kto.KTORecipe = RECIPE) -> loop.Examples:
    labels = read_table(task.labels, "labels")
    return kto.label_examples(labels, reference.read_reference(reference_table, task.model, labels), recipe)


def logp(model: nn.Module, prompt: Any, completion: Any) -> float:
    """By the model's own forward pass over one row."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    return float(logps[-len(completion) :].sum())


# --- the estimate, where every completion can be listed

TWO_TOKENS = LlamaConfig(
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 2},
    **{"max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
)
PROMPTS = [(0,), (1,), (0, 1, 1)]
EVERY = list(itertools.product((0, 1), repeat=4))  # completions of four tokens


def two_tokens(seed: int) -> PreTrainedModel:
    """A model of two tokens; with the seed 0 each is always as probable as the other."""
    torch.manual_seed(seed)
    model = use_engine(AutoModelForCausalLM.from_config(TWO_TOKENS, attn_implementation="eager").eval())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
        model.lm_head.weight.mul_(min(seed, 1))
    return model


def probabilities(model: PreTrainedModel, prompt: tuple[int, ...]) -> np.ndarray:
    found = np.exp([logp(model, prompt, completion) for completion in EVERY])
    assert found.sum() == pytest.approx(1, abs=1e-5)
    return found


@pytest.mark.parametrize(("policy", "other"), [(0, 1), (1, 0)])
def test_the_estimate_is_the_kl_where_mismatched_completions_are_the_policys_own(policy: int, other: int) -> None:
    """Mismatched completions that come as often as a policy without preferences writes them give its KL; under any other
    policy the mean log-ratio is minus the KL from no preferences to it, and the estimate 0."""
    model, known = two_tokens(policy), two_tokens(other)
    rows = [(prompt, completion) for prompt in PROMPTS for completion in EVERY]
    labels = pd.DataFrame(
        {
            "example_id": [str(i) for i in range(len(rows))],
            "label": [i % 2 == 0 for i in range(len(rows))],
            "prompt_ids": [np.array(prompt) for prompt, _ in rows],
            "completion_ids": [np.array([1])] * len(rows),
            "mismatched_ids": [np.array(completion) for _, completion in rows],
        }
    )
    cached = pd.DataFrame(
        {
            "completion_logp": np.float32([logp(known, prompt, [1]) for prompt, _ in rows]),
            "mismatched_logp": np.float32([logp(known, prompt, completion) for prompt, completion in rows]),
        }
    )
    figures = loop.evaluate(model, kto.label_examples(labels, cached, RECIPE), RECIPE)
    kls = []
    for prompt in PROMPTS:
        p, q = probabilities(model, prompt), probabilities(known, prompt)
        kls.append(float((p * np.log(p / q)).sum()))
    assert min(kls) > 0.1
    assert figures["kl"] == (pytest.approx(np.mean(kls), rel=1e-4) if policy == 0 else 0)


# --- one estimate for a batch


def test_a_batchs_loss_by_hand(task: Task, reference_table: Path, moved: PreTrainedModel) -> None:
    labels = read_table(task.labels, "labels").head(7)
    own, _ = load_policy(task.model)

    def log_ratios(side: str) -> np.ndarray:
        rows = zip(labels["prompt_ids"], labels[f"{side}_ids"], strict=True)
        return np.array([logp(moved, *row) - logp(own, *row) for row in rows])

    ratios, others = log_ratios("completion"), log_ratios("mismatched")
    estimate = max(0.0, others.mean())
    signs = np.where(labels["label"], 1, -1)
    margins = 0.5 * signs * (ratios - estimate)
    losses = np.where(labels["label"], 1.25, 0.75) * (1 - 1 / (1 + np.exp(-margins)))
    figures = loop.accumulate_gradients(moved, examples_of(task, reference_table), range(7), RECIPE)
    assert figures == {
        "loss": pytest.approx(losses.mean(), abs=1e-5),
        "kl": pytest.approx(estimate, abs=1e-5),
        "kto_margin": pytest.approx(margins.mean(), abs=1e-5),
        "kto_accuracy": pytest.approx((margins > 0).mean()),
    }


def test_the_estimate_and_the_gradient_do_not_depend_on_the_micro_batches(
    task: Task, reference_table: Path, moved: PreTrainedModel
) -> None:
    examples = examples_of(task, reference_table)
    found = []
    for budget in (10_000, 20):
        moved.zero_grad()
        small = dataclasses.replace(RECIPE, token_budget=budget)
        figures = loop.accumulate_gradients(moved, examples, range(11), small)
        found.append((figures, [parameter.grad.clone() for parameter in moved.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for one, many in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6)


def test_validation_has_one_estimate_over_all_of_it(task: Task, reference_table: Path, moved: PreTrainedModel) -> None:
    examples = examples_of(task, reference_table)
    estimate = examples.batch_mean
    assert estimate is not None
    with torch.no_grad():
        mean = estimate.values(moved, range(len(examples.ids))).mean().item()
        losses, _ = examples.losses(moved, range(len(examples.ids)), mean)
    assert loop.evaluate(moved, examples, RECIPE)["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_no_gradient_flows_through_the_estimate(task: Task, reference_table: Path, moved: PreTrainedModel) -> None:
    examples = examples_of(task, reference_table)
    estimate = examples.batch_mean
    assert estimate is not None
    loop.accumulate_gradients(moved, examples, range(8), RECIPE)
    gradients = [parameter.grad.clone() for parameter in moved.parameters()]
    moved.zero_grad()
    mean = estimate.values(moved, range(8)).mean().item()
    (examples.losses(moved, range(8), mean)[0].mean()).backward()
    for one, other in zip(gradients, moved.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-6)


def test_losses_are_where_the_model_is(task: Task, reference_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that only knows shapes."""
    sums = SimpleNamespace(sums=torch.zeros(3, device="meta"))
    monkeypatch.setattr(kto, "completion_logprobs", lambda model, rows: sums)
    losses, figures = examples_of(task, reference_table).losses(nn.Identity(), [0, 1, 2], 0.5)
    assert {values.device.type for values in (losses, *figures.values())} == {"meta"}


def test_what_is_read_for_the_estimate_is_counted(task: Task, reference_table: Path, moved: PreTrainedModel) -> None:
    examples = examples_of(task, reference_table)
    estimate, shape = examples.batch_mean, shape_of(moved)
    assert estimate is not None
    own, others = examples.rows[3:6], estimate.rows[3:6]
    assert examples.flops(shape, range(3, 6), 3) == 3 * rows_flops(shape, own) + rows_flops(shape, others)
    assert examples.tokens(range(3, 6)) == sum(row.tokens for row in (*own, *others))


def test_a_mismatched_completion_without_a_number_is_named(task: Task, reference_table: Path) -> None:
    model, _ = load_policy(task.model)
    examples = examples_of(task, reference_table)
    assert examples.batch_mean is not None
    odd = dataclasses.replace(
        examples.batch_mean,
        values=lambda model, indices: torch.tensor([float("nan") if i == 3 else 0.0 for i in indices]),
    )
    name = examples.ids[3]
    with pytest.raises(
        UserError, match=f"^kto: the log-ratio of the mismatched completion is nan at step 1 for {name}: lower"
    ):
        loop.accumulate_gradients(
            model, dataclasses.replace(examples, batch_mean=odd), range(8), RECIPE, "kto", " at step 1"
        )


# --- weights


def labels_of(desirable: int, undesirable: int) -> pd.DataFrame:
    return pd.DataFrame({"label": [True] * desirable + [False] * undesirable})


@pytest.mark.parametrize(
    ("desirable", "undesirable", "weight", "fits"),
    [(10, 10, 1.0, True), (12, 9, 1.0, True), (8, 9, 1.0, False), (15, 10, 1.0, False), (3, 9, 3.9, True)],
)
def test_weights_beyond_the_papers_balance_are_told(
    desirable: int, undesirable: int, weight: float, fits: bool
) -> None:
    recipe = dataclasses.replace(RECIPE, desirable_weight=weight, undesirable_weight=1.0)
    assert (kto.balance_warning(labels_of(desirable, undesirable), recipe) is None) == fits


def test_what_a_warning_says() -> None:
    recipe = dataclasses.replace(RECIPE, desirable_weight=1.0, undesirable_weight=2.0)
    assert kto.balance_warning(labels_of(10, 30), recipe) == (
        "10 desirable examples of weight 1 to 30 undesirable ones of weight 2 are 0.17 to 1, where KTO's authors recommend "
        "1.00 to 1.33: with desirable_weight from 6.00 to 8.00 they are."
    )
    assert kto.balance_warning(labels_of(0, 4), recipe) == (
        "all 4 training examples have one label, and nothing to be told from."
    )


# --- the stage


def test_the_tables_manifest_says_what_was_computed_from_what(task: Task, reference_table: Path) -> None:
    manifest = read_manifest(reference_table)
    assert manifest["labels"] == read_manifest(task.labels)["content_hash"] and "preferences" not in manifest
    assert manifest["model_weights"] == weights_hash(task.model)
    model, _ = load_policy(task.model)
    labels, cached = read_table(task.labels, "labels"), read_table(reference_table, "reference_label_logprobs")
    for row, known in zip(labels.itertuples(), cached.itertuples(), strict=True):
        assert known.completion_logp == pytest.approx(logp(model, row.prompt_ids, row.completion_ids), abs=1e-4)
        assert known.mismatched_logp == pytest.approx(logp(model, row.prompt_ids, row.mismatched_ids), abs=1e-4)
    assert cached["mismatched_tokens"].tolist() == [len(ids) for ids in labels["mismatched_ids"]]


def test_a_table_of_pairs_is_refused(task: Task, reference_table: Path) -> None:
    pairs = read_table(task.preferences, "preferences")
    with pytest.raises(UserError, match="holds the table 'reference_label_logprobs', expected 'reference_logprobs'"):
        reference.read_reference(reference_table, task.model, pairs)


def test_kto_learns_the_training_labels_and_publishes(
    task: Task, reference_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    values = {**VALUES, "desirable_weight": 2.0, "epochs": 8, "learning_rate": 2e-3}
    arguments = argparse.Namespace(
        by_step=None,
        model=task.model,
        data=task.labels,
        reference=reference_table,
        recipe=recipe(**values),
        work=tmp_path / "work",
        out=tmp_path / "kto",
        metrics=tmp_path / "kto.jsonl",
    )
    kto.run(arguments)
    metrics = [json.loads(line) for line in arguments.metrics.read_text().splitlines()]
    training = [row for row in metrics if row["split"] == "train"]
    # The policy is the reference at first: each loss is half its weight.
    assert metrics[0]["split"] == "validation"
    assert metrics[0]["loss"] == pytest.approx((2.0 + 0.75) / 4, abs=1e-4)
    assert (metrics[0]["kl"], metrics[0]["kto_margin"]) == (pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-5))
    assert training[-1]["kto_margin"] > 0.05 and training[-1]["kto_accuracy"] >= 0.75
    manifest = json.loads((arguments.out / "manifest.json").read_text())
    assert manifest["identity"]["inputs"] == {
        "data": read_manifest(task.labels)["content_hash"],
        "reference_weights": weights_hash(task.model),
        "reference_tokenizer": tokenizer_hash(task.model),
    }
    assert (manifest["used"]["stage"], manifest["used"]["examples"]) == ("kto", 8 * 24)
    assert "warning: 12 desirable examples of weight 2 to 12 undesirable ones" in caplog.text
