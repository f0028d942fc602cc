"""Floating-point operations of a causal language model, counted from its architecture and the tokens it reads.

A multiplication and an addition are two operations. Only matrix products count: the linear layers, the attention
scores and the sums of values that they weigh, and the output head; norms, activations and softmax are some per cent of
them at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the cost of a model's forward pass depends on."""

    linear: int  # weights of the backbone's linear layers, each used once a token
    layers: int
    attention_width: int  # heads times head width
    head: int  # weights of the output head, each used once a token whose logits are computed


def forward_flops(shape: Shape, tokens: int, pairs: int, logits: int) -> int:
    """Operations of reading `tokens` tokens.

    Args:
        shape: of the model.
        tokens: how many tokens run through the backbone.
        pairs: how many (query, key) pairs attend, see `attended_pairs`.
        logits: at how many positions the output head is used.
    """
    attention = 4 * shape.layers * shape.attention_width * pairs  # scores, and the values that they weigh
    return 2 * shape.linear * tokens + attention + 2 * shape.head * logits


def attended_pairs(prompt: int, completions: Sequence[int]) -> int:
    """(Query, key) pairs of one prompt, read once, and of completions that see it and, causally, themselves."""
    own = sum(length * (length + 1) // 2 + length * prompt for length in completions)
    return prompt * (prompt + 1) // 2 + own


def reading_flops(shape: Shape, prompt: int, completions: Sequence[int]) -> int:
    """Operations of one forward pass over a prompt, read once, and its completions, each token of which is predicted.

    A training step takes three times as many: the backward pass is twice the forward pass.

    Args:
        shape: of the model.
        prompt: tokens of the prompt.
        completions: tokens of each completion.
    """
    tokens = sum(completions)
    return forward_flops(shape, prompt + tokens, attended_pairs(prompt, completions), max(tokens, 1))


def sampling_flops(shape: Shape, prompt: int, completions: Sequence[int]) -> int:
    """Operations of sampling completions of one prompt, which is read once; a completion's last token is never read.

    Args:
        shape: of the policy.
        prompt: tokens of the prompt.
        completions: tokens sampled for each completion, EOS included.
    """
    read = [length - 1 for length in completions]
    return forward_flops(shape, prompt + sum(read), attended_pairs(prompt, read), 1 + sum(read))
