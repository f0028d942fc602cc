"""Every method, once: what it is trained by, what it needs, and how it is shown.

What the schema allows, checks, targets, the rules' constraints, recipes, ledger, plan, dominance and figures have of a
method follows from its entry here. Stages that train are told by their recipes, so that a new label trains nothing again.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

Need = Literal["reference_logprobs", "reference_label_logprobs", "reward_model", "candidates"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way to get a policy, or a choice among completions."""

    label: str  # for a reader
    style: int  # of its lines, see `analysis.style`; methods that stand in no figure together may share one
    trainer: Literal["sft", "preference", "kto", "ppo"] | None = None  # None: nothing is trained for it alone
    values: tuple[tuple[str, str], ...] = ()  # keys and values of the trainer's recipe that make this method of it
    objective: str | None = None  # of the trainer `preference`, a key of `objectives.OBJECTIVES`
    starts_from: Literal["base", "reference"] = "base"  # the model that is trained or, without a trainer, taken
    needs: tuple[Need, ...] = ()  # what is made before, beside that model; see `needs_of`
    rounds: bool = False  # trained in rounds, each on pairs of the present policy's own samples
    varies: str | None = None  # what the runs of a sweep differ in, a key of the trainer's recipe
    reported: bool = False  # may be a row of a table of win rates
    transfers: bool = False  # also on the prompts of another task
    swept: int = 0  # its place in a sweep's comparisons (the paper's Fig. 2), from 1; 0: it is no run of a sweep
    opponent: bool = False  # of the paired comparisons, unless the config names others
    shots: int = 0  # examples before each prompt

    @property
    def section(self) -> bool:
        """Whether a task has a section of its values, under its name."""
        return self.trainer is not None or "candidates" in self.needs

    @property
    def symbol(self) -> str:
        """Of what runs differ in, in figures; empty where there is nothing."""
        return {None: "", "beta": "β", "alpha": "α", "kl_target": "target KL"}[self.varies]


METHODS: dict[str, Method] = {
    "base": Method(label="Base (zero-shot)", style=5, reported=True, transfers=True),
    "base_2shot": Method(label="Base (2-shot)", style=5, reported=True, shots=2),
    "sft": Method(
        label="SFT",
        style=3,
        trainer="sft",
        values=(("completion", "response"),),
        reported=True,
        transfers=True,
        opponent=True,
    ),
    "preferred_ft": Method(
        label="Preferred-FT",
        style=4,
        trainer="sft",
        values=(("completion", "chosen"),),
        reported=True,
        transfers=True,
        swept=6,
        opponent=True,
    ),
    "dpo": Method(
        label="DPO",
        style=0,
        trainer="preference",
        objective="dpo",
        starts_from="reference",
        needs=("reference_logprobs",),
        varies="beta",
        reported=True,
        transfers=True,
        swept=1,
        opponent=True,
    ),
    "simpo": Method(
        label="SimPO",
        style=6,
        trainer="preference",
        objective="simpo",
        starts_from="reference",
        varies="beta",
        reported=True,
        transfers=True,
        swept=7,
    ),
    "orpo": Method(
        label="ORPO",
        style=5,
        trainer="preference",
        objective="orpo",
        varies="beta",
        reported=True,
        transfers=True,
        swept=8,
    ),
    "kto": Method(
        label="KTO",
        style=7,
        trainer="kto",
        starts_from="reference",
        needs=("reference_label_logprobs",),
        varies="beta",
        reported=True,
        transfers=True,
        swept=9,
    ),
    "iterative_dpo": Method(
        label="Iterative DPO",
        style=8,
        trainer="preference",
        objective="dpo",
        starts_from="reference",
        rounds=True,
        varies="beta",
        reported=True,
        transfers=True,
        swept=10,
    ),
    "ppo": Method(
        label="PPO",
        style=1,
        trainer="ppo",
        starts_from="reference",
        needs=("reward_model",),
        varies="kl_target",
        reported=True,
        transfers=True,
        swept=4,
    ),
    "best_of_n": Method(
        label="Best of N",
        style=2,
        starts_from="reference",
        needs=("reward_model", "candidates"),
        reported=True,
    ),
    "unlikelihood": Method(
        label="Unlikelihood",
        style=3,
        trainer="preference",
        objective="unlikelihood",
        starts_from="reference",
        varies="alpha",
        swept=5,
    ),
    "ppo_gt": Method(
        label="PPO-GT",
        style=2,
        trainer="ppo",
        starts_from="reference",
        varies="kl_target",
        swept=2,
    ),
    "ppo_gt_trl": Method(
        label="PPO-GT (TRL defaults)",
        style=5,
        trainer="ppo",
        starts_from="reference",
        varies="kl_target",
        swept=3,
    ),
}


def n_of(run: str) -> int | None:
    """The N of a run that is called "best_of_N"; None of any other name."""
    match = re.fullmatch(r"best_of_([0-9]+)", run)
    return int(match[1]) if match else None


def needs_of(name: str, values: dict[str, Any]) -> tuple[Need, ...]:
    """What is made before a run, which its labels decide where it is trained in rounds.

    Args:
        name: key of `METHODS`.
        values: of the run.
    """
    labelled: tuple[Need, ...] = ("reward_model",) if values.get("labels") == "reward_model" else ()
    return METHODS[name].needs + labelled


def names(where: Literal["reported", "transfers"]) -> list[str]:
    """Keys of `METHODS` that are reported or that transfer."""
    return [name for name, method in METHODS.items() if getattr(method, where)]


def swept() -> list[str]:
    """Those that may be runs of a sweep, in the order in which they are compared."""
    return sorted((name for name in METHODS if METHODS[name].swept), key=lambda name: METHODS[name].swept)


def of_group(group: str) -> Method:
    """The method of a group of runs, whose name stands first, see `runs.group`."""
    return METHODS[group.partition(" (")[0]]


def trained() -> list[str]:
    """Those that are reported and for which a model is trained."""
    return [name for name in names("reported") if METHODS[name].trainer]


def trained_by(trainer: str) -> list[str]:
    """Keys of `METHODS` with this trainer."""
    return [name for name, method in METHODS.items() if method.trainer == trainer]


def own_values(name: str, section: dict[str, Any]) -> dict[str, Any]:
    """What of a method's section a run may say for itself.

    Args:
        name: key of `METHODS`.
        section: the section's keys and what each may hold.
    """
    if "candidates" in METHODS[name].needs:
        return {"n": section["n"]}
    return {key: section[key] for key in section if key not in ("source", "path", "name", "revision")}
