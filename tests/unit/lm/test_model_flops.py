"""Counted operations against torch's own counter, on every architecture."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from prefopt.lm.batching import Row
from prefopt.lm.flops import attended_pairs, forward_flops, reading_flops, sampling_flops
from prefopt.lm.shape import rows_flops, shape_of
from tiny_models import architecture, plain

__all__ = ["architecture", "plain"]


def counted(run: object) -> int:
    with FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return counter.get_total_flops()


def test_a_forward_pass_is_what_torch_counts(plain: PreTrainedModel) -> None:
    ids = torch.arange(2, 26).unsqueeze(0)
    with torch.no_grad():
        torch_counts = counted(lambda: plain(input_ids=ids, use_cache=False))
    # Without a causal kernel every token attends to all, masked or not.
    ours = forward_flops(shape_of(plain), tokens=24, pairs=24 * 24, logits=24)
    assert ours == pytest.approx(torch_counts, rel=0.02)


def test_a_training_step_is_three_forward_passes(plain: PreTrainedModel) -> None:
    ids = torch.arange(2, 26).unsqueeze(0)

    def step() -> None:
        plain(input_ids=ids, use_cache=False).logits.sum().backward()

    ours = 3 * forward_flops(shape_of(plain), tokens=24, pairs=24 * 24, logits=24)
    # The first layer's input needs no gradient, as embeddings are looked up; that is no product of matrices.
    assert ours == pytest.approx(counted(step), rel=0.02)


def test_sampling_with_a_cache_reads_each_token_once(plain: PreTrainedModel) -> None:
    """A prompt of 5 tokens and 4 sampled ones: the prompt, then three tokens, each of which sees all before it."""
    prompt, sampled = torch.arange(2, 7).unsqueeze(0), 4

    def generate() -> None:
        output = plain(input_ids=prompt, use_cache=True, logits_to_keep=1)
        for _ in range(sampled - 1):
            output = plain(input_ids=output.logits[:, -1:].argmax(-1), cache=output.cache)

    with torch.no_grad():
        torch_counts = counted(generate)
    shape = shape_of(plain)
    # The prompt's masked pairs, which torch counts and nobody needs.
    masked = forward_flops(shape, 0, 5 * 5 - attended_pairs(5, []), 0)
    assert sampling_flops(shape, 5, [sampled]) + masked == pytest.approx(torch_counts, rel=0.02)


def test_completions_share_their_prompt(plain: PreTrainedModel) -> None:
    shape = shape_of(plain)
    row = Row((2, 3, 4), ((5, 6), (7,)))
    assert rows_flops(shape, [row, row]) == 2 * reading_flops(shape, 3, [2, 1])
    apart = reading_flops(shape, 3, [2]) + reading_flops(shape, 3, [1])
    prompt = forward_flops(shape, 3, attended_pairs(3, []), 0)
    assert reading_flops(shape, 3, [2, 1]) == apart - prompt
