"""How much a stage has to do: rows, tokens, operations, and bytes that sampling moves."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prefopt.experiment import targets
from prefopt.lm.batching import CACHE_BYTES, ROW_BUDGET, prompts_at_once
from prefopt.lm.flops import reading_flops, sampling_flops
from prefopt.planning import architecture
from prefopt.planning.architecture import Architecture
from prefopt.planning.memory import VLLM_ROWS, Rows, cache_of_token

Config = dict[str, Any]

ASSUMPTIONS = Path(__file__).with_name("assumptions.yaml")
# As in data/splits.py and training/pretrain.py; a test compares them.
GOLD_TEST_SHARE = 0.3
PRETRAINING_VALIDATION_SHARE = 0.02


# What Python and the launching of kernels take, as measured beside an H200 (`benchmarks/results/`).
CALL_SECONDS = 1.1e-3


@dataclasses.dataclass(frozen=True)
class Phase:
    """Operations, bytes read from memory while they are done, and calls; whichever takes longest sets the time."""

    flops: int
    moved: int = 0
    calls: int = 0  # of a layer on a GPU for one token, which take `CALL_SECONDS` however little they compute

    def times(self, count: int) -> Phase:
        """So many of it."""
        return Phase(self.flops * count, self.moved * count, self.calls * count)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """`compute.hardware`: one GPU, or the CPU of one job."""

    name: str
    memory_gib: float
    tflops: float
    bandwidth_gbps: float
    utilisation: float


def hours(phases: list[Phase], hardware: Hardware, processes: int) -> float:
    """Hours of phases one after another, each shared evenly among processes."""
    seconds = 0.0
    for phase in phases:
        computing = phase.flops / (hardware.tflops * 1e12 * processes)
        moving = phase.moved / (hardware.bandwidth_gbps * 1e9 * processes)
        seconds += max(max(computing, moving) / hardware.utilisation, phase.calls * CALL_SECONDS / processes)
    return seconds / 3600


@dataclasses.dataclass(frozen=True)
class Counts:
    """Rows of a task's tables by split."""

    demonstrations: Mapping[str, int]
    pairs: Mapping[str, int]
    gold: Mapping[str, int]
    documents: int  # to pretrain a base on
    labelled: int = 0  # training reviews with a label
    prepared_labels: Mapping[str, int] | None = None  # of the table of labelled completions, where it is prepared

    @property
    def labels(self) -> Mapping[str, int]:
        """Labelled completions by split; two of each pair where they are not counted yet."""
        if self.prepared_labels is not None:
            return self.prepared_labels
        return {split: 2 * pairs for split, pairs in self.pairs.items() if split != "test"}


def counts(config: Config, task: str) -> Counts:
    """How many rows a task's tables hold: of embedded data and prepared tables exact, of others assumed.

    Args:
        config: a resolved config.
        task: key of `tasks`; of a transfer task nothing is trained on.
    """
    section = config["tasks"][task]
    made, source = section["data"]["embedded"], section["data"]["source"]
    if targets.kind(section) == "frontier":
        demonstrations, labelled = _reviews(section, task)
        pairs = {split: section["pairs"][f"{split}_prompts"] for split in ("train", "validation")}
        per_prompt = math.comb(section["pairs"]["completions"], 2)
        every = {split: prompts * per_prompt for split, prompts in pairs.items()}
        return Counts(demonstrations, every, {}, demonstrations["train"], labelled)
    if targets.kind(section) == "transfer":
        return Counts({}, {}, {}, 0)
    prepared = _prepared(task)
    if prepared is not None:
        tables = {name: table["splits"] for name, table in prepared["tables"].items()}
        found = Counts(tables["demonstrations"], tables["preferences"], tables["gold_preferences"], 0)
        labels = tables.get("labels")
        return dataclasses.replace(found, documents=_documents(section, found), prepared_labels=labels)
    if source == "embedded":
        demonstrations = {"train": made["demonstrations"], "validation": made["validation_prompts"]}
        pairs = {"train": made["pairs"], "validation": made["validation_pairs"]}
        gold = {"train": made["gold_pairs"], "test": made["gold_test_pairs"]}
        return Counts(demonstrations, pairs, gold, made["pretraining_documents"])
    records = _records(section)
    shares, gold_share = section["data"]["splits"], section["data"]["gold_fraction"]
    comparisons = records.get("comparisons", 0) + records.get("preferences", 0)
    # Dialogues are demonstrations too, by their chosen answer.
    posts = records.get("posts", 0) + records.get("demonstrations", 0) or comparisons
    kept = comparisons * (1 - gold_share)
    found = Counts(
        {split: max(1, round(posts * share)) for split, share in shares.items()},
        {split: max(1, round(kept * share)) for split, share in shares.items()},
        {
            "train": max(1, round(comparisons * gold_share * (1 - GOLD_TEST_SHARE))),
            "test": max(1, round(comparisons * gold_share * GOLD_TEST_SHARE)),
        },
        0,
    )
    return dataclasses.replace(found, documents=_documents(section, found))


def tokens(config: Config, task: str) -> dict[str, int]:
    """Mean tokens of a task's texts as far as its lengths allow: prompt, response, chosen, rejected, sampled, document."""
    section = config["tasks"][task]
    kind = "embedded" if section["data"]["source"] == "embedded" else "real"
    mean: dict[str, int] = dict(assumptions()[section["form"]]["tokens"][kind])
    lengths = section["lengths"]
    longest_prompt = lengths.get("max_prompt_length", lengths.get("max_prefix"))
    room = lengths["max_length"] - longest_prompt
    return {
        name: min(length, longest_prompt if name == "prompt" else length if name == "document" else room)
        for name, length in mean.items()
    }


@functools.cache
def assumptions() -> dict[str, Any]:
    """The file of assumptions."""
    loaded: dict[str, Any] = yaml.safe_load(ASSUMPTIONS.read_text(encoding="utf-8"))
    return loaded


def reading(model: Architecture, rows: Rows, count: int, outputs: int | None = None) -> int:
    """Operations of one forward pass.

    Args:
        model: the architecture.
        rows: mean lengths.
        count: how many rows.
        outputs: of a scorer's head; None is a language model.
    """
    return count * reading_flops(architecture.shape(model, outputs), rows.prompt, rows.completions)


def sampling(
    model: Architecture, *, prompt: int, sampled: int, new_tokens: int, n: int, prompts: int, width: int, gpu: bool
) -> Phase:
    """Operations and memory traffic of sampling.

    At every step the weights are read once for all completions of a batch, and the cache of each; a batch goes on until
    its last completion has ended, which is taken to need all steps.

    Args:
        model: the architecture.
        prompt: tokens of a prompt.
        sampled: mean tokens of a completion.
        new_tokens: most tokens of a completion.
        n: completions of each prompt.
        prompts: how many there are.
        width: bytes of a weight.
        gpu: whether it is sampled on one.
    """
    flops = prompts * sampling_flops(architecture.shape(model), prompt, [min(sampled, new_tokens)] * n)
    token = cache_of_token(model, width)
    at_once = prompts_at_once(n, prompt, new_tokens, token, ROW_BUDGET[gpu], CACHE_BYTES[gpu], shared_prefix=True)
    batches = math.ceil(prompts / at_once)
    cache = (prompts * prompt + prompts * n * min(sampled, new_tokens) // 2) * token
    weights = batches * architecture.language_model_parameters(model) * width
    calls = batches * new_tokens * model.layers if gpu else 0
    return Phase(flops, new_tokens * weights + min(sampled, new_tokens) * cache, calls)


def serving(
    model: Architecture, *, prompt: int, sampled: int, new_tokens: int, n: int, prompts: int, width: int, room: int
) -> Phase:
    """The same by vLLM, which puts another completion in the place of one that has ended, and launches a step as a whole.

    Args:
        model, prompt, sampled, new_tokens, n, prompts, width: see `sampling`.
        room: bytes for keys and values, on all its GPUs together.
    """
    length = min(sampled, new_tokens)
    flops = prompts * sampling_flops(architecture.shape(model), prompt, [length] * n)
    token = cache_of_token(model, width)
    at_once = max(1, min(VLLM_ROWS, prompts * n, room // ((prompt + new_tokens) * token)))
    steps = math.ceil(prompts * n * length / at_once)
    cache = prompts * n * length * (prompt + length // 2) * token
    return Phase(flops, steps * architecture.language_model_parameters(model) * width + cache)


def _reviews(section: Config, task: str) -> tuple[dict[str, int], int]:
    """Reviews by split, and training reviews with a label; those without one are all for training."""
    data = section["data"]
    if data["source"] == "embedded":
        made = data["embedded"]
        train = made["train"] + made["unlabelled"]
        return {"train": train, "validation": made["validation"], "test": made["test"]}, made["train"]
    records = _records(section)
    found = {split: max(1, round(records["reviews"] * share)) for split, share in data["splits"].items()}
    labelled = found["train"]
    found["train"] += records.get("unlabelled", 0)
    if (prepared := _prepared(task)) is not None:
        found = prepared["reviews"]["splits"]
    return found, labelled


def _records(section: Config) -> dict[str, int]:
    """Records by kind, of a data set on the hub or by the size of files."""
    if section["data"]["source"] == "hub":
        published: dict[str, int] = assumptions()[section["form"]]["hub"]
        return published
    found = {}
    for kind, size in assumptions()[section["form"]]["bytes"].items():
        files = [Path(path) for path in section["data"].get(kind, [])]
        if section["data"]["source"] == "records":
            # Of whatever format: taken for pairs. How many a data set on the hub has is not known before it is read.
            files = [path for one in section["data"]["records"] if one["path"] for path in _files(Path(one["path"]))]
            files = files if kind == "comparisons" else []
        # Text is some three times as long before compression.
        packed = sum(path.stat().st_size / (1 if path.suffix in (".gz", ".zst", ".parquet") else 3) for path in files)
        found[kind] = round(packed / size)
    return found


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.arrow")) if path.is_dir() else [path]


def _prepared(task: str) -> dict[str, Any] | None:
    """The account of a task's prepared tables, where they are there."""
    path = Path("results", "data", task, "summary.json")
    try:
        account: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return account


def _documents(section: Config, found: Counts) -> int:
    """Documents to pretrain on: each training post and its texts."""
    made: dict[str, int] = section["data"]["embedded"]
    if section["data"]["source"] == "embedded":
        return made.get("pretraining_documents", 0)
    return 2 * found.demonstrations.get("train", 0) + found.pairs.get("train", 0)
