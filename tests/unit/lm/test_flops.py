from __future__ import annotations

from prefopt.lm.flops import Shape, attended_pairs, forward_flops


def test_pairs_by_hand() -> None:
    # A prompt of 3 tokens attends 1 + 2 + 3 times; a completion of 2 tokens 4 + 5 times, one of 1 token 4 times.
    assert attended_pairs(3, []) == 6
    assert attended_pairs(3, [2, 1]) == 6 + 9 + 4
    # Whole numbers, exact beyond what a float holds.
    assert attended_pairs(10**9 + 1, []) == (10**9 + 1) * (5 * 10**8 + 1)


def test_a_forward_pass_by_hand() -> None:
    shape = Shape(linear=10, layers=2, attention_width=4, head=6)
    assert forward_flops(shape, tokens=5, pairs=15, logits=1) == 2 * 10 * 5 + 4 * 2 * 4 * 15 + 2 * 6
