"""Model folders: loading, saving, hashing. Safetensors only, no remote code, no dropout."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2TokenizerFast,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from prefopt.errors import UserError
from prefopt.lm.engine import position_limit, score_head
from prefopt.lm.loading import (
    check_classifier,
    check_folder,
    check_language_model,
    read_config,
    read_manifest,
    read_model,
    reason_of,
)
from prefopt.lm.verify import use_engine
from prefopt.runtime import processes
from prefopt.store import provenance
from prefopt.store.files import atomic_directory, canonical_json

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
# Tokens that a tokenizer has a use for.
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Scripts, spaces, digits and signs on which tokenizers differ.
_PROBE = "  A cat's 12,345 caf\u00e9s;\n\n\tna\u00efve \ufb01 \u00bd \u4f60\u597d \u043f\u0440\u0438 \U0001f408 don't </x> #1. "


def load_policy(
    path: str | Path, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, ready for the engine, and its tokenizer.

    Args:
        path: a model folder.
        device: where to put it. Where None it is for `prefopt.lm.sharding.place`: it lies on the CPU, and of several
            processes the main one alone has weights; all must load it then.
        dtype: of the weights.

    Raises:
        UserError: the folder cannot be loaded, its weights are not those of its config or not those that were
            published, its tokenizer does not fit them, what it computes is not finite or not causal, or the engine
            does not compute the same.
    """
    _check_published(path)
    model = read_model(AutoModelForCausalLM, path, dtype, weights=_reads_weights(device))
    tokenizer = load_tokenizer(path)
    return _ready(model, path, device), tokenizer


def load_scorer(
    path: str | Path, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A sequence-classification model with one output in evaluation mode: a reward model (see `load_policy`).

    Raises:
        UserError: as `load_policy`; transformers has no such model of the architecture.
    """
    _check_published(path)
    weights = _reads_weights(device)
    model = read_model(AutoModelForSequenceClassification, path, dtype, weights=weights, num_labels=1)
    return _ready(model, path, device)


def new_scorer(
    path: str | Path, seed: int, *, device: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A scorer on a causal language model's backbone with a fresh head, N(0, 1/sqrt(d + 1)).

    The deviation is that of OpenAI's reward models (Stiennon et al. 2020). Errors are those of `load_policy`.
    """
    _check_published(path)
    tokenizer = load_tokenizer(path)
    weights = _reads_weights(device)
    model = read_model(AutoModelForSequenceClassification, path, fresh_head=True, weights=weights, num_labels=1)
    head = score_head(model)
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(head.weight.shape, generator=generator) / (head.weight.shape[1] + 1) ** 0.5
    head.weight.data.copy_(fresh)
    return _ready(model, path, device), tokenizer


def new_classifier(
    path: str | Path, seed: int, labels: Sequence[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier on a causal language model's backbone with a fresh head; it reads the last token's state.

    It is for `prefopt.lm.sharding.place`, as `load_policy` says; so are the errors.
    """
    _check_published(path)
    tokenizer = load_tokenizer(path)
    names = dict(enumerate(labels))
    torch.manual_seed(seed)
    model = read_model(
        AutoModelForSequenceClassification,
        path,
        fresh_head=True,
        weights=_reads_weights(None),
        num_labels=len(labels),
        id2label=names,
        label2id={name: index for index, name in names.items()},
        pad_token_id=tokenizer.eos_token_id,
    )
    if _reads_weights(None):
        check_language_model(model, path)
    return model, tokenizer


def load_classifier(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier in evaluation mode, which may be an encoder, and its tokenizer (see `load_policy`)."""
    _check_published(path)
    model = read_model(AutoModelForSequenceClassification, path)
    tokenizer = load_tokenizer(path)
    check_classifier(model, path)
    return model, tokenizer


def _reads_weights(device: torch.device | None) -> bool:
    """Whether this process does: see `load_policy`."""
    return device is not None or processes.is_main()


def _ready(model: PreTrainedModel, path: str | Path, device: torch.device | None) -> PreTrainedModel:
    if _reads_weights(device):
        check_language_model(model, path)
    model = use_engine(model, path, together=device is None)
    return model if device is None else model.to(device)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer: tokenizer.json, GPT-2's vocab.json and merges.txt, or sentencepiece's tokenizer.model.

    Raises:
        UserError: the folder holds none of them, it cannot be loaded, it has no EOS token, or it has tokens that the
            model of the folder, where there is one, has no embedding for.
    """
    folder = Path(path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"{path} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}): name another folder.")
    check_folder(path)
    config = read_config(path) if (folder / "config.json").is_file() else None
    try:
        if config is not None or (folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        elif (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, eos_token="<|endoftext|>")
        elif (folder / "tokenizer.model").is_file():
            tokenizer = LlamaTokenizer.from_pretrained(folder)
        else:
            tokenizer = GPT2TokenizerFast.from_pretrained(folder)
        encode(tokenizer, [_PROBE])
    except Exception as error:  # of tokenizers, sentencepiece or the tokenizer's own code
        raise UserError(
            f"The tokenizer of {path} could not be loaded ({reason_of(error)}): see docs/hub.md."
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, without which no completion ends: name one.")
    if config is not None:
        check_vocabulary(tokenizer, config, path)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, source: str | Path) -> None:
    """Raises UserError where a tokenizer gives tokens that a model has no embedding for.

    A special token without a role (a placeholder for images) is never given: no text is read as one.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    roles = {getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    unused = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - roles
    tokens = {i: token for token, i in tokenizer.get_vocab().items() if i not in unused}
    last = max(tokens)
    if isinstance(rows, int) and last >= rows:
        raise UserError(
            f"The tokenizer of {source} has {last + 1} tokens, the last of them {tokens[last]!r}, but its model has "
            f"embeddings of {rows}: enlarge the embedding, or take away the tokens that were added."
        )


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text by itself: BOS, or none."""
    (plain,), (own,) = encode(tokenizer, ["a"]), tokenizer(["a"])["input_ids"]
    starts = (i for i in range(len(own) - len(plain) + 1) if own[i : i + len(plain)] == plain)
    return list(own[: next(starts, 0)])


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

    The manifest also gets the hash of the weights, as they were read again from the file (`weights_hash`).

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
        whole = {**provenance.stamp(), **manifest, "weights_hash": weights_hash(folder)}
        (folder / "manifest.json").write_text(json.dumps(whole, indent=1, sort_keys=True))


def weights_hash(path: str | Path) -> str:
    """SHA-256 (hex) over names, types, shapes and values of a folder's tensors, whatever files they lie in.

    A process reads a folder once for it, unless a file of it changes.

    Raises:
        UserError: there are none, or a file is broken.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} holds no safetensors weights: run the stage that makes it, or name another folder.")
    check_folder(path)
    try:
        return _weights_hash(_states(files))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be loaded ({reason_of(error)}): see docs/hub.md.") from error


@functools.lru_cache(maxsize=16)
def _weights_hash(files: tuple[tuple[str, ...], ...]) -> str:
    digest = hashlib.sha256()
    where: dict[str, str] = {}
    for file, *_ in files:
        with safe_open(file, framework="pt") as tensors:
            where.update(dict.fromkeys(tensors.keys(), file))
    for name in sorted(where):
        with safe_open(where[name], framework="pt") as tensors:
            tensor = tensors.get_tensor(name).contiguous()
        digest.update(f"{name}/{tensor.dtype}/{list(tensor.shape)}/".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _states(files: Sequence[Path]) -> tuple[tuple[str, ...], ...]:
    """Names of files, with what changes when one is written; the time of the last change of an inode cannot be set."""
    states = ((file, file.stat()) for file in files)
    return tuple(
        (str(file.absolute()), *map(str, (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))) for file, s in states
    )


def _check_published(path: str | Path) -> None:
    """Raises UserError where a folder's weights are not those of which its manifest.json holds the hash."""
    published = read_manifest(path).get("weights_hash")
    if published is not None and published != weights_hash(path):
        raise UserError(
            f"The weights of {path} are not those that were published there (manifest.json: weights_hash "
            f"{str(published)[:12]}, found {weights_hash(path)[:12]}): delete the folder and run its stage again."
        )


def tokenizer_hash(path: str | Path) -> str:
    """What determines a folder's token ids: a SHA-256 (hex) of its tokenization, and the ids of BOS and EOS in words.

    It is the same for all files by which one tokenizer is kept, and differs where the same files end texts otherwise.
    """
    files = sorted(file for file in Path(path).glob("*") if file.suffix in (".json", ".model", ".txt", ".jinja"))
    return _tokenizer_hash(str(path), _states(files))


@functools.lru_cache(maxsize=16)
def _tokenizer_hash(path: str, files: tuple[tuple[str, ...], ...]) -> str:
    tokenizer = load_tokenizer(path)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    tokenization = {
        "vocabulary": tokenizer.get_vocab(),
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])],
        "scores": model["vocab"] if model.get("type") == "Unigram" else [],
        "probe": encode(tokenizer, [_PROBE]),
    }
    digest = hashlib.sha256(canonical_json(tokenization).encode()).hexdigest()
    begin = " ".join(map(str, beginning(tokenizer))) or "none"
    return f"{digest}, BOS {begin}, EOS {tokenizer.eos_token_id}"


def check_tokenizer(path: str | Path, other: str | Path) -> None:
    """Raises UserError where a model reads token ids otherwise than one that it works with."""
    if tokenizer_hash(path) != tokenizer_hash(other):
        raise UserError(
            f"The tokenizer of {path} ({tokenizer_hash(path)}) is not that of {other} ({tokenizer_hash(other)}): make "
            f"both of one base."
        )


def max_positions(path: str | Path) -> int | None:
    """The longest sequence that a folder's model takes, or None where its config sets no limit."""
    return position_limit(read_config(path))
