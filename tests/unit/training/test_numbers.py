"""Whatever is not finite stops with the ids of the rows concerned, and of no others, in every trainer and stage."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from prefopt.data.sampled_pairs import SampledPairsRecipe, preference_pairs
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.generation import sample as sampling
from prefopt.generation.best_of_n import best_of_n
from prefopt.generation.score import ScoreRecipe, score_samples
from prefopt.lm.models import load_policy, new_classifier, new_scorer
from prefopt.rewards import stage as true_rewards
from prefopt.runtime.usage import Usage
from prefopt.store.tables import read_table, write_table
from prefopt.training import loop, ppo, preference, reference, reward, sft
from prefopt.training.checkpoint import RunFolder
from prefopt.training.classifier import ClassifierRecipe, report, review_examples
from prefopt.training.evaluation import EvaluationRecipe, evaluate_policy
from prefopt.training.recipe import TrainingRecipe
from test_reward_and_ppo import PPO
from tiny_task import TRAINING, Task

RECIPE = TrainingRecipe(**TRAINING)
DPO = preference.PreferenceRecipe(
    **TRAINING, objective="dpo", values={"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}
)
CPU = torch.device("cpu")
# A token of no text of the tiny task.
ODD = 11


@pytest.fixture
def usage() -> Usage:
    return Usage("test", CPU, "float32")


def spoilt(model: nn.Module) -> Any:
    """A model for which one token has no numbers, as a reserved one that was never trained."""

    def hide(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == ODD).unsqueeze(-1), float("nan"))

    model.get_input_embeddings().register_forward_hook(hide)  # type: ignore[operator]
    return model


def with_odd(table: pd.DataFrame, row: int, column: str) -> pd.DataFrame:
    """The table with the odd token in front of a row's ids."""
    changed = table.copy()
    changed[column] = [np.array([ODD, *ids]) if i == row else ids for i, ids in enumerate(table[column])]
    return changed


def cached(pairs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"chosen_logp": np.float32(-3.0), "rejected_logp": np.float32(-3.0)}, index=pairs.index)


def sft_examples(task: Task) -> tuple[nn.Module, loop.Examples]:
    table = with_odd(read_table(task.demonstrations, "demonstrations"), 5, "response_ids")
    return load_policy(task.model)[0], sft.table_examples(table, "prompt_id", "response_ids")


def pairs_of(task: Task, column: str) -> pd.DataFrame:
    return with_odd(read_table(task.preferences, "preferences"), 5, column)


def dpo_examples(task: Task) -> tuple[nn.Module, loop.Examples]:
    pairs = pairs_of(task, "rejected_ids")
    return load_policy(task.model)[0], preference.preference_examples(pairs, cached(pairs), DPO)


def unlikelihood_examples(task: Task) -> tuple[nn.Module, loop.Examples]:
    recipe = preference.PreferenceRecipe(**TRAINING, objective="unlikelihood", values={"alpha": 0.5})
    return load_policy(task.model)[0], preference.preference_examples(pairs_of(task, "chosen_ids"), None, recipe)


def reward_examples(task: Task) -> tuple[nn.Module, loop.Examples]:
    return new_scorer(task.model, 0)[0], reward.preference_examples(pairs_of(task, "prompt_ids"))


def classifier_examples(task: Task) -> tuple[nn.Module, loop.Examples]:
    model, tokenizer = new_classifier(task.model, 0, ("NEGATIVE", "POSITIVE"))
    texts = ["my dog ate the shoe"] * 8
    texts[5] = tokenizer.decode([ODD]) + texts[5]
    reviews = pd.DataFrame({"review_id": [f"r{i}" for i in range(8)], "text": texts, "label": 1})
    return model, review_examples(reviews, tokenizer, ClassifierRecipe(**TRAINING, max_length=20))


EXAMPLES: dict[str, tuple[Callable[[Task], tuple[nn.Module, loop.Examples]], str]] = {
    "sft": (sft_examples, "p5"),
    "dpo": (dpo_examples, "pair5"),
    "unlikelihood": (unlikelihood_examples, "pair5"),
    "reward": (reward_examples, "pair5"),
    "classifier": (classifier_examples, "r5, r5 (excerpt)"),
}


@pytest.mark.parametrize("trainer", EXAMPLES)
def test_the_row_is_named_in_training_and_in_validation(trainer: str, task: Task, usage: Usage, tmp_path: Path) -> None:
    make, name = EXAMPLES[trainer]
    model, examples = make(task)
    spoilt(model)
    advice = re.escape(f"for {name}: lower the learning rate or look at these rows.")
    with (
        RunFolder(tmp_path, {}, 0) as folder,
        pytest.raises(UserError, match=rf"^{trainer}: the \w+ is nan in the validation at step 0 {advice}$"),
    ):
        loop.train(trainer, model, examples, examples, RECIPE, folder, usage)
    # A batch may hold one of the two texts of a review.
    advice = rf"for {name.partition(',')[0]}( \(excerpt\))?(, .*)?: lower"
    good = dataclasses.replace(
        examples,
        losses=lambda model, indices: examples.losses(model, [0 for _ in indices]),
    )
    with (
        RunFolder(tmp_path, {}, 0) as folder,
        pytest.raises(UserError, match=rf"^{trainer}: the \w+ is nan at step \d+ \(learning rate \S+\) {advice}"),
    ):
        loop.train(trainer, model, examples, good, RECIPE, folder, usage)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_figure_of_an_example_counts_where_the_loss_is_finite(value: float, task: Task) -> None:
    model, examples = dpo_examples(task)

    def losses(model: nn.Module, indices: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ok = torch.ones(len(indices)) * next(model.parameters()).sum()
        logps = torch.tensor([value if i == 3 else 0.0 for i in indices])
        return ok, {"rejected_logp": logps}

    odd = dataclasses.replace(examples, losses=losses)
    with pytest.raises(UserError, match=rf"^dpo: the rejected_logp is {value:g} in the validation for pair3: "):
        loop.evaluate(model, odd, RECIPE, "dpo", " in the validation")


def test_a_gradient_that_is_not_finite_with_a_loss_that_is(task: Task, usage: Usage, tmp_path: Path) -> None:
    model, _ = load_policy(task.model)

    def losses(model: nn.Module, indices: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        weight = next(model.parameters())
        # The root has no derivative at 0.
        return (weight * 0).sum().sqrt().expand(len(indices)), {}

    rows = sft_examples(task)[1]
    examples = dataclasses.replace(rows, losses=losses)
    with (
        RunFolder(tmp_path, {}, 0) as folder,
        pytest.raises(UserError, match=r"^sft: the gradient's norm is nan at step 0 \(learning rate \S+\) for p\d+, "),
    ):
        loop.train("sft", model, examples, examples, RECIPE, folder, usage)


def test_the_reference_names_the_pair(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_of(task, "chosen_ids")
    manifest = read_table(task.preferences, "preferences").attrs["manifest"]
    kept = {key: manifest[key] for key in ("tokenizer_hash", "lengths")}
    write_table(tmp_path / "pairs.parquet", "preferences", pairs, **kept)
    args = argparse.Namespace(model=task.model, data=tmp_path / "pairs.parquet", out=tmp_path / "reference.parquet")
    args.recipe = '{"token_budget": 128, "dtype": "float32"}'
    reference.run(args)
    table = read_table(args.out, "reference_logprobs")
    args.out = tmp_path / "spoilt.parquet"
    monkeypatch.setattr(reference, "load_policy", lambda path: (spoilt(load_policy(path)[0]), None))
    with pytest.raises(UserError, match=r"^A completion's log-probability is nan for pair5: look at "):
        reference.run(args)
    assert not args.out.exists()

    own = ("table", "schema_version", "rows", "content_hash", "versions")
    facts = {key: value for key, value in table.attrs["manifest"].items() if key not in own}
    table.loc[3, "rejected_logp"] = -np.inf
    with pytest.raises(
        UserError, match=r"spoilt.parquet: row 3 .*\(pair_id 'pair3'\) has -inf in the column 'rejected_logp'"
    ):
        write_table(args.out, "reference_logprobs", table, **facts)


def prompts_of(task: Task) -> pd.DataFrame:
    prompts = with_odd(read_table(task.prompts, "prompts"), 2, "prompt_ids").head(4)
    return prompts.assign(split="test")


def sample_recipe(temperature: float) -> sampling.SampleRecipe:
    counts = {"train_prompts": 0, "validation_prompts": 0, "test_prompts": 4}
    rest: dict[str, Any] = {"token_budget": 64, "dtype": "float32", "seed": 0, "vllm": None}
    return sampling.SampleRecipe(temperatures=(temperature,), stop=(), n=2, max_new_tokens=4, **counts, **rest)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_sampling_names_the_prompt_also_where_it_takes_the_likeliest(
    temperature: float, task: Task, usage: Usage
) -> None:
    policy, tokenizer = load_policy(task.model)
    with pytest.raises(UserError, match=r"^The log-probability of a completion of dpo is nan for p2: look at these"):
        sampling.sample_rows(spoilt(policy), tokenizer, prompts_of(task), "dpo", sample_recipe(temperature), usage)


def test_scores_of_samples_name_the_prompt(task: Task, usage: Usage) -> None:
    policy, tokenizer = load_policy(task.model)
    prompts = prompts_of(task)
    rows = sampling.sample_rows(policy, tokenizer, prompts, "dpo", sample_recipe(0.7), usage)
    with pytest.raises(UserError, match=r"^A sample's log-probability under the reference policy is nan for p2: "):
        sampling.reference_logps(spoilt(load_policy(task.model)[0]), prompts, rows, [len(rows)], 64, "float32")
    samples = pd.DataFrame(rows)
    samples["token_ids"] = [np.array(ids) for ids in samples["token_ids"]]
    scorer, _ = new_scorer(task.model, 0)
    recipe = ScoreRecipe(token_budget=64, dtype="float32")
    assert len(score_samples(scorer, prompts, samples, recipe, usage)) == 8
    with pytest.raises(UserError, match=r"^A sample's reward is nan for p2: "):
        score_samples(spoilt(scorer), prompts, samples, recipe, usage)


@pytest.mark.parametrize("spoils", ["policy", "reference", "reward"])
def test_evaluation_names_the_prompt(spoils: str, task: Task) -> None:
    models = {name: load_policy(task.model)[0] for name in ("policy", "reference")}
    if spoils in models:
        spoilt(models[spoils])

    def rewards(texts: Any) -> torch.Tensor:
        return torch.tensor([float("nan") if spoils == "reward" and i in (4, 5) else 1.0 for i in range(len(texts))])

    values = {"prompts": 4, "samples_per_prompt": 2, "max_new_tokens": 4, "seed": 0, "token_budget": 64}
    recipe = EvaluationRecipe(**values, dtype="float32")
    what = {"policy": "log-probability", "reference": "KL", "reward": "true reward"}[spoils]
    with pytest.raises(UserError, match=rf"^An evaluated sample's {what} is nan for p2: "):
        evaluate_policy(*models.values(), load_policy(task.model)[1], prompts_of(task), rewards, recipe)


@pytest.mark.parametrize("spoils", ["policy", "reference", "value", "reward"])
@pytest.mark.parametrize("validation", [True, False])
def test_ppo_names_the_prompt(spoils: str, validation: bool, task: Task, usage: Usage, tmp_path: Path) -> None:
    scorer = new_scorer(task.model, 0)[0]
    models: dict[str, Any] = {name: load_policy(task.model)[0] for name in ("policy", "reference")}
    models["value"] = new_scorer(task.model, 1)[0]
    recipe = from_json(ppo.PPORecipe, json.dumps({**PPO, "missing_eos_reward": None}))
    spoilt(scorer if spoils == "reward" else models[spoils])
    parts = ppo.Models(**models, reward=ppo.learned_reward(scorer, recipe))
    what = {
        **{"policy": "log-probability", "reference": "log-probability under the reference policy"},
        **{"value": "value", "reward": "reward"},
    }[spoils]
    when = "in the validation at update 0" if validation else r"at update 0 \(learning rate 0.001\)"
    prompts = prompts_of(task)
    with (
        RunFolder(tmp_path, {}, 0) as folder,
        pytest.raises(UserError, match=rf"^ppo: a completion's {what} is nan {when} for p2: lower the learning"),
    ):
        ppo.train(parts, prompts, prompts if validation else None, recipe, [0], folder, usage)


def test_an_update_of_ppo_names_its_prompts(
    task: Task, usage: Usage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = from_json(ppo.PPORecipe, json.dumps(PPO))
    scorer = new_scorer(task.model, 0)[0]
    policy, other, value = load_policy(task.model)[0], load_policy(task.model)[0], new_scorer(task.model, 1)[0]
    models = ppo.Models(policy, value, other, ppo.learned_reward(scorer, recipe))
    monkeypatch.setattr(ppo, "update", lambda *values: {"loss": 1.0, "grad_norm": float("inf")})
    prompts = read_table(task.prompts, "prompts").head(4)
    with (
        RunFolder(tmp_path, {}, 0) as folder,
        pytest.raises(
            UserError, match=r"^ppo: the grad_norm is inf at update 0 \(learning rate 0.001\) for p\d, "
        ) as error,
    ):
        ppo.train(models, prompts, None, recipe, [0], folder, usage)
    assert all(f"p{i}" in str(error.value) for i in range(4))


def test_a_reward_model_whose_reference_completions_have_no_score(task: Task) -> None:
    demonstrations = with_odd(read_table(task.demonstrations, "demonstrations"), 1, "response_ids")
    with pytest.raises(UserError, match=r"^The score of a reference completion is nan for p1: "):
        reward._mean_reference_score(spoilt(new_scorer(task.model, 0)[0]), demonstrations, RECIPE)


def test_a_classifiers_report_names_the_review(task: Task) -> None:
    model, tokenizer = new_classifier(task.model, 0, ("NEGATIVE", "POSITIVE"))
    texts = ["my dog", tokenizer.decode([ODD]) + "my dog"]
    reviews = pd.DataFrame({"review_id": ["r0", "r1"], "text": texts, "label": [1, 0]})
    with pytest.raises(UserError, match=r"^P\(positive\) of reviews is nan for r1: "):
        report(spoilt(model), tokenizer, reviews, ClassifierRecipe(**TRAINING, max_length=20))


def samples_table(rewards: list[float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = [
        {"prompt_id": f"p{i // 2}", "sample_index": i % 2, "run": "sft", "temperature": 1.0, "split": "test"}
        | {"text": f"t{i}", "tokens": 1, "token_ids": np.array([i]), "finish_reason": "eos"}
        | {"logp": -1.0, "reference_logp": -1.0}
        for i in range(len(rewards))
    ]
    samples = pd.DataFrame(rows)
    return samples, samples[["prompt_id", "temperature", "sample_index"]].assign(reward=rewards)


def test_rewards_of_a_table_that_are_read() -> None:
    samples, scores = samples_table([1.0, 2.0, 3.0, float("inf")])
    with pytest.raises(UserError, match=r"^A score is inf for p1: run the stage `score` again"):
        best_of_n(samples, scores, samples.head(0), 2, "best_of_2")
    prompts = pd.DataFrame(
        {"prompt_id": ["p0", "p1"], "prompt": "", "split": "train", "prompt_ids": [np.array([1])] * 2}
    )
    samples, scores = samples_table([1.0, float("nan"), 3.0, 4.0])
    with pytest.raises(UserError, match=r"^A sample's reward is nan for p0: score them again"):
        preference_pairs(
            prompts, samples, scores, SampledPairsRecipe(pairs="all", length_penalty=0, missing_eos_reward=None, seed=0)
        )


def test_true_rewards_name_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, _ = samples_table([0.0] * 4)
    prompts = [
        {"prompt_id": f"p{i}", "prompt": "a", "reference": "", "split": "test", "facts": "", "prompt_ids": [1]}
        for i in range(2)
    ]
    made = write_table(tmp_path / "prompts.parquet", "prompts", prompts)
    write_table(tmp_path / "samples.parquet", "samples", samples, prompts=made["content_hash"])
    monkeypatch.setattr(
        true_rewards, "load_true_reward", lambda **_: lambda texts: torch.tensor([0.5, 0.5, float("nan"), 0.5])
    )
    args = argparse.Namespace(samples=tmp_path / "samples.parquet", prompts=tmp_path / "prompts.parquet", shard=None)
    args.recipe, args.true_reward_model = '{"kind": "rule", "max_length": 8, "batch_size": 2, "token_budget": 9}', None
    args.out = tmp_path / "scores.parquet"
    with pytest.raises(UserError, match=r"^A sample's true reward is nan for p1: "):
        true_rewards.run(args)
    assert not args.out.exists()
