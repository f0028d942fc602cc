"""What every training stage does around its loop, here without one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from prefopt.experiment.recipes import to_dict
from prefopt.lm.models import load_policy, weights_hash
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.files import stable_hash
from prefopt.training import stage
from prefopt.training.checkpoint import TrainingState
from prefopt.training.recipe import TrainingRecipe
from tiny_task import TRAINING, Task


def test_the_best_weights_of_an_adapter_are_merged_into_what_is_published(task: Task, tmp_path: Path) -> None:
    recipe = TrainingRecipe(**{**TRAINING, "adapter": {"rank": 2, "alpha": 4}, "keep": "best"})
    identity = stage.describe_run("prefopt.training.sft", recipe, {"data": "hash of the data"})
    assert identity["recipe"] == {name: value for name, value in to_dict(recipe).items() if name != "checkpoint_every"}
    policy, tokenizer = load_policy(task.model)
    policy.generation_config.max_new_tokens = 7
    model = stage.prepared(policy, recipe)
    ids = torch.tensor([[5, 6, 7, 8]])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad(), stage.open_run(tmp_path / "work", identity, model) as run:
        assert run._needed_bytes == 6 * 4 * sum(parameter.numel() for parameter in trained)
        state = TrainingState("toy", run, model, model, torch.optim.AdamW(trained), "best")
        start = model(input_ids=ids).logits
        for state.step, value, objective in ((1, 0.1, 0.9), (2, 0.2, 0.5)):
            for parameter in trained:
                parameter.fill_(value)
            state.keep_if_best(objective)
            if state.step == 1:
                best = model(input_ids=ids).logits
        state.finish()
        args = argparse.Namespace(out=tmp_path / "model", metrics=tmp_path / "metrics.jsonl")
        usage = Usage("toy", default_device(), "float32")
        stage.publish(args, model, tokenizer, identity, [{"step": 1}], usage, run, told="a fact")
        assert not run.path.exists()
        published, _ = load_policy(args.out)
        torch.testing.assert_close(published(input_ids=ids).logits, best, rtol=1e-4, atol=1e-5)
        assert (best - start).abs().max() > 1e-3
    assert published.generation_config.max_new_tokens == 7
    manifest = json.loads((args.out / "manifest.json").read_text())
    assert (manifest["identity"], manifest["identity_hash"]) == (identity, stable_hash(identity))
    assert (manifest["used"]["stage"], manifest["told"]) == ("toy", "a fact")
    assert manifest["weights_hash"] == weights_hash(args.out)
    assert args.metrics.read_text() == '{"step": 1}\n'
