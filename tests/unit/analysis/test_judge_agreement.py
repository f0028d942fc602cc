from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from made_up import make_files
from prefopt.analysis import human_agreement, judge_agreement
from prefopt.analysis.human_agreement import HumanAgreementRecipe, human_agreement_table
from prefopt.analysis.judge_statistics import _firth_logit, agreement, kappa_of, length_controlled_rate
from prefopt.analysis.statistics import score_interval, simultaneous_half_widths
from prefopt.analysis.verdicts import settle
from prefopt.errors import UserError
from prefopt.store.tables import read_table, write_table


def test_kappa_by_hand() -> None:
    # 20 of 50 yes-yes, 15 no-no: agreement 0.7, chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    assert kappa_of(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)
    assert kappa_of(np.array([[5, 0], [0, 5]])) == 1.0
    assert math.isnan(kappa_of(np.array([[9, 0], [0, 0]])))


def test_agreement_of_two_judges() -> None:
    first = ["win"] * 25 + ["loss"] * 25
    second = ["win"] * 20 + ["loss"] * 5 + ["win"] * 10 + ["loss"] * 15
    found = agreement(first, second, list(range(50)), 0.95, seed=0)
    assert (found.n, found.rate, found.kappa) == (50, 0.7, pytest.approx(0.4))
    assert found.rate_interval.low < 0.7 < found.rate_interval.high
    assert found.kappa_interval.low < 0.4 < found.kappa_interval.high
    # Each pair four times over is no more evidence.
    four = agreement(first * 4, second * 4, list(range(50)) * 4, 0.95, seed=0)
    assert four.rate_interval.low == pytest.approx(found.rate_interval.low, abs=0.01)
    nothing = agreement([], [], [], 0.95, seed=0)
    ends = [end for i in (nothing.rate_interval, nothing.kappa_interval) for end in (i.low, i.high)]
    assert nothing.n == 0 and all(map(math.isnan, [nothing.rate, nothing.kappa, *ends]))
    # Of one same thing nothing is left to agree on, in no resample either.
    same = agreement(["win"] * 4, ["win"] * 4, [1, 2, 3, 4], 0.95, seed=0)
    assert (same.n, same.rate) == (4, 1.0) and math.isnan(same.kappa)
    assert math.isnan(same.kappa_interval.low) and math.isnan(same.kappa_interval.high)


def test_the_interval_of_kappa_is_the_bootstrap_over_clusters() -> None:
    """Against the same resamples, taken one by one: all pairs of a drawn prompt count, as often as it is drawn."""
    first = ["win", "loss", "win", "tie", "loss", "win", "win", "loss"]
    second = ["win", "loss", "loss", "tie", "win", "win", "loss", "loss"]
    clusters = ["a", "a", "b", "b", "c", "d", "e", "e"]
    found = agreement(first, second, clusters, 0.8, seed=3, resamples=200)
    drawn = np.random.default_rng(3).multinomial(5, np.full(5, 0.2), size=200)
    kappas = []
    for counts in drawn:
        weight = dict(zip("abcde", counts, strict=True))
        pairs = [(x, y) for x, y, name in zip(first, second, clusters, strict=True) for _ in range(weight[name])]
        n = len(pairs)
        observed = sum(x == y for x, y in pairs) / n
        chance = sum(
            sum(x == label for x, _ in pairs) * sum(y == label for _, y in pairs) for label in ("win", "loss", "tie")
        )
        if chance != n**2:
            kappas.append((observed - chance / n**2) / (1 - chance / n**2))
    low, high = np.quantile(kappas, [0.1, 0.9])
    assert (found.kappa_interval.low, found.kappa_interval.high) == pytest.approx((low, high))
    assert (found.n, found.rate) == (8, 5 / 8)


def test_the_length_controlled_rate() -> None:
    rng = np.random.default_rng(0)
    difference = rng.normal(5, 10, 4000)
    chance = 1 / (1 + np.exp(-(-0.5 + 1.5 * np.tanh(difference / difference.std()))))
    scores = (rng.random(4000) < chance).astype(float)
    # The true rate at equal length is sigma(-0.5) = 0.378; the longer texts lift the plain one.
    assert length_controlled_rate(scores.tolist(), difference.tolist()) == pytest.approx(0.378, abs=0.02)
    assert scores.mean() > 0.44
    # Length decides every verdict: nothing is left at equal length.
    assert length_controlled_rate([1, 1, 0, 0], [3, 2, -2, -3]) == pytest.approx(0.5, abs=1e-6)
    # No difference in length: the plain rate, with half a win and half a loss more.
    assert length_controlled_rate([1, 1, 1, 0], [0, 0, 0, 0]) == pytest.approx(3.5 / 5, abs=1e-6)
    assert length_controlled_rate([1, 0.5, 0], [0, 0, 0]) == pytest.approx(0.5, abs=1e-6)
    assert math.isnan(length_controlled_rate([], []))


def test_equal_length_is_not_extrapolated() -> None:
    lost = [0.0] * 8
    assert math.isnan(length_controlled_rate(lost, [-3, -4, -5, -6, -7, -8, -9, -10]))
    assert math.isnan(length_controlled_rate(lost, [2] * 8)) and math.isnan(length_controlled_rate([1], [-1]))
    # With something at equal length, or on the other side, a method that lost all of eight is no winner.
    assert length_controlled_rate(lost, [-3, -4, -5, -6, -7, -8, -9, 0]) < 0.25
    assert length_controlled_rate(lost, [-3, -4, -5, -6, 5, 6, 7, 8]) == pytest.approx(0.10009, abs=1e-4)
    assert length_controlled_rate([1.0] * 8, [-3, -4, -5, -6, 5, 6, 7, 8]) == pytest.approx(0.89991, abs=1e-4)


def test_firths_estimate_by_hand() -> None:
    """A design of two groups: each has its own rate, with half a win and half a loss more (a saturated model)."""
    design = np.array([[1.0, 0.0]] * 4 + [[1.0, 1.0]] * 6)
    scores = np.array([1.0, 0, 0, 0] + [1.0] * 6)
    b0, b1 = _firth_logit(design, scores)
    assert b0 == pytest.approx(math.log(1.5 / 3.5), abs=1e-5)
    assert b0 + b1 == pytest.approx(math.log(6.5 / 0.5), abs=1e-5)


@pytest.mark.parametrize(
    ("mean", "intercept", "slope", "raw"),
    [
        (15.0, 0.0, 2.0, 0.866),  # the case of the issue: at equal length one half, and nearly all are longer
        (8.0, 0.0, 3.0, 0.84),
        (8.0, -1.0, 3.0, 0.72),
        (-10.0, 0.5, 2.0, 0.26),
        (0.0, 1.0, 2.0, 0.67),
        (8.0, 1.0, 0.0, 0.73),
    ],
)
def test_simulated_judges_of_length_leave_no_bias(mean: float, intercept: float, slope: float, raw: float) -> None:
    """192 comparisons, lengths differing by `mean` with a spread of 6 tokens; 256 judges of known preference."""
    rng = np.random.default_rng(11)
    truth = 1 / (1 + math.exp(-intercept))
    found, plain = [], []
    while len(found) < 256:
        difference = np.rint(rng.normal(mean, 6.0, 192))
        if difference.min() > 0 or difference.max() < 0:
            continue  # the cell is empty
        chance = 1 / (1 + np.exp(-(intercept + slope * np.tanh(difference / difference.std()))))
        scores = (rng.random(192) < chance).astype(float)
        found.append(length_controlled_rate(scores.tolist(), difference.tolist()))
        plain.append(scores.mean())
    assert np.mean(plain) == pytest.approx(raw, abs=0.01)
    # Three standard errors of 256 estimates that spread by up to 0.18, and 0.01 of bias.
    assert np.mean(found) == pytest.approx(truth, abs=3 * np.std(found) / 16 + 0.01)
    assert abs(np.mean(found) - truth) < 0.04


def test_one_column_has_the_band_of_an_interval() -> None:
    scores = np.repeat([1.0, 0.0], [120, 80])[:, None]
    width = simultaneous_half_widths(scores, 0.95, seed=0).item()
    assert width == pytest.approx(1.96 * math.sqrt(0.6 * 0.4 / 200), rel=0.06)
    # Copies of a column add nothing, and a column of equal scores has a width too.
    copies = simultaneous_half_widths(np.hstack([scores] * 5), 0.95, seed=0)
    assert copies == pytest.approx(np.full(5, width))
    assert (simultaneous_half_widths(np.ones((50, 3)), 0.95, seed=0) > 0).all()


def test_settling_two_orders() -> None:
    words = {"w": "win", "l": "loss", "t": "tie", "i": "invalid"}
    cases = {
        "ww": "win",
        "ll": "loss",
        "wl": "tie",
        "lw": "tie",
        "wt": "tie",
        "tt": "tie",
        "wi": "invalid",
        "ii": "invalid",
    }
    rows = [
        {"item_id": pair, "order": order, "winner": "first", "outcome": words[letter], "reply": letter, "cost_usd": 0.5}
        for pair in cases
        for order, letter in zip(("policy_first", "reference_first"), pair, strict=True)
    ]
    settled = settle(pd.DataFrame(rows), ["item_id"]).set_index("item_id")
    assert settled["outcome"].to_dict() == cases
    flipped = settled["flipped"].to_dict()
    assert [flipped[pair] for pair in ("ww", "wl", "lw", "wt", "tt")] == [False, True, True, True, False]
    assert pd.isna(flipped["wi"]) and pd.isna(flipped["ii"])
    assert set(settled["cost_usd"]) == {1.0} and set(settled["decided"]) == {2}
    one = settle(pd.DataFrame(rows[:1]), ["item_id"])
    assert pd.isna(one["flipped"].item()) and one["reply"].item() == "w"


def test_the_table_of_two_judges(tmp_path: Path) -> None:
    main = make_files(tmp_path / "a", {"dpo": {0.0: ("w", "wwll"), 1.0: ("w", "llll")}, "sft": {0.0: ("w", "wlwi")}})
    gold = make_files(tmp_path / "b", {"dpo": {0.0: ("", "wlll")}, "sft": {0.0: ("", "wwww")}}, judge="reward_model:x")
    tables = [["tldr", "main", 0], ["tldr", "main", 0], ["tldr", "gold", 0], ["tldr", "gold", 0]]
    parser = argparse.ArgumentParser()
    judge_agreement.add_arguments(parser)
    recipe = {"tables": tables, "confidence": {"tldr": 0.95}, "seed": 0}
    out = tmp_path / "out.csv"
    arguments = ["--verdicts", *main["verdicts"], *gold["verdicts"], "--out", str(out)]
    judge_agreement.run(parser.parse_args([*arguments, "--recipe", json.dumps(recipe)]))
    table = pd.read_csv(out).set_index("run")
    # Only what both have judged: dpo at 0 on the test prompts w/w w/l l/l l/l, and sft without the invalid one.
    assert table["n"].to_dict() == {"all": 7, "dpo": 4, "sft": 3}
    assert table.at["dpo", "agreement"] == 0.75
    assert table.at["dpo", "kappa"] == pytest.approx((0.75 - 0.5) / 0.5)
    assert table.at["all", "agreement"] == pytest.approx(5 / 7)
    assert (table.at["dpo", "win_rate_a"], table.at["dpo", "win_rate_b"]) == (0.5, 0.25)
    assert table.at["all", "identity_b"] == "reward_model:x"
    ties = ["tie_rate_a", "tie_rate_b"]
    assert set(table.columns) | {"run"} == {
        *("task", "run", "judge_a", "judge_b", "n", "agreement", "ci_low", "ci_high", "kappa", "kappa_low"),
        *("kappa_high", "win_rate_a", "win_rate_b", *ties, "identity_a", "identity_b", "seed"),
    }
    assert set(table["judge_a"]) == {"main"} and set(table["judge_b"]) == {"gold"} and set(table["seed"]) == {0}
    found = agreement(["win", "win", "loss", "loss"], ["win", "loss", "loss", "loss"], range(4), 0.95, seed=0)
    for name, value in (("ci", found.rate_interval), ("kappa", found.kappa_interval)):
        assert table.loc["dpo", [f"{name}_low", f"{name}_high"]].tolist() == pytest.approx(
            [value.low, value.high], abs=1e-5
        )
    assert table.at["dpo", "identity_a"] == "oracle:embedded-v1"
    bad = {**recipe, "tables": tables[:3]}
    with pytest.raises(UserError, match="4 verdict tables are given, the recipe names 3"):
        judge_agreement.run(parser.parse_args([*arguments, "--recipe", json.dumps(bad)]))


def frames(**outcomes: str) -> pd.DataFrame:
    """Settled verdicts of judges of one task, by judge: a letter a prompt, two samples each."""
    words = {"w": "win", "l": "loss", "t": "tie", "i": "invalid"}
    return pd.DataFrame(
        {"task": "tldr", "judge_name": name, "judge": f"{name}:1", "run": "dpo", "prompt_id": f"p{i // 2}"}
        | {"temperature": 0.0, "sample_index": i % 2, "outcome": words[letter]}
        for name, letters in outcomes.items()
        for i, letter in enumerate(letters)
    )


def test_three_judges_are_three_pairs_over_prompts() -> None:
    given = {"main": "wwltlwti", "gold": "wlltwwll", "chat": "wwttliwl"}
    verdicts = frames(**given)
    other = frames(gold="ww", chat="wl").assign(task="hh")
    recipe = judge_agreement.AgreementRecipe(tables=(), confidence={"tldr": 0.8, "hh": 0.99}, seed=5)
    table = judge_agreement.agreement_table(pd.concat([verdicts, other]).assign(training_seed=0), recipe)
    # Of one method there is no row over all.
    assert table[["task", "run", "judge_a", "judge_b", "n"]].to_numpy().tolist() == [
        ["tldr", "dpo", "main", "gold", 7],
        ["tldr", "dpo", "main", "chat", 6],
        ["tldr", "dpo", "gold", "chat", 7],
        ["hh", "dpo", "gold", "chat", 2],
    ]
    words = {"w": "win", "l": "loss", "t": "tie"}
    a, b = ([words[letter] for letter in letters] for letters in ("wwltlwt", "wlltwwl"))
    found = agreement(a, b, ["p0", "p0", "p1", "p1", "p2", "p2", "p3"], 0.8, seed=5)
    assert table.iloc[0].to_dict() == pytest.approx(
        {
            **{"task": "tldr", "run": "dpo", "judge_a": "main", "judge_b": "gold", "n": 7, "agreement": 4 / 7},
            **{"ci_low": found.rate_interval.low, "ci_high": found.rate_interval.high, "kappa": found.kappa},
            **{"kappa_low": found.kappa_interval.low, "kappa_high": found.kappa_interval.high},
            **{"win_rate_a": 4 / 7, "win_rate_b": 3.5 / 7, "tie_rate_a": 2 / 7, "tie_rate_b": 1 / 7},
            **{"identity_a": "main:1", "identity_b": "gold:1", "seed": 5},
        }
    )
    # Each task's intervals have its own confidence.
    of_hh = agreement(["win", "win"], ["win", "loss"], ["p0", "p0"], 0.99, seed=5).rate_interval
    assert table.iloc[3][["ci_low", "ci_high"]].tolist() == pytest.approx([of_hh.low, of_hh.high])


def test_the_stage_of_people_reads_each_tasks_own_tables(tmp_path: Path) -> None:
    """Two tasks with a judge each, who agrees with the raters of the one and not with those of the other."""
    arguments: list[Path] = []
    for task, says in (("tldr", "win"), ("hh", "loss")):
        texts = {"matchup": "a vs b", "prompt_id": "p", "prompt": "x", "first": "y", "second": "z"}
        votes = [
            {
                "rater": rater,
                "item_id": item,
                **texts,
                "order": "first_first",
                "outcome": "win",
                "place": 0,
                "seconds": 2.0,
            }
            for rater, item in (("r1", "i1"), ("r1", "i2"), ("r2", "i2"))
        ]
        frame = pd.DataFrame(votes).assign(simulated=False)
        write_table(tmp_path / f"{task}_votes.parquet", "votes", frame, study=task, equal_share={"a vs b": 0.125})
        said = {
            "matchup": "a vs b",
            "prompt_id": "p",
            "winner": "first",
            "reply": "",
            "judge": f"j:{task}",
            "cost_usd": 0.0,
        }
        orders = [
            {"item_id": item, "order": order, "outcome": says, **said}
            for item in ("i1", "i2")
            for order in ("policy_first", "reference_first")
        ]
        write_table(tmp_path / f"{task}_main.parquet", "item_verdicts", pd.DataFrame(orders), study=task)
    votes = [tmp_path / f"{task}_votes.parquet" for task in ("tldr", "hh")]
    arguments = [tmp_path / f"{task}_main.parquet" for task in ("hh", "tldr")]
    confidence = {"tldr": 0.8, "hh": 0.9}
    recipe = {"tables": [["hh", "main"], ["tldr", "main"]], "confidence": confidence, "seed": 3}
    out = tmp_path / "out.csv"
    given = argparse.Namespace(votes=votes, verdicts=arguments, recipe=json.dumps(recipe), out=out)
    human_agreement.run(given)
    table = pd.read_csv(out)
    assert table[["task", "judge", "identity", "raters", "items", "n"]].to_numpy().tolist() == [
        ["tldr", "people", "people", 2, 2, 3],
        ["tldr", "main", "j:tldr", 0, 2, 2],
        ["hh", "people", "people", 2, 2, 3],
        ["hh", "main", "j:hh", 0, 2, 2],
    ]
    assert list(table.columns) == [
        *("task", "matchup", "equal_share", "judge", "raters", "items", "n", "win_rate", "ci_low", "ci_high", "ties"),
        *("invalid", "agreement_n", "agreement", "agreement_low", "agreement_high", "kappa", "kappa_low", "kappa_high"),
        *("identity", "seed"),
    ]
    assert table["agreement"].tolist() == [1, 1, 1, 0] and table["agreement_n"].tolist() == [1, 3, 1, 3]
    assert (
        table["win_rate"].tolist() == [1, 1, 1, 0]
        and set(table["seed"]) == {3}
        and set(table["equal_share"]) == {0.125}
    )
    interval = score_interval([1.0] * 3, ["i1", "i2", "i2"], 0.8)
    assert table.loc[1, ["agreement_low", "agreement_high"]].tolist() == pytest.approx(
        [interval.low, interval.high], abs=1e-5
    )
    assert table.loc[0, ["ci_low", "ci_high"]].tolist() == pytest.approx([interval.low, interval.high], abs=1e-5)
    of_hh = score_interval([1.0] * 3, ["i1", "i2", "i2"], 0.9)
    assert table.loc[2, ["ci_low", "ci_high"]].tolist() == pytest.approx([of_hh.low, of_hh.high], abs=1e-5)
    manifest = read_table(votes[0], "votes").attrs["manifest"]
    empty = read_table(votes[0], "votes").iloc[:0]
    write_table(votes[0], "votes", empty, study="tldr", equal_share=manifest["equal_share"])
    with pytest.raises(UserError, match=r"tldr_votes.parquet holds no vote that counts"):
        human_agreement.run(given)
    write_table(votes[0], "votes", frame, study="another", equal_share=manifest["equal_share"])
    with pytest.raises(UserError, match=r"tldr_main.parquet was made with study = 'tldr'"):
        human_agreement.run(given)


def test_people_and_judges_on_the_same_items() -> None:
    votes = pd.DataFrame(
        [
            ("r1", "i1", "win"),
            ("r2", "i1", "win"),
            ("r1", "i2", "win"),
            ("r2", "i2", "loss"),
            ("r1", "i3", "tie"),
            ("r2", "i3", "loss"),
            ("r1", "i4", "loss"),
        ],
        columns=["rater", "item_id", "outcome"],
    ).assign(matchup="a vs b", simulated=True)
    rows = [("i1", "win"), ("i2", "loss"), ("i3", "loss"), ("i4", "invalid")]
    verdicts = pd.DataFrame(rows, columns=["item_id", "outcome"]).assign(matchup="a vs b", judge="oracle:1")
    recipe = HumanAgreementRecipe(tables=(("tldr", "main"),), confidence={"tldr": 0.95}, seed=0)
    table = human_agreement_table("tldr", votes, {"main": verdicts}, {"a vs b": 0.25}, recipe)
    people, main = (row for _, row in table.iterrows())
    assert (people["judge"], people["raters"], people["items"], people["n"]) == ("simulated raters", 2, 4, 7)
    assert people["win_rate"] == pytest.approx((3 + 0.5) / 7)
    # Pairs of votes: i1 agrees, i2 does not; i3 has a tie, which is left out.
    assert (people["agreement_n"], people["agreement"]) == (2, 0.5)
    assert (main["judge"], main["n"], main["invalid"]) == ("main", 4, 1)
    assert main["win_rate"] == pytest.approx(1 / 3)
    # Votes with a decided verdict: win-win, win-win, win-loss, loss-loss, loss-loss.
    assert (main["agreement_n"], main["agreement"]) == (5, 0.8)
    assert table["equal_share"].tolist() == [0.25, 0.25]
    assert (people["ties"], people["invalid"], main["ties"], main["items"], main["raters"]) == (1, 0, 0, 4, 0)
    # Kappa of the five: the votes are 3 wins of 5, the verdicts 2: chance 3/5 * 2/5 + 2/5 * 3/5.
    found = agreement(
        ["win", "win", "win", "loss", "loss"], ["win", "win", "loss", "loss", "loss"], list("11234"), 0.95, seed=0
    )
    assert main["kappa"] == pytest.approx((0.8 - 12 / 25) / (1 - 12 / 25)) == found.kappa
    assert (main["kappa_low"], main["kappa_high"]) == pytest.approx(
        (found.kappa_interval.low, found.kappa_interval.high)
    )
