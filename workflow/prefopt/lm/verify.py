"""Whether the engine computes what a model's own forward pass does: tried on loading, and never taken from a name.

On a small copy with random weights (`prefopt.lm.small`) each row of random tokens is read alone by the model itself, as
transformers computes it, and by the engine: short and long rows, longer than any window, packed with one another, two
completions after each prompt, and the same tokens step by step as samples are drawn. What agrees is used: packed rows
if they do, padded batches otherwise, and a model that neither computes is refused.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.errors import UserError
from prefopt.lm.attention import NAME, uses_registry
from prefopt.lm.batching import Row
from prefopt.lm.engine import Engine, backbone, head_logits, output_head, position_limit, score_head
from prefopt.lm.logprobs import completion_hidden_states, completion_logprobs
from prefopt.lm.sampling import DECODERS
from prefopt.lm.small import KINK, longest_kink, small_copies
from prefopt.runtime import collectives, processes

logger = logging.getLogger(__name__)

# Nats by which a token's log-probability may differ, and units by which a score may. Rounding makes a hundredth of it.
TOLERANCE = 1e-3

_ROWS = {"packed": "packed rows", "padded": "padded batches"}
_SAMPLING = {
    "shared": "one cache of each prompt for all its samples",
    "one_row": "one cache of each prompt for all its samples, as one row",
    "cached": "a cache of its own for each sample",
    "whole": "samples drawn without a cache",
    None: "scores only",
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """What was found of an architecture."""

    engine: Engine | None  # None: neither packed rows nor padded batches are right
    error: float  # of what is used: largest difference, in nats or in units of the score
    failures: tuple[str, ...]  # what was tried before and why it is not used


# Of this process. A model and its reference, or four models of PPO, have one architecture.
_trials: dict[tuple[type, str], Trial] = {}


def use_engine(model: PreTrainedModel, name: str | Path | None = None, *, together: bool = False) -> PreTrainedModel:
    """Finds out how a model can be computed with, and makes it ready for that.

    Outside the engine's own calls the model computes what transformers does.

    Args:
        model: a causal language model or a scorer, in evaluation mode; it is changed in place.
        name: the folder that it came from, for the log and for errors.
        together: all processes call it; the main one, which alone has weights, finds out for all.

    Raises:
        UserError: the engine would compute something else than the model.
    """
    what = f"{type(model).__name__} of {name}" if name else type(model).__name__
    key = (type(model), model.config.to_json_string(use_diff=False))
    told = together and not processes.is_main()
    if key not in _trials:
        found = None if told else try_engine(model)
        _trials[key] = cast(Trial, collectives.from_main(found) if together else found)
    trial = _trials[key]
    if trial.engine is None:
        raise UserError(f"{what} is not computed rightly here ({'; '.join(trial.failures)}): use another model.")
    model.engine = trial.engine
    if not told:
        _check_head(model, what)
    if trial.engine.rows == "packed":
        model.set_attn_implementation(NAME)
    logger.info(
        "%s: %s, %s; at most %.1e off its own forward pass%s",
        *(what, _ROWS[trial.engine.rows], _SAMPLING[trial.engine.sampling], trial.error),
        "".join(f" (not {failure})" for failure in trial.failures),
    )
    return model


@torch.no_grad()
def try_engine(model: PreTrainedModel) -> Trial:
    """Compares every way of the engine with the model's own forward pass, on a small copy."""
    with torch.device("cpu"):  # whatever the caller's default is
        return _try_engine(model)


def _try_engine(model: PreTrainedModel) -> Trial:
    try:
        copied, rows, expected = _copy_with_outputs(model)
        scorer = output_head(copied) is None
        scale, softcap = (1.0, None) if scorer else _after_head(copied)
    except Exception as error:  # whatever an architecture does that is no causal language model's
        return Trial(None, float("inf"), (f"its own forward pass: {_reason(error)}",))
    own_attention = copied.config._attn_implementation
    failures: list[str] = []

    def first(options: Sequence[str], describe: dict[Any, str], error_of: Callable[[str], float]) -> tuple[Any, float]:
        for option in options:
            try:
                off = error_of(option)
                found = f"off by {off:.3g}"
            except Exception as error:
                off, found = float("inf"), _reason(error)
            if off <= TOLERANCE:
                return option, off
            failures.append(f"{describe[option]}: {found}")
        return None, float("inf")

    def rows_error(option: str) -> float:
        copied.set_attn_implementation(NAME if option == "packed" else own_attention)
        copied.engine = Engine(cast(Any, option), None, scale, softcap)
        return _scores_error(copied, rows, expected) if scorer else _rows_error(copied, rows, expected)

    def sampling_error(option: str) -> float:
        return _sampling_error(copied, option, rows, expected)

    of_rows, off = first(["packed", "padded"] if uses_registry(copied) else ["padded"], _ROWS, rows_error)
    if of_rows is None or scorer:
        engine = None if of_rows is None else Engine(of_rows, None, scale, softcap)
        return Trial(engine, off, tuple(failures))
    ways = ["shared", "one_row", "cached", "whole"] if of_rows == "packed" else ["cached", "whole"]
    sampling, off_sampling = first(ways, _SAMPLING, sampling_error)
    engine = None if sampling is None else Engine(of_rows, sampling, scale, softcap)
    return Trial(engine, max(off, off_sampling), tuple(failures))


def _copy_with_outputs(model: PreTrainedModel) -> tuple[PreTrainedModel, list[Row], list[Tensor]]:
    """The smallest copy that runs, under transformers' own attention, with random rows and its outputs of them."""
    failures: list[Exception] = []
    for make in small_copies(model):
        try:
            # No random number of the caller's is drawn.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                copied = make()
            if copied.config._attn_implementation == NAME:
                copied.set_attn_implementation(copied.get_correct_attn_implementation(None))
            rows = _random_rows(copied)
            return copied, rows, _own_outputs(copied, rows)
        except _NotCausalError:
            raise
        except Exception as error:
            failures.append(error)
    raise failures[-1]


class _NotCausalError(ValueError):
    """What is said of a token depends on later ones."""


def _random_rows(model: PreTrainedModel) -> list[Row]:
    """Three rows of two completions: a short one, one whose prompt and one whose completion exceeds any window."""
    usable = _usable_tokens(model)
    long = max(KINK, longest_kink(model.config))
    limit = position_limit(model.config) or 4 * long
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return [usable[i] for i in torch.randint(len(usable), (count,), generator=generator).tolist()]

    rows = []
    for prompt, completions in ((3, (2, 5)), (long + 3, (long // 2 + 3, 2)), (2, (long + 6, 3))):
        prompt = min(prompt, limit - 2)
        rows.append(Row(tokens(prompt), tuple(tokens(min(length, limit - prompt)) for length in completions)))
    return rows


def _usable_tokens(model: PreTrainedModel) -> list[int]:
    """Tokens that are no special ones, where there are any."""
    tokens = range(min(model.config.get_text_config(decoder=True).vocab_size, 1000))
    special = [value for key, value in model.config.to_dict().items() if key.endswith("token_id")]
    return [token for token in tokens if token not in special] or list(tokens)


def _own_outputs(model: PreTrainedModel, rows: Sequence[Row]) -> list[Tensor]:
    """Of each prompt with one completion, alone: logits [tokens, V], or a scorer's score [1].

    Raises:
        _NotCausalError: what comes later changes what is said of earlier tokens.
    """
    outputs = []
    for row in rows:
        for completion in row.completions:
            ids = torch.tensor([[*row.prompt, *completion]])
            logits = model(input_ids=ids, use_cache=False).logits
            if output_head(model) is not None:
                half = model(input_ids=ids[:, : len(row.prompt)], use_cache=False).logits
                later = _difference(half[0], logits[0, : len(row.prompt)])
                if not later <= TOLERANCE:
                    raise _NotCausalError(f"later tokens change the probabilities of earlier ones by {later:.3g} nats")
            outputs.append(logits[0])
    return outputs


def _after_head(model: PreTrainedModel) -> tuple[float, float | None]:
    """Scale and soft cap by which a model makes logits of the products of its head and its last hidden states.

    Raises:
        ValueError: it does something else.
    """
    head = output_head(model)
    vocabulary = head.weight.shape[0]
    products = torch.linspace(-50, 50, 2 * vocabulary).view(1, 2, vocabulary)
    products[0, :, 0], products[0, :, 1] = torch.tensor([1e6, 1.0]), 2.0**-7
    ids = torch.tensor([_usable_tokens(model)[-1:] * 2])
    hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    states: list[Tensor] = []
    handles = [
        head.register_forward_pre_hook(lambda _, given: states.append(given[0])),
        head.register_forward_hook(lambda *_: products.clone()),
    ]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    largest, scale = logits[0, :, 0].tolist()
    softcap = None if largest >= scale * 1e6 * 0.9 else largest
    if softcap is not None:
        scale = float(f"{logits[0, 0, 1].item() * 2**7:.6g}")  # a tanh of so little is linear, up to rounding
    found = Engine("padded", None, scale, softcap).finish_(products.clone())
    if logits.shape != products.shape or not torch.allclose(logits, found, rtol=1e-5, atol=1e-5):
        raise ValueError("it does more with the products of its head than to scale and to soft-cap them")
    (given,) = states
    before = ((hidden * given).sum() / hidden.square().sum()).item()
    if not torch.allclose(given, before * hidden, rtol=1e-4, atol=1e-4) or (before != 1 and head.bias is not None):
        raise ValueError("it does more with its last hidden states than to scale them")
    return scale * before, softcap


def _rows_error(model: PreTrainedModel, rows: Sequence[Row], expected: Sequence[Tensor]) -> float:
    found = completion_logprobs(model, rows).tokens
    tokens = []
    for (prompt, completion), logits in zip(_each(rows), expected, strict=True):
        logps = logits[prompt - 1 : -1].float().log_softmax(-1)
        tokens.append(logps.gather(1, torch.tensor(completion)[:, None]).squeeze(1))
    return _largest(found - torch.cat(tokens))


def _scores_error(model: PreTrainedModel, rows: Sequence[Row], expected: Sequence[Tensor]) -> float:
    _, last = completion_hidden_states(model, rows)
    return _largest(score_head(model)(last) - torch.stack(list(expected)))


def _sampling_error(model: PreTrainedModel, way: str, rows: Sequence[Row], expected: Sequence[Tensor]) -> float:
    """The first two tokens of each completion as if they were sampled; half of the samples end after the first."""
    samples = list(zip(_each(rows), expected, strict=True))
    decoder = DECODERS[way](model, [row.prompt for row in rows], 2, 2)
    error = _difference(
        decoder.prompt_logits(), torch.stack([logits[prompt - 1] for (prompt, _), logits in samples[::2]])
    )
    alive = list(range(len(samples)))
    for step in range(2):
        if step == 1:
            alive = decoder.compact(torch.tensor([False, False, True, False, True, True])).tolist()
        tokens = torch.tensor([samples[i][0][1][step] for i in alive])
        positions = torch.tensor([samples[i][0][0] + step for i in alive])
        own = torch.stack([samples[i][1][samples[i][0][0] + step] for i in alive])
        error = max(error, _difference(decoder.step(tokens, positions), own))
    return error


def _each(rows: Sequence[Row]) -> list[tuple[int, Sequence[int]]]:
    """Of each prompt with one completion, the prompt's length and the completion."""
    return [(len(row.prompt), completion) for row in rows for completion in row.completions]


@torch.no_grad()
def _check_head(model: PreTrainedModel, what: str) -> None:
    """The model itself, with its own weights and widths: a few tokens' logits or score from its last hidden states."""
    ids = torch.tensor([_usable_tokens(model)[-3:]], device=next(model.parameters()).device)
    own = model(input_ids=ids, use_cache=False).logits
    hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    found = score_head(model)(hidden[:, -1]) if output_head(model) is None else head_logits(model, hidden)
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 0.03
    off = _largest(found.float() - own.float())
    if not off <= tolerance * (1 + own.abs().max().item()):
        raise UserError(f"{what}: its head is not computed rightly here (off by {off:.3g}): use another model.")


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of log-probabilities."""
    return _largest(one.float().log_softmax(-1) - other.float().log_softmax(-1))


def _largest(difference: Tensor) -> float:
    largest = difference.abs().max().item()
    return largest if largest == largest else float("inf")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}, {lines[0][:120]}" if lines else type(error).__name__
