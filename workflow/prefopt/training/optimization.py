"""Optimizers, learning rates and the clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def build_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float = 0.0,
    adam_beta2: float = 0.999,
    adam_eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """RMSprop (the paper's, torch's defaults) or AdamW over all parameters that take a gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=learning_rate)
    betas = (0.9, adam_beta2)
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=adam_eps)


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """What the peak learning rate is multiplied with at a step (counted from 0).

    It rises linearly over `warmup_steps` and then stays (`constant`, the paper's) or falls to zero at
    `total_steps` along a straight line (`linear`) or half a cosine (`cosine`).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients down so that their norm together is at most `max_norm`; returns what it was."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
