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


# Completions that are sampled at once on a CPU, and on a GPU, where a step takes as long for few of them.
ROW_BUDGET = {False: 512, True: 2048}
# Keys and values of at most so many bytes are held at once while sampling, on a CPU and on a GPU, where one prompt's do not
# take more; and on a GPU of at most this share of what is free, the rest of which is for logits and what a step computes.
CACHE_BYTES = {False: 4 * 2**30, True: 24 * 2**30}
_OF_FREE = 0.4


def cache_room(free: int | None) -> int:
    """Bytes of keys and values that are held at once.

    Args:
        free: bytes that a GPU has free before; None on a CPU.
    """
    return CACHE_BYTES[False] if free is None else min(CACHE_BYTES[True], int(_OF_FREE * max(0, free)))


def prompts_at_once(
    n: int, prompt: int, new_tokens: int, token_bytes: int, row_budget: int, room: int, *, shared_prefix: bool
) -> int:
    """How many prompts are sampled together.

    Args:
        n: completions of each.
        prompt: tokens of the longest prompt.
        new_tokens: most tokens of a completion.
        token_bytes: bytes of one token's keys and values in all layers.
        row_budget: most completions.
        room: most bytes of keys and values.
        shared_prefix: whether a prompt's keys and values are held once, or once for each completion.
    """
    tokens = (prompt if shared_prefix else n * prompt) + n * new_tokens
    return max(1, min(row_budget // n, room // (tokens * token_bytes)))
