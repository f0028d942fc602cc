"""The learned reward: a reward model's score, read at the completion's EOS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prefopt.lm.batching import Row
from prefopt.lm.engine import score_head
from prefopt.lm.logprobs import completion_hidden_states
from prefopt.lm.precision import autocast
from prefopt.lm.sharding import dealt_micro_batches, within
from prefopt.runtime import collectives


def raw_scores(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """The score head's output at the last token of each completion, before normalisation.

    Returns:
        float32 [number of completions], rows in order, completions in order; differentiable.
    """

    def scores() -> Tensor:
        _, last = completion_hidden_states(model, rows)
        values: Tensor = score_head(model)(last).float().squeeze(-1)
        return values

    return within(model, scores)


@torch.no_grad()
def score_rows(model: nn.Module, rows: Sequence[Row], token_budget: int, dtype: str = "float32") -> Tensor:
    """The reward of each row's completions: the score less the mean score of reference completions.

    Args:
        model: a scorer whose `config.reward_offset` the stage `reward` has set (0 if absent).
        rows: all with the same number k of completions.
        token_budget: tokens per micro-batch.
        dtype: of the forward pass.

    Returns:
        float32 [n, k] on the CPU.
    """
    scores = torch.zeros(len(rows), len(rows[0].completions))
    device = next(model.parameters()).device
    for batch, counts in dealt_micro_batches(rows, token_budget):
        with autocast(dtype, device):
            of_batch = raw_scores(model, [rows[i] for i in batch]).view(len(batch), -1).cpu()
        if counts:
            scores[batch] = of_batch
    return collectives.summed_tensor(scores) - float(getattr(model.config, "reward_offset", 0.0))
