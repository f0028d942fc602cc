"""What `python -m prefopt plan` prints, and what rules ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from configs import config_of

from prefopt import cli
from prefopt.experiment.explained import merged
from prefopt.experiment.like import DEFAULTS
from prefopt.planning.estimate import gpus, hardware
from prefopt.planning.needs import UNKNOWN, needs, over_nodes
from prefopt.planning.report import report
from prefopt.planning.stages import estimate, estimates

PAPER = DEFAULTS.with_name("paper.yaml")


def test_the_papers_plan_is_a_table_of_every_task(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    written = tmp_path / "plan.json"
    assert cli.main(["plan", "--configfile", str(PAPER), "--json", str(written)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("On NVIDIA H100 80GB: 80 GiB, 989 TFLOP/s")
    headings = [line for line in lines if line.endswith("GPU-hours in all")]
    assert [line.partition(":")[0] for line in headings] == ["imdb", "tldr", "hh", "cnndm"]
    (dpo,) = [line.split() for line in lines if line.split()[:3] == ["dpo", "1", "CarperAI/openai_summarize_tldr_sft"]]
    assert dpo[3:5] == ["6,050,882,784", "8"]
    rows = json.loads(written.read_text())
    (row,) = [row for row in rows if (row["task"], row["stage"]) == ("tldr", "dpo")]
    assert row["peak_bytes"] == sum(row["parts"].values())
    assert [float(value.replace(",", "")) for value in dpo[5:]] == pytest.approx(
        [row["peak_bytes"] / 2**30, row["host_megabytes"] / 1e3, row["flops"] / 1e15, row["hours"]], rel=0.01
    )
    # All of the paper fits one node of eight such GPUs.
    assert all(row["fits"] for row in rows) and not any(line.startswith("warning:") for line in lines)


def test_the_documents_hold_the_papers_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--configfile", str(PAPER)]) == 0
    page = (Path(__file__).parents[3] / "docs" / "paper_scale.md").read_text(encoding="utf-8")
    shown = page.partition("```\n")[2].partition("\n```")[0]
    assert shown == capsys.readouterr().out.strip(), "docs/paper_scale.md should hold what the command prints"


def test_tables_are_aligned() -> None:
    config = config_of("paper.yaml")
    text = report(config, {"hh": estimates(config, "hh")})
    table = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(table) == 11 and len({len(line) for line in table}) == 1


def warnings_of(config: dict[str, Any]) -> dict[str, str]:
    """Warnings by task and stage."""
    text = report(config, {task: estimates(config, task) for task in config["tasks"]})
    lines = [line for line in text.splitlines() if line.startswith("warning: ")]
    return {line.removeprefix("warning: ").partition(" takes ")[0]: line for line in lines}


def test_what_does_not_fit_is_said_with_what_helps() -> None:
    plain = warnings_of(config_of("paper.yaml", compute={"activation_checkpointing": False}))
    assert plain["tldr ppo"].startswith("warning: tldr ppo takes 240 GiB of 80 on NVIDIA H100 80GB, of which ")
    assert plain["tldr ppo"].endswith(
        "GiB for activations; what helps: compute.activation_checkpointing, a smaller compute.token_budget, more GPUs "
        "(compute.gpus)."
    )
    one = warnings_of(config_of("paper.yaml", compute={"gpus": 1}))
    assert {name.partition(" ")[0] for name in one} == {"tldr"}, "the other tasks fit one such GPU"
    assert one["tldr dpo"].endswith(
        "GiB for weights and what belongs to them; what helps: more GPUs (compute.gpus), an adapter, a smaller model."
    )
    # One prompt's completions are held at once, however long.
    long = config_of("paper.yaml", compute={"hardware": {"memory_gib": 24}}, tasks__tldr__sampling__max_new_tokens=900)
    small = warnings_of(long)["tldr candidates"]
    assert small.endswith("what helps: fewer new tokens, fewer completions of each prompt, a smaller model.")


def test_a_laptop_runs_the_default_without_a_warning() -> None:
    config = config_of()
    made = {task: estimates(config, task) for task in config["tasks"]}
    text = report(config, made)
    assert "warning" not in text and "processes" in text and "GPU" not in text


def test_overlays_are_merged_in_their_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("tasks: {tldr: {dpo: {beta: 0.3, epochs: 2}, runs: {ppo: null}}}")
    second.write_text("tasks: {tldr: {dpo: {beta: 0.4}}}")
    tldr = merged([DEFAULTS, first, second])["tasks"]["tldr"]
    assert (tldr["dpo"]["beta"], tldr["dpo"]["epochs"], tldr["runs"]["ppo"]) == (0.4, 2, None)
    assert tldr["dpo"]["batch_size"] == 64


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "prefopt plan: {path} cannot be read"),
        ("sead: 1", "prefopt plan: sead (1) is not a key; did you mean 'seeds'?"),
        (
            "tasks: {hh: {base: {source: hub, name: someone/model}}}",
            "prefopt plan: someone/model is not in the table of models",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, sentence: str
) -> None:
    path = tmp_path / "overlay.yaml"
    if text is not None:
        path.write_text(text)
    assert cli.main(["plan", "--configfile", str(path)]) == 2
    assert capsys.readouterr().err.startswith(sentence.format(path=path))


def test_every_seed_is_counted_but_for_what_is_made_once() -> None:
    one, three = ({e.stage: e.jobs for e in estimates(config_of(seeds=seeds), "imdb")} for seeds in ([0], [0, 1, 2]))
    assert three == {stage: jobs * (1 if stage in ("pretrain", "classifier") else 3) for stage, jobs in one.items()}
    assert three["frontier_run dpo"] == 12 and three["pretrain"] == 1


def test_trainers_take_all_gpus_and_others_one() -> None:
    config = config_of("paper.yaml")
    every = ("sft", "dpo", "ppo", "reference", "reward_model", "gold_reward_model", "classifier")
    assert {gpus(config, stage) for stage in (*every, "pretrain")} == {8}
    one = ("sample", "candidates", "score", "judge", "best_of_n", "frontier_run", "true_rewards", "pair_samples")
    assert {gpus(config, stage) for stage in one} == {1}
    assert gpus(config_of(), "sample") == gpus(config_of(), "dpo") == 0


def test_a_rule_asks_for_what_is_estimated_with_a_margin() -> None:
    config = config_of()
    one = estimate(config, "tldr", "sample", "dpo")
    asked = needs(config, "tldr", "sample", "dpo")
    assert asked["gpu"] == 0 and asked["runtime"] == 30, "never less than half an hour"
    assert asked["mem_mb"] == pytest.approx(1.25 * (one.held / 1e6 + 1000), abs=1)


def test_a_gpus_job_needs_the_weights_once_on_the_host_and_room_for_each_process() -> None:
    config = config_of("paper.yaml")
    large, small = needs(config, "tldr", "dpo"), needs(config, "imdb", "sft")
    assert large["mem_mb"] == pytest.approx(1.25 * (4 * 6_050_882_784 / 1e6 + 8 * 3000), abs=1)
    assert large["mem_mb"] - small["mem_mb"] == pytest.approx(1.25 * 4 * (6_050_882_784 - 774_030_080) / 1e6, abs=1)
    minutes = 60 * estimate(config, "tldr", "ppo").hours(hardware(config))
    assert needs(config, "tldr", "ppo")["runtime"] == pytest.approx(3 * minutes, abs=1)


def test_nodes_multiply_the_gpus_of_what_is_shared_and_not_a_hosts_memory() -> None:
    base = {"source": "hub", "name": "meta-llama/Llama-2-70b-hf"}
    compute = {"gpus": 8, "token_budget": 8192, "activation_checkpointing": True, "dtype": "bfloat16"}
    one, four = (config_of("paper.yaml", tasks__hh__base=base, compute=compute | {"nodes": n}) for n in (1, 4))
    assert (gpus(four, "dpo"), gpus(four, "sample")) == (32, 1)
    single, shared = (estimate(config, "hh", "dpo") for config in (one, four))
    assert single.parameters == 68_976_648_192  # of the published checkpoint
    assert shared.hours(hardware(four)) == pytest.approx(single.hours(hardware(one)) / 4, rel=0.01)
    assert shared.peak < single.peak / 3.5
    asked = [needs(config, "hh", "dpo") for config in (one, four)]
    assert [(each["gpu"], each["nodes"]) for each in asked] == [(8, 1), (32, 4)]
    assert asked[0]["mem_mb"] == asked[1]["mem_mb"]
    assert needs(four, "hh", "sample", "dpo")["nodes"] == 1
    assert not estimate(four, "hh", "sample", "dpo").fits(hardware(four), gpu=True)
    by_vllm = {"engine": "vllm", "vllm": {"program": None, "gpus": 4}}
    spread = config_of("paper.yaml", tasks__hh={"base": base, "sampling": by_vllm}, compute=compute | {"nodes": 4})
    for stage in ("sample", "candidates"):
        served = estimate(spread, "hh", stage, "dpo")
        assert served.processes == needs(spread, "hh", stage, "dpo")["gpu"] == 4 and served.fits(
            hardware(spread), gpu=True
        )
    assert estimate(spread, "hh", "score").processes == 1
    lines = report(spread, {"hh": [estimate(four, "hh", "sample", "dpo"), estimate(spread, "hh", "sample", "dpo")]})
    assert lines.count("sampling by vLLM over more GPUs") == 1 and "vLLM takes nine tenths of each GPU" in lines
    assert over_nodes(four, "dpo") == {"mpi": "srun", "tasks": 4, "tasks_per_gpu": 0}
    assert over_nodes(four, "sample") == over_nodes(one, "dpo") == {}


@pytest.mark.parametrize("given", [{"mem_mb": 5000}, {"runtime": 77}, {"mem_mb": 5000, "runtime": 77}])
def test_a_number_in_the_config_overrides(given: dict[str, int]) -> None:
    asked, plain = needs(config_of(compute=given), "tldr", "dpo"), needs(config_of(), "tldr", "dpo")
    assert asked == {**plain, **given}


def test_a_model_whose_size_is_not_known_stops_no_run() -> None:
    hub: dict[str, Any] = {"source": "hub", "name": "someone/model"}
    assert needs(config_of(tasks__hh__base=hub), "hh", "dpo") == {"gpu": 0, "nodes": 1, **UNKNOWN}
