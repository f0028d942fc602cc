"""Attention that reads a shared prompt once: for packed rows (training) and for sampling.

It is registered with transformers under the name `prefopt` and is told what to do by a layout that travels through
the model's keyword arguments. Which rows lie where is the layout's; what a layer may see of a row (all that came
before, a window of it, its own chunk) is the model's, and transformers hands it over as a function of two positions.
Whether a model's architecture is computed rightly so is found on loading (`prefopt.lm.verify`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from prefopt.lm.batching import Row
from prefopt.lm.precision import narrowed

# cuDNN's attention makes a plan for every new shape, and every group of rows here has a shape of its own.
torch.backends.cuda.enable_cudnn_sdp(False)

logger = logging.getLogger(__name__)

NAME = "prefopt"

# Completions of one row that attend together. They share a block mask, whose masked part is wasted work.
_GROUP_TOKENS = 192

# Arguments of transformers' attention interface that change nothing here: what they say is in the mask and the layout,
# or they are of other functions. A window comes as the mask's function too.
_HARMLESS = {
    "cache",
    "cache_position",
    "is_causal",
    "logits_to_keep",
    "position_embeddings",
    "position_ids",
    "sliding_window",
    "use_cache",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """What the layers of one kind may see, as transformers describes it; made once for each forward pass."""

    options: dict[str, Any]  # those of `transformers.masking_utils.sdpa_mask`

    @functools.cached_property
    def dense(self) -> Tensor | None:
        """bool [batch, 1, queries, keys] of a plain forward pass; None where all that came before is seen."""
        mask: Tensor | None = sdpa_mask(**self.options)
        return mask

    def is_causal(self, length: int) -> bool:
        """Whether positions up to `length` see all that came before; transformers' own condition to make no mask."""
        size = self.options.get("local_size")
        return bool(self.options["allow_is_causal_skip"]) and (size is None or length <= size)

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool, in the shape that positions of queries and of keys broadcast to: whether they are seen."""
        seen: Tensor = self.options["mask_function"](0, 0, queries, keys)
        return seen.expand(torch.broadcast_shapes(queries.shape, keys.shape))


@dataclasses.dataclass(frozen=True)
class Scores:
    """How scores become weights: scaled, then soft-capped, then normalised beside a sink."""

    scaling: float | None  # 1/sqrt(D) where None
    softcap: float | None = None  # c of c tanh(scores / c)
    sinks: Tensor | None = None  # [H], a further score of each head that takes weight and gives nothing

    @property
    def plain(self) -> bool:
        """Whether torch's own attention computes them."""
        return self.softcap is None and self.sinks is None

    def capped(self, scores: Tensor) -> Tensor:
        """Soft-capped scores."""
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def weights(self, scores: Tensor, sinks: Tensor | None) -> Tensor:
        """Softmax over keys in float32; `sinks` [..., 1] broadcasts to the scores' other dimensions."""
        if sinks is None:
            return scores.float().softmax(dim=-1).to(scores.dtype)
        beside = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
        return beside.float().softmax(dim=-1)[..., :-1].to(scores.dtype)


# A row's prompt with its mask, None where it is causal, and length and mask of each group of its completions.
RowPieces = tuple[int, Tensor | None, list[tuple[int, Tensor]]]


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """How rows lie one after another in a single sequence of T tokens, without padding.

    A row is its prompt and then its completions; a completion sees its prompt and itself.
    """

    rows: list[tuple[int, list[int]]]  # of each row, tokens of its prompt and of each completion
    device: torch.device
    _made: dict[Mask | None, list[RowPieces]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def pieces(self) -> list[int]:
        """Lengths of consecutive pieces of the sequence: a prompt, then groups of its completions."""
        return [length for prompt, _, groups in self.groups(None) for length in (prompt, *(own for own, _ in groups))]

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its completions."""
        return max(prompt + max(completions, default=0) for prompt, completions in self.rows)

    def restricting(self, mask: Mask | None) -> Mask | None:
        """The mask, or None where no row is long enough for it to hide anything."""
        return None if mask is None or mask.is_causal(self.longest) else mask

    def groups(self, mask: Mask | None) -> list[RowPieces]:
        """The pieces of each row under a mask; None is causal."""
        if mask not in self._made:
            self._made[mask] = self._groups(mask)
        return self._made[mask]

    def _groups(self, mask: Mask | None) -> list[RowPieces]:
        masks: dict[tuple[int, ...], Tensor] = {}

        def of(prompt: int, group: Sequence[int]) -> Tensor:
            key = (prompt, *group)
            if key not in masks:
                masks[key] = _group_mask(prompt, group, self.device, mask)
            return masks[key]

        return [
            (
                prompt,
                None if mask is None else of(0, [prompt]),
                [(sum(group), of(prompt, group)) for group in _completion_groups(completions)],
            )
            for prompt, completions in self.rows
        ]

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

    @functools.cached_property
    def key_places(self) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Where in `sequences.keys` positions are, int64: each of the T in its own sequence, and prompts' copies.

        Of the copies, for all rows' i-th completions, the positions of their prompts and where the completions have them.
        """
        own: list[int] = []
        copies: list[tuple[list[int], list[int]]] = []
        start = key = 0
        for prompt, completions in self.rows:
            own += range(key, key + prompt)
            key += prompt
            for i, length in enumerate(completions):
                if i == len(copies):
                    copies.append(([], []))
                positions, places = copies[i]
                positions += range(start, start + prompt)
                places += range(key, key + prompt)
                own += range(key + prompt, key + prompt + length)
                key += prompt + length
            start += prompt + sum(completions)
        of_copies = [tuple(torch.tensor(part, device=self.device) for part in copy) for copy in copies]
        return torch.tensor(own, device=self.device), of_copies


@dataclasses.dataclass(frozen=True)
class Sequences:
    """N sequences of queries, one after another, each with keys whose last ones are its own."""

    keys: Tensor  # int64 [K], which of the T positions are the sequences' keys, one sequence after another
    query_starts: Tensor  # int32 [N + 1]
    key_starts: Tensor  # int32 [N + 1]
    longest_query: int
    longest_key: int


@dataclasses.dataclass(frozen=True)
class DecodeLayout:
    """G prompts with n samples each, one new token a sample."""

    lengths: Tensor  # int64 [G], tokens of each prompt
    prefix: int  # P, those of the longest
    step: int  # t, new tokens of each sample, the present one included
    _made: dict[Mask | None, tuple[Tensor, Tensor | None]] = dataclasses.field(default_factory=dict, repr=False)

    def visible(self, mask: Mask | None) -> tuple[Tensor, Tensor | None]:
        """bool [G, 1, 1, P], what a prompt's samples see of it, and [G, t] of themselves; None: all."""
        if mask is not None and mask.is_causal(self.prefix + self.step):
            mask = None
        if mask not in self._made:
            self._made[mask] = self._visible(mask)
        return self._made[mask]

    def _visible(self, mask: Mask | None) -> tuple[Tensor, Tensor | None]:
        lengths = self.lengths.unsqueeze(1)
        places = torch.arange(max(self.prefix, self.step), device=lengths.device)
        prefix, own = places[: self.prefix], lengths + places[: self.step]
        real = prefix < lengths
        if mask is None:
            return real[:, None, None, :], None
        query = own[:, -1:]
        return (real & mask.sees(query, prefix))[:, None, None, :], mask.sees(query, own)


def uses_registry(model: nn.Module) -> bool:
    """Whether the model's attention comes from transformers' registry and can be ours."""
    return bool(getattr(model, "_supports_attention_backend", False))


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


def _group_mask(prompt: int, completions: Sequence[int], device: torch.device, mask: Mask | None) -> Tensor:
    """bool [C, prompt + C]: each completion sees the prompt and itself, causally or as far as `mask` allows."""
    lengths = torch.tensor(completions, device=device)
    member = torch.repeat_interleave(torch.arange(len(completions), device=device), lengths)
    own = torch.arange(len(member), device=device) - (lengths.cumsum(0) - lengths)[member] + prompt
    places = torch.cat([torch.arange(prompt, device=device), own])
    seen = places <= own[:, None] if mask is None else mask.sees(own[:, None], places).clone()
    seen[:, prompt:] &= member[:, None] == member
    return seen


def prefopt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed: PackedLayout | None = None,
    decode: DecodeLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer.

    Args:
        module: the attention module.
        query: [1, H, T, D] packed, or [G * n, H, 1, D] when sampling.
        key: [1, K, T, D] packed, with K key-value heads; when sampling a pair of prefix and suffix (see `_decode`).
        value: as `key`, of a width E of its own.
        attention_mask: what the layer may see of a row.
        scaling: of the scores.
        dropout: must be 0.
        softcap: see `Scores`.
        s_aux: sinks, see `Scores`.
        packed: layout of a packed sequence.
        decode: layout of a sampling step.
        others: what does not change the result, or is None.

    Returns:
        [batch, T, H, E] and no weights.

    Raises:
        NotImplementedError: the model asks for something that is not computed here.
    """
    if dropout:
        raise ValueError("the engine's attention has no dropout: load models with prefopt.lm.models")
    if others.get("is_causal") is False:
        raise NotImplementedError("the engine's attention is causal")
    for name, given in others.items():
        if given is not None and given is not False and name not in _HARMLESS:
            raise NotImplementedError(f"the engine's attention takes no {name}")
    scores = Scores(scaling, softcap, s_aux)
    if decode is not None:
        return _decode(narrowed(query), key, value, _of_a_row(attention_mask), scores, decode), None
    # A CPU's attention of short rows is up to three times as fast in float32 as in bfloat16.
    wide = torch.is_autocast_enabled("cpu") and not query.is_cuda
    query, key, value = (each.float() if wide else narrowed(each) for each in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    with torch.autocast("cpu", enabled=False) if wide else contextlib.nullcontext():
        if packed is None:
            dense = attention_mask.dense if isinstance(attention_mask, Mask) else attention_mask
            output = _attend(query, key, value, dense, scores)
        elif _in_one_call(query, key, value, mask := packed.restricting(_of_a_row(attention_mask)), scores):
            output = _in_sequences(query, key, value, scaling, packed)
        else:
            output = _packed(query, key, value, mask, scores, packed)
    return output.transpose(1, 2).contiguous(), None


def _in_one_call(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, scores: Scores) -> bool:
    """Whether all rows go through one call of flash attention."""
    plain = query.is_cuda and mask is None and scores.plain and key.shape[-1] == value.shape[-1]
    return plain and flash_can(query.device, query.dtype, query.shape[-1])


def _of_a_row(mask: Mask | Tensor | None) -> Mask | None:
    if isinstance(mask, Tensor):
        raise NotImplementedError("the engine's attention takes no mask of the model's own making")
    return mask


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Attention under a mask (bool, or floats that are added); None is causal, of one query: to all keys."""
    causal = mask is None and query.shape[2] > 1
    if scores.plain:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scores.scaling)
    scaling = query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    products = scores.capped(query @ key.transpose(2, 3) * scaling)
    if causal:
        mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        # A finite number, since a row of padding may see nothing.
        products = products.masked_fill(~mask, torch.finfo(products.dtype).min)
    elif mask is not None:
        products = products + mask
    sinks = None if scores.sinks is None else scores.sinks.view(1, -1, 1, 1)
    return scores.weights(products, sinks) @ value


def _packed(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, scores: Scores, layout: PackedLayout
) -> Tensor:
    # `split` rather than slices: its backward is one concatenation, a slice's is a zero tensor of the whole length.
    pieces = zip(*(tensor.split(layout.pieces, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for _, prompt_mask, groups in layout.groups(mask):
        prompt_query, prompt_key, prompt_value = next(pieces)
        outputs.append(_attend(prompt_query, prompt_key, prompt_value, prompt_mask, scores))
        for _, group_mask in groups:
            own_query, own_key, own_value = next(pieces)
            keys, values = torch.cat([prompt_key, own_key], dim=2), torch.cat([prompt_value, own_value], dim=2)
            outputs.append(_attend(own_query, keys, values, group_mask, scores))
    return torch.cat(outputs, dim=2)


def _in_sequences(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: PackedLayout) -> Tensor:
    """All rows in one call of flash attention, where `_packed` makes some for each row."""
    of = layout.sequences
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    heads, width = keys.shape[1:]
    both = _Keys.apply(torch.cat([keys, values], dim=1).flatten(1), layout)
    keys, values = both.view(-1, 2 * heads, width).split(heads, dim=1)
    output = _flash(queries, keys, values, of, scaling)
    return output.transpose(0, 1).unsqueeze(0)


class _Keys(torch.autograd.Function):
    """States [K, W] of a layout's keys, from those [T, W] of all positions.

    The gradient of `index_select` would be added up by atomic operations, in another order at every run, and slowly.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, layout: PackedLayout) -> Tensor:
        ctx.layout = layout
        return states.index_select(0, layout.sequences.keys)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        own, copies = ctx.layout.key_places
        total = gradient.index_select(0, own)
        for positions, places in copies:
            added = total.index_select(0, positions) + gradient.index_select(0, places)
            total.index_copy_(0, positions, added)
        return total, None


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
    for in_sequences in (False, True):
        generator.manual_seed(0)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                query, key, value = (
                    torch.randn(1, 2, 20, width, generator=generator, device=device, dtype=dtype, requires_grad=True)
                    for _ in range(3)
                )
                output = (
                    _in_sequences(query, key, value, None, layout)
                    if in_sequences
                    else _packed(query, key, value, None, Scores(None), layout)
                )
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


def _decode(query: Tensor, keys: Any, values: Any, mask: Mask | None, scores: Scores, layout: DecodeLayout) -> Tensor:
    """One token of each of G * n samples against its prompt, kept once per prompt, and its own few tokens.

    Args:
        query: [G * n, H, 1, D].
        keys: the prefix [G, K, P, D] and the suffix [G * n, K, t, D]; or both as one row (see `one_row`).
        values: as keys, of width E.
        mask: what the layer may see of a row.
        scores: how scores become weights.
        layout: G, and how long prompts and samples are.

    Returns:
        [G * n, 1, H, E].
    """
    if isinstance(keys, Tensor):
        keys, values = (_two_parts(states, len(query), layout) for states in (keys, values))
    (prefix_key, suffix_key), (prefix_value, suffix_value) = keys, values
    rows, heads, _, width = query.shape
    groups, kv_heads, prefix, _ = prefix_key.shape
    samples, repeats = rows // groups, heads // kv_heads
    prefix_mask, suffix_mask = layout.visible(mask)
    query = query * (width**-0.5 if scores.scaling is None else scores.scaling)
    # Heads that share a key-value head are further queries of it.
    by_row = query.view(rows, kv_heads, repeats, width)
    by_group = by_row.view(groups, samples, kv_heads, repeats, width).transpose(1, 2)
    by_group = by_group.reshape(groups, kv_heads, samples * repeats, width)
    prefix_scores = scores.capped(by_group @ prefix_key.transpose(2, 3))
    prefix_scores = prefix_scores.masked_fill_(~prefix_mask, float("-inf"))
    prefix_scores = prefix_scores.view(groups, kv_heads, samples, repeats, prefix).transpose(1, 2)
    suffix_scores = scores.capped(by_row @ suffix_key.transpose(2, 3))
    if suffix_mask is not None:
        hidden = ~suffix_mask.repeat_interleave(samples, dim=0)[:, None, None, :]
        suffix_scores = suffix_scores.masked_fill_(hidden, float("-inf"))
    products = torch.cat([prefix_scores.reshape(rows, kv_heads, repeats, prefix), suffix_scores], dim=-1)
    sinks = None if scores.sinks is None else scores.sinks.view(1, kv_heads, repeats, 1)
    weights = scores.weights(products, sinks)
    prefix_weights, suffix_weights = weights.split([prefix, suffix_scores.shape[-1]], dim=-1)
    from_prefix = prefix_weights.reshape(groups, samples, kv_heads, repeats, prefix).transpose(1, 2)
    from_prefix = from_prefix.reshape(groups, kv_heads, samples * repeats, prefix) @ prefix_value
    from_prefix = from_prefix.view(groups, kv_heads, samples, repeats, -1).transpose(1, 2)
    output = from_prefix.reshape(rows, kv_heads, repeats, -1) + suffix_weights @ suffix_value
    return output.reshape(rows, 1, heads, -1)


def one_row(prefix: Tensor, suffix: Tensor) -> Tensor:
    """[1, K, G * P + G * n * t, D] of a prefix and a suffix, for models that go on computing with cached states."""
    return torch.cat([part.transpose(0, 1).flatten(1, 2) for part in (prefix, suffix)], dim=1).unsqueeze(0)


def _two_parts(states: Tensor, rows: int, layout: DecodeLayout) -> tuple[Tensor, Tensor]:
    groups = len(layout.lengths)
    prefix, suffix = states[0].split([groups * layout.prefix, rows * layout.step], dim=1)
    return prefix.unflatten(1, (groups, -1)).transpose(0, 1), suffix.unflatten(1, (rows, -1)).transpose(0, 1)


def _mask(**options: Any) -> Mask:
    """What transformers calls to make a mask: it is made when it is known for which layout."""
    return Mask(options)


AttentionInterface.register(NAME, prefopt_attention)
AttentionMaskInterface.register(NAME, _mask)
