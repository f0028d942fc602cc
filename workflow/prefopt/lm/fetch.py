"""A model brought from a hub, a folder or a GGUF file once, so that every later stage reads a local folder of safetensors."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefopt.errors import UserError
from prefopt.lm.loading import LOADING, check_config, check_weights, reason_of, silent
from prefopt.lm.models import check_vocabulary, save_model
from prefopt.store.tables import package_versions

logger = logging.getLogger(__name__)

_KINDS = {"causal_lm": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `fetch`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--name", help="name on the hub, or a local folder")
    source.add_argument("--gguf", type=Path, help="a GGUF file, whose weights are written as float32")
    parser.add_argument("--kind", choices=list(_KINDS), default="causal_lm", help="what the model is")
    parser.add_argument("--revision", help="commit on the hub; without it what is fetched is not pinned")
    parser.add_argument(
        "--convert-bin",
        action="store_true",
        help="read pytorch_model.bin (by torch.load with weights_only) where there is no safetensors file",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the model that is made")


def run(args: argparse.Namespace) -> None:
    """Loads a model without running any code of its repository, and writes it as a model folder.

    Raises:
        UserError: the model cannot be reached, it has no weights of the kind asked for, or weights that are not those
            of its config.
    """
    if args.gguf is not None:
        _from_gguf(args)
        return
    options = {**LOADING, "use_safetensors": not args.convert_bin, "revision": args.revision, "dtype": "float32"}
    common = {"revision": args.revision, "trust_remote_code": False}
    try:
        with silent():
            config = AutoConfig.from_pretrained(args.name, **common)
            check_config(config, args.name)
            stored = getattr(config, "dtype", None)
            tokenizer = AutoTokenizer.from_pretrained(args.name, **common)
            model, info = _KINDS[args.kind].from_pretrained(args.name, config=config, **options)
    except UserError:
        raise
    except Exception as error:  # of the network, transformers or the architecture's own code
        raise UserError(
            f"{args.name} could not be loaded ({reason_of(error)}): check the name and the network; if it "
            f"has no safetensors weights, run `python -m prefopt fetch --convert-bin` once (docs/hub.md)."
        ) from error
    narrow = str(stored).removeprefix("torch.")
    if narrow in ("bfloat16", "float16"):
        logger.info("%s is in %s; it is written, and trained, as float32 weights", args.name, narrow)
    _save(
        *(args.out, model, tokenizer, info, args.name),
        fetched=args.name,
        revision=args.revision or "not pinned",
        converted_from_bin=args.convert_bin,
    )


def _from_gguf(args: argparse.Namespace) -> None:
    """Writes the model of a GGUF file: its weights as float32, its tokenizer, and its chat template."""
    path: Path = args.gguf
    if args.kind != "causal_lm" or args.revision is not None or args.convert_bin:
        raise UserError("--gguf takes neither --kind, --revision nor --convert-bin: leave them out.")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("A GGUF file is read by the package `gguf`: pip install 'prefopt[gguf]'.")
    if not path.is_file():
        raise UserError(f"{path} is no file: give the path of a GGUF file.")
    where = {"gguf_file": path.name, "trust_remote_code": False}
    loading = {**LOADING, "gguf_file": path.name, "dtype": "float32"}
    try:
        with silent():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
            model, info = AutoModelForCausalLM.from_pretrained(path.parent, **loading)
    except Exception as error:  # of gguf, transformers or the architecture's own code
        raise UserError(
            f"{path} could not be loaded ({reason_of(error)}): transformers may not read GGUF files of its architecture; "
            f"take the model that it was made of."
        ) from error
    # The weights are whole numbers no more: nothing of the quantization is left in what is written.
    for part in (model, model.config):
        for name in ("quantization_config", "hf_quantizer", "is_quantized", "quantization_method"):
            part.__dict__.pop(name, None)
    logger.warning(
        "%s: its weights are what its quantization has left of them, and its tokenizer is what transformers makes of the "
        "file; for numbers to publish take the model that it was made of",
        path,
    )
    _save(*(args.out, model, tokenizer, info, path), fetched=path.name, converted_from_gguf=True)


def _save(
    out: Path, model: Any, tokenizer: Any, info: dict[str, Any], source: str | Path, **manifest: str | bool
) -> None:
    check_weights(info, source)
    check_vocabulary(tokenizer, model.config, source)
    save_model(out, model, tokenizer, {**manifest, "versions": package_versions()})
