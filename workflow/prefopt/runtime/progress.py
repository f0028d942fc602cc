"""A bar with rate and time left on a terminal, plain periodic lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Self

from tqdm import tqdm

_LINES_EVERY = 10.0  # seconds between two lines in a log

logger = logging.getLogger(__name__)


class Progress:
    """Counts finished units of work (`done`) and shows them.

    Args:
        name: what is being done, e.g. "dpo".
        total: how many units there are.
        unit: what is counted, e.g. "pairs".
        done: units that an earlier, interrupted run has finished.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0) -> None:
        self._name, self._total, self._unit, self.done = name, total, unit, done
        self._first = done
        self._start = self._last_line = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=done, desc=name, unit=f" {unit}", dynamic_ncols=True)
            if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)
            else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.done > self._first:
            self._line({})

    def update(self, units: int, **figures: float) -> None:
        """Adds finished units; `figures` (a loss, a reward ...) are shown beside the count."""
        self.done += units
        if self._bar is not None:
            self._bar.set_postfix({key: f"{value:.4g}" for key, value in figures.items()}, refresh=False)
            self._bar.update(units)
        elif time.monotonic() - self._last_line >= _LINES_EVERY:
            self._line(figures)

    def _line(self, figures: dict[str, Any]) -> None:
        self._last_line = time.monotonic()
        elapsed = max(self._last_line - self._start, 1e-9)
        rate = (self.done - self._first) / elapsed
        left = (self._total - self.done) / rate if rate else float("inf")
        extra = "".join(f", {key} {value:.4g}" for key, value in figures.items())
        logger.info(
            "%s: %d of %d %s, %.3g per second, %.0f s left%s",
            *(self._name, self.done, self._total, self._unit, rate, left, extra),
        )
