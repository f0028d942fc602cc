"""Tiny random models: the paper's architectures, Llama with grouped heads, and GPT-Neo with attention of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from prefopt.lm.verify import use_engine

VOCABULARY = 50
EOS = 1
_IDS = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": None}
_GPT2_SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": VOCABULARY}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**_GPT2_SHAPE, **_NO_DROPOUT, **_IDS),
    "gpt_neox": GPTNeoXConfig(**_SHAPE, **_IDS),
    "gptj": GPTJConfig(**_GPT2_SHAPE, rotary_dim=4, **_NO_DROPOUT, **_IDS),
    "gpt_neo": GPTNeoConfig(
        **{"num_layers": 2, "num_heads": 2, "hidden_size": 16, "attention_types": [[["global", "local"], 1]]},
        **{"max_position_embeddings": 64, "vocab_size": VOCABULARY, "window_size": 6},
        **_IDS,
    ),
    "llama": LlamaConfig(**_SHAPE, num_key_value_heads=2, **_IDS),
}

Maker = Callable[[str], PreTrainedModel]


def make_model(architecture: str, engine: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[architecture])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        # Wider weights than the initial ones, so that logits differ visibly between tokens.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return use_engine(model) if engine else model


@pytest.fixture(params=list(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def plain(architecture: str) -> PreTrainedModel:
    """transformers' own eager attention."""
    return make_model(architecture, engine=False)


@pytest.fixture
def model(architecture: str) -> PreTrainedModel:
    """The same weights with the engine's attention."""
    return make_model(architecture, engine=True)
