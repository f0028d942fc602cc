"""The precision of a forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prefopt.lm.precision import autocast


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_products_are_made_in_the_asked_precision(dtype: str, expected: torch.dtype) -> None:
    with autocast(dtype, torch.device("cpu")):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected
