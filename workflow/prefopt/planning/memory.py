"""Peak memory of a stage in each of its processes, in bytes, as a sum of named parts.

What autograd keeps of a layer was read off torch for each architecture and is tested by training and sampling with
real models (`tests/unit/planning/test_measured_memory.py`). The interpreter and CUDA's own libraries are not in it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from prefopt.lm.batching import ROW_BUDGET, cache_room, prompts_at_once
from prefopt.planning.architecture import (
    Architecture,
    adapter_parameters,
    language_model_parameters,
    layer_parameters,
    scorer_parameters,
)

# As in lm/logprobs.py, lm/attention.py and lm/sampling.py, which import torch; a test compares them.
KEEP_BYTES = 256 * 2**20
CHUNK_BYTES = {False: 32 * 2**20, True: 256 * 2**20}  # on a CPU, on a GPU
GROUP_TOKENS = 192
# Tokens that vLLM reads, and completions that it goes on with, at once: its own defaults, and its rows on a smaller GPU; and
# the share of a GPU's memory that it takes.
VLLM_TOKENS, VLLM_ROWS, VLLM_SHARE = 8192, 256, 0.9

_FLOAT = 4
# Floats that autograd keeps of a layer for each token: in units of the hidden size, of the residual stream (what the
# norms read) and of the rest, without the keys and values of completions; and in units of the feed-forward width.
_KEPT = {
    "gpt2": (2.0, 7.0, 5.0),
    "gpt_neox": (1.0, 9.0, 2.0),
    "llama": (4.0, 7.0, 4.0),
    "gptj": (1.0, 6.0, 5.0),
    "roberta": (2.0, 7.0, 2.0),
}
# Floats in units of the feed-forward width that a layer holds for each token while it runs, one way or the other.
_PASSING = {"gpt2": 4.0, "gpt_neox": 2.0, "llama": 3.0, "gptj": 4.0, "roberta": 2.0}

Parts = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Engine:
    """How a job computes."""

    dtype: str = "float32"  # of forward and backward passes, float32 or bfloat16; trained weights are float32
    token_budget: int = 2500  # tokens of a micro-batch
    processes: int = 1  # that share weights, gradients and optimizer states
    gpu: bool = False
    checkpointing: bool = False  # keep each layer's input only, and compute the rest again

    @property
    def width(self) -> int:
        """Bytes of a number that a matrix product reads or writes."""
        return 4 if self.dtype == "float32" else 2

    @property
    def residual_width(self) -> int:
        """Bytes of a number of the residual stream, which autocast keeps in float32."""
        return 4 if self.processes == 1 else self.width


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one kind: a prompt, and the completions that follow it; lengths in tokens."""

    prompt: int
    completions: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.prompt < 1 or min(self.completions, default=1) < 1:
            raise ValueError(f"a prompt and a completion have at least one token each: {self}")

    @property
    def tokens(self) -> int:
        """Tokens of a row as micro-batches count them, the prompt once."""
        return self.prompt + sum(self.completions)


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What runs through a model at once."""

    rows: Rows
    count: int

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return self.count * self.rows.tokens

    @property
    def predicted(self) -> int:
        """Tokens of completions."""
        return self.count * sum(self.rows.completions)

    def groups(self) -> list[int]:
        """Tokens of each group of completions that attends together, for one row."""
        groups: list[int] = []
        for length in self.rows.completions:
            if not groups or groups[-1] + length > GROUP_TOKENS:
                groups.append(0)
            groups[-1] += length
        return groups


def micro_batch(rows: Rows, engine: Engine, batch: int) -> MicroBatch:
    """The largest micro-batch of rows of this kind.

    Args:
        rows: their lengths.
        engine: its token budget, and among how many processes a batch is divided.
        batch: rows of an optimizer step, or of all that is read.
    """
    share = math.ceil(batch / engine.processes)
    return MicroBatch(rows, max(1, min(share, engine.token_budget // rows.tokens)))


@dataclasses.dataclass(frozen=True)
class Resident:
    """A model in memory that is not trained, its parameters in the width of `dtype`."""

    parameters: int
    dtype: str = "float32"

    def bytes(self, engine: Engine) -> int:
        """Bytes in each of the processes that share it."""
        return self.parameters * (_FLOAT if self.dtype == "float32" else 2) // engine.processes


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model that is trained.

    Args:
        model: its architecture.
        outputs: of a scorer's head; None is a language model.
        states: optimizer states a parameter: 1 for RMSprop, 2 for AdamW.
        adapter_rank: of low-rank adapters, beside which the weights stay as they are; None trains all.
    """

    model: Architecture
    outputs: int | None
    states: int
    adapter_rank: int | None = None

    @property
    def parameters(self) -> int:
        """Parameters without adapters."""
        if self.outputs is None:
            return language_model_parameters(self.model)
        return scorer_parameters(self.model, self.outputs)

    @property
    def trainable(self) -> int:
        """Parameters that take a gradient."""
        if self.adapter_rank is None:
            return self.parameters
        head = 0 if self.outputs is None else self.outputs * self.model.hidden
        return adapter_parameters(self.model, self.adapter_rank) + head


def training(
    trained: Sequence[Trained],
    batch: MicroBatch,
    engine: Engine,
    *,
    micro_batches: int,
    others: Sequence[Resident] = (),
) -> Parts:
    """Peak of a training step from the second on, when the optimizer has its states.

    Args:
        trained: models whose losses are summed: one, or PPO's policy and value network.
        batch: the largest micro-batch.
        engine: see `Engine`.
        micro_batches: of a step; from the second on, gradients are there while activations are.
        others: further models in memory.
    """
    weights = sum(one.parameters + _added(one) for one in trained) * _FLOAT // engine.processes
    gradients = sum(one.trainable for one in trained) * _FLOAT // engine.processes
    parts = {
        "weights": weights,
        "optimizer": sum(one.trainable * one.states for one in trained) * _FLOAT // engine.processes,
        "other models": sum(other.bytes(engine) for other in others),
    }
    backward = {
        **parts,
        "gradients": gradients if micro_batches > 1 else 0,
        "activations": sum(activations(one, batch, engine) for one in trained),
        "gradient of the output head": sum(head_gradient(one, engine) for one in trained),
        "gathered weights": sum(gathered(one, engine) for one in trained),
        "passing": max(_passing_in_training(one, batch, engine) for one in trained),
    }
    # After the backward pass the optimizer's temporaries: on a GPU for all weights at once, else for the largest, one for
    # each of its states.
    largest = max(min(one.trainable, one.model.vocabulary * one.model.hidden) * one.states for one in trained)
    temporary = gradients if engine.gpu else largest * _FLOAT // engine.processes
    step = {**parts, "gradients": gradients, "optimizer's temporaries": temporary}
    return _nonzero(max(backward, step, key=lambda parts: sum(parts.values())))


def activations(one: Trained, batch: MicroBatch, engine: Engine) -> int:
    """Bytes of what the backward pass needs of the forward pass."""
    model, tokens = one.model, batch.tokens
    layer = _kept_of_layer(model, batch, engine)
    outside = 3 * tokens * model.hidden * engine.residual_width  # the embeddings, and around the last norm
    if engine.checkpointing:
        return model.layers * tokens * model.hidden * engine.residual_width + layer + outside
    return model.layers * layer + outside


def head_gradient(one: Trained, engine: Engine) -> int:
    """Bytes of the gradient of the output head's weights, which is there while all activations still are.

    A head beside an adapter has none. In bfloat16 there is a copy of the weights beside it.
    """
    if one.outputs is not None:
        return 0
    weights = one.model.vocabulary * one.model.hidden
    copy = engine.width if engine.width != _FLOAT else 0
    return weights * ((_FLOAT if one.adapter_rank is None else 0) + copy)


def gathered(one: Trained, engine: Engine) -> int:
    """Bytes of weights in the width of the computation beside their float32 originals.

    One process computing in bfloat16 has a copy of every matrix. Processes that share the weights gather what lies
    outside the layers and two layers at a time, with as much for their gradients before they are shared again.
    """
    model = one.model
    layers = model.layers * layer_parameters(model)
    if engine.processes == 1:
        return layers * engine.width if engine.width != _FLOAT else 0
    return 2 * (one.parameters - layers + 2 * layer_parameters(model)) * engine.width


def gathered_for_reading(model: Architecture, models: Sequence[Resident], engine: Engine) -> int:
    """Bytes of the same where there are no gradients: one model after another reads."""
    layers = model.layers * layer_parameters(model)
    if engine.processes > 1:
        return (language_model_parameters(model) - layers + 2 * layer_parameters(model)) * engine.width
    autocast = engine.width != _FLOAT and any(one.dtype == "float32" for one in models)
    return layers * engine.width if autocast else 0


def reading(models: Sequence[Resident], model: Architecture, batch: MicroBatch, engine: Engine) -> Parts:
    """Peak of reading rows without gradients: reference log-probabilities, scores.

    Args:
        models: all models in memory.
        model: the largest of those that read.
        batch: the largest micro-batch.
        engine: see `Engine`.
    """
    hidden = 2 * batch.tokens * model.hidden * engine.residual_width
    logits = 3 * min(CHUNK_BYTES[engine.gpu], batch.predicted * model.vocabulary * _FLOAT)
    return _nonzero(
        {
            "weights": sum(one.bytes(engine) for one in models),
            "gathered weights": gathered_for_reading(model, models, engine),
            # First a layer's intermediate results, then the logits.
            "passing": hidden + max(_passing(model, batch, engine), logits),
        }
    )


def sampling(
    models: Sequence[Resident],
    model: Architecture,
    *,
    prompt: int,
    new_tokens: int,
    n: int,
    prompts: int,
    dtype: str,
    gpu_bytes: int | None,
    beside: int = 0,
) -> Parts:
    """Peak of sampling n completions of each of `prompts` prompts.

    Args:
        models: all models in memory; each is whole in every process that samples.
        model: the one that is sampled.
        prompt: tokens of a prompt.
        new_tokens: most tokens of a completion.
        n: completions of each prompt.
        prompts: how many there are.
        dtype: of the weights and of the cache.
        gpu_bytes: memory of the GPU on which it is sampled; None on a CPU.
        beside: bytes of what else is in memory.
    """
    width = _FLOAT if dtype == "float32" else 2
    token = cache_of_token(model, width)
    weights = sum(one.bytes(Engine()) for one in models)
    free = None if gpu_bytes is None else gpu_bytes - weights - beside
    limits = (ROW_BUDGET[free is not None], cache_room(free))
    groups = min(prompts, prompts_at_once(n, prompt, new_tokens, token, *limits, shared_prefix=True))
    rows = groups * n
    cache = (groups * prompt + rows * new_tokens) * token
    logits = rows * model.vocabulary * _FLOAT
    scores = 3 * rows * model.heads * (prompt + new_tokens) * _FLOAT
    prefill = _passing(model, MicroBatch(Rows(prompt, ()), groups), Engine(dtype=dtype, processes=2))
    # A step has the logits of the one before; while a layer's cache grows, or loses finished rows, it is there twice.
    step = logits + max(scores, cache // model.layers)
    # The logits, over the temperature, as probabilities, and summed up.
    draw = 4 * logits
    return _nonzero(
        {
            "weights": weights,
            "cache": cache,
            "passing": max(prefill, step, draw),
        }
    )


def served(parameters: int, model: Architecture, longest: int, engine: Engine) -> Parts:
    """What each GPU of a vLLM server must hold at least; it takes `VLLM_SHARE` of the GPU, and keeps more rows with it.

    Args:
        parameters: of the model.
        model: its architecture.
        longest: most tokens of a prompt with its completion.
        engine: the dtype of weights, passes and cache, and over how many GPUs the model is spread.
    """
    passing = _passing(model, MicroBatch(Rows(VLLM_TOKENS, ()), 1), engine)
    return _nonzero(
        {
            "weights": Resident(parameters, engine.dtype).bytes(engine),
            "cache": longest * cache_of_token(model, engine.width) // engine.processes,
            "passing": max(passing // engine.processes, 2 * VLLM_ROWS * model.vocabulary * _FLOAT),
        }
    )


def cache_of_token(model: Architecture, width: int) -> int:
    """Bytes of a token's keys and values in all layers."""
    return 2 * model.layers * model.kv_heads * model.head_width * width


def total(parts: Parts) -> int:
    """Bytes in all."""
    return sum(parts.values())


def _added(one: Trained) -> int:
    return 0 if one.adapter_rank is None else one.trainable


def _passing_in_training(one: Trained, batch: MicroBatch, engine: Engine) -> int:
    """Bytes that come and go at the start of the backward pass: the logits, then the last layer's gradients."""
    logits = 0
    if one.outputs is None:
        all_logits = batch.predicted * one.model.vocabulary * _FLOAT
        chunk = min(all_logits, CHUNK_BYTES[engine.gpu])
        # On a CPU two copies, of the allocator's and of the product's; on a GPU one in the width of the computation.
        copies = 2 * chunk if not engine.gpu else chunk // 2 if engine.width != _FLOAT else 0
        logits = (all_logits if all_logits <= KEEP_BYTES else chunk) + copies
    return max(logits, _passing(one.model, batch, engine))


def _kept_of_layer(model: Architecture, batch: MicroBatch, engine: Engine) -> int:
    """Bytes that autograd keeps of one layer."""
    tokens, (residual, rest, wide) = batch.tokens, _KEPT[model.kind]
    width = engine.width
    kept = tokens * model.hidden * (residual * engine.residual_width + rest * width)
    wide_width = wide * width
    if model.kind in ("gpt2", "gptj") and width != _FLOAT and engine.processes == 1:
        wide_width = 16  # on a GPU, autocast raises to a power in float32: three such numbers and two narrow ones
    kept += tokens * model.intermediate * wide_width
    # Each group of completions has its prompt's keys and values before its own, and a mask of floats.
    groups = batch.groups()
    keys = sum(batch.rows.prompt + group for group in groups)
    masks = sum(group * (batch.rows.prompt + group) for group in groups)
    kept += batch.count * (2 * keys * model.attention_width + masks) * width
    kept += tokens * (model.heads + 4) * _FLOAT
    return int(kept)


def _passing(model: Architecture, batch: MicroBatch, engine: Engine) -> int:
    """Bytes of a layer's intermediate results that nothing keeps."""
    return int(batch.tokens * (_PASSING[model.kind] * model.intermediate + 4 * model.hidden) * engine.width)


def _nonzero(parts: Parts) -> Parts:
    return {name: size for name, size in parts.items() if size}
