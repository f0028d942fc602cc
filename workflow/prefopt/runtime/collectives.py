"""Sums and lists over all processes that train together (see `prefopt.runtime.processes`).

For a process that runs alone every function returns what it was given. Tensors that pass between processes lie on the
CPU.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from prefopt.runtime import processes

Item = TypeVar("Item")

# The slowest thing that one process does while the others wait: writing or reading a model of some billions.
_TIMEOUT = datetime.timedelta(hours=2)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the group that the environment describes; leaves it when the block ends without an error.

    After an error nothing is waited for: whoever started the processes ends the others.
    """
    if processes.count() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    meeting = f"file://{os.environ['PREFOPT_STORE']}" if "PREFOPT_STORE" in os.environ else "env://"
    dist.init_process_group(
        backend, init_method=meeting, rank=processes.rank(), world_size=processes.count(), timeout=_TIMEOUT
    )
    yield
    dist.barrier()
    dist.destroy_process_group()


def barrier() -> None:
    """Waits until every process is here."""
    if processes.count() > 1:
        dist.barrier()


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """Each figure summed over the processes, all of which give the same names; in double precision."""
    if processes.count() == 1:
        return dict(values)
    tensor = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(tensor)
    return dict(zip(values, tensor.tolist(), strict=True))


def summed_tensor(tensor: Tensor) -> Tensor:
    """A CPU tensor summed over the processes; each holds zero where another has the value."""
    if processes.count() > 1:
        dist.all_reduce(tensor)
    return tensor


def agreed(flag: bool) -> bool:
    """Whether any process raises the flag."""
    return summed({"flag": float(flag)})["flag"] > 0


def in_turn(items: list[Item]) -> list[Item]:
    """What this process takes of a list that is dealt out one by one."""
    return items[processes.rank() :: processes.count()]


def collected(dealt: list[Any], total: int) -> list[Any]:
    """What each process made of its part of `in_turn`, in the list's order, for every process.

    Args:
        dealt: this process's results.
        total: length of the list that was dealt out.
    """
    if processes.count() == 1:
        return dealt
    parts: list[list[Any]] = [[] for _ in range(processes.count())]
    dist.all_gather_object(parts, dealt)
    return [parts[i % processes.count()][i // processes.count()] for i in range(total)]


def from_each(value: Item) -> list[Item]:
    """Every process's value, for every process, by its number."""
    return collected([value], processes.count())


def from_main(value: Item) -> Item:
    """The main process's value, for every process."""
    told: list[Item] = collected([value] if processes.is_main() else [], 1)
    return told[0]
