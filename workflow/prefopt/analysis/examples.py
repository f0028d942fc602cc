"""The stage `examples`: some test prompts with every run's text side by side, for a person to read."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pandas as pd

from prefopt.analysis.figures import read_win_rates
from prefopt.analysis.style import display_name
from prefopt.analysis.texts import escape_markdown
from prefopt.analysis.verdicts import KEY, read_verdicts
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.store.files import stable_hash, write_text
from prefopt.store.tables import read_table

_VERDICTS = {
    "win": "better than the reference",
    "loss": "worse than the reference",
    "tie": "as good as the reference",
    "invalid": "no verdict",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExamplesRecipe:
    """Which prompts are shown."""

    task: str
    runs: tuple[str, ...]
    count: int
    seed: int
    max_characters: int  # of a prompt or a text that is shown
    against: str  # whose completions the verdicts are against; "": the reference texts


def examples_page(
    prompts: pd.DataFrame,
    texts: pd.DataFrame,
    selected: dict[str, float],
    recipe: ExamplesRecipe,
    note: str = "",
) -> str:
    """A Markdown page: for each chosen test prompt its text, the reference and each run's text and verdict.

    Everything that a person, a model or a judge wrote is escaped, so that it shows as it is and nothing in it is
    taken for markup.

    Args:
        prompts: rows of the prompts table.
        texts: rows of samples joined with their verdicts (text, tokens, outcome, reply, finish_reason).
        selected: each run's temperature.
        recipe: which and how many.
        note: a sentence under the title, in Markdown.

    Raises:
        UserError: no test prompt has a text of every run.
    """
    shown = pd.concat(
        [
            texts[
                (texts["run"] == run) & (texts["temperature"] == selected[run]) & (texts["split"] == "test")
            ].sort_values("sample_index")
            for run in recipe.runs
        ]
    ).drop_duplicates(["run", "prompt_id"])
    counts = shown.groupby("prompt_id").size()
    complete = sorted(counts[counts == len(recipe.runs)].index, key=lambda i: stable_hash([recipe.seed, i]))
    if not complete:
        raise UserError("No test prompt has a text of every run: sample and judge them again.")
    by_id = prompts.set_index("prompt_id")
    chosen = complete[: recipe.count]
    against = f"Verdicts are against {escape_markdown(recipe.against)}. " if recipe.against else ""
    lines = [
        f"# {escape_markdown(recipe.task)}: examples",
        "",
        f"{len(chosen)} of {len(complete)} test prompts, drawn with seed {recipe.seed}; each run at the "
        f"temperature chosen on validation prompts. {against}{note}".strip(),
    ]
    limit = recipe.max_characters
    for number, prompt_id in enumerate(chosen, start=1):
        prompt = by_id.loc[prompt_id]
        lines += ["", f"## {number}. Prompt {escape_markdown(str(prompt_id))}", ""]
        # Behind the word in bold no character begins a line, where it could make a heading or a list.
        lines += [f"> **Prompt.** {escape_markdown(shorten(str(prompt['prompt']), limit))}", ""]
        lines += ["| writer | text | tokens | verdict |", "| --- | --- | ---: | --- |"]
        of_prompt = shown[shown["prompt_id"] == prompt_id].set_index("run")
        tokens = "" if recipe.against else int(of_prompt["reference_tokens"].iloc[0])
        if str(prompt["reference"]):
            lines.append(_row("**Reference**", str(prompt["reference"]), tokens, "", limit))
        for run in recipe.runs:
            row = of_prompt.loc[run]
            writer = f"{escape_markdown(display_name(run))} (T = {selected[run]:g})"
            verdict = f"{_VERDICTS[str(row['outcome'])]} ({escape_markdown(shorten(str(row['reply']), limit))})"
            if row["finish_reason"] == "length":
                verdict += "; cut at the length limit"
            if row["finish_reason"] == "stop":
                verdict += "; cut where it went on for the other speaker"
            lines.append(_row(writer, str(row["text"]), int(row["tokens"]), verdict, limit))
    return "\n".join(lines) + "\n"


def shorten(text: str, limit: int) -> str:
    """The text, or its beginning and end with a mark between them that says how much was left out."""
    text = text.strip()
    if len(text) <= limit:
        return text
    head = limit * 3 // 4
    tail = limit - head
    return f"{text[:head]} […{len(text) - limit} characters left out…] {text[-tail:]}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `examples`."""
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    parser.add_argument("--samples", required=True, type=Path, nargs="+", help="samples tables, one a run")
    parser.add_argument("--verdicts", required=True, type=Path, nargs="+", help="verdict tables, one a run")
    parser.add_argument("--win-rates", required=True, type=Path, help="CSV of the stage `win_rates`")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="Markdown page that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the page of examples."""
    recipe = from_json(ExamplesRecipe, args.recipe)
    table = read_win_rates(args.win_rates)
    chosen = table[table["selected"]]
    selected = dict(zip(chosen["run"], chosen["temperature"].astype(float), strict=True))
    if missing := sorted(set(recipe.runs) - set(selected)):
        raise UserError(f"{args.win_rates} has no row of {missing[0]!r}: run the stage `win_rates` again.")
    write_text(
        args.out,
        examples_page(*_read(args), selected, recipe, f"Judge: {escape_markdown(str(table['judge'].iloc[0]))}."),
    )


def _read(args: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    samples = pd.concat([read_table(path, "samples") for path in args.samples])[[*KEY, "text", "finish_reason"]]
    verdicts = pd.concat([read_verdicts(path) for path in args.verdicts], ignore_index=True)
    return read_table(args.prompts, "prompts"), verdicts.merge(samples, on=KEY, validate="one_to_one")


def _row(writer: str, text: str, tokens: int | str, verdict: str, limit: int) -> str:
    return f"| {writer} | {escape_markdown(shorten(text, limit)) or '*(empty)*'} | {tokens} | {verdict} |"
