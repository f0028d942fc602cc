from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from prefopt.lm.batching import Row
from prefopt.lm.engine import layers_of
from prefopt.lm.flops import Shape, forward_flops, reading_flops
from prefopt.lm.models import load_scorer
from prefopt.lm.shape import _attention_width, rows_flops, shape_of
from tiny_models import make_model


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


def test_heads_may_be_wider_or_narrower_than_their_share_and_layers_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _attention_width(SimpleNamespace(num_attention_heads=4, head_dim=8, hidden_size=16)) == 32
    assert _attention_width(SimpleNamespace(num_attention_heads=4, hidden_size=16)) == 16
    assert _attention_width(SimpleNamespace(hidden_size=16)) == 0
    model = make_model("llama", engine=True)
    assert (shape_of(model).layers, len(layers_of(model))) == (2, 2)
    monkeypatch.setattr(type(model.config), "get_text_config", lambda self, decoder: SimpleNamespace())
    assert (shape_of(model).layers, layers_of(model)) == (0, [])


def test_operations_of_rows_add_up() -> None:
    shape = Shape(linear=10, layers=2, attention_width=4, head=6)
    rows = [Row((2, 3, 4), ((5, 6), (7,))), Row((2,), ((3,),))]
    assert rows_flops(shape, rows) == reading_flops(shape, 3, [2, 1]) + reading_flops(shape, 1, [1])
