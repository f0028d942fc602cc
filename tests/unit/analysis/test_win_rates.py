from __future__ import annotations

import argparse
import itertools
import json
import math
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.proportion import proportion_confint

from made_up import make_files, make_frames, words
from prefopt.analysis import win_rates
from prefopt.analysis.judge_statistics import length_controlled_rate
from prefopt.analysis.statistics import crossed_mean, paired_difference, score_interval, simultaneous_half_widths
from prefopt.analysis.win_rates import (
    COLUMNS,
    COMPARISON_COLUMNS,
    JUDGE_COLUMNS,
    WinRatesRecipe,
    best_of_n_bound,
    comparison_table,
    select_temperatures,
    win_rate_table,
)
from prefopt.errors import UserError
from prefopt.store.tables import read_manifest

OUTCOMES = {
    "sft": {0.0: ("wlll", "wlllllll"), 1.0: ("llll", "wwllllll")},
    # Better on test at temperature 1, better on validation at 0.25: the latter is selected.
    "dpo": {0.25: ("wwwl", "wwwttlii"), 1.0: ("wwll", "wwwwwwww")},
    "best_of_128": {0.0: ("wlll", "wlllllll"), 1.0: ("wwll", "wwwlllll")},
}


def recipe(**changes: Any) -> WinRatesRecipe:
    values = {
        "task": "tldr",
        "confidence": 0.95,
        "seed": 1,
        "seeds": (0,),
        "runs": tuple(OUTCOMES),
        "methods": {**{name: name for name in ("sft", "preferred_ft", "dpo", "ppo")}, "best_of_128": "best_of_n"},
        "n": {"best_of_128": 128},
        "opponents": ("sft", "preferred_ft", "dpo"),
        "judge": {"kind": "oracle"},
    }
    values |= changes
    values["opponents"] = tuple(name for name in values["opponents"] if name in values["runs"])
    return WinRatesRecipe(**values)


def row(table: pd.DataFrame, method: str, temperature: float) -> pd.Series:
    (found,) = [r for _, r in table.iterrows() if (r["run"], r["temperature"]) == (method, temperature)]
    return found


def test_a_row_by_hand() -> None:
    table = win_rate_table(*make_frames(OUTCOMES), recipe())
    assert list(table.columns) == COLUMNS
    assert list(zip(table["run"], table["temperature"], strict=True)) == [
        ("sft", 0.0),
        ("sft", 1.0),
        ("dpo", 0.25),
        ("dpo", 1.0),
        ("best_of_128", 0.0),
        ("best_of_128", 1.0),
    ]
    dpo = row(table, "dpo", 0.25)
    assert [dpo[c] for c in ("n", "wins", "losses", "ties", "invalid")] == [8, 3, 1, 2, 2]
    assert dpo["win_rate"] == pytest.approx((3 + 2 / 2) / 6)
    assert dpo["ci_low"] < dpo["win_rate"] < dpo["ci_high"]
    assert dpo["mean_tokens"] == pytest.approx(13.5)  # 10 .. 17
    assert dpo["reference_mean_tokens"] == 20
    assert dpo["well_formed"] == 0.5
    sft = row(table, "sft", 1.0)
    assert (sft["ci_low"], sft["ci_high"]) == pytest.approx(proportion_confint(2, 8, method="wilson"))


def test_what_else_stands_beside_a_win_rate() -> None:
    dpo = row(win_rate_table(*make_frames(OUTCOMES), recipe()), "dpo", 0.25)
    # wwwttlii: the two invalid ones are losses, or wins.
    assert (dpo["if_invalid_lose"], dpo["if_invalid_win"]) == (4 / 8, 6 / 8)
    assert dpo["first_position_rate"] == 3 / 4  # of three wins and a loss, the policy is always shown first
    assert math.isnan(dpo["flip_rate"])
    assert dpo["cost_usd"] == 8 * 0.25
    # 10 to 17 tokens against 20: every completion is the shorter one.
    assert (dpo["n_longer"], dpo["n_shorter"]) == (0, 6)
    assert dpo["shorter_win_rate"] == dpo["win_rate"] and math.isnan(dpo["longer_win_rate"])
    # So nothing is known of equal length.
    assert math.isnan(dpo["length_controlled_win_rate"])
    assert dpo["band_low"] < dpo["ci_low"] + 0.05 and dpo["band_high"] >= dpo["win_rate"]


def test_bands_are_over_prompts_that_are_valid_at_every_temperature() -> None:
    rows = {0.0: ("wwww", "wwwwwwww"), 0.5: ("wwww", "wwwwllli"), 1.0: ("wwww", "llllllwl")}
    verdicts, samples = make_frames({"dpo": rows})
    table = win_rate_table(verdicts, samples, recipe(runs=("dpo",)))
    # The last prompt is invalid at 0.5 and left out of all three.
    scores = np.array([[1, 1, 0]] * 4 + [[1, 0, 0]] * 2 + [[1, 0, 1]], dtype=float)
    means, widths = scores.mean(axis=0), simultaneous_half_widths(scores, 0.95, seed=1)
    assert table["band_low"].tolist() == pytest.approx(np.clip(means - widths, 0, 1).tolist())
    assert table["band_high"].tolist() == pytest.approx(np.clip(means + widths, 0, 1).tolist())
    assert table["band_high"].iloc[0] == 1.0 and 0 <= table["band_low"].iloc[2] < 1 / 7
    never = win_rate_table(*make_frames({"dpo": {0.0: ("w", "i"), 0.5: ("w", "w")}}), recipe(runs=("dpo",)))
    assert never["band_low"].isna().all() and never["band_high"].isna().all()


def test_order_figures_by_hand() -> None:
    verdicts, samples = make_frames({"dpo": {1.0: ("w", "wwlt")}})
    test = verdicts["split"] == "test"
    verdicts.loc[test, "decided"] = [2, 2, 1, 0]
    verdicts.loc[test, "first_wins"] = [1, 2, 0, 0]
    verdicts.loc[test, "flipped"] = [True, False, False, None]
    (only,) = win_rate_table(verdicts, samples, recipe(runs=("dpo",))).to_dict("records")
    assert (only["first_position_rate"], only["flip_rate"]) == (3 / 5, pytest.approx(1 / 3))
    verdicts.loc[test, ["decided", "first_wins"]] = 0
    (none,) = win_rate_table(verdicts, samples, recipe(runs=("dpo",))).to_dict("records")
    assert math.isnan(none["first_position_rate"])


def test_the_length_controlled_rate_stands_where_both_lengths_are_there() -> None:
    verdicts, samples = make_frames(OUTCOMES)
    verdicts["reference_tokens"] = 14
    table = win_rate_table(verdicts, samples, recipe())
    # 10 to 17 tokens against 14: two and a half wins of four among the shorter, one and a half of three of the longer.
    dpo = row(table, "dpo", 0.25)
    assert (dpo["n_shorter"], dpo["n_longer"]) == (4, 1)
    assert dpo["shorter_win_rate"] == pytest.approx(3.5 / 4) and dpo["longer_win_rate"] == 0
    expected = length_controlled_rate([1, 1, 1, 0.5, 0.5, 0], [-4, -3, -2, -1, 0, 1])
    assert dpo["length_controlled_win_rate"] == pytest.approx(expected) and 0 < expected < 0.5
    assert row(table, "dpo", 1.0)["length_controlled_win_rate"] == pytest.approx(0.899, abs=1e-3)


def test_one_temperature_needs_no_validation() -> None:
    verdicts, samples = make_frames({"dpo": {0.5: ("", "wwll")}})
    assert select_temperatures(verdicts) == {"dpo": 0.5}
    assert win_rate_table(verdicts, samples, recipe(runs=("dpo",)))["selected"].tolist() == [True]


def test_a_chat_judges_figures_are_those_of_all_methods(tmp_path: Path) -> None:
    facts = {
        **{
            "judge": "chat:m/tldr_simple@0",
            "template": {"name": "tldr_simple", "sha256": "0"},
            "served_models": ["m-1"],
        },
        **{"cost_usd": 0.5, "repeated": 4, "repeated_agree": 3},
    }
    win_rates.run(arguments(make_files(tmp_path, OUTCOMES, **facts), tmp_path, as_json(judge={"kind": "chat"})))
    assert set(pd.read_csv(tmp_path / "out.csv")["self_agreement"]) == {0.75}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["cost_usd"], manifest["repeated"], manifest["served_models"]) == (1.5, 12, ["m-1"])
    assert manifest["template"]["name"] == "tldr_simple"


def test_all_win_rows_have_an_interval() -> None:
    always = row(win_rate_table(*make_frames(OUTCOMES), recipe()), "dpo", 1.0)
    assert always["win_rate"] == 1.0
    assert (always["ci_low"], always["ci_high"]) == pytest.approx(proportion_confint(8, 8, method="wilson"))


def test_the_temperature_is_chosen_on_validation_prompts() -> None:
    verdicts, samples = make_frames(OUTCOMES)
    table = win_rate_table(verdicts, samples, recipe())
    chosen = table[table["selected"]].set_index("run")["temperature"].to_dict()
    assert chosen == {"sft": 0.0, "dpo": 0.25, "best_of_128": 1.0}
    # Turning every test verdict round changes nothing of it.
    turned = verdicts.copy()
    test = turned["split"] == "test"
    turned.loc[test, "outcome"] = turned.loc[test, "outcome"].replace({"win": "loss", "loss": "win"})
    assert select_temperatures(turned) == chosen


def test_equal_validation_win_rates_choose_the_lower_temperature() -> None:
    verdicts, _ = make_frames({"dpo": {0.75: ("wl", "w"), 0.5: ("lw", "l"), 0.25: ("ii", "w")}})
    assert select_temperatures(verdicts) == {"dpo": 0.5}


def test_kl_and_its_bound() -> None:
    table = win_rate_table(*make_frames(OUTCOMES), recipe())
    # logp - reference_logp is -10 + 10.5 + i over i = 0 .. 7 at a temperature, 0 + 10.5 + i at temperature 0.
    assert row(table, "dpo", 1.0)["kl_to_reference"] == pytest.approx(4.0)
    assert row(table, "sft", 0.0)["kl_to_reference"] == pytest.approx(14.0)
    assert row(table, "best_of_128", 0.0)["kl_to_reference"] == pytest.approx(14.0)
    bound = math.log(128) - 127 / 128
    assert bound == pytest.approx(3.8598428)
    assert row(table, "best_of_128", 1.0)["kl_to_reference"] == pytest.approx(4.0 + bound)
    assert best_of_n_bound(1, 1.0) == 0.0
    assert best_of_n_bound(None, 1.0) == 0.0


def test_an_unknown_reference_logp_leaves_the_kl_empty() -> None:
    verdicts, samples = make_frames(OUTCOMES)
    samples.loc[samples["run"] == "sft", "reference_logp"] = float("nan")
    table = win_rate_table(verdicts, samples, recipe())
    assert math.isnan(row(table, "sft", 1.0)["kl_to_reference"])
    assert not math.isnan(row(table, "dpo", 1.0)["kl_to_reference"])


def test_several_samples_a_prompt_are_one_cluster() -> None:
    verdicts, samples = make_frames({"dpo": {1.0: ("w", "wlwlwlwl")}})
    four = pd.concat([verdicts.assign(sample_index=i) for i in range(4)])
    table = win_rate_table(four, pd.concat([samples.assign(sample_index=i) for i in range(4)]), recipe(runs=("dpo",)))
    assert table["n"].item() == 32
    expected = proportion_confint(4, 8, method="wilson")
    assert (table["ci_low"].item(), table["ci_high"].item()) == pytest.approx(expected)


def test_all_invalid_has_no_win_rate() -> None:
    table = win_rate_table(*make_frames({"dpo": {1.0: ("w", "iii")}}), recipe(runs=("dpo",)))
    assert table["invalid"].item() == 3
    assert math.isnan(table["win_rate"].item())
    assert math.isnan(table["ci_low"].item())


def test_rows_on_other_test_prompts_are_refused() -> None:
    verdicts, samples = make_frames(OUTCOMES)
    lacking = verdicts[
        ~((verdicts["run"] == "dpo") & (verdicts["prompt_id"] == "test-3") & (verdicts["temperature"] == 1))
    ]
    with pytest.raises(UserError, match=r"'dpo' at temperature 1.0 lacks the test prompt 'test-3'"):
        win_rate_table(lacking, samples, recipe())


def test_missing_and_surplus_methods_are_refused() -> None:
    verdicts, samples = make_frames(OUTCOMES)
    with pytest.raises(UserError, match="'ppo' is missing among the verdicts"):
        win_rate_table(verdicts, samples, recipe(runs=("sft", "dpo", "best_of_128", "ppo")))
    with pytest.raises(UserError, match="'dpo' is missing among the runs"):
        win_rate_table(verdicts, samples, recipe(runs=("sft", "best_of_128")))


def test_a_verdict_without_a_sample_is_refused() -> None:
    verdicts, samples = make_frames(OUTCOMES)
    with pytest.raises(UserError, match="has no sample"):
        win_rate_table(verdicts, samples[samples["prompt_id"] != "test-0"], recipe())


def test_no_validation_verdicts_no_selection() -> None:
    verdicts, _ = make_frames(OUTCOMES)
    with pytest.raises(UserError, match="validation_prompts"):
        select_temperatures(verdicts[verdicts["split"] == "test"])


def test_paired_comparisons() -> None:
    verdicts, samples = make_frames(OUTCOMES)
    comparisons = comparison_table(verdicts, win_rate_table(verdicts, samples, recipe()), recipe())
    pairs = list(zip(comparisons["run"], comparisons["opponent"], strict=True))
    assert pairs == [("dpo", "sft"), ("best_of_128", "sft"), ("best_of_128", "dpo")]
    # dpo at 0.25: wwwttlii, sft at 0: wlllllll; the two invalid prompts are in neither mean.
    first = comparisons.iloc[0]
    assert (first["temperature"], first["opponent_temperature"], first["n"]) == (0.25, 0.0, 6)
    assert first["win_rate"] == pytest.approx(4 / 6)
    assert first["opponent_win_rate"] == pytest.approx(1 / 6)
    assert first["difference"] == pytest.approx(0.5)
    assert first["ci_low"] < 0.5 < first["ci_high"]
    # Differences 0, 1, 1, 1/2, 1/2, 0: of 2^4 equally likely signs two reach a sum of 3 on either side.
    assert first["p"] == pytest.approx(2 / 16)
    # Holm: the smallest p times three, the next times two, the largest once, and never falling.
    ordered = comparisons.sort_values("p")
    expected = [min(1.0, p * k) for p, k in zip(ordered["p"], (3, 2, 1), strict=True)]
    assert ordered["p_holm"].tolist() == pytest.approx([max(expected[: i + 1]) for i in range(3)])
    assert comparisons["opponent_temperature"].tolist() == [0.0, 0.0, 0.25]
    assert comparisons.loc[1, "difference"] == 3 / 8 - 1 / 8 and comparisons.loc[1, "n"] == 8


def test_every_column_of_a_comparison() -> None:
    verdicts, samples = make_frames(OUTCOMES)
    made = recipe(confidence=0.8, seed=6)
    comparisons = comparison_table(verdicts, win_rate_table(verdicts, samples, made), made)
    # dpo at 0.25 against sft at 0, on the prompts whose verdicts are valid: wwwttl and wlllll.
    found = paired_difference([1, 1, 1, 0.5, 0.5, 0], [1, 0, 0, 0, 0, 0], 0.8, seed=6)
    assert comparisons.iloc[0].to_dict() == pytest.approx(
        {
            **{"task": "tldr", "run": "dpo", "temperature": 0.25, "opponent": "sft", "opponent_temperature": 0.0},
            **{"n": 6, "win_rate": 4 / 6, "opponent_win_rate": 1 / 6, "difference": 0.5, "p": found.p},
            **{"ci_low": found.interval.low, "ci_high": found.interval.high, "p_holm": comparisons["p_holm"].iloc[0]},
            **{"judge": "oracle:embedded-v1", "seeds": 1, "by_one_seed": False},
        }
    )


def test_comparisons_without_a_common_prompt_have_no_p_and_are_not_counted_by_holm() -> None:
    outcomes = {"sft": {0.0: ("w", "iwwwww")}, "preferred_ft": {0.0: ("w", "wiiiii")}, "dpo": {0.0: ("w", "wlllll")}}
    verdicts, samples = make_frames(outcomes)
    made = recipe(runs=tuple(outcomes))
    comparisons = comparison_table(verdicts, win_rate_table(verdicts, samples, made), made)
    pairs = list(zip(comparisons["run"], comparisons["opponent"], strict=True))
    # Each two are compared once, the later of the methods with the earlier opponent.
    assert pairs == [("preferred_ft", "sft"), ("dpo", "sft"), ("dpo", "preferred_ft")]
    assert comparisons["n"].tolist() == [0, 5, 1]
    assert comparisons["p"].isna().tolist() == comparisons["p_holm"].isna().tolist() == [True, False, False]
    # All five differences are -1: of 2^5 signs two are as extreme. One prompt proves nothing.
    assert comparisons["p"].tolist()[1:] == [2 / 32, 1.0] and comparisons["p_holm"].tolist()[1:] == [2 * 2 / 32, 1.0]
    alone = recipe(runs=("sft",))
    nothing = comparison_table(verdicts, win_rate_table(*make_frames({"sft": outcomes["sft"]}), alone), alone)
    # A table of no rows has a head, without which it is no CSV.
    assert nothing.empty and list(nothing.columns) == list(comparisons.columns) == COMPARISON_COLUMNS


def test_bands_and_intervals_have_the_confidence_and_the_seed_of_the_recipe() -> None:
    rows = {0.0: ("w", "wlwlwlwwtl"), 1.0: ("w", "llwltwlwwl")}
    verdicts, samples = make_frames({"dpo": rows})
    table = win_rate_table(verdicts, samples, recipe(runs=("dpo",), confidence=0.7, seed=9))
    scores = np.array(
        [[{"w": 1.0, "t": 0.5, "l": 0.0}[c] for c in pair] for pair in zip("wlwlwlwwtl", "llwltwlwwl", strict=True)]
    )
    widths = simultaneous_half_widths(scores, 0.7, seed=9)
    assert table["band_low"].tolist() == pytest.approx((scores.mean(axis=0) - widths).tolist())
    assert table["band_high"].tolist() == pytest.approx((scores.mean(axis=0) + widths).tolist())
    intervals = [score_interval(column.tolist(), confidence=0.7) for column in scores.T]
    assert table["ci_low"].tolist() == pytest.approx([i.low for i in intervals])
    assert table["ci_high"].tolist() == pytest.approx([i.high for i in intervals])
    assert (
        set(table["task"]) == {"tldr"} and set(table["judge"]) == {"oracle:embedded-v1"} and set(table["seed"]) == {9}
    )


def test_verdicts_that_cannot_stand_in_the_table_are_named() -> None:
    verdicts, samples = make_frames(OUTCOMES)
    odd = verdicts.assign(outcome=verdicts["outcome"].replace({"tie": "draw"}))
    with pytest.raises(UserError, match="The verdicts hold the outcome 'draw'"):
        win_rate_table(odd, samples, recipe())
    with pytest.raises(UserError, match="No verdict is on a test prompt"):
        win_rate_table(verdicts[verdicts["split"] != "test"], samples, recipe())
    untested = verdicts[(verdicts["run"] != "dpo") | (verdicts["split"] != "test")]
    with pytest.raises(UserError, match="The run 'dpo' has no verdict on a test prompt"):
        win_rate_table(untested, samples, recipe())
    few = verdicts[(verdicts["run"] != "dpo") | ~verdicts["prompt_id"].isin(["test-3", "test-5"])]
    with pytest.raises(UserError, match=r"'dpo' at temperature 0\.25 lacks the test prompt 'test-3' and 1 more that"):
        win_rate_table(few, samples, recipe())


def arguments(files: dict[str, list[str]], folder: Path, text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    win_rates.add_arguments(parser)
    return parser.parse_args(
        [
            *("--verdicts", *files["verdicts"], "--samples", *files["samples"], "--summary", *files["summary"]),
            *("--recipe", text, "--out", str(folder / "out.csv"), "--by-seed", str(folder / "by_seed.csv")),
            *("--comparisons", str(folder / "pairs.csv"), "--manifest", str(folder / "manifest.json")),
        ]
    )


def as_json(**changes: Any) -> str:
    made = recipe(**changes)
    return json.dumps(made.__dict__)


def test_the_stage_writes_table_comparisons_and_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    win_rates.run(arguments(make_files(tmp_path, OUTCOMES), tmp_path, as_json()))
    table = pd.read_csv(tmp_path / "out.csv")
    assert list(table.columns) == [*COLUMNS[:-1], "seeds", "between_seed_sd", *JUDGE_COLUMNS]
    assert table["seeds"].tolist() == [1] * 6 and table["between_seed_sd"].isna().all()
    by_seed = pd.read_csv(tmp_path / "by_seed.csv")
    assert list(by_seed.columns) == COLUMNS + JUDGE_COLUMNS and by_seed["seed"].tolist() == [0] * 6
    pd.testing.assert_frame_equal(by_seed[COLUMNS[:-1]], table[COLUMNS[:-1]])
    assert len(table) == 6
    assert table["selected"].tolist() == [True, False, True, False, False, True]
    assert table[JUDGE_COLUMNS].isna().all().all()
    assert len(pd.read_csv(tmp_path / "pairs.csv")) == 3
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["judge"] == "oracle:embedded-v1"
    assert manifest["judge_seeds"] == [3]
    assert (manifest["test_prompts"], manifest["validation_prompts"]) == (8, 4)
    assert manifest["synthetic"] is True
    assert manifest["note"].startswith(
        "Synthetic: a program wrote the posts, references, preferences, and no person was"
    )
    # Eight prompts look as neat as a real result, and so do texts that a method always repeats.
    few = "Only 8 test prompts: this tries the machinery and is no result."
    assert (manifest["warnings"], manifest["data_warnings"]) == ([few], ["many were lost."])
    assert few in caplog.text and "many were lost." in caplog.text
    assert manifest["kl_to_reference"]["rows_that_are_bounds"] == [{"run": "best_of_128", "temperature": 1.0}]
    assert manifest["selection"]["temperatures"] == {"sft": 0.0, "dpo": 0.25, "best_of_128": 1.0}
    assert set(manifest["inputs"]["samples"]) == {"sft.parquet", "dpo.parquet", "best_of_128.parquet"}


def test_the_manifest_says_what_the_table_was_made_of(tmp_path: Path) -> None:
    made = make_files(tmp_path, OUTCOMES)
    win_rates.run(arguments(made, tmp_path, as_json()))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    summary = sha256((tmp_path / "summary.json").read_bytes()).hexdigest()
    hashes = {
        kind: {Path(path).name: read_manifest(path)["content_hash"] for path in made[kind]}
        for kind in ("verdicts", "samples")
    }
    assert manifest["inputs"] == {**hashes, "summary": summary}
    assert manifest["recipe"] == json.loads(as_json()) and (manifest["task"], manifest["seeds"]) == ("tldr", [0])
    # The policy is shown first in all verdicts; 15 wins of 40 decided of 60, validation among them.
    letters = "".join(rows for of_method in OUTCOMES.values() for pair in of_method.values() for rows in pair)
    assert manifest["first_shown_wins"] == pytest.approx(letters.count("w") / (letters.count("w") + letters.count("l")))
    assert sorted(manifest) == sorted(
        [
            *(
                "task",
                "judge",
                *("title", "reference", "written"),
                "synthetic",
                "note",
                "warnings",
                "data_warnings",
                "seeds",
                "judge_seeds",
                "test_prompts",
            ),
            *("validation_prompts", "first_shown_wins", "selection", "win_rate", "order", "length", "comparisons"),
            *("kl_to_reference", "recipe", "inputs"),
        ]
    )
    assert sorted(manifest["selection"]) == ["rule", "temperatures"]
    assert sorted(manifest["kl_to_reference"]) == ["bound", "definition", "rows_that_are_bounds"]
    for key, said in (("win_rate", "Wilson"), ("order", "flip_rate"), ("length", "Firth"), ("comparisons", "BCa")):
        assert said in manifest[key]
    assert "Nats per completion" in manifest["kl_to_reference"]["definition"]
    assert "log N - (N-1)/N" in manifest["kl_to_reference"]["bound"] and "validation" in manifest["selection"]["rule"]
    # Real records, ties alone, and no validation prompt.
    (tmp_path / "summary.json").write_text(json.dumps({**words("tldr"), "synthetic": False}))
    ties = make_files(tmp_path / "ties", {"sft": {0.0: ("", "tt")}})
    win_rates.run(arguments({**ties, "summary": made["summary"]}, tmp_path, as_json(runs=("sft",))))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["synthetic"] is False and "note" not in manifest and manifest["data_warnings"] == []
    assert manifest["first_shown_wins"] is None and manifest["validation_prompts"] == 0


def test_a_chat_judge_that_repeated_nothing_has_no_self_agreement(tmp_path: Path) -> None:
    facts = {
        **{"judge": "chat:m", "template": {"name": "t"}, "served_models": ["m-2", "m-1"]},
        **{"cost_usd": 0.5, "repeated": 0, "repeated_agree": 0},
    }
    win_rates.run(arguments(make_files(tmp_path, OUTCOMES, **facts), tmp_path, as_json(judge={"kind": "chat"})))
    assert pd.read_csv(tmp_path / "out.csv")["self_agreement"].isna().all()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["self_agreement"] is None and manifest["served_models"] == ["m-1", "m-2"]
    # A judge of no kind that the recipe names is taken as it is.
    win_rates.run(arguments(make_files(tmp_path, OUTCOMES), tmp_path, as_json(judge={})))


def test_a_reward_models_accuracy_stands_beside_every_win_rate(tmp_path: Path) -> None:
    facts = {
        "judge": "reward_model:0123456789ab",
        "judge_accuracy": 0.52,
        "judge_accuracy_low": 0.45,
        "judge_accuracy_high": 0.59,
        "longer_wins_accuracy": 0.6,
        "n_held_out": 200,
        "n_needed": 3000,
        "interpretable": False,
    }
    made = make_files(tmp_path, OUTCOMES, **facts)
    win_rates.run(arguments(made, tmp_path, as_json(judge={"kind": "reward_model"})))
    table = pd.read_csv(tmp_path / "out.csv")
    assert set(table["judge_accuracy"]) == {0.52}
    assert not table["interpretable"].any()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["n_held_out"], manifest["n_needed"]) == (200, 3000)
    with pytest.raises(UserError, match="the config says 'oracle'"):
        win_rates.run(arguments(made, tmp_path, as_json()))


def test_two_judges_do_not_go_into_one_table(tmp_path: Path) -> None:
    one = make_files(tmp_path, {"sft": OUTCOMES["sft"]})
    other = make_files(tmp_path, {"dpo": OUTCOMES["dpo"]}, judge="oracle:embedded-v2")
    both = {key: one[key] + other[key] for key in ("verdicts", "samples")} | {"summary": one["summary"]}
    with pytest.raises(UserError, match="two judges"):
        win_rates.run(arguments(both, tmp_path, as_json(runs=("sft", "dpo"))))


def test_verdicts_on_other_samples_are_refused(tmp_path: Path) -> None:
    made = make_files(tmp_path, OUTCOMES, inputs={"samples": "0" * 64})
    with pytest.raises(UserError, match="other samples"):
        win_rates.run(arguments(made, tmp_path, as_json()))
    assert not (tmp_path / "out.csv").exists()


def test_best_of_n_bound_against_enumeration() -> None:
    """On a four-point uniform distribution with distinct rewards the exact KL stays below the bound."""
    n, points = 3, 4
    counts = [0] * points
    for draw in itertools.product(range(points), repeat=n):
        counts[max(draw)] += 1
    kl = sum(c / points**n * math.log(c / points**n * points) for c in counts)
    assert best_of_n_bound(3, 1.0) == pytest.approx(math.log(3) - 2 / 3)
    assert 0 < kl <= best_of_n_bound(3, 1.0)


SEEDS = {
    0: {"sft": {0.0: ("wl", "wwllll")}, "dpo": {0.0: ("wl", "wwwlll"), 1.0: ("ww", "wwwwli")}},
    5: {"sft": {0.0: ("wl", "wlllll")}, "dpo": {0.0: ("wl", "wwwwll"), 1.0: ("wl", "wwwwtw")}},
    7: {"sft": {0.0: ("wl", "wwllll")}, "dpo": {0.0: ("wl", "wwwwll"), 1.0: ("wl", "wwwwlw")}},
}


def of_seeds(outcomes: dict[int, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    frames = [(seed, *make_frames(runs)) for seed, runs in outcomes.items()]
    return tuple(pd.concat([each[i].assign(seed=each[0]) for each in frames], ignore_index=True) for i in (1, 2))  # type: ignore[return-value]


def test_a_table_over_seeds_by_hand() -> None:
    verdicts, samples = of_seeds(SEEDS)
    made = recipe(runs=("sft", "dpo"), seeds=(0, 5, 7))
    selected = select_temperatures(verdicts)
    assert selected == {"sft": 0.0, "dpo": 1.0}, "the validation prompts of all seeds count together"
    tables = [
        win_rate_table(verdicts[verdicts["seed"] == seed], samples[samples["seed"] == seed], made, selected).assign(
            seed=seed
        )
        for seed in SEEDS
    ]
    table = win_rates.table_over_seeds(pd.concat(tables), verdicts, made)
    assert list(table.columns) == [*COLUMNS[:-1], "seeds", "between_seed_sd"]
    assert table[["run", "temperature", "selected", "seeds"]].to_numpy().tolist() == [
        *(["sft", 0.0, True, 3], ["dpo", 0.0, False, 3], ["dpo", 1.0, True, 3])
    ]
    dpo = table.iloc[2]
    assert (dpo["n"], dpo["wins"], dpo["losses"], dpo["ties"], dpo["invalid"]) == (18, 14, 2, 1, 1)
    rates = [4 / 5, 5.5 / 6, 5 / 6]
    assert dpo["win_rate"] == pytest.approx(np.mean(rates)) and table.loc[0, "between_seed_sd"] == pytest.approx(
        1 / 6 / 3**0.5
    )
    # The last prompt has no valid verdict of the first seed.
    scores = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0.5], [1, 1, 1, 1, 0]])
    expected = crossed_mean(scores, 0.95, 0.0, 1.0).interval
    assert (dpo["ci_low"], dpo["ci_high"]) == pytest.approx((expected.low, expected.high))
    band = crossed_mean(scores, 0.975, 0.0, 1.0).interval
    assert (dpo["band_low"], dpo["band_high"]) == pytest.approx((band.low, band.high))


def test_a_difference_over_seeds_is_paired_over_prompts_within_each() -> None:
    verdicts, samples = of_seeds(SEEDS)
    made = recipe(runs=("sft", "dpo"), seeds=(0, 5, 7), opponents=("sft",))
    table = win_rate_table(
        verdicts[verdicts["seed"] == 0], samples[samples["seed"] == 0], made, {"sft": 0.0, "dpo": 1.0}
    )
    (found,) = comparison_table(verdicts, table, made).to_dict("records")
    differences = np.array([[0, 0, 1, 1, 0], [0, 1, 1, 1, 0.5], [0, 0, 1, 1, 0]])
    expected = crossed_mean(differences, 0.95, -1.0, 1.0)
    assert (found["n"], found["seeds"], found["by_one_seed"]) == (5, 3, False)
    assert found["difference"] == pytest.approx(differences.mean()) and found["p"] == pytest.approx(expected.p)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((expected.interval.low, expected.interval.high))


def test_a_difference_that_one_seed_carries_is_marked() -> None:
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([(0, 1, 2), range(64)], names=["seed", "prompt_id"])
    noise = rng.choice([-1.0, 0.0, 1.0], size=(3, 64), p=[0.2, 0.6, 0.2])
    noise -= noise.mean(axis=1, keepdims=True)
    made, found = recipe(seeds=(0, 1, 2)), {"difference": 0.2, "ci_low": 0.1, "ci_high": 0.3}

    def marked(gains: tuple[float, float, float], result: dict[str, float] = found) -> bool:
        return win_rates._by_one_seed(pd.Series((noise + np.array(gains)[:, None]).ravel(), index), result, made)

    assert marked((0.6, 0.0, 0.0)) and not marked((0.2, 0.2, 0.2)) and not marked((0.3, 0.1, 0.2))
    assert not marked((0.6, 0.0, 0.0), {**found, "ci_low": -0.1}), "nothing is found"
    assert marked((-0.6, 0.0, 0.0), {"difference": -0.2, "ci_low": -0.3, "ci_high": -0.1})


def test_the_stage_takes_the_tables_seed_by_seed(tmp_path: Path) -> None:
    files: dict[str, list[str]] = {"verdicts": [], "samples": []}
    for seed, outcomes in SEEDS.items():
        (tmp_path / str(seed)).mkdir()
        made = make_files(tmp_path / str(seed), outcomes)
        files["verdicts"] += made["verdicts"]
        files["samples"] += made["samples"]
    files["summary"] = made["summary"]
    win_rates.run(arguments(files, tmp_path, as_json(runs=("sft", "dpo"), seeds=(0, 5, 7))))
    by_seed = pd.read_csv(tmp_path / "by_seed.csv")
    assert by_seed[["seed", "run", "temperature"]].to_numpy().tolist()[:4] == [
        *([0, "sft", 0.0], [0, "dpo", 0.0], [0, "dpo", 1.0], [5, "sft", 0.0])
    ]
    assert pd.read_csv(tmp_path / "out.csv")["seeds"].tolist() == [3, 3, 3]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["seeds"] == [0, 5, 7] and manifest["win_rate"].startswith("The mean over seeds")
    assert list(manifest["inputs"]["verdicts"]["seed_5"]) == ["dpo.parquet", "sft.parquet"]
    files["verdicts"].pop()
    with pytest.raises(UserError, match="5 tables are given, the recipe names 3 seeds of 2 runs"):
        win_rates.run(arguments(files, tmp_path, as_json(runs=("sft", "dpo"), seeds=(0, 5, 7))))
