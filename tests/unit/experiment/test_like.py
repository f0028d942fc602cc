"""Tasks of the user's own."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from test_config import merged, read, with_value

from prefopt.errors import UserError
from prefopt.experiment import targets
from prefopt.experiment.config import resolve
from prefopt.experiment.like import _TAKEN, GOLD_FRACTION
from prefopt.experiment.stage_recipes import stage_recipe

RULES = Path(__file__).parents[3] / "workflow" / "rules"


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    return str(path)


def own(pairs: str, **values: Any) -> dict[str, Any]:
    return {"like": "tldr", "data": {"source": "files", "preferences": [pairs], "demonstrations": [pairs]}, **values}


def test_a_task_takes_over_what_it_does_not_say(pairs: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = resolve(with_value("tasks.support", own(pairs, dpo={"beta": 0.4})))
    support, tldr = config["tasks"]["support"], config["tasks"]["tldr"]
    assert (support["dpo"]["beta"], tldr["dpo"]["beta"]) == (0.4, 0.25)
    assert support["dpo"]["learning_rate"] == tldr["dpo"]["learning_rate"]
    assert support["runs"] == tldr["runs"] and support["base"]["source"] == "scratch"
    assert support["form"] == "tldr" and "like" not in support
    assert support["words"] == {"title": "support", "reference": "the reference"}
    assert tldr["words"] == {"title": "TL;DR summarization", "reference": "the reference summary"}
    # An oracle knows embedded records alone.
    assert support["judge"]["kind"] == "reward_model" and support["data"]["gold_fraction"] == GOLD_FRACTION
    assert "tasks.support.judge is a reward model in place of the oracle of tldr" in caplog.text
    assert resolve(config) == config
    assert "results/support_winrates.csv" in targets.result_files(config)
    assert stage_recipe(config, "support", "prepare")["suffix"] == "\n\nTL;DR:"
    assert stage_recipe(config, "support", "summary") == {
        **support["words"],
        "written": "posts, references, preferences",
    }


def test_what_it_says_stands(pairs: str) -> None:
    words = {"title": "Support", "reference": "the agent's answer"}
    section = own(pairs, words=words, judge={"kind": "reward_model", "order": "both"}, runs={"ppo": None})
    section["data"]["gold_fraction"] = 0.5
    config = resolve(with_value("tasks.support", section))
    support = config["tasks"]["support"]
    assert support["words"] == words and "ppo" not in support["runs"] and "ppo" in config["tasks"]["tldr"]["runs"]
    assert support["judge"]["order"] == "both" and support["data"]["gold_fraction"] == 0.5


def test_a_task_may_be_like_a_task_that_is_left_out_or_like_one_of_the_users_own(pairs: str) -> None:
    alone = resolve(with_value("tasks", {"imdb": None, "hh": None, "cnndm": None, "tldr": None, "support": own(pairs)}))
    assert list(alone["tasks"]) == ["support"] and len(alone["tasks"]["support"]["runs"]) == 6
    both = {"support": own(pairs, dpo={"beta": 0.4}), "other": {"like": "support", "sft": {"epochs": 5}}}
    config = resolve(with_value("tasks", both))
    other = config["tasks"]["other"]
    assert (other["dpo"]["beta"], other["sft"]["epochs"], other["form"]) == (0.4, 5, "tldr")
    assert other["words"]["title"] == "other" and other["data"]["preferences"] == [pairs]


def test_records_are_never_taken_over(pairs: str) -> None:
    """A task that says where its own records come from reads none of the other task's."""
    tldr = {"data": {"source": "files", "posts": [pairs], "comparisons": [pairs]}, "judge": {"kind": "reward_model"}}
    tldr["data"]["gold_fraction"] = 0.2
    config = resolve(with_value("tasks", {"tldr": tldr, "support": own(pairs), "cnndm": None}))
    support = config["tasks"]["support"]["data"]
    assert support["posts"] == support["comparisons"] == [] and support["gold_fraction"] == 0.2


def test_every_form_has_tasks_of_its_own(pairs: str) -> None:
    tasks = {
        "dialogue": {"like": "hh", "data": {"source": "files", "comparisons": [pairs]}},
        "papers": {"like": "cnndm", "models_of": "support", "data": {"source": "files", "articles": [pairs]}},
        "support": own(pairs),
        "films": {"like": "imdb", "data": {"embedded": {"seed": 3}}},
    }
    config = resolve(with_value("tasks", tasks))
    kinds = {name: targets.kind(section) for name, section in config["tasks"].items() if name in tasks}
    assert kinds == {"dialogue": "comparison", "papers": "transfer", "support": "comparison", "films": "frontier"}
    assert config["tasks"]["films"]["words"] == {"title": "films"}
    assert config["tasks"]["papers"]["judge"]["kind"] == "reward_model"


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        ({"support": {}}, "tasks.support (a section) is not a key; *any name with `like`*"),
        (
            {"support": {"like": "tdlr"}},
            "tasks.support.like is 'tdlr'; allowed: another task, which are cnndm, hh, imdb, tldr.",
        ),
        ({"support": {"like": 3}}, "tasks.support.like is no text; allowed: *"),
        (
            {"a": {"like": "b"}, "b": {"like": "a"}},
            "tasks.a.like is 'b', which is like *",
        ),
        ({"tldr": {"like": "tldr"}}, "tasks.tldr.like is 'tldr', which is like tldr itself; name a task that is not."),
        ({"Support": {"like": "tldr"}}, "tasks.Support is no name for a task; allowed: small letters*"),
        ({"seed_1": {"like": "tldr"}}, "tasks.seed_1 is no name for a task; *"),
        ({"tldr_scores": {"like": "tldr"}}, "tasks.tldr_scores is no name for a task; *"),
        ({"tldr": {"form": "hh"}}, "tasks.tldr.form is 'hh'; tldr is a task of its own, so give yours another name."),
        ({"support": {"like": "tldr", "dop": {}}}, "tasks.support.dop (a section) is not a key; did you mean 'dpo'? *"),
        (
            {"news": {"like": "cnndm", "models_of": "imdb"}},
            "tasks.news.models_of is 'imdb'; allowed: a task that trains models and is not left out, which are tldr, hh.",
        ),
        (
            {"support": {"like": "tldr", "data": {"source": "files"}}},
            "tasks.support.data.source is 'files', but *",
        ),
        (
            {"tldr": {"evaluation": {"against": {"run": "no", "temperature": 0.3}}}},
            "tasks.tldr.evaluation.against.run is 'no'; allowed: the task's runs, which are base, *",
        ),
        (
            {"tldr": {"evaluation": {"against": {"run": "sft", "temperature": 0.3}}}},
            "tasks.tldr.evaluation.against.temperature is 0.3; allowed: one of sampling.temperatures, which are *",
        ),
        (
            {"tldr": {"evaluation": {"against": {"run": "sft"}}}},
            "tasks.tldr.evaluation.against.temperature is missing; *",
        ),
    ],
)
def test_what_cannot_be_is_said(tasks: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        resolve(merged(read("config.yaml"), {"tasks": tasks}))
    pattern = re.escape(sentence).replace(r"\*", ".*")
    assert any(re.fullmatch(pattern, line) for line in str(raised.value).splitlines()), str(raised.value)


def test_a_run_is_what_completions_are_held_against_in_words() -> None:
    config = resolve(with_value("tasks.tldr.evaluation.against", {"run": "sft", "temperature": 0.25}))
    assert config["tasks"]["tldr"]["words"]["reference"] == "SFT (T = 0.25)"


def test_names_that_files_of_another_task_have_are_those_of_the_rules() -> None:
    """A task `a_scores` and the file `a_scores.parquet` of a task `a` would be one."""
    text = "".join(path.read_text() for path in RULES.glob("*.smk"))
    bare = set(re.findall(r"([a-z]+/)\{task\}\.parquet", text))
    ends = {end for folder in bare for end in re.findall(rf"{folder}\{{task\}}_([a-z_]+)\.parquet", text)}
    assert ends and all(_TAKEN.fullmatch(f"tldr_{end}") for end in ends)
