"""The precision of a forward pass."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def autocast(dtype: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context of a forward pass: bfloat16 matrix products over float32 weights, or plain float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[dtype])


def narrowed(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of the forward pass: autocast's where it is on, else its own.

    Norms and rotary embeddings of float32 weights give float32 under autocast too.
    """
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """float32 [N, M] of [N, K] and [K, M] of one dtype; on a GPU the sums of narrower factors are not rounded."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
