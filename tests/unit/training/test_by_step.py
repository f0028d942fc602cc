"""Any trainer's policy is sampled while it trains, from where it starts to what is published."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from prefopt.experiment.recipes import from_dict
from prefopt.generation import sample
from prefopt.lm.models import load_policy, save_model
from prefopt.runtime.usage import Usage
from prefopt.store.tables import read_table, write_table
from prefopt.training import by_step, reference, reward, round_evaluations
from test_reward_and_ppo import PPO
from tiny_task import Task, recipe

SAMPLING = {
    **{"temperatures": [1.0], "stop": [], "n": 2, "max_new_tokens": 5, "token_budget": 64, "seed": 0},
    **{"train_prompts": 0, "validation_prompts": 3, "test_prompts": 0, "dtype": "float32", "vllm": None},
}


@pytest.mark.parametrize(
    ("total", "points", "steps"), [(6, 3, [0, 2, 4, 6]), (7, 2, [0, 4, 7]), (2, 5, [0, 1, 2]), (9, 1, [0, 9])]
)
def test_steps_are_sampled_evenly_from_the_reference_policy_to_the_last(
    total: int, points: int, steps: list[int]
) -> None:
    assert by_step.steps_between(total, points) == steps


def arguments(trainer: str, task: Task, folder: Path) -> argparse.Namespace:
    """Of a training of four steps, or of four updates of PPO, which is sampled three times."""
    values = {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2, "checkpoint_every": 1, "keep": "last"}
    compute = '{"token_budget": 128, "dtype": "float32"}'
    if trainer == "preference":
        reference_table = folder / "reference.parquet"
        inputs = {"model": task.model, "data": task.preferences, "out": reference_table}
        reference.run(argparse.Namespace(**inputs, recipe=compute))
        given = {"data": task.preferences, "reference": reference_table, "reference_model": None}
        text = recipe(objective="dpo", values={"loss": "sigmoid", "beta": 0.5, "label_smoothing": 0.0}, **values)
    elif trainer == "sft":
        given, text = {"data": task.demonstrations}, recipe(completion="response", **values)
    else:
        scorer = folder / "reward_model"
        made = {"work": folder / "reward_work", "out": scorer, "metrics": folder / "reward.jsonl"}
        read = {"model": task.model, "data": task.preferences, "demonstrations": task.demonstrations}
        reward.run(argparse.Namespace(**read, **made, recipe=recipe(epochs=1)))
        given, text = {"reward_model": scorer, "prompts": task.prompts}, json.dumps({**PPO, "updates": 4})
    return argparse.Namespace(
        **given,
        model=task.model,
        recipe=text,
        by_step=json.dumps({"points": 2, "sampling": SAMPLING}),
        run="mine",
        sampled_prompts=task.prompts,
        samples=folder / "samples.parquet",
        evaluations=None,
        true_reward_model=None,
        work=folder / "work",
        out=folder / "model",
        metrics=folder / "metrics.jsonl",
    )


@pytest.mark.parametrize("trainer", ["sft", "preference", "ppo"])
def test_a_policy_is_sampled_by_step_from_its_start_to_what_is_published(
    trainer: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, given = importlib.import_module(f"prefopt.training.{trainer}"), arguments(trainer, task, tmp_path)
    write, written = by_step.write_table, []

    def stop_after_step_two(path: Path, *values: object, **facts: object) -> None:
        write(path, *values, **facts)
        written.append(path.name)
        if written == ["samples_000000.parquet", "samples_000002.parquet"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(by_step, "write_table", stop_after_step_two)
    with pytest.raises(KeyboardInterrupt):
        stage.run(given)
    assert not given.samples.exists() and not given.out.exists()
    stage.run(given)
    # The step at which the run was stopped was not yet saved; the policy that it starts from is not sampled again.
    assert written[2:] == ["samples_000002.parquet", "samples_000004.parquet", "samples.parquet"]
    table = read_table(given.samples, "samples")
    assert table["run"].drop_duplicates().tolist() == ["mine_step_0", "mine_step_2", "mine_step_4"]
    manifest = table.attrs["manifest"]
    assert manifest["prompts"] == read_table(task.prompts, "prompts").attrs["manifest"]["content_hash"]
    assert manifest["recipe"] == {"points": 2, "sampling": SAMPLING}
    prompts = sample.chosen_prompts(read_table(task.prompts, "prompts"), from_dict(sample.SampleRecipe, SAMPLING))
    assert prompts["prompt_id"].tolist() == ["p12", "p13", "p14"]
    for step, folder in ((0, task.model), (4, given.out)):
        policy, tokenizer = load_policy(folder)
        usage = Usage("test", torch.device("cpu"), "float32")
        values = (policy, tokenizer, prompts, f"mine_step_{step}", from_dict(sample.SampleRecipe, SAMPLING), usage)
        expected = pd.DataFrame(sample.sample_rows(*values))
        found = table[table["run"] == f"mine_step_{step}"].reset_index(drop=True)
        for column in ("prompt_id", "sample_index", "text"):
            assert found[column].tolist() == expected[column].tolist()
        assert found["logp"].tolist() == pytest.approx(expected["logp"].tolist(), abs=1e-4)


def test_a_run_in_rounds_is_sampled_after_each(task: Task, tmp_path: Path) -> None:
    """As the policy is that a round ends with, step by step; step 0 is the reference policy."""
    model, tokenizer = load_policy(task.model)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    save_model(tmp_path / "round", model, tokenizer, {})
    out = tmp_path / "samples.parquet"
    values = json.dumps({"points": 8, "sampling": SAMPLING})
    args = {"model": task.model, "run": "mine", "sampled_prompts": task.prompts, "by_step": values, "samples": out}
    nothing = dict.fromkeys(("evaluations", "true_reward_model", "reward_model"))
    round_evaluations.run(argparse.Namespace(**args, **nothing, rounds=[tmp_path / "round", task.model]))
    table = read_table(out, "samples", prompts=read_table(task.prompts, "prompts").attrs["manifest"]["content_hash"])
    by_run = {run: rows.reset_index(drop=True) for run, rows in table.groupby("run", sort=False)}
    assert list(by_run) == ["mine_step_0", "mine_step_1", "mine_step_2"]
    texts = [rows["text"].tolist() for rows in by_run.values()]
    assert texts[0] == texts[2] != texts[1]
    assert by_run["mine_step_2"]["logp"].tolist() == pytest.approx(by_run["mine_step_0"]["logp"].tolist(), abs=1e-5)


@pytest.mark.parametrize("style", [None, "chat"])
def test_a_policy_is_gathered_and_sampled_in_its_prompts_style(
    style: str | None, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The style, which ends a chat's answer, goes to the sampler, and all weights of the policy are there for it."""
    prompts = read_table(task.prompts, "prompts")
    facts = {} if style is None else {"style": style}
    written = tmp_path / "prompts.parquet"
    hashed = prompts.attrs["manifest"]["tokenizer_hash"]
    write_table(written, "prompts", prompts, tokenizer_hash=hashed, **facts)
    args = argparse.Namespace(
        **{"model": task.model, "run": "mine", "sampled_prompts": written, "samples": tmp_path / "out.parquet"},
        **{"by_step": json.dumps({"points": 2, "sampling": SAMPLING}), "evaluations": None},
    )
    given: list[tuple[object, ...]] = []
    gathered: list[object] = []
    policy, tokenizer = load_policy(task.model)
    rows = sample.sample_rows(
        *(policy, tokenizer, prompts[:1], "mine_step_2", from_dict(sample.SampleRecipe, SAMPLING)),
        Usage("test", torch.device("cpu"), "float32"),
    )

    def sampled(*values: object) -> object:
        given.append(values)
        return rows

    def all_weights(model: object) -> contextlib.AbstractContextManager[None]:
        gathered.append(model)
        return contextlib.nullcontext()

    monkeypatch.setattr(by_step, "sample_rows", sampled)
    monkeypatch.setattr(by_step, "gathered", all_weights)
    folder = SimpleNamespace(path=tmp_path)
    watcher = by_step.watcher(args, policy, tokenizer, folder, 4)  # type: ignore[arg-type]
    assert watcher is not None
    for step in range(5):
        watcher(step)
    assert gathered == [policy] * 3 and [values[3] for values in given] == [f"mine_step_{step}" for step in (0, 2, 4)]
    *_, usage, reference, told = given[0]
    assert (reference, told) == (None, style or "plain")
    assert isinstance(usage, Usage) and usage.report()["stage"] == "sample mine by step"
