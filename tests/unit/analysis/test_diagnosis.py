"""What is flagged of runs whose texts are made to collapse, and what is said of them."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from prefopt.analysis import diagnosis
from prefopt.analysis.diagnosis import (
    DiagnosisRecipe,
    adjusted_p,
    diagnosis_page,
    diagnosis_table,
    distinct_p,
    verdict_of,
)
from prefopt.errors import UserError
from prefopt.generation.measures import completion_measures
from prefopt.store.tables import write_table

PROMPTS = 40
VALUES = {"dpo": ("beta", "nll_weight", "length_normalized"), "unlikelihood": ("alpha",)}
RECIPE = DiagnosisRecipe(
    task="hh", runs=("mine",), logged=("mine",), seeds=(0,), confidence=0.95, seed=0, values=VALUES
)
EOS = 0
PROMPT = list(range(500, 512))


def completions(step: int, ids: list[list[int]], logp: float = -1.0, **values: Any) -> list[dict[str, Any]]:
    """Evaluations of a step, one completion a prompt, each as its tokens are; they end at the token 0."""
    return [
        {"run": "mine", "method": "dpo", "seed": 0, "conservativeness": 0.1, "step": step, "prompt_id": f"p{i:02d}"}
        | {
            "sample_index": 0,
            "reward": 0.1 * step,
            "kl": float(step),
            "tokens": len(one),
            "logp": logp * len(one) + i % 5,
        }
        | {"learned_reward": None}
        | completion_measures(PROMPT, one, " ".join(str(token) for token in one if token != EOS), one[-1] == EOS)
        | values
        for i, one in enumerate(ids)
    ]


def good(step: int) -> list[dict[str, Any]]:
    """Texts of 6 to 10 tokens, all different, that end."""
    return completions(step, [[*range(100 * i + step, 100 * i + step + 5 + i % 5), EOS] for i in range(1, PROMPTS + 1)])


def logged(*steps: tuple[int, float, float]) -> list[dict[str, Any]]:
    return [
        {"step": step, "split": "validation", "chosen_logp": chosen, "rejected_logp": rejected}
        for step, chosen, rejected in steps
    ]


FLAT = logged((0, -20.0, -21.0), (4, -19.0, -25.0))


def table_of(*steps: list[dict[str, Any]], metrics: list[dict[str, Any]] = FLAT, **values: Any) -> pd.DataFrame:
    rows = pd.DataFrame(itertools.chain(*steps)).assign(**values)
    return diagnosis_table(rows, {("mine", 0): metrics}, RECIPE)


COLLAPSED = {
    "repeating": [[7, 8] * 4 + [EOS]] * PROMPTS,
    "copying": [[*PROMPT[i % 3 : i % 3 + 6], 60 + i, EOS] for i in range(PROMPTS)],
    "empty": [[EOS]] * PROMPTS,
    "endless": [[1000 * i + k for k in range(8)] for i in range(PROMPTS)],
    "too long": [[*(1000 * i + k for k in range(11)), EOS] for i in range(PROMPTS)],
    "alike": [[1, 2, 3, 4, 5, 6, i % 3 + 7, EOS] for i in range(PROMPTS)],
}
WITH_IT = {"repeating": "alike", "empty": "alike"}  # the same text for every prompt is both


@pytest.mark.parametrize("flag", COLLAPSED)
def test_texts_made_to_collapse_are_flagged_as_what_they_are(flag: str) -> None:
    table = table_of(good(0), good(2), completions(4, COLLAPSED[flag]))
    expected = [measure.flag for measure in diagnosis.MEASURES if measure.flag in (flag, WITH_IT.get(flag))]
    assert table["flags"].tolist() == ["", "", "; ".join(expected)]
    found = verdict_of(table, RECIPE)
    words = next(measure.words for measure in diagnosis.MEASURES if measure.flag == flag)
    assert found.flagged and f"{words} from step 4 on" in found.sentence
    assert "an earlier step (step 2 shows none of it)" in found.helps
    assert ("`length_normalized: true`" in found.helps) == (flag == "too long")
    assert set(table["verdict"]) == {found.sentence}


def test_a_run_like_its_reference_has_no_flag() -> None:
    table = table_of(good(0), good(2), good(4))
    assert table["flags"].tolist() == ["", "", ""]
    assert verdict_of(table, RECIPE) == diagnosis.Verdict("No collapse at 2 steps up to 4.", "", False)


def test_numbers_by_hand() -> None:
    """Of four completions two end, one repeats, one is empty; 4, 3, 9 and 1 tokens against 2 each."""
    prompts = {"prompt_id": ["a", "a", "b", "b"], "sample_index": [0, 1, 0, 1]}
    key = {"run": "mine", "method": "dpo", "seed": 0, "conservativeness": 0.1}
    before = pd.DataFrame({**prompts, "tokens": 2, "logp": [-1.0, -3.0, -1.0, -3.0], "text_hash": list("abcd")})
    before = before.assign(step=0, ended=True, repeats=False, copies=False, empty=False, kl=0.0, reward=0.0)
    after = before.assign(step=6, tokens=[4, 3, 9, 1], logp=[-2.0, -3.0, -4.0, -1.0], text_hash=list("aabc"))
    after = after.assign(
        ended=[True, False, False, True], repeats=[0, 0, 1, 0], empty=[0, 0, 0, 1], kl=[1.0, 2.0, 3.0, 6.0]
    )
    metrics = logged((0, -20.0, -22.0), (5, -30.0, -40.0), (7, -50.0, -60.0))
    rows = pd.concat([before, after]).assign(**key).astype({"repeats": bool, "empty": bool})
    table = diagnosis_table(rows, {("mine", 0): metrics}, RECIPE)
    first, row = table.iloc[0], table.iloc[1]
    assert (row["prompts"], row["completions"], row["ended"], row["repeats"], row["empty"]) == (2, 4, 0.5, 0.25, 0.25)
    assert row["tokens"] == 17 / 4 and row["length_ratio"] == 17 / 8 and row["distinct"] == 0.75
    # 10 nats over 17 tokens; residuals of the prompts 5 - 7 r and 5 - 10 r with r = 10 / 17.
    residuals = [5 - 70 / 17, 5 - 100 / 17]
    assert row["entropy"] == pytest.approx(10 / 17)
    assert row["entropy_se"] == pytest.approx(np.std(residuals, ddof=1) * math.sqrt(2) / 17)
    # Of means 1.5 and 4.5.
    assert row["kl"] == 3.0 and row["kl_se"] == pytest.approx(np.std([1.5, 4.5], ddof=1) / math.sqrt(2))
    # The validation at step 5, not the one at 7.
    assert row["pairs_step"] == 5 and row["chosen_logp_change"] == -10 and row["rejected_logp_change"] == -18
    assert (first["pairs_step"], first["chosen_logp_change"]) == (0, 0)
    assert row["logp_sd"] == pytest.approx(2 / math.sqrt(3)) and row["flags"] == "chosen falls"
    assert (row["ended_threshold"], row["repeats_threshold"], row["distinct_threshold"]) == (0.95, 0.05, 0.5)
    assert row["tokens_threshold"] == 2.0


def test_two_prompts_are_too_few_for_any_flag_of_texts() -> None:
    table = table_of(good(0)[:2], completions(4, COLLAPSED["repeating"])[:2])
    assert table["flags"].tolist() == ["", ""] and table["repeats"].tolist() == [0, 1]
    assert table["repeats_p_holm"].iloc[1] == 1


def test_holm_counts_every_measure_and_step_of_the_run() -> None:
    """Six of 40 repeat: sign flips of six differences of one sign give 2 / 64, which is a test too many."""
    six = [row | {"repeats": i < 6} for i, row in enumerate(good(4))]
    table = table_of(good(0), six)
    assert table["repeats"].iloc[1] == 0.15 and table["flags"].tolist() == ["", ""]
    assert table["repeats_p_holm"].iloc[1] == pytest.approx(6 * 2 / 64, rel=0.1)
    twenty = [row | {"repeats": i < 20} for i, row in enumerate(good(4))]
    assert table_of(good(0), twenty)["flags"].tolist() == ["", "repeating"]
    # A difference below the margin is no flag, however sure it is.
    assert table_of(good(0), [row | {"repeats": i < 2} for i, row in enumerate(good(4))])["repeats_p_holm"].isna().all()


def test_resamples_are_enough_for_the_smallest_p_of_all_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of six measures at 0.95: the smallest p of 12 tests must fall below 0.05 / 12, four times over."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(diagnosis, "_RESAMPLES", 1)
    monkeypatch.setattr(diagnosis, "sign_flip_p", lambda d, seed, resamples: asked.append((seed, resamples)) or 1e-4)
    table = table_of(good(0), good(2), [row | {"repeats": i < 20} for i, row in enumerate(good(4))])
    assert asked == [(0, 4 * 12 * 20)] and table["repeats_p_holm"].iloc[2] == pytest.approx(12e-4)


def test_a_mean_completion_is_too_long_beyond_one_standard_deviation() -> None:
    """Of 6 to 10 tokens, each as often: a mean of 8 and a variance of 2, of 40 less one 80 / 39."""
    thresholds = table_of(good(0), good(2))["tokens_threshold"]
    assert thresholds.tolist() == pytest.approx([8 + math.sqrt(80 / 39)] * 2)


def test_runs_as_their_reference_are_seldom_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 runs of three steps, each completion drawn as the reference policy's: at most 5% have any flag."""
    monkeypatch.setattr(diagnosis, "_RESAMPLES", 999)
    rng = np.random.default_rng(0)
    shares = {"ended": 0.8, "repeats": 0.3, "copies": 0.1, "empty": 0.1}
    names = pd.DataFrame({"prompt_id": np.arange(PROMPTS)})

    def drawn() -> pd.DataFrame:
        texts = {"tokens": rng.integers(2, 30, PROMPTS), "text_hash": rng.integers(0, 60, PROMPTS).astype(str)}
        return names.assign(**texts, **{name: rng.random(PROMPTS) < share for name, share in shares.items()})

    flagged = 0
    for _ in range(40):
        steps = {step: drawn() for step in range(4)}
        thresholds = {measure.column: diagnosis.threshold(measure, steps[0]) for measure in diagnosis.MEASURES}
        flagged += any(p < 0.05 for p in adjusted_p(steps, thresholds, RECIPE).values())
    assert flagged <= 4  # 5% of 40 and a standard error and a half


def test_distinct_p_against_all_swaps() -> None:
    first, second = [["a"], ["b"], ["c"], ["d"], ["e"], ["f"]], [["x"], ["x"], ["x"], ["y"], ["x"], ["f"]]
    pairs = list(zip(first, second, strict=True))

    def difference(swaps: tuple[bool, ...]) -> int:
        sides = [pair[::-1] if swap else pair for pair, swap in zip(pairs, swaps, strict=True)]
        mine, other = ({text for side in sides for text in side[k]} for k in (0, 1))
        return abs(len(mine) - len(other))

    every = [difference(swaps) for swaps in itertools.product((False, True), repeat=6)]
    exact = np.mean([value >= every[0] for value in every])
    assert distinct_p(first, second, 0, 20000) == pytest.approx(exact, abs=0.01)
    assert distinct_p(first, first, 0, 99) == 1.0


def test_the_words_of_a_verdict() -> None:
    falling = logged((0, -20.0, -21.0), (2, -21.0, -30.0), (4, -50.0, -90.0))
    texts = completions(4, COLLAPSED["repeating"])
    worse = table_of(good(0), good(2), texts, metrics=falling, method="unlikelihood", conservativeness=1.0)
    assert verdict_of(worse, RECIPE).sentence == (
        "Collapsed: repeats itself from step 4 on (100% at step 4, 0% at step 0), writes the same to many prompts from step 4 "
        "on (2% distinct at step 4, 100% at step 0); the log-probability of held-out chosen completions falls with that of "
        "rejected ones from step 4 on (by 30 and 69 nats at step 4; the reference policy's own completions have a standard "
        "deviation of 2)."
    )
    assert verdict_of(worse, RECIPE).helps == (
        "an earlier step (step 2 shows none of it); a lower `learning_rate`; a smaller `alpha`"
    )
    # Texts that hold, while the likelihood of what was chosen falls: DPO's own remedies.
    pairs = verdict_of(table_of(good(0), good(4), metrics=falling), RECIPE)
    assert not pairs.flagged and pairs.sentence.startswith(
        "Its texts do not collapse at 1 steps up to 4, but the log-prob"
    )
    assert pairs.helps == (
        "evaluating and stopping earlier; a lower `learning_rate`; `nll_weight` above 0; a larger `beta`"
    )
    endless = table_of(good(0), completions(2, COLLAPSED["endless"]), good(4), metrics=[], method="ppo")
    found = verdict_of(endless, RECIPE)
    assert found.sentence == "Collapsed: does not end at step 2 (0% end at step 2, 100% at step 0)."
    ill = completions(2, COLLAPSED["endless"]), [{**row, "step": 4} for row in completions(2, COLLAPSED["endless"])]
    sentence = verdict_of(table_of(good(0), *ill, good(6)), RECIPE).sentence
    assert sentence == "Collapsed: does not end at steps 2 to 4 (0% end at step 2, 100% at step 0)."
    again = [{**row, "step": 8} for row in ill[0]]
    assert "does not end first at step 2 (" in verdict_of(table_of(good(0), ill[0], good(6), again), RECIPE).sentence
    assert found.helps.endswith("a smaller `kl_target` or a larger `kl_coef`; a lower `missing_eos_reward`")
    assert endless["chosen_logp_change"].isna().all()


def test_chosen_falls_beyond_one_standard_deviation_and_not_at_it() -> None:
    spread = float(pd.DataFrame(good(0))["logp"].std())
    for further, flags in ((0.0, ["", ""]), (0.01, ["", "chosen falls"])):
        fallen = logged((0, 0.0, 0.0), (4, -spread - further, -1.0))
        assert table_of(good(0), good(4), metrics=fallen)["flags"].tolist() == flags


def test_the_page_of_one_run() -> None:
    table = table_of(good(0), completions(2, COLLAPSED["endless"]), good(4)).assign(prompts=80)
    assert diagnosis_page(table, RECIPE).splitlines() == [
        "# hh: diagnosis",
        "",
        "Every run's completions of the same 80 prompts at temperature 1, held against those of step 0, the reference policy's "
        "own. Flagged is what is beyond its threshold, and significantly so (5%, adjusted over all measures and steps of a run).",
        "",
        "| run | verdict | what helps |",
        "| --- | --- | --- |",
        "| mine | Collapsed: does not end at step 2 (0% end at step 2, 100% at step 0). | evaluating and stopping earlier; a "
        "lower `learning_rate`; `nll_weight` above 0; a larger `beta` |",
        "",
        "At the last step of each run:",
        "",
        "| run | step | chosen | rejected | end | repeat | empty | copy | tokens | entropy | KL | distinct |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| mine | 4 | +1.0 | -4.0 | 100% | 0% | 0% | 2% | 8 | 0.75 | 4.0 | 100% |",
        "",
        "chosen, rejected: change of the log-probability of held-out pairs since step 0, nats a completion, where the trainer "
        "logs it; entropy in nats a token, KL in nats a completion.",
        "",
        "| of the reference policy's completions | there | flagged |",
        "| --- | ---: | ---: |",
        "| empty | 0.0% | above 5.0% |",
        "| end before the length limit | 100.0% | below 95.0% |",
        "| have four tokens in a row twice | 0.0% | above 5.0% |",
        "| more than half from the prompt | 2.5% | above 7.5% |",
        "| tokens, mean | 8.0 | above 9.4 |",
        "| distinct texts | 100.0% | below 50.0% |",
        "| log-probability, standard deviation | 2.0 | chosen falls by more, rejected too |",
    ]


def test_the_page_has_the_runs_and_seeds_in_the_tables_order() -> None:
    one = table_of(good(0), good(4))
    table = pd.concat([one.assign(run=run, seed=seed) for seed in (4, 3) for run in ("mine", "another")])
    page = diagnosis_page(table, dataclasses.replace(RECIPE, runs=("mine", "another"), seeds=(4, 3)))
    rows = [line.split(" |")[0] for line in page.splitlines() if ", seed " in line and line.startswith("|")]
    assert rows == ["| mine, seed 4", "| another, seed 4", "| mine, seed 3", "| another, seed 3"] * 2


def test_a_run_without_its_reference_or_with_other_prompts_is_refused() -> None:
    with pytest.raises(UserError, match="mine was not evaluated at step 0"):
        table_of(good(2), good(4))
    with pytest.raises(UserError, match="mine was evaluated on other prompts at step 4 than at step 0"):
        table_of(good(0), good(4)[1:])


def test_the_stage_writes_table_page_and_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = {
        "task": "a_task",
        "runs": ["mine", "other|run"],
        "logged": ["mine"],
        "seeds": [3, 4],
        "confidence": 0.95,
        "seed": 3,
        "values": VALUES,
    }
    paths: dict[str, list[Path]] = {"evaluations": [], "metrics": []}
    for seed, run in itertools.product((3, 4), ("mine", "other|run")):
        last = completions(4, COLLAPSED["empty"]) if (seed, run) == (4, "mine") else good(4)
        folder = tmp_path / str(seed)
        folder.mkdir(exist_ok=True)
        number = len(paths["evaluations"])
        paths["evaluations"].append(folder / f"{number}.parquet")
        write_table(paths["evaluations"][-1], "evaluations", [{**row, "run": run} for row in (*good(0), *last)])
        if run == "mine":  # the other is trained in rounds, each of which has a log of its own
            paths["metrics"].append(folder / f"{number}.jsonl")
            paths["metrics"][-1].write_text("\n".join(json.dumps(row) for row in FLAT))
    out = {"out": tmp_path / "d.csv", "page": tmp_path / "d.md"}
    with caplog.at_level(logging.INFO):
        diagnosis.run(argparse.Namespace(**paths, recipe=json.dumps(recipe), **out))
    table = pd.read_csv(out["out"]).fillna({"flags": ""})
    assert table.groupby(["seed", "run"], sort=False).size().index.tolist() == [
        *((3, "mine"), (3, "other|run"), (4, "mine"), (4, "other|run"))
    ]
    logged = table[table["run"] == "mine"]
    assert logged["chosen_logp_change"].notna().any()
    assert table.loc[table["run"] == "other|run", "chosen_logp_change"].isna().all()
    assert table.loc[table["flags"] != "", ["seed", "run", "step"]].to_numpy().tolist() == [[4, "mine", 4]]
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and warned[0].startswith(
        "mine, seed 4: Collapsed: writes nothing from step 4 on (100% at step 4"
    )
    page = out["page"].read_text()
    assert "| other&#124;run, seed 3 | No collapse at 1 steps up to 4. |  |" in page
    assert "Only 40 test prompts" in page and "The thresholds are those of seed 3" in page
    assert "| end before the length limit | 100.0% | below 95.0% |" in page
    # One seed and enough prompts: neither is spoken of.
    many = pd.concat([table[table["seed"] == 3]] * 2).assign(prompts=80)
    one = diagnosis_page(many, DiagnosisRecipe(**{**recipe, "seeds": (3,), "runs": ("mine",)}))
    assert "Only" not in one and "seed" not in one


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"repeats": 19}, "Flagged: repeats itself at step 4 (48% at step 4, 0% at step 0)."),
        ({"repeats": 20}, "Collapsed: repeats itself at step 4 (50% at step 4, 0% at step 0)."),
        ({"ended": 19}, "Flagged: does not end at step 4 (52% end at step 4, 100% at step 0)."),
        ({"ended": 21}, "Collapsed: does not end at step 4 (48% end at step 4, 100% at step 0)."),
    ],
)
def test_a_run_collapses_where_half_of_its_texts_are_worse(changed: dict[str, int], said: str) -> None:
    ((column, count),) = changed.items()
    rows = [row | {column: (i < count) == (column == "repeats")} for i, row in enumerate(good(4))]
    found = verdict_of(table_of(good(0), good(2), rows), RECIPE)
    assert found.sentence.replace("from step 4 on", "at step 4") == said and found.flagged


@pytest.mark.parametrize(("tokens", "word"), [(13, "Flagged"), (16, "Collapsed")])
def test_a_run_collapses_where_its_texts_are_twice_as_long(tokens: int, word: str) -> None:
    """The reference policy's have 8 on average."""
    found = verdict_of(table_of(good(0), good(2), [row | {"tokens": tokens} for row in good(4)]), RECIPE)
    assert found.sentence.startswith(f"{word}: grows too long from step 4 on ({tokens} tokens")
