"""What Snakemake compares of every job, for many configs in one process: a dry run takes seconds, this milliseconds.

The rules are read once. Their functions look at the workflow's config, which is put in place of the one before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from running import REPOSITORY
from snakemake.api import SnakemakeApi
from snakemake.io import apply_wildcards
from snakemake.rules import Rule
from snakemake.settings.types import ConfigSettings, OutputSettings, Quietness, ResourceSettings
from snakemake.workflow import Workflow

# Snakemake leaves a params function out of its comparison that takes one of these.
DERIVING = {"input", "output", "threads", "resources"}

Name = tuple[str, tuple[tuple[str, str], ...]]  # of a job: its rule and its wildcards


@dataclasses.dataclass(frozen=True)
class Job:
    """What a job is, by what Snakemake compares of it, and what it is told beside."""

    rule: str
    wildcards: tuple[tuple[str, str], ...]
    inputs: tuple[str, ...]
    compared: tuple[str, ...]
    uncompared: tuple[str, ...]

    @property
    def name(self) -> Name:
        """The same under every config."""
        return self.rule, self.wildcards


class Rules:
    """The workflow's rules, and the jobs that they make under a config."""

    def __init__(self, workflow: Workflow) -> None:
        self.workflow = workflow
        self._makers: dict[str, tuple[Rule, dict[str, str]] | None] = {}

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config that the rules see."""
        config: dict[str, Any] = self.workflow.globals["config"]
        return config

    @contextlib.contextmanager
    def with_config(self, config: Mapping[str, Any]) -> Iterator[None]:
        """Another resolved config."""
        before = dict(self.config)
        self.config.clear()
        self.config.update(config)
        try:
            yield
        finally:
            self.config.clear()
            self.config.update(before)

    def jobs(self) -> dict[Name, Job]:
        """Every job behind the rule `all`, by its name."""
        found: dict[Name, Job] = {}
        waiting: list[tuple[Rule, dict[str, str]]] = [(self.workflow.get_rule("all"), {})]
        while waiting:
            rule, wildcards = waiting.pop()
            if _name(rule, wildcards) not in found:
                job = found[_name(rule, wildcards)] = self._job(rule, wildcards)
                waiting += [maker for path in job.inputs if (maker := self.maker(path)) is not None]
        return found

    def rerun(self, before: Mapping[Name, Job], now: Mapping[Name, Job]) -> tuple[set[Name], set[Name]]:
        """Names of the jobs that a changed config runs: those that differ themselves, and all, with what hangs on them."""
        own = {
            name
            for name, job in now.items()
            if name not in before or (job.inputs, job.compared) != (before[name].inputs, before[name].compared)
        }
        below: dict[Name, set[Name]] = {}
        for name, job in now.items():
            for path in job.inputs:
                if (maker := self.maker(path)) is not None:
                    below.setdefault(_name(*maker), set()).add(name)
        every, waiting = set(own), list(own)
        while waiting:
            new = below.get(waiting.pop(), set()) - every
            every |= new
            waiting += new
        return own, every

    def maker(self, path: str) -> tuple[Rule, dict[str, str]] | None:
        """The rule that makes a file, and its wildcards; None where nobody does."""
        if path not in self._makers:
            rules = [rule for rule in self.workflow.rules if any(output.match(path) for output in rule.output)]
            assert len(rules) <= 1, f"{path} is made by {rules}"
            self._makers[path] = (rules[0], rules[0].get_wildcards(path)) if rules else None
        return self._makers[path]

    def _job(self, rule: Rule, wildcards: dict[str, str]) -> Job:
        given = SimpleNamespace(**wildcards)
        inputs: list[str] = []
        for _, item in rule.input._allitems():
            function = _function(item)
            value = item if function is None else function(given)
            if isinstance(value, dict):
                value = [path for paths in value.values() for path in ([paths] if isinstance(paths, str) else paths)]
            paths = [value] if isinstance(value, str) else value
            inputs += [apply_wildcards(str(path), wildcards) for path in paths]
        params: dict[bool, list[str]] = {True: [], False: []}
        for name, item in rule.params._allitems():
            value, compared = item, True
            if callable(item):
                takes = set(inspect.getargs(item.__code__).args)
                compared = not takes & DERIVING
                value = item(given) if compared else item(given, **dict.fromkeys(takes & DERIVING))
            elif isinstance(item, str | list):
                texts = [apply_wildcards(text, wildcards) for text in ([item] if isinstance(item, str) else item)]
                value = texts[0] if isinstance(item, str) else texts
            params[compared].append(f"{name} {value!r}")
        return Job(*_name(rule, wildcards), tuple(sorted(inputs)), tuple(params[True]), tuple(params[False]))


def _function(item: Any) -> Any:
    """The function that an input is given by; None where it is a path."""
    held = getattr(item, "_file", item)
    return getattr(held, "callable", None) or (held if callable(held) else None)


def _name(rule: Rule, wildcards: Mapping[str, str]) -> Name:
    return rule.name, tuple(sorted(wildcards.items()))


@contextlib.contextmanager
def loaded(folder: Path, *configs: Path) -> Iterator[Rules]:
    """The checkout's rules as a run in that folder with these config files reads them."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
            workflow = api.workflow(
                resource_settings=ResourceSettings(cores=1),
                config_settings=ConfigSettings(configfiles=list(configs)),
                snakefile=REPOSITORY / "Snakefile",
            )
            yield Rules(workflow._workflow)
    finally:
        os.chdir(here)
