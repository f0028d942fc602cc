"""What makes a neat table or figure say little: few prompts, texts that are all equal, records that were lost."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.analysis.style import display_name
from prefopt.errors import UserError

# With fewer the 95% interval of a win rate is wider than 28 points, more than lies between most methods.
FEW_PROMPTS = 50


def few_prompts(prompts: int) -> list[str]:
    """A sentence where the numbers rest on few prompts."""
    if prompts >= FEW_PROMPTS:
        return []
    return [f"Only {prompts} test prompts: this tries the machinery and is no result."]


def equal_texts(samples: pd.DataFrame, choices: Collection[str] = ()) -> list[str]:
    """Sentences on runs that wrote one text for most prompts, and on runs that wrote the same texts.

    Best-of-N at temperature 0 has one candidate, the reference policy's, and is passed over.

    Args:
        samples: rows with run, temperature, prompt_id, text, of one split; the first sample of a prompt counts.
        choices: runs that are the best of N.
    """
    first = samples.drop_duplicates(["run", "temperature", "prompt_id"])
    first = first[~(first["run"].isin(choices) & (first["temperature"] == 0))]
    alike: dict[str, list[str]] = {}
    shared: dict[str, list[str]] = {}
    for temperature, at in first.groupby("temperature"):
        texts = at.pivot(index="prompt_id", columns="run", values="text")
        same: dict[tuple[str, ...], list[str]] = {}
        for run in dict.fromkeys(at["run"]):
            column = texts[run]
            if len(column.dropna()) > 1 and column.value_counts().iloc[0] > len(column.dropna()) / 2:
                alike.setdefault(display_name(run), []).append(f"{temperature:g}")
            same.setdefault(tuple(column), []).append(display_name(run))
        for names in same.values():
            if len(names) > 1:
                shared.setdefault(" and ".join(names), []).append(f"{temperature:g}")
    sentences = [
        f"{name} wrote one and the same text for most prompts at T = {', '.join(at)}." for name, at in alike.items()
    ]
    return [*sentences, *(f"{names} wrote the same texts at T = {', '.join(at)}." for names, at in shared.items())]


def caveats_of(manifest: Mapping[str, Any]) -> list[str]:
    """What takes from the weight of a table of win rates, a sentence each: its warnings, and a judge without skill."""
    caveats = list(manifest.get("warnings", []))
    if manifest.get("interpretable") is False:
        accuracy, low, high = (manifest[f"judge_accuracy{end}"] for end in ("", "_low", "_high"))
        shown = f"{accuracy:.0%} [{low:.0%}, {high:.0%}]"
        other = "chance" if low <= 0.5 else f'that of "the longer one wins", {manifest["longer_wins_accuracy"]:.0%}'
        more = manifest.get("n_needed")
        held_out = f"some {float(f'{more:.2g}'):,.0f} held-out comparisons, if it stays as good" if more else ""
        needed = f"it needs {held_out or 'more comparisons to learn from'}, or a better model"
        caveats.insert(
            0, f"Uninterpretable: the judge's held-out accuracy, {shown}, is not surely above {other}; {needed}."
        )
    return caveats


def titled(title: str, facts: Mapping[str, Any]) -> str:
    """The title of a figure, which says of synthetic records that they are."""
    return f"{title} (synthetic records)" if facts.get("synthetic") else title


def read_facts(path: Path) -> dict[str, Any]:
    """A JSON file of facts about a task: the summary of its data, or the manifest of its win rates.

    Raises:
        UserError: it cannot be read.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): run the stage that makes it again.") from error
    if not isinstance(facts, dict):
        raise UserError(f"{path} holds no JSON object: run the stage that makes it again.")
    return facts


def data_notes(facts: Iterable[Mapping[str, Any]], judges: Mapping[str, str]) -> Iterator[str]:
    """What is synthetic and what was lost, a sentence each, with the task's name where there are several.

    Args:
        facts: of each task: `task`, and `title`, `written`, `synthetic` and `warnings` of its data.
        judges: by task, the judge, or what else gives the numbers.
    """
    every = list(facts)
    for one in every:
        of_task = f"{one['title']}: " if len(every) > 1 else ""
        if one["synthetic"]:
            start = f"{one['title']} is synthetic" if len(every) > 1 else "Synthetic"
            yield f"{start}: {synthetic_note(one['written'], judges.get(one['task'], ''))}"
        yield from (of_task + capitalised(warning) for warning in one["warnings"])


def synthetic_note(written: str, judge: str) -> str:
    """What is a program's where the records are synthetic: these, and perhaps the judge or the reward.

    Args:
        written: what the records are, in words.
        judge: its name; an oracle, a rule and simulated raters are programs.
    """
    program = {"oracle": "the judge", "rule": "the reward", "human:simulated-": "the raters"}
    own = next((words for start, words in program.items() if judge.startswith(start)), "")
    return f"{written}{f' and {own} are' if own else ' are by'} a program; no person was asked."


def capitalised(sentence: str) -> str:
    """A sentence that begins with a capital and ends with a full stop."""
    return sentence[:1].upper() + sentence[1:].rstrip(".") + "."


def interval_sources(seeds: int) -> str:
    """What an interval is over, in words."""
    return "prompts" if seeds == 1 else f"prompts and {seeds} seeds of training"


def prompts_note(prompts: Sequence[int], unit: str = "test prompts") -> str:
    """How many prompts, one number or a range."""
    low, high = min(prompts), max(prompts)
    return f"{low} {unit}." if low == high else f"{low} to {high} {unit}."
