"""Every task, once: where its records come from, and the words in its prompts, figures and notes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task's records and its words."""

    title: str  # of its figures
    written: str  # what a program wrote where the records are synthetic
    files: tuple[tuple[str, ...], ...]  # with `files` one kind of records of each group is needed
    hub: tuple[str, ...]  # with `hub` a name of each of these keys
    # What makes the embedded records and what reads others; of reviews one function does both.
    readers: tuple[str, ...] = ()
    suffix: str = ""  # the last line of a prompt, which a cut never removes and a judge does not see
    reference: str = "the reference"  # what a completion is held against


TASKS = {
    "tldr": Task(
        title="TL;DR summarization",
        written="posts, references, preferences",
        files=(("posts", "demonstrations"), ("comparisons", "preferences")),
        hub=("posts", "comparisons"),
        readers=("prefopt.data.synthetic.posts:generate", "prefopt.data.formats.tldr:raw_tables"),
        suffix="\n\nTL;DR:",
        reference="the reference summary",
    ),
    "hh": Task(
        title="Anthropic HH dialogue",
        written="dialogues, responses, preferences",
        files=(("comparisons",),),
        hub=("comparisons",),
        readers=("prefopt.data.synthetic.dialogues:generate", "prefopt.data.formats.hh:raw_tables"),
        suffix="\n\nAssistant:",
        reference="the chosen response",
    ),
    "cnndm": Task(
        title="CNN/DailyMail news",
        written="articles, references",
        files=(("articles",),),
        hub=("articles",),
        readers=("prefopt.data.synthetic.news:generate", "prefopt.data.formats.cnn_dailymail:raw_tables"),
        suffix="\n\nTL;DR:",
        reference="the reference summary",
    ),
    "imdb": Task(title="IMDb sentiment", written="reviews", files=(("reviews",),), hub=("name",)),
}

# What reads `data.source: records`, of whatever format.
MIXTURE = "prefopt.data.records:mixed_records"

# How a file of records ends: its kind, and how it is packed.
ENDING = re.compile(r"\.(jsonl|json|csv|parquet)(\.gz|\.zst)?\Z")

# Keys of a task's `data` that hold paths of records.
RECORD_FILES = tuple(dict.fromkeys(kind for task in TASKS.values() for group in task.files for kind in group))


def source_name(source: dict[str, Any]) -> str:
    """What each row of one of `data.records` says of where it is from."""
    return "/".join(filter(None, (source["path"] or source["hub"], source["configuration"], source["split"])))
