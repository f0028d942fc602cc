"""The reference table and DPO on it."""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.lm.models import load_policy, save_model, tokenizer_hash, weights_hash
from prefopt.store.tables import read_manifest, read_table, write_table
from prefopt.training import loop, preference, reference
from tiny_task import Task, recipe


@pytest.fixture(scope="module")
def reference_table(task: Task) -> Path:
    out = task.folder / "reference.parquet"
    arguments = {"model": task.model, "data": task.preferences, "out": out}
    reference.run(argparse.Namespace(**arguments, recipe='{"token_budget": 128, "dtype": "float32"}'))
    return out


def test_the_tables_manifest_says_what_was_computed_from_what(task: Task, reference_table: Path) -> None:
    manifest = read_manifest(reference_table)
    assert manifest["preferences"] == read_manifest(task.preferences)["content_hash"]
    assert manifest["model_weights"] == weights_hash(task.model)
    assert manifest["recipe"] == {"token_budget": 128, "dtype": "float32"}
    assert (
        manifest["lengths"] == read_manifest(task.preferences)["lengths"] == {"max_prompt_length": 40, "max_length": 60}
    )
    tokens = sum(row.tokens for row in reference.preference_rows(read_table(task.preferences, "preferences")))
    assert (manifest["used"]["stage"], manifest["used"]["examples"], manifest["used"]["tokens"]) == (
        *("reference", 16, tokens),
    )


def dpo_recipe(loss: str = "sigmoid", **values: object) -> str:
    return recipe(objective="dpo", values={"loss": loss, "beta": 0.5, "label_smoothing": 0.0}, **values)


def test_cached_log_probabilities_equal_the_online_ones(task: Task, reference_table: Path) -> None:
    model, _ = load_policy(task.model)
    pairs = read_table(task.preferences, "preferences")
    cached = reference.read_reference(reference_table, task.model, pairs)
    for pair, row in zip(pairs.itertuples(), cached.itertuples(), strict=True):
        for side, logp in (("chosen", row.chosen_logp), ("rejected", row.rejected_logp)):
            completion = getattr(pair, f"{side}_ids").tolist()
            ids = torch.tensor([[*pair.prompt_ids.tolist(), *completion]])
            with torch.no_grad():
                logps = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            assert logp == pytest.approx(logps[-len(completion) :].sum().item(), abs=1e-4)
    assert cached["chosen_tokens"].tolist() == [len(ids) for ids in pairs["chosen_ids"]]


def test_before_the_first_step_the_loss_is_ln_two_and_the_margin_zero(task: Task, reference_table: Path) -> None:
    model, _ = load_policy(task.model)
    pairs = read_table(task.preferences, "preferences")
    table = reference.read_reference(reference_table, task.model, pairs)
    examples = preference.preference_examples(pairs, table, from_json(preference.PreferenceRecipe, dpo_recipe()))
    figures = loop.evaluate(model, examples, from_json(preference.PreferenceRecipe, dpo_recipe()))
    assert figures["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert figures["margin"] == pytest.approx(0, abs=1e-5)
    for side in ("chosen_logp", "rejected_logp"):
        assert figures[side] == pytest.approx(table[side].mean(), rel=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_learns_the_training_pairs_and_publishes(
    loss: str, task: Task, reference_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    arguments = argparse.Namespace(
        by_step=None,
        model=task.model,
        data=task.preferences,
        reference=reference_table,
        reference_model=None,
        recipe=dpo_recipe(loss=loss, epochs=8, learning_rate=2e-3),
        work=tmp_path / "work",
        out=tmp_path / "dpo",
        metrics=tmp_path / "dpo.jsonl",
    )
    preference.run(arguments)
    metrics = [json.loads(line) for line in arguments.metrics.read_text().splitlines()]
    training = [row for row in metrics if row["split"] == "train"]
    assert training[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert metrics[0]["split"] == "validation"
    for figure in ("margin", "chosen_reward", "rejected_reward"):
        assert metrics[0][figure] == pytest.approx(0, abs=1e-5), figure
    assert training[-1]["margin"] > 0.05
    assert training[-1]["accuracy"] >= 0.75
    manifest = json.loads((arguments.out / "manifest.json").read_text())
    assert manifest["identity"]["recipe"]["values"]["beta"] == 0.5
    assert manifest["identity"]["inputs"] == {
        "data": read_manifest(task.preferences)["content_hash"],
        "reference_weights": weights_hash(task.model),
        "reference_tokenizer": tokenizer_hash(task.model),
    }
    assert (manifest["used"]["stage"], manifest["used"]["examples"]) == ("dpo", 8 * 12)
    assert "dpo: step 0, validation loss " in caplog.text
    assert weights_hash(arguments.out) != weights_hash(task.model)
    assert [path.suffix for path in (tmp_path / "work").iterdir()] == [".lock"]


def test_one_changed_weight_is_noticed(task: Task, reference_table: Path, tmp_path: Path) -> None:
    model, tokenizer = load_policy(task.model)
    with torch.no_grad():
        next(model.parameters())[3, 5] += 1e-3
    save_model(tmp_path / "changed", model, tokenizer, {})
    pairs = read_table(task.preferences, "preferences")
    with pytest.raises(UserError, match="model_weights"):
        reference.read_reference(reference_table, tmp_path / "changed", pairs)


def test_other_rows_and_other_lengths_are_refused(task: Task, reference_table: Path, tmp_path: Path) -> None:
    pairs = read_table(task.preferences, "preferences")
    manifest = dict(pairs.attrs["manifest"])
    kept = {key: manifest[key] for key in ("tokenizer_hash", "lengths")}
    write_table(tmp_path / "fewer.parquet", "preferences", pairs.iloc[1:], **kept)
    with pytest.raises(UserError, match="preferences = "):
        reference.read_reference(reference_table, task.model, read_table(tmp_path / "fewer.parquet", "preferences"))
    kept["lengths"] = {"max_prompt_length": 39, "max_length": 60}
    write_table(tmp_path / "shorter.parquet", "preferences", pairs, **kept)
    with pytest.raises(UserError, match="lengths = "):
        reference.read_reference(reference_table, task.model, read_table(tmp_path / "shorter.parquet", "preferences"))


def test_a_missing_pair_is_named(task: Task, reference_table: Path, tmp_path: Path) -> None:
    pairs = read_table(task.preferences, "preferences")
    table = read_table(reference_table, "reference_logprobs")
    manifest = {
        key: value
        for key, value in table.attrs["manifest"].items()
        if key not in ("table", "schema_version", "rows", "content_hash", "versions")
    }
    write_table(tmp_path / "short.parquet", "reference_logprobs", table.iloc[:-1], **manifest)
    with pytest.raises(UserError, match="lacks the pair 'pair15'"):
        reference.read_reference(tmp_path / "short.parquet", task.model, pairs)


def test_another_tokenizer_is_refused(task: Task, reference_table: Path, tmp_path: Path) -> None:
    shutil.copytree(task.model, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    first, second = list(content["model"]["vocab"].items())[-2:]
    content["model"]["vocab"][first[0]], content["model"]["vocab"][second[0]] = second[1], first[1]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="model_tokenizer"):
        reference.read_reference(reference_table, tmp_path / "model", read_table(task.preferences, "preferences"))


def test_pairs_keep_their_order(task: Task, reference_table: Path) -> None:
    pairs = read_table(task.preferences, "preferences")
    backwards = pairs.iloc[::-1]
    backwards.attrs = pairs.attrs
    table: pd.DataFrame = reference.read_reference(reference_table, task.model, backwards)
    assert table["pair_id"].tolist() == backwards["pair_id"].tolist()
