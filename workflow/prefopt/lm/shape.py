"""The shape of a model, and the operations of reading rows with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefopt.lm.batching import Row
from prefopt.lm.engine import backbone, output_head, score_head
from prefopt.lm.flops import Shape, reading_flops


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a language model or a scorer."""
    body = backbone(model)
    linear = sum(module.weight.numel() for module in body.modules() if isinstance(module, nn.Linear | Conv1D))
    config = model.config.get_text_config(decoder=True)
    head = output_head(model) or score_head(model)
    return Shape(linear, getattr(config, "num_hidden_layers", 0), _attention_width(config), head.weight.numel())


def _attention_width(config: Any) -> int:
    """Width of all heads of a layer; 0 without attention, or where layers have different numbers of heads."""
    try:
        heads = config.num_attention_heads
        return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))
    except (AttributeError, RuntimeError):  # transformers raises either
        return 0


def rows_flops(shape: Shape, rows: Sequence[Row]) -> int:
    """Operations of one forward pass over rows, of each of which the prompt is read once."""
    return sum(reading_flops(shape, len(row.prompt), [len(c) for c in row.completions]) for row in rows)
