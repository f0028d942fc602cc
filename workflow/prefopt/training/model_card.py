"""The model card of a pretrained base: what it is, what it was made of, and the hashes that name it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prefopt.lm.models import tokenizer_hash, weights_hash
from prefopt.store.files import read_json, write_text

_CARD = """\
# A small base model of the embedded TL;DR world

A causal language model of {parameters:,} parameters (Llama architecture, byte-level BPE) that knows the synthetic
forum posts of `prefopt.data.synthetic.world` and nothing else. It has read lists of words, posts, and quotes, notes and questions
about them, never a summary. It is of no use outside this workflow's embedded default, whose base it is.

| | |
| --- | --- |
| weights | `{weights}` |
| tokenizer | `{tokenizer}` |
| recipe and text | `{recipe_hash}` |
| licence | Apache-2.0 |

The hashes are those of `prefopt.lm.models` and `prefopt.training.pretrain.recipe_hash`; a test compares the last with
the code and the default config. Make it again, from the synthetic text that the config describes, by

    snakemake --cores 2 shipped_base

Recipe:

```json
{recipe}
```
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `model_card`."""
    parser.add_argument("--model", required=True, type=Path, help="folder that the stage `pretrain` made")
    parser.add_argument("--out", required=True, type=Path, help="the card that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the card."""
    manifest = read_json(args.model / "manifest.json")
    card = _CARD.format(
        parameters=manifest["parameters"],
        weights=weights_hash(args.model),
        tokenizer=tokenizer_hash(args.model),
        recipe_hash=manifest["recipe_hash"],
        recipe=json.dumps(manifest["identity"]["recipe"], indent=1),
    )
    write_text(args.out, card)
