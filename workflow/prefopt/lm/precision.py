"""The precision of a forward pass."""

from __future__ import annotations

import contextlib
import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def autocast(dtype: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context of a forward pass: bfloat16 matrix products over float32 weights, or plain float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    if device.type == "cpu":
        _tell_of_processor()
    return torch.autocast(device.type, dtype=DTYPES[dtype])


def bfloat16_instructions() -> list[str] | None:
    """What the processor has for products in bfloat16, by name; None where torch does not say."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return sorted(name for name, has in known.items() if "bf16" in name and has) if known else None


@functools.cache
def _tell_of_processor() -> None:
    """Says once whether the processor has products in bfloat16; without them they are made of others, far slower."""
    found = bfloat16_instructions()
    if found:
        logger.info("bfloat16 by the processor's own instructions (%s)", ", ".join(found))
    elif found is not None:
        logger.warning(
            "warning: this processor has no products in bfloat16 and emulates them, many times slower than float32: set "
            "compute.dtype to float32."
        )


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
