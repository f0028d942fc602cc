"""Attention that reads a shared prompt once: for packed rows (training) and for sampling.

It is registered with transformers under the name `prefopt` and is told what to do by a layout that travels through
the model's keyword arguments. Architectures that route attention through transformers' registry take it (GPT-2, GPT-J,
GPT-NeoX, Llama and most newer ones); some old ones do not (GPT-Neo, Bloom), and the callers fall back to padded batches
there.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from prefopt.lm.batching import Row

logger = logging.getLogger(__name__)

NAME = "prefopt"

# Completions of one row that attend together. They share a block mask, whose masked part is wasted work.
_GROUP_TOKENS = 192


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """How rows lie one after another in a single sequence of T tokens, without padding.

    A row is its prompt and then its completions; a completion sees its prompt and itself.
    """

    rows: list[tuple[int, list[int]]]  # of each row, tokens of its prompt and of each completion
    device: torch.device

    @functools.cached_property
    def pieces(self) -> list[int]:
        """Lengths of consecutive pieces of the sequence: a prompt, then groups of its completions."""
        return [length for prompt, groups in self.groups for length in (prompt, *(length for length, _ in groups))]

    @functools.cached_property
    def groups(self) -> list[tuple[int, list[tuple[int, Tensor]]]]:
        """Of each row the prompt's length, and length and mask of each group of completions."""
        masks: dict[tuple[int, ...], Tensor] = {}
        found = []
        for prompt, completions in self.rows:
            of_row: list[tuple[int, Tensor]] = []
            for group in _completion_groups(completions):
                key = (prompt, *group)
                if key not in masks:
                    masks[key] = _group_mask(prompt, group, self.device)
                of_row.append((sum(group), masks[key]))
            found.append((prompt, of_row))
        return found

    @functools.cached_property
    def sequences(self) -> Sequences:
        """The same as sequences of their own: each prompt, and each completion after the prompt that it sees."""
        starts, lengths = [0], [0]
        keys: list[int] = []
        longest_query = longest_key = start = 0
        for prompt, completions in self.rows:
            own = start + prompt
            seen: list[tuple[int, Sequence[int]]] = [(prompt, range(start, own))]
            for length in completions:
                seen.append((length, [*range(start, start + prompt), *range(own, own + length)]))
                own += length
            for queries, indices in seen:
                starts.append(starts[-1] + queries)
                lengths.append(lengths[-1] + len(indices))
                keys += indices
                longest_query, longest_key = max(longest_query, queries), max(longest_key, len(indices))
            start = own
        return Sequences(
            keys=torch.tensor(keys, device=self.device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=self.device),
            key_starts=torch.tensor(lengths, dtype=torch.int32, device=self.device),
            longest_query=longest_query,
            longest_key=longest_key,
        )


@dataclasses.dataclass(frozen=True)
class Sequences:
    """N sequences of queries, one after another, each with keys whose last ones are its own."""

    keys: Tensor  # int64 [K], which of the T positions are the sequences' keys, one sequence after another
    query_starts: Tensor  # int32 [N + 1]
    key_starts: Tensor  # int32 [N + 1]
    longest_query: int
    longest_key: int


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
    return PackedLayout(
        [(len(row.prompt), [len(completion) for completion in row.completions]) for row in rows], device
    )


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
        in_sequences = query.is_cuda and flash_can(query.device, query.dtype, query.shape[-1])
        output = (_in_sequences if in_sequences else _packed)(query, key, value, scaling, packed)
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


def _in_sequences(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: PackedLayout) -> Tensor:
    """All rows in one call of flash attention, where `_packed` makes some for each row."""
    of = layout.sequences
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    keys, values = keys.index_select(0, of.keys), values.index_select(0, of.keys)
    output = _flash(queries, keys, values, of, scaling)
    return output.transpose(0, 1).unsqueeze(0)


def _flash(query: Tensor, key: Tensor, value: Tensor, of: Sequences, scaling: float | None) -> Tensor:
    """Flash attention of each sequence's queries [T, H, D] over its keys [K, H, D], causal, aligned at the end."""
    arguments: Any = (query, key, value, of.query_starts, of.key_starts, of.longest_query, of.longest_key)
    output: Any = varlen_attn(*arguments, scale=scaling, window_size=(-1, 0))
    return cast(Tensor, output)


@functools.cache
def flash_can(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether flash attention works here and computes what the masks say, tried once on a small example.

    Args:
        device: a CUDA device.
        dtype: of queries, keys and values.
        width: of a head.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    layout = PackedLayout([(5, [3, 4]), (2, [6])], device)
    generator = torch.Generator(device).manual_seed(0)
    results = []
    for attend in (_packed, _in_sequences):
        generator.manual_seed(0)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                query, key, value = (
                    torch.randn(1, 2, 20, width, generator=generator, device=device, dtype=dtype, requires_grad=True)
                    for _ in range(3)
                )
                output = attend(query, key, value, None, layout)
                output.float().square().sum().backward()
        except (RuntimeError, TypeError) as error:
            logger.warning("flash attention is not used (%s)", str(error).splitlines()[0])
            return False
        results.append((output, query.grad, key.grad, value.grad))
    pairs: Any = zip(*results, strict=True)
    same = all(torch.allclose(one, other, rtol=0.05, atol=0.05) for one, other in pairs)
    if not same:
        logger.warning("flash attention is not used: it differs from the masked products on this device")
    return same


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
