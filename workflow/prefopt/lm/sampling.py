"""Sampling n completions of each prompt: the prompt is read once, and finished samples leave the batch.

Every prompt has a random generator of its own from which one number a sample and step is drawn, whether or not the
sample has finished. So a prompt's completions do not depend on what else is sampled beside it, up to floating-point
differences of matrix products of other shapes, which can turn a token only where the draw falls on the very edge
between two.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from prefopt.errors import UserError
from prefopt.lm.attention import DecodeLayout, one_row, packed_layout
from prefopt.lm.batching import ROW_BUDGET, Row, cache_room, prompts_at_once
from prefopt.lm.engine import backbone, engine_of, head_logits, position_limit
from prefopt.lm.logprobs import completion_hidden_states
from prefopt.lm.precision import narrowed

# The batch is made smaller once this share of its rows has finished.
_COMPACT_BELOW = 0.75


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled completion."""

    token_ids: list[int]  # the end token included where one was reached
    logps: list[
        float
    ]  # natural-log probability of each token at the sampling temperature (0 at temperature 0); NaN: no number
    finish_reason: Literal["eos", "length"]  # whether an end token was reached; it is the last one


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    n: int,
    temperature: float,
    max_new_tokens: int,
    ends: Sequence[int],
    seeds: Sequence[int],
    row_budget: int | None = None,
) -> list[list[Completion]]:
    """Samples from the model's own distribution, without top-k or top-p.

    Args:
        model: a causal language model loaded by `prefopt.lm.models`.
        prompts: token ids of each prompt, at least one token each.
        n: completions of each prompt.
        temperature: logits are divided by it; 0 is greedy, where n must be 1.
        max_new_tokens: most tokens of a completion, its end token included.
        ends: the tokens each of which ends a completion, at least one (see `prefopt.lm.chat.end_tokens`).
        seeds: one for each prompt.
        row_budget: most completions sampled at once, fewer where their cache would be too large; results do not depend
            on it (see the module's words). None takes `ROW_BUDGET`.

    Returns:
        For each prompt its n completions.

    Raises:
        UserError: a prompt and its completion would be longer than the model's positions.
    """
    if temperature == 0 and n != 1:
        raise ValueError("greedy completions are all equal: sample one (n=1) at temperature 0")
    longest = max(map(len, prompts), default=0)
    limit = position_limit(model.config)
    if limit is not None and longest + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's {limit} positions: "
            f"cut the prompts or sample fewer tokens."
        )
    # Prompts of similar length together, so that little of the prefix is padding.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    way = engine_of(model).sampling
    # Without a cache nothing is kept; some models that are sampled so fail as soon as they are asked for one.
    token_bytes, shared = 1 if way == "whole" else _token_bytes(model), way in ("shared", "one_row")
    device = next(model.parameters()).device
    budget, room = row_budget or ROW_BUDGET[device.type == "cuda"], cache_room(_free_bytes(device))
    at_once = prompts_at_once(n, longest, max_new_tokens, token_bytes, budget, room, shared_prefix=shared)
    results: list[list[Completion]] = [[] for _ in prompts]
    for start in range(0, len(order), at_once):
        part = order[start : start + at_once]
        completions = _sample_batch(
            *(model, [prompts[i] for i in part], n, temperature, max_new_tokens, ends, [seeds[i] for i in part])
        )
        for i, group in zip(part, completions, strict=True):
            results[i] = group
    return results


def _free_bytes(device: torch.device) -> int | None:
    """What is free on a GPU, blocks that torch keeps for later use among it; None on a CPU."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


@torch.inference_mode()
def _token_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers, at least 1."""
    one = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    cache = getattr(backbone(model)(input_ids=one, use_cache=True), "cache", None)
    states = [getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values")]
    return max(1, sum(tensor.nbytes for tensor in states if tensor is not None))


def _sample_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    n: int,
    temperature: float,
    max_new_tokens: int,
    ends: Sequence[int],
    seeds: Sequence[int],
) -> list[list[Completion]]:
    device = next(model.parameters()).device
    groups = len(prompts)
    tokens = torch.full((groups * n, max_new_tokens), ends[0], device=device)
    logps = torch.zeros(groups * n, max_new_tokens, device=device)
    lengths = torch.full((groups * n,), max_new_tokens, device=device)
    ended = torch.zeros(groups * n, dtype=torch.bool, device=device)
    last = torch.tensor(ends, device=device)
    draws = _draws(seeds, n, max_new_tokens).to(device) if temperature > 0 else None

    decoder = DECODERS[engine_of(model).sampling](model, prompts, n, max_new_tokens)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(n)
    rows = torch.arange(groups * n, device=device)  # which completion each row of the batch is
    logits = decoder.prompt_logits().repeat_interleave(n, dim=0)
    for step in range(max_new_tokens):
        if draws is None:
            largest, token = logits.max(dim=-1)
            logps[rows, step] = largest - largest  # 0, or NaN where the logits are not finite
        else:
            token, logp = _draw(logits, temperature, draws[rows, step])
            logps[rows, step] = logp.masked_fill(ended[rows], 0.0)
        tokens[rows, step] = torch.where(ended[rows], ends[0], token)
        newly = torch.isin(token, last) & ~ended[rows]
        lengths[rows[newly]] = step + 1
        ended[rows[newly]] = True
        alive = ~ended[rows]
        if step + 1 == max_new_tokens or not alive.any():
            break
        if alive.float().mean() < _COMPACT_BELOW:
            keep = decoder.compact(alive)
            rows, token = rows[keep], token[keep]
        logits = decoder.step(token, prompt_lengths[rows] + step)
    return [
        [
            Completion(ids[:length], values[:length], "eos" if done else "length")
            for ids, values, length, done in zip(*(part[i * n : (i + 1) * n] for part in columns), strict=True)
        ]
        for columns in [(tokens.tolist(), logps.tolist(), lengths.tolist(), ended.tolist())]
        for i in range(groups)
    ]


def _draws(seeds: Sequence[int], n: int, steps: int) -> Tensor:
    """Uniform numbers [prompts * n, steps]; a prompt's are the first of its own generator, step by step."""
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.cat([torch.rand(steps, n, generator=generator).t() for generator in generators])


def _draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverts the distribution function at `uniform` [rows]: tokens [rows] and their log-probabilities [rows]."""
    logits = logits / temperature
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    # The last entry is 1 up to rounding; scaling by it keeps the draw inside.
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1]).unsqueeze(1), right=True).squeeze(1)
    token = token.clamp_(max=logits.shape[1] - 1)
    logp = logits.gather(1, token.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)
    return token, logp


class _SharedPrefix:
    """Decoding with every prompt's keys and values kept once for its n samples (see `attention._decode`)."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], n: int, steps: int, as_one_row: bool = False
    ) -> None:
        self._model = model
        self._samples = n
        device = next(model.parameters()).device
        rows = [Row(prompt, ()) for prompt in prompts]
        lengths = [len(prompt) for prompt in prompts]
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        layers = [_PrefixLayer(lengths, n, steps, as_one_row) for _ in range(count)]
        self._cache = Cache(layers=layers)
        hidden = backbone(model)(
            input_ids=torch.tensor([[token for prompt in prompts for token in prompt]], device=device),
            position_ids=torch.tensor([[i for length in lengths for i in range(length)]], device=device),
            cache=self._cache,
            use_cache=True,
            packed=packed_layout(rows, device),
        ).last_hidden_state[0]
        self._lengths = torch.tensor(lengths, device=device)
        self._longest = max(lengths)
        self._steps = 0
        self._last = hidden[self._lengths.cumsum(0) - 1]

    def prompt_logits(self) -> Tensor:
        """float32 [G, V]: of each prompt's first new token."""
        return head_logits(self._model, self._last)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """float32 [rows, V]: logits after one more token a row."""
        self._steps += 1
        hidden = backbone(self._model)(
            input_ids=tokens.unsqueeze(1),
            position_ids=positions.unsqueeze(1),
            cache=self._cache,
            use_cache=True,
            decode=DecodeLayout(self._lengths, self._longest, self._steps),
        ).last_hidden_state[:, 0]
        return head_logits(self._model, hidden)

    def compact(self, alive: Tensor) -> Tensor:
        """Drops finished prompts, and samples down to the most that any prompt still has; returns the rows kept."""
        alive = alive.view(len(self._lengths), self._samples)
        counts = alive.sum(dim=1)
        groups = counts.nonzero().squeeze(1)
        samples = int(counts.max())
        # Rows that go on come first; a prompt with fewer of them keeps some finished ones as padding.
        order = alive[groups].int().argsort(dim=1, descending=True, stable=True)[:, :samples].sort(dim=1).values
        rows = (groups.unsqueeze(1) * self._samples + order).flatten()
        for layer in self._cache.layers:
            layer.select(groups, rows)
        self._samples, self._lengths = samples, self._lengths[groups]
        return rows


class _PrefixLayer(CacheLayerMixin):
    """One layer's keys and values: the prompts' [G, K, P, D], and the samples' own [G * n, K, steps, D].

    A model that computes on with what it has cached, as DeepSeek's does with compressed keys, gets both as one row.
    """

    is_sliding = False

    def __init__(self, lengths: list[int], samples: int, steps: int, as_one_row: bool) -> None:
        super().__init__()
        self._as_one_row = as_one_row
        self._lengths, self._samples, self._steps = lengths, samples, steps
        self._filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._prefix = tuple(_unpack(states, self._lengths) for states in (key_states, value_states))
        rows = len(self._lengths) * self._samples
        self._suffix = tuple(
            states.new_empty(rows, states.shape[1], self._steps, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        key_states, value_states = narrowed(key_states), narrowed(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        for kept, states in zip(self._suffix, (key_states, value_states), strict=True):
            kept[:, :, self._filled] = states[:, :, 0]
        self._filled += 1
        parts = zip(self._prefix, self._suffix, strict=True)
        keys, values = ((prefix, suffix[:, :, : self._filled]) for prefix, suffix in parts)
        return (one_row(*keys), one_row(*values)) if self._as_one_row else (keys, values)

    def select(self, groups: Tensor, rows: Tensor) -> None:
        """Keeps these prompts and these samples; a layer that shares another's states has none."""
        if not self.is_initialized:
            return
        self._prefix = tuple(states[groups] for states in self._prefix)
        self._suffix = tuple(states[rows] for states in self._suffix)

    def get_seq_length(self) -> int:
        """Positions are given to the model explicitly; nothing is derived from this length."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The engine's attention takes a mask as a function of positions, not as a table of this size."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    # The name of the same method in transformers before 5.23.
    get_max_cache_shape = get_max_length


def _unpack(states: Tensor, lengths: list[int]) -> Tensor:
    """[1, K, T, D] of packed prompts to [G, K, longest, D], right-padded with zeros."""
    pieces = [piece[0].transpose(0, 1) for piece in states.split(lengths, dim=2)]
    return nn.utils.rnn.pad_sequence(pieces, batch_first=True).transpose(1, 2).contiguous()


class _Expanded:
    """Decoding with transformers' cache of left-padded prompts, repeated for each sample."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], n: int, steps: int) -> None:
        self._model = model
        device = next(model.parameters()).device
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._mask = (torch.arange(longest, device=device) >= longest - lengths.unsqueeze(1)).long()
        self._cache = DynamicCache(config=model.config)
        hidden = backbone(model)(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=self._mask,
            position_ids=(self._mask.cumsum(dim=1) - 1).clamp(min=0),
            cache=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._last = hidden[:, -1]
        self._cache.batch_repeat_interleave(n)
        self._mask = self._mask.repeat_interleave(n, dim=0)

    def prompt_logits(self) -> Tensor:
        """float32 [G, V]: of each prompt's first new token."""
        return head_logits(self._model, self._last)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """float32 [rows, V]: logits after one more token a row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        hidden = backbone(self._model)(
            input_ids=tokens.unsqueeze(1),
            attention_mask=self._mask,
            position_ids=positions.unsqueeze(1),
            cache=self._cache,
            use_cache=True,
        ).last_hidden_state[:, 0]
        return head_logits(self._model, hidden)

    def compact(self, alive: Tensor) -> Tensor:
        """Drops finished rows; returns the rows kept."""
        rows = alive.nonzero().squeeze(1)
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]
        return rows


class _Whole:
    """Decoding without a cache: the rows are read anew at every step, as `completion_hidden_states` reads them."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], n: int, steps: int) -> None:
        self._model = model
        self._prompts = prompts
        self._samples = [(group, list[int]()) for group in range(len(prompts)) for _ in range(n)]

    def prompt_logits(self) -> Tensor:
        """float32 [G, V]: of each prompt's first new token."""
        # A token, whichever, stands for the first one, which is predicted before it.
        hidden, _ = completion_hidden_states(self._model, [Row(prompt, ([0],)) for prompt in self._prompts])
        return head_logits(self._model, hidden)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """float32 [rows, V]: logits after one more token a row."""
        for (_, own), token in zip(self._samples, tokens.tolist(), strict=True):
            own.append(token)
        by_group = itertools.groupby(self._samples, key=lambda sample: sample[0])
        rows = [Row(self._prompts[group], tuple(own for _, own in samples)) for group, samples in by_group]
        _, last = completion_hidden_states(self._model, rows)
        return head_logits(self._model, last)

    def compact(self, alive: Tensor) -> Tensor:
        """Drops finished rows; returns the rows kept."""
        rows = alive.nonzero().squeeze(1)
        self._samples = [self._samples[i] for i in rows.tolist()]
        return rows


DECODERS: dict[str | None, Any] = {
    "shared": _SharedPrefix,
    "one_row": functools.partial(_SharedPrefix, as_one_row=True),
    "cached": _Expanded,
    "whole": _Whole,
}
