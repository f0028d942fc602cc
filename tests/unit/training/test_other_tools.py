"""What is trained here, as others load it: transformers' pipeline, and a sequence classifier as RewardBench takes it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from prefopt.lm.batching import Row
from prefopt.lm.models import load_policy, load_scorer
from prefopt.lm.sampling import sample
from prefopt.rewards.learned import raw_scores, score_rows
from prefopt.store.tables import read_table
from prefopt.training import reward, sft
from tiny_task import Task, recipe


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    return {"work": tmp_path / "work", "out": tmp_path / "model", "metrics": tmp_path / "metrics.jsonl"}


def test_a_trained_policy_writes_the_same_in_transformers_pipeline(task: Task, paths: dict[str, Path]) -> None:
    values = recipe(completion="response", epochs=1)
    sft.run(argparse.Namespace(model=task.model, data=task.demonstrations, **paths, by_step=None, recipe=values))
    prompt = read_table(task.prompts, "prompts").iloc[0]
    theirs = pipeline("text-generation", model=str(paths["out"]))(
        prompt["prompt"], max_new_tokens=8, do_sample=False, return_full_text=False
    )
    model, tokenizer = load_policy(paths["out"])
    how = {"n": 1, "temperature": 0.0, "max_new_tokens": 8, "ends": [tokenizer.eos_token_id], "seeds": [0]}
    ((ours,),) = sample(model, [prompt["prompt_ids"].tolist()], **how)
    assert len(ours.token_ids) == 8, "the tiny model does not end its text"
    assert theirs[0]["generated_text"] == tokenizer.decode(ours.token_ids)


def test_a_reward_model_is_a_sequence_classifier_with_one_label(task: Task, paths: dict[str, Path]) -> None:
    """Its logit is our score before the mean of the references is taken off; batches want a padding token that is not EOS."""
    inputs = {"model": task.model, "data": task.preferences, "demonstrations": task.demonstrations}
    reward.run(argparse.Namespace(**inputs, **paths, recipe=recipe(epochs=2, learning_rate=3e-3)))
    theirs = AutoModelForSequenceClassification.from_pretrained(paths["out"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(paths["out"])
    pairs = read_table(task.preferences, "preferences").head(4)
    rows = [
        Row(tuple(pair.prompt_ids.tolist()), (tuple(pair.chosen_ids.tolist()), tuple(pair.rejected_ids.tolist())))
        for pair in pairs.itertuples()
    ]
    scorer = load_scorer(paths["out"])
    with torch.no_grad():
        ours = raw_scores(scorer, rows)
    texts = [
        text + tokenizer.eos_token
        for pair in pairs.itertuples()
        for text in (pair.prompt + pair.chosen, pair.prompt + pair.rejected)
    ]
    assert theirs.config.num_labels == 1
    with torch.no_grad():
        alone = torch.cat([theirs(**tokenizer(text, return_tensors="pt")).logits for text in texts]).squeeze(1)
    torch.testing.assert_close(alone, ours, atol=1e-5, rtol=0)
    offset = theirs.config.reward_offset
    torch.testing.assert_close(alone.view(4, 2) - offset, score_rows(scorer, rows, 64), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="batch sizes > 1"):
        theirs(**tokenizer(texts, padding=True, return_tensors="pt"))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    theirs.resize_token_embeddings(len(tokenizer))
    theirs.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        batch = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits.squeeze(1)
    torch.testing.assert_close(batch, ours, atol=1e-5, rtol=0)
