"""What makes a neat table say little."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from made_up import words
from prefopt.analysis.caveats import (
    data_notes,
    equal_texts,
    few_prompts,
    interval_sources,
    prompts_note,
    read_facts,
    synthetic_note,
)
from prefopt.errors import UserError


def samples(texts: dict[tuple[str, float], list[str]]) -> pd.DataFrame:
    return pd.DataFrame(
        {"run": method, "temperature": temperature, "prompt_id": f"p{i}", "sample_index": 0, "text": text}
        for (method, temperature), column in texts.items()
        for i, text in enumerate(column)
    )


def test_few_prompts() -> None:
    assert few_prompts(8) == ["Only 8 test prompts: this tries the machinery and is no result."]
    assert few_prompts(49) != [] and few_prompts(50) == []


def test_one_text_for_most_prompts_is_said_with_its_temperatures() -> None:
    different = ["a", "b", "c", "d"]
    table = samples({("dpo", 0.0): ["x"] * 4, ("dpo", 0.25): ["x", "x", "x", "y"], ("dpo", 1.0): ["x", "x", "y", "y"]})
    assert equal_texts(table) == ["DPO wrote one and the same text for most prompts at T = 0, 0.25."]
    assert equal_texts(samples({("dpo", 0.0): different})) == []
    assert equal_texts(samples({("dpo", 0.0): ["one prompt"]})) == []
    assert len(equal_texts(samples({("dpo", 0.0): ["two prompts"] * 2}))) == 1


def test_methods_that_wrote_the_same_are_named_together() -> None:
    different, other = ["a", "b", "c"], ["a", "b", "z"]
    texts = {("sft", 0.0): different, ("dpo", 0.0): different, ("ppo", 0.0): other}
    texts |= {("sft", 1.0): different, ("dpo", 1.0): other, ("ppo", 1.0): other}
    assert equal_texts(samples(texts)) == [
        "SFT and DPO wrote the same texts at T = 0.",
        "DPO and PPO wrote the same texts at T = 1.",
    ]
    # At temperature 0 the best of N is the reference policy's greedy text, as it must be.
    greedy = {("sft", 0.0): different, ("best_of_4", 0.0): different, ("best_of_4", 1.0): different}
    assert equal_texts(samples(greedy), {"best_of_4"}) == []
    assert len(equal_texts(samples(greedy))) == 1


def test_the_first_sample_of_a_prompt_counts() -> None:
    twice = pd.concat([samples({("dpo", 1.0): ["a", "b"]}), samples({("dpo", 1.0): ["x", "x"]})])
    assert equal_texts(twice) == []


@pytest.mark.parametrize(
    ("judge", "end"),
    [
        ("oracle:embedded-v1", "preferences and the judge are a program"),
        ("chat:m/t@0", "preferences are by a program"),
        ("human:simulated-0123", "preferences and the raters are a program"),
        ("human:0123", "preferences are by a program"),
    ],
)
def test_what_is_a_program(judge: str, end: str) -> None:
    assert synthetic_note(words("tldr")["written"], judge) == f"posts, references, {end}; no person was asked."


def test_notes_name_the_task_where_there_are_several() -> None:
    one = {**words("imdb"), "task": "imdb", "synthetic": True, "warnings": ["the rest is lost"]}
    other = {**words("hh"), "task": "hh", "synthetic": False, "warnings": ["9 are lost."]}
    assert list(data_notes([one], {"imdb": "rule"})) == [
        "Synthetic: reviews and the reward are a program; no person was asked.",
        "The rest is lost.",
    ]
    assert list(data_notes([one, other], {})) == [
        "IMDb sentiment is synthetic: reviews are by a program; no person was asked.",
        "IMDb sentiment: The rest is lost.",
        "Anthropic HH dialogue: 9 are lost.",
    ]


def test_an_interval_of_one_seed_is_over_prompts_alone() -> None:
    assert [interval_sources(seeds) for seeds in (1, 3)] == ["prompts", "prompts and 3 seeds of training"]


def test_prompts_are_a_number_or_a_range() -> None:
    assert prompts_note([8, 8]) == "8 test prompts." and prompts_note([9, 7, 8]) == "7 to 9 test prompts."


@pytest.mark.parametrize("content", [None, "", "[]", "{", "[" * 100000])
def test_facts_that_cannot_be_read_are_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "summary.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"summary\.json .* again"):
        read_facts(path)
