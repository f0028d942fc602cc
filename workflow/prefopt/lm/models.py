"""Model folders: loading, saving, hashing. Safetensors only, no remote code, no dropout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2TokenizerFast,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from prefopt.errors import UserError
from prefopt.files import atomic_directory
from prefopt.lm.engine import position_limit, score_head
from prefopt.lm.verify import use_engine

transformers_logging.disable_progress_bar()

_DROPOUTS = ("dropout", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def load_policy(
    path: str | Path, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, ready for the engine, and its tokenizer.

    Args:
        path: a model folder.
        device: where to put it; the CPU where None.
        dtype: of the weights.

    Raises:
        UserError: the folder is not there, holds no safetensors weights, or a model that the engine does not compute.
    """
    model = _load(AutoModelForCausalLM, path, dtype).eval()
    return use_engine(model, path).to(device or torch.device("cpu")), load_tokenizer(path)


def load_scorer(
    path: str | Path, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A sequence-classification model with one output in evaluation mode: a reward model (see `load_policy`).

    Raises:
        UserError: as `load_policy`; transformers has no such model of the architecture.
    """
    model = _load(AutoModelForSequenceClassification, path, dtype, num_labels=1).eval()
    return use_engine(model, path).to(device or torch.device("cpu"))


def new_scorer(
    path: str | Path, seed: int, *, device: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A scorer on a causal language model's backbone with a fresh head, N(0, 1/sqrt(d + 1)).

    The deviation is that of OpenAI's reward models (Stiennon et al. 2020).
    """
    model = load_scorer(path, device=device)
    head = score_head(model)
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(head.weight.shape, generator=generator) / (head.weight.shape[1] + 1) ** 0.5
    head.weight.data.copy_(fresh)
    return model, load_tokenizer(path)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer: tokenizer.json, GPT-2's vocab.json and merges.txt, or sentencepiece's tokenizer.model.

    Raises:
        UserError: the folder holds none of them, or the tokenizer has no EOS token.
    """
    folder = Path(path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"{path} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}): name another folder.")
    described = (folder / "tokenizer_config.json").is_file()
    if described or (folder / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    elif (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, eos_token="<|endoftext|>")
    elif (folder / "tokenizer.model").is_file():
        tokenizer = LlamaTokenizer.from_pretrained(folder)
    else:
        tokenizer = GPT2TokenizerFast.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, without which no completion ends: name one.")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as plain text: none is added, and "<|endoftext|>" in a text is not an EOS."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    ids: list[list[int]] = tokenizer(list(texts), return_attention_mask=False, **options)["input_ids"]
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def save_model(
    path: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manifest: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a model folder, whole or not at all: config, safetensors, tokenizer and `manifest.json`.

    Args:
        path: of the folder.
        model: gives the config, and the weights unless they are given.
        tokenizer: of the model.
        manifest: what the model is, ready for JSON.
        weights: by name, whole and on the CPU, where the model holds but its process's share.
    """
    with atomic_directory(path) as folder:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))


def weights_hash(path: str | Path) -> str:
    """SHA-256 (hex) over names, types, shapes and values of a folder's tensors, whatever files they lie in."""
    digest = hashlib.sha256()
    where: dict[str, Path] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            where.update(dict.fromkeys(tensors.keys(), file))
    if not where:
        raise UserError(f"{path} holds no safetensors weights: run the stage that makes it, or name another folder.")
    for name in sorted(where):
        with safe_open(where[name], framework="pt") as tensors:
            tensor = tensors.get_tensor(name).contiguous()
        digest.update(f"{name}/{tensor.dtype}/{list(tensor.shape)}/".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_hash(path: str | Path) -> str:
    """SHA-256 (hex) over what determines a folder's tokenization."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        file = Path(path) / name
        if file.is_file():
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def max_positions(path: str | Path) -> int | None:
    """The longest sequence that a folder's model takes, or None where its config sets no limit."""
    return position_limit(AutoConfig.from_pretrained(path, trust_remote_code=False))


def _load(auto_class: Any, path: str | Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} is not a model folder (it has no config.json): run the stage that makes it.")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
    if auto_class is AutoModelForSequenceClassification and type(config) not in auto_class._model_mapping:
        raise UserError(
            f"{path} cannot become a reward model, since transformers has no sequence classifier of the architecture "
            f"{config.model_type}: start from a model of another architecture."
        )
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    try:
        # Missing weights are expected of a scorer's fresh head only; transformers warns of others.
        model: PreTrainedModel = auto_class.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except OSError as error:
        raise UserError(f"{path} could not be loaded ({str(error).splitlines()[0]}): see docs/hub.md.") from error
    return model
