from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from prefopt.lm.flops import forward_flops
from prefopt.lm.models import load_scorer
from prefopt.lm.shape import shape_of


def test_a_forward_pass_is_what_torch_counts(plain: PreTrainedModel) -> None:
    ids = torch.randint(2, 50, (3, 24))
    counter = FlopCounterMode(display=False)
    with counter:
        plain(ids)
    # Eager attention multiplies all pairs, the masked ones too.
    ours = forward_flops(shape_of(plain), tokens=ids.numel(), pairs=3 * 24 * 24, logits=ids.numel())
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_scorers_head_has_one_output(plain: PreTrainedModel, tmp_path: Path) -> None:
    plain.config.num_labels = 1
    AutoModelForSequenceClassification.from_config(plain.config).save_pretrained(tmp_path)
    scorer = load_scorer(tmp_path)
    assert shape_of(scorer).head == 16
    assert shape_of(scorer).linear == shape_of(plain).linear
