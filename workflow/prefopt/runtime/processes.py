"""Several processes that train one model together: who is who.

A process that runs alone is a group of one. The group is that of torchrun's environment variables, which `launch`
sets too. What passes between the processes is in `prefopt.runtime.collectives`.
"""

from __future__ import annotations

import os


def rank() -> int:
    """This process's number among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def here() -> int:
    """How many of them run on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count()))


def is_main() -> bool:
    """Whether this process writes what all have made."""
    return rank() == 0
