"""A config is completed from the schema, checked in one sentence, and cut into the recipe of each stage."""

from __future__ import annotations

import copy
import fnmatch
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefopt.errors import UserError
from prefopt.experiment.config import doubled_keys, leaves, load_schema, resolve
from prefopt.experiment.stage_recipes import compared, judge_recipe, stage_recipe
from prefopt.planning.needs import needs

CONFIG = Path(__file__).parents[3] / "config"


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = yaml.safe_load((CONFIG / name).read_text(encoding="utf-8"))
    return result


def merged(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """What Snakemake makes of a configfile and an overlay."""
    result = copy.deepcopy(base)
    for key, value in overlay.items():
        mergeable = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if mergeable else copy.deepcopy(value)
    return result


def with_value(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return merged(read("config.yaml"), value)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return resolve(read("config.yaml"))


def test_defaults_are_filled_in_at_every_depth(config: dict[str, Any]) -> None:
    tldr = config["tasks"]["tldr"]
    assert tldr["dpo"]["optimizer"] == "rmsprop" and tldr["sft"]["optimizer"] == "adamw"
    assert tldr["data"]["splits"] == {"train": 0.7, "validation": 0.1, "test": 0.2}
    assert tldr["data"]["hub"]["posts_revision"] is None
    assert config["compute"]["dtype"] == "float32"


def with_records(*records: Any) -> dict[str, Any]:
    """Records of one's own in the place of dialogues, with a judge that does not need embedded ones."""
    data = {"source": "records", "records": list(records), "gold_fraction": 0.5}
    return with_value("tasks.hh", {"data": data, "judge": {"kind": "reward_model"}})


def test_a_source_of_records_may_be_its_path_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"")
    config = resolve(with_records(str(path), {"hub": "a/b", "weight": 2}))
    first, second = config["tasks"]["hh"]["data"]["records"]
    nothing = dict.fromkeys(("path", "hub", "configuration", "split", "revision", "format", "as", "weight", "count"))
    assert first == {**nothing, "path": str(path)} and second == {**nothing, "hub": "a/b", "weight": 2.0}
    assert config["tasks"]["hh"]["data"]["pairs"] == {"rule": "best_vs_random", "margin": 0.0}
    assert config["tasks"]["hh"]["base"]["source"] == "scratch" and resolve(config) == config


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([], " is empty, and data.source is 'records'; give it a path or the name of a data set."),
        ([3], "[[]0] is 3; allowed: a path, or a section with path or hub."),
        ([{}], "[[]0] has neither path nor hub; give one of them."),
        ([{"path": __file__, "hub": "a/b"}], "[[]0] has both path and hub; give one of them."),
        (["nowhere.jsonl"], "[[]0].path names 'nowhere.jsonl'; no such file or folder is seen from the working *"),
        (
            [__file__],
            "[[]0].path names '*test_config.py'; allowed: a folder, or a file that ends like those of data.posts.",
        ),
        (
            [{"hub": "a/b", "fromat": "hh"}],
            "[[]0].fromat (a text, which is not shown) is not a key; did you mean 'format'*",
        ),
        (
            [{"hub": "a/b", "format": "chatml"}],
            "[[]0].format is 'chatml'; allowed: pairs, prompt_response, messages, *",
        ),
        ([{"hub": "a/b", "as": "dev"}], "[[]0].as is 'dev'; allowed: train, test or null."),
        ([{"hub": "a/b", "weight": 0}], "[[]0].weight is 0; allowed: a number above 0 or null."),
        ([{"hub": "a/b", "weight": 1, "count": 2}], "[[]0] has both weight and count; give one of them."),
        (
            [{"path": str(Path(__file__).parent), "revision": "b"}],
            "[[]0].revision is 'b', which is not read of '*'; leave *",
        ),
        ([{"hub": "a/b", "as": side} for side in ("train", "test")], "[[]1] names 'a/b' a second time; leave one out."),
    ],
)
def test_a_bad_source_of_records_is_named(records: list[Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(with_records(*records))
    assert fnmatch.fnmatchcase(str(caught.value), f"tasks.hh.data.records{sentence}")


def test_a_task_that_is_null_is_left_out() -> None:
    few = resolve(with_value("tasks", {"imdb": None, "hh": None}))
    assert list(few["tasks"]) == ["tldr", "cnndm"] and resolve(few) == few
    sentence = "tasks.cnndm.models_of is 'tldr', a task that is left out; leave this one out too, or neither."
    with pytest.raises(UserError, match=f"^{sentence}$"):
        resolve(with_value("tasks.tldr", None))
    with pytest.raises(UserError, match=r"^tasks holds nothing; leave at least one in\.$"):
        resolve(with_value("tasks", dict.fromkeys(("imdb", "tldr", "hh", "cnndm"))))


def test_resolving_again_changes_nothing_and_the_given_config_is_left_alone(config: dict[str, Any]) -> None:
    given = read("config.yaml")
    assert resolve(given) == config == resolve(config)
    assert given == read("config.yaml")


def test_no_value_stands_both_in_the_config_and_as_the_same_default_in_the_schema() -> None:
    schema = load_schema()
    twice = []
    for path, value in leaves(read("config.yaml")):
        if ".runs." in path or ".other_judges." in path:  # names of the user's own, each a section without defaults
            continue
        below = schema
        for key in path.split("."):
            below = below["properties"][key]
        if "default" in below and below["default"] == value:
            twice.append(path)
    assert twice == []


@pytest.mark.parametrize(
    ("data", "expected"), [("embedded", "shipped"), ("files", "scratch")], ids=["embedded", "files"]
)
def test_a_base_that_is_not_named_is_shipped_for_embedded_data_and_made_otherwise(
    tmp_path: Path, data: str, expected: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("")
    overlay = {"source": data, "posts": [str(file)], "comparisons": [str(file)], "gold_fraction": 0.3}
    judge = {"kind": "oracle" if data == "embedded" else "reward_model"}
    tldr = {"data": overlay, "judge": judge, "human": None}
    resolved = resolve(merged(read("config.yaml"), {"tasks": {"tldr": tldr}}))
    assert resolved["tasks"]["tldr"]["base"]["source"] == expected


def test_numbers_that_yaml_reads_as_text_or_as_another_kind_are_understood() -> None:
    assert yaml.safe_load("5e-5") == "5e-5"
    tldr = resolve(with_value("tasks.tldr.dpo", {"learning_rate": "5e-5", "beta": 1, "batch_size": 64.0}))["tasks"][
        "tldr"
    ]
    assert tldr["dpo"]["learning_rate"] == 5e-5
    assert (tldr["dpo"]["beta"], type(tldr["dpo"]["beta"])) == (1.0, float)
    assert (tldr["dpo"]["batch_size"], type(tldr["dpo"]["batch_size"])) == (64, int)


def test_what_the_command_line_leaves_text_is_read_as_its_type() -> None:
    """Snakemake's `--config` makes text of all within brackets."""
    from snakemake.cli import parse_config

    said = parse_config(
        [
            "seeds=[0,1]",
            "tasks={imdb: null, tldr: {dpo: {beta: 0.5, epochs: 2, nll_weight: 1, length_normalized: true, seed: null}, "
            'runs: {ppo: null, mine: {method: dpo, beta: .2, loss: hinge}}, base: {source: hub, name: "10"}}}',
        ]
    )
    given, config = merged(read("config.yaml"), said), resolve(merged(read("config.yaml"), said))
    assert given["seeds"] == ["0", "1"] and config["seeds"] == [0, 1] and "imdb" not in config["tasks"]
    tldr = config["tasks"]["tldr"]
    found = {key: tldr["dpo"][key] for key in ("beta", "epochs", "nll_weight", "length_normalized", "seed")}
    assert found == {"beta": 0.5, "epochs": 2, "nll_weight": 1.0, "length_normalized": True, "seed": None}
    assert isinstance(found["epochs"], int) and isinstance(found["nll_weight"], float)
    assert "ppo" not in tldr["runs"] and tldr["runs"]["mine"] == {"method": "dpo", "beta": 0.2, "loss": "hinge"}
    assert tldr["base"]["name"] == "10", "text stays text where text is meant"
    with pytest.raises(UserError, match=r"^tasks\.tldr\.dpo\.beta is '0\.5x'; allowed: a number above 0\.$"):
        resolve(with_value("tasks.tldr.dpo.beta", "0.5x"))


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("tasks.tldr.dpo.beta", -1, "tasks.tldr.dpo.beta is -1; allowed: a number above 0."),
        ("tasks.tldr.dpo.beta", 0, "tasks.tldr.dpo.beta is 0; allowed: a number above 0."),
        ("tasks.tldr.dpo.beta", "high", "tasks.tldr.dpo.beta is 'high'; allowed: a number above 0."),
        ("tasks.tldr.dpo.beta", True, "tasks.tldr.dpo.beta is true; allowed: a number above 0."),
        ("tasks.tldr.dpo.beta", float("inf"), "tasks.tldr.dpo.beta is inf; allowed: a finite number."),
        ("tasks.tldr.dpo.betta", 0.1, "tasks.tldr.dpo.betta (0.1) is not a key; did you mean 'beta'? Allowed: *"),
        (
            "tasks.tldr.dpo",
            None,
            "tasks.tldr.dpo is missing; the run 'dpo' is of this method, which needs this section.",
        ),
        (
            "tasks.sst",
            {},
            "tasks.sst (a section) is not a key; allowed: cnndm, hh, imdb, tldr, and any name with `like`, the task that "
            "it takes over.",
        ),
        ("beta", 0.1, "beta (0.1) is not a key; allowed: compute, seeds, tasks."),
        ("seeds", [0, 1.5], "seeds[[]1] is 1.5; allowed: a whole number at least 0 and at most 4294967295."),
        ("seeds", [], "seeds is [[][]]; allowed: a list of at least one: a whole number *"),
        ("seeds", [1, 1], "seeds is [[]1, 1], where one stands twice; each may stand once."),
        ("seed", 1, "seed (1) is not a key; did you mean 'seeds'? *"),
        (
            "tasks.tldr.sampling.temperatures",
            [0.0, -0.5],
            "tasks.tldr.sampling.temperatures[[]1] is -0.5; allowed: a number at least 0.",
        ),
        ("tasks.tldr.methods", ["dpo"], "tasks.tldr.methods (a list) is not a key; *"),
        (
            "tasks.tldr.runs.mine",
            {"method": "rlhf"},
            "tasks.tldr.runs.mine.method is 'rlhf'; allowed: base, base_2shot, sft, preferred_ft, dpo, simpo, orpo, kto, "
            "iterative_dpo, ppo or best_of_n.",
        ),
        ("tasks.tldr.runs.mine", {}, "tasks.tldr.runs.mine.method is missing; allowed: base, *"),
        (
            "tasks.tldr.runs.mine",
            {"method": "dpo", "beta": 0},
            "tasks.tldr.runs.mine.beta is 0; allowed: a number above 0.",
        ),
        (
            "tasks.tldr.runs.mine",
            {"method": "dpo", "bet": 1},
            "tasks.tldr.runs.mine.bet (1) is not a key; did you mean 'beta'? *",
        ),
        (
            "tasks.tldr.runs.mine",
            {"method": "sft", "source": "hub"},
            "tasks.tldr.runs.mine.source (a text, which is not shown) is not a key; *",
        ),
        (
            "tasks.tldr.runs.mine",
            {"method": "base", "beta": 1},
            "tasks.tldr.runs.mine.beta (1) is not a key; allowed: method.",
        ),
        (
            "tasks.tldr.runs.mine",
            {"method": "dpo", "loss": "ipo", "label_smoothing": 0.1},
            "tasks.tldr.runs.mine.label_smoothing is 0.1; with runs.mine.loss 'ipo' it must be 0.",
        ),
        (
            "tasks.tldr.runs.mine",
            {"method": "ppo", "minibatches": 99},
            "tasks.tldr.runs.mine.minibatches is 99; allowed: at most runs.mine.prompts_per_update, which is 16.",
        ),
        (
            "tasks.tldr.runs.mine",
            {"method": "ppo", "max_new_tokens": 100},
            "tasks.tldr.runs.mine.max_new_tokens is 100; allowed: at most 96, *",
        ),
        (
            "tasks.tldr.runs.best_of_256",
            {"method": "best_of_n", "n": 256},
            "tasks.tldr.runs.best_of_256.n is 256; allowed: at most best_of_n.n, the number of candidates, which is 128.",
        ),
        (
            "tasks.tldr.runs.best_of_4",
            {"method": "best_of_n", "n": 5},
            "tasks.tldr.runs.best_of_4.n is 5; a run that is called so has the n of its name.",
        ),
        (
            "tasks.tldr.runs.best_of_4",
            {"method": "dpo"},
            "tasks.tldr.runs.best_of_4 is of the method 'dpo'; a run that is called so must be of best_of_n.",
        ),
        (
            "tasks.tldr.runs.sft",
            {"method": "dpo"},
            "tasks.tldr.runs.sft is of the method 'dpo'; a run that is called as a method must be of it.",
        ),
        (
            "tasks.tldr.runs.reward_model",
            {"method": "dpo"},
            "tasks.tldr.runs.reward_model has a name that other files have; give it another.",
        ),
        (
            "tasks.tldr.runs.true_reward",
            {"method": "dpo"},
            "tasks.tldr.runs.true_reward has a name that other files have; give it another.",
        ),
        (
            "tasks.tldr.runs.dpo_by_step",
            {"method": "dpo"},
            "tasks.tldr.runs.dpo_by_step has a name that other files have; give it another.",
        ),
        (
            "tasks.tldr",
            {"sampling": {"temperatures": [0]}},
            "tasks.tldr.runs.best_of_128 is the best of several, which needs a temperature above 0 in *",
        ),
        ("tasks.tldr.reference", "mine", "tasks.tldr.reference is 'mine'; allowed: sft, preferred_ft."),
        (
            "tasks.tldr.evaluation.opponents",
            ["dpoo"],
            "tasks.tldr.evaluation.opponents[[]0] is 'dpoo'; allowed: the task's *",
        ),
        ("tasks.cnndm.evaluation.opponents", ["sft"], "tasks.cnndm.evaluation.opponents[[]0] is 'sft'; allowed: the *"),
        (
            "tasks.hh.by_step.runs",
            ["ppo"],
            "tasks.hh.by_step.runs[[]0] is 'ppo'; allowed: the task's runs, which are *",
        ),
        (
            "tasks.hh.by_step.runs",
            ["base_2shot"],
            "tasks.hh.by_step.runs[[]0] is 'base_2shot', for which nothing is trained; leave it out.",
        ),
        (
            "tasks.tldr.runs.dpo_round_1",
            {"method": "dpo"},
            "tasks.tldr.runs.dpo_round_1 has a name that other files have; give it another.",
        ),
        (
            "tasks.tldr",
            {"runs": {"mine": {"method": "iterative_dpo"}}, "by_step": {"runs": ["mine"]}, "frontier": None},
            "tasks.tldr.by_step.runs[[]0] is 'mine', which is trained in rounds and sampled after each for `frontier` alone; "
            "set this too, or leave it out.",
        ),
        (
            "tasks.tldr.runs.mine",
            {"method": "iterative_dpo", "start": "mine"},
            "tasks.tldr.runs.mine.start is 'mine'; allowed: a run that is trained at once, which are sft, preferred_ft, dpo, "
            "ppo.",
        ),
        (
            "tasks.tldr.runs.mine",
            {"method": "iterative_dpo", "labels": "implicit"},
            "tasks.tldr.runs.mine.labels is 'implicit', but runs.mine.start is null; name a run of DPO, since *",
        ),
        (
            "tasks.tldr.runs.mine",
            {"method": "iterative_dpo", "labels": "implicit", "start": "sft"},
            "tasks.tldr.runs.mine.labels is 'implicit', but runs.mine.start is 'sft'; name a run of DPO, since *",
        ),
        (
            "tasks.tldr",
            {"runs": {"mine": {"method": "iterative_dpo", "labels": "true_reward"}}, "frontier": None},
            "tasks.tldr.runs.mine.labels is 'true_reward', but frontier is missing; this section says which reward it is.",
        ),
        (
            "tasks.tldr",
            {
                "runs": {"mine": {"method": "iterative_dpo", "labels": "judge"}},
                **{"judge": {"kind": "human"}, "sampling": {"temperatures": [1.0]}},
            },
            "tasks.tldr.runs.mine.labels is 'judge', but judge.kind is 'human'; people vote on test prompts alone: name another.",
        ),
        (
            "tasks.imdb.runs.mine",
            {"method": "iterative_dpo", "beta": 0.1, "labels": "judge"},
            "tasks.imdb.runs.mine.labels is 'judge', but a sweep has none; allowed: reward_model, true_reward or implicit.",
        ),
        (
            "tasks.imdb.runs.mine",
            {"method": "iterative_dpo", "beta": 0.1, "validation_prompts": 401},
            "tasks.imdb.runs.mine.validation_prompts is 401; allowed: at most data.embedded.validation, which is 400.",
        ),
        (
            "tasks.tldr.runs.mine",
            {"method": "iterative_dpo", "prompts": 3001},
            "tasks.tldr.runs.mine.prompts is 3001; allowed: at most data.embedded.demonstrations, which is 3000.",
        ),
        ("tasks.cnndm.runs", {"dpo": {"beta": 1}}, "tasks.cnndm.runs.dpo.beta (1) is not a key; allowed: ."),
        ("tasks.cnndm.runs", {"dpo": None, "ppo": None}, "tasks.cnndm.runs holds nothing; leave at least one in."),
        (
            "tasks.tldr.judge.kind",
            "gpt-4",
            "tasks.tldr.judge.kind is 'gpt-4'; allowed: oracle, reward_model, chat, recorded or human.",
        ),
        ("tasks.tldr.data.posts", ["a.txt"], "tasks.tldr.data.posts[[]0] is 'a.txt'; allowed: a path that ends in *"),
        (
            "tasks.tldr.data.splits",
            {"train": 0.5},
            "tasks.tldr.data.splits is 0.5 + 0.1 + 0.2 = 0.8; allowed: shares that add up to 1.",
        ),
        (
            "tasks.tldr.data.source",
            "files",
            "tasks.tldr.data.source is 'files', but data.posts and *\n"
            "tasks.tldr.data.source is 'files', but data.comparisons and *\n"
            "tasks.tldr.judge.kind is 'oracle', *\ntasks.tldr.data.gold_fraction is 0; with other_judges.gold.kind *",
        ),
        (
            "tasks.tldr.data.source",
            "hub",
            "tasks.tldr.data.hub.posts is null; with data.source 'hub' it must be *\n"
            "tasks.tldr.data.hub.comparisons is null; *\n"
            "tasks.tldr.judge.kind is 'oracle', *\ntasks.tldr.data.gold_fraction is 0; with other_judges.gold.kind *",
        ),
        (
            "tasks.tldr.data",
            {"source": "files", "posts": ["no.jsonl"], "comparisons": ["no.jsonl"]},
            "tasks.tldr.data.posts names 'no.jsonl'; no such file is seen from the working directory.\n"
            "tasks.tldr.data.comparisons names 'no.jsonl'; no such file is seen from the working directory.\n"
            "tasks.tldr.judge.kind is 'oracle', *\ntasks.tldr.data.gold_fraction is 0; with other_judges.gold.kind *",
        ),
        (
            "tasks.tldr.lengths.max_length",
            150,
            "tasks.tldr.lengths.max_prompt_length is 160; allowed: less than lengths.max_length, which is 150.",
        ),
        ("tasks.tldr.lengths.max_length", 300, "tasks.tldr.lengths.max_length is 300; allowed: at most the base's *"),
        (
            "tasks.tldr.sampling.max_new_tokens",
            100,
            "tasks.tldr.sampling.max_new_tokens is 100; allowed: at most 96, *",
        ),
        (
            "tasks.tldr.prompt.system",
            "Be brief.",
            "tasks.tldr.prompt.system is given, which is read where prompt.style is 'chat'; set this too, or leave it out.",
        ),
        (
            "tasks.cnndm.prompt",
            {"style": "chat", "suffix": "\nTL;DR:"},
            "tasks.cnndm.prompt.suffix is given, which is read where prompt.style is 'plain'; set this too, or leave it out.",
        ),
        (
            "tasks.hh.prompt.style",
            "chat",
            "tasks.hh.runs.base_2shot puts examples before each prompt, which is for prompt.style 'plain'; leave it out by "
            "null.",
        ),
        ("tasks.tldr.base.source", "path", "tasks.tldr.base.path is null; with base.source 'path' it must be *"),
        (
            "tasks.tldr.base",
            {"source": "path", "path": "nowhere"},
            "tasks.tldr.base.path is 'nowhere', where no config.json lies; *",
        ),
        (
            "tasks.tldr.reward_model.source",
            "path",
            "tasks.tldr.reward_model.path is null; with reward_model.source 'path' it must be a local folder of a model.",
        ),
        ("tasks.tldr.sft.source", "hub", "tasks.tldr.sft.name is null; with sft.source 'hub' it must be *"),
        ("tasks.tldr.pretrain.heads", 3, "tasks.tldr.pretrain.hidden_size is 128; allowed: a multiple of *"),
        ("tasks.tldr.ppo.minibatches", 1000, "tasks.tldr.ppo.minibatches is 1000; allowed: at most *"),
        ("tasks.tldr.evaluation.test_prompts", 9999, "tasks.tldr.evaluation.test_prompts is 9999; allowed: at most *"),
        (
            "tasks.tldr.dpo",
            {"loss": "ipo", "label_smoothing": 0.1},
            "tasks.tldr.dpo.label_smoothing is 0.1; with dpo.loss 'ipo' it must be 0.",
        ),
        (
            "tasks.hh.runs.ppo",
            {"method": "ppo"},
            "tasks.hh.ppo is missing; the run 'ppo' is of this method, which needs this section.",
        ),
        (
            "tasks.hh.best_of_n",
            None,
            "tasks.hh.best_of_n is missing; the run 'best_of_128' is of this method, which needs this section.",
        ),
        ("tasks.hh.reference", "sft", "tasks.hh.sft is missing; reference is 'sft', which needs this section."),
        (
            "tasks.hh.data.source",
            "files",
            "tasks.hh.data.source is 'files', but data.comparisons is empty; give it *\ntasks.hh.judge.kind is 'oracle', *",
        ),
        (
            "tasks.cnndm.data.source",
            "hub",
            "tasks.cnndm.data.hub.articles is null; with data.source 'hub' *\ntasks.cnndm.judge.kind is 'oracle', *",
        ),
        (
            "tasks.imdb.runs",
            {"mine": {"method": "dpo"}},
            "tasks.imdb.runs.mine.beta is missing; a run of the method 'dpo' is made by it.",
        ),
        (
            "tasks.imdb.runs",
            {"mine": {"method": "ppo", "kl_target": 3, "beta": 1}},
            "tasks.imdb.runs.mine.beta (1) is not a key; *",
        ),
        ("tasks.imdb.runs", {"mine": {"beta": 1}}, "tasks.imdb.runs.mine.method is missing; allowed: dpo, *"),
        (
            "tasks.tldr.judge.kind",
            "human",
            "tasks.tldr.sampling.temperatures holds 5 temperatures; with judge.kind 'human' it must hold one, *",
        ),
        ("tasks.tldr.judge.kind", "chat", "tasks.tldr.judge.chat is missing; judge.kind is 'chat', which needs *"),
        (
            "tasks.tldr.judge",
            {"kind": "chat", "chat": {"base_url": "http://x/v1", "model": "m", "prompt": "tldr_concise"}},
            "tasks.tldr.judge.chat.prices has no price of 'm'; give USD *",
        ),
        (
            "tasks.tldr.judge",
            {
                "kind": "chat",
                "chat": {
                    "base_url": "http://x/v1",
                    "model": "m",
                    "prompt": "p",
                    "prices": {"m": {"input": 0, "output": 0}},
                },
            },
            "tasks.tldr.judge.chat.prompt is 'p'; allowed: hh_helpful, news_concise, tldr_concise, tldr_simple, *",
        ),
        (
            "tasks.tldr.judge",
            {"kind": "chat", "chat": {"base_url": "http://x/v1", "model": "m", "prompt": "p", "api_key_env": "sk-1"}},
            "tasks.tldr.judge.chat.api_key_env is no allowed value (which is not shown, *",
        ),
        (
            "tasks.tldr.human",
            {"matchups": [{"first": {"run": "dpo"}, "second": {"run": "reference"}, "items": 3}]},
            "tasks.tldr.human.matchups[[]0].first.temperature is missing; a run needs one, *",
        ),
        ("tasks.tldr.other_judges", {"A": {"kind": "oracle"}}, "tasks.tldr.other_judges is 'A'; allowed: names of *"),
        ("tasks.tldr", 3, "tasks.tldr is 3; allowed: *"),
        ("tasks.imdb.runs", {"mine": 3}, "tasks.imdb.runs.mine is 3; allowed: a section with method and *"),
        ("tasks.imdb.runs", {"a b": {"method": "dpo", "beta": 1}}, "tasks.imdb.runs is 'a b'; allowed: a name of *"),
        (
            "tasks.imdb.data",
            {"source": "files", "reviews": [__file__.replace("test_config.py", "x.csv")]},
            "tasks.imdb.data.reviews names *; no such file is seen from the working directory.\n"
            "tasks.imdb.true_reward.source is 'rule', *",
        ),
        ("tasks.imdb.lengths.min_prefix", 9, "tasks.imdb.lengths.max_prefix is 8; allowed: from lengths.min_prefix, *"),
        ("tasks.imdb.ceiling.prompts", 999, "tasks.imdb.ceiling.prompts is 999; allowed: at most *"),
        ("tasks.imdb.evaluation.prompts", 999, "tasks.imdb.evaluation.prompts is 999; allowed: at most *"),
        (
            "tasks.imdb.true_reward.source",
            "hub",
            "tasks.imdb.true_reward.name is null; with true_reward.source 'hub' *",
        ),
    ],
)
def test_a_bad_value_is_named_with_its_key_and_what_is_allowed(path: str, value: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(with_value(path, value))
    said, expected = str(caught.value).splitlines(), sentence.splitlines()
    assert len(said) == len(expected), str(caught.value)
    for line, pattern in zip(said, expected, strict=True):
        assert fnmatch.fnmatchcase(line, pattern), str(caught.value)


def test_the_judge_must_suit_the_data(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("")
    files = {"source": "files", "posts": [str(file)], "comparisons": [str(file)]}
    with pytest.raises(
        UserError, match=r"judge\.kind is 'oracle', which needs data\.source 'embedded' and not 'files'"
    ):
        resolve(with_value("tasks.tldr.data", files))
    with pytest.raises(
        UserError, match=r"data\.gold_fraction is 0; with judge\.kind 'reward_model' it must be above 0"
    ):
        resolve(with_value("tasks.tldr", {"data": files, "judge": {"kind": "reward_model"}}))
    embedded = {"embedded": {"gold_pairs": 0}}
    with pytest.raises(UserError, match=r"data\.embedded\.gold_pairs is 0"):
        resolve(with_value("tasks.tldr", {"data": embedded, "judge": {"kind": "reward_model"}}))


def test_a_rule_is_the_true_reward_of_embedded_reviews_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(
        UserError, match=r"^tasks\.imdb\.true_reward\.source is 'rule', which needs data\.source 'embedded'"
    ):
        resolve(with_value("tasks.imdb.data", {"source": "files", "reviews": [str(tmp_path / "a.csv")]}))


def test_a_run_of_the_sweep_may_be_left_out_but_not_all() -> None:
    runs = read("config.yaml")["tasks"]["imdb"]["runs"]
    resolve(with_value("tasks.imdb.runs", {"dpo_1": None}))
    with pytest.raises(UserError, match=r"^tasks\.imdb\.runs holds nothing; leave at least one in\.$"):
        resolve(with_value("tasks.imdb.runs", dict.fromkeys(runs)))


def test_a_run_that_is_not_trained_is_not_sampled_by_another_task(caplog: pytest.LogCaptureFixture) -> None:
    few = resolve(with_value("tasks.tldr.runs", {"ppo": None, "mine": {"method": "dpo", "beta": "5e-1"}}))
    assert few["tasks"]["cnndm"]["runs"] == {"dpo": {}} and resolve(few) == few
    assert few["tasks"]["tldr"]["runs"]["mine"] == {"method": "dpo", "beta": 0.5}
    assert [record.getMessage() for record in caplog.records] == [
        "tasks.cnndm.runs.ppo falls away: tldr has no such run that could be sampled here, but base, sft, preferred_ft, "
        "dpo, mine."
    ]
    neither = {"dpo": None, "ppo": None}
    with pytest.raises(
        UserError,
        match=r"^tasks\.cnndm\.runs holds no run of tldr that can be sampled here; name one, or leave the task out by null\.$",
    ):
        resolve(with_value("tasks.tldr.runs", neither))


def test_a_model_of_the_users_own_is_not_trained_with_a_runs_values(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tldr = {"sft": {"source": "path", "path": str(tmp_path)}, "runs": {"mine": {"method": "sft", "epochs": 9}}}
    with pytest.raises(
        UserError, match=r"^tasks\.tldr\.runs\.mine\.epochs is not read, since sft\.source is 'path'; leave it out\.$"
    ):
        resolve(with_value("tasks.tldr", tldr))


def test_people_judge_one_seed() -> None:
    config = with_value("tasks.tldr", {"other_judges": {"people": {"kind": "human"}}})
    resolve({**config, "seeds": [3]})
    with pytest.raises(UserError, match=r"'human', but people see the first seed's texts alone; name one in seeds\.$"):
        resolve({**config, "seeds": [3, 4]})


def test_a_missing_key_is_named() -> None:
    config = read("config.yaml")
    del config["tasks"]["tldr"]["dpo"]["beta"]
    with pytest.raises(UserError, match=r"^tasks\.tldr\.dpo\.beta is missing; allowed: a number above 0\.$"):
        resolve(config)


# What paper.yaml may take over from config.yaml or the schema's defaults, and why.
INHERITED: typing.Final = (
    "seeds",
    "tasks.*.runs.*",  # the paper's
    "tasks.*.words.*",
    "tasks.*.form",
    "tasks.*.evaluation.opponents",  # null: the paper's
    "tasks.*.evaluation.against",  # null: the reference texts
    "tasks.hh.by_step.runs",  # null: DPO
    "tasks.*.simpo.*",  # of no run of the paper
    "tasks.*.orpo.*",
    "tasks.*.kto.*",
    "tasks.*.iterative_dpo.*",
    "tasks.*.dpo.nll_weight",  # 0: came after it
    "tasks.*.dpo.length_normalized",
    "tasks.tldr.reference",
    "tasks.*.sampling.engine",  # the one here
    "tasks.*.sampling.vllm.*",
    "tasks.*.data.posts",  # empty: the source is the hub
    "tasks.*.data.comparisons",
    "tasks.*.data.demonstrations",
    "tasks.*.data.preferences",
    "tasks.*.data.articles",
    "tasks.*.data.reviews",
    "tasks.*.data.max_*_mb",  # how much is read at most
    *(f"tasks.*.data.{key}" for key in ("records", "pairs.*", "ties", "seed")),  # of another source
    "tasks.hh.data.hub.posts*",  # HH has none
    "tasks.*.data.embedded.*",  # not used
    "tasks.*.pretrain.*",  # not used: the bases come from the hub
    "tasks.imdb.classifier.*",  # not used: the true reward comes from the hub
    "tasks.imdb.sft.*",  # name and revision: it is trained here
    "tasks.*.base.path",
    "tasks.tldr.sft.path",
    "tasks.*.*reward_model.source",  # reward models are trained
    "tasks.*.*reward_model.path",
    "tasks.*.*reward_model.name",
    "tasks.*.*reward_model.revision",
    "tasks.imdb.true_reward.path",
    "tasks.*.prompt.*",  # plain text, as the paper's bases are none of a chat
    "tasks.imdb.ceiling.*beta*",
    "tasks.imdb.ceiling.min_effective_samples",
    "tasks.*.evaluation.confidence",
    "tasks.*.evaluation.examples",
    "tasks.*.evaluation.example_characters",
    "tasks.*.judge.seed",
    "tasks.*.judge.chat.*",  # how the endpoint is asked
    "compute.mem_mb",  # computed
    "compute.runtime",
    "tasks.tldr.other_judges.*",
    "tasks.*.other_judges.gold.*",
    "tasks.tldr.human.*",  # the paper's matchups stand in config.yaml
    "tasks.*.best_of_n.subsets",
    "tasks.*.adapter",  # null: all weights are trained
    "tasks.*.seed",  # null: the top-level seed; the judge's model has its own
)


def test_the_paper_config_inherits_only_what_is_meant() -> None:
    paper = read("paper.yaml")
    stated = {path for path, _ in leaves(paper)}
    inherited = {path for path, _ in leaves(resolve(merged(read("config.yaml"), paper)))} - stated
    unmeant = {path for path in inherited if not any(fnmatch.fnmatchcase(path, meant) for meant in INHERITED)}
    assert unmeant == set()
    unused = {meant for meant in INHERITED if not any(fnmatch.fnmatchcase(path, meant) for path in inherited)}
    assert unused == set()


def test_the_paper_config_holds_the_printed_values() -> None:
    paper = resolve(merged(read("config.yaml"), read("paper.yaml")))
    tldr = paper["tasks"]["tldr"]
    dpo = tldr["dpo"]
    assert (dpo["beta"], dpo["learning_rate"], dpo["batch_size"], dpo["warmup_steps"]) == (0.5, 1e-6, 64, 150)
    assert (dpo["optimizer"], dpo["schedule"], dpo["loss"]) == ("rmsprop", "constant", "sigmoid")
    assert tldr["sft"]["name"] == "CarperAI/openai_summarize_tldr_sft"
    revisions = [value for path, value in leaves(paper) if path.endswith("revision")]
    assert revisions == [None] * 17  # none is invented


def test_the_files_overlay_changes_data_judge_and_sizes_but_no_method() -> None:
    sizes = {"batch_size", "epochs", "evaluate_every", "max_new_tokens", "max_length", "max_prompt_length", "updates"}
    fewer = {"test_prompts", "n", "method", "best_of_128"}  # of HH, whose candidates are long
    for task in ("tldr", "hh", "cnndm"):
        paths = [path for path, _ in leaves(read("files.yaml")) if path.startswith(f"tasks.{task}.")]
        keys = {path.removeprefix(f"tasks.{task}.") for path in paths if ".data." not in path}
        judged = {"judge.kind", "other_judges.gold", "human.matchups", "human.simulated_raters", "by_step", "frontier"}
        for_a_base_from_scratch = {key for key in keys if key.startswith("pretrain.")}
        changed = {key.rpartition(".")[2] for key in keys - for_a_base_from_scratch - judged}
        assert changed <= (sizes if task == "tldr" else sizes | fewer)


def sentences(config: dict[str, Any]) -> list[str]:
    with pytest.raises(UserError) as caught:
        resolve(config)
    return str(caught.value).splitlines()


BEST = {"method": "best_of_n", "n": 999}


def test_all_that_is_wrong_is_said_at_once() -> None:
    overlay = {
        "seeds": [-1],
        "sead": 2,
        "tasks": {
            "tldr": {"dpo": {"betta": 1, "loss": "mine"}, "lengths": {"max_length": 150}},
            "hh": {
                "runs": {"ppo": {"method": "ppo"}, "best_of_999": {"method": "best_of_n", "n": 999}},
                "lengths": {"max_length": 99},
            },
        },
    }
    said = sentences(merged(read("config.yaml"), overlay))
    starts = [
        "sead (2) is not a key; ",
        "seeds[0] is -1; allowed: ",
        "tasks.tldr.dpo.betta (1) is not a key; ",
        "tasks.tldr.dpo.loss is 'mine'; allowed: ",
        "tasks.hh.ppo is missing; ",
        "tasks.hh.runs.best_of_999.n is 999; allowed: ",
        "tasks.hh.lengths.max_prompt_length is 160; allowed: less than ",
    ]
    assert [next((start for start in starts if line.startswith(start)), line) for line in said] == starts


KEY = "sk-proj-1234567890abcdef"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("api_key", KEY),
        ("tasks.tldr.api_key", KEY),
        ("tasks.tldr.judge", KEY),
        ("tasks.tldr.judge.api_key", KEY),
        ("tasks.tldr.judge.seed", KEY),
        ("tasks.tldr.judge.chat", KEY),
        ("tasks.tldr.judge.chat.api_key", KEY),
        ("tasks.tldr.judge.chat.api_key", [KEY]),
        ("tasks.tldr.judge.chat.headers", {"Authorization": KEY}),
        ("tasks.tldr.judge.chat.api_key_env", KEY),
        ("tasks.tldr.judge.chat.timeout", KEY),
        ("tasks.tldr.judge.chat.prices", KEY),
        ("tasks.tldr.judge.chat.prices", {"m": KEY}),
        ("tasks.tldr.judge.chat.base_url", f"https://x/v1?key={KEY}"),
        ("tasks.tldr.judge.chat.base_url", f"https://x?key={KEY}"),
        ("tasks.tldr.judge.chat.base_url", f"https://x/v1#{KEY}"),
        ("tasks.tldr.judge.chat.base_url", f"https://user:{KEY}@x/v1"),
        ("tasks.tldr.judge.chat.base_url", f"https://{KEY}@x"),
        ("tasks.tldr.judge.chat.base_url", [f"https://{KEY}@x"]),
        ("tasks.tldr.other_judges", {"gold": {"chat": {"api_key": KEY}}}),
        ("tasks.tldr.other_judges", {"gold": {"chat": {"max_tokens": KEY}}}),
    ],
)
def test_a_key_in_the_config_is_refused_without_being_shown(place: str, value: Any) -> None:
    said = sentences(with_value(place, value))
    assert any(line.startswith(place) for line in said), said
    assert KEY not in "".join(said)


@pytest.mark.parametrize("address", ["http://localhost:8000/v1", "https://x.org/a@b/v1", "https://x.org"])
def test_an_address_without_a_password_or_a_query_is_taken(address: str) -> None:
    chat = {"base_url": address, "model": "m", "prompt": "tldr_concise", "prices": {"m": {"input": 0, "output": 0}}}
    resolved = resolve(with_value("tasks.tldr.judge", {"kind": "chat", "chat": chat}))
    assert resolved["tasks"]["tldr"]["judge"]["chat"]["base_url"] == address


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 1e30, float("nan"), float("inf"), "one", "1.5"])
@pytest.mark.parametrize("place", ["seeds", "tasks.tldr.dpo.seed", "tasks.imdb.evaluation.seed"])
def test_a_seed_that_no_stream_of_random_numbers_takes_is_refused(place: str, seed: Any) -> None:
    said = sentences(with_value(place, [seed] if place == "seeds" else seed))
    allowed = "allowed: a whole number at least 0 and at most 4294967295"
    assert said[0].startswith(f"{place}{'[0]' if place == 'seeds' else ''} is ") and allowed in said[0]


def test_a_number_that_is_not_finite_is_named_at_any_depth() -> None:
    matchup = {"first": {"run": "dpo", "temperature": float("nan")}, "second": {"run": "reference"}, "items": 3}
    place = "tasks.tldr.human.matchups"
    assert sentences(with_value(place, [matchup])) == [
        f"{place}[0].first.temperature is nan; allowed: a finite number."
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "tasks: {tldr: {dpo: {beta: 0,5}}}",
            ["tasks.tldr.dpo.beta is 0; *", "tasks.tldr.dpo holds the key 5, which *"],
        ),
        ("tasks: {tldr: {on: 1}}", ["tasks.tldr holds the key true, which is no text: write on, off, yes and no in *"]),
        ("2024-01-01: 1", ['the config holds the key "2024-01-01", which is no text: *']),
        ("tasks: {tldr: {human: {matchups: [{~: 1}]}}}", ["tasks.tldr.human.matchups[[]0] holds the key null, *", "*"]),
        ("tasks: &a {tldr: {data: *a}}", ["the config nests without end: *"]),
    ],
)
def test_a_key_that_is_no_text_is_named(text: str, said: list[str]) -> None:
    found = sentences(merged(read("config.yaml"), yaml.safe_load(text)))
    for pattern in said:
        assert any(fnmatch.fnmatchcase(line, pattern) for line in found), found


def test_a_key_that_stands_twice_in_a_file_is_named_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("tasks:\n  tldr: { dpo: { beta: 0.5, beta: 1 } }\ntasks:\n  hh: { dpo: { beta: 0.2 } }\n")
    lines = [
        f"tasks stands twice in {path}, in lines 1 and 3; keep one, since the first would be lost.",
        f"tasks.tldr.dpo.beta stands twice in {path}, in lines 2 and 2; keep one, since the first would be lost.",
    ]
    assert doubled_keys(path) == lines
    with pytest.raises(UserError) as caught:
        resolve(read("config.yaml"), [path])
    assert str(caught.value).splitlines() == lines
    path.write_text('{"seed": 1,\n"tasks": {}, "seed": 2}')
    assert doubled_keys(path) == [
        f"seed stands twice in {path}, in lines 1 and 2; keep one, since the first would be lost."
    ]


def test_what_yaml_merges_or_names_again_does_not_stand_twice(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("a: &a { x: 1 }\nb: &b { y: 2 }\nc: { <<: *a, x: 3 }\nd: *a\ne: { <<: [*a, *b], 1: 0, '1': 0 }\n")
    assert doubled_keys(path) == []


@pytest.mark.parametrize("path", sorted(CONFIG.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_overlay_is_a_config_in_which_no_key_stands_twice(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doubled_keys(path) == []
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    # A chat model and pairs are the user's to name.
    named = {"tasks": {"chat": {"data": {"records": ["pairs.jsonl"]}, "base": {"path": "smollm2"}}}}
    for name in ("smollm2/config.json", "pairs.jsonl", *re.findall(r"\.\./shared/[\w./]+", path.read_text())):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("{}")
    overlay = merged(read("config.yaml"), read(path.name))
    assert resolve(merged(overlay, named) if path.stem == "chat" else overlay)["tasks"]


def test_what_belongs_to_embedded_records_falls_away_where_there_are_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").touch()
    files = [str(tmp_path / "a.jsonl")]
    data = {"source": "files", "posts": files, "comparisons": files, "gold_fraction": 0.3}
    overlay = {"tasks": {"tldr": {"data": data, "judge": {"kind": "reward_model"}}}}
    resolved = resolve(merged(read("config.yaml"), overlay))
    tldr = resolved["tasks"]["tldr"]
    assert tldr["human"]["simulated_raters"] is None and len(tldr["human"]["matchups"]) == 3
    assert tldr["other_judges"] == {}
    assert [record.getMessage().partition(" falls away")[0] for record in caplog.records] == [
        "tasks.tldr.frontier",
        "tasks.tldr.human.simulated_raters",
        "tasks.tldr.other_judges.gold",
    ]
    assert "frontier" not in tldr and "by_step" in tldr
    caplog.clear()
    assert resolve(resolved) == resolved and not caplog.records
    # A judge of its own stays, one that knows embedded records alone does not.
    judges = {"gold": {"seed": 2}, "truth": {"kind": "oracle"}}
    overlay["tasks"]["tldr"]["other_judges"] = judges  # type: ignore[index]
    assert list(resolve(merged(read("config.yaml"), overlay))["tasks"]["tldr"]["other_judges"]) == ["gold"]


CHAT = {"base_url": "http://x/v1", "model": "m"}


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"data": {"posts": ["x/{1}.jsonl"]}}, "data.posts"),
        ({"base": {"source": "path", "path": "my {task} model"}}, "base.path"),
        ({"sft": {"source": "path", "path": "model}"}}, "sft.path"),
        ({"judge": {"kind": "chat", "chat": {**CHAT, "prompt": "{p}.txt"}}}, "judge.chat.prompt"),
        ({"other_judges": {"gold": {"kind": "chat", "chat": {"prompt": "{p}.txt"}}}}, "other_judges.gold.chat.prompt"),
    ],
)
def test_a_path_with_braces_is_refused_with_its_key(values: dict[str, Any], key: str) -> None:
    said = sentences(with_value("tasks.tldr", values))
    assert any(line.startswith(f"tasks.tldr.{key} names '") and "braces" in line for line in said), said


def test_a_file_of_votes_with_braces_in_its_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    votes = tmp_path / "human" / "votes" / "tldr"
    votes.mkdir(parents=True)
    (votes / "tldr-r01 (1).json").touch()
    resolve(read("config.yaml"))
    (votes / "tldr-r01 {1}.json").touch()
    (said,) = sentences(read("config.yaml"))
    assert said.startswith("tasks.tldr.human counts the file 'human/votes/tldr/tldr-r01 {1}.json', whose braces")


@pytest.mark.parametrize(
    ("tldr", "sentence"),
    [
        ({"by_step": None}, "by_step is missing; frontier measures what a run writes while it trains*"),
        ({"by_step": {"temperatures": [0.7]}}, "by_step.temperatures lacks 1.0; with frontier it must hold it*"),
        (
            {"frontier": {"prompts": 500}},
            "frontier.prompts is 500; allowed: at most evaluation.test_prompts, which is 192.",
        ),
        (
            {"frontier": {"smallest_beta": 20}},
            "frontier.smallest_beta is 20; allowed: less than frontier.largest_beta.",
        ),
        (
            {"frontier": {"reward": "gold_reward_model"}, "gold_reward_model": None, "other_judges": {"gold": None}},
            "gold_reward_model is missing; frontier.reward is 'gold_reward_model', which needs this section.",
        ),
        (
            {
                "frontier": {"reward": "gold_reward_model"},
                "data": {"embedded": {"gold_pairs": 0}},
                "other_judges": {"gold": None},
            },
            "data.embedded.gold_pairs is 0; with frontier.reward 'gold_reward_model' it must be at least 1.",
        ),
    ],
)
def test_a_frontier_has_what_it_is_made_of(tldr: dict[str, Any], sentence: str) -> None:
    found = sentences(with_value("tasks.tldr", tldr))
    assert any(fnmatch.fnmatchcase(line, f"tasks.tldr.{sentence}") for line in found), found


def test_a_served_judge_needs_no_address_key_or_price() -> None:
    serve = {"serve": {"model": "judges/mine"}, "prompt": "tldr_concise"}
    config = with_value("tasks.tldr.judge", {"kind": "chat", "chat": serve})
    resolved = resolve(config | {"compute": {**config["compute"], "gpus": 2}})
    chat = resolved["tasks"]["tldr"]["judge"]["chat"]
    assert resolve(resolved) == resolved
    assert chat["serve"] == {"model": "judges/mine", "engine": "transformers", "program": None, "gpus": 2}
    assert (chat["model"], chat["api_key_env"]) == ("mine", None)
    assert (
        judge_recipe(resolved, "tldr", resolved["tasks"]["tldr"]["judge"])["chat"]["base_url"] == "served:transformers"
    )
    assert chat["prices"] == {"mine": {"input": 0.0, "output": 0.0}}
    named = {**serve, "model": "the judge", "serve": {"model": "m", "engine": "vllm", "gpus": 0}}
    chat = resolve(with_value("tasks.tldr.judge", {"kind": "chat", "chat": named}))["tasks"]["tldr"]["judge"]["chat"]
    assert (chat["model"], chat["serve"]["gpus"]) == ("the judge", 0)


@pytest.mark.parametrize(
    ("given", "gpus", "expected"), [({}, 0, 0), ({}, 4, 1), ({"gpus": 2}, 4, 2), ({"gpus": 0}, 4, 0)]
)
def test_vllm_is_given_one_gpu_where_there_are_any(given: dict[str, Any], gpus: int, expected: int) -> None:
    config = with_value("tasks.tldr.sampling", {"engine": "vllm", "vllm": given})
    resolved = resolve(config | {"compute": {**config["compute"], "gpus": gpus}})
    assert resolve(resolved) == resolved
    task = resolved["tasks"]["tldr"]
    for stage in ("sample", "candidates"):
        assert stage_recipe(resolved, "tldr", stage)["vllm"] == {"program": None, "gpus": expected}
    assert stage_recipe(resolve(read("config.yaml")), "tldr", "sample")["vllm"] is None
    with_program = resolve(
        with_value("tasks.tldr.sampling", {"engine": "vllm", "vllm": {**given, "program": "/opt/vllm"}})
    )
    same = [compared(stage_recipe(each, "tldr", "sample"))["vllm"] for each in (resolved, with_program)]
    assert same == [{}, {}], "where it runs reruns nothing"
    assert "engine" not in stage_recipe(resolved, "tldr", "sample") and task["sampling"]["engine"] == "vllm"
    assert stage_recipe(resolved, "hh", "by_step")["sampling"]["vllm"] is None
    assert {needs(resolved, "tldr", stage)["gpu"] for stage in ("sample", "candidates", "ceiling_samples")} == {
        expected
    }
    assert needs(resolved, "tldr", "score")["gpu"] == min(1, gpus)


def test_what_vllm_may_use_is_refused_where_it_samples_nothing() -> None:
    assert sentences(with_value("tasks.hh.sampling.vllm", {"gpus": 1})) == [
        "tasks.hh.sampling.vllm.gpus is 1, but sampling.engine is 'builtin'; set it to vllm, or leave this out."
    ]


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        (
            {"serve": {"model": "m"}, "base_url": "http://x/v1", "prompt": "tldr_concise"},
            "tasks.tldr.judge.chat names both serve and base_url; leave one of them out: a served judge has its own address.",
        ),
        ({"serve": {"engine": "vllm"}, "prompt": "tldr_concise"}, "tasks.tldr.judge.chat.serve.model is missing"),
        ({"serve": {"model": "m"}}, "tasks.tldr.judge.chat.prompt is missing"),
        (
            {"serve": {"model": "m", "engine": "sglang"}, "prompt": "x"},
            "serve.engine is 'sglang'; allowed: transformers or",
        ),
        (
            {"prompt": "tldr_concise"},
            "tasks.tldr.judge.chat.base_url is missing; judge.kind is 'chat', which needs it.",
        ),
    ],
)
def test_a_judge_with_half_an_address_is_refused(chat: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(with_value("tasks.tldr.judge", {"kind": "chat", "chat": chat}))
    assert said in str(error.value)
