"""Small copies of a model: what their configs hold, worked by hand, and which layers they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Phi3Config, PreTrainedConfig

from prefopt.lm.small import distinct_layers, longest_kink, small_config

LARGE: dict[str, Any] = {
    **{"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"num_hidden_layers": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "head_dim": 128},
}


@pytest.mark.parametrize(("fewer_heads", "factor"), [(True, 2), (False, 1)])
def test_widths_are_divided_by_one_number(fewer_heads: bool, factor: int) -> None:
    """A head of 128 becomes one of 8; of eight heads of keys two quarters are left, where heads become fewer."""
    small = small_config(LlamaConfig(**LARGE), 2, fewer_heads=fewer_heads)
    assert (small.head_dim, small.num_attention_heads, small.num_key_value_heads) == (8, 32 // factor, 8 // factor)
    assert small.hidden_size == 4096 // (16 * factor) == 8 * small.num_attention_heads
    assert small.intermediate_size == 11008 // (16 * factor)  # a multiple of 8 as it is
    assert (small.num_hidden_layers, small.vocab_size, small.max_position_embeddings) == (2, 96, 96)


def longrope() -> PreTrainedConfig:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    rope |= {"original_max_position_embeddings": 400, "partial_rotary_factor": 1.0}
    more = {"original_max_position_embeddings": 400, "sliding_window": 300, "pad_token_id": None, "eos_token_id": 1}
    return Phi3Config(**{**LARGE, **more, "rope_parameters": rope})


def test_a_kink_is_found_wherever_a_config_names_it() -> None:
    assert longest_kink(MistralConfig(sliding_window=6)) == 6
    assert longest_kink(longrope()) == 400
    small = small_config(longrope(), 2, fewer_heads=True)
    assert longest_kink(small) == 16 and small.sliding_window == 8
    assert small.rope_parameters["short_factor"] == [1.0] * 4  # one for each pair of eight dimensions


def test_layers_are_told_apart_by_their_settings() -> None:
    def layers(kinds: list[str]) -> int:
        shape = {**LARGE, "num_hidden_layers": len(kinds), "hidden_size": 64, "intermediate_size": 64, "head_dim": 8}
        with torch.device("meta"):
            return distinct_layers(AutoModelForCausalLM.from_config(Gemma2Config(**shape, layer_types=kinds)))

    sliding, full = "sliding_attention", "full_attention"
    assert layers([sliding, sliding, sliding, full, sliding]) == 4
    assert layers([sliding] * 5) == 2 and layers([full]) == 1
