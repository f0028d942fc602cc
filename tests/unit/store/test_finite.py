from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from prefopt.errors import UserError
from prefopt.store.finite import listed, require_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, pd.Series])
def test_what_is_not_finite_is_named_with_its_ids(bad: float, kind: type) -> None:
    require_finite(kind([1.0, -2.0]), ["a", "b"], "the reward", "look at it")
    with pytest.raises(UserError) as caught:
        require_finite(kind([1.0, bad, 2.0, bad]), ["a", "b", "c", "d"], "the reward", "look at it", " at step 3")
    assert str(caught.value) == f"the reward is {bad:g} at step 3 for b, d: look at it."


def test_rows_of_several_numbers_have_one_name() -> None:
    values = torch.zeros(3, 2, 2)
    values[1, 1, 0] = math.inf
    with pytest.raises(UserError, match=r"^the KL is inf for b: look\.$"):
        require_finite(values, "abc", "the KL", "look")
    require_finite(torch.zeros(0), [], "the KL", "look")


def test_many_ids_are_counted() -> None:
    assert listed([f"p{i // 2}" for i in range(16)]) == "p0, p1, p2, p3, p4, p5, p6, p7"
    assert listed([f"p{i}" for i in range(20)]) == "p0, p1, p2, p3, p4, p5, p6, p7 and 12 others"
