"""Parameters and shapes against the models that transformers makes of the same config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from prefopt.errors import UserError
from prefopt.lm.shape import shape_of
from prefopt.planning import architecture
from prefopt.planning.architecture import from_config, from_folder, from_hub, from_pretrain

_OLD = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 48, "vocab_size": 61}
_NEW = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 80}
_NEW |= {"max_position_embeddings": 48, "vocab_size": 61}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**_OLD),
    "gpt2, narrow feed-forward": GPT2Config(**_OLD, n_inner=40),
    "gptj": GPTJConfig(**_OLD, rotary_dim=4),
    "gpt_neox": GPTNeoXConfig(**_NEW),
    "gpt_neox without biases": GPTNeoXConfig(**_NEW, attention_bias=False),
    "llama": LlamaConfig(**_NEW, num_key_value_heads=2),
    "llama, tied, biases": LlamaConfig(
        **_NEW, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, num_key_value_heads=2, head_dim=16
    ),
    "roberta": RobertaConfig(**_NEW, type_vocab_size=1),
}
LANGUAGE_MODELS = [name for name in CONFIGS if name != "roberta"]


def counted(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def described(config: PreTrainedConfig) -> architecture.Architecture:
    return from_config(json.loads(config.to_json_string(use_diff=False)), "config.json")


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_parameters_of_a_language_model_and_its_shape(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    found = described(CONFIGS[name])
    assert architecture.language_model_parameters(found) == counted(model)
    assert architecture.shape(found) == shape_of(model)
    layers = getattr(model.base_model, "layers", None) or model.base_model.h
    assert architecture.layer_parameters(found) == counted(layers[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("outputs", [1, 2])
def test_parameters_of_a_scorer(name: str, outputs: int) -> None:
    config = type(CONFIGS[name]).from_dict({**CONFIGS[name].to_dict(), "num_labels": outputs})
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert architecture.scorer_parameters(described(CONFIGS[name]), outputs) == counted(model)
    if name != "roberta":
        assert architecture.shape(described(CONFIGS[name]), outputs) == shape_of(model)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-large", 774_030_080),
        ("EleutherAI/gpt-j-6b", 6_050_882_784),
        ("CarperAI/openai_summarize_tldr_sft", 6_050_882_784),
        ("EleutherAI/pythia-70m", 70_426_624),
        ("EleutherAI/pythia-160m", 162_322_944),
        ("EleutherAI/pythia-410m", 405_334_016),
        ("EleutherAI/pythia-1b", 1_011_781_632),
        ("EleutherAI/pythia-1.4b", 1_414_647_808),
        ("EleutherAI/pythia-2.8b", 2_775_208_960),
        ("EleutherAI/pythia-6.9b", 6_857_302_016),
    ],
)
def test_models_of_the_hub_have_their_published_size(name: str, parameters: int) -> None:
    assert architecture.language_model_parameters(from_hub(name)) == parameters


def test_the_classifier_of_sentiment_has_its_size() -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            RobertaConfig(
                **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
                **{"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
            )
        )
    found = from_hub("siebert/sentiment-roberta-large-english")
    assert architecture.scorer_parameters(found, 2) == counted(model) == 355_361_794


def test_every_model_of_the_papers_config_is_in_the_table() -> None:
    text = (Path(__file__).parents[3] / "config" / "paper.yaml").read_text(encoding="utf-8")
    tasks: dict[str, Any] = yaml.safe_load(text)["tasks"]
    sections = [task[part] for task in tasks.values() for part in ("base", "sft", "true_reward") if part in task]
    names = {section["name"] for section in sections if section.get("source") == "hub"}
    assert len(names) == 5
    assert all(from_hub(name).layers for name in names)


def test_a_name_of_the_hub_is_the_same_in_capitals() -> None:
    assert from_hub("EleutherAI/gpt-j-6B") == from_hub("EleutherAI/gpt-j-6b")


def test_the_base_from_scratch_is_a_tied_llama() -> None:
    values = {"hidden_size": 128, "intermediate_size": 344, "vocab_size": 3072, "layers": 3, "heads": 4}
    found = from_pretrain({**values, "max_positions": 256})
    shipped = from_folder(Path(__file__).parents[3] / "workflow" / "models" / "tldr_base")
    assert found == shipped and architecture.language_model_parameters(found) == 987_008


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"model_type": "t5"},
            "a/config.json has the model_type 't5', whose size is not known here; known: llama, gpt2, gpt_neox, gptj, "
            "roberta.",
        ),
        ({"model_type": "llama"}, "a/config.json has no hidden_size: complete the file, or name another model."),
    ],
)
def test_what_is_not_known_is_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        from_config(values, "a/config.json")
    assert str(error.value) == sentence


def test_an_unknown_model_of_the_hub_and_a_folder_without_one_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^someone/model is not in the table of models .*: fetch it first"):
        from_hub("someone/model")
    with pytest.raises(UserError, match=r"config.json cannot be read \(FileNotFoundError\)"):
        from_folder(tmp_path)


def test_adapters_on_every_linear_layer() -> None:
    # GPT-2: query-key-value 32 -> 96, output 32 -> 32, feed-forward 32 -> 128 and back.
    assert architecture.adapter_parameters(described(CONFIGS["gpt2"]), 2) == 3 * 2 * (128 + 64 + 160 + 160)
    # Llama: 32 -> 32, twice 32 -> 16, 32 -> 32, twice 32 -> 80, 80 -> 32.
    assert architecture.adapter_parameters(described(CONFIGS["llama"]), 1) == 3 * (64 + 48 + 48 + 64 + 3 * 112)
