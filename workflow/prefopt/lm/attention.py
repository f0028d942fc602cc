"""Attention that reads a shared prompt once: for packed rows (training) and for sampling.

It is registered with transformers under the name `prefopt` and is told what to do by a layout that travels through
the model's keyword arguments. Architectures that route attention through transformers' registry take it (GPT-2,
GPT-NeoX, Llama and most newer ones); GPT-J does not, and the callers fall back to padded batches there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from prefopt.lm.batching import Row

NAME = "prefopt"

# Completions of one row that attend together. They share a block mask, whose masked part is wasted work.
_GROUP_TOKENS = 192


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """How rows lie one after another in a single sequence of T tokens, without padding.

    A row is its prompt and then its completions; a completion sees its prompt and itself.
    """

    pieces: list[int]  # lengths of consecutive pieces: a prompt, then groups of its completions
    groups: list[tuple[int, list[tuple[int, Tensor]]]]  # per row: prompt length, (group length, mask) of each group


@dataclasses.dataclass
class DecodeLayout:
    """G prompts with n samples each, one new token a sample."""

    prefix_mask: Tensor  # bool [G, 1, 1, P], true on real prompt tokens
    groups: int  # G


def uses_registry(model: nn.Module) -> bool:
    """Whether the model's attention comes from transformers' registry and can be ours."""
    return bool(getattr(model, "_supports_attention_backend", False))


def use_engine_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Switches a model to this module's attention, where its architecture allows it.

    Outside the engine's own calls such a model attends causally and must be given unpadded input.
    """
    if uses_registry(model):
        model.set_attn_implementation(NAME)
    return model


def packed_layout(rows: Sequence[Row], device: torch.device) -> PackedLayout:
    """The layout of rows packed into one sequence."""
    pieces: list[int] = []
    groups: list[tuple[int, list[tuple[int, Tensor]]]] = []
    masks: dict[tuple[int, ...], Tensor] = {}
    for row in rows:
        prompt = len(row.prompt)
        of_row: list[tuple[int, Tensor]] = []
        for group in _completion_groups([len(completion) for completion in row.completions]):
            key = (prompt, *group)
            if key not in masks:
                masks[key] = _group_mask(prompt, group, device)
            of_row.append((sum(group), masks[key]))
        groups.append((prompt, of_row))
        pieces += [prompt, *(length for length, _ in of_row)]
    return PackedLayout(pieces, groups)


def _completion_groups(lengths: list[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for length in lengths:
        if not groups or sum(groups[-1]) + length > _GROUP_TOKENS:
            groups.append([])
        groups[-1].append(length)
    return groups


def _group_mask(prompt: int, completions: Sequence[int], device: torch.device) -> Tensor:
    """bool [C, prompt + C]: each completion sees the whole prompt and, causally, itself."""
    total = sum(completions)
    member = torch.repeat_interleave(
        torch.arange(len(completions), device=device), torch.tensor(completions, device=device)
    )
    own = (member[:, None] == member[None, :]).tril()
    return torch.cat([own.new_ones(total, prompt), own], dim=1)


def prefopt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: PackedLayout | None = None,
    decode: DecodeLayout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer.

    Args:
        module: the attention module.
        query: [1, H, T, D] packed, or [G * n, H, 1, D] when sampling.
        key: [1, K, T, D] packed, with K key-value heads; when sampling a pair of prefix and suffix (see `_decode`).
        value: as `key`.
        attention_mask: not used; the layouts say what is visible.
        scaling: of the scores.
        dropout: must be 0.
        packed: layout of a packed sequence.
        decode: layout of a sampling step.

    Returns:
        [batch, T, H, D] and no weights.
    """
    if dropout:
        raise ValueError("the engine's attention has no dropout: load models with prefopt.lm.models")
    if decode is not None:
        return _decode(query, key, value, scaling, decode), None
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if packed is not None:
        output = _packed(query, key, value, scaling, packed)
    else:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, scale=scaling)
    return output.transpose(1, 2), None


def _packed(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: PackedLayout) -> Tensor:
    # `split` rather than slices: its backward is one concatenation, a slice's is a zero tensor of the whole length.
    pieces = zip(*(tensor.split(layout.pieces, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for _, groups in layout.groups:
        prompt_query, prompt_key, prompt_value = next(pieces)
        outputs.append(
            F.scaled_dot_product_attention(prompt_query, prompt_key, prompt_value, is_causal=True, scale=scaling)
        )
        for _, mask in groups:
            own_query, own_key, own_value = next(pieces)
            outputs.append(
                F.scaled_dot_product_attention(
                    own_query,
                    torch.cat([prompt_key, own_key], dim=2),
                    torch.cat([prompt_value, own_value], dim=2),
                    attn_mask=mask,
                    scale=scaling,
                )
            )
    return torch.cat(outputs, dim=2)


def _decode(query: Tensor, keys: Any, values: Any, scaling: float | None, layout: DecodeLayout) -> Tensor:
    """One token of each of G * n samples against its prompt, kept once per prompt, and its own few tokens.

    Args:
        query: [G * n, H, 1, D].
        keys: the prefix [G, K, P, D] and the suffix [G * n, K, t, D].
        values: as keys.
        scaling: of the scores; 1/sqrt(D) where None.
        layout: G, and which prefix positions are real.

    Returns:
        [G * n, 1, H, D].
    """
    (prefix_key, suffix_key), (prefix_value, suffix_value) = keys, values
    rows, heads, _, width = query.shape
    groups, kv_heads, prefix, _ = prefix_key.shape
    samples, repeats = rows // groups, heads // kv_heads
    query = query * (width**-0.5 if scaling is None else scaling)
    # Heads that share a key-value head are further queries of it.
    by_row = query.view(rows, kv_heads, repeats, width)
    by_group = by_row.view(groups, samples, kv_heads, repeats, width).transpose(1, 2)
    by_group = by_group.reshape(groups, kv_heads, samples * repeats, width)
    prefix_scores = by_group @ prefix_key.transpose(2, 3)
    prefix_scores = prefix_scores.masked_fill_(~layout.prefix_mask, float("-inf"))
    prefix_scores = prefix_scores.view(groups, kv_heads, samples, repeats, prefix).transpose(1, 2)
    suffix_scores = by_row @ suffix_key.transpose(2, 3)
    scores = torch.cat([prefix_scores.reshape(rows, kv_heads, repeats, prefix), suffix_scores], dim=-1)
    weights = scores.float().softmax(dim=-1).to(query.dtype)
    prefix_weights, suffix_weights = weights.split([prefix, suffix_scores.shape[-1]], dim=-1)
    from_prefix = prefix_weights.reshape(groups, samples, kv_heads, repeats, prefix).transpose(1, 2)
    from_prefix = from_prefix.reshape(groups, kv_heads, samples * repeats, prefix) @ prefix_value
    from_prefix = from_prefix.view(groups, kv_heads, samples, repeats, width).transpose(1, 2)
    output = from_prefix.reshape(rows, kv_heads, repeats, width) + suffix_weights @ suffix_value
    return output.reshape(rows, 1, heads, width)


AttentionInterface.register(NAME, prefopt_attention)
