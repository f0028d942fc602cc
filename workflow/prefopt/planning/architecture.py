"""The shape of a model, read from the `config.json` of its folder or from the table of models on the hub.

Nothing heavy is imported: the Snakefile asks for the size of models that are not there yet.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import UserError
from prefopt.lm.flops import Shape

MODELS = Path(__file__).with_name("models.yaml")

# What the keys are called in the config.json of the older architectures.
_OLD_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
# What transformers takes where a config.json does not say it: tied embeddings, biases in attention.
_TIED = {"llama": False, "gpt2": True, "gpt_neox": False, "gptj": False, "roberta": True}
_ATTENTION_BIAS = {"llama": False, "gpt2": True, "gpt_neox": True, "gptj": False, "roberta": True}
KNOWN = tuple(_TIED)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What size and cost of a transformer depend on."""

    kind: str  # model_type, one of KNOWN
    vocabulary: int
    positions: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    intermediate: int
    tied: bool  # whether the output head is the embedding
    attention_bias: bool
    mlp_bias: bool

    @property
    def attention_width(self) -> int:
        """Heads times head width."""
        return self.heads * self.head_width


def from_config(values: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a Hugging Face config describes.

    Args:
        values: content of a config.json.
        where: names it in messages.

    Raises:
        UserError: the model_type is none of `KNOWN`, or a size is missing.
    """
    kind = values.get("model_type")
    if kind not in _TIED:
        raise UserError(
            f"{where} has the model_type {kind!r}, whose size is not known here; known: {', '.join(KNOWN)}."
        )

    def size(name: str, default: int | None = None) -> int:
        value: int | None = values.get(name, values.get(_OLD_NAMES.get(name, name)))
        value = default if value is None else value
        if value is None:
            raise UserError(f"{where} has no {name}: complete the file, or name another model.")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    return Architecture(
        kind=kind,
        vocabulary=size("vocab_size"),
        positions=size("max_position_embeddings"),
        hidden=hidden,
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads) if kind == "llama" else heads,
        head_width=size("head_dim", hidden // heads) if kind == "llama" else hidden // heads,
        intermediate=size("intermediate_size", 4 * hidden if kind in ("gpt2", "gptj") else None),
        tied=bool(values.get("tie_word_embeddings", _TIED[kind])),
        attention_bias=bool(values.get("attention_bias", _ATTENTION_BIAS[kind])),
        mlp_bias=bool(values.get("mlp_bias", False)) if kind == "llama" else True,
    )


def from_pretrain(section: Mapping[str, Any]) -> Architecture:
    """The base that the stage `pretrain` makes: a Llama with tied embeddings.

    Args:
        section: a task's section `pretrain`.
    """
    names = {"hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "vocab_size": "vocab_size"}
    names |= {"num_hidden_layers": "layers", "num_attention_heads": "heads", "max_position_embeddings": "max_positions"}
    values = {name: section[key] for name, key in names.items()}
    return from_config({"model_type": "llama", "tie_word_embeddings": True, **values}, "pretrain")


def from_folder(folder: str | Path) -> Architecture:
    """The architecture of a model folder.

    Raises:
        UserError: there is no readable config.json, or its architecture is not known here.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}): name a folder of a model.") from error
    return from_config(values, str(path))


def from_hub(name: str) -> Architecture:
    """The architecture of a model that the table of models knows by its name on the hub, in capitals or not.

    Raises:
        UserError: the table does not hold it.
    """
    found = _hub_models().get(name.lower())
    if found is None:
        raise UserError(
            f"{name} is not in the table of models ({MODELS.name} beside prefopt/planning), so its size is not known "
            f"before it is fetched: fetch it first (`snakemake --cores 1 results/models/TASK/fetched_base`), or add its "
            f"config.json to the table."
        )
    return found


@functools.cache
def _hub_models() -> dict[str, Architecture]:
    table = yaml.safe_load(MODELS.read_text(encoding="utf-8"))
    return {name.lower(): from_config(values, f"{MODELS.name}: {name}") for name, values in table.items()}


def layer_parameters(model: Architecture) -> int:
    """Parameters of one layer."""
    width, kv_width = model.attention_width, model.kv_heads * model.head_width
    attention = 2 * model.hidden * width + 2 * model.hidden * kv_width
    if model.attention_bias:
        attention += width + 2 * kv_width + model.hidden
    mlp = (3 if model.kind == "llama" else 2) * model.hidden * model.intermediate
    if model.mlp_bias:
        mlp += (2 if model.kind == "llama" else 1) * model.intermediate + model.hidden
    # Llama has two scales, GPT-J one norm with scale and shift, the others two.
    norms = {"llama": 2, "gptj": 2}.get(model.kind, 4) * model.hidden
    return attention + mlp + norms


def embedding_parameters(model: Architecture) -> int:
    """Parameters of the token embedding and, where there are any, of learned positions."""
    learned = model.positions * model.hidden if model.kind in ("gpt2", "roberta") else 0
    if model.kind == "roberta":
        learned += model.hidden + 2 * model.hidden  # one token type, and a norm
    return model.vocabulary * model.hidden + learned


def backbone_parameters(model: Architecture) -> int:
    """Parameters without the output head."""
    final_norm = {"llama": 1, "roberta": 0}.get(model.kind, 2) * model.hidden
    return embedding_parameters(model) + model.layers * layer_parameters(model) + final_norm


def language_model_parameters(model: Architecture) -> int:
    """Parameters of a causal language model, a tied output head counted once."""
    head = 0 if model.tied else model.vocabulary * model.hidden
    return backbone_parameters(model) + head + (model.vocabulary if model.kind == "gptj" else 0)


def scorer_parameters(model: Architecture, outputs: int = 1) -> int:
    """Parameters of a sequence classifier: a reward model has one output."""
    head = outputs * model.hidden
    if model.kind == "roberta":
        head += model.hidden * model.hidden + model.hidden + outputs
    return backbone_parameters(model) + head


def adapter_parameters(model: Architecture, rank: int) -> int:
    """Parameters of low-rank adapters of this rank on every linear layer of the backbone."""
    width, kv_width = model.attention_width, model.kv_heads * model.head_width
    attention = [(model.hidden, width), (model.hidden, kv_width), (model.hidden, kv_width), (width, model.hidden)]
    if model.kind in ("gpt2", "gpt_neox"):  # query, key and value are one layer
        attention = [(model.hidden, 3 * width), (width, model.hidden)]
    mlp = [(model.hidden, model.intermediate)] * (2 if model.kind == "llama" else 1)
    mlp.append((model.intermediate, model.hidden))
    return model.layers * rank * sum(ins + outs for ins, outs in attention + mlp)


def shape(model: Architecture, outputs: int | None = None) -> Shape:
    """The shape from which `prefopt.lm.flops` counts.

    Args:
        model: the architecture.
        outputs: of a scorer's head; None is a language model.
    """
    kv_width = model.kv_heads * model.head_width
    linear = 2 * model.hidden * model.attention_width + 2 * model.hidden * kv_width
    linear += (3 if model.kind == "llama" else 2) * model.hidden * model.intermediate
    head = (model.vocabulary if outputs is None else outputs) * model.hidden
    return Shape(model.layers * linear, model.layers, model.attention_width, head)
