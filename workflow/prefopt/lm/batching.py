"""Rows of a prompt with the completions that follow it, and how they are cut into micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt and the completions that share it: chosen and rejected, or the samples of one prompt.

    `prompt` has at least one token; each completion has at least one, its last normally EOS.
    """

    prompt: Sequence[int]
    completions: tuple[Sequence[int], ...]

    @property
    def tokens(self) -> int:
        """Tokens that the model reads for this row, the prompt counted once."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)


def micro_batches(rows: Sequence[Row], token_budget: int) -> list[list[int]]:
    """Cuts rows into micro-batches of at most `token_budget` tokens, the shortest rows first.

    Rows of similar length come together, which keeps a padded architecture's padding low; a row longer than the
    budget stands alone. The result depends on the rows and the budget only.

    Args:
        rows: what to cut.
        token_budget: most tokens of a micro-batch.

    Returns:
        Indices into `rows`; each is in exactly one micro-batch.
    """
    order = sorted(range(len(rows)), key=lambda i: (rows[i].tokens, i))
    batches: list[list[int]] = []
    tokens = 0
    for i in order:
        if not batches or tokens + rows[i].tokens > token_budget:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += rows[i].tokens
    return batches
