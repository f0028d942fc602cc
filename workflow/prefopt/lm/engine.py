"""How a model is computed with, decided once on loading (`prefopt.lm.verify`), and the parts of it that are used."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.lm.precision import narrowed, product


@dataclasses.dataclass(frozen=True)
class Engine:
    """What the engine does with a model."""

    # How rows are read: packed into one sequence under the engine's attention, or in padded batches under the model's.
    rows: Literal["packed", "padded"]
    # How samples are drawn: each prompt's keys and values kept once for all its samples (for some models handed over as
    # one row), transformers' cache repeated for each sample, or without a cache, all rows read anew at every step. A
    # scorer draws none.
    sampling: Literal["shared", "one_row", "cached", "whole"] | None
    # What the model does with its head's product z: it makes of it softcap * tanh(scale * z / softcap).
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Logits float32 [N, V] of last hidden states [N, d] by the head's weight [V, d], of one dtype, and its bias [V]."""
        products = product(hidden, weight.t())
        return self.finish_(products if bias is None else products.add_(bias))

    def finish_(self, products: Tensor) -> Tensor:
        """Logits from the head's products, float32, in place."""
        if self.scale != 1:
            products.mul_(self.scale)
        return products if self.softcap is None else products.div_(self.softcap).tanh_().mul_(self.softcap)


def engine_of(model: nn.Module) -> Engine:
    """What was decided for a model when it was loaded."""
    engine: Engine | None = getattr(model, "engine", None)
    if engine is None:
        raise ValueError("a model that was not loaded by prefopt.lm.models: see prefopt.lm.verify")
    return engine


def backbone(model: PreTrainedModel) -> nn.Module:
    """The transformer without its head; its output has `last_hidden_state`."""
    body: nn.Module = model.base_model
    # Llama 4's prefix names a part that its language model alone does not have.
    return getattr(model, "model", body) if body is model else body


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model; empty where they cannot be told."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = (module for module in backbone(model).modules() if isinstance(module, nn.ModuleList))
    return next((list(layers) for layers in lists if len(layers) == count), [])


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The vocabulary head, which may share its weight with the embedding."""
    head: nn.Linear = model.get_output_embeddings()
    return head


def score_head(model: PreTrainedModel) -> nn.Linear:
    """A scorer's head, from hidden state to one score."""
    head: nn.Linear = model.score
    return head


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits float32 [..., V] of last hidden states, not differentiable."""
    with torch.no_grad():
        head, states = output_head(model), narrowed(hidden)
        weight, bias = head.weight.to(states.dtype), getattr(head, "bias", None)
        return engine_of(model).logits(states.flatten(0, -2), weight, bias).unflatten(0, hidden.shape[:-1])


def position_limit(config: Any) -> int | None:
    """The longest row that a model takes, or None where its config sets no limit.

    Beyond its original positions a `longrope` model turns all of a row by other angles, its first tokens too, so that
    their probabilities would depend on how long the row becomes: the limit is there.
    """
    text = config.get_text_config(decoder=True)
    limits = [getattr(text, "max_position_embeddings", None)]
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") == "longrope":
            limits.append(part.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)
