"""How rows are dealt to processes, and what is asked of torch for whole weights, in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from prefopt.lm import sharding
from prefopt.lm.batching import Row
from prefopt.runtime import processes


def test_rows_are_dealt_by_length_and_every_process_gets_as_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 2, 3, 4, 5 and 6 tokens to two processes: 2, 4, 6 and 3, 5, at most seven tokens at once."""
    rows = [Row([0] * (tokens - 1), ([1],)) for tokens in (6, 2, 4, 5, 3)]
    assert [row.tokens for row in rows] == [6, 2, 4, 5, 3]
    monkeypatch.setattr(processes, "count", lambda: 2)
    dealt = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        dealt.append(sharding.dealt_micro_batches(rows, 7))
    counting = [sorted(i for batch, counts in own if counts for i in batch) for own in dealt]
    assert counting == [[0, 1, 2], [3, 4]]
    assert len(dealt[0]) == len(dealt[1])
    monkeypatch.setattr(processes, "rank", lambda: 1)
    # The second of two processes has no row of its own, and reads the shortest without counting it.
    assert sharding.dealt_micro_batches(rows[:1], 7) == [([0], False)]


def test_whole_weights_are_gathered_on_the_cpu_and_a_tied_one_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = sharding.get_model_state_dict
    monkeypatch.setattr(
        sharding, "get_model_state_dict", lambda model, options: asked.append(options) or real(model, options=options)
    )
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=False))
    model[1].weight = model[0].weight
    weights = sharding.whole_weights(model)
    assert sorted(weights) == ["0.weight", "2.num_batches_tracked", "2.running_mean", "2.running_var"]
    assert torch.equal(weights["0.weight"], model[0].weight)
    assert [(options.full_state_dict, options.cpu_offload) for options in asked] == [(True, True)]
