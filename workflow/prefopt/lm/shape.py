"""The shape of a model, and the operations of reading rows with it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefopt.flops import Shape, reading_flops
from prefopt.lm.batching import Row
from prefopt.lm.engine import backbone


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a language model or a scorer."""
    body = backbone(model)
    linear = sum(module.weight.numel() for module in body.modules() if isinstance(module, nn.Linear | Conv1D))
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = model.get_output_embeddings()
    head_weights = head.weight.numel() if head is not None else config.num_labels * config.hidden_size
    return Shape(linear, config.num_hidden_layers, config.num_attention_heads * width, head_weights)


def rows_flops(shape: Shape, rows: Sequence[Row]) -> int:
    """Operations of one forward pass over rows, of each of which the prompt is read once."""
    return sum(reading_flops(shape, len(row.prompt), [len(c) for c in row.completions]) for row in rows)
