"""docs/own_data.md as it stands there, with a tiny chat model in place of the one that it names."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml
from running import REPOSITORY, overlay, planned, snakemake

from prefopt.lm.models import save_model
from prefopt.training.pretrain import PretrainRecipe, new_model, train_tokenizer
from test_chat_task import TEMPLATE
from tiny_task import SHAPE, TRAINING

PAGE = (REPOSITORY / "docs" / "own_data.md").read_text(encoding="utf-8")
CHAT = REPOSITORY / "config" / "chat.yaml"


def tiny_chat_model(folder: Path, texts: list[str]) -> None:
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    shape = {**SHAPE, "vocab_size": len(tokenizer), "max_positions": 256}
    save_model(folder, new_model(PretrainRecipe(**TRAINING, **shape), tokenizer), tokenizer, {})


def test_the_page_from_pairs_to_a_figure(tmp_path: Path) -> None:
    made = re.search(r"^    python (docs/support_pairs\.py) > pairs\.jsonl$", PAGE, re.MULTILINE)
    assert made is not None
    written = subprocess.run([sys.executable, REPOSITORY / made[1]], capture_output=True, text=True, check=True).stdout
    (tmp_path / "pairs.jsonl").write_text(written)
    rows = [json.loads(line) for line in written.splitlines()]
    assert len(rows) == 300
    tiny_chat_model(tmp_path / "smollm2", [turn["content"] for row in rows for turn in row["chosen"]])
    (block,) = re.findall(r"^```yaml\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
    own = overlay(tmp_path, yaml.safe_load(block), "my.yaml")
    (command,) = re.findall(r"^    snakemake (.*)$", PAGE, re.MULTILINE)
    targets = [word for word in shlex.split(command) if word.startswith("results/")]
    arguments = ("--cores", "2", "--show-failed-logs", *targets, "--configfile", CHAT, own)
    done = snakemake(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "prompts are put as turns of a chat" in (tmp_path / "logs" / "chat" / "prepare.log").read_text()
    rates = pd.read_csv(tmp_path / "results" / "chat_winrates.csv")
    assert list(dict.fromkeys(rates["run"])) == ["base", "sft", "dpo", "best_of_4"]
    assert (rates["n"] > 20).all() and rates["judge"].str.startswith("reward_model:").all()
    figure = (tmp_path / "results" / "chat_winrates.svg").read_text()
    assert figure.startswith("<?xml")
    assert "**Reference** | Yes," in (tmp_path / "results" / "chat_examples.md").read_text()
    assert len(list((tmp_path / "results" / "human" / "chat" / "pages").glob("*.html"))) >= 2
    assert planned(*targets, "--configfile", CHAT, own, folder=tmp_path) == {}
