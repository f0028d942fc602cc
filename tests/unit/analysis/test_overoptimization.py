"""Fits of known curves, the best of N by brute force, and alarms."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from made_up import MEASURES
from prefopt.analysis import overoptimization
from prefopt.analysis.overoptimization import (
    Form,
    Optimized,
    alarm,
    coefficients,
    fit_row,
    of_candidates,
    of_run,
    peak_kl,
    points,
)
from prefopt.errors import UserError
from prefopt.store.tables import write_table


def gain_at(kl: np.ndarray, a: float, b: float, form: Form) -> np.ndarray:
    d = np.sqrt(kl)
    result: np.ndarray = d * (a - b * (d if form == "best_of_n" else np.log(d)))
    return result


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_a_curve_without_noise_is_found_and_its_peak_is_where_it_is_highest(form: Form) -> None:
    kl = np.array([[0.3, 1.0, 2.5, 6.0], [0.1, 0.4, 3.0, 9.0]])
    assert coefficients(kl, gain_at(kl, 1.4, 0.3, form), form) == pytest.approx(np.array([[1.4, 0.3]] * 2))
    grid = np.linspace(0.001, 80 if form == "rl" else 20, 2_000_001)
    a, b = (0.8, 0.35) if form == "rl" else (1.4, 0.3)
    highest = grid[gain_at(grid, a, b, form).argmax()]
    assert peak_kl(a, b, form) == pytest.approx(highest, rel=1e-3)
    assert peak_kl(1.0, 0.0, form) == math.inf == peak_kl(1.0, -0.1, form)


def test_points_at_no_kl_are_left_out_and_one_kl_gives_no_fit() -> None:
    kl = np.array([[-0.1, 0.0, 1.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    gain = np.array([[9.0, 9.0, 0.7, 0.8], [1.0, 1.0, 1.0, 1.0]])
    found = coefficients(kl, gain, "best_of_n")
    assert found[0] == pytest.approx([1.0, 0.3]) and np.isnan(found[1]).all()


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_intervals_hold_the_known_curve_in_95_of_100_simulations(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts differ in their slope, their noise and, of a trained run, in the KL at each step."""
    monkeypatch.setattr(overoptimization, "_RESAMPLES", 500)
    rng, a, b, prompts, simulations = np.random.default_rng(3), 1.0, 0.25, 150, 400
    at = [2**k for k in range(8)] if form == "best_of_n" else list(range(9))
    kl = np.array([overoptimization.best_of_n_bound(n, 1.0) for n in at] if form == "best_of_n" else at, dtype=float)
    truth = np.concatenate([[0.0], gain_at(kl[1:], a, b, form)])
    held = np.zeros(3)
    method = "best_of_n" if form == "best_of_n" else "ppo"
    for _ in range(simulations):
        slope = 0.3 * rng.standard_normal((prompts, 1)) * np.sqrt(kl)
        true = truth + slope + 0.4 * rng.standard_normal((prompts, len(at)))
        true[:, 0] = slope[:, 0]
        kls = kl * (rng.gamma(4.0, 0.25, (prompts, len(at))) if form == "rl" else np.ones((prompts, 1)))
        row = fit_row([Optimized("t", "r", method, 0, at, kls, true, true, np.full_like(true, np.nan))], 0.95, 0)
        held += [row["a_low"] <= a <= row["a_high"], row["b_low"] <= b <= row["b_high"], False]
        held[2] += row["peak_kl_low"] <= peak_kl(a, b, form) <= row["peak_kl_high"]
    assert (held >= 0.93 * simulations).all() and (held <= 0.97 * simulations).all(), held


def test_the_best_of_n_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(1)
    key = {"prompt_id": np.repeat(["a", "b", "c"], 5), "sample_index": np.tile(range(5), 3), "temperature": 1.0}
    frame = pd.DataFrame(key).assign(reward=rng.normal(size=15), true=rng.normal(size=15))
    other = frame.assign(temperature=0.7, reward=9.0, true=9.0)
    curve = of_candidates(pd.concat([other, frame]), "hh", 4)
    assert curve is not None and curve.at == [1, 2, 3, 4, 5] and (curve.seed, curve.form) == (4, "best_of_n")
    for p, (_, group) in enumerate(frame.groupby("prompt_id")):
        for n in range(1, 6):
            subsets = [list(subset) for subset in itertools.combinations(range(5), n)]
            best = [max(subset, key=lambda i: group["reward"].iloc[i]) for subset in subsets]
            assert curve.true[p, n - 1] == pytest.approx(np.mean(group["true"].to_numpy()[best]))
            assert curve.learned[p, n - 1] == pytest.approx(np.mean(group["reward"].to_numpy()[best]))
    assert curve.kl[0] == pytest.approx([0.0, math.log(2) - 1 / 2, *(math.log(n) - (n - 1) / n for n in (3, 4, 5))])
    assert of_candidates(other, "hh", 4) is None


def made_up(true: list[float], learned: list[float], method: str = "ppo", prompts: int = 60) -> Optimized:
    """Points with these means, and noise that all points of a prompt share and some of their own."""
    rng = np.random.default_rng(5)
    shared, own = rng.standard_normal((prompts, 1)), 0.3 * rng.standard_normal((prompts, len(true)))
    own -= own.mean(axis=0)
    known = np.tile(learned, (prompts, 1))
    none = np.full_like(known, np.nan)
    kl = np.tile(np.arange(len(true), dtype=float), (prompts, 1))
    rewards = {"learned": none, "implicit": known} if method == "dpo" else {"learned": known, "implicit": none}
    return Optimized(
        "hh", "mine", method, 0, [10 * i for i in range(len(true))], kl, np.array(true) + shared + own, **rewards
    )


def test_an_alarm_is_a_true_reward_that_falls_while_the_other_rises() -> None:
    falling = made_up([0.0, 0.6, 0.9, 0.4], [0.0, 1.0, 2.0, 3.0])
    assert alarm(falling, 0.95, 0) == (
        "over-optimised: from step 20 to 30 the true reward fell by 0.5 while the learned one rose by 1"
    )
    assert alarm(made_up([0.0, 0.6, 0.9, 0.4], [0.0, 1.0, 2.0, 3.0], "dpo"), 0.95, 0).endswith("implicit one rose by 1")
    assert alarm(made_up([0.0, 0.6, 0.9, 1.0], [0.0, 1.0, 2.0, 3.0]), 0.95, 0) == "", "both rise"
    assert alarm(made_up([0.0, 0.6, 0.9, 0.4], [0.0, 1.0, 2.0, 1.9]), 0.95, 0) != "", (
        "from step 10, which is lower in both"
    )
    assert alarm(made_up([0.0, 0.6, 0.9, 0.4], [3.0, 2.0, 1.0, 0.0]), 0.95, 0) == "", "both fall"
    assert alarm(made_up([0.0, 0.6, 0.9, 0.89], [0.0, 1.0, 2.0, 3.0]), 0.95, 0) == "", "within the noise"
    assert alarm(made_up([0.0, 0.6, 0.9, 0.4], [math.nan] * 4), 0.95, 0) == "", "nothing is known of the other"
    assert alarm(made_up([0.0, 0.6, 0.9, 0.4], [1.0] * 4), 0.95, 0) == "", "the other stays"


def test_an_alarm_is_below_what_the_confidence_leaves_and_not_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = made_up([0.0, -1.0], [0.0, 1.0])
    for p, silent in ((1 - 0.95, True), (0.0499, False)):
        monkeypatch.setattr(overoptimization, "sign_flip_p", lambda fall, seed, resamples, p=p: p)
        assert (alarm(curve, 0.95, 0) == "") == silent


def test_of_the_best_of_n_powers_of_two_are_fitted_and_told() -> None:
    curve = made_up([0.0, 0.1, 0.9, 0.5, 0.2], [0.0, 1.0, 2.0, 3.0, 4.0], "best_of_n")
    curve = Optimized(**{**vars(curve), "at": [1, 2, 3, 4, 5]})
    assert fit_row([curve], 0.95, 0)["points"] == 2
    assert alarm(curve, 0.95, 0) == "", "the third is no power of 2, and from the second to the fourth it rose"


def test_resamples_are_enough_for_the_smallest_p_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 17 steps 136 pairs: at 0.95 the smallest p must fall below 0.05 / 136, four times over."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(overoptimization, "sign_flip_p", lambda fall, *values: asked.append(values) or 1.0)
    many = made_up([-float(i) for i in range(17)], [float(i) for i in range(17)])
    assert alarm(many, 0.95, 3) == "" and asked == [(3, 10_880)] * 136
    asked.clear()
    alarm(made_up([0.0, -1.0], [0.0, 1.0]), 0.95, 3)
    assert asked == [(3, 9999)]


def test_a_fit_is_least_squares_of_the_means_over_the_prompts_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same resamples of prompts, taken one by one."""
    monkeypatch.setattr(overoptimization, "_RESAMPLES", 8)
    rng = np.random.default_rng(1)
    kl = np.array([0.0, 1.0, 3.0, 6.0]) + 0.1 * rng.random((12, 4))
    true = 0.7 * np.sqrt(kl) * (1 - 0.3 * np.log(np.maximum(kl, 0.1))) + rng.standard_normal((12, 4))
    none = np.full_like(kl, np.nan)
    row = fit_row([Optimized("t", "mine", "ppo", 2, [0, 5, 10, 15], kl, true, true, none)], 0.5, 4)
    drawn = np.random.default_rng(4).multinomial(12, np.full(12, 1 / 12), size=8)
    fits = []
    for weights in (np.ones(12), *drawn):
        d = np.sqrt(np.average(kl[:, 1:], axis=0, weights=weights))
        gain = np.average(true[:, 1:] - true[:, :1], axis=0, weights=weights)
        fits.append(np.linalg.lstsq(np.stack([d, -d * np.log(d)], axis=1), gain)[0])
    (a, b), peaks = fits[0], [peak_kl(*fit, "rl") for fit in fits]
    expected: dict[str, Any] = {"task": "t", "run": "mine", "method": "ppo", "form": "rl", "confidence": 0.5}
    expected |= {"seeds": 1, "prompts": 12, "points": 3, "a": a, "b": b, "peak_kl": peaks[0]}
    for i, name in enumerate(("a", "b")):
        low, high = np.quantile([fit[i] for fit in fits[1:]], [0.25, 0.75])
        expected |= {f"{name}_low": low, f"{name}_high": high}
    ends = np.quantile(peaks[1:], [0.25, 0.75], method="nearest")
    largest = kl.mean(axis=0).max()
    expected |= {"peak_kl_low": ends[0], "peak_kl_high": ends[1], "largest_kl": largest}
    assert row == pytest.approx({**expected, "peak_measured": bool(peaks[0] <= largest)})


def evaluations(run: str, method: str, beta: float, learned: bool, prompts: int = 60) -> list[dict[str, Any]]:
    rng = np.random.default_rng(len(run))
    return [
        {"run": run, "method": method, "seed": 0, "conservativeness": beta, "step": step, "prompt_id": f"p{p:02d}"}
        | {"sample_index": 0, "kl": step + 0.01 * p, "tokens": 4, **MEASURES}
        | {"reward": [0.0, 0.5, 0.2][step // 5] + 0.1 * rng.standard_normal()}
        | {"learned_reward": 0.3 * step + 0.001 * p if learned else math.nan}
        for step in (0, 5, 10)
        for p in range(prompts)
    ]


def test_a_method_on_pairs_has_an_implicit_reward_and_no_other_has() -> None:
    dpo, ppo, simpo = (
        of_run(pd.DataFrame(evaluations("r", m, 0.5, True)), "t", 0, False) for m in ("dpo", "ppo", "simpo")
    )
    assert dpo.implicit == pytest.approx(0.5 * dpo.kl) and dpo.maximised is dpo.implicit
    assert np.isnan(ppo.implicit).all() and ppo.maximised is ppo.learned and np.isnan(simpo.implicit).all()
    assert dpo.learned[0].tolist() == pytest.approx([0.0, 1.5, 3.0]) and dpo.at == [0, 5, 10]
    row = list(points(dpo, ""))[2]
    assert row["implicit_gain"] == pytest.approx(5.0) and row["learned_gain"] == pytest.approx(3.0)
    assert row["true_gain_se"] == pytest.approx((dpo.true[:, 2] - dpo.true[:, 0]).std(ddof=1) / math.sqrt(60))
    with pytest.raises(UserError, match="r of t was not evaluated on every prompt"):
        of_run(pd.DataFrame(evaluations("r", "dpo", 0.5, True)[1:]), "t", 0, False)
    averaged = of_run(pd.DataFrame(evaluations("r", "dpo", 0.5, True)), "t", 0, True)  # of completions of four tokens
    assert averaged.implicit == pytest.approx(0.5 * dpo.kl / 4) and averaged.kl == pytest.approx(dpo.kl)


def test_several_seeds_widen_the_intervals_by_what_lies_between_them() -> None:
    first = made_up([0.0, 0.6, 0.9, 0.4], [0.0, 1.0, 2.0, 3.0])
    other = Optimized(**{**vars(first), "seed": 1, "true": first.true * np.array([1.0, 1.5, 1.5, 1.5])})
    one, both = fit_row([first], 0.95, 0), fit_row([first, other], 0.95, 0)
    assert both["seeds"] == 2 and both["a_high"] - both["a_low"] > 2 * (one["a_high"] - one["a_low"])
    assert both["a"] == pytest.approx((one["a"] + fit_row([other], 0.95, 0)["a"]) / 2)


def test_the_stage_writes_points_fits_figure_and_alarms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = [("dpo", "dpo", 0.5, False), ("ppo", "ppo", 6.0, True)]
    paths = [tmp_path / f"{run[0]}.parquet" for run in runs]
    for path, run in zip(paths, runs, strict=True):
        write_table(path, "evaluations", evaluations(*run))
    rng = np.random.default_rng(2)
    key = [{"prompt_id": f"p{p}", "sample_index": k, "temperature": 1.0} for p in range(30) for k in range(4)]
    rest = {"run": "sft", "text": "x", "tokens": 1, "token_ids": [3], "finish_reason": "eos", "logp": -1.0}
    rows = [row | rest | {"split": "test", "reference_logp": math.nan} for row in key]
    content = write_table(tmp_path / "c.parquet", "samples", rows)["content_hash"]
    for name in ("s", "t"):
        scores = [row | {"reward": float(rng.standard_normal())} for row in key]
        write_table(tmp_path / f"{name}.parquet", "scores", scores, samples=content)
    recipe: dict[str, Any] = {"runs": [["hh", 0, "dpo", False], ["hh", 0, "ppo", False]], "candidates": [["hh", 0]]}
    recipe["tasks"] = [["hh", "Dialogue", "dialogues", "oracle", 0.95]]
    (tmp_path / "summary.json").write_text(json.dumps({"synthetic": True, "warnings": []}))
    out = {"table": tmp_path / "o.csv", "fits": tmp_path / "f.csv", "out": [tmp_path / "o.svg", tmp_path / "o.png"]}
    tables = {"candidates": "c", "scores": "s", "true": "t"}
    overoptimization.run(
        argparse.Namespace(
            evaluations=paths,
            summaries=[tmp_path / "summary.json"],
            **{name: [tmp_path / f"{path}.parquet"] for name, path in tables.items()},
            **out,
            recipe=json.dumps({**recipe, "seed": 0}),
        )
    )
    table, fits = pd.read_csv(out["table"]), pd.read_csv(out["fits"])
    assert table.groupby("run", sort=False).size().to_dict() == {"dpo": 3, "ppo": 3, "best_of_n": 4}
    assert fits["form"].tolist() == ["rl", "rl", "best_of_n"] and fits["points"].tolist() == [2, 2, 2]
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.partition(": ")[0] for text in warned[:2]] == ["hh, dpo, seed 0", "hh, ppo, seed 0"]
    # The candidates are of 30 prompts.
    assert warned[2:] == [
        "warning: Only 30 test prompts: this tries the machinery and is no result.",
        "warning: Synthetic: dialogues and the judge are a program; no person was asked.",
    ]
    assert table.loc[table["run"] == "ppo", "alarm"].str.startswith("over-optimised: from step 5 to 10").all()
    assert table.loc[table["run"] == "best_of_n", "alarm"].isna().all()
    assert b"<svg" in out["out"][0].read_bytes()


def test_many_runs_and_alarms_leave_room_for_the_curves() -> None:
    curves = [made_up([0.0, 0.6, 0.4], [0.0, 1.0, 2.0]) for _ in range(24)]
    rows = [
        row | {"run": f"run_{i}"} for i, curve in enumerate(curves) for row in points(curve, "an alarm of some words")
    ]
    facts = [{"task": "hh", "title": "Dialogue", "written": "dialogues", "synthetic": True, "warnings": []}]
    table = pd.DataFrame(rows).assign(prompts=200)
    fits = pd.DataFrame(columns=["task", "run", "a", "b", "form"])
    figure = overoptimization.overoptimization_figure(table, fits, facts, {"hh": "oracle"})
    figure.draw_without_rendering()
    (legend,), note, above = figure.legends, figure._supxlabel, figure._suptitle  # type: ignore[attr-defined]
    assert len(legend.get_texts()) == 24 and len(above.get_text().splitlines()) == 24
    frame, names = figure.axes[0].get_window_extent(), legend.get_window_extent()
    assert note.get_window_extent().y1 < min(names.y0, frame.y0) and above.get_window_extent().y0 > names.y1
    assert frame.height > 2 * figure.dpi


def test_the_figure_shows_each_gain_against_the_root_of_its_kl() -> None:
    falling = made_up([0.0, 0.6, 0.9, 0.4], [0.0, 1.0, 2.0, 3.0])
    rising = Optimized(**{**vars(made_up([0.0, 0.3, 0.5, 0.7], [0.0, 0.1, 0.2, 0.3], "dpo")), "run": "dpo"})
    table = pd.DataFrame([*points(falling, "an alarm"), *points(rising, "")]).assign(prompts=200)
    facts = [{"task": "hh", "title": "Dialogue", "written": "dialogues", "synthetic": True, "warnings": []}]
    form = {"task": "hh", "a": 0.6, "b": 0.1, "form": "rl"}
    fits = pd.DataFrame([{**form, "run": "mine"}, {**form, "run": "dpo", "form": "best_of_n"}])
    figure = overoptimization.overoptimization_figure(table, fits, facts, {"hh": "oracle"})
    assert figure.get_size_inches() == pytest.approx([8.4, 3.6 + 0.255]), "a line of an alarm has room of its own"
    left, right = figure.axes
    root = np.sqrt(np.arange(4.0))
    for axes, gains in ((left, ([0, 0.6, 0.9, 0.4], [0, 0.3, 0.5, 0.7])), (right, ([0, 1, 2, 3], [0, 0.1, 0.2, 0.3]))):
        assert axes.get_xlabel() == "Square root of KL to the reference (nats)"
        measured = [line for line in axes.get_lines() if line.get_label() != "_fit"]
        assert [line.get_label() for line in measured] == ["mine", "DPO"] and len(axes.collections) == 2
        for line, gain in zip(measured, gains, strict=True):
            assert line.get_xdata() == pytest.approx(root) and line.get_ydata() == pytest.approx(gain, abs=1e-9)
    # The fits, to the largest KL that was seen, beside the true rewards alone.
    one, other = (line for line in left.get_lines() if line.get_label() == "_fit")
    d = np.sqrt(3)
    assert (one.get_xdata()[-1], one.get_ydata()[-1]) == pytest.approx((d, d * (0.6 - 0.1 * np.log(d))))
    assert (other.get_ydata()[0], other.get_ydata()[-1]) == pytest.approx((0, d * (0.6 - 0.1 * d)))
    assert len(right.get_lines()) == 2
    # A band of 1.96 standard errors over prompts.
    band, last = left.collections[0].get_paths()[0].vertices, table[table["run"] == "mine"].iloc[-1]
    half = 1.959964 * last["true_gain_se"]
    ends = sorted(y for x, y in band if x == pytest.approx(d))
    assert (ends[0], ends[-1]) == pytest.approx((0.4 - half, 0.4 + half), abs=1e-5)
    assert left.get_ylabel() == "Gain in true reward"
    assert right.get_ylabel() == "Gain in learned or implicit reward"
    assert left.get_title(loc="left") == "Dialogue (synthetic records)"
    assert figure.get_suptitle() == "hh, mine, seed 0: an alarm."
    few = overoptimization.overoptimization_figure(table.assign(prompts=49), fits, facts, {"hh": "oracle"})
    assert few.get_suptitle().replace("\n", " ") == (
        "Only 49 test prompts: this tries the machinery and is no result. hh, mine, seed 0: an alarm."
    )
    note = figure.get_supxlabel().replace("\n", " ")
    assert note.endswith("200 test prompts. Synthetic: dialogues and the judge are a program; no person was asked.")
    own = [{**facts[0], "synthetic": False, "warnings": ["40% of the pairs were lost"]}]
    real = overoptimization.overoptimization_figure(table.assign(alarm="", prompts=[50] * 4 + [60] * 4), fits, own, {})
    assert not real.get_suptitle() and real.axes[0].get_title(loc="left") == "Dialogue"
    assert real.get_supxlabel().replace("\n", " ").endswith("50 to 60 test prompts. 40% of the pairs were lost.")
    # Preferred-FT alone has no reward that it maximised.
    without = table.assign(learned_gain=np.nan, implicit_gain=np.nan)
    none = overoptimization.overoptimization_figure(without, fits, facts, {"hh": "oracle"})
    assert [text.get_text() for text in none.axes[1].texts] == ["No run has one."]
    assert not none.axes[0].texts and not right.texts
    # A task more is a row more.
    two = overoptimization.overoptimization_figure(
        pd.concat([table[table["run"] == "dpo"], table.assign(task="tldr")]),
        fits,
        [*facts, {**facts[0], "task": "tldr", "title": "Summaries", "written": "posts"}],
        {"hh": "oracle", "tldr": "oracle"},
    )
    assert two.get_size_inches() == pytest.approx([8.4, 6.4 + 0.255]) and len(two.axes) == 4
    shades = [
        {line.get_label(): line.get_color() for line in axes.get_lines() if line.get_label() != "_fit"}
        for axes in (two.axes[0], two.axes[2])
    ]
    assert set(shades[0]) == {"DPO"} and shades[0]["DPO"] == shades[1]["DPO"] != shades[1]["mine"]
