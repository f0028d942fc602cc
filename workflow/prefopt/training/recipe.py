"""The values that every trainer shares."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How a model is fine-tuned on a fixed set of examples; `config/README.md` says what each value does."""

    epochs: int | None  # None: as many as `steps` take
    steps: int | None  # of the optimizer; None: as many as `epochs` take
    batch_size: int  # examples per optimizer step, whatever the micro-batches
    learning_rate: float
    schedule: Literal["constant", "cosine", "linear"]  # after the warm-up
    warmup_steps: int
    max_grad_norm: float
    optimizer: Literal["rmsprop", "adamw"]
    weight_decay: float
    evaluate_every: int  # steps
    checkpoint_every: int  # steps
    keep: Literal["best", "last"]
    token_budget: int  # tokens per micro-batch
    dtype: Literal["float32", "bfloat16"]  # of the forward and backward pass; weights are float32
    activation_checkpointing: bool  # a layer's activations are computed again in the backward pass
    adapter: dict[str, Any] | None  # see `AdapterRecipe`; None trains all weights
    seed: int
