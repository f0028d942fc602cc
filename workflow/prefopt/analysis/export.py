"""The command `export`: results in the forms that other tools read.

Models need none: each is a Hugging Face folder, which transformers, vLLM and lm-eval load as it is; a reward model is a sequence
classifier with one output.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pandas as pd

from prefopt.analysis.event_files import trainings, write_events
from prefopt.errors import UserError
from prefopt.store.files import atomic_directory, write_text
from prefopt.store.tables import read_csv, read_table

_MARKUP = re.compile(r"[\\`*_<>\[\]|&]")  # what Markdown takes for markup within a line, or for the end of a cell
# A bracket that begins a row would be an argument of what ends the row before; TeX's first fonts have none of the last three.
_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
}


def first_completions(
    samples: pd.DataFrame, prompts: pd.DataFrame, run: str | None, temperature: float | None
) -> pd.DataFrame:
    """One run's first completion of each test prompt, with the columns prompt and reference of the prompt beside it.

    Args:
        samples: rows of a samples table.
        prompts: rows of the prompts table.
        run: whose; may be None where there is one.
        temperature: at which; may be None where there is one.

    Raises:
        UserError: there are several, or none.
    """
    rows = samples[(samples["split"] == "test") & (samples["sample_index"] == 0)]
    for name, wanted in (("run", run), ("temperature", temperature)):
        rows = rows if wanted is None else rows[rows[name] == wanted]
        there = sorted(rows[name].unique().tolist())
        if len(there) != 1:
            known = ", ".join(map(str, sorted(samples[name].unique().tolist())))
            raise UserError(f"--{name} must name one of {known}.")
    return rows.merge(prompts[["prompt_id", "prompt", "reference"]], on="prompt_id", validate="many_to_one")


def alpaca_eval(texts: pd.DataFrame) -> str:
    """First completions as AlpacaEval's `model_outputs`, a JSON list."""
    outputs = [
        {"dataset": "prefopt", "instruction": prompt, "output": text.strip(), "generator": name}
        for prompt, text, name in zip(texts["prompt"], texts["text"], texts["run"], strict=True)
    ]
    return json.dumps(outputs, indent=1, ensure_ascii=False) + "\n"


def arena_hard(texts: pd.DataFrame) -> dict[str, str]:
    """First completions as a benchmark of Arena-Hard-Auto (its version 2), JSON lines by file.

    The answers of the run, and as those of the model `reference` the texts that it is held against, for a baseline.
    `token_len` counts the run's by its own tokenizer and the reference's in words; what style control counts is left out.
    """
    (run,) = texts["run"].unique()
    answers = {
        run: zip(texts["text"], texts["tokens"].tolist(), strict=True),
        "reference": ((text, len(text.split())) for text in texts["reference"]),
    }
    questions = [
        {"uid": uid, "category": "prefopt", "prompt": prompt}
        for uid, prompt in zip(texts["prompt_id"], texts["prompt"], strict=True)
    ]
    files = {"question.jsonl": questions}
    for model, texts_of in answers.items():
        files[f"model_answer/{model}.jsonl"] = [
            {
                **{"uid": question["uid"], "ans_id": f"{model}-{question['uid']}", "model": model, "tstamp": 0.0},
                "messages": [
                    {"role": "user", "content": question["prompt"]},
                    {"role": "assistant", "content": {"answer": text.strip()}},
                ],
                "metadata": {"token_len": length},
            }
            for question, (text, length) in zip(questions, texts_of, strict=True)
        ]
    return {
        name: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines) for name, lines in files.items()
    }


def save_pairs(pairs: pd.DataFrame, out: Path) -> None:
    """Preference pairs as a folder of `datasets`, a split each, with the columns prompt, chosen and rejected."""
    import datasets

    with atomic_directory(out) as path:
        datasets.DatasetDict(
            {
                str(split): datasets.Dataset.from_pandas(
                    rows[["prompt", "chosen", "rejected"]].reset_index(drop=True), preserve_index=False
                )
                for split, rows in pairs.groupby("split")
            }
        ).save_to_disk(str(path))


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown; what Markdown would take for markup is escaped, numbers have three digits or all before the point."""
    head, *rows = ([_MARKUP.sub(r"\\\g<0>", cell) for cell in row] for row in _cells(table))
    lines = [head, ["---"] * len(table.columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex(table: pd.DataFrame) -> str:
    """The body of a LaTeX `tabular`, booktabs' rules around it, special characters escaped."""

    def line(cells: list[str]) -> str:
        return " & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in cells) + r" \\" + "\n"

    head, *body = map(line, _cells(table))
    columns = "".join("r" if pd.api.types.is_numeric_dtype(kind) else "l" for kind in table.dtypes)
    rows = "".join(body)
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head}\\midrule\n{rows}\\bottomrule\n\\end{{tabular}}\n"


def _cells(table: pd.DataFrame) -> list[list[str]]:
    """The names of the columns, and each row, as text of one line."""
    return [[_cell(value) for value in row] for row in (list(table.columns), *table.itertuples(index=False))]


def _cell(value: object) -> str:
    if isinstance(value, float):
        # A count is a float where a column has gaps.
        return "" if pd.isna(value) else f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return "" if value is None else " ".join(str(value).split())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command `export`."""
    parser.add_argument(
        "form",
        choices=["alpaca_eval", "arena_hard", "datasets", "tensorboard", "markdown", "latex"],
        help="what is made",
    )
    parser.add_argument(
        "source",
        type=Path,
        help="a samples table, a preferences table, for tensorboard a folder (results/training or work), else a CSV file",
    )
    parser.add_argument("--prompts", type=Path, help="prompts table, for alpaca_eval and arena_hard")
    parser.add_argument("--run", help="whose completions, for these two, where the table holds several runs")
    parser.add_argument("--temperature", type=float, help="at which, for these two, where there are several")
    parser.add_argument("--columns", nargs="+", help="of a CSV file, in this order (default: all)")
    parser.add_argument(
        "--out", required=True, type=Path, help="file or, for arena_hard, datasets and tensorboard, folder that is made"
    )


def run(args: argparse.Namespace) -> None:
    """Writes one form of one result.

    Raises:
        UserError: something that the form needs is not there.
    """
    if args.form in ("alpaca_eval", "arena_hard"):
        if args.prompts is None:
            raise UserError(f"{args.form} holds the prompts too: give --prompts, results/data/TASK/prompts.parquet.")
        prompts = read_table(args.prompts, "prompts")
        samples = read_table(args.source, "samples", prompts=prompts.attrs["manifest"]["content_hash"])
        texts = first_completions(samples, prompts, args.run, args.temperature)
        if args.form == "alpaca_eval":
            write_text(args.out, alpaca_eval(texts))
        else:
            with atomic_directory(args.out) as folder:
                for name, lines in arena_hard(texts).items():
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_text(lines, encoding="utf-8")
    elif args.form == "datasets":
        save_pairs(read_table(args.source, "preferences"), args.out)
    elif args.form == "tensorboard":
        write_events(trainings(args.source), args.out)
    else:
        table = read_csv(args.source)
        if missing := sorted({*(args.columns or ())} - {*table.columns}):
            raise UserError(f"{args.source} has no column {missing[0]!r}; it has {', '.join(table.columns)}.")
        chosen = table[args.columns] if args.columns else table
        write_text(args.out, markdown(chosen) if args.form == "markdown" else latex(chosen))
