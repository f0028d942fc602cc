"""Unlikelihood: the preferred completion made more probable and the rejected one less, with nothing that holds back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pandas as pd
from torch import Tensor, nn

from prefopt.lm.logprobs import completion_logprobs
from prefopt.objectives import unlikelihood_loss
from prefopt.training.loop import Examples
from prefopt.training.recipe import TrainingRecipe
from prefopt.training.reference import preference_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlikelihoodRecipe(TrainingRecipe):
    """`alpha` weighs the rejected completion's log-probability."""

    alpha: float


def unlikelihood_examples(pairs: pd.DataFrame, recipe: UnlikelihoodRecipe) -> Examples:
    """Preference pairs with the unlikelihood loss, averaged over the chosen completions' tokens.

    Args:
        pairs: rows of the preferences table.
        recipe: alpha.
    """
    rows = preference_rows(pairs)

    def losses(model: nn.Module, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = completion_logprobs(model, [rows[i] for i in indices]).sums.view(-1, 2).unbind(dim=1)
        figures = {"chosen_logp": chosen.detach(), "rejected_logp": rejected.detach()}
        return unlikelihood_loss(chosen, rejected, recipe.alpha), figures

    return Examples(pairs["pair_id"].tolist(), rows, [float(len(row.completions[0])) for row in rows], losses)
