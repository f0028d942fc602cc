"""A model brought from a hub once, so that every later stage reads a local folder of safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefopt.errors import UserError
from prefopt.lm.models import save_model
from prefopt.tables import package_versions

_KINDS = {"causal_lm": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `fetch`."""
    parser.add_argument("--name", required=True, help="name on the hub, or a local folder")
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
        UserError: the model cannot be reached, or it has no weights of the kind asked for.
    """
    common = {"revision": args.revision, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.name, **common)
        model = _KINDS[args.kind].from_pretrained(
            args.name, use_safetensors=not args.convert_bin, weights_only=True, dtype="float32", **common
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{args.name} could not be loaded ({str(error).splitlines()[0]}): check the name and the network; if it "
            f"has no safetensors weights, run `python -m prefopt fetch --convert-bin` once (docs/hub.md)."
        ) from error
    manifest = {
        "fetched": args.name,
        "revision": args.revision or "not pinned",
        "converted_from_bin": args.convert_bin,
        "versions": package_versions(),
    }
    save_model(args.out, model, tokenizer, manifest)
