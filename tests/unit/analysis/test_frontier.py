"""Checkpoints, frontiers, the ceiling's bound and dominance."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pandas as pd
import pytest

from made_up import MEASURES
from prefopt.analysis import dominance, frontier, frontier_figure, optimal_frontier
from prefopt.analysis.dominance import DominanceRecipe, dominance_table
from prefopt.analysis.frontier import Measured, above_ceiling, frontier_table, read_evaluations, upper_frontier
from prefopt.analysis.statistics import mean_over_seeds
from prefopt.errors import UserError
from prefopt.rewards.stage import TrueRewardsRecipe
from prefopt.store.tables import write_table
from test_optimal_frontier import PROBABILITIES, REWARDS, draw

METHODS = ("dpo", "ppo_gt", "ppo_gt_trl", "ppo", "unlikelihood", "preferred_ft")
RECIPE = DominanceRecipe(methods=METHODS, seeds=(0,), confidence=0.95, bootstrap=200, seed=0, at_kl=(1.0, 3.0))

WORDS = {"title": "IMDb sentiment", "written": "reviews"}


def measured(
    points: dict[str, list[tuple[float, float]]], prompts: int = 40, noise: float = 0.0, seed: int = 0
) -> Measured:
    """Checkpoints with these (kl, reward), the reference policy (0, 0.5) first, and noise per prompt."""
    rng = np.random.default_rng(seed)
    rows, reward, kl = [], [], []
    for method, places in points.items():
        for step, (k, r) in enumerate([(0.0, 0.5), *places]):
            rows.append(
                {"run": method, "method": method, "seed": 0, "conservativeness": 1.0, "step": step, "samples": prompts}
            )
            reward.append(r + noise * rng.standard_normal(prompts) * (step > 0))
            kl.append(np.full(prompts, k))
    names = [f"p{i:02d}" for i in range(prompts)]
    return Measured(pd.DataFrame(rows), names, np.array(reward).T, np.array(kl).T)


def test_the_frontier_is_the_least_concave_majorant() -> None:
    kl = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 1.5])
    reward = np.array([0.5, 0.7, 0.6, 0.8, 0.75, 0.72])
    # (2, 0.6) and (4, 0.75) are below; (1.5, 0.72) lies below the line from (1, 0.7) to (3, 0.8).
    assert upper_frontier(kl, reward) == [0, 1, 3]
    assert upper_frontier(kl[:1], reward[:1]) == [0]
    # The second point falls as soon as a third lies above the line through it.
    assert upper_frontier(np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.1, 1.0])) == [0, 2]
    assert upper_frontier(np.array([0.0, 1.0]), np.array([0.5, 0.4])) == [0]
    assert upper_frontier(np.array([0.0, 1.0, 1.0]), np.array([0.5, 0.6, 0.7])) == [0, 2]


def test_standard_errors_are_over_prompts() -> None:
    data = measured({"dpo": [(1.0, 0.7)]}, prompts=4)
    data.reward[:, 1] = [0.5, 0.7, 0.7, 0.9]
    row = frontier_table(data).iloc[1]
    assert row["reward"] == pytest.approx(0.7) and row["reward_se"] == pytest.approx(math.sqrt(0.08 / 3) / 2)
    assert row["kl_se"] == 0 and row["on_frontier"]


class TestCeiling:
    """No policy is above the optimal frontier; what seems to be has a wrong KL or reward."""

    BETAS = np.geomspace(2.0, 0.1, 30)

    def checkpoint(self, policy: np.ndarray, kl: float, prompts: int = 400, samples: int = 4) -> Measured:
        """Sampled rewards of a policy over the eight completions, with the KL that is claimed for it."""
        reward = np.random.default_rng(5).choice(REWARDS, size=(prompts, samples), p=policy).mean(axis=1)
        rows = [{"run": "r", "method": "dpo", "seed": 0, "conservativeness": 1.0, "step": 1, "samples": 4}]
        return Measured(
            pd.DataFrame(rows), [f"p{i}" for i in range(prompts)], reward[:, None], np.full((prompts, 1), kl)
        )

    def test_the_optimal_policy_reaches_it_and_one_with_a_wrong_kl_is_found_out(self) -> None:
        policy = PROBABILITIES * np.exp(REWARDS / 0.3)
        policy /= policy.sum()
        kl = float(policy @ np.log(policy / PROBABILITIES))
        found = optimal_frontier.optimum(draw(400, 1000, 3), self.BETAS)
        prompts = [f"p{i}" for i in range(400)]
        (row,) = above_ceiling(self.checkpoint(policy, kl), prompts, found, self.BETAS).to_dict("records")
        assert abs(row["above_ceiling"]) < 0.03 and abs(row["above_ceiling_z"]) < 3
        (row,) = above_ceiling(self.checkpoint(policy, kl / 2), prompts, found, self.BETAS).to_dict("records")
        assert row["above_ceiling_z"] > 4

    def test_a_checkpoint_is_held_against_the_price_of_its_kl_by_hand(self) -> None:
        """Two prompts of the optimum, of three that were evaluated, in another order."""
        rows = [
            {"run": "r", "method": "dpo", "seed": 0, "conservativeness": 1.0, "step": i, "samples": 1} for i in (0, 1)
        ]
        reward = np.array([[0.5, 0.8], [9.0, 9.0], [0.4, 0.9]])
        kl = np.array([[0.0, 1.0], [9.0, 9.0], [0.0, 2.0]])
        data = Measured(pd.DataFrame(rows), ["a", "x", "b"], reward, kl)
        value = np.array([[0.45, 0.6, 0.8], [0.55, 0.8, 1.0]])  # of b and a, at the prices 0.5, 0.2, 0.1
        betas = np.array([0.5, 0.2, 0.1])
        found = optimal_frontier.Optimum(value, value, np.full((2, 3), [0.1, 0.5, 1.5]), value)
        table = above_ceiling(data, ["b", "a"], found, betas)
        # At a KL of 0 the first price is the smallest bound; at 1.5 the bounds are 1.25, 1.0 and 1.05.
        gaps = [[0.4 - 0.45, 0.5 - 0.55], [0.9 - 0.2 * 2 - 0.6, 0.8 - 0.2 * 1 - 0.8]]
        assert table["above_ceiling"].tolist() == pytest.approx([np.mean(gap) for gap in gaps])
        error = abs(gaps[1][0] - gaps[1][1]) / math.sqrt(2) / math.sqrt(2)
        assert table["above_ceiling_z"].tolist()[1] == pytest.approx(np.mean(gaps[1]) / error)
        assert table["above_ceiling_z"].tolist()[0] < -1e6  # equal gaps are as sure as can be
        # A KL of exactly the last known one is known.
        shorter = found._replace(kl=np.full((2, 3), [0.1, 0.5, 1.4999]))
        assert above_ceiling(data, ["b", "a"], shorter, betas).isna().any(axis=1).tolist() == [False, True]
        assert above_ceiling(data, ["b", "a"], found, betas[:0]).isna().all(axis=None)

    def test_a_worse_policy_is_below_it(self) -> None:
        greedy = np.where(PROBABILITIES == 0.3, 1.0, 0.0)  # the likeliest completion, whose reward is the smallest
        found = optimal_frontier.optimum(draw(400, 1000, 3), self.BETAS)
        data = self.checkpoint(greedy, float(np.log(1 / 0.3)))
        (row,) = above_ceiling(data, data.prompts, found, self.BETAS).to_dict("records")
        assert row["above_ceiling"] < -0.3

    def test_nothing_is_said_beyond_what_is_known(self) -> None:
        found = optimal_frontier.optimum(draw(400, 1000, 3), self.BETAS)
        data = self.checkpoint(PROBABILITIES, 50.0)
        assert above_ceiling(data, data.prompts, found, self.BETAS).isna().all(axis=None)


class TestDominance:
    def test_the_area_between_two_straight_frontiers(self) -> None:
        data = measured({"dpo": [(2.0, 0.9), (4.0, 0.9)], "ppo": [(4.0, 0.9)]})
        (row,) = dominance_table(data, RECIPE).to_dict("records")
        # DPO rises to 0.9 at 2 nats and PPO to 0.8 there; DPO's frontier ends at 2.
        assert (row["method"], row["other"], row["kl_from"], row["kl_to"]) == ("dpo", "ppo", 0.0, 2.0)
        assert row["area"] == pytest.approx(0.5 * 2 * 0.2, abs=1e-4)
        assert row["mean_difference"] == pytest.approx(0.1, abs=1e-4)
        assert row["difference_at_1"] == pytest.approx(0.1) and math.isnan(row["difference_at_3"])
        assert row["smallest_difference"] == pytest.approx(0) and row["largest_difference"] == pytest.approx(0.2)
        assert row["share_above"] == 1.0
        assert row["area_low"] == pytest.approx(row["area"]) == row["area_high"]

    def test_no_common_range(self) -> None:
        data = measured({"dpo": [(2.0, 0.9)], "preferred_ft": [(1.0, 0.4)]})
        (row,) = dominance_table(data, RECIPE).to_dict("records")
        assert all(math.isnan(row[name]) for name in ("kl_from", "kl_to", "area", "mean_difference", "share_above"))

    def test_the_best_of_many_equal_checkpoints_is_not_an_advantage(self) -> None:
        """One method with twenty checkpoints and one with two, all equally good: luck must not count."""
        inside, means = 0, []
        for seed in range(40):
            places = [(1 + 0.1 * i, 0.6) for i in range(20)]
            data = measured({"dpo": places, "ppo": [(1.0, 0.6), (2.9, 0.6)]}, noise=0.3, seed=seed)
            (row,) = dominance_table(data, RECIPE).to_dict("records")
            means.append(row["mean_difference"])
            inside += row["mean_difference_low"] <= 0 <= row["mean_difference_high"]
        assert abs(np.mean(means)) < 0.025
        assert inside >= 35

    def test_every_number_of_a_row_against_resamples_taken_one_by_one(self) -> None:
        """Vertices are chosen on one half of the prompts and measured on the other, and the two are averaged."""
        places = [(0.8, 0.62), (1.5, 0.7), (2.4, 0.68), (3.0, 0.8)]
        data = measured({"ppo": [(1.0, 0.6), (3.5, 0.7)], "dpo": places}, prompts=9, noise=0.2, seed=9)
        data.kl[:, 1:] += np.random.default_rng(9).uniform(0, 0.4, (9, 7)) * (data.kl[:, 1:] > 0)
        recipe = DominanceRecipe(
            methods=METHODS, seeds=(0,), confidence=0.8, bootstrap=30, seed=2, at_kl=(0.5, 1.0, 9.0)
        )
        table = dominance_table(data, recipe)
        (row,) = table.to_dict("records")

        rng = np.random.default_rng(2)
        halves = np.array_split(rng.permutation(9), 2)
        counts = [rng.multinomial(len(half), np.full(len(half), 1 / len(half)), size=30) for half in halves]
        draws = [
            [list(half)] + [list(np.repeat(half, c)) for c in drawn] for half, drawn in zip(halves, counts, strict=True)
        ]

        def frontier_at(method: str, kls: list[float], resample: int) -> np.ndarray:
            columns = [i for i, name in enumerate(data.checkpoints["method"]) if name == method]
            found = np.zeros(len(kls))
            for choosing, measuring in ((0, 1), (1, 0)):
                kl, reward = (part[draws[choosing][resample]].mean(axis=0) for part in (data.kl, data.reward))
                best = [columns[i] for i in upper_frontier(kl[columns], reward[columns])]
                kl, reward = (part[draws[measuring][resample]].mean(axis=0) for part in (data.kl, data.reward))
                points = sorted((kl[i], reward[i]) for i in best)
                found += np.interp(kls, *zip(*points, strict=True)) / 2
            return found

        ends = []
        for method in ("dpo", "ppo"):
            chosen = np.flatnonzero(data.checkpoints["method"] == method)
            kl, reward = data.kl.mean(axis=0)[chosen], data.reward.mean(axis=0)[chosen]
            ends.append(kl[upper_frontier(kl, reward)[-1]])
        end = min(ends)
        grid = [end * i / 200 for i in range(201)]
        difference = np.array([frontier_at("dpo", grid, i) - frontier_at("ppo", grid, i) for i in range(31)])
        means = ((difference[:, 1:] + difference[:, :-1]) / 2).mean(axis=1)
        expected: dict[str, Any] = {"method": "dpo", "other": "ppo", "seeds": 1, "kl_from": 0.0, "kl_to": end}

        def with_interval(name: str, values: np.ndarray) -> None:
            low, high = np.quantile(values[1:], [0.1, 0.9])
            expected.update({name: values[0], f"{name}_low": low, f"{name}_high": high})

        with_interval("mean_difference", means)
        with_interval("area", means * end)
        expected["smallest_difference"], expected["largest_difference"] = difference[0].min(), difference[0].max()
        expected["share_above"] = (difference[0][1:] > 0).mean()
        for kl in (0.5, 1.0):
            with_interval(
                f"difference_at_{kl:g}",
                np.array([(frontier_at("dpo", [kl], i) - frontier_at("ppo", [kl], i))[0] for i in range(31)]),
            )
        beyond = [f"difference_at_9{part}" for part in ("", "_low", "_high")]
        assert list(table.columns) == [*expected, *beyond] and table[beyond].isna().all(axis=None)
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert 0 < row["share_above"] < 1

    def test_each_pair_of_methods_stands_once_in_the_papers_order(self) -> None:
        names = ["preferred_ft", "ppo", "unlikelihood", "dpo", "ppo_gt_trl", "ppo_gt", "another"]
        data = measured({name: [(1.0, 0.7)] for name in names}, prompts=4)
        table = dominance_table(data, RECIPE)
        order = ["dpo", "ppo_gt", "ppo_gt_trl", "ppo", "unlikelihood", "preferred_ft"]
        assert list(zip(table["method"], table["other"], strict=True)) == list(itertools.combinations(order, 2))
        assert set(table["kl_to"]) == {1.0}

    def test_a_frontier_of_a_twentieth_of_a_nat_is_a_range_and_less_is_none(self) -> None:
        for end, known in ((0.05, True), (0.049, False)):
            data = measured({"dpo": [(end, 0.9)], "ppo": [(1.0, 0.8)]}, prompts=4)
            assert dominance_table(data, RECIPE)["kl_to"].notna().tolist() == [known]

    def test_what_is_hard_in_a_prompt_cancels(self) -> None:
        data = measured({"dpo": [(2.0, 0.9)], "ppo": [(2.0, 0.8)]})
        shared = np.random.default_rng(0).standard_normal((40, 1)) * 0.5
        data.reward[:] += shared
        (row,) = dominance_table(data, RECIPE).to_dict("records")
        assert row["area_high"] - row["area_low"] < 0.01 and row["area"] == pytest.approx(0.1, abs=0.01)

    def test_resamples_keep_the_halves_apart(self) -> None:
        first, second = dominance.weights_of_resamples(11, RECIPE)
        assert first.shape == second.shape == (201, 11)
        assert np.allclose(first.sum(axis=1), 1) and np.allclose(second.sum(axis=1), 1)
        assert ((first > 0).any(axis=0) & (second > 0).any(axis=0)).sum() == 0


def write_run(folder: Path, run: str, prompts: list[str], shift: float) -> Path:
    rows = [
        {"run": run, "method": run, "seed": 0, "conservativeness": math.nan, "step": step, "prompt_id": prompt}
        | {"sample_index": k, "reward": 0.5 + shift * step + 0.01 * k, "kl": 1.0 * step, "tokens": 5, **MEASURES}
        for step in (0, 1)
        for prompt in prompts
        for k in (0, 1)
    ]
    path = folder / f"{run}.parquet"
    write_table(path, "evaluations", rows)
    return path


def test_the_stages_from_evaluations_to_figure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [f"p{i}" for i in range(6)]
    paths = [write_run(tmp_path, run, prompts, shift) for run, shift in (("dpo", 0.2), ("ppo", 0.1))]
    data = read_evaluations(paths, [0])
    assert data.reward.shape == (6, 4) and data.reward[0].tolist() == pytest.approx([0.505, 0.705, 0.505, 0.605])
    key = [(f"p{p}", 1.0, i) for p in range(3) for i in range(50)]
    scores = pd.DataFrame(key, columns=["prompt_id", "temperature", "sample_index"]).assign(
        reward=draw(3, 50, 1).ravel()
    )
    write_table(tmp_path / "scores.parquet", "scores", scores)
    ceiling, table, out = (tmp_path / name for name in ("ceiling.csv", "frontier.csv", "dominance.csv"))
    recipe = {"largest_beta": 4.0, "smallest_beta": 0.1, "betas": 12, "min_effective_samples": 20.0}
    optimal_frontier.run(
        argparse.Namespace(scores=[tmp_path / "scores.parquet"], recipe=json.dumps(recipe), out=ceiling)
    )
    named = {"evaluations": paths, "scores": [tmp_path / "scores.parquet"], "ceiling": ceiling}
    frontier.run(argparse.Namespace(**named, recipe='{"seeds": [0]}', out=table))
    found = pd.read_csv(table)
    assert len(found) == 4 and found["on_frontier"].all() and found["conservativeness"].isna().all()
    values = {"methods": METHODS, "seeds": [0], "confidence": 0.95, "bootstrap": 20, "seed": 0, "at_kl": [0.5]}
    dominance.run(argparse.Namespace(evaluations=paths, recipe=json.dumps(values), out=out))
    assert pd.read_csv(out).iloc[0]["difference_at_0.5"] == pytest.approx(0.05)
    images = [tmp_path / "f.svg", tmp_path / "f.png"]
    (tmp_path / "summary.json").write_text(json.dumps({"synthetic": True, "warnings": []}))
    facts = {
        "summary": tmp_path / "summary.json",
        "recipe": json.dumps({**WORDS, "task": "imdb", "methods": ["dpo"], "true_reward": "rule"}),
    }
    frontier_figure.run(argparse.Namespace(frontier=table, ceiling=ceiling, **facts, out=images))
    before = images[0].read_bytes()
    frontier_figure.run(argparse.Namespace(frontier=table, ceiling=ceiling, **facts, out=images))
    assert "Only 6 test prompts" in caplog.text
    assert images[0].read_bytes() == before and b"<svg" in before


def test_a_table_of_checkpoints_by_hand(tmp_path: Path) -> None:
    prompts = ["a", "b", "c"]
    rows = [
        {"run": run, "method": "dpo", "seed": seed, "conservativeness": beta, "step": step, "prompt_id": prompt}
        | {"sample_index": k, "reward": 0.1 * (p + step) + 0.02 * k, "kl": step * (1.0 + p + k), "tokens": 4 + k + p}
        | MEASURES
        for run, seed, beta in (("dpo_a", 0, 0.1), ("dpo_b", 1, 0.5))
        for step in (0, 7)
        for p, prompt in enumerate(prompts)
        for k in (0, 1)
        if (run, k) != ("dpo_b", 1)
    ]
    paths = [tmp_path / f"{run}.parquet" for run in ("dpo_a", "dpo_b")]
    for path in paths:
        write_table(path, "evaluations", [row for row in rows if row["run"] == path.stem])
    data = read_evaluations(paths, [0])
    assert data.prompts == prompts
    table = frontier_table(data)
    assert list(table.columns) == [
        *("run", "method", "seed", "conservativeness", "step", "samples", "tokens"),
        *("reward", "reward_se", "kl", "kl_se", "prompts", "on_frontier"),
    ]
    error = 0.1 / math.sqrt(3)  # of rewards 0, 0.1 and 0.2
    expected = [
        ["dpo_a", "dpo", 0, 0.1, 0, 6, 5.5, 0.11, error, 0.0, 0.0, 3, True],
        ["dpo_a", "dpo", 0, 0.1, 7, 6, 5.5, 0.81, error, 7 * 2.5, 7 / math.sqrt(3), 3, True],
        ["dpo_b", "dpo", 0, 0.5, 0, 3, 5.0, 0.1, error, 0.0, 0.0, 3, False],
        ["dpo_b", "dpo", 0, 0.5, 7, 3, 5.0, 0.8, error, 7 * 2.0, 7 / math.sqrt(3), 3, True],
    ]
    for row, values in zip(table.to_numpy().tolist(), expected, strict=True):
        assert row == pytest.approx(values, abs=1e-6)
    # A checkpoint that lacks a prompt which another has is no checkpoint.
    write_table(paths[1], "evaluations", [row for row in rows if row["run"] == "dpo_b"][1:])
    with pytest.raises(UserError, match="A checkpoint was not evaluated on every prompt"):
        read_evaluations(paths, [0])


def test_the_table_holds_each_checkpoint_against_the_ceiling(tmp_path: Path) -> None:
    prompts = [f"p{i}" for i in range(4)]
    path = write_run(tmp_path, "dpo", prompts, 0.2)
    rewards = draw(4, 60, 1)
    key = [(name, 1.0, i) for name in prompts for i in range(60)]
    scores = pd.DataFrame(key, columns=["prompt_id", "temperature", "sample_index"]).assign(reward=rewards.ravel())
    write_table(tmp_path / "scores.parquet", "scores", scores)
    betas = np.array([4.0, 0.3, 0.01])
    ceiling = tmp_path / "ceiling.csv"
    pd.DataFrame({"beta": betas, "reliable": [True, True, False]}).to_csv(ceiling, index=False)
    named = {"evaluations": [path], "scores": [tmp_path / "scores.parquet"], "ceiling": ceiling}
    frontier.run(argparse.Namespace(**named, recipe='{"seeds": [0]}', out=tmp_path / "out.csv"))
    table = pd.read_csv(tmp_path / "out.csv")
    reliable = optimal_frontier.optimum(rewards.astype(np.float32).astype(float), betas[:2])
    expected = above_ceiling(read_evaluations([path], [0]), prompts, reliable, betas[:2])
    for name in ("above_ceiling", "above_ceiling_z"):
        assert table[name].tolist() == pytest.approx(expected[name].tolist(), rel=1e-4, nan_ok=True)
    assert table["above_ceiling"].notna().tolist() == [True, False], "the second has more KL than is known"
    # Where nothing can be relied on, nothing is said.
    pd.DataFrame({"beta": betas, "reliable": False}).to_csv(ceiling, index=False)
    frontier.run(argparse.Namespace(**named, recipe='{"seeds": [0]}', out=tmp_path / "out.csv"))
    assert pd.read_csv(tmp_path / "out.csv")[["above_ceiling", "above_ceiling_z"]].isna().all(axis=None)
    write_table(tmp_path / "scores.parquet", "scores", scores.assign(prompt_id="q" + scores["prompt_id"]))
    with pytest.raises(UserError, match="were not evaluated on the prompt 'qp0'"):
        frontier.run(argparse.Namespace(**named, recipe='{"seeds": [0]}', out=tmp_path / "out.csv"))


def test_runs_on_other_prompts_are_refused(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, "dpo", ["a", "b"], 0.1), write_run(tmp_path, "ppo", ["a", "c"], 0.1)]
    with pytest.raises(UserError, match=r"ppo\.parquet was evaluated on other prompts than .*dpo\.parquet"):
        read_evaluations(paths, [0])


CEILING = pd.DataFrame(
    {"kl": [0.0, 1.0, 2.0, 3.0], "reward": [0.5, 0.7, 0.8, 0.85], "effective_samples": [4096.0, 900.0, 90.0, 9.0]}
).assign(samples=4096, reliable=[True, True, True, False])


def sweep() -> pd.DataFrame:
    """Three betas, two targets and two seeds of Preferred-FT, three checkpoints each."""
    runs = [("dpo", 0.1), ("dpo", 5.0), ("dpo", 1.0), ("ppo", 12.0), ("ppo", 3.0)]
    runs += [("preferred_ft", math.nan), ("preferred_ft", math.nan)]
    rows = [
        {"run": f"{method}_{i}", "method": method, "seed": 0, "conservativeness": value, "step": step}
        | {"reward": 0.5 + 0.1 * step, "kl": 1.0 * step + 0.1 * i * (step > 0), "on_frontier": i % 2 == 0}
        for i, (method, value) in enumerate(runs)
        for step in (0, 1, 2)
    ]
    return pd.DataFrame(rows).assign(samples=400, prompts=200, reward_se=0.01, kl_se=0.1)


METHODS = ("dpo", "ppo", "preferred_ft")


class TestFigure:
    def draw(self, table: pd.DataFrame, reward: str = "rule", **facts: Any) -> Any:
        recipe = frontier_figure.FrontierFigureRecipe(task="imdb", methods=METHODS, **WORDS, true_reward=reward)
        return frontier_figure.frontier_figure(table, CEILING, recipe, {"synthetic": True, "warnings": [], **facts})

    def test_runs_with_another_loss_are_a_line_of_their_own(self) -> None:
        dpo = sweep().query("method == 'dpo'")
        adapter = "dpo (learning_rate 0.0001, adapter {'rank': 16, 'alpha': 32})"
        others = [dpo.assign(method=name, run="mine") for name in ("dpo (loss ipo)", adapter)]
        recipe = frontier_figure.FrontierFigureRecipe(
            task="imdb", methods=("dpo", "dpo (loss ipo)", adapter), **WORDS, true_reward="rule"
        )
        table = pd.concat([dpo, *others], ignore_index=True)
        figure = frontier_figure.frontier_figure(table, CEILING, recipe, {"synthetic": True, "warnings": []})
        labels = [text.get_text().partition("\nβ")[0] for text in figure.legends[0].get_texts()]
        assert labels[-3:] == ["DPO", "DPO (loss ipo)", "DPO (learning_rate 0.0001, adapter\nrank 16, alpha 32)"]
        colors = {line.get_color() for line in figure.axes[0].lines if line.get_marker() not in ("None", "")}
        assert len(colors) == 3

    def test_a_legend_of_many_methods_stands_above_the_note(self) -> None:
        dpo = sweep().query("method == 'dpo'")
        names = (*(f"dpo (nll_weight 0.{i})" for i in range(1, 10)), "kto", "simpo", "ppo", "ppo_gt", "orpo")
        table = pd.concat([dpo.assign(method=name) for name in names], ignore_index=True)
        recipe = frontier_figure.FrontierFigureRecipe(task="imdb", methods=names, **WORDS, true_reward="rule")
        figure = frontier_figure.frontier_figure(table, CEILING, recipe, {"synthetic": True, "warnings": []})
        figure.draw_without_rendering()
        legend, note = figure.legends[0].get_window_extent(), figure._supxlabel.get_window_extent()
        assert legend.y0 > note.y1 and legend.y1 < figure.bbox.height

    def test_it_stands_alone(self) -> None:
        figure = self.draw(sweep())
        (axes,) = figure.axes
        assert axes.get_title(loc="left") == "IMDb sentiment: true reward against KL (synthetic records)"
        assert axes.get_xlabel() == "KL to the reference policy, nats per completion"
        note = " ".join(figure.get_supxlabel().split())
        assert (
            "True reward: a rule that knows how the reviews are meant. 200 test prompts. 2 completions of each." in note
        )
        assert "95% intervals over prompts" in note
        assert note.endswith("Synthetic: reviews and the reward are a program; no person was asked.")
        assert figure.get_suptitle() == "" and list(axes.texts) == [], "no number without a word"
        real = self.draw(sweep(), "classifier", synthetic=False, warnings=["9 are lost"])
        assert real.axes[0].get_title(loc="left") == "IMDb sentiment: true reward against KL"
        assert "a classifier of sentiment." in real.get_supxlabel() and real.get_supxlabel().endswith("9 are lost.")
        assert "Synthetic" not in real.get_supxlabel()

    def test_every_true_reward_has_its_words_and_its_axis(self) -> None:
        kinds = get_args(get_type_hints(TrueRewardsRecipe)["kind"])
        assert set(kinds) == set(frontier_figure.REWARDS)
        for kind in kinds:
            figure = self.draw(sweep(), kind)
            words, unit = frontier_figure.REWARDS[kind]
            assert figure.axes[0].get_ylabel() == f"Mean true reward, {unit}"
            assert f"True reward: {words}." in " ".join(figure.get_supxlabel().split())

    def test_a_points_run_can_be_told(self) -> None:
        """By the size of its marker: the legend lists the values in the order of its own markers."""
        figure = self.draw(sweep())
        (legend,) = figure.legends
        labels = [text.get_text() for text in legend.get_texts()]
        assert labels[2:] == ["DPO\nβ = 5, 1, 0.1", "PPO\ntarget KL = 3, 12", "Preferred-FT"]
        sizes = frontier_figure.marker_sizes("dpo", sweep()["conservativeness"][:9])
        assert sizes == {5.0: 3.0, 1.0: 5.25, 0.1: 7.5}
        drawn = {
            (float(x), line.get_markersize())
            for line in figure.axes[0].lines
            if line.get_marker() == "o"
            for x in line.get_xdata()
            if x > 0
        }
        # Runs 0, 1 and 2 are beta 0.1, 5 and 1, and their checkpoints lie a tenth of a nat apart.
        expected = {(step + 0.1 * i, size) for i, size in ((0, 7.5), (1, 3.0), (2, 5.25)) for step in (1, 2)}
        assert {(round(x, 6), size) for x, size in drawn} == expected
        assert frontier_figure.marker_sizes("ppo", pd.Series([12.0, 3.0])) == {3.0: 3.0, 12.0: 7.5}
        assert frontier_figure.marker_sizes("dpo", pd.Series([0.1])) == {0.1: 5.0}
        assert frontier_figure.marker_sizes("preferred_ft", pd.Series([math.nan])) == {}

    def test_bars_are_95_percent_intervals_and_a_method_without_runs_is_passed_over(self) -> None:
        table = sweep().query("run in ('dpo_0', 'preferred_ft_6')")
        (axes,) = self.draw(table).axes
        assert [len(one.lines) for one in axes.containers] == [3, 3], "DPO's and Preferred-FT's, and nothing of PPO's"
        data, _, (across, upright) = axes.containers[0].lines
        assert data.get_xydata() == pytest.approx(np.array([[0, 0.5], [1, 0.6], [2, 0.7]]))
        for bars, axis, half in ((across, 0, 1.96 * 0.1), (upright, 1, 1.96 * 0.01)):
            lengths = [segment[1][axis] - segment[0][axis] for segment in bars.get_segments()]
            assert lengths == pytest.approx([2 * half] * 3, rel=1e-3)
        assert axes.get_xlim() == pytest.approx((-0.02 * 3, 3))

    def test_the_legend_covers_no_data(self, tmp_path: Path) -> None:
        figure = self.draw(sweep())
        figure.savefig(tmp_path / "f.png")
        assert not figure.legends[0].get_window_extent().overlaps(figure.axes[0].get_window_extent())

    def test_few_prompts_and_equal_rewards_are_said(self) -> None:
        table = sweep().assign(prompts=8, samples=8, reward=0.5)
        figure = self.draw(table)
        assert figure.get_suptitle() == (
            "Only 8 test prompts: this tries the machinery and is no result.\nEvery checkpoint has the same reward."
        )
        assert "1 completion of each." in figure.get_supxlabel()

    def test_checkpoints_beyond_the_edge_are_counted(self) -> None:
        table = sweep()
        table.loc[[2, 5], "kl"] = 99.0
        assert "2 checkpoints lie beyond the right edge." in " ".join(self.draw(table).get_supxlabel().split())


def test_a_collapsed_policy_does_not_stretch_the_axis() -> None:
    assert frontier_figure.right_edge([63.0, 12.0, 0.1, 13.0, 202.0, 0.2]) == 1.5 * 13.0
    assert frontier_figure.right_edge([4.0, 5.0]) == 1.5 * 4.0
    # Of seven methods three may have collapsed.
    assert frontier_figure.right_edge([63.0, 202.0, 72.0, 13.0, 12.0, 10.0, 9.0]) == 1.5 * 13.0
    # One that goes farther, and has not collapsed, is followed.
    assert frontier_figure.right_edge([2.25, 2.41, 0.7, 0.15]) == 1.05 * 2.41
    assert frontier_figure.right_edge([0.0]) == frontier_figure.right_edge([]) == pytest.approx(0.15)


def test_several_seeds_have_a_frontier_each_and_a_mean(tmp_path: Path) -> None:
    """Rewards that rise by 0.2 and 0.4 a nat with two seeds of DPO, and by 0.1 with both of PPO."""
    prompts = [f"p{i}" for i in range(4)]
    gains = {0: {"dpo": 0.2, "ppo": 0.1}, 3: {"dpo": 0.4, "ppo": 0.1}}
    paths = []
    for seed, runs in gains.items():
        (tmp_path / str(seed)).mkdir()
        paths += [write_run(tmp_path / str(seed), run, prompts, gain) for run, gain in runs.items()]
    measured = read_evaluations(paths, [0, 3])
    table = frontier_table(measured)
    assert table["seed"].tolist() == [0, 0, 0, 0, 3, 3, 3, 3] and table["on_frontier"].all()
    assert frontier.of_seed(measured, 3).reward.mean(axis=0) == pytest.approx([0.505, 0.905, 0.505, 0.605])
    mean = frontier_figure.mean_frontier(table[table["method"] == "dpo"])
    assert mean["kl"].iloc[[0, -1]].tolist() == [0, 1] and mean["reward"].iloc[-1] == pytest.approx((0.705 + 0.905) / 2)
    half = mean_over_seeds([0.705, 0.905], 0.0, 4, 0.95).interval
    assert mean[["low", "high"]].iloc[-1].tolist() == pytest.approx([half.low, half.high])
    recipe = DominanceRecipe(methods=METHODS, seeds=(0, 3), confidence=0.95, bootstrap=50, seed=0, at_kl=(1.0,))
    (row,) = dominance.dominance_table(measured, recipe).to_dict("records")
    # The differences grow from 0 to 0.1 and to 0.3.
    assert (row["seeds"], row["kl_to"], row["share_above"]) == (2, 1.0, 1.0)
    assert row["mean_difference"] == pytest.approx(0.1) and row["difference_at_1"] == pytest.approx(0.2)
    spread = mean_over_seeds([0.1, 0.3], 0.0, 4, 0.95).interval
    assert [row["difference_at_1_low"], row["difference_at_1_high"]] == pytest.approx([spread.low, spread.high])
    (tmp_path / "summary.json").write_text(json.dumps({"synthetic": False, "warnings": []}))
    ceiling = pd.DataFrame({"kl": [0.0, 1.0], "reward": [0.5, 1.0], "reliable": [True, False], "samples": 9})
    shown = frontier_figure.frontier_figure(
        *(
            table,
            ceiling,
            frontier_figure.FrontierFigureRecipe(task="imdb", methods=METHODS, **WORDS, true_reward="rule"),
        ),
        {"synthetic": False, "warnings": []},
    )
    assert "mean frontier over 2 seeds" in " ".join(shown.get_supxlabel().split())


def test_the_optimal_frontier_of_several_seeds_is_their_mean() -> None:
    recipe = optimal_frontier.OptimalFrontierRecipe(
        largest_beta=4.0, smallest_beta=0.1, betas=5, min_effective_samples=9.0
    )
    tables = [optimal_frontier.ceiling_table(draw(6, 80, seed), recipe) for seed in (1, 2)]
    both = optimal_frontier.over_seeds(tables)
    assert both["reward"].tolist() == pytest.approx(((tables[0]["reward"] + tables[1]["reward"]) / 2).tolist())
    assert both["reliable"].tolist() == (tables[0]["reliable"] & tables[1]["reliable"]).tolist()
    spread = (tables[0]["kl"] - tables[1]["kl"]) ** 2 / 4
    within = ((tables[0]["kl_se"] + tables[1]["kl_se"]) / 2) ** 2
    assert both["kl_se"].tolist() == pytest.approx(np.sqrt(within + spread).tolist())
    assert optimal_frontier.over_seeds(tables[:1]) is tables[0]
