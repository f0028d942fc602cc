"""The precision of a forward pass."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from prefopt.lm import precision
from prefopt.lm.precision import autocast, narrowed, product


class CalledOperators(TorchDispatchMode):
    """Keeps the operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(operator)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_products_are_made_in_the_asked_precision(dtype: str, expected: torch.dtype) -> None:
    with autocast(dtype, torch.device("cpu")):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


def test_float32_is_left_alone_and_bfloat16_is_asked_for_by_name() -> None:
    with warnings.catch_warnings(action="error"), torch.autocast("cpu", dtype=torch.float16):
        with autocast("float32", torch.device("cpu")):
            assert torch.get_autocast_dtype("cpu") == torch.float16
        with autocast("bfloat16", torch.device("cpu")):
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_a_tensor_is_narrowed_where_autocast_is_on() -> None:
    tensor = torch.ones(2)
    assert narrowed(tensor) is tensor
    with autocast("bfloat16", torch.device("cpu")):
        assert narrowed(tensor).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_narrow_factors_is_float32(device: str, dtype: torch.dtype) -> None:
    """Shapes and precisions of a GPU's tensors can be computed without one."""
    with FakeTensorMode():
        left, right = torch.ones(2, 3, device=device, dtype=dtype), torch.ones(3, 4, device=device, dtype=dtype)
        with CalledOperators() as called:
            made = product(left, right)
    assert (made.shape, made.dtype, made.device.type) == ((2, 4), torch.float32, device)
    unrounded = torch.ops.aten.mm.dtype if (device, dtype) == ("cuda", torch.bfloat16) else torch.ops.aten.mm.default
    assert unrounded in called.operators


@pytest.mark.parametrize(
    ("capabilities", "said"),
    [
        (
            {"avx2": True, "avx512_bf16": True, "amx_bf16": True},
            ["bfloat16 by the processor's own instructions (amx_bf16"],
        ),
        ({"avx2": True, "avx512_bf16": False}, ["warning: this processor has no products in bfloat16"]),
        ({}, []),
    ],
)
def test_a_processor_says_once_whether_it_has_bfloat16(
    capabilities: dict[str, bool], said: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    precision._tell_of_processor.cache_clear()
    with caplog.at_level("INFO", logger="prefopt.lm.precision"):
        for _ in range(2):
            autocast("float32", torch.device("cpu"))
            autocast("bfloat16", torch.device("cpu"))
    assert [message[: len(text)] for message, text in zip(caplog.messages, said, strict=True)] == said
    precision._tell_of_processor.cache_clear()
