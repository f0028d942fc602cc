"""What each run cost, with numbers by hand."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from made_up import MEASURES, words
from prefopt.analysis import compute, compute_figure
from prefopt.analysis.statistics import mean_over_seeds
from prefopt.errors import UserError
from prefopt.store.tables import read_table, write_table

RECIPE = {
    "runs": {
        "tldr": [
            {"run": "base", "stages": [], "n": None},
            {"run": "sft", "stages": ["sft"], "n": None},
            {"run": "dpo", "stages": ["sft", "reference_logprobs", "dpo"], "n": None},
            {"run": "best_of_4", "stages": ["sft", "reward_model"], "n": 4},
        ]
    },
    "reference": {"tldr": "sft"},
    "home": {"tldr": "tldr"},
    "seeds": 1,
    "confidence": {"tldr": 0.99, "imdb": 0.9},
}


FIGURES = compute.COLUMNS[4:-3]  # without the reward


def used(flops: int, generated: int = 0, models: int = 1) -> dict[str, Any]:
    seconds = {"seconds": 10.0, "device_seconds": 9.0, "peak_memory_mib": 100 + flops}
    return {"flops": flops, "generated_tokens": generated, "models": models, **seconds}


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    models = []
    for name, flops in (("sft", 300), ("dpo", 600), ("reward_model", 500)):
        folder = tmp_path / "models" / "tldr" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"used": used(flops)}))
        models.append(folder)
    key = {"prompt_id": "p", "temperature": 1.0, "sample_index": 0}
    text = {"split": "test", "text": "", "tokens": 1, "token_ids": [1], "finish_reason": "eos"}
    rest = {**text, "logp": 0.0, "reference_logp": 0.0}
    samples = []
    for method, flops in (("base", 40), ("sft", 40), ("dpo", 20)):
        rows = [{**key, "prompt_id": f"p{i}", "run": method, **rest} for i in range(2)]
        path = tmp_path / "samples" / "tldr" / f"{method}.parquet"
        write_table(path, "samples", rows, used=used(flops, generated=8))
        samples.append(path)
    candidates = [tmp_path / "candidates" / f"tldr{end}.parquet" for end in ("", "_scores")]
    write_table(candidates[0], "samples", [{**key, "run": "sft", **rest}], used=used(70, generated=30))
    write_table(candidates[1], "scores", [{**key, "reward": 1.0}], used=used(50))
    reference = tmp_path / "logprobs" / "tldr" / "reference.parquet"
    pair = {"pair_id": "a", "chosen_logp": 0.0, "rejected_logp": 0.0, "chosen_tokens": 1, "rejected_tokens": 1}
    write_table(reference, "reference_logprobs", [pair], used=used(100))
    win_rates, curves = tmp_path / "tldr_winrates.csv", tmp_path / "curve.csv"
    rates = {"base": 0.1, "sft": 0.5, "dpo": 0.8, "best_of_4": 0.7}
    pd.DataFrame(
        {"task": "tldr", "run": name, "temperature": 1.0, "selected": True}
        | {"win_rate": rate, "ci_low": rate - 0.1, "ci_high": rate + 0.1}
        for name, rate in rates.items()
    ).to_csv(win_rates, index=False)
    curve = {
        "task": "tldr",
        "run": "sft",
        "n": [1, 4],
        "temperature": 1.0,
        "flops": [60, 120],
        "generated_tokens": [5, 20],
    }
    pd.DataFrame(curve).to_csv(curves, index=False)
    return argparse.Namespace(
        models=models,
        reference=[reference],
        samples=samples,
        candidates=candidates,
        win_rates=[win_rates],
        curves=[curves],
        runs=[],
        rounds=[],
        rewards=[],
        written=[],
        recipe=json.dumps(RECIPE),
        out=tmp_path / "compute.csv",
    )


def test_totals_are_sums_of_the_stages_and_answers_are_per_prompt(arguments: argparse.Namespace) -> None:
    compute.run(arguments)
    table = pd.read_csv(arguments.out)
    assert list(table.columns) == compute.COLUMNS
    total = table[table["stage"] == "total"].set_index("run")
    # DPO is SFT, the cached reference log-probabilities and DPO itself; no reward model.
    assert total["training_flops"].to_dict() == {"base": 0, "sft": 300, "dpo": 300 + 100 + 600, "best_of_4": 300 + 500}
    assert total["inference_flops_per_prompt"].to_dict() == {"base": 20, "sft": 20, "dpo": 10, "best_of_4": 120}
    assert total["models_resident"].to_dict() == {"base": 1, "sft": 1, "dpo": 1, "best_of_4": 2}
    assert total["bought"].to_dict() == {"base": 0.1, "sft": 0.5, "dpo": 0.8, "best_of_4": 0.7}
    assert total["wall_seconds"].to_dict() == {"base": 0, "sft": 10, "dpo": 30, "best_of_4": 20}
    stages = table[table["run"] == "dpo"]["stage"].tolist()
    assert stages == ["sft", "reference_logprobs", "dpo", "sampling", "total"]
    sampling = table[table["stage"] == "sampling"].set_index("run")
    assert sampling.loc["dpo", "generated_tokens"] == 4 and sampling.loc["best_of_4", "generated_tokens"] == 20


def test_each_table_of_the_reference_policy_is_the_cost_of_who_reads_it(
    arguments: argparse.Namespace, tmp_path: Path
) -> None:
    labels = arguments.reference[0].with_name("reference_labels.parquet")
    row = {"example_id": "a", "completion_logp": 0.0, "mismatched_logp": 0.0, "completion_tokens": 1}
    write_table(labels, "reference_label_logprobs", [{**row, "mismatched_tokens": 1}], used=used(150))
    arguments.reference.append(labels)
    kto = tmp_path / "models" / "tldr" / "kto"
    kto.mkdir()
    (kto / "manifest.json").write_text(json.dumps({"used": used(700)}))
    arguments.models.append(kto)
    arguments.samples.append(shutil.copy(arguments.samples[0], tmp_path / "samples" / "tldr" / "kto.parquet"))
    made = {"run": "kto", "stages": ["sft", "reference_label_logprobs", "kto"], "n": None}
    arguments.recipe = json.dumps({**RECIPE, "runs": {"tldr": [*RECIPE["runs"]["tldr"], made]}})
    compute.run(arguments)
    table = pd.read_csv(arguments.out)
    totals = table[table["stage"] == "total"].set_index("run")["training_flops"]
    assert (totals["dpo"], totals["kto"]) == (300 + 100 + 600, 300 + 150 + 700)


def test_a_model_of_the_users_own_has_no_cost_and_neither_has_the_total(arguments: argparse.Namespace) -> None:
    arguments.models = arguments.models[1:]
    compute.run(arguments)
    total = pd.read_csv(arguments.out).query("stage == 'total'").set_index("run")
    assert total["training_flops"].isna().to_dict() == {"base": False, "sft": True, "dpo": True, "best_of_4": True}


def test_the_best_of_n_at_temperature_0_is_the_greedy_answer(arguments: argparse.Namespace) -> None:
    (path,) = arguments.win_rates
    table = pd.read_csv(path)
    table.loc[table["run"] == "best_of_4", "temperature"] = 0.0
    table.to_csv(path, index=False)
    compute.run(arguments)
    total = pd.read_csv(arguments.out).query("stage == 'total'").set_index("run")
    assert total.loc["best_of_4", "inference_flops_per_prompt"] == 20


def test_a_run_of_the_sweep_bought_the_reward_of_its_last_checkpoint(
    arguments: argparse.Namespace, tmp_path: Path
) -> None:
    path = tmp_path / "frontier" / "imdb" / "dpo_1.parquet"
    named = {"run": "dpo_1", "method": "dpo", "seed": 0, "conservativeness": 1.0, "sample_index": 0, "tokens": 5}
    named |= MEASURES
    rows = [
        {**named, "step": step, "prompt_id": f"p{i}", "reward": 0.5 + 0.1 * step + 0.02 * i, "kl": 2.0 * step}
        for step in (0, 1)
        for i in range(3)
    ]
    write_table(path, "evaluations", rows, used=used(900, generated=7, models=2))
    arguments.runs = [path]
    compute.run(arguments)
    row = pd.read_csv(arguments.out).iloc[-1]
    assert (row["task"], row["run"], row["training_flops"], row["generated_tokens"]) == ("imdb", "dpo_1", 900, 7)
    assert row["bought"] == pytest.approx(0.62) and row["bought_what"] == "true reward at a KL of 2.0 nats"
    assert row["bought_high"] - row["bought"] == pytest.approx(norm.ppf(0.95) * 0.02 / 3**0.5, abs=1e-6)


def cost(flops: float | None, **values: float | None) -> dict[str, Any]:
    """What a stage recorded, every figure another number."""
    names = ("generated_tokens", "models", "seconds", "device_seconds", "peak_memory_mib")
    return {"flops": flops, **dict.fromkeys(names), **values}


def test_every_number_of_the_best_of_n_and_of_its_greedy_answer() -> None:
    """A task without models of its own, which samples those of its home."""
    recipe = compute.ComputeRecipe(
        runs={}, reference={"tldr": "sft"}, home={"cnndm": "tldr"}, seeds=1, confidence={"cnndm": 0.95}
    )
    models = {
        ("tldr", "sft"): cost(300, generated_tokens=1, models=1, seconds=2, device_seconds=3, peak_memory_mib=70),
        ("tldr", "reward_model"): cost(
            500, generated_tokens=5, models=4, seconds=6, device_seconds=7, peak_memory_mib=8
        ),
    }
    sampled = {
        "candidates": {
            "used": cost(70, generated_tokens=30, models=1, seconds=20, device_seconds=40, peak_memory_mib=90)
        },
        "candidate_scores": {"used": cost(50, models=1, seconds=3, device_seconds=5, peak_memory_mib=60)},
        "sft": {
            "used": cost(80, generated_tokens=12, models=1, seconds=9, device_seconds=8, peak_memory_mib=75),
            "rows": 4,
        },
    }
    rates = {"task": "cnndm", "run": "best_of_4", "temperature": [0.5, 1.0], "selected": [False, True]}
    rates |= {"win_rate": [0.1, 0.7], "ci_low": [0.0, 0.6], "ci_high": [0.2, 0.9]}
    curve = {"task": ["tldr", "cnndm", "cnndm", "cnndm"], "n": [4, 2, 4, 4], "temperature": [1.0, 1.0, 0.5, 1.0]}
    curves = pd.DataFrame({**curve, "flops": [1, 2, 3, 120], "generated_tokens": [4, 5, 6, 20]})

    def rows(win_rates: pd.DataFrame, curves: pd.DataFrame = curves) -> list[dict[str, Any]]:
        samples = {("cnndm", name): manifest for name, manifest in sampled.items()}
        records = compute.Records(models, {}, samples, win_rates, curves)
        run = {"run": "best_of_4", "stages": ["sft", "reward_model"], "n": 4}
        made = list(compute.run_rows("cnndm", run, records, recipe))
        assert [(row["task"], row["run"]) for row in made] == [("cnndm", "best_of_4")] * 4
        assert [row["stage"] for row in made] == ["sft", "reward_model", "sampling", "total"]
        return [{key: row.get(key) for key in FIGURES} for row in made]

    def figures(*values: Any) -> dict[str, Any]:
        return dict(zip(FIGURES, values, strict=True))

    none = (None, None, None, None)
    win_rates = pd.DataFrame(rates)
    training = [figures(300, None, 1, 1, 2, 3, 70, *none), figures(500, None, 5, 4, 6, 7, 8, *none)]
    bought = (0.7, 0.6, 0.9, "win rate at the selected temperature")
    assert rows(win_rates) == [
        *training,
        figures(None, 120, 20, 2, 23, 45, 90, *none),
        figures(800, 120, 6, 4, 8, 10, 90, *bought),
    ]
    # At temperature 0 it is one answer of four of the reference policy; without a curve its cost is not known.
    win_rates["temperature"] = [0.5, 0.0]
    assert rows(win_rates)[2] == figures(None, 20, 3, 1, 9, 8, 75, *none)
    assert rows(win_rates)[3]["peak_memory_mib"] == 75
    win_rates["temperature"] = [0.5, 1.0]
    unknown = rows(win_rates, curves.iloc[:3])[2]
    assert unknown["inference_flops_per_prompt"] is None and unknown["generated_tokens"] is None
    # Where no temperature was selected, nothing is said of what was bought.
    assert rows(win_rates.assign(selected=False))[3] == figures(800, None, 6, 4, 8, 10, 90, *none)
    # A stage that recorded nothing leaves the totals open, but for the largest of what is known.
    del models["tldr", "sft"]
    assert rows(win_rates)[3] == figures(None, 120, None, 4, None, None, 90, *bought)


def test_every_number_of_a_run(arguments: argparse.Namespace, tmp_path: Path) -> None:
    path = tmp_path / "frontier" / "imdb" / "ppo_3.parquet"
    named = {"run": "ppo_3", "method": "ppo", "seed": 0, "conservativeness": 3.0, "tokens": 5, **MEASURES}
    rows = [
        {**named, "step": step, "prompt_id": f"p{p}", "sample_index": k, "reward": 0.1 * p + 0.2 * k, "kl": 3.0 + k}
        for step, prompts in ((0, 9), (20, 4), (3, 7))
        for p in range(prompts)
        for k in range(2)
    ]
    write_table(
        path,
        "evaluations",
        rows,
        used=cost(9, generated_tokens=7, models=2, seconds=4, device_seconds=3, peak_memory_mib=6),
    )
    row = compute.evaluated_row("imdb", [read_table(path, "evaluations")], [], 0.95)
    # The last step's four prompts: means 0.1, 0.2, 0.3 and 0.4.
    half = norm.ppf(0.975) * (0.05 / 3) ** 0.5 / 2
    expected = {
        **{
            "task": "imdb",
            "run": "ppo_3",
            "stage": "frontier_run",
            "seeds": 1,
            "training_flops": 9,
            "generated_tokens": 7,
        },
        **{"models_resident": 2, "wall_seconds": 4, "device_seconds": 3, "peak_memory_mib": 6, "bought": 0.25},
        **{"bought_low": 0.25 - half, "bought_high": 0.25 + half, "bought_what": "true reward at a KL of 3.5 nats"},
    }
    assert row == pytest.approx(expected)


def test_a_model_that_does_not_say_what_it_used_is_named(arguments: argparse.Namespace) -> None:
    manifest = arguments.models[1] / "manifest.json"
    for text in ("[]", "{}", '{"used": 3}'):
        manifest.write_text(text)
        with pytest.raises(UserError, match=r"dpo/manifest.json does not say what was used: delete .*dpo and run"):
            compute.run(arguments)
    manifest.unlink()
    with pytest.raises(UserError, match=r"dpo holds no manifest.json: run the stage that makes it"):
        compute.run(arguments)


def test_without_curves_and_win_rates_the_costs_of_training_stand(arguments: argparse.Namespace) -> None:
    arguments.win_rates, arguments.curves = [], []
    compute.run(arguments)
    total = pd.read_csv(arguments.out).query("stage == 'total'").set_index("run")
    assert total["bought"].isna().all() and total["training_flops"].to_dict()["dpo"] == 1000
    assert total["inference_flops_per_prompt"].isna().to_dict() == {
        **{"base": False, "sft": False, "dpo": False, "best_of_4": True}
    }


MANIFEST: dict[str, Any] = {
    **words("tldr"),
    **{"task": "tldr", "judge": "oracle:v1", "test_prompts": 8, "synthetic": True, "recipe": {"confidence": 0.9}},
    **{"warnings": ["Only 8 test prompts."], "data_warnings": ["9 are lost"]},
}


def test_the_figure_has_a_row_per_task_and_nothing_to_draw_is_an_error(
    arguments: argparse.Namespace, tmp_path: Path
) -> None:
    compute.run(arguments)
    out = tmp_path / "compute.svg"
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    compute_figure.run(argparse.Namespace(table=arguments.out, manifests=[tmp_path / "manifest.json"], out=[out]))
    assert out.read_bytes().startswith(b"<?xml")
    with pytest.raises(UserError, match="No run has a win rate"):
        compute_figure.compute_figure(pd.read_csv(arguments.out).assign(bought=float("nan")), {"tldr": MANIFEST})


def test_the_figure_stands_alone(arguments: argparse.Namespace) -> None:
    compute.run(arguments)
    table = pd.read_csv(arguments.out)
    both = pd.concat([table, table.assign(task="hh")], ignore_index=True)
    weak = {"interpretable": False, "judge_accuracy": 0.52, "judge_accuracy_low": 0.45, "judge_accuracy_high": 0.59}
    other = {
        **MANIFEST,
        **words("hh"),
        "task": "hh",
        "synthetic": False,
        "judge": "reward_model:x",
        "warnings": [],
        "recipe": {"confidence": 0.8},
        **weak,
    }
    figure = compute_figure.compute_figure(both, {"tldr": MANIFEST, "hh": other})
    text = " ".join(figure.get_supxlabel().split())
    for said in (
        "TL;DR summarization: judge oracle:v1, 8 test prompts, 90% intervals.",
        "Anthropic HH dialogue: judge reward_model:x, 8 test prompts, 80% intervals.",
        "bars: intervals over prompts.",
        "TL;DR summarization is synthetic: posts, references, preferences and the judge are a program",
        "Anthropic HH dialogue: 9 are lost.",
    ):
        assert said in text
    assert figure.axes[0].yaxis.get_major_formatter()(0.5) == "50%"
    drawn = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"SFT", "DPO"} <= drawn
    alone = compute_figure.compute_figure(
        both[(both["task"] == "tldr") | (both["run"] == "sft")], {"tldr": MANIFEST, "hh": other}
    )
    assert {text.get_text() for text in alone.legends[0].get_texts()} == drawn, "of all tasks, not of the last"
    for axes in figure.axes:
        low, high = np.log10(axes.get_xlim())
        assert (low, high) == (pytest.approx(round(low)), pytest.approx(round(high))), "whole decades"
        for line in axes.lines:
            assert all(10**low <= x <= 10**high for x in line.get_xdata())
    three = {name: {**manifest, "seeds": [0, 1, 2]} for name, manifest in (("tldr", MANIFEST), ("hh", other))}
    assert "bars: intervals over prompts and 3 seeds of training, costs their means." in " ".join(
        compute_figure.compute_figure(both, three).get_supxlabel().split()
    )
    assert " ".join(figure.get_suptitle().split()) == (
        "TL;DR summarization: Only 8 test prompts. Anthropic HH dialogue: Uninterpretable: the judge's held-out accuracy, "
        "52% [45%, 59%], is not surely above chance; it needs more comparisons to learn from, or a better model."
    )
    assert figure.axes[0].get_title(loc="left") == "TL;DR summarization (synthetic records)"
    assert (
        "the reference summary" in figure.axes[0].get_ylabel() and "the chosen response" in figure.axes[2].get_ylabel()
    )


def test_figures_of_several_seeds_are_their_means(arguments: argparse.Namespace, tmp_path: Path) -> None:
    """A second training of DPO and its samples, which took more."""
    model = tmp_path / "seed_1" / "models" / "tldr" / "dpo"
    model.mkdir(parents=True)
    (model / "manifest.json").write_text(json.dumps({"used": used(1000)}))
    arguments.models.append(model)
    (first,) = [path for path in arguments.samples if path.stem == "dpo"]
    path = tmp_path / "seed_1" / "samples" / "tldr" / "dpo.parquet"
    write_table(path, "samples", read_table(first, "samples"), used=used(60, generated=16))
    arguments.samples.append(path)
    arguments.recipe = json.dumps({**RECIPE, "seeds": 2})
    compute.run(arguments)
    table = pd.read_csv(arguments.out).query("run == 'dpo'").set_index("stage")
    assert table["seeds"].tolist() == [2] * 5
    assert table.loc["dpo", "training_flops"] == 800 and table.loc["total", "training_flops"] == 300 + 100 + 800
    assert table.loc["sampling", ["inference_flops_per_prompt", "generated_tokens"]].tolist() == [20, 6]


def test_a_run_of_several_seeds_bought_their_mean_reward() -> None:
    named = {"run": "ppo_3", "step": 5, "kl": 3.0}
    tables = [
        pd.DataFrame({**named, "prompt_id": list("abcd"), "reward": rewards})
        for rewards in ([0, 0.2, 0.4, 0.6], [0.4] * 4)
    ]
    for table in tables:
        table.attrs["manifest"] = {"used": used(10)}
    row = compute.evaluated_row("imdb", tables, [], 0.95)
    over_prompts = pd.Series([0.2, 0.3, 0.4, 0.5])
    expected = mean_over_seeds([0.3, 0.4], over_prompts.std() / 2, 4, 0.95).interval
    assert (row["seeds"], row["bought"]) == (2, pytest.approx(0.35))
    assert (row["bought_low"], row["bought_high"]) == pytest.approx((expected.low, expected.high))
    # Of a run in rounds its rounds took what it took, whatever its evaluation did.
    row = compute.evaluated_row("imdb", tables, [used(100, generated=3), used(1000, generated=4)], 0.95)
    assert (row["training_flops"], row["generated_tokens"], row["bought"]) == (1100, 7, pytest.approx(0.35))


@pytest.fixture
def in_rounds(arguments: argparse.Namespace, tmp_path: Path) -> argparse.Namespace:
    """A run of two rounds, the tables and the model of each with what they took, and its rewards."""
    key = {"prompt_id": "p", "temperature": 1.0, "sample_index": 0}
    rest = {"text": "", "tokens": 1, "token_ids": [1], "finish_reason": "eos", "logp": 0.0, "reference_logp": 0.0}
    pair = {"pair_id": "a", "chosen_logp": 0.0, "rejected_logp": 0.0, "chosen_tokens": 1, "rejected_tokens": 1}
    for number in (1, 2):
        folder = tmp_path / "rounds" / "tldr" / "mine" / str(number)
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "manifest.json").write_text(json.dumps({"used": used(1000 * number)}))
        sampled = {**key, **rest, "run": "mine", "split": "train"}
        write_table(folder / "samples.parquet", "samples", [sampled], used=used(10 * number, generated=7 * number))
        write_table(folder / "scores.parquet", "scores", [{**key, "reward": 1.0}], used=used(number))
        write_table(folder / "reference.parquet", "reference_logprobs", [pair], used=used(100 * number))
        kept = ("samples.parquet", "scores.parquet", "reference.parquet", "model")
        arguments.rounds += [folder / name for name in kept]
    recipe = json.loads(json.dumps(RECIPE))
    stages = ["sft", "reward_model", "mine_round_1", "mine_round_2"]
    recipe["runs"]["tldr"].append({"run": "mine", "stages": stages, "n": None})
    arguments.recipe = json.dumps(recipe)
    # Three test prompts at two temperatures, of which 1 is selected, and one of validation.
    samples, scores = (tmp_path / kind / "tldr" / "mine.parquet" for kind in ("samples", "rewards"))
    names = [("p0", 1.0), ("p1", 1.0), ("p2", 1.0), ("p0", 0.5), ("p1", 0.5), ("p2", 0.5), ("v", 1.0)]
    keys = [{**key, "prompt_id": name, "temperature": temperature} for name, temperature in names]
    splits = ["validation" if name == "v" else "test" for name, _ in names]
    rows = [{**one, **rest, "run": "mine", "split": split} for one, split in zip(keys, splits, strict=True)]
    made = write_table(samples, "samples", rows, used=used(70, generated=21))
    rewards = [
        {**one, "reward": reward} for one, reward in zip(keys, [1.0, 2.0, 6.0, 9.0, 9.0, 9.0, 50.0], strict=True)
    ]
    write_table(scores, "scores", rewards, samples=made["content_hash"])
    arguments.samples.append(samples)
    arguments.rewards.append(scores)
    arguments.written.append(samples)
    (rates,) = arguments.win_rates
    table = pd.read_csv(rates)
    row = {
        "task": "tldr",
        "run": "mine",
        "temperature": 1.0,
        "selected": True,
        "win_rate": 0.9,
        "ci_low": 0.8,
        "ci_high": 1,
    }
    pd.concat([table, pd.DataFrame([row])]).to_csv(rates, index=False)
    return arguments


def test_a_round_is_all_that_its_stages_took(in_rounds: argparse.Namespace) -> None:
    compute.run(in_rounds)
    costs = pd.read_csv(in_rounds.out).query("run == 'mine'").set_index("stage")
    assert costs.index.tolist() == ["sft", "reward_model", "mine_round_1", "mine_round_2", "sampling", "total"]
    flops = costs["training_flops"]
    assert flops["mine_round_1"] == 1000 + 10 + 1 + 100 and flops["mine_round_2"] == 2 * 1111
    assert flops["total"] == 300 + 500 + 3 * 1111
    # Rollouts of both rounds; four stages of ten seconds each; the largest memory of them.
    assert costs.loc[["mine_round_1", "mine_round_2", "total"], "generated_tokens"].tolist() == [7, 14, 21]
    assert costs.loc["mine_round_1", "wall_seconds"] == 40 and costs.loc["mine_round_2", "peak_memory_mib"] == 2100


def test_rewards_are_told_of_test_prompts_at_the_selected_temperature(in_rounds: argparse.Namespace) -> None:
    compute.run(in_rounds)
    total = pd.read_csv(in_rounds.out).query("stage == 'total'").set_index("run")
    assert total["reward"].notna().to_dict() == {
        "base": False,
        "sft": False,
        "dpo": False,
        "best_of_4": False,
        "mine": True,
    }
    # 1, 2 and 6: a mean of 3 and a variance of 7.
    half = norm.ppf(0.995) * (7 / 3) ** 0.5
    found = total.loc["mine", ["reward", "reward_low", "reward_high"]].tolist()
    assert found == pytest.approx([3, 3 - half, 3 + half], rel=1e-5)


def test_the_figure_has_rewards_where_there_are_any(in_rounds: argparse.Namespace) -> None:
    compute.run(in_rounds)
    table = pd.read_csv(in_rounds.out)
    both = pd.concat([table, table.assign(task="hh", reward=float("nan"))], ignore_index=True)
    figure = compute_figure.compute_figure(both, {"tldr": MANIFEST, "hh": {**MANIFEST, **words("hh"), "task": "hh"}})
    assert [axes.get_ylabel() for axes in figure.axes] == [
        *("Win rate against\nthe reference summary", "", "Reward of the frontier"),
        *("Win rate against\nthe chosen response", "", ""),
    ]
    assert [axes.axison for axes in figure.axes] == [True] * 5 + [False]
    (point,) = [line for line in figure.axes[2].lines if len(line.get_xdata()) == 1 and line.get_marker() != "None"]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (300 + 500 + 3 * 1111, pytest.approx(3))
    without = compute_figure.compute_figure(table.assign(reward=float("nan")), {"tldr": MANIFEST})
    assert len(without.axes) == 2
    note = [" ".join(one.get_supxlabel().split()) for one in (figure, without)]
    assert ["Rewards are told of the same samples" in text for text in note] == [True, False]
