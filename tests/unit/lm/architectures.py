"""Every causal architecture of transformers at a tiny size, and docs/architectures.md.

python tests/unit/lm/architectures.py    # writes the page anew, some minutes
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from prefopt.errors import UserError
from prefopt.lm.small import small_copies
from prefopt.lm.verify import use_engine

PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"

ARCHITECTURES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_MIXED = ["full_attention", "sliding_attention"] * 2
# What an architecture's default config lacks, or leaves at a value that would hide what it does.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 3},
    "cohere_compass_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _MIXED}},
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 1408},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granite": {"logits_scaling": 8.0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "hyperclovax": {"logits_scaling": 0.125},
    "kimi_linear": {"num_attention_heads": 4, "num_key_value_heads": 4, "linear_num_heads": 4},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "layer_types": _MIXED, "num_hidden_layers": 4},
    "reformer": {"is_decoder": True},
    "qwen4_exp_text": {
        **{"indexer_budget": 16, "indexer_compress_ratio": 4},
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256},
    },
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "layer_types": _MIXED, "num_hidden_layers": 4},
}

# Of these no tiny model can be built here; the reason.
NOT_TRIED = {
    "gemma3n": "its images need the package timm; `gemma3n_text` is tried",
    "gemma4_assistant": "drafts for another model, whose states it is given",
    "gemma4_unified_assistant": "drafts for another model, whose states it is given",
    "musicgen": "writes sounds",
    "musicgen_melody": "writes sounds",
    "qwen4_exp": "its default config is incomplete; `qwen4_exp_text` is tried",
}

_TITLES = {
    ("packed", "shared"): "Packed rows, one cache of each prompt",
    ("packed", "one_row"): "Packed rows, one cache of each prompt, handed over as one row",
    ("packed", "cached"): "Packed rows, a cache of its own for each sample",
    ("packed", "whole"): "Packed rows, samples without a cache",
    ("padded", "cached"): "Padded batches, a cache of its own for each sample",
    ("padded", "whole"): "Padded batches, samples without a cache",
    ("refused", None): "Refused",
}


def tiny_model(name: str) -> PreTrainedModel:
    """A tiny random model of an architecture, with transformers' own attention; one without weights if none runs."""
    transformers_logging.set_verbosity_error()
    try:
        large = _without_weights(name, num_hidden_layers=8)  # which takes less time than the default's number
    except Exception:
        large = _without_weights(name)
    for make in small_copies(large):
        try:
            torch.manual_seed(0)
            small = make()
            with torch.no_grad():
                small(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
            return small
        except Exception:
            continue
    return large


def _without_weights(name: str, **options: Any) -> PreTrainedModel:
    config = CONFIG_MAPPING[name](**{**options, **OVERRIDES.get(name, {})})
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def path_of(model: PreTrainedModel) -> tuple[str, str | None]:
    """How the engine computes a model; the model is made ready for it unless it is refused."""
    try:
        engine = use_engine(model).engine
    except UserError:
        return "refused", None
    return engine.rows, engine.sampling


def documented() -> dict[str, tuple[str, str | None]]:
    """What the page says of each architecture."""
    found: dict[str, tuple[str, str | None]] = {}
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    for path, title in _TITLES.items():
        (section,) = (part for part in sections if part.startswith(f"{title}\n"))
        found |= dict.fromkeys(re.findall(r"`([\w.-]+)`", section), path)
    return found


def _page() -> str:
    by_path: defaultdict[tuple[str, str | None], list[str]] = defaultdict(list)
    for name in ARCHITECTURES:
        if name in NOT_TRIED:
            continue
        path = path_of(tiny_model(name))
        by_path[path].append(name)
        print(f"{name}: {path} after {time.process_time():.0f} s", flush=True)
    intro = PAGE.read_text().partition("\n## Packed rows, one cache of each prompt\n")[0].rstrip()
    sections = [
        f"## {title}\n\n" + (", ".join(f"`{name}`" for name in by_path[path]) or "none")
        for path, title in _TITLES.items()
    ]
    sections.append("## Not tried\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in NOT_TRIED.items()))
    return "\n\n".join([intro, *sections]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(_page())
