from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prefopt.analysis.verdicts import settle
from prefopt.errors import UserError
from prefopt.judging import stage
from prefopt.judging.judge import Comparison, Verdict, order_of
from prefopt.judging.stage import judge_samples
from prefopt.store.tables import read_manifest, read_table, write_table


class LongerWins:
    """Judges by length; an empty text gets no verdict."""

    name = "longer:1"

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        return [self._verdict(c) for c in comparisons]

    def report(self) -> Mapping[str, Any]:
        return {"judge_accuracy": 0.6}

    def _verdict(self, comparison: Comparison) -> Verdict:
        a, b = len(comparison.first.strip()), len(comparison.second.strip())
        if not a or not b:
            return Verdict("invalid", "no text")
        return Verdict("tie" if a == b else "first" if a > b else "second", f"{a} {b}")


PROMPTS = pd.DataFrame(
    [
        {
            "prompt_id": f"p{i}",
            "prompt": "POST: x\n\nTL;DR:",
            "reference": " four",
            "split": "test" if i < 30 else "validation",
            "facts": "",
            "prompt_ids": [1, 2],
        }
        for i in range(40)
    ]
)
LENGTHS = {f"p{i}": 7 for i in range(40)}


def samples(text: str = " sample") -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "prompt_id": f"p{i}",
                "sample_index": 0,
                "run": "dpo",
                "temperature": temperature,
                "split": "test" if i < 30 else "validation",
                "text": text,
                "tokens": 5,
                "token_ids": [1, 2, 3, 4, 0],
                "finish_reason": "eos",
                "logp": -3.0,
                "reference_logp": -4.0,
            }
            for i in range(40)
            for temperature in (0.0, 1.0)
        ]
    )


@pytest.mark.parametrize(("text", "outcome"), [(" longer", "win"), (" no", "loss"), (" same", "tie"), ("", "invalid")])
def test_every_sample_is_judged_whatever_its_place(text: str, outcome: str) -> None:
    verdicts = judge_samples(LongerWins(), samples(text), PROMPTS, LENGTHS, "random", seed=0)
    assert len(verdicts) == 80
    assert set(verdicts["outcome"]) == {outcome}
    assert set(verdicts["order"]) == {"policy_first", "reference_first"}
    assert set(verdicts["judge"]) == {"longer:1"}
    assert set(verdicts["reference_tokens"]) == {7}
    assert verdicts["well_formed"].isna().all()
    expected = [order_of(0, i, "dpo", t, 0) for i in PROMPTS["prompt_id"] for t in (0.0, 1.0)]
    assert verdicts["order"].tolist() == expected


def test_where_there_are_facts_a_sample_is_well_formed_or_not() -> None:
    facts = json.dumps({"event": "my sister anna broke the old guitar", "distractors": []})
    for text, expected in ((" my sister anna broke the old guitar.", True), (" the guitar of anna.", False)):
        verdicts = judge_samples(LongerWins(), samples(text), PROMPTS.assign(facts=facts), LENGTHS, "random", seed=0)
        assert set(verdicts["well_formed"]) == {expected}


def test_both_orders_are_shown_and_settled() -> None:
    class FirstWins(LongerWins):
        """Prefers the place, except for one prompt."""

        def _verdict(self, comparison: Comparison) -> Verdict:
            if comparison.prompt_id == "p0":
                return Verdict("first" if comparison.first == " sample" else "second", "the sample", 0.5)
            return Verdict("first", "the first", 0.5)

    verdicts = judge_samples(FirstWins(), samples(), PROMPTS, LENGTHS, "both", seed=0)
    assert len(verdicts) == 160
    settled = settle(verdicts, ["prompt_id", "run", "temperature", "sample_index"])
    assert len(settled) == 80
    one = settled["prompt_id"] == "p0"
    assert settled[one]["outcome"].tolist() == ["win", "win"]
    assert set(settled[~one]["outcome"]) == {"tie"}
    assert settled["flipped"].astype(float).mean() == pytest.approx(78 / 80)
    assert settled["first_wins"].sum() / settled["decided"].sum() == pytest.approx((78 * 2 + 2) / 160)
    assert set(settled["cost_usd"]) == {1.0}


def test_another_judge_sees_the_selected_temperature_on_test_prompts() -> None:
    drawn = samples()
    # Of the validation prompts the task's own judge has won those at temperature 1, and no other.
    validation = (drawn["split"] == "validation") & (drawn["temperature"] == 1)
    verdicts = drawn.assign(outcome=["win" if won else "loss" for won in validation])
    chosen = stage.selected_samples(drawn, verdicts)
    assert len(chosen) == 30
    assert set(chosen["temperature"]) == {1.0} and set(chosen["split"]) == {"test"}


def test_winners_are_recorded_as_the_judge_saw_them() -> None:
    verdicts = judge_samples(LongerWins(), samples(" longer"), PROMPTS, LENGTHS, "random", seed=0)
    place = verdicts["order"].map({"policy_first": "first", "reference_first": "second"})
    assert (verdicts["winner"] == place).all()


def test_samples_of_other_prompts_are_refused() -> None:
    with pytest.raises(UserError, match=r"'p3' .* is not among the prompts"):
        judge_samples(LongerWins(), samples(), PROMPTS[PROMPTS["prompt_id"] != "p3"], LENGTHS, "random", seed=0)
    with pytest.raises(UserError, match="is of split 'train' there"):
        judge_samples(LongerWins(), samples(), PROMPTS.assign(split="train"), LENGTHS, "random", seed=0)
    with pytest.raises(UserError, match="demonstrations lack prompt 'p0'"):
        judge_samples(LongerWins(), samples(), PROMPTS, {}, "random", seed=0)
    with pytest.raises(
        UserError, match=r"^The prompt 'p0' has no response to compare with, as it came alone: give it one"
    ):
        judge_samples(LongerWins(), samples(), PROMPTS.assign(reference=""), {}, "random", seed=0)


def arguments(tmp_path: Path, kind: str) -> argparse.Namespace:
    demonstrations = [
        {
            "prompt_id": f"p{i}",
            "prompt": "x",
            "response": "four",
            "split": "test",
            "facts": "",
            "prompt_ids": [1],
            "response_ids": [4] * 6 + [0],
        }
        for i in range(40)
    ]
    write_table(tmp_path / "demonstrations.parquet", "demonstrations", demonstrations)
    prompts = write_table(tmp_path / "prompts.parquet", "prompts", PROMPTS)
    write_table(tmp_path / "samples.parquet", "samples", samples(), prompts=prompts["content_hash"])
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    recipe = {
        "kind": kind,
        "order": "random",
        "seed": 5,
        "repeat": 0.0,
        "suffix": "",
        "token_budget": 100,
        "chat": None,
    }
    return parser.parse_args(
        [
            *("--samples", str(tmp_path / "samples.parquet"), "--prompts", str(tmp_path / "prompts.parquet")),
            *("--demonstrations", str(tmp_path / "demonstrations.parquet")),
            *("--recipe", json.dumps(recipe)),
            *("--out", str(tmp_path / "verdicts.parquet")),
        ]
    )


def test_the_stage_writes_verdicts_with_their_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "build_judge", lambda *_: LongerWins())
    args = arguments(tmp_path, "oracle")
    stage.run(args)
    verdicts = read_table(args.out, "verdicts")
    manifest = verdicts.attrs["manifest"]
    assert len(verdicts) == 80
    assert set(verdicts["outcome"]) == {"win"}
    assert set(verdicts["reference_tokens"]) == {7}
    assert manifest["judge"] == "longer:1"
    assert manifest["recipe"]["seed"] == 5
    assert manifest["judge_accuracy"] == 0.6
    samples_hash = read_table(args.samples, "samples").attrs["manifest"]["content_hash"]
    assert manifest["inputs"] == {
        "samples": samples_hash,
        "prompts": read_manifest(args.prompts)["content_hash"],
        "demonstrations": read_manifest(args.demonstrations)["content_hash"],
    }


def test_the_stage_judges_what_another_judge_selected_and_people_the_test_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "build_judge", lambda *_: LongerWins())
    args = arguments(tmp_path, "oracle")
    stage.run(args)
    # It found both temperatures equally good, so that the lower one is selected.
    args.selected_by, args.out = args.out, tmp_path / "again.parquet"
    stage.run(args)
    again = read_table(args.out, "verdicts")
    assert (len(again), set(again["temperature"]), set(again["split"])) == (30, {0.0}, {"test"})
    of_people = arguments(tmp_path, "human")
    stage.run(of_people)
    shown = read_table(of_people.out, "verdicts")
    assert (len(shown), set(shown["temperature"]), set(shown["split"])) == (60, {0.0, 1.0}, {"test"})


def test_samples_of_another_prompts_table_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, "oracle")
    write_table(args.prompts, "prompts", PROMPTS.assign(reference=" other"))
    with pytest.raises(UserError, match="made with prompts"):
        stage.run(args)


def test_a_reward_model_judge_needs_its_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--gold-model"):
        stage.run(arguments(tmp_path, "reward_model"))


def test_the_oracle_refuses_records_without_facts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no hidden facts"):
        stage.run(arguments(tmp_path, "oracle"))


def test_an_unknown_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="allowed: oracle, reward_model"):
        stage.run(arguments(tmp_path, "gpt"))


def test_a_runs_completions_take_the_place_of_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "build_judge", lambda *_: LongerWins())
    args = arguments(tmp_path, "oracle")
    prompts = read_manifest(args.prompts)["content_hash"]
    longer = samples(" a longer sample").assign(run="sft", tokens=9)
    args.against, args.against_temperature = tmp_path / "sft.parquet", 1.0
    write_table(args.against, "samples", longer[longer["prompt_id"] != "p39"], prompts=prompts)
    with pytest.raises(UserError, match=r"demonstrations lack prompt|'p39' .* is not among the prompts"):
        stage.run(args)  # whatever the judge sees, it is of the same prompts
    write_table(args.against, "samples", longer, prompts=prompts)
    stage.run(args)
    verdicts = read_table(args.out, "verdicts")
    assert set(verdicts["outcome"]) == {"loss"} and set(verdicts["reference_tokens"]) == {9}
    assert verdicts.attrs["manifest"]["inputs"]["against"] == read_manifest(args.against)["content_hash"]
    args.against_temperature = 0.3
    with pytest.raises(UserError, match=r"no completion at temperature 0\.3: take one of those"):
        stage.run(args)
    write_table(args.against, "samples", longer, prompts="others")
    with pytest.raises(UserError, match="was made with prompts = 'others'"):
        stage.run(args)
