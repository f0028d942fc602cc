"""Steps of the optimizers by hand, learning rates, and the norm of gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from prefopt.training import optimization


def one_weight(gradient: float) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    model.weight.grad = torch.tensor([[gradient]])
    return model


def test_a_step_of_rmsprop_by_hand() -> None:
    model = one_weight(3.0)
    optimization.build_optimizer(model, "rmsprop", 0.1, weight_decay=0.5).step()
    # torch's defaults: a mean square over 0.99, and no decay of weights.
    assert model.weight.item() == pytest.approx(2 - 0.1 * 3 / math.sqrt(0.01 * 9), rel=1e-5)


def test_two_steps_of_adamw_by_hand() -> None:
    model = one_weight(3.0)
    optimizer = optimization.build_optimizer(model, "adamw", 0.1, weight_decay=0.5, adam_beta2=0.95, adam_eps=1.0)
    optimizer.step()
    model.weight.grad.fill_(1.0)  # type: ignore[union-attr]
    optimizer.step()
    after_one = 2 * (1 - 0.1 * 0.5) - 0.1 * 3 / (3 + 1)
    mean = (0.9 * 0.1 * 3 + 0.1 * 1) / (1 - 0.9**2)
    square = (0.95 * 0.05 * 9 + 0.05 * 1) / (1 - 0.95**2)
    expected = after_one * (1 - 0.1 * 0.5) - 0.1 * mean / (math.sqrt(square) + 1)
    assert model.weight.item() == pytest.approx(expected, rel=1e-5)


def test_adamw_has_torchs_values_unless_others_are_asked_for() -> None:
    values = optimization.build_optimizer(one_weight(1.0), "adamw", 0.1).defaults
    assert (values["betas"], values["eps"], values["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.0)


def test_frozen_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    (group,) = optimization.build_optimizer(model, "rmsprop", 0.1).param_groups
    assert [p is q for p, q in zip(group["params"], model[1].parameters(), strict=True)] == [True, True]


RATES = {
    "linear": {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 9: 0.125},
    "cosine": {1: 1.0, 2: 1.0, 4: 0.5 + math.sqrt(0.125), 6: 0.5, 10: 0.0},
    "constant": {0: 0.5, 1: 1.0, 99: 1.0},
}


@pytest.mark.parametrize("schedule", RATES)
def test_the_rate_rises_over_the_warm_up_and_falls_to_zero(schedule: str) -> None:
    found = {step: optimization.learning_rate_factor(step, 10, 2, schedule) for step in RATES[schedule]}
    assert found == pytest.approx(RATES[schedule], abs=1e-12)


def test_a_run_that_is_all_warm_up_ends_at_its_full_rate() -> None:
    assert optimization.learning_rate_factor(4, 4, 4, "linear") == 1.0


def test_gradients_are_scaled_down_to_the_norm_and_never_up() -> None:
    model = nn.Linear(2, 1, bias=False)
    for given, most, kept in (([3.0, 4.0], 1.0, [0.6, 0.8]), ([0.3, 0.4], 1.0, [0.3, 0.4])):
        model.weight.grad = torch.tensor([given])
        assert optimization.clip_gradients(model.parameters(), most) == pytest.approx(math.hypot(*given))
        assert model.weight.grad[0].tolist() == pytest.approx(kept, rel=1e-4)


def test_the_rate_is_set_for_every_group() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=1.0)
    optimization.set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
