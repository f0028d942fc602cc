"""A small copy of a model with random weights, on which an architecture is tried without the model's size.

All kinds of layers that the model has are kept; widths, vocabulary and lengths are made small.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

# Tokens of a window, a chunk, or of the positions before a rotary embedding changes; and of all positions.
KINK = 8
POSITIONS = 96

_VOCABULARY = 96
_HEAD_WIDTH = 8
# A model of at most so many parameters, without a longer window, is copied as it is.
_SMALL_PARAMETERS = 2_000_000
_LONGEST_KINK = 48

# What the config's numbers mean, by their names: lengths in tokens, and widths, of which heads and experts are not.
_KINKS = re.compile("window|chunk|original_max|block_size|local_attn|attention_size|floor_scale")
_POSITIONS = re.compile("position|max_seq|n_ctx|max_len|seq_len|context_len")
_WIDTHS = re.compile("size|dim|rank|embd|width|inner|d_model|d_ff|d_inner|d_state|d_head|d_kv|expand_v|channels")
_COUNTS = re.compile("^n_(?!embd|inner)|^num_|kernel|conv|group|batch|per_head|type_vocab")
_EXPERTS = 32


def small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class in float32 on the CPU, in evaluation mode, with weights that make differences visible.

    Args:
        model: its class, config and layers are read; its weights are not.

    Raises:
        Exception: whatever transformers raises where it cannot build the class from a smaller config.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    as_it_is = parameters <= _SMALL_PARAMETERS and longest_kink(model.config) <= _LONGEST_KINK and not on_meta
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if as_it_is:
            copied = copy.deepcopy(model)
        else:
            with torch.device("cpu"):
                copied = type(model)(small_config(model.config, distinct_layers(model)))
        _randomise(copied)
    return copied.float().cpu().eval()


def longest_kink(config: PreTrainedConfig) -> int:
    """The longest window, chunk or length at which a rotary embedding changes that a config names; 0 without any."""
    return max((value for key, value in _numbers(config.to_dict()) if _KINKS.search(key)), default=0)


def distinct_layers(model: PreTrainedModel) -> int:
    """How many of a model's first layers hold every kind of layer that it has, at least 2."""
    kinds: dict[Any, int] = {}
    blocks = layers_of(model)
    for i, block in enumerate(blocks):
        kinds.setdefault(_kind(block), i)
    return min(len(blocks), max(2, *(i + 1 for i in kinds.values()))) if blocks else 0


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model; empty where they cannot be told."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    return next((list(blocks) for blocks in lists if len(blocks) == count), [])


def small_config(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A config of small widths, lengths and vocabulary, and of the first `layers` layers where that is not 0."""
    text = config.get_text_config(decoder=True)
    factor = max(1, _head_width(text.to_dict()) // _HEAD_WIDTH)
    # A power of two, so that widths stay multiples of what kernels want.
    factor = 1 << (factor.bit_length() - 1)
    values = _shrunk(config.to_dict(), "", factor, layers, getattr(text, "num_hidden_layers", None))
    small: PreTrainedConfig = type(config).from_dict(values)
    return small


def _head_width(values: dict[str, Any]) -> int:
    """The narrowest part of a head."""
    parts = [values.get(name) for name in ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    given = [part for part in parts if isinstance(part, int) and part > 0]
    width = next((values[name] for name in ("hidden_size", "n_embd", "d_model") if values.get(name)), None)
    heads = next((values[name] for name in ("num_attention_heads", "n_head", "n_heads") if values.get(name)), None)
    if given or not isinstance(width, int) or not isinstance(heads, int):
        return min(given, default=8 * _HEAD_WIDTH)
    return width // heads


def _shrunk(value: Any, key: str, factor: int, layers: int, all_layers: int | None) -> Any:
    def inner(part: Any, name: str = key) -> Any:
        return _shrunk(part, name, factor, layers, all_layers)

    if isinstance(value, dict):
        if layers and value and all(str(name).isdigit() for name in value):
            value = {name: part for name, part in value.items() if int(name) < layers}
        return {name: inner(part, str(name)) for name, part in value.items() if name != "transformers_version"}
    if isinstance(value, list | tuple):
        if layers and len(value) == all_layers:
            value = value[:layers]
        elif key in ("short_factor", "long_factor"):
            value = value[: max(1, len(value) // factor)]
        return [inner(part) for part in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") and layers and value == all_layers:
        return layers
    if "vocab" in key and "type" not in key:
        return min(value, _VOCABULARY)
    if "experts" in key and "per_" not in key:
        return min(value, _EXPERTS)
    if key.endswith("token_id"):
        return value % _VOCABULARY
    if _KINKS.search(key):
        return min(value, KINK)
    if _POSITIONS.search(key):
        return min(value, POSITIONS)
    if _WIDTHS.search(key) and not _COUNTS.search(key) and value >= factor:
        return value // factor
    return value


def _numbers(value: Any, key: str = "") -> list[tuple[str, int]]:
    if isinstance(value, dict):
        return [found for name, part in value.items() for found in _numbers(part, str(name))]
    if isinstance(value, list | tuple):
        return [found for part in value for found in _numbers(part, key)]
    return [(key, value)] if isinstance(value, int) and not isinstance(value, bool) else []


def _kind(block: nn.Module) -> Any:
    """What tells one kind of layer from another: its modules, the shapes of its weights, and its settings."""
    modules = [
        (name, type(module).__name__, *sorted((key, repr(v)) for key, v in vars(module).items() if _is_setting(key, v)))
        for name, module in block.named_modules()
    ]
    return (*modules, *((name, tuple(parameter.shape)) for name, parameter in block.named_parameters()))


def _is_setting(key: str, value: Any) -> bool:
    return isinstance(value, bool | int | str) and not key.startswith("_") and not re.search("idx|layer_(id|num)", key)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Weights so wide that what attention sees shows in the logits."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, min(0.5, 1.5 / parameter.shape[-1] ** 0.5))
        else:
            parameter.add_(_noise(parameter))


def _noise(parameter: Tensor) -> Tensor:
    return torch.randn_like(parameter) * 0.2
