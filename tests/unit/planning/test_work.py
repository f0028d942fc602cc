"""Rows, tokens, operations and hours by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from configs import config_of

from prefopt.data.raw.splits import GOLD_TEST_SHARE
from prefopt.experiment import targets
from prefopt.lm.flops import reading_flops, sampling_flops
from prefopt.planning import work
from prefopt.planning.architecture import from_folder, from_hub, shape
from prefopt.planning.memory import Rows
from prefopt.planning.stages import estimate, estimates
from prefopt.planning.work import Hardware, Phase
from prefopt.resources import SHIPPED_BASE
from prefopt.training.pretrain import _VALIDATION_SHARE

GPT2 = from_hub("gpt2")
HARDWARE = Hardware("a GPU", memory_gib=80, tflops=100, bandwidth_gbps=1000, utilisation=0.5)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return config_of()


@pytest.fixture(scope="module")
def paper() -> dict[str, Any]:
    return config_of("paper.yaml")


def test_shares_are_those_of_the_data() -> None:
    assert work.GOLD_TEST_SHARE == GOLD_TEST_SHARE and work.PRETRAINING_VALIDATION_SHARE == _VALIDATION_SHARE


def test_counts_of_embedded_data_are_exact(config: dict[str, Any]) -> None:
    tldr = work.counts(config, "tldr")
    assert (tldr.demonstrations["train"], tldr.pairs["train"], tldr.gold["train"]) == (3000, 5000, 2000)
    assert (tldr.pairs["validation"], tldr.gold["test"], tldr.documents) == (256, 500, 70000)
    imdb = work.counts(config, "imdb")
    # Four completions of each prefix make six pairs; reviews without a label are trained on, too.
    assert imdb.pairs == {"train": 6 * 6000, "validation": 6 * 100}
    assert imdb.demonstrations["train"] == imdb.documents == 20000 and imdb.labelled == 6000


def test_counts_of_published_data_are_shared_among_the_splits(paper: dict[str, Any]) -> None:
    tldr = work.counts(paper, "tldr")
    assert tldr.pairs["train"] == round(0.8 * 0.9 * 176600) and tldr.gold["train"] == round(0.2 * 0.7 * 176600)
    assert tldr.demonstrations["train"] == round(0.9 * 129700)
    assert work.counts(paper, "hh").pairs["train"] == round(0.8 * 0.9 * 169400)
    assert work.counts(paper, "imdb").pairs["train"] == 150_000, "the paper's 25,000 prefixes"
    assert work.counts(paper, "imdb").labelled == 40_000


def test_counts_of_files_are_guessed_from_their_size(tmp_path: Path) -> None:
    pairs, posts = tmp_path / "pairs.jsonl.gz", tmp_path / "posts.jsonl"
    pairs.write_bytes(b"x" * 440 * 1000)
    posts.write_bytes(b"x" * 580 * 3 * 200)
    section: dict[str, Any] = {"data": {"source": "files", "comparisons": [str(pairs)], "posts": [str(posts)]}}
    section["data"]["gold_fraction"] = 0.5
    found = work.counts(config_of(tasks__tldr={**section, "judge": {"kind": "reward_model"}, "human": None}), "tldr")
    assert found.pairs == {"train": 350, "validation": 50, "test": 100}
    assert found.gold == {"train": 350, "test": 150}
    assert found.demonstrations["train"] == 140


def test_counts_of_records_of_any_format_are_those_of_pairs(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv.zst").write_bytes(b"x" * 360 * 600)
    (tmp_path / "saved" / "train").mkdir(parents=True)
    (tmp_path / "saved" / "train" / "data.arrow").write_bytes(b"x" * 360 * 3 * 400)
    records = [str(tmp_path / "pairs.csv.zst"), str(tmp_path / "saved"), {"hub": "a/b"}]
    section = {
        "data": {"source": "records", "records": records, "gold_fraction": 0.5},
        "judge": {"kind": "reward_model"},
    }
    found = work.counts(config_of(tasks__hh=section), "hh")
    assert found.pairs == {"train": 350, "validation": 50, "test": 100}
    assert found.demonstrations == {"train": 700, "validation": 100, "test": 200}


def test_counts_of_prepared_tables_are_read(
    paper: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    account = tmp_path / "results" / "data" / "tldr" / "summary.json"
    account.parent.mkdir(parents=True)
    splits = {"demonstrations": {"train": 7, "validation": 1}, "preferences": {"train": 5, "validation": 2}}
    splits["gold_preferences"] = {"train": 3, "test": 1}
    account.write_text(json.dumps({"tables": {name: {"splits": table} for name, table in splits.items()}}))
    found = work.counts(paper, "tldr")
    assert (found.pairs["train"], found.gold["test"], found.demonstrations["train"]) == (5, 1, 7)
    assert found.labels == {"train": 10, "validation": 4}
    splits["labels"] = {"train": 13, "validation": 3}
    account.write_text(json.dumps({"tables": {name: {"splits": table} for name, table in splits.items()}}))
    assert work.counts(paper, "tldr").labels == {"train": 13, "validation": 3}


def test_lengths_keep_the_limits_of_the_config(config: dict[str, Any]) -> None:
    assert work.tokens(config, "tldr")["prompt"] == 103
    short = config_of(tasks__tldr__lengths={"max_prompt_length": 64, "max_length": 80})
    tokens = work.tokens(short, "tldr")
    assert (tokens["prompt"], tokens["chosen"], tokens["sampled"], tokens["document"]) == (64, 16, 16, 85)


def test_operations_are_those_of_the_engine() -> None:
    rows = Rows(100, (30, 20))
    assert work.reading(GPT2, rows, 7) == 7 * reading_flops(shape(GPT2), 100, [30, 20])
    phase = work.sampling(GPT2, prompt=10, sampled=5, new_tokens=8, n=4, prompts=3, width=4, gpu=False)
    assert phase.flops == 3 * sampling_flops(shape(GPT2), 10, [5] * 4)
    # One batch, eight steps, each of which reads all weights; five steps of the cache of 3 prompts and half the samples.
    assert phase.moved == 8 * 4 * 124_439_808 + 5 * (3 * 10 + 3 * 4 * 5 // 2) * 2 * 12 * 768 * 4


def test_a_gpu_takes_its_time_for_every_layer_of_every_step_but_samples_more_at_once() -> None:
    def sampled(gpu: bool) -> Phase:
        return work.sampling(GPT2, prompt=10, sampled=5, new_tokens=8, n=128, prompts=16, width=2, gpu=gpu)

    assert sampled(gpu=False).calls == 0 and sampled(gpu=True).calls == 8 * 12, "2,048 completions are one batch"
    assert work.hours([sampled(gpu=True)], HARDWARE, 1) == pytest.approx(8 * 12 * work.CALL_SECONDS / 3600)


def test_vllm_keeps_its_rows_full_and_launches_steps_whole() -> None:
    token = 2 * 12 * 768 * 2
    options = {"prompt": 10, "sampled": 5, "new_tokens": 8, "n": 128, "prompts": 16, "width": 2}
    cache = 16 * 128 * 5 * (10 + 5 // 2) * token
    for rows, steps in ((1000, 40), (100, 103), (0.5, 10240)):  # 10,240 tokens by 256 rows at most
        phase = work.serving(GPT2, room=int(rows * 18 * token), **options)
        assert (phase.flops, phase.calls) == (16 * sampling_flops(shape(GPT2), 10, [5] * 128), 0)
        assert phase.moved == steps * 2 * 124_439_808 + cache


def test_hours_are_those_of_whichever_takes_longer() -> None:
    hour = 3600 * 50 * 10**12  # operations at half of 100 TFLOP/s
    assert work.hours([Phase(hour)], HARDWARE, 1) == pytest.approx(1)
    assert work.hours([Phase(hour)], HARDWARE, 4) == pytest.approx(0.25)
    assert work.hours([Phase(hour, 3600 * 500 * 10**9 * 2)], HARDWARE, 1) == pytest.approx(2)
    assert work.hours([Phase(hour).times(2), Phase(hour)], HARDWARE, 1) == pytest.approx(3)


def test_operations_of_a_trainer_by_hand(config: dict[str, Any]) -> None:
    """5,000 pairs three passes each, and 256 once at step 0 and after every 20 of 79 steps."""
    one = estimate(config_of(tasks__tldr__frontier=None, tasks__tldr__by_step=None), "tldr", "dpo")
    row = reading_flops(shape(from_folder(SHIPPED_BASE)), 103, [18, 17])
    assert one.flops == 3 * 5000 * row + 256 * (1 + 4) * row
    assert (one.name, one.parameters, one.processes) == ("shipped base", 987_008, 1)


def test_operations_of_kto_by_hand() -> None:
    """Two examples a pair, each read once for the estimate of the KL and three passes' worth to learn; the reference
    policy reads both completions after one prompt."""
    kto = {"runs": {"kto": {"method": "kto"}}, "frontier": None, "by_step": None}
    config = config_of(tasks__tldr=kto)
    model = shape(from_folder(SHIPPED_BASE))
    row = reading_flops(model, 103, [18])  # of 18 and 17 the mean
    # 79 steps of 128 examples, looked at before the first, after every 20, and after the last.
    assert estimate(config, "tldr", "kto").flops == 4 * 10_000 * row + 2 * 512 * (1 + 4) * row
    assert estimate(config, "tldr", "reference_labels").flops == (10_000 + 512) * reading_flops(model, 103, [18, 18])
    stages = {one.stage for one in estimates(config, "tldr")}
    assert {"kto", "reference", "reference_labels", "sample kto"} <= stages
    few = config_of(tasks__tldr={**kto, "runs": {"kto": {"method": "kto"}, "dpo": None}})
    assert "reference" not in {one.stage for one in estimates(few, "tldr")}


def test_checkpointing_takes_a_third_more_and_adapters_a_third_less(config: dict[str, Any]) -> None:
    plain = estimate(config, "tldr", "dpo").phases[0].flops
    checkpointed = estimate(config_of(compute__activation_checkpointing=True), "tldr", "dpo")
    assert checkpointed.phases[0].flops == plain * 4 // 3
    adapted = {**config, "tasks": {**config["tasks"], "tldr": {**config["tasks"]["tldr"]}}}
    adapted["tasks"]["tldr"]["dpo"] = {**config["tasks"]["tldr"]["dpo"], "adapter": {"rank": 8}}
    one = estimate(adapted, "tldr", "dpo")
    assert one.phases[0].flops == plain * 2 // 3
    assert one.parts["optimizer"] < 0.1 * estimate(config, "tldr", "dpo").parts["optimizer"]


@pytest.mark.parametrize("overlays", [(), ("paper.yaml",)])
def test_every_stage_that_runs_a_model_is_estimated(overlays: tuple[str, ...]) -> None:
    config = config_of(*overlays)
    for task in config["tasks"]:
        stages = {one.stage: one for one in estimates(config, task)}
        trainers = {"pretrain" if trainer == "base" else trainer for trainer in targets.trainers(config, task)}
        assert trainers <= stages.keys()
        assert all(one.flops > 0 and one.peak > 4 * one.parameters / max(8, one.processes) for one in stages.values())
        if task == "imdb":
            assert sum(one.jobs for stage, one in stages.items() if stage.startswith("frontier_run")) == 22
            assert {"pair_samples", "ceiling_samples", "reference"} <= stages.keys()


def test_models_are_named_as_the_hub_does(paper: dict[str, Any]) -> None:
    names = {(task, one.stage): one.name for task in paper["tasks"] for one in estimates(paper, task)}
    sft = "CarperAI/openai_summarize_tldr_sft"
    assert names["tldr", "dpo"] == names["tldr", "ppo"] == names["cnndm", "sample dpo"] == sft
    assert names["tldr", "preferred_ft"] == names["tldr", "sample base"] == "EleutherAI/gpt-j-6b"
    assert names["hh", "dpo"] == "EleutherAI/pythia-2.8b" and names["imdb", "sft"] == "gpt2-large"
    assert names["imdb", "true_rewards"] == "siebert/sentiment-roberta-large-english"


def test_a_fetched_model_is_measured_by_its_own_config(
    paper: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results" / "models" / "hh" / "fetched_base"
    folder.mkdir(parents=True)
    values = {"model_type": "gpt2", "vocab_size": 50, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    (folder / "config.json").write_text(json.dumps(values))
    assert estimate(paper, "hh", "dpo").parameters == 50 * 16 + 64 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16


@pytest.mark.parametrize("source", ["shipped", "scratch"])
def test_a_base_by_another_name_is_the_base(source: str) -> None:
    config = config_of(tasks__tldr__runs={"zero_shot": {"method": "base"}}, tasks__tldr__base={"source": source})
    assert estimate(config, "tldr", "sample", "zero_shot") == estimate(config, "tldr", "sample", "base")
    pretrained = [one for one in estimates(config, "tldr") if one.stage == "pretrain"]
    assert pretrained == [estimate(config, "tldr", "pretrain")] * (source == "scratch")


def test_operations_of_rounds_by_hand() -> None:
    """Three rounds of 640 prompts with eight completions each, and 48 that the trainer evaluates on."""
    mine = {
        "runs": {
            "mine": {"method": "iterative_dpo"},
            "own": {"method": "iterative_dpo", "labels": "implicit", "start": "dpo"},
            "judged": {"method": "iterative_dpo", "labels": "judge"},
        },
        "judge": {"kind": "reward_model"},
    }
    stages = {one.stage: one for one in estimates(config_of(tasks__tldr=mine), "tldr")}
    model = shape(from_folder(SHIPPED_BASE))
    scorer = shape(from_folder(SHIPPED_BASE), 1)
    pair = reading_flops(model, 103, [22, 22])
    by_hand = {
        "round_samples mine": 688 * sampling_flops(model, 103, [22] * 8),
        "round_scores mine": 688 * reading_flops(scorer, 103, [22] * 8),
        "round_implicit_rewards own": 2 * 688 * reading_flops(model, 103, [22] * 8),
        "round_judge_labels judged": 688 * reading_flops(scorer, 103, [22] * 8),
        "round_reference mine": 688 * pair,
        # Ten steps, evaluated before the first and after every fifth.
        "mine": (3 * 640 + 3 * 48) * pair,
    }
    # 192 test prompts before the first round and after each, which the reference policy and the reward model read.
    read = 4 * 192
    of_all = {
        "sampled_rounds mine": read * sampling_flops(model, 103, [22]),
        "evaluations mine": read * (reading_flops(model, 103, [22]) + reading_flops(scorer, 103, [22])),
    }
    assert {name: stages[name].flops for name in {**by_hand, **of_all}} == {**by_hand, **of_all}
    assert all(stages[name].jobs == 3 for name in by_hand) and all(stages[name].jobs == 1 for name in of_all)
    assert "round_scores own" not in stages
    # An oracle's verdicts take no model.
    oracle = {one.stage for one in estimates(config_of(tasks__tldr={"runs": mine["runs"]}), "tldr")}
    assert "round_samples judged" in oracle and "round_judge_labels judged" not in oracle
