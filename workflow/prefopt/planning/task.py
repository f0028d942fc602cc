"""A task of a config as its stages see it: models, lengths and counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from prefopt.experiment import runs, targets
from prefopt.planning import work
from prefopt.planning.architecture import Architecture, from_folder, from_hub, from_pretrain
from prefopt.planning.estimate import gpus, hardware
from prefopt.planning.memory import Engine, Rows, Trained
from prefopt.resources import SHIPPED_BASE

Config = dict[str, Any]

# A micro-batch of a run's longest rows: half again as long as the mean, where the lengths allow it.
_LONG = 1.5
_STATES = {"rmsprop": 1, "adamw": 2}


class Task:
    """A task with what its stages have in common.

    Args:
        config: a resolved config.
        task: key of `tasks`.
    """

    def __init__(self, config: Config, task: str) -> None:
        self.config, self.name = config, task
        self.section: Config = config["tasks"][task]
        self.compute: Config = config["compute"]
        self.tokens = work.tokens(config, task)
        self.counts = work.counts(config, task)

    @property
    def frontier(self) -> bool:
        """Whether it is a sweep."""
        return targets.kind(self.section) == "frontier"

    @property
    def width(self) -> int:
        """Bytes of a weight that is not trained."""
        return 4 if self.compute["dtype"] == "float32" else 2

    def served(self, stage: str) -> int | None:
        """GPUs over which vLLM spreads a model that a stage samples; None where the engine here does, or on a CPU."""
        vllm = targets.sampler(self.section, stage)
        return None if vllm is None else vllm["gpus"] or None

    def engine(self, stage: str) -> Engine:
        """How a stage computes."""
        given = self.served(stage) or gpus(self.config, stage)
        return Engine(
            dtype=self.compute["dtype"],
            token_budget=self.compute["token_budget"],
            processes=max(1, given),
            gpu=given > 0,
            checkpointing=self.compute["activation_checkpointing"],
        )

    @property
    def gpu_bytes(self) -> int | None:
        """Memory of a GPU; None where jobs run on a CPU."""
        return int(hardware(self.config).memory_gib * 2**30) if self.compute["gpus"] else None

    def model(self, name: str) -> tuple[str, Architecture]:
        """Name and architecture of a model: of its own source, else of the model that it is trained from.

        Args:
            name: base, reference, true_reward, reward_model, gold_reward_model, or a run.

        Raises:
            UserError: its size is not known.
        """
        section = self.config["tasks"][runs.home(self.config, self.name)]
        if name == "reference":
            name = runs.reference(self.config, self.name)
        scorers = ("true_reward", "reward_model", "gold_reward_model")
        if name in scorers and section.get(name, {}).get("source") in ("path", "hub"):
            return self._brought(section[name], name)
        if name not in ("base", *scorers):
            if runs.is_brought(self.config, self.name, name):
                return self._brought(runs.values(self.config, self.name, name), "sft")
            if runs.entry(self.config, self.name, name).starts_from == "reference":
                return self.model("reference")
        if name == "reward_model":
            return self.model("reference")
        base = section["base"]
        if base["source"] == "shipped":
            return "shipped base", from_folder(SHIPPED_BASE)
        if base["source"] == "scratch":
            return "base from scratch", from_pretrain(section["pretrain"])
        return self._brought(base, "base")

    def _brought(self, source: Config, part: str) -> tuple[str, Architecture]:
        if source["source"] == "path":
            return source["path"], from_folder(source["path"])
        fetched = Path("results", "models", runs.home(self.config, self.name), f"fetched_{part}")
        known = from_folder(fetched) if (fetched / "config.json").is_file() else from_hub(source["name"])
        return source["name"], known

    def sampled(self, new_tokens: int) -> int:
        """Mean tokens of a sampled completion."""
        return min(self.tokens["sampled"], new_tokens)

    def rows(self, *completions: str, long: bool = False) -> Rows:
        """A prompt and completions of these kinds of text: their mean lengths, or long ones."""
        lengths = self.section["lengths"]
        longest = lengths.get("max_prompt_length", lengths.get("max_prefix"))
        room = lengths["max_length"] - longest
        return Rows(
            at_most(self.tokens["prompt"], longest, long),
            tuple(at_most(self.tokens[kind], room, long) for kind in completions),
        )

    def pair_rows(self, long: bool) -> Rows:
        """A preference pair; a sweep's pairs are sampled."""
        if not self.frontier:
            return self.rows("chosen", "rejected", long=long)
        return self.sampled_pair_rows(self.section["pairs"], long)

    def sampled_pair_rows(self, values: Config, long: bool) -> Rows:
        """A pair of completions that were sampled with these values."""
        longest = values["max_new_tokens"]
        length = at_most(self.sampled(longest), longest, long)
        return Rows(self.rows(long=long).prompt, (length, length))

    def label_rows(self, long: bool, completions: int = 1) -> Rows:
        """A prompt with so many labelled completions, which are as often desirable as not."""
        both = self.pair_rows(long)
        return Rows(both.prompt, (round(sum(both.completions) / 2),) * completions)

    @property
    def long_prompt(self) -> int:
        """Tokens of a long prompt."""
        return self.rows(long=True).prompt

    def text_tokens(self, long: bool) -> int:
        """Tokens of a prompt and a completion that the true reward reads."""
        new_tokens = max(self.section[key]["max_new_tokens"] for key in ("pairs", "evaluation"))
        length = self.tokens["prompt"] + self.sampled(new_tokens)
        return at_most(length, self.section["true_reward"]["max_length"], long)


def trained(model: Architecture, section: Config, outputs: int | None = None) -> Trained:
    """A model under a trainer's section; PPO's names no optimizer, as it is AdamW."""
    adapter = section.get("adapter")
    return Trained(model, outputs, _STATES[section.get("optimizer", "adamw")], adapter["rank"] if adapter else None)


def passes(section: Config, checkpointing: bool) -> int:
    """Forward passes' worth of operations in a training step.

    The backward pass is twice the forward pass, once where the weights of the layers are frozen beside adapters; each
    layer is computed once more where its activations are not kept.
    """
    return (2 if section.get("adapter") else 3) + checkpointing


def steps_of(section: Config, examples: int) -> int:
    """Optimizer steps of a trainer."""
    steps: int = math.ceil(examples / section["batch_size"]) * section["epochs"]
    return steps


def at_most(length: int, longest: int, long: bool) -> int:
    """A mean length, or a long one, as far as it may go; at least one token."""
    return max(1, min(round(length * (_LONG if long else 1)), longest))
