"""A model read by transformers with every weight accounted for: what does not fit is one sentence that names the folder.

transformers gives a weight that it does not find random values, drops one that it does not know, and raises whatever
it meets in a folder that is not what it seems. A wrong model must not run, and no folder may end in a traceback.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from prefopt.errors import UserError

transformers_logging.disable_progress_bar()
logger = logging.getLogger(__name__)

_DROPOUTS = ("dropout", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
# Counts of which a model has at least one; transformers builds a model without layers where one is negative.
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# Keys of a config.json by which it would patch transformers' classes or read weights that the folder's hash leaves out.
_FOREIGN = ("fusion_config", "transformers_weights")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_NARROW = {"F16": "float16", "BF16": "bfloat16"}
# Buffers that old checkpoints hold, and the pooler that encoders were pretrained with: nothing is computed with them.
_UNUSED = (".masked_bias", ".inv_freq", "position_ids", ".pooler.dense.weight", ".pooler.dense.bias")
_LFS_POINTER = b"version https://git-lfs"
_NEVER_EMPTY = re.compile(r"\.safetensors$|^(config|tokenizer|model\.safetensors\.index)\.json$|^tokenizer\.model$")
# Tokens of the short row that a model is tried on.
_TRIED = 6


def reason_of(error: Exception) -> str:
    """What an error of another library says, in at most one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")


def check_folder(path: str | Path) -> None:
    """Raises UserError where a folder is no whole model folder of its own: empty files, pointers of Git LFS, an adapter."""
    folder = Path(path)
    files = [file for file in sorted(folder.glob("*")) if file.is_file()]
    for file in files:
        if _NEVER_EMPTY.search(file.name) and file.stat().st_size == 0:
            raise UserError(
                f"{file} is empty, as a full disk or a power cut may leave it: copy it again, or, if this workflow made "
                f"the model, delete {path} and run its stage again."
            )
    for file in files:
        if file.stat().st_size < 1024 and file.read_bytes().startswith(_LFS_POINTER):
            raise UserError(f"{file} is a pointer of Git LFS, not the file itself: run `git lfs pull` in {path}.")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds an adapter (adapter_config.json): merge it into the weights and remove the file."
        )


def read_config(path: str | Path, **options: Any) -> PreTrainedConfig:
    """The config of a model folder.

    Args:
        path: a folder with a config.json.
        **options: replace values of it.

    Raises:
        UserError: there is none, it cannot be read, asks for code of its own, or describes no model.
    """
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} is not a model folder (it has no config.json): run the stage that makes it.")
    check_folder(path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
        check_config(config, path)
    except UserError:
        raise
    except Exception as error:  # a validator of any of hundreds of architectures
        raise UserError(
            f"The config.json of {path} could not be read ({reason_of(error)}): see docs/hub.md."
        ) from error
    return config


def check_config(config: PreTrainedConfig, source: str | Path) -> None:
    """Raises UserError where a config describes a model that is not read: quantized, without layers, or elsewhere."""
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{source} is quantized: take the model in float32, float16 or bfloat16 that it was made of.")
    for name in _FOREIGN:
        if getattr(config, name, None) is not None:
            raise UserError(f"The config.json of {source} sets {name}, which is not taken: remove the key.")
    text = config.get_text_config()
    for name in _COUNTS:
        value = getattr(text, name, None)
        if isinstance(value, int) and value < 1:
            raise UserError(f"The config.json of {source} says {name}: {value}: correct it.")


def read_model(
    auto_class: Any,
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    fresh_head: bool = False,
    weights: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """A model of a local folder on the CPU, in evaluation mode and without dropout.

    Args:
        auto_class: one of transformers' classes.
        path: the folder.
        dtype: of the weights.
        fresh_head: the folder holds a causal language model, whose head gives way to a new one with random weights.
        weights: whether they are read; without them the model is on torch's device `meta`, and takes no memory.
        **options: replace values of the config.

    Raises:
        UserError: it cannot be loaded, or a weight is missing, unknown, of another shape, or quantized.
    """
    config = read_config(path, **options)
    if auto_class is AutoModelForSequenceClassification and type(config) not in auto_class._model_mapping:
        raise UserError(
            f"{path} cannot become a reward model, since transformers has no sequence classifier of the architecture "
            f"{config.model_type}: start from a model of another architecture."
        )
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    try:
        with silent():
            where = None if weights else "meta"
            model, info = auto_class.from_pretrained(path, config=config, dtype=dtype, device_map=where, **LOADING)
            head = _head_names(model, config) if fresh_head else None
        stored = _stored_types(path)
    except Exception as error:  # of safetensors, transformers or the architecture's own code
        raise UserError(f"{path} could not be loaded ({reason_of(error)}): see docs/hub.md.") from error
    for name, kind in stored.items():
        if kind not in _FLOATS and name.endswith("weight"):
            raise UserError(
                f"{path} is quantized: {name} is stored as {kind}: take the model in float32, float16 or bfloat16."
            )
    narrow = sorted({_NARROW[kind] for kind in stored.values() if kind in _NARROW})
    if narrow and dtype == torch.float32:
        logger.info("%s is in %s; its weights are read, and trained, as float32", path, " and ".join(narrow))
    masks = [name for name, kind in stored.items() if kind in ("BOOL", "U8")]
    check_weights(info, path, head, masks)
    _check_tie(model, path)
    result: PreTrainedModel = model
    return result


# A config.json cannot choose an implementation of attention or of experts, which may be code of a hub.
LOADING: dict[str, Any] = {
    **{"use_safetensors": True, "weights_only": True, "trust_remote_code": False, "output_loading_info": True},
    **{"attn_implementation": None, "experts_implementation": None, "ignore_mismatched_sizes": True},
}


def check_weights(
    info: Mapping[str, Any],
    source: str | Path,
    head: tuple[set[str], set[str]] | None = None,
    unused: Iterable[str] = (),
) -> None:
    """Raises UserError where weights of a model and of its file are not the same.

    Args:
        info: what transformers says of loading.
        source: folder or name, for the message.
        head: names that may be missing and names that may be unknown, where a head is replaced.
        unused: names that may be unknown, beside those of buffers that old checkpoints hold.
    """
    absent, dropped = head or (set(), set())
    missing = sorted(set(info["missing_keys"]) - absent)
    unknown = sorted(
        name for name in set(info["unexpected_keys"]) - dropped - set(unused) if not name.endswith(_UNUSED)
    )
    shapes = sorted(info["mismatched_keys"])
    faults = []
    if missing:
        faults.append(f"lacks {_some(missing)}")
    if unknown:
        faults.append(f"holds {_some(unknown)}, unknown to the architecture of its config.json")
    if shapes:
        name, found, wanted = shapes[0]
        faults.append(
            f"holds {name} with the shape {list(found)} where its config.json asks for {list(wanted)}"
            + (f" (and {len(shapes) - 1} more of another shape)" if len(shapes) > 1 else "")
        )
    if faults:
        raise UserError(f"{source} {', and it '.join(faults)}: name a folder whose weights are those of its config.")


@torch.no_grad()
def check_language_model(model: PreTrainedModel, source: str | Path) -> None:
    """Tries a model on two short rows that differ in their last token.

    Args:
        model: a causal language model, or a scorer on the backbone of one.
        source: folder or name, for the message.

    Raises:
        UserError: what it computes is not finite, or a position sees the tokens after it, as an encoder's does.
    """
    if model.get_output_embeddings() is None:
        values = _tried(model, source, lambda ids: model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    else:
        values = _tried(model, source, lambda ids: model(input_ids=ids, use_cache=False).logits)
    # An encoder's positions move by far more than rounding does.
    allowed = min(1000 * torch.finfo(values.dtype).eps, 0.1) * values.abs().max().item()
    if (values[0, :-1] - values[1, :-1]).abs().max().item() > allowed:
        raise UserError(
            f"{source} is no causal language model: what it computes at a token depends on the tokens after it, as an "
            f"encoder's does; take a model that was trained to go on with a text."
        )


@torch.no_grad()
def check_classifier(model: PreTrainedModel, source: str | Path) -> None:
    """Raises UserError where a classifier's logits of a short row are not finite."""
    _tried(model, source, lambda ids: model(input_ids=ids[:1]).logits)


def _tried(model: PreTrainedModel, source: str | Path, compute: Any) -> Tensor:
    """`compute` of ids [2, T], a tensor whose first dimension is that of rows; impossible tokens (-inf) become 0.

    Raises:
        UserError: it fails or is not finite, or weights outside the backbone are not.
    """
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    length = min(_TRIED, getattr(model.config, "max_position_embeddings", None) or _TRIED)
    ids = torch.randint(embedding.shape[0], (1, max(length, 2)), generator=generator).repeat(2, 1)
    ids[1, -1] = (ids[0, -1] + 1) % embedding.shape[0]
    try:
        values: Tensor = compute(ids.to(embedding.device))
    except Exception as error:  # of the architecture's own code
        raise UserError(f"{source} does not compute a row of {ids.shape[1]} tokens ({reason_of(error)}).") from error
    values = values.masked_fill(values == -torch.inf, 0)
    heads = [weight for name, weight in model.named_parameters() if not _in_backbone(model, name)]
    if not all(tensor.isfinite().all() for tensor in (values, *heads)):
        broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
        where = f", as weights are not ({_some(broken)})" if broken else ""
        raise UserError(f"What {source} computes is not finite{where}: name another folder.")
    return values


def _in_backbone(model: PreTrainedModel, name: str) -> bool:
    return name.startswith(f"{model.base_model_prefix}.")


def _head_names(model: PreTrainedModel, config: PreTrainedConfig) -> tuple[set[str], set[str]]:
    """Names of a model's parameters outside its backbone, and of those of the causal language model of its config."""
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
    own, other = (
        {name for name, _ in each.named_parameters() if not _in_backbone(each, name)} for each in (model, causal)
    )
    return own, other


def _check_tie(model: PreTrainedModel, source: str | Path) -> None:
    """Raises UserError where a config ties two weights, of which the file holds different values."""
    for one, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(one) is not model.get_parameter_or_buffer(other):
            raise UserError(
                f"{source} holds {one} and {other} with different values, but its config.json ties them: "
                f"set tie_word_embeddings to false there."
            )


def _stored_types(path: str | Path) -> dict[str, str]:
    """The type of each tensor in a folder's safetensors files, as the files name it."""
    kinds = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            kinds.update({name: tensors.get_slice(name).get_dtype() for name in tensors.keys()})  # noqa: SIM118
    return kinds


def _some(names: list[str]) -> str:
    """The first three names, and how many others there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more weights" if len(names) > 3 else "")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keeps transformers' table of weights out of the log; `check_weights` says of it what matters."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """A model folder's manifest.json; empty where there is none.

    Raises:
        UserError: it is no JSON object.
    """
    file = Path(path) / "manifest.json"
    if not file.is_file():
        return {}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} could not be read ({reason_of(error)}): run the stage that makes {path} again."
        ) from error
    if not isinstance(manifest, dict):
        raise UserError(f"{file} is not a JSON object: run the stage that makes {path} again.")
    return manifest
