"""A chat from its records to its judge: every stage ends a completion at the same tokens as transformers' `generate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from every_trainer import VALUES
from prefopt.cli import main
from prefopt.judging import accuracy
from prefopt.judging.reward_model import load_judge
from prefopt.lm.chat import chat_of, end_tokens
from prefopt.lm.models import load_policy, load_tokenizer, save_model
from prefopt.rewards.learned import score_rows
from prefopt.store.tables import read_table, write_table
from prefopt.training import ppo, reward, sft
from prefopt.training.pretrain import PretrainRecipe, new_model, train_tokenizer
from test_reward_and_ppo import PPO
from tiny_task import SHAPE, TRAINING, WORDS

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + ('<think></think>' if m['role'] == 'assistant' else '')"
    " + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAMPLING: dict[str, Any] = {
    **{
        "temperatures": [0.0, 1.0],
        "stop": [],
        "n": 3,
        "max_new_tokens": 16,
        "train_prompts": 4,
        "validation_prompts": 0,
    },
    **{"test_prompts": 0, "token_budget": 64, "dtype": "float32", "seed": 0, "vllm": None},
}


def words(number: int, count: int) -> str:
    return " ".join(WORDS[(number + i) % len(WORDS)] for i in range(count))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a template, and a generation config that names a further end token."""
    folder = tmp_path_factory.mktemp("chat_task") / "base"
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 300)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<|stop|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    model = new_model(PretrainRecipe(**TRAINING, **SHAPE), tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=[0, tokenizer.convert_tokens_to_ids("<|stop|>")])
    save_model(folder, model, tokenizer, {})
    return folder


@pytest.fixture(scope="module")
def task(base: Path) -> Path:
    """The folder of the tables, as `prepare` makes them of conversations."""
    folder = base.parent
    raw: dict[str, list[dict[str, Any]]] = {"demonstrations": [], "preferences": []}
    for i in range(8):
        messages = json.dumps([{"role": "user", "content": words(i, 3)}])
        shared = {"prompt_id": f"p{i}", "prompt": words(i, 3), "messages": messages}
        shared["split"] = "train" if i < 6 else "validation"
        raw["demonstrations"].append({**shared, "response": f" {words(i + 2, 2)}", "facts": "", "source": "made"})
        answers = {"chosen": f" {words(i + 3, 2)}", "rejected": f" {words(i + 4, 3)}"}
        split = "test" if i > 6 else shared["split"]
        raw["preferences"].append({**shared, **answers, "split": split, "pair_id": f"pair{i}", "source": "made"})
    recipe: dict[str, Any] = {"max_prompt_length": 40, "max_length": 64, "truncation": "keep_start", "suffix": ""}
    recipe |= {"style": None, "system": None, "new_suffix": None, "evaluation_only": False}
    for name, rows in raw.items():
        account = {"read": len(rows), "kept": len(rows), "dropped": {}}
        facts: dict[str, Any] = {"task": "own", "recipe": {"source": "files"}, "notes": {}, "account": account}
        write_table(folder / "raw" / f"{name}.parquet", f"raw_{name}", rows, **facts)
        made = (name, "prompts") if name == "demonstrations" else (name,)
        options = [
            "--raw",
            str(folder / "raw" / f"{name}.parquet"),
            "--model",
            str(base),
            "--recipe",
            json.dumps(recipe),
        ]
        assert main(["prepare", *options, "--out", *(str(folder / f"{table}.parquet") for table in made)]) == 0
    return folder


def trained(stage: Any, task: Path, out: Path, recipe: dict[str, Any], **paths: Any) -> Path:
    folders = {"work": out / "work", "out": out / "model", "metrics": out / "metrics.jsonl"}
    stage.run(argparse.Namespace(**folders, **paths, by_step=None, recipe=json.dumps(recipe)))
    return out / "model"


@pytest.fixture(scope="module")
def policy(task: Path, base: Path) -> Path:
    recipe = {
        **VALUES["sft"],
        "keep": "last",
        "max_grad_norm": 1.0,
        "evaluate_every": 1000,
        "epochs": 200,
        "optimizer": "adamw",
        "learning_rate": 1e-2,
        "checkpoint_every": 1000,
    }
    return trained(sft, task, task / "sft", recipe, model=base, data=task / "demonstrations.parquet")


def sampled(task: Path, model: Path, out: Path, *more: str) -> int:
    options = ["--model", str(model), "--prompts", str(task / "prompts.parquet"), "--run", "sft", "--out", str(out)]
    return main(["sample", *options, "--recipe", json.dumps(SAMPLING), *more])


@pytest.mark.parametrize("adapter", [None, {"rank": 2, "alpha": 4}])
def test_a_published_model_keeps_template_and_end_tokens(
    task: Path, base: Path, tmp_path: Path, adapter: dict[str, int] | None
) -> None:
    recipe = {**VALUES["sft"], "epochs": 1, "keep": "last", "adapter": adapter}
    folder = trained(sft, task, tmp_path, recipe, model=base, data=task / "demonstrations.parquet")
    model, tokenizer = load_policy(folder)
    assert tokenizer.chat_template == TEMPLATE
    names = ["<|endoftext|>", "<|im_end|>", "<|stop|>"]
    assert end_tokens(tokenizer, model) == tuple(tokenizer.convert_tokens_to_ids(names))
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.convert_tokens_to_ids(names)


def test_samples_end_where_generate_does_and_their_texts_are_answers(task: Path, policy: Path, tmp_path: Path) -> None:
    assert sampled(task, policy, tmp_path / "samples.parquet") == 0
    samples = read_table(tmp_path / "samples.parquet", "samples")
    tokenizer, model = AutoTokenizer.from_pretrained(policy), AutoModelForCausalLM.from_pretrained(policy)
    prompts = read_table(task / "prompts.parquet", "prompts").set_index("prompt_id")
    demonstrations = read_table(task / "demonstrations.parquet", "demonstrations").set_index("prompt_id")
    greedy = samples[samples["temperature"] == 0]
    for row in greedy.itertuples():
        ids = torch.tensor([prompts["prompt_ids"][row.prompt_id].tolist()])
        made = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert row.token_ids.tolist() == made.tolist()
        # It has learned its demonstrations, to the end of the turn.
        assert row.finish_reason == "end:<|im_end|>"
        assert row.token_ids.tolist() == demonstrations["response_ids"][row.prompt_id].tolist()
        assert row.text == demonstrations["response"][row.prompt_id]
        assert tokenizer.decode(made) == f"<think></think>{row.text.strip()}<|im_end|>"
    assert set(samples["finish_reason"]) <= {"end:<|im_end|>", "length", "eos", "end:<|stop|>"}


def test_any_end_token_ends_a_sample(task: Path, policy: Path, tmp_path: Path) -> None:
    model, tokenizer = load_policy(policy)
    start, end = tokenizer.convert_tokens_to_ids(["<think>", "<|stop|>"])
    with torch.no_grad():  # after a token that is as likely as not
        model.lm_head.weight[end] = model.lm_head.weight[start]
    save_model(tmp_path / "stops", model, tokenizer, {})
    assert sampled(task, tmp_path / "stops", tmp_path / "samples.parquet") == 0
    samples = read_table(tmp_path / "samples.parquet", "samples")
    stopped = samples[samples["finish_reason"] == "end:<|stop|>"]
    assert 0 < len(stopped) < len(samples)
    assert all(ids[-1] == end and end not in ids[:-1] for ids in stopped["token_ids"])


def test_examples_before_a_prompt_are_refused(task: Path, policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sampled(task, policy, task / "none.parquet", "--shots", "2") == 2
    assert "sft puts 2 examples before each prompt, which is for plain prompts" in capsys.readouterr().err


def test_reward_model_ppo_and_judge_read_at_the_end_of_the_turn(task: Path, policy: Path, tmp_path: Path) -> None:
    tables = {"data": task / "preferences.parquet", "demonstrations": task / "demonstrations.parquet"}
    scorer = trained(reward, task, tmp_path / "scorer", TRAINING, model=policy, **tables)
    prompts = read_table(task / "prompts.parquet", "prompts")
    pairs = read_table(task / "preferences.parquet", "preferences")
    measured = tmp_path / "accuracy.parquet"
    values = json.dumps({"token_budget": 64, "confidence": 0.95})
    accuracy.run(argparse.Namespace(gold_model=scorer, gold_data=tables["data"], recipe=values, out=measured))
    judge = load_judge(scorer, measured, prompts, 64)
    # A judge that reads a text anew gives the tokens that `prepare` gave.
    for pair in pairs.itertuples():
        row = judge._row(pair.prompt_id, [pair.chosen, pair.rejected])
        assert row.completions == (tuple(pair.chosen_ids), tuple(pair.rejected_ids))
        assert score_rows(judge._model, [row], 64).shape == (1, 2)
    recipe = {**PPO, "updates": 1, "missing_eos_reward": -7.0, "temperature": 0.01, "max_new_tokens": 16}
    folder = trained(
        ppo, task, tmp_path / "ppo", recipe, model=policy, reward_model=scorer, prompts=task / "prompts.parquet"
    )
    first = json.loads((tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    # All completions end, by the template's token, so that none has the reward of those that do not.
    assert first["ended"] == 1.0 and first["reward"] > -7
    assert chat_of(load_tokenizer(folder)).end == chat_of(load_tokenizer(policy)).end
