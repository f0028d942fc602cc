"""Objectives on pairs: loss and gradients equal those of TRL's trainers on the same batch."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from prefopt.lm.batching import Row
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import load_policy, save_model
from prefopt.objectives import Pairs, odds_ratio_loss, simpo
from prefopt.training.kto import KTORecipe, label_examples
from prefopt.training.loop import accumulate_gradients
from prefopt.training.preference import PreferenceRecipe, preference_examples
from prefopt.training.pretrain import PretrainRecipe, new_model, train_tokenizer

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[peers]'")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.peers

TRAINING: dict[str, Any] = {
    "epochs": 1,
    "steps": None,
    "batch_size": 3,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 10.0,
    "optimizer": "rmsprop",
    "weight_decay": 0.0,
    "evaluate_every": 1,
    "checkpoint_every": 1,
    "keep": "last",
    "token_budget": 40,
    "dtype": "float32",
    "seed": 0,
    "activation_checkpointing": False,
    "adapter": None,
}
SHAPE: dict[str, Any] = {
    **{"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "layers": 2, "heads": 2, "max_positions": 64},
    **{"initializer_range": 0.02, "short_tokens": 0, "short_first": 0},
}
PAIRS = [
    ("my dog", " ate the red shoe", " barked"),
    ("i feel sad because my dog", " is gone", " ate the shoe and i bought a new one"),
    ("should i buy", " a shoe", " a dog"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer([" ".join(pair) for pair in PAIRS], 300)
    save_model(tmp_path / "model", new_model(PretrainRecipe(**TRAINING, **SHAPE), tokenizer), tokenizer, {})
    return tmp_path


def trl_loss(folder: Path, model: nn.Module, reference: nn.Module, pairs: list[tuple[str, str, str]], **options: Any):  # type: ignore[no-untyped-def]
    """TRL's loss on one batch of these pairs, and the batch itself; the gradient is left in `model`."""
    _, tokenizer = load_policy(folder / "model")
    columns = {name: [pair[i] for pair in pairs] for i, name in enumerate(("prompt", "chosen", "rejected"))}
    arguments = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(pairs),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **options,
    )
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.item(), batch


def completions_of(batch: dict[str, torch.Tensor], prefix: str = "") -> list[tuple[list[int], list[int]]]:
    """Token ids of each prompt and completion of a batch."""
    columns = (batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask"))
    return [
        (ids[attention.bool() & ~completion.bool()].tolist(), ids[completion.bool()].tolist())
        for ids, attention, completion in zip(*columns, strict=True)
    ]


def rows_of(batch: dict[str, torch.Tensor]) -> list[Row]:
    """The batch's own tokens, chosen in its first half and rejected in its second."""
    prompts, completions = zip(*completions_of(batch), strict=True)
    half = len(prompts) // 2
    assert prompts[:half] == prompts[half:]
    return [
        Row(p, pair) for p, pair in zip(prompts, zip(completions[:half], completions[half:], strict=True), strict=False)
    ]


def models(folder: Path) -> tuple[Any, Any, Any, Any]:
    """A policy and another one as the reference, and the same two with transformers' own attention, as a TRL user has."""
    ours, _ = load_policy(folder / "model")
    reference = copy.deepcopy(ours)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs, their_reference = (type(ours).from_pretrained(folder / "model") for _ in range(2))
    their_reference.load_state_dict(reference.state_dict())
    return ours, reference, theirs, their_reference


def same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("values", "options", "pairs"),
    [
        ({}, {"loss_type": "sigmoid"}, PAIRS),
        ({"loss": "ipo"}, {"loss_type": "ipo"}, PAIRS),
        # TRL's sigmoid loss ignores label smoothing. Its AOT loss on a single pair, where sorting does nothing, is
        # conservative DPO.
        ({"label_smoothing": 0.1}, {"loss_type": "aot", "label_smoothing": 0.1}, PAIRS[1:2]),
        ({"loss": "hinge"}, {"loss_type": "hinge"}, PAIRS),
        ({"loss": "robust", "label_smoothing": 0.1}, {"loss_type": "robust", "label_smoothing": 0.1}, PAIRS),
        ({"length_normalized": True}, {"loss_type": "sigmoid_norm"}, PAIRS),
        # TRL averages its likelihood over all tokens of a batch, where the paper's is of a token of each pair: of one pair
        # they are the same.
        ({"nll_weight": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, PAIRS[1:2]),
    ],
)
def test_loss_and_gradients_equal_trls(
    values: dict[str, Any], options: dict[str, Any], pairs: list[tuple[str, str, str]], folder: Path
) -> None:
    ours, reference, theirs, their_reference = models(folder)
    their_loss, batch = trl_loss(folder, theirs, their_reference, pairs, beta=0.3, **options)

    rows = rows_of(batch)
    with torch.no_grad():
        logps = completion_logprobs(reference, rows).sums.view(-1, 2)
    table = pd.DataFrame({"chosen_logp": logps[:, 0], "rejected_logp": logps[:, 1]})
    frame = pd.DataFrame(
        {
            "pair_id": [str(i) for i in range(len(rows))],
            "prompt_ids": [torch.tensor(row.prompt).numpy() for row in rows],
            "chosen_ids": [torch.tensor(row.completions[0]).numpy() for row in rows],
            "rejected_ids": [torch.tensor(row.completions[1]).numpy() for row in rows],
        }
    )
    every = {"loss": "sigmoid", "beta": 0.3, "label_smoothing": 0.0, "nll_weight": 0.0, "length_normalized": False}
    recipe = PreferenceRecipe(**TRAINING, objective="dpo", values={**every, **values})
    examples = preference_examples(frame, table, recipe)
    figures = accumulate_gradients(ours, examples, range(len(rows)), recipe)

    assert figures["loss"] == pytest.approx(their_loss, abs=1e-5)
    same_gradients(ours, theirs)


LABELS = [
    ("my dog", " ate the red shoe", True),
    ("i feel sad because my dog", " is gone", False),
    ("should i buy", " a shoe", True),
    ("my dog", " barked", False),
    ("should i buy", " a dog and a new one because my dog is gone", True),
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("budget", [40, 1000])
def test_kto_in_micro_batches_is_trls_on_the_whole_batch(turned: bool, budget: int, folder: Path) -> None:
    """TRL estimates the KL on one micro-batch, which is the whole batch here; turned, the estimate is below zero."""
    ours, reference, theirs, their_reference = models(folder)
    if turned:
        ours, reference = reference, ours
        theirs, their_reference = their_reference, theirs
    arguments = trl.KTOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(LABELS),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        beta=0.3,
        desirable_weight=1.25,
        undesirable_weight=0.75,
    )
    columns = {name: [row[i] for row in LABELS] for i, name in enumerate(("prompt", "completion", "label"))}
    trainer = trl.KTOTrainer(
        model=theirs,
        ref_model=their_reference,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=load_policy(folder / "model")[1],
    )
    batch = next(iter(trainer.get_train_dataloader()))
    their_loss = trainer.compute_loss(theirs, batch)
    their_loss.backward()

    matched, others = completions_of(batch), completions_of(batch, "KL_")
    assert [prompt for prompt, _ in matched] == [prompt for prompt, _ in others]
    rows = [Row(prompt, (completion, other)) for (prompt, completion), (_, other) in zip(matched, others, strict=True)]
    with torch.no_grad():
        logps = completion_logprobs(reference, rows).sums.view(-1, 2)
    labels = pd.DataFrame(
        {
            "example_id": [str(i) for i in range(len(rows))],
            "label": [bool(label) for label in batch["label"]],
            "prompt_ids": [np.array(row.prompt) for row in rows],
            "completion_ids": [np.array(row.completions[0]) for row in rows],
            "mismatched_ids": [np.array(row.completions[1]) for row in rows],
        }
    )
    table = pd.DataFrame({"completion_logp": logps[:, 0], "mismatched_logp": logps[:, 1]})
    values = {**TRAINING, "token_budget": budget}
    recipe = KTORecipe(**values, beta=0.3, desirable_weight=1.25, undesirable_weight=0.75)
    figures = accumulate_gradients(ours, label_examples(labels, table, recipe), range(len(rows)), recipe)
    assert figures["loss"] == pytest.approx(their_loss.item(), abs=1e-5)
    assert figures["kl"] == pytest.approx(trainer._metrics["eval"]["kl"][-1], abs=1e-5)
    assert (figures["kl"] == 0) == turned
    same_gradients(ours, theirs)


def test_simpo_and_orpo_are_those_of_trls_own_losses() -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    orpo = pytest.importorskip("trl.experimental.orpo")
    torch.manual_seed(0)
    lengths = torch.tensor([3, 7, 2]), torch.tensor([5, 2, 4])
    chosen, rejected = (-n * torch.rand(3) - 0.1 for n in lengths)
    pairs = Pairs(chosen, rejected, None, None, *lengths)
    means = (chosen / lengths[0], rejected / lengths[1])
    told = SimpleNamespace(
        **{"loss_type": "simpo", "simpo_gamma": 1.0, "beta": 2.0, "label_smoothing": 0.0, "alpha": 0.0},
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    theirs, *_ = cpo.CPOTrainer.cpo_loss(told, *means)
    torch.testing.assert_close(simpo(pairs, beta=2.0, margin=1.0).losses, theirs)
    odds = orpo.ORPOTrainer.odds_ratio_loss(told, *means)[0]
    torch.testing.assert_close(2.0 * odds_ratio_loss(*means), -odds)
