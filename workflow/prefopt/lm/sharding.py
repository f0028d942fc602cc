"""A model over several processes: its weights are sharded, gathered layer by layer, and saved whole.

torch's FSDP2 does the work. All processes must take the same number of forward and backward passes, which
`dealt_micro_batches` sees to; sampling, where that number is not known, runs on gathered weights.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prefopt.errors import UserError
from prefopt.lm.batching import Row, micro_batches
from prefopt.lm.engine import layers_of
from prefopt.runtime import processes
from prefopt.runtime.usage import default_device

Result = TypeVar("Result")


def place(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """Puts a model on this process's device, or on all processes' devices where there are several.

    The main process's weights go to all layer by layer, of which each keeps its share: no other process holds more than
    a layer (or the embeddings), on its host or its device.

    Args:
        model: float32 weights, on the CPU; of several processes the main one's count, and others need have none (`meta`).
        dtype: of forward and backward passes; gathered weights have it, the shards that are trained stay float32.

    Returns:
        The same model; its parameters are shards where there are several processes.
    """
    device = default_device()
    if processes.count() == 1:
        return model.to(device)
    mesh = init_device_mesh(device.type, (processes.count(),))
    compute = torch.bfloat16 if dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for part in [*_blocks(model), model]:
        _receive(part, device)
        fully_shard(part, mesh=mesh, mp_policy=policy)
    # The engine computes what it needs of a model itself; FSDP must know of it as a forward pass.
    model.run_within = types.MethodType(lambda self, function: function(), model)
    register_fsdp_forward_method(model, "run_within")
    return model


def recompute_activations(model: PreTrainedModel) -> None:
    """Lets each layer keep its input alone for the backward pass, which computes the rest again."""
    for block in _blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def within(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Calls a function as a forward pass of the model: sharded weights outside the layers are gathered for it.

    Args:
        model: whose weights the function uses.
        function: returns tensors; what is to be differentiated must be among them.
    """
    if not isinstance(model, FSDPModule):
        return function()
    run_within: Callable[[Callable[[], Result]], Result] = getattr(model, "run_within")  # noqa: B009
    result = run_within(function)
    if not torch.is_grad_enabled():
        model.reshard()  # FSDP leaves it to a backward pass, and until then `parameters()` are not the shards
    return result


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Holds all weights in this process, so that it may take as many forward passes as it likes."""
    if not isinstance(model, FSDPModule):
        yield
        return
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with torch.no_grad():
        within(model, lambda: None)  # the first forward pass says which module is the root
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def dealt_micro_batches(rows: Sequence[Row], token_budget: int) -> list[tuple[list[int], bool]]:
    """This process's micro-batches of `rows`, each with whether it counts.

    Rows are dealt out by length, so that every process has about as many tokens, and every process gets equally
    many micro-batches: one that would have fewer gets some that do not count.

    Args:
        rows: what all processes together shall read.
        token_budget: most tokens of a micro-batch.

    Returns:
        Indices into `rows`, and False where a micro-batch only keeps step with the others. Over all processes
        each index is in exactly one micro-batch that counts.
    """
    count = processes.count()
    order = sorted(range(len(rows)), key=lambda i: (rows[i].tokens, i))
    hands = [order[i::count] for i in range(count)]
    dealt = [
        [[hand[i] for i in batch] for batch in micro_batches([rows[i] for i in hand], token_budget)] for hand in hands
    ]
    own = [(batch, True) for batch in dealt[processes.rank()]]
    return own + [(order[:1], False)] * (max(map(len, dealt)) - len(own))


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """All weights on the CPU, in the main process; empty in the others, which must call it too.

    A weight that serves twice, as embedding and as head, comes once.
    """
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {name: tensor for name, tensor in weights.items() if name in names}


def _receive(module: nn.Module, device: torch.device) -> None:
    """Puts what of a module is not sharded yet on a device, with the main process's values; what serves twice still does."""
    own: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        whole = owner.named_parameters(recurse=False), owner.named_buffers(recurse=False)
        for name, tensor in [*itertools.chain(*whole)]:
            if isinstance(tensor, DTensor):
                continue
            if tensor not in own:
                values = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
                dist.broadcast(values, src=0)
                learns = tensor.requires_grad
                own[tensor] = nn.Parameter(values, learns) if isinstance(tensor, nn.Parameter) else values
            setattr(owner, name, own[tensor])


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer's layers."""
    blocks = layers_of(model)
    if not blocks:
        raise UserError(
            f"the layers of a {type(model).__name__} cannot be told, as several processes and activation_checkpointing "
            f"need: train it in one process and without."
        )
    return blocks
