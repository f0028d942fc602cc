"""A model brought from a hub once, so that every later stage reads a local folder of safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefopt.errors import UserError
from prefopt.lm.loading import LOADING, check_config, check_weights, reason_of, silent
from prefopt.lm.models import check_vocabulary, save_model
from prefopt.store.tables import package_versions

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
        UserError: the model cannot be reached, it has no weights of the kind asked for, or weights that are not those
            of its config.
    """
    options = {**LOADING, "use_safetensors": not args.convert_bin, "revision": args.revision, "dtype": "float32"}
    common = {"revision": args.revision, "trust_remote_code": False}
    try:
        with silent():
            config = AutoConfig.from_pretrained(args.name, **common)
            check_config(config, args.name)
            tokenizer = AutoTokenizer.from_pretrained(args.name, **common)
            model, info = _KINDS[args.kind].from_pretrained(args.name, config=config, **options)
    except UserError:
        raise
    except Exception as error:  # of the network, transformers or the architecture's own code
        raise UserError(
            f"{args.name} could not be loaded ({reason_of(error)}): check the name and the network; if it "
            f"has no safetensors weights, run `python -m prefopt fetch --convert-bin` once (docs/hub.md)."
        ) from error
    check_weights(info, args.name)
    check_vocabulary(tokenizer, model.config, args.name)
    manifest = {
        "fetched": args.name,
        "revision": args.revision or "not pinned",
        "converted_from_bin": args.convert_bin,
        "versions": package_versions(),
    }
    save_model(args.out, model, tokenizer, manifest)
