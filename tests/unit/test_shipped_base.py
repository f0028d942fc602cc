"""The checkpoint in the repository is what the code and the default config would make."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml
from transformers import pipeline

from prefopt.data.synthetic.posts import generate
from prefopt.experiment.config import resolve
from prefopt.experiment.recipes import from_dict
from prefopt.experiment.stage_recipes import stage_recipe
from prefopt.lm.models import load_policy, tokenizer_hash, weights_hash
from prefopt.lm.sampling import sample
from prefopt.store import tables
from prefopt.training import model_card
from prefopt.training.pretrain import PretrainRecipe, recipe_hash, train_tokenizer

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "workflow" / "models" / "tldr_base"
MANIFEST = json.loads((SHIPPED / "manifest.json").read_text())


def test_recipe_and_text_are_the_defaults(tmp_path: Path) -> None:
    config = resolve(yaml.safe_load((ROOT / "config" / "config.yaml").read_text()))
    text = generate(config["tasks"]["tldr"]["data"]["embedded"]).pretraining
    written = tables.write_table(tmp_path / "text.parquet", "pretraining", [{"text": one} for one in text])
    recipe = from_dict(PretrainRecipe, stage_recipe(config, "tldr", "pretrain"))
    assert MANIFEST["recipe_hash"] == recipe_hash(recipe, written["content_hash"])
    tokenizer = train_tokenizer(text[:200], 300)
    assert tokenizer.eos_token_id == load_policy(SHIPPED)[1].eos_token_id


def test_the_model_card_is_what_its_stage_writes(tmp_path: Path) -> None:
    model_card.run(argparse.Namespace(model=SHIPPED, out=tmp_path / "card.md"))
    card = (tmp_path / "card.md").read_text()
    assert card == (SHIPPED / "README.md").read_text()
    assert weights_hash(SHIPPED) in card and tokenizer_hash(SHIPPED) in card and MANIFEST["recipe_hash"] in card


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 8 * 2**20
    model, _ = load_policy(SHIPPED)
    assert sum(parameter.numel() for parameter in model.parameters()) == MANIFEST["parameters"]


def test_transformers_pipeline_takes_a_models_folder_as_it_is() -> None:
    """As other tools do; greedy, it writes what the engine samples."""
    prompt = "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: It sleeps.\n\nTL;DR:"
    written = pipeline("text-generation", model=str(SHIPPED))(prompt, max_new_tokens=12, do_sample=False)
    model, tokenizer = load_policy(SHIPPED)
    ids = tokenizer(prompt)["input_ids"]
    ((own,),) = sample(model, [ids], n=1, temperature=0.0, max_new_tokens=12, ends=[tokenizer.eos_token_id], seeds=[0])
    text = tokenizer.decode([*ids, *own.token_ids], skip_special_tokens=True)
    assert written[0]["generated_text"] == text and len(text) > len(prompt)
