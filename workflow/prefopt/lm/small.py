"""A small copy of a model with random weights, on which an architecture is tried without the model's size.

All kinds of layers that the model has are kept; widths, heads, vocabulary and lengths are made small. What the numbers
of a config mean is told by their names, since nothing else tells it. A copy that does not work is noticed where it is
tried, and is no harm: the next larger one is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefopt.lm.engine import layers_of

# Tokens of a window or a chunk; of the positions before a rotary embedding changes, where the rows of some models end, so
# that they pass a window before; and of all positions.
KINK = 8
_ORIGINAL = 2 * KINK
_POSITIONS = 96
_VOCABULARY = 96
_HEAD_WIDTH = 8
_EXPERTS = 16
_ATTENTION_SOFTCAP = 0.5  # so low that random scores show it
# A model of at most so many parameters is copied as it is where no smaller copy works.
_SMALL_PARAMETERS = 4_000_000

_KINK_NAMES = re.compile("window|chunk|original_max|block_size|local_attn|attention_size")
_POSITION_NAMES = re.compile("position|max_seq|n_ctx|max_len|seq_len|context_len")
_WIDTH_NAMES = re.compile("size|dim|rank|embd|width|inner|d_model|d_ff|d_state|d_head|d_kv|channels|^dff$")
_NO_WIDTH_NAMES = re.compile("^n_(?!embd|inner)|^num_|kernel|conv|group|batch|per_head|type_vocab")
_LAYER_NAMES = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def small_copies(model: PreTrainedModel) -> list[Callable[[], PreTrainedModel]]:
    """What makes models of the same class, in float32 on the CPU, with weights that make differences visible.

    The smallest comes first. Where an architecture cannot be so small, making it or running it raises whatever
    transformers does, and the next one may do.

    Args:
        model: its class, config and layers are read; its weights are not.
    """
    layers = distinct_layers(model)

    def made(fewer_heads: bool) -> PreTrainedModel:
        return _randomised(type(model)(small_config(model.config, layers, fewer_heads=fewer_heads)))

    makers = [lambda: made(True), lambda: made(False)]
    if sum(parameter.numel() for parameter in model.parameters()) <= _SMALL_PARAMETERS:
        makers.append(lambda: _randomised(copy.deepcopy(model)))
    return makers


def longest_kink(config: PreTrainedConfig) -> int:
    """The longest window, chunk or length at which a rotary embedding changes that a config names; 0 without any."""
    return max((value for key, value in _numbers(config.to_dict()) if _KINK_NAMES.search(key)), default=0)


def distinct_layers(model: PreTrainedModel) -> int:
    """How many of a model's first layers hold every kind of layer that it has, at least 2; 0 where there are none."""
    first: dict[Any, int] = {}
    layers = layers_of(model)
    for i, layer in enumerate(layers):
        first.setdefault(_kind(layer), i)
    return min(len(layers), max(2, 1 + max(first.values()))) if layers else 0


def small_config(config: PreTrainedConfig, layers: int, *, fewer_heads: bool) -> PreTrainedConfig:
    """A config of small widths, lengths and vocabulary.

    All widths are divided by one number, so that products and sums of them stay what they were.

    Args:
        config: of a model.
        layers: how many of the first layers to keep; 0 keeps all.
        fewer_heads: whether heads of attention become fewer, which takes a multiple off the widths too.
    """
    text = config.get_text_config(decoder=True)
    values = text.to_dict()
    of_head = _head_width(values)
    width = max(1, of_head // _HEAD_WIDTH)
    heads = min(
        (count for count in map(values.get, ("num_key_value_heads", "num_attention_heads")) if count), default=1
    )
    fewer = max(1, heads // 4) if fewer_heads and isinstance(heads, int) else 1
    # Powers of two, so that widths stay multiples of what kernels want.
    width, fewer = (1 << (factor.bit_length() - 1) for factor in (width, fewer))
    while width > 1 and of_head // width % 2:  # rotary embeddings turn pairs
        width //= 2
    shrink = _Shrink(width, fewer, layers, getattr(text, "num_hidden_layers", None))
    small: PreTrainedConfig = type(config).from_dict(shrink(config.to_dict(), ""))
    return small


class _Shrink:
    """Makes the numbers of a config small, each by its name."""

    def __init__(self, width: int, fewer: int, layers: int, all_layers: int | None) -> None:
        self._head_width, self._fewer = width, fewer
        self._layers, self._all_layers = layers, all_layers

    def __call__(self, value: Any, key: str) -> Any:
        if isinstance(value, dict):
            parts = {name: part for name, part in value.items() if name != "transformers_version"}
            if self._layers and all(str(name).isdigit() for name in parts):  # of layers, by their numbers
                parts = {name: part for name, part in parts.items() if int(name) < self._layers}
            return {name: self(part, str(name)) for name, part in parts.items()}
        if isinstance(value, list | tuple):
            if self._layers and len(value) == self._all_layers:
                value = value[: self._layers]
            elif key in ("short_factor", "long_factor"):  # one for each pair of a head's dimensions
                value = value[: max(1, len(value) // self._head_width)]
            return [self(part, key) for part in value]
        if isinstance(value, float) and re.search("attn.*softcap", key):
            return min(value, _ATTENTION_SOFTCAP)
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        return self._number(value, key)

    def _number(self, value: int, key: str) -> int:
        if key in _LAYER_NAMES and self._layers and value == self._all_layers:
            return self._layers
        if "vocab" in key and "type" not in key:
            return min(value, _VOCABULARY)
        if key.endswith("token_id"):
            return value % _VOCABULARY
        if "experts" in key and "per_" not in key:
            return min(value, _EXPERTS)
        if _KINK_NAMES.search(key):
            return min(value, _ORIGINAL if "original_max" in key else KINK)
        if _POSITION_NAMES.search(key):
            return min(value, _POSITIONS)
        if re.search("(?<!d_)heads?$", key):
            return value // self._fewer if value % self._fewer == 0 else value
        if _WIDTH_NAMES.search(key) and not _NO_WIDTH_NAMES.search(key):
            in_head = re.search("head_dim|d_head|rotary_dim|rope_dim|head_size|state|d_kv", key)
            factor = self._head_width * (1 if in_head else self._fewer)
            if "intermediate" in key or "ffn" in key:  # no sum or product of others, and a multiple for kernels
                return 8 * max(1, value // factor // 8)
            return value // factor if value >= factor else value
        return value


def _head_width(values: dict[str, Any]) -> int:
    """The narrowest part of a head."""
    parts = map(values.get, ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    given = [part for part in parts if isinstance(part, int) and part > 0]
    width = next((values[name] for name in ("hidden_size", "n_embd", "d_model") if values.get(name)), None)
    heads = next((values[name] for name in ("num_attention_heads", "n_head", "n_heads") if values.get(name)), None)
    if given or not isinstance(width, int) or not isinstance(heads, int):
        return min(given, default=8 * _HEAD_WIDTH)
    return width // heads


def _numbers(value: Any, key: str = "") -> list[tuple[str, int]]:
    if isinstance(value, dict):
        return [found for name, part in value.items() for found in _numbers(part, str(name))]
    if isinstance(value, list | tuple):
        return [found for part in value for found in _numbers(part, key)]
    return [(key, value)] if isinstance(value, int) and not isinstance(value, bool) else []


def _kind(layer: nn.Module) -> Any:
    """What tells one kind of layer from another: its modules, their settings, and the shapes of its weights."""
    modules = [
        (name, type(module).__name__, *sorted((key, repr(v)) for key, v in vars(module).items() if _is_setting(key, v)))
        for name, module in layer.named_modules()
    ]
    return (*modules, *((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()))


def _is_setting(key: str, value: Any) -> bool:
    of_place = re.search("^_|idx|layer_(id|num)", key)
    return isinstance(value, bool | int | str) and not of_place


@torch.no_grad()
def _randomised(model: PreTrainedModel) -> PreTrainedModel:
    """The model in evaluation mode with weights so wide that what attention sees shows in the logits."""
    model = model.float().cpu().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, min(0.5, 1 / parameter.shape[-1] ** 0.5))
        else:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
