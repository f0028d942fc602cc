"""The parts of a model that are used, and what is done with its head's product, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from prefopt.lm.engine import Engine, backbone, layers_of, position_limit


@pytest.mark.parametrize(
    ("scale", "softcap", "expected"),
    [(1.0, None, 3.0), (0.5, None, 1.5), (1.0, 2.0, 2 * math.tanh(1.5)), (0.5, 2.0, 2 * math.tanh(0.75))],
)
def test_a_product_is_scaled_and_then_capped(scale: float, softcap: float | None, expected: float) -> None:
    engine = Engine("packed", "shared", scale, softcap)
    assert engine.finish_(torch.tensor([3.0])).item() == pytest.approx(expected)


def test_a_prefix_that_names_no_part_of_the_model_is_looked_for_in_it() -> None:
    inner, whole, alone = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()
    whole.base_model, whole.model, alone.base_model = whole, inner, alone
    assert backbone(whole) is inner and backbone(alone) is alone  # type: ignore[arg-type]
    assert backbone(SimpleNamespace(base_model=inner, model=alone)) is inner  # type: ignore[arg-type]


def test_the_layers_are_the_list_that_is_as_long_as_the_decoders_config_says() -> None:
    model: Any = nn.Module()
    model.model, model.config = nn.Module(), SimpleNamespace()
    model.model.lists = nn.ModuleList(nn.ModuleList(nn.Identity() for _ in range(count)) for count in (1, 2, 4))
    model.base_model = model.model
    model.config.get_text_config = lambda decoder: SimpleNamespace(num_hidden_layers=4 if decoder else 2)
    assert layers_of(model) == list(model.model.lists[2])


LONG = {"rope_type": "longrope", "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({}, None),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": 1}, 1),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default"}}, 64),
        ({"max_position_embeddings": 64, "rope_parameters": LONG}, 32),
        ({"max_position_embeddings": 64, "rope_parameters": {"full_attention": LONG, "rope_theta": 1.0}}, 32),
    ],
)
def test_the_longest_row_of_a_model(values: dict[str, Any], limit: int | None) -> None:
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(**values))
    assert position_limit(config) == limit
