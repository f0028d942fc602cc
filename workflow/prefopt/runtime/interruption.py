"""Stopping between two steps when asked to: SIGTERM (a time limit, a preemption) or SIGUSR1."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from types import FrameType

logger = logging.getLogger(__name__)

# Exit code of a trainer that has saved and wants to be run again: EX_TEMPFAIL of sysexits.h.
RUN_AGAIN = 75

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_received: list[str] = []


class Interrupted(Exception):
    """A trainer has saved its checkpoint because it was asked to stop."""


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Notes the signals instead of dying of them while the block runs; every later one is noted too."""
    before = {number: signal.signal(number, _note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def asked_to_stop() -> bool:
    """Whether this process was asked to stop."""
    return bool(_received)


def _note(number: int, _: FrameType | None) -> None:
    name = signal.Signals(number).name
    if not _received:
        logger.info("%s: saving after this step", name)
    _received.append(name)
