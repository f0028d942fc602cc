"""Numbers that must be finite, checked where they are made and where they are used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from prefopt.errors import UserError

# So many ids stand in a message; the others are counted.
_NAMED = 8


def require_finite(values: ArrayLike, ids: Iterable[str], what: str, advice: str, when: str = "") -> None:
    """Raises an error that names what is NaN or infinite, and whose it is.

    Args:
        values: float [n] or [n, ...] on the CPU, one entry (or several) of each id.
        ids: n names; one that comes several times is named once.
        what: is not finite, e.g. "the reward".
        advice: what to do, without a full stop.
        when: follows the value, e.g. " at step 7".

    Raises:
        UserError: a value is not finite: names the first one and the ids of all.
    """
    array = np.asarray(values, dtype=np.float64)
    flat = array.reshape(len(array), math.prod(array.shape[1:]))
    bad = ~np.isfinite(flat)
    if not bad.any():
        return
    names = [name for name, row in zip(ids, bad, strict=True) if row.any()]
    raise UserError(f"{what} is {flat[bad][0]:g}{when} for {listed(names)}: {advice}.")


def listed(ids: Sequence[str]) -> str:
    """The first few different ids, and how many others there are."""
    names = list(dict.fromkeys(ids))
    others = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {others} others" if others > 0 else "")
