"""Golden numbers: what every trainer, one policy's sampling and every analysis give at a tiny size.

    python tests/golden/golden.py

writes `expected/` anew. A change that should alter no number leaves it as it is; one that alters some says why.
Everything is float32 in one thread, from seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
for folder in ("workflow", *(f"tests/unit/{name}" for name in ("analysis", "lm", "training"))):
    sys.path.insert(0, str(ROOT / folder))

import every_trainer  # noqa: E402
from made_up import make_frames  # noqa: E402
from prefopt.analysis.best_of_n_curve import CurveRecipe, curve_table  # noqa: E402
from prefopt.analysis.compute import ComputeRecipe, Records, run_rows  # noqa: E402
from prefopt.analysis.dominance import DominanceRecipe, dominance_table  # noqa: E402
from prefopt.analysis.frontier import Measured, frontier_table  # noqa: E402
from prefopt.analysis.human_agreement import HumanAgreementRecipe, human_agreement_table  # noqa: E402
from prefopt.analysis.judge_agreement import AgreementRecipe, agreement_table  # noqa: E402
from prefopt.analysis.optimal_frontier import OptimalFrontierRecipe, ceiling_table  # noqa: E402
from prefopt.analysis.win_rate_by_step import ByStepTableRecipe, step_table  # noqa: E402
from prefopt.analysis.win_rates import WinRatesRecipe, comparison_table, win_rate_table  # noqa: E402
from prefopt.generation import sample  # noqa: E402
from prefopt.lm.flops import Shape  # noqa: E402
from prefopt.store.tables import read_manifest, read_table, write_table  # noqa: E402
from prefopt.training import ppo as ppo_stage  # noqa: E402
from prefopt.training import preference  # noqa: E402
from tiny_task import TRAINING, Task, make_task  # noqa: E402

EXPECTED = Path(__file__).parent / "expected"
LOSSES = 20
SHOWN_WEIGHTS = 3

_LONG = {"epochs": 10, "evaluate_every": 1000, "checkpoint_every": 1000}
_PPO = {"updates": 4, "evaluate_every": 1000, "checkpoint_every": 1000}
_DPO = every_trainer.VALUES["dpo"]["values"]
# Each trainer by the name of its stage in `every_trainer`, and what differs from there.
_STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", {**_LONG, "epochs": 2}),
    "sft": ("sft", {**_LONG, "keep": "last"}),
    "preferred_ft": ("preferred_ft", _LONG),
    "sft_adapter": ("adapter", _LONG),
    "dpo": ("dpo", _LONG),
    "dpo_conservative": ("dpo", {**_LONG, "values": {**_DPO, "label_smoothing": 0.1}}),
    "dpo_ipo": ("dpo", {**_LONG, "values": {**_DPO, "loss": "ipo"}}),
    "kto": ("kto", {**_LONG, "batch_size": 5}),
    "reward_model": ("reward", _LONG),
    "classifier": ("classifier", _LONG),
    "ppo": ("ppo", {**_PPO, "keep": "last"}),
    "ppo_adaptive": ("ppo", {**_PPO, "keep": "last", "kl_target": 3.0, "normalize_rewards": True}),
}
# Methods that are trained in the sweep alone, of which the evaluations are held.
_RUNS: dict[str, dict[str, Any]] = {
    "unlikelihood": {**TRAINING, **_LONG, "objective": "unlikelihood", "values": {"alpha": 0.5}},
    "ppo_gt": {**every_trainer.VALUES["ppo"], **_PPO, "keep": "last", "kl_target": 3.0, "missing_eos_reward": None}
    | {"validation_prompts": 0},
}
_EVALUATION = {
    **{"prompts": 4, "samples_per_prompt": 2, "max_new_tokens": 6, "seed": 0},
    **{"token_budget": 64, "dtype": "float32"},
}


def training(folder: Path) -> dict[str, dict[str, Any]]:
    """By trainer: its first losses, and of some final weights (of a run of the sweep: of its evaluations) a few."""
    task = make_task(folder)
    every_trainer.make_inputs(folder, folder / "first")
    found = {}
    for name, (stage, values) in _STAGES.items():
        out = folder / name
        every_trainer.run(stage, folder, out, **values)
        weights = load_file(out / stage / "model.safetensors")
        shown = {key: weights[key].flatten()[:SHOWN_WEIGHTS].tolist() for key in sorted(weights)[::4]}
        found[name] = {"losses": _losses(out / f"{stage}.jsonl"), "weights": shown}
    for name, values in _RUNS.items():
        found[name] = _run_of_sweep(task, name, values)
    return found


def _run_of_sweep(task: Task, method: str, trainer: dict[str, Any]) -> dict[str, Any]:
    prompts = read_table(task.prompts, "prompts")
    held_out = prompts.tail(4).assign(split="test", prompt_id=[f"t{i}" for i in range(4)])
    path = task.folder / "with_test.parquet"
    tokenizer_hash = read_manifest(task.prompts)["tokenizer_hash"]
    write_table(path, "prompts", pd.concat([prompts, held_out]), tokenizer_hash=tokenizer_hash)
    ppo = method == "ppo_gt"
    reward = {"kind": "rule", "max_length": 64, "batch_size": 8}
    length = {"true_reward": reward} if ppo else {"epochs": None, "steps": 20}
    by_step = {"points": 2, "method": method, "seed": 0, "conservativeness": 0.5}
    by_step |= {"evaluation": _EVALUATION, "reward": reward}
    out = task.folder / method
    inputs = {"model": task.model, "run": method, "sampled_prompts": path, "true_reward_model": None}
    pairs = {"data": task.preferences, "reference": task.folder / "logps.parquet", "reference_model": None}
    inputs |= {"prompts": path, "reward_model": None} if ppo else pairs
    paths = {name: out / name for name in ("work", "out")} | {"metrics": out / "run.jsonl"}
    paths |= {"samples": None, "evaluations": out / "runs.parquet"}
    texts = {"recipe": json.dumps({**trainer, **length}), "by_step": json.dumps(by_step)}
    (ppo_stage if ppo else preference).run(argparse.Namespace(**inputs, **paths, **texts))
    by_step = read_table(paths["evaluations"], "evaluations").groupby("step")[["reward", "kl", "tokens"]].mean()
    return {"losses": _losses(paths["metrics"]), "weights": {key: by_step[key].tolist() for key in by_step}}


def _losses(metrics: Path) -> list[float]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"][:LOSSES]


def samples(folder: Path) -> list[dict[str, Any]]:
    """Completions of a policy, greedy and at two temperatures, with their log-probabilities."""
    task = make_task(folder)
    recipe = {
        **{"temperatures": [0.0, 0.7, 1.0], "stop": [" shop"], "n": 2, "max_new_tokens": 8, "seed": 0},
        **{
            "train_prompts": 2,
            "validation_prompts": 3,
            "test_prompts": 0,
            "token_budget": 64,
            "dtype": "float32",
            "vllm": None,
        },
    }
    out = folder / "samples.parquet"
    sample.run(
        argparse.Namespace(
            **{
                "model": task.model,
                "reference_model": task.model,
                "prompts": task.prompts,
                "run": "base",
                "out": out,
            },
            **{"recipe": json.dumps(recipe), "shard": None, "earlier": None, "shots": 0},
        )
    )
    kept = ["prompt_id", "temperature", "sample_index", "token_ids", "finish_reason", "logp", "reference_logp"]
    return [dict(row) for row in json.loads(read_table(out, "samples")[kept].to_json(orient="records"))]


def tables() -> dict[str, pd.DataFrame]:
    """The table of each analysis, from drawn verdicts, rewards and votes."""
    rng = np.random.default_rng(0)

    def letters(count: int, win: float) -> str:
        return "".join(rng.choice(list("wlti"), size=count, p=[win, 0.85 - win, 0.1, 0.05]))

    rates = {"sft": 0.4, "dpo": 0.6, "best_of_4": 0.5}
    drawn = {
        name: {t: (letters(12, win), letters(60, win - t / 10)) for t in (0.0, 0.7)} for name, win in rates.items()
    }
    verdicts, sampled = make_frames(drawn)
    sampled["reference_logp"] -= rng.gamma(2.0, 3.0, len(sampled))
    verdicts["tokens"] = rng.integers(8, 40, len(verdicts))
    recipe = WinRatesRecipe(
        **{"task": "tldr", "confidence": 0.95, "seed": 0, "seeds": (0,), "judge": {"kind": "oracle"}},
        runs=tuple(rates),
        methods={"sft": "sft", "dpo": "dpo", "best_of_4": "best_of_n"},
        n={"best_of_4": 4},
        opponents=("sft", "dpo"),
    )
    win_rates = win_rate_table(verdicts, sampled, recipe)
    found = {"win_rates": win_rates, "comparisons": comparison_table(verdicts, win_rates, recipe)}

    other = verdicts.copy()
    turned = rng.random(len(other)) < 0.25
    other.loc[turned, "outcome"] = rng.choice(["win", "loss", "tie"], size=int(turned.sum()))
    both = pd.concat([verdicts.assign(judge_name="main"), other.assign(judge_name="other", judge="another")])
    agreement = AgreementRecipe(tables=(("tldr", "main", 0), ("tldr", "other", 0)), confidence={"tldr": 0.95}, seed=0)
    found["judge_agreement"] = agreement_table(both.assign(task="tldr", training_seed=0), agreement)

    key = {"prompt_id": np.repeat([f"p{i:02d}" for i in range(30)], 8), "temperature": 1.0}
    candidates = pd.DataFrame({**key, "sample_index": np.tile(np.arange(8), 30), "split": "test"})
    candidates["tokens"] = rng.integers(4, 20, len(candidates))
    candidates["reward"] = rng.standard_normal(len(candidates)).round(2)
    chance = 1 / (1 + np.exp(-candidates["reward"]))
    judged = candidates.assign(outcome=np.where(rng.random(len(candidates)) < chance, "win", "loss"), judge="oracle")
    curve = CurveRecipe(task="tldr", n=(1, 2, 4, 8), subsets=None, confidence=0.95, seed=0)
    lengths = {name: 5 + i % 3 for i, name in enumerate(candidates["prompt_id"].unique())}
    policy, reward_model = Shape(10, 2, 4, 6), Shape(10, 2, 4, 1)
    found["best_of_n_curve"] = curve_table(
        candidates,
        judged[["prompt_id", "temperature", "sample_index", "outcome", "judge", "split"]],
        *(lengths, policy, reward_model, curve.n, curve),
    )

    steps = verdicts[verdicts["run"] != "best_of_4"].replace({"sft": "dpo_step_0", "dpo": "dpo_step_20"})
    found["win_rate_by_step"] = step_table(
        steps, ByStepTableRecipe(task="hh", runs=("dpo",), seeds=(0,), confidence=0.9)
    )

    measured = _measured(rng)
    found["frontier"] = frontier_table(measured)
    found["dominance"] = dominance_table(
        measured,
        DominanceRecipe(methods=("dpo", "ppo"), seeds=(0,), confidence=0.95, bootstrap=200, seed=0, at_kl=(1.0, 3.0)),
    )
    ceiling = OptimalFrontierRecipe(largest_beta=4.0, smallest_beta=0.1, betas=8, min_effective_samples=20.0)
    found["ceiling"] = ceiling_table(rng.beta(2, 2, size=(16, 256)), ceiling)
    found["human_agreement"] = _human_agreement(rng)
    found["compute"] = _compute(win_rates)
    return found


def _measured(rng: np.random.Generator) -> Measured:
    """Two methods' checkpoints on 20 prompts."""
    rows, reward, kl = [], [], []
    for method, gain in (("dpo", 0.3), ("ppo", 0.25)):
        for run in ("a", "b"):
            for step in (0, 10, 20, 30):
                key = {"run": f"{method}_{run}", "method": method, "seed": 0, "conservativeness": 1.0, "step": step}
                rows.append({**key, "samples": 40, "tokens": 9.0})
                reward.append(0.5 + gain * (1 - np.exp(-step / 20)) + 0.1 * rng.standard_normal(20) * (step > 0))
                kl.append(step / 6 * rng.uniform(0.8, 1.2, 20))
    return Measured(pd.DataFrame(rows), [f"p{i:02d}" for i in range(20)], np.array(reward).T, np.array(kl).T)


def _human_agreement(rng: np.random.Generator) -> pd.DataFrame:
    """Two raters and a judge on 24 items."""
    items = [f"i{i:02d}" for i in range(24)]
    outcomes = ["win", "loss", "tie"]
    votes = pd.DataFrame(
        {"rater": rater, "item_id": item, "matchup": "a vs b", "prompt_id": f"p{item}", "simulated": False}
        | {"outcome": rng.choice(outcomes, p=[0.5, 0.4, 0.1])}
        for rater in ("r1", "r2")
        for item in items
    )
    judged = pd.DataFrame(
        {"item_id": item, "matchup": "a vs b", "prompt_id": f"p{item}", "judge": "j", "outcome": rng.choice(outcomes)}
        for item in items
    )
    recipe = HumanAgreementRecipe(tables=(("tldr", "main"),), confidence={"tldr": 0.95}, seed=0)
    return human_agreement_table("tldr", votes, {"main": judged}, {"a vs b": 0.25}, recipe)


def _compute(win_rates: pd.DataFrame) -> pd.DataFrame:
    """What each run cost, where each stage used a number of its own."""

    def used(flops: int, **values: int) -> dict[str, Any]:
        figures = {"flops": flops, "generated_tokens": 0, "models": 1, "seconds": 10.0, "device_seconds": 9.0}
        return {**figures, "peak_memory_mib": 100, **values}

    trained = {"sft": used(300), "dpo": used(600, models=1), "reward_model": used(500)}
    sampled = {"sft": 40, "dpo": 20, "candidates": 70, "candidate_scores": 50}
    records = Records(
        models={("tldr", name): figures for name, figures in trained.items()},
        reference={("tldr", "reference_logprobs"): used(100)},
        samples={("tldr", name): {"rows": 2, "used": used(n, generated_tokens=8)} for name, n in sampled.items()},
        win_rates=win_rates,
        curves=pd.DataFrame(
            {"task": "tldr", "n": [1, 4], "temperature": 0.7, "flops": [60, 120], "generated_tokens": [5, 20]}
        ),
    )
    runs: list[dict[str, Any]] = [
        {"run": "sft", "stages": ["sft"], "n": None},
        {"run": "dpo", "stages": ["sft", "reference_logprobs", "dpo"], "n": None},
        {"run": "best_of_4", "stages": ["sft", "reward_model"], "n": 4},
    ]
    recipe = ComputeRecipe(
        runs={"tldr": runs}, reference={"tldr": "sft"}, home={"tldr": "tldr"}, seeds=1, confidence={"tldr": 0.95}
    )
    return pd.DataFrame(row for run in runs for row in run_rows("tldr", run, records, recipe))


def main() -> None:
    """Writes all of them."""
    torch.set_num_threads(1)
    EXPECTED.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = {"training": training(Path(folder, "training")), "samples": samples(Path(folder, "samples"))}
    for name, values in found.items():
        (EXPECTED / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")
    for name, table in tables().items():
        table.to_csv(EXPECTED / f"{name}.csv", index=False)


if __name__ == "__main__":
    main()
