"""Adapters: nothing changes at first, only they learn, and a merged model computes what the adapted one does."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

from prefopt.lm.adapter import AdapterRecipe, add_adapter, merged
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.sharding import recompute_activations, whole_weights
from prefopt.lm.verify import use_engine
from test_logprobs import ROWS
from tiny_models import make_model

RECIPE = AdapterRecipe(rank=2, alpha=4)


def test_an_adapter_starts_as_nothing_learns_alone_and_merges_exactly(architecture: str) -> None:
    plain, adapted = make_model(architecture, engine=True), make_model(architecture, engine=True)
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    add_adapter(adapted, RECIPE, seed=0)
    expected = completion_logprobs(plain, ROWS).sums
    torch.testing.assert_close(completion_logprobs(adapted, ROWS).sums, expected, rtol=0, atol=0)

    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        completion_logprobs(adapted, ROWS).sums.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    frozen = {name.replace(".base_layer", ""): p for name, p in adapted.named_parameters() if "lora_" not in name}
    assert frozen.keys() == before.keys() and all(torch.equal(frozen[name], before[name]) for name in before)
    learnt = completion_logprobs(adapted, ROWS).sums
    assert (learnt - expected).abs().min() > 0.01

    whole = use_engine(merged(type(plain)(plain.config), whole_weights(adapted), RECIPE).eval())
    assert {name for name, _ in whole.named_parameters()} == before.keys()
    torch.testing.assert_close(completion_logprobs(whole, ROWS).sums, learnt, rtol=1e-5, atol=1e-4)


def test_the_seed_decides_the_first_matrices_and_no_other_draw() -> None:
    models = [make_model("llama", engine=True) for _ in range(3)]
    state = torch.get_rng_state()
    first, other, again = (add_adapter(model, RECIPE, seed) for model, seed in zip(models, (1, 2, 1), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    matrices = [
        [module.weight for name, module in model.named_modules() if "lora_A" in name and isinstance(module, nn.Linear)]
        for model in (first, other, again)
    ]
    assert all(torch.equal(a, b) for a, b in zip(matrices[0], matrices[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(matrices[0], matrices[1], strict=True))


def test_weights_of_another_model_are_refused() -> None:
    adapted = add_adapter(make_model("llama", engine=True), RECIPE, seed=0)
    with pytest.raises(ValueError, match="weights of another model"):
        merged(make_model("gpt2", engine=True), whole_weights(adapted), RECIPE)
    weights = whole_weights(adapted)
    name = next(name for name in weights if "lora_A" in name)
    with pytest.raises(ValueError, match=f"weights of another model: {re.escape(name)} does not fit"):
        merged(make_model("llama", engine=True), {key: weights[key] for key in weights if key != name}, RECIPE)
    with pytest.raises(ValueError, match="weights of another model: more does not fit"):
        merged(make_model("llama", engine=True), {**weights, "more": weights[name]}, RECIPE)


def test_an_adapters_matrices_have_its_rank_and_a_fresh_head_learns_beside_them() -> None:
    for head in ("score", "classifier"):
        model = make_model("llama", engine=True)
        model.add_module(head, nn.Linear(16, 1))
        adapted = add_adapter(model, RECIPE, seed=0)
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        matrices = [p for name, p in trained.items() if "lora_A" in name]
        assert matrices and all(p.shape[0] == 2 for p in matrices)
        assert any(name.startswith(head) and "lora_" not in name for name in trained)


def test_peft_is_told_how_weights_lie_and_has_nothing_to_correct(architecture: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_adapter(make_model(architecture, engine=True), RECIPE, seed=0)


def test_activations_computed_again_give_the_same_gradients(architecture: str) -> None:
    gradients, passes = [], []
    for recompute in (False, True):
        model = make_model(architecture, engine=True)
        if recompute:
            recompute_activations(model)
        calls: list[object] = []
        norm = next(module for name, module in model.named_modules() if name.endswith(("ln_1", "input_layernorm")))
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        completion_logprobs(model, ROWS).sums.sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        passes.append(len(calls))
    assert passes == [1, 2]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)
