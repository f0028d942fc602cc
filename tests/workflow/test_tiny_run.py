"""All embedded tasks at toy size through real Snakemake, and what a change of anything makes them run again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from compared import loaded
from running import REPOSITORY, TINY, overlay, planned, snakemake

from prefopt.experiment.config import resolve
from prefopt.experiment.targets import result_files
from prefopt.lm.models import weights_hash
from prefopt.store.tables import read_manifest

pytestmark = pytest.mark.workflow

METHODS = ["base", "sft", "preferred_ft", "dpo", "ppo", "best_of_4"]
RUNS = ["dpo_0.1", "ppo_6", "ppo_gt_6", "ppo_gt_trl_6", "unlikelihood_1", "preferred_ft_0"]
# What hangs on any method's verdicts.
TABLES = {"win_rates": 1, "win_rate_figure": 1, "examples": 1}
# What hangs on DPO's and the candidates' verdicts.
CURVE = {"best_of_n_curve": 1}
# What hangs on the samples that people compare.
STUDY = {"human_study": 1, "simulated_votes": 1, "human_votes": 1}
# What hangs on what DPO writes while it trains, with a judge's verdicts on it.
OF_EVALUATIONS = {"frontier": 1, "dominance": 1, "frontier_figure": 1, "diagnosis": 1}
BY_STEP = {"win_rate_by_step": 1, "evaluations": 1, **OF_EVALUATIONS}
DPO_AND_BELOW = {
    **dict.fromkeys(("dpo_with_samples", "sample", "training_figure"), 1),
    "judge": 2,
    **TABLES,
    **CURVE,
    **STUDY,
    **BY_STEP,
}


def plan(
    folder: Path, *arguments: str, changed: dict[str, Any] | None = None, everything: bool = False
) -> dict[str, int]:
    """Jobs of another run in that folder for the task tldr, with `changed` merged over the tiny config."""
    more = [overlay(folder.parent, changed)] if changed else []
    config = resolve(merged(read("config.yaml"), yaml.safe_load(TINY.read_text())))
    files = [file for file in result_files(config) if "tldr" in file]
    targets = [] if everything else ["results/candidates/tldr_curve.csv", *files]
    return planned(*targets, *arguments, "--configfile", TINY, *more, folder=folder)


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((REPOSITORY / "config" / name).read_text(encoding="utf-8"))
    return content


def merged(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """What Snakemake makes of a configfile and an overlay."""
    both = dict(base)
    for key, value in overlay.items():
        inner = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = merged(both[key], value) if inner else value
    return both


@contextlib.contextmanager
def edited(path: Path, before: str, after: str) -> Iterator[None]:
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after, 1), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def test_the_table_has_a_row_per_method_and_temperature(finished: Path) -> None:
    table = pd.read_csv(finished / "results" / "tldr_winrates.csv")
    assert list(table["run"].unique()) == METHODS
    assert sorted(table["temperature"].unique()) == [0.0, 1.0]
    assert len(table) == 2 * len(METHODS) and table.groupby("run")["selected"].sum().eq(1).all()
    assert (table["n"] == 8).all()
    assert (table["n"] == table[["wins", "losses", "ties", "invalid"]].sum(axis=1)).all()
    assert table["judge"].str.startswith("oracle").all()


def test_the_best_of_n_curve_ends_at_the_tables_row(finished: Path) -> None:
    curve = pd.read_csv(finished / "results" / "best_of_n.csv")
    assert set(curve["task"]) == {"tldr", "hh"}
    curve = curve[curve["task"] == "tldr"]
    assert curve[["run", "n"]].drop_duplicates().to_numpy().tolist() == [["sft", 1], ["sft", 4], ["dpo", 1]]
    one, best = (curve[(curve["n"] == n) & (curve["run"] == "sft")].iloc[0] for n in (1, 4))
    (dpo,) = curve.loc[curve["run"] == "dpo", "win_rate"]
    table = pd.read_csv(finished / "results" / "tldr_winrates.csv").set_index(["run", "temperature"])
    assert best["temperature"] == 1 and best["win_rate"] == pytest.approx(table.loc[("best_of_4", 1), "win_rate"])
    assert dpo == pytest.approx(table.loc["dpo"].query("selected")["win_rate"].item())
    assert best["reward"] > one["reward"]
    assert best["flops"] > one["flops"] > 0


def test_the_other_results_are_there(finished: Path) -> None:
    names = ["winrates.svg", "winrates.png", "winrates.pdf", "winrates.manifest.json", "comparisons.csv"]
    names += ["training.svg", "examples.md"]
    assert all((finished / "results" / f"tldr_{name}").stat().st_size > 0 for name in names)
    assert json.loads((finished / "results" / "tldr_winrates.manifest.json").read_text())["synthetic"] is True


def test_people_and_judges_are_compared(finished: Path) -> None:
    pages = sorted(path.name for path in (finished / "results/human/tldr/pages").glob("*.html"))
    raters = pd.read_csv(finished / "results/human/tldr/raters.csv")
    assert pages == [f"{rater}.html" for rater in raters["rater"]] and raters["simulated"].all()
    people = pd.read_csv(finished / "results/human_agreement.csv")
    assert people["judge"].unique().tolist() == ["simulated raters", "main", "gold"]
    assert people["matchup"].nunique() == 2 and (people["n"] > 0).all()
    judges = pd.read_csv(finished / "results/judge_agreement.csv")
    assert judges["run"].tolist() == ["all", *METHODS] and set(judges["judge_b"]) == {"gold"}
    assert judges.loc[0, "n"] == 8 * len(METHODS)


def test_dialogue_is_judged_by_method_and_by_step(finished: Path) -> None:
    table = pd.read_csv(finished / "results/hh_winrates.csv")
    assert list(table["run"].unique()) == ["base_2shot", "preferred_ft", "dpo", "best_of_4"]
    assert (table["n"] == 6).all() and list(table.columns) == list(pd.read_csv(finished / "results/tldr_winrates.csv"))
    # The reference policy is Preferred-FT, which has no divergence from itself at temperature 1.
    own = table[(table["run"] == "preferred_ft") & (table["temperature"] == 1)]
    assert own["kl_to_reference"].item() == pytest.approx(0, abs=1e-3)
    steps = pd.read_csv(finished / "results/hh_winrate_by_step.csv")
    assert steps["step"].tolist() == [0, 2, 3] and (steps["n"] == 6).all()
    summary = json.loads((finished / "results/data/hh/summary.json").read_text())
    for counts in summary["tables"].values():
        assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())


def test_news_is_written_by_the_policies_of_tldr(finished: Path) -> None:
    table = pd.read_csv(finished / "results/cnndm_winrates.csv")
    assert table["run"].unique().tolist() == ["dpo", "ppo"] and sorted(table["temperature"].unique()) == [0, 0.25]
    sampled = read_manifest(finished / "results/samples/cnndm/dpo.parquet")
    assert sampled["model_weights"] == weights_hash(finished / "results/models/tldr/dpo")
    assert not (finished / "results/models/cnndm").exists()


def test_the_sweep_has_a_row_per_run_and_checkpoint(finished: Path) -> None:
    table = pd.read_csv(finished / "results/imdb_frontier.csv")
    assert sorted(table["run"].unique()) == sorted(RUNS) and (table.groupby("run").size() == 3).all()
    start = table[table["step"] == 0]
    assert (start["kl"].abs() < 1e-5).all() and start["reward"].nunique() == 1
    assert (table.loc[table["step"] > 0, "kl"] > 0).all() and table["reward"].nunique() > 1
    assert (table["above_ceiling_z"].dropna() < 4).all()
    diagnosis = pd.read_csv(finished / "results/imdb_diagnosis.csv")
    assert len(diagnosis) == len(table) and set(diagnosis["run"]) == set(RUNS)
    assert diagnosis.loc[diagnosis["step"] == 0, "chosen_logp_change"].dropna().eq(0).all()
    gains = pd.read_csv(finished / "results/overoptimization.csv").set_index(["task", "run"])
    assert gains.loc[[("tldr", "best_of_n"), ("tldr", "ppo"), ("tldr", "dpo")], "learned_gain"].notna().all()
    assert gains.loc[("imdb", "ppo_6"), "learned_gain"].notna().all()
    assert gains.loc[("hh", "best_of_n"), "n"].tolist() == [1, 2, 3, 4]
    pairs = pd.read_csv(finished / "results/imdb_dominance.csv")
    assert len(pairs) == 15 and pairs[["method", "other"]].drop_duplicates().shape == (15, 2)
    ceiling = pd.read_csv(finished / "results/imdb_ceiling.csv")
    assert (ceiling["kl"].diff().dropna() > -1e-9).all() and (ceiling["reward"].diff().dropna() > -1e-9).all()


def test_cost_and_the_papers_numbers_cover_every_task(finished: Path) -> None:
    table = pd.read_csv(finished / "results/compute.csv")
    assert set(table["task"]) == {"tldr", "hh", "cnndm", "imdb"}
    total = table[table["stage"] == "total"].set_index(["task", "run"])
    assert total["bought"].notna().all() and (total["inference_flops_per_prompt"] > 0).all()
    flops = total["training_flops"].to_dict()
    assert flops["tldr", "ppo"] > flops["tldr", "sft"] and flops["tldr", "base"] == 0
    assert flops["cnndm", "dpo"] == flops["tldr", "dpo"]
    answers = total["inference_flops_per_prompt"]
    # At temperature 0 the best of four is the greedy answer.
    selected = pd.read_csv(finished / "results/tldr_winrates.csv").query("run == 'best_of_4' and selected")
    assert answers["tldr", "best_of_4"] > (3 if selected["temperature"].item() else 0.9) * answers["tldr", "sft"]
    assert set(table.loc[table["task"] == "imdb", "run"]) == set(RUNS)
    assert "| Table 1 |" in (finished / "results/paper_vs_here.md").read_text()


def test_a_change_of_tldr_reaches_news_and_no_other_task(finished: Path) -> None:
    jobs = plan(finished, changed={"tasks": {"tldr": {"dpo": {"beta": 0.7}}}}, everything=True)
    assert jobs["dpo_with_samples"] == 1 and jobs["sample"] == 2 and jobs["judge"] == 3
    assert not jobs.keys() & {"dpo", "frontier_run", "preferred_ft", "sft"}


def test_another_run_of_the_sweep_runs_alone(finished: Path) -> None:
    run = {"tasks": {"imdb": {"runs": {"dpo_2": {"method": "dpo", "beta": 2}}}}}
    jobs = plan(finished, changed=run, everything=True)
    tables = {**OF_EVALUATIONS, "overoptimization": 1, "compute": 1, "compute_figure": 1}
    assert jobs == {"frontier_run": 1, **tables, "all": 1}


def test_real_reviews_with_a_classifier_make_the_frontier(finished: Path, tmp_path: Path) -> None:
    """A file of labelled reviews in place of the generator, and a classifier in place of its rule."""
    records = pd.read_parquet(finished / "results/data/imdb/raw/reviews.parquet")
    records[["text", "label"]].to_csv(tmp_path / "mine.csv", index=False)
    mine = {
        "data": {"source": "files", "reviews": [str(tmp_path / "mine.csv")]},
        "true_reward": {"source": "classifier"},
    }
    runs = {run: None for run in RUNS if run not in ("dpo_0.1", "ppo_gt_6")}
    path = overlay(tmp_path, {"tasks": {"imdb": {**mine, "runs": runs}}})
    targets = ["results/imdb_frontier.svg", "results/imdb_dominance.csv", "results/imdb_classifier.csv"]
    result = snakemake(
        "--cores", "2", "--directory", tmp_path / "run", *targets, "--configfile", TINY, path, folder=finished
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    accuracy = pd.read_csv(tmp_path / "run/results/imdb_classifier.csv").query("bin == 'all'").set_index("texts")
    assert set(accuracy.index) == {"reviews", "excerpts"} and accuracy["accuracy"].between(0, 1).all()
    assert pd.read_csv(tmp_path / "run/results/imdb_frontier.csv")["reward"].between(0, 1).all()


def test_a_second_run_does_nothing(finished: Path) -> None:
    result = snakemake("--cores", "2", "--configfile", TINY, folder=finished)
    assert result.returncode == 0 and "Nothing to be done" in result.stdout + result.stderr


def test_another_beta_reruns_dpo_and_what_hangs_on_it(finished: Path) -> None:
    assert plan(finished, changed={"tasks": {"tldr": {"dpo": {"beta": 0.7}}}}) == DPO_AND_BELOW


def test_forcing_a_stage_reruns_it_and_what_hangs_on_it(finished: Path) -> None:
    assert plan(finished, "--forcerun", "dpo_with_samples") == DPO_AND_BELOW


def test_another_judge_trains_nothing_but_the_judge(finished: Path) -> None:
    jobs = plan(finished, changed={"tasks": {"tldr": {"judge": {"kind": "reward_model"}}}})
    judged = {"judge": len(METHODS) + 2, "judge_candidates": 1, "win_rate_by_step": 1}  # DPO and PPO by step
    assert jobs == {**judged, **TABLES, **CURVE}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tasks.hh.by_step.points", 3),
        ("tasks.hh.sampling.max_new_tokens", 10),
        ("tasks.tldr.data.embedded.test_prompts", 9),
        ("tasks.tldr.dpo.checkpoint_every", 1),
        ("tasks.tldr.other_judges.gold.order", "both"),
        ("tasks.imdb.ppo_gt.learning_rate", 1e-4),
    ],
)
def test_snakemake_runs_what_the_comparison_of_every_key_says(finished: Path, key: str, value: Any) -> None:
    """See `test_every_key`, which holds every key against what reads it without a dry run of each."""
    change = value
    for part in reversed(key.split(".")):
        change = {part: change}
    with loaded(finished, TINY) as rules:
        before = rules.jobs()
        with rules.with_config(resolve(merged(rules.config, change))):
            _, every = rules.rerun(before, rules.jobs())
    assert plan(finished, changed=change, everything=True) == Counter(rule for rule, _ in every)


def test_threads_and_memory_rerun_nothing(finished: Path) -> None:
    assert plan(finished, changed={"compute": {"threads": 2, "mem_mb": 4000, "gpus": 1}}) == {}


def test_a_comment_reruns_nothing(finished: Path) -> None:
    with edited(finished / "workflow/prefopt/training/preference.py", "\ndef ", "\n# A remark.\ndef "):
        assert plan(finished) == {}


def test_another_error_text_and_another_loss_rerun_nothing(finished: Path) -> None:
    package = finished / "workflow/prefopt"
    with (
        edited(package / "lm/logprobs.py", "positions: cut it.", "positions: shorten it."),
        edited(package / "objectives.py", "\ndef ", "\ndef another_loss(x):\n    return x\n\n\ndef "),
    ):
        assert plan(finished, everything=True) == {}


def test_a_copy_without_snakemakes_records_is_told_apart(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "results", tmp_path / "results")
    beta = overlay(finished.parent, {"tasks": {"tldr": {"dpo": {"beta": 0.7}}}})
    run = snakemake("-n", "--configfile", TINY, beta, "--directory", tmp_path, folder=finished)
    assert "were not made in this folder as far as .snakemake/ knows" in run.stdout + run.stderr

    def verify(*overlays: Path) -> subprocess.CompletedProcess[str]:
        words = [
            sys.executable,
            "-P",
            "-m",
            "prefopt",
            "verify",
            "--directory",
            tmp_path,
            "--configfile",
            TINY,
            *overlays,
        ]
        environment = {**os.environ, "PYTHONPATH": str(finished / "workflow")}
        return subprocess.run(words, cwd=finished, env=environment, capture_output=True, text=True, check=False)

    asked = verify()
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert re.match(r"\d+ as asked for, 0 not made yet, \d+ without a record", asked.stdout)
    other = verify(beta)
    assert other.returncode == 2 and "3 results were made by other values" in other.stderr, other.stdout
    # The policy, what it wrote while it trained, and the frontier, whose rows hold the run's conservativeness.
    assert sorted(line for line in other.stdout.splitlines() if ", asked for " in line) == [
        "results/frontier/tldr/dpo.parquet: conservativeness 0.25, asked for 0.7",
        "results/models/tldr/dpo: values.beta 0.25, asked for 0.7",
        "results/samples/tldr/dpo_by_step.parquet: values.beta 0.25, asked for 0.7",
    ]


def test_a_further_temperature_is_sampled_alone(finished: Path, tmp_path: Path) -> None:
    folder, table = tmp_path / "copy", "results/samples/tldr/sft.parquet"
    shutil.copytree(finished, folder, symlinks=True)
    before = pd.read_parquet(folder / table)
    warmer = overlay(tmp_path, {"tasks": {"tldr": {"sampling": {"temperatures": [0.0, 0.5, 1.0]}}}})
    done = snakemake("--cores", "1", table, "--configfile", TINY, warmer, folder=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    said = (folder / "logs/tldr/sample_sft.log").read_text()
    assert re.findall(r"temperature (\S+): \S+ has it", said) == ["0", "1"]
    after = pd.read_parquet(folder / table)
    assert sorted(after["temperature"].unique()) == [0.0, 0.5, 1.0]
    kept = after[after["temperature"] != 0.5].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before)


def test_an_edited_trainer_reruns_itself(finished: Path) -> None:
    with edited(
        finished / "workflow/prefopt/training/preference.py",
        "    recipe = from_json",
        "    assert args\n    recipe = from_json",
    ):
        assert plan(finished) == DPO_AND_BELOW


def test_an_edited_figure_retrains_nothing(finished: Path) -> None:
    with edited(
        finished / "workflow/prefopt/analysis/figures.py", "    table = read_", "    assert args\n    table = read_"
    ):
        jobs = plan(finished)
    assert jobs["win_rate_figure"] == 1
    assert jobs.keys() <= {"win_rate_figure", "examples", "training_figure"}


def test_an_edited_engine_reruns_every_stage_that_computes_with_it(finished: Path) -> None:
    with edited(finished / "workflow/prefopt/lm/logprobs.py", "        return logps\n", "        return 1 * logps\n"):
        jobs = plan(finished)
    trained = {"pretrain", "sft", "reference", "dpo_with_samples", "reward_model", "ppo_with_samples"}
    assert {*trained, "sample"} <= jobs.keys()
    assert "records" not in jobs


def test_a_deleted_model_is_made_again_with_what_hangs_on_it(finished: Path) -> None:
    model = finished / "results/models/tldr/dpo"
    hidden = model.rename(finished / "hidden")
    try:
        assert plan(finished) == DPO_AND_BELOW
    finally:
        hidden.rename(model)


def test_a_deleted_table_is_made_again_and_the_result_is_the_same(finished: Path) -> None:
    table = (finished / "results/tldr_winrates.csv").read_text()
    (finished / "results/verdicts/tldr/dpo.parquet").unlink()
    assert plan(finished) == {"judge": 1, **TABLES, **CURVE}
    result = snakemake("--cores", "2", "--configfile", TINY, folder=finished)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (finished / "results/tldr_winrates.csv").read_text() == table
    assert plan(finished) == {}


def test_a_failed_stage_says_in_one_sentence_what_to_put_right(finished: Path) -> None:
    samples, verdicts = (finished / f"results/{kind}/tldr/sft.parquet" for kind in ("samples", "verdicts"))
    whole, judged = samples.read_bytes(), verdicts.read_bytes()
    samples.write_bytes(whole[: len(whole) // 2])
    verdicts.unlink()
    target = str(verdicts.relative_to(finished))
    try:
        result = snakemake("--cores", "1", target, "--configfile", TINY, folder=finished)
    finally:
        samples.write_bytes(whole)
        verdicts.write_bytes(judged)
    assert result.returncode != 0
    log = (finished / "logs/tldr/judge_sft.log").read_text()
    said = [line for line in log.splitlines() if line.startswith("prefopt judge: ")]
    assert len(said) == 1 and "results/samples/tldr/sft.parquet" in said[0] and "Traceback" not in log
    assert said[0] in result.stdout + result.stderr, "the default profile shows the logs of failed stages"


def test_a_report_can_be_made(finished: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    result = snakemake("--report", report, "--configfile", TINY, folder=finished)
    assert result.returncode == 0, result.stderr[-4000:]
    text = report.read_text(encoding="utf-8")
    assert "Win rates" in text and "whose texts are most often preferred to the reference summary?" in text


def test_the_learned_judge_runs_on_the_same_samples(finished: Path, tmp_path: Path) -> None:
    folder, target = shutil.copytree(finished, tmp_path / "copy", symlinks=True), "results/tldr_winrates.csv"
    judge = overlay(tmp_path, {"tasks": {"tldr": {"judge": {"kind": "reward_model"}}}})
    result = snakemake("--cores", "2", target, "--configfile", TINY, judge, folder=folder)
    assert result.returncode == 0, result.stderr[-8000:]
    table = pd.read_csv(folder / target)
    assert table["judge"].str.startswith("reward_model").all()
