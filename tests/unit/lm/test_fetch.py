"""Bringing a model into a local folder, from safetensors and, on request, from .bin weights."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from prefopt.cli import build_parser
from prefopt.errors import UserError
from prefopt.lm import fetch
from prefopt.lm.models import load_policy
from prefopt.rewards.true_reward import load_classifier
from prefopt.training.pretrain import train_tokenizer


@pytest.fixture
def bin_only(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    tokenizer = train_tokenizer(["a b c"], 260)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def arguments(name: Path, out: Path, convert: bool) -> argparse.Namespace:
    return argparse.Namespace(name=str(name), kind="causal_lm", gguf=None, revision=None, convert_bin=convert, out=out)


def test_bin_weights_are_refused_and_the_command_is_named(bin_only: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fetch --convert-bin"):
        fetch.run(arguments(bin_only, tmp_path / "out", convert=False))
    assert not (tmp_path / "out").exists()


def test_converted_weights_are_the_same(bin_only: Path, tmp_path: Path) -> None:
    fetch.run(arguments(bin_only, tmp_path / "out", convert=True))
    assert list((tmp_path / "out").glob("*.bin")) == []
    model, _ = load_policy(tmp_path / "out")
    stored = torch.load(bin_only / "pytorch_model.bin", weights_only=True)
    assert torch.equal(model.transformer.wte.weight, stored["transformer.wte.weight"])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["converted_from_bin"] is True
    assert manifest["revision"] == "not pinned"


def test_a_classifier_keeps_its_labels(tmp_path: Path) -> None:
    folder = tmp_path / "classifier"
    tokenizer = train_tokenizer(["a b c"], 260)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=len(tokenizer), pad_token_id=0)
    config.id2label = {0: "NEGATIVE", 1: "POSITIVE"}
    torch.manual_seed(0)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    args = arguments(folder, tmp_path / "out", convert=False)
    args.kind = "classifier"
    fetch.run(args)
    model, _ = load_classifier(tmp_path / "out")
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"} and model.score.weight.shape == (2, 8)


def test_a_name_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere could not be loaded"):
        fetch.run(arguments(tmp_path / "nowhere", tmp_path / "out", convert=False))


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    given = build_parser("fetch").parse_args(["fetch", "--name", "owner/model", "--out", "model"])
    assert (given.name, given.gguf, given.kind, given.revision) == ("owner/model", None, "causal_lm", None)
    assert given.convert_bin is False and given.out == Path("model")
    given = build_parser("fetch").parse_args(["fetch", "--name", "m", "--kind", "classifier", "--out", "o"])
    assert given.kind == "classifier"
    for lacking in (["--name", "m"], ["--out", "o"], ["--name", "m", "--gguf", "m.gguf", "--out", "o"]):
        with pytest.raises(SystemExit):
            build_parser("fetch").parse_args(["fetch", *lacking])


def test_what_a_model_is_loaded_with(
    bin_only: Path, tmp_path: Path, asked: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """No code of a repository runs, the revision is one everywhere, and a narrow dtype is told of."""
    GPT2LMHeadModel.from_pretrained(bin_only, use_safetensors=False).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    train_tokenizer(["a b c"], 260).save_pretrained(tmp_path / "m")
    asked.clear()
    given = arguments(tmp_path / "m", tmp_path / "out", convert=False)
    given.revision = "abc"
    with caplog.at_level(logging.INFO, logger="prefopt.lm.fetch"):
        fetch.run(given)
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        options = asked[name]
        assert options["trust_remote_code"] is False and options["revision"] == "abc"
    assert asked["AutoModelForCausalLM"]["config"].n_embd == 8
    assert asked["AutoModelForCausalLM"]["use_safetensors"] is True
    assert caplog.messages == [f"{tmp_path / 'm'} is in bfloat16; it is written, and trained, as float32 weights"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["fetched"], manifest["revision"]) == (str(tmp_path / "m"), "abc")
    assert manifest["converted_from_bin"] is False
    caplog.clear()
    fetch.run(arguments(tmp_path / "out", tmp_path / "again", convert=False))
    assert not [line for line in caplog.messages if "float32 weights" in line]
