"""The stage `compute`: what each run cost, in training and for one answer, beside what it bought."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from prefopt.analysis.statistics import mean_over_seeds
from prefopt.analysis.texts import write_csv
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.experiment.runs import round_name
from prefopt.store.files import read_json
from prefopt.store.gather import total_usage
from prefopt.store.tables import read_csv, read_manifest, read_table

COLUMNS = [
    *("task", "run", "stage", "seeds", "training_flops", "inference_flops_per_prompt", "generated_tokens"),
    *("models_resident", "wall_seconds", "device_seconds", "peak_memory_mib", "bought", "bought_low", "bought_high"),
    *("bought_what", "reward", "reward_low", "reward_high"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeRecipe:
    """The runs of each task with win rates, and the reference policy that they start from."""

    # Of each run its name `run`, the names `stages` of what is trained for it, and `n` where it is the best of N.
    runs: dict[str, list[dict[str, Any]]]
    reference: dict[str, str]
    home: dict[str, str]  # the task whose models it samples
    seeds: int  # over how many the figures are means
    confidence: dict[str, float]  # of each task's intervals, a sweep's among them


@dataclasses.dataclass(frozen=True)
class Records:
    """What the stages recorded of themselves under `used`, by task and name; figures are means over seeds."""

    models: Mapping[tuple[str, str], Mapping[str, Any]]  # those of rounds with all that a round took
    reference: Mapping[tuple[str, str], Mapping[str, Any]]  # by task and name of the table
    samples: Mapping[tuple[str, str], Mapping[str, Any]]  # whole manifests
    win_rates: pd.DataFrame
    curves: pd.DataFrame
    # The frontier's reward of what a run writes, with the samples' splits: a table for each seed.
    rewards: Mapping[tuple[str, str], Sequence[pd.DataFrame]] = dataclasses.field(default_factory=dict)


def run_rows(task: str, run: Mapping[str, Any], records: Records, recipe: ComputeRecipe) -> Iterator[dict[str, Any]]:
    """A row per stage, one of sampling an answer, and their total with what it bought.

    A model that is the user's own has no record, and then neither has the total.
    """
    home, name = recipe.home[task], run["run"]
    rows = []
    for stage in run["stages"]:
        used = {**records.models, **records.reference}.get((home, stage))
        rows.append({"stage": stage, **_figures(used)})
    sampling = _sampling(task, run, recipe.reference[home], records)
    selected = records.win_rates.query("task == @task and run == @name and selected")
    bought = (
        {
            "bought": selected["win_rate"].item(),
            "bought_low": selected["ci_low"].item(),
            "bought_high": selected["ci_high"].item(),
            "bought_what": "win rate at the selected temperature",
        }
        if len(selected)
        else {}
    )
    total = {
        "stage": "total",
        "training_flops": _sum(rows, "training_flops"),
        "inference_flops_per_prompt": sampling.get("inference_flops_per_prompt"),
        "generated_tokens": _sum(rows, "generated_tokens"),
        "models_resident": max([row["models_resident"] or 0 for row in [*rows, sampling]]),
        "wall_seconds": _sum(rows, "wall_seconds"),
        "device_seconds": _sum(rows, "device_seconds"),
        "peak_memory_mib": max([row["peak_memory_mib"] or 0 for row in [*rows, sampling]]),
        **bought,
        **_reward(records.rewards.get((task, name), []), selected, recipe.confidence[task]),
    }
    for row in (*rows, sampling, total):
        yield {"task": task, "run": name, "seeds": recipe.seeds, **row}


def _reward(tables: Sequence[pd.DataFrame], selected: pd.DataFrame, confidence: float) -> dict[str, float]:
    """A run's mean reward on test prompts at the selected temperature, with its interval; nothing where it is not told."""
    if not tables or selected.empty:
        return {}
    rows = [
        table[(table["split"] == "test") & (table["temperature"] == selected["temperature"].item())] for table in tables
    ]
    mean, low, high = _over_prompts(rows, confidence)
    return {"reward": mean, "reward_low": low, "reward_high": high}


def _over_prompts(tables: Sequence[pd.DataFrame], confidence: float) -> tuple[float, float, float]:
    """Mean reward over prompts and seeds, and its interval.

    Args:
        tables: with prompt_id and reward, one for each seed.
        confidence: e.g. 0.95.
    """
    rewards = pd.DataFrame([rows.groupby("prompt_id")["reward"].mean() for rows in tables])
    over_prompts = rewards.mean()
    error = over_prompts.std() / len(over_prompts) ** 0.5
    half = norm.ppf(0.5 + confidence / 2) * error
    low, high = over_prompts.mean() - half, over_prompts.mean() + half
    if len(tables) > 1:
        interval = mean_over_seeds(rewards.mean(axis=1).tolist(), error, len(over_prompts), confidence).interval
        low, high = interval.low, interval.high
    return over_prompts.mean(), low, high


def _figures(used: Mapping[str, Any] | None) -> dict[str, Any]:
    used = used or {}
    return {
        "training_flops": used.get("flops"),
        "generated_tokens": used.get("generated_tokens"),
        "models_resident": used.get("models"),
        "wall_seconds": used.get("seconds"),
        "device_seconds": used.get("device_seconds"),
        "peak_memory_mib": used.get("peak_memory_mib"),
    }


def _sampling(task: str, run: Mapping[str, Any], reference: str, records: Records) -> dict[str, Any]:
    """The row of the stage `sampling`: of one answer, at the mean over temperatures; of Best-of-N at the selected one.

    At temperature 0 all candidates are one, and Best-of-N is the reference policy's greedy answer.
    """
    name, n = run["run"], run["n"]
    selected = records.win_rates.query("task == @task and run == @name and selected")
    temperature = selected["temperature"].item() if len(selected) else None
    if n and temperature != 0:
        own = records.curves[(records.curves["task"] == task) & (records.curves["n"] == n)]
        row = own[own["temperature"] == temperature].head(1)
        scores = records.samples.get((task, "candidate_scores"), {}).get("used")
        candidates = records.samples.get((task, "candidates"), {}).get("used")
        both = [_figures(candidates), _figures(scores)]
        return {
            "stage": "sampling",
            "inference_flops_per_prompt": row["flops"].item() if len(row) else None,
            "generated_tokens": row["generated_tokens"].item() if len(row) else None,
            "models_resident": 2,
            "wall_seconds": _sum(both, "wall_seconds"),
            "device_seconds": _sum(both, "device_seconds"),
            "peak_memory_mib": max(part["peak_memory_mib"] or 0 for part in both),
        }
    manifest = records.samples[task, reference if n else name]
    used = _figures(manifest.get("used"))
    answers = manifest["rows"]
    return {
        **used,
        "stage": "sampling",
        "training_flops": None,
        "inference_flops_per_prompt": used["training_flops"] / answers,
        "generated_tokens": used["generated_tokens"] / answers,
    }


def evaluated_row(
    task: str, tables: Sequence[pd.DataFrame], rounds: Sequence[Mapping[str, Any]], confidence: float
) -> dict[str, Any]:
    """The row of a run of the sentiment sweep, which bought the reward of its last checkpoint.

    Args:
        task: whose run it is.
        tables: its evaluations tables, one for each seed.
        rounds: what its rounds took, means over seeds; none where it is trained at once, and its tables say what it took.
        confidence: of the reward's interval, e.g. 0.95.
    """
    last = [table[table["step"] == table["step"].max()] for table in tables]
    mean, low, high = _over_prompts(last, confidence)
    return {
        "task": task,
        "run": tables[0]["run"].iloc[0],
        "stage": "frontier_run",
        "seeds": len(tables),
        **_figures(total_usage(rounds) if rounds else _mean([table.attrs["manifest"]["used"] for table in tables])),
        "bought": mean,
        "bought_low": low,
        "bought_high": high,
        "bought_what": f"true reward at a KL of {np.mean([rows['kl'].mean() for rows in last]):.1f} nats",
    }


def _sum(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows]
    return None if any(value is None for value in values) else sum(values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `compute`."""
    files = {"type": Path, "nargs": "*", "default": []}
    parser.add_argument("--models", help="model folders, results/models/TASK/NAME", **files)  # type: ignore[arg-type]
    parser.add_argument("--reference", help="tables results/logprobs/TASK/NAME.parquet", **files)  # type: ignore[arg-type]
    parser.add_argument("--samples", help="tables results/samples/TASK/RUN.parquet", **files)  # type: ignore[arg-type]
    parser.add_argument("--candidates", help="results/candidates/TASK.parquet and TASK_scores.parquet", **files)  # type: ignore[arg-type]
    parser.add_argument("--rounds", help="tables and models results/rounds/TASK/RUN/ROUND/NAME", **files)  # type: ignore[arg-type]
    parser.add_argument("--rewards", help="tables results/rewards/TASK/RUN.parquet", **files)  # type: ignore[arg-type]
    parser.add_argument("--written", help="the samples of each of these, also of choices among N", **files)  # type: ignore[arg-type]
    parser.add_argument("--win-rates", help="CSVs of win rates", **files)  # type: ignore[arg-type]
    parser.add_argument("--curves", help="CSVs of the best of N", **files)  # type: ignore[arg-type]
    parser.add_argument("--runs", help="tables results/frontier/TASK/RUN.parquet", **files)  # type: ignore[arg-type]
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="CSV that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the table of costs."""
    recipe = from_json(ComputeRecipe, args.recipe)
    samples = {name: _mean_manifest(paths) for name, paths in _by_name(args.samples).items()}
    for (_, name), paths in _by_name(args.candidates).items():
        kind = "candidate_scores" if name.endswith("_scores") else "candidates"
        samples[name.removesuffix("_scores"), kind] = _mean_manifest(paths)
    curves = _joined(args.curves, ["task", "n", "temperature", "flops", "generated_tokens"])
    rounds = _rounds(args.rounds)
    models = {name: _mean([_used(path) for path in paths]) for name, paths in _by_name(args.models).items()}
    written = _by_name(args.written)
    records = Records(
        models=models | {(task, name): used for (task, _), own in rounds.items() for name, used in own.items()},
        reference={
            (task, read_manifest(paths[0])["table"]): _mean_manifest(paths)["used"]
            for (task, _), paths in _by_name(args.reference).items()
        },
        samples=samples,
        win_rates=_joined(args.win_rates, ["task", "run", "temperature", "selected", "win_rate"]),
        curves=curves.groupby(["task", "n", "temperature"])[["flops", "generated_tokens"]].mean().reset_index(),
        rewards={
            name: [_rewarded(*both) for both in zip(paths, written[name], strict=True)]
            for name, paths in _by_name(args.rewards).items()
        },
    )
    rows = [row for task, runs in recipe.runs.items() for one in runs for row in run_rows(task, one, records, recipe)]
    rows += [
        evaluated_row(
            task,
            [read_table(path, "evaluations") for path in paths],
            list(rounds.get((task, run), {}).values()),
            recipe.confidence[task],
        )
        for (task, run), paths in _by_name(args.runs).items()
    ]
    write_csv(args.out, pd.DataFrame(rows).reindex(columns=COLUMNS))


def _rounds(paths: Sequence[Path]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """What each round of a run took, all its stages together, by task and run and the round's name; means over seeds."""
    found: dict[tuple[str, str], dict[str, dict[str, list[Path]]]] = {}
    for path in paths:
        task, run, number, name = path.parts[-4:]
        of_round = found.setdefault((task, run), {}).setdefault(round_name(run, int(number)), {})
        of_round.setdefault(name, []).append(path)

    def took(files: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
        means = (_mean([_used(path) for path in equal]) for equal in files.values())
        return total_usage([used for used in means if used])

    return {of_run: {name: took(files) for name, files in own.items()} for of_run, own in found.items()}


def _rewarded(scores: Path, samples: Path) -> pd.DataFrame:
    """The rows of a scores table, with the splits that their samples have."""
    written = read_table(samples, "samples")
    rewards = read_table(scores, "scores", samples=written.attrs["manifest"]["content_hash"])
    key = ["prompt_id", "temperature", "sample_index"]
    return rewards.merge(written[[*key, "split"]], on=key, validate="one_to_one")


def _by_name(paths: Sequence[Path]) -> dict[tuple[str, str], list[Path]]:
    """Paths by the names of their folder and of themselves, which are equal for all seeds."""
    found: dict[tuple[str, str], list[Path]] = {}
    for path in paths:
        found.setdefault((path.parent.name, path.name.removesuffix(".parquet")), []).append(path)
    return found


def _mean(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means of what stages recorded of themselves; None where one did not."""
    keys = [key for key, value in every[0].items() if isinstance(value, int | float)]
    known = {key: all(used.get(key) is not None for used in every) for key in keys}
    return {key: sum(used[key] for used in every) / len(every) if known[key] else None for key in keys}


def _mean_manifest(paths: Sequence[Path]) -> dict[str, Any]:
    """Rows of tables that differ in their seed alone, and the means of what they used."""
    manifests = [read_manifest(path) for path in paths]
    return {"rows": manifests[0]["rows"], "used": _mean([manifest.get("used") or {} for manifest in manifests])}


def _used(folder: Path) -> dict[str, Any]:
    """What a model's folder, or a table, says was used for it; nothing where a table took no model."""
    if folder.suffix == ".parquet":
        of_table: dict[str, Any] = read_manifest(folder).get("used") or {}
        return of_table
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"{folder} holds no manifest.json: run the stage that makes it.")
    told = read_json(manifest)
    if not isinstance(told, dict) or not isinstance(told.get("used"), dict):
        raise UserError(f"{manifest} does not say what was used: delete {folder} and run its stage again.")
    used: dict[str, Any] = told["used"]
    return used


def _joined(paths: list[Path], columns: list[str]) -> pd.DataFrame:
    return pd.concat([pd.DataFrame(columns=columns), *(read_csv(path) for path in paths)], ignore_index=True)
