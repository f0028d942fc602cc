"""Low-rank adapters (LoRA, Hu et al. 2021) by `peft`: small matrices that learn beside frozen weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Loading peft takes most of a second, which a stage without an adapter is spared.
if TYPE_CHECKING:
    from peft import LoraConfig

_NAME = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterRecipe:
    """A frozen weight W becomes W + alpha / rank * B A, with B [out, rank] zero at first and A [rank, in] random."""

    rank: int
    alpha: int


def add_adapter(model: PreTrainedModel, recipe: AdapterRecipe, seed: int) -> PreTrainedModel:
    """Freezes a model's weights and adds an adapter to every linear layer of its transformer.

    The head of a scorer stays trainable, since it is fresh. The model's outputs do not change.

    Args:
        model: is changed in place.
        recipe: size and weight of the adapter.
        seed: of the initial A.

    Returns:
        The same model.
    """
    from peft import LoraModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = LoraModel(model, _config(model, recipe), _NAME).model
    for name in ("score", "classifier"):
        if hasattr(adapted, name):
            getattr(adapted, name).requires_grad_(True)
    return adapted.eval()


def merged(model: PreTrainedModel, weights: Mapping[str, Tensor], recipe: AdapterRecipe) -> PreTrainedModel:
    """A model without adapters that computes what an adapted one does.

    Args:
        model: a model of the architecture without adapters, whose weights do not matter; it is changed in place.
        weights: of the adapted model, whole and on the CPU; one that serves twice comes once.
        recipe: as the adapters were made.
    """
    from peft import LoraModel

    tuner = LoraModel(model, _config(model, recipe), _NAME)
    lacking = tuner.model.load_state_dict(weights, strict=False)
    absent = set(lacking.missing_keys) & {name for name, _ in tuner.model.named_parameters()}
    if absent or lacking.unexpected_keys:
        raise ValueError(f"weights of another model: {sorted([*absent, *lacking.unexpected_keys])[0]} does not fit")
    plain: PreTrainedModel = tuner.merge_and_unload()
    return plain


def _config(model: PreTrainedModel, recipe: AdapterRecipe) -> LoraConfig:
    from peft import LoraConfig

    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # as GPT-2 keeps its weights
    return LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear", fan_in_fan_out=transposed)
