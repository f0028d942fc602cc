"""`python -m prefopt verify`: which results were made by other values, code or inputs than the config asks for.

Snakemake knows that of a folder by its own records in `.snakemake`; without them, as in a copy of `results/`, it looks at
times alone. Tables and models say it themselves (`provenance`), and the workflow says what it asks for.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from snakemake.api import DAGSettings, OutputSettings, SnakemakeApi
from snakemake.settings.types import ConfigSettings, Quietness, ResourceSettings

from prefopt.errors import UserError
from prefopt.experiment.stage_recipes import compared
from prefopt.resources import SNAKEFILE
from prefopt.store import provenance

_RECORDS = Path(".snakemake", "metadata")  # of Snakemake, a file a result, named by its path
_PLAIN = ("as asked for", "not made yet", "without a record of their own (figures, reports)")
_SHARDS = "results/shards/"
_SHARD = re.compile(_SHARDS + r"(.*)/[0-9]+-of-[0-9]+\.parquet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The stage's arguments."""
    parser.add_argument("targets", nargs="*", help="results to look at, with all they are made of (default: all)")
    parser.add_argument("--configfile", nargs="+", type=Path, default=[], help="overlays, as for snakemake")
    parser.add_argument("--directory", type=Path, default=Path(), help="the folder of the results")
    parser.add_argument("--snakefile", type=Path, help="of the workflow (default: this package's)")


def run(args: argparse.Namespace) -> None:
    """Prints a line for each result that is not what the config asks for, and how many are.

    Raises:
        UserError: there is one.
    """
    snakefile = args.snakefile or SNAKEFILE
    here = Path.cwd()
    os.chdir(args.directory)
    try:
        said = dict(_compared(_jobs(snakefile, [here / path for path in args.configfile], args.targets)))
    finally:
        os.chdir(here)
    for path, text in said.items():
        if text not in _PLAIN:
            print(f"{path}: {text}")
    counts = {plain: sum(text == plain for text in said.values()) for plain in _PLAIN}
    print(", ".join(f"{count} {plain}" for plain, count in counts.items()))
    if stale := len(said) - sum(counts.values()):
        raise UserError(
            f"{stale} results were made by other values, code or inputs than the config asks for: delete them and run "
            f"snakemake again, or name their rules after --forcerun."
        )


def unrecorded(results: Path = Path("results")) -> int:
    """How many tables and models there are of which Snakemake has no record in the working folder."""
    made = [*results.rglob("*.parquet"), *(path.parent for path in results.rglob(provenance.MODEL_FILE))]
    names = (base64.urlsafe_b64encode(str(path).encode()).decode() for path in made)
    return sum(not (_RECORDS / name).exists() for name in names)


def _compared(jobs: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Each result of the jobs, and what is to be said of it."""
    for job in jobs:
        if any(str(path).startswith(_SHARDS) for path in job.input):
            continue  # of a table that is put together its shards' jobs speak
        for output in job.output:
            path = _SHARD.sub(r"results/\1.parquet", str(output))
            if not Path(path).exists():
                yield path, _PLAIN[1]
            elif (found := provenance.made_by(path)) is None:
                yield path, _PLAIN[2]
            else:
                yield path, "; ".join(_differences(found, job)) or _PLAIN[0]


def _differences(found: provenance.Manifest, job: Any) -> Iterator[str]:
    """How what made a result differs from the job that would make it."""
    asked = job.params.get("values")
    if asked is not None and found["recipe"] is not None:
        yield from _changed(compared(found["recipe"]), json.loads(asked))
    steps = job.params.get("by_step_values")
    if steps is not None and found["by_step"] is not None:
        yield from _changed(compared(json.loads(found["by_step"])), json.loads(steps), "by_step")
    if found["code"] != job.params.get("code"):
        yield "its stage's code has changed"
    yield from _other_brought(found, job)
    for path in map(str, job.input):
        if found["inputs"].get(path, present := provenance.content(path)) != present:
            yield f"made of another {path}"


def _other_brought(found: provenance.Manifest, job: Any) -> Iterator[str]:
    """What the user brought, or brings now, that is another; by the job's command, whose paths may be others too."""
    given: dict[str, list[str]] = {}
    values: list[str] = []
    for word in itertools.takewhile(lambda word: word not in (">", "<<<"), shlex.split(job.shellcmd)):
        if word.startswith("--"):
            values = given.setdefault(word.removeprefix("--").replace("-", "_"), [])
        else:
            values.append(word)
    before = found.get("brought", {})
    recipe = job.params.get("recipe")
    now = provenance.brought({key: given.get(key, []) for key in before}, recipe and json.loads(recipe))
    for key in before:
        if now.get(key) != before[key]:
            yield f"made of another {' '.join(given.get(key, [])) or key}"


def _changed(found: Any, asked: Any, key: str = "") -> Iterator[str]:
    """Where two recipes differ, as `key: value, asked for value`."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for name in sorted({*found, *asked}):
            yield from _changed(found.get(name), asked.get(name), f"{key}.{name}" if key else name)
    elif found != asked:
        yield f"{key} {found!r}, asked for {asked!r}"


def _jobs(snakefile: Path, configfiles: list[Path], targets: list[str]) -> list[Any]:
    """The jobs of the workflow in the working folder, whether or not they are to be run."""
    with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as snakemake:
        workflow = snakemake.workflow(
            resource_settings=ResourceSettings(cores=1),
            config_settings=ConfigSettings(configfiles=configfiles),
            snakefile=snakefile,
        )
        dag = workflow.dag(DAGSettings(targets=set(targets), forceall=True))
        # What `--printdag` does; there is no public way to the jobs.
        inner = dag.workflow_api._workflow
        inner._prepare_dag(forceall=True, ignore_incomplete=True, lock_warn_only=True)
        inner._build_dag()
        return list(inner.dag.jobs)
