"""Log-probabilities of completions: the one function that every trainer, cache and estimate goes through.

Vocabulary logits are computed for positions that predict completion tokens only, in chunks, in float32.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.errors import UserError
from prefopt.lm.attention import packed_layout
from prefopt.lm.batching import Row
from prefopt.lm.engine import Engine, backbone, engine_of, output_head, position_limit
from prefopt.lm.precision import narrowed, product
from prefopt.lm.sharding import within

# Logits of at most this many bytes are kept for the backward pass; more are computed again there, chunk by chunk.
_KEEP_BYTES = 256 * 2**20
# What a chunk takes: little enough for a CPU's cache, and enough rows for a GPU's matrix product.
_CHUNK_BYTES = 32 * 2**20
_GPU_CHUNK_BYTES = 256 * 2**20
# Chunks that one gradient of the head's weights is made of where a CPU computes in bfloat16: to widen and add it takes as long as
# to make it of one.
_NARROW_CHUNKS = 4


@dataclasses.dataclass(frozen=True)
class CompletionLogprobs:
    """Natural-log probabilities of completions given their prompts; rows in order, completions in order."""

    tokens: Tensor  # float32 [total completion tokens], flat; differentiable
    lengths: Tensor  # int64 [number of completions], on the CPU

    @property
    def sums(self) -> Tensor:
        """float32 [number of completions]: summed over each completion's tokens, EOS included."""
        owner = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths).to(self.tokens.device)
        return self.tokens.new_zeros(len(self.lengths)).index_add(0, owner, self.tokens)


def completion_logprobs(model: nn.Module, rows: Sequence[Row], *, temperature: float = 1.0) -> CompletionLogprobs:
    """Log-probability of every completion token given the prompt and the tokens before it.

    Args:
        model: a causal language model loaded by `prefopt.lm.models`.
        rows: prompts with their completions.
        temperature: logits are divided by it, > 0.

    Raises:
        UserError: a prompt with a completion is longer than the model's positions.
    """

    def token_logprobs() -> Tensor:
        predicting, _ = completion_hidden_states(model, rows)
        targets = torch.tensor(
            [token for row in rows for completion in row.completions for token in completion], device=predicting.device
        )
        head, engine = output_head(model), engine_of(model)
        logps: Tensor = _TokenLogprobs.apply(
            narrowed(predicting), head.weight, getattr(head, "bias", None), targets, temperature, engine
        )
        return logps

    lengths = torch.tensor([len(completion) for row in rows for completion in row.completions])
    return CompletionLogprobs(within(model, token_logprobs), lengths)


def completion_hidden_states(model: nn.Module, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """The backbone's last hidden states around completion tokens.

    Of a model whose weights are sharded it is called inside `prefopt.lm.sharding.within`.

    Returns:
        predicting [total completion tokens, d], from which each completion token is predicted, and
        last [number of completions, d], at each completion's last token. Rows in order, completions in order.

    Raises:
        UserError: a prompt with a completion is longer than the model's positions.
    """
    _check_positions(model, rows)
    forward = _packed_forward if engine_of(model).rows == "packed" else _padded_forward
    return forward(model, rows)


def pad_flat(flat: Tensor, lengths: Tensor, value: float = 0.0) -> Tensor:
    """Turns a flat tensor [sum of lengths] into [n, longest], right-padded with `value`."""
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    padded = flat.new_full(mask.shape, value)
    return padded.masked_scatter(mask.to(flat.device), flat)


def _packed_forward(model: nn.Module, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """All rows in one sequence without padding; a prompt is read once for all its completions."""
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    last: list[int] = []
    for row in rows:
        prompt = len(row.prompt)
        prompt_end = len(ids) + prompt - 1
        ids += row.prompt
        positions += range(prompt)
        for completion in row.completions:
            start = len(ids)
            ids += completion
            positions += range(prompt, prompt + len(completion))
            predicting += [prompt_end, *range(start, len(ids) - 1)]
            last.append(len(ids) - 1)
    device = next(model.parameters()).device
    hidden = backbone(model)(
        input_ids=torch.tensor([ids], device=device),
        # Without a mask transformers would take the places where positions restart for the starts of rows.
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
        position_ids=torch.tensor([positions], device=device),
        use_cache=False,
        packed=packed_layout(rows, device),
    ).last_hidden_state[0]
    return _take(hidden, predicting), _take(hidden, last)


def _padded_forward(model: nn.Module, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """A right-padded batch row for each prompt with one completion, under the model's own attention."""
    sequences = [(len(row.prompt), [*row.prompt, *completion]) for row in rows for completion in row.completions]
    longest = max(len(ids) for _, ids in sequences)
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in sequences])
    lengths = torch.tensor([len(ids) for _, ids in sequences])
    device = next(model.parameters()).device
    hidden = backbone(model)(
        input_ids=padded.to(device),
        attention_mask=(torch.arange(longest) < lengths.unsqueeze(1)).long().to(device),
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)
    predicting: list[int] = []
    last: list[int] = []
    for i, (prompt, ids) in enumerate(sequences):
        predicting += range(i * longest + prompt - 1, i * longest + len(ids) - 1)
        last.append(i * longest + len(ids) - 1)
    return _take(hidden, predicting), _take(hidden, last)


def _take(hidden: Tensor, indices: list[int]) -> Tensor:
    return hidden.index_select(0, torch.tensor(indices, device=hidden.device))


def _check_positions(model: nn.Module, rows: Sequence[Row]) -> None:
    limit = position_limit(model.config)
    longest = max(len(row.prompt) + max(map(len, row.completions)) for row in rows)
    if limit is not None and longest > limit:
        raise UserError(f"a prompt with its completion has {longest} tokens, the model has {limit} positions: cut it.")


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(f(h W^T + b) / temperature)[target] for each position, f being what the model does after its head.

    It never holds several copies of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        engine: Engine,
    ) -> Tensor:
        ctx.temperature, ctx.engine = temperature, engine
        ctx.chunk = max(1, (_GPU_CHUNK_BYTES if hidden.is_cuda else _CHUNK_BYTES) // (4 * weight.shape[0]))
        needs_gradient = any(ctx.needs_input_grad[:3])
        keep = needs_gradient and 4 * len(hidden) * weight.shape[0] <= _KEEP_BYTES and engine.softcap is None
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        log_normalisers = torch.empty_like(logps)
        totals = torch.ones_like(logps)  # of what is kept, by which the softmax is still to be divided
        kept: list[Tensor] = []
        compute_weight = weight.to(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(hidden), ctx.chunk):
                logits = _logits(hidden[part], compute_weight, bias, temperature, engine)
                of_targets = logits.gather(1, targets[part, None]).squeeze(1)
                # In place, since copies of the logits cost more than the arithmetic.
                largest = logits.amax(dim=1, keepdim=True)
                exponentials = logits.sub_(largest).exp_()
                total = exponentials.sum(dim=1)
                log_normalisers[part] = total.log() + largest.squeeze(1)
                logps[part] = of_targets - log_normalisers[part]
                if keep:
                    totals[part] = total
                    kept.append(exponentials)
        if needs_gradient:
            ctx.kept = kept
            ctx.save_for_backward(hidden, weight, bias, targets, log_normalisers, totals)
        return logps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        hidden, weight, bias, targets, log_normalisers, totals = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        engine: Engine = ctx.engine
        gradient = gradient * (engine.scale / ctx.temperature)
        hidden_gradient = torch.empty_like(hidden)
        # A head beside an adapter does not learn.
        weight_gradient = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        bias_gradient = None if bias is None else torch.zeros_like(bias)
        compute_weight = weight.to(hidden.dtype)
        together = _NARROW_CHUNKS if weight.dtype != hidden.dtype and not hidden.is_cuda else 1
        parts = iter(enumerate(_chunks(len(hidden), ctx.chunk)))

        def of_logits(i: int, part: slice) -> Tensor:
            slope = None
            if kept:
                exponentials, kept[i] = kept[i], None
            else:
                logits = _logits(hidden[part], compute_weight, bias, ctx.temperature, engine)
                if engine.softcap is not None:
                    slope = 1 - (logits * (ctx.temperature / engine.softcap)).square_()  # of the tanh
                exponentials = logits.sub_(log_normalisers[part, None]).exp_()
            # In place: the exponentials become the gradient, gradient * (onehot - softmax).
            found: Tensor = exponentials.mul_((-gradient[part] / totals[part])[:, None])
            found.scatter_add_(1, targets[part, None], gradient[part, None])
            return (found if slope is None else found.mul_(slope)).to(hidden.dtype)

        with torch.autocast(hidden.device.type, enabled=False):
            for first, part in enumerate(_chunks(len(hidden), together * ctx.chunk)):
                found = [of_logits(i, chunk) for i, chunk in itertools.islice(parts, together)]
                of_part = found[0] if len(found) == 1 else torch.cat(found)
                torch.mm(of_part, compute_weight, out=hidden_gradient[part])
                if weight_gradient is not None and weight.dtype == hidden.dtype:
                    # With beta 0 the first chunk overwrites what is not initialised.
                    weight_gradient.addmm_(of_part.t(), hidden[part], beta=min(first, 1))
                elif weight_gradient is not None:
                    added = product(of_part.t(), hidden[part]) if hidden.is_cuda else of_part.t() @ hidden[part]
                    weight_gradient = weight_gradient.add_(added) if first else weight_gradient.copy_(added)
                if bias_gradient is not None:
                    bias_gradient += of_part.sum(dim=0)
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, engine: Engine) -> Tensor:
    logits = engine.logits(hidden, weight, bias)
    return logits.div_(temperature) if temperature != 1 else logits


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
