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


def alpaca_eval(samples: pd.DataFrame, prompts: pd.DataFrame, run: str | None, temperature: float | None) -> str:
    """One run's first completion of each test prompt as AlpacaEval's `model_outputs`, a JSON list.

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
    texts = rows.merge(prompts[["prompt_id", "prompt"]], on="prompt_id", validate="many_to_one")
    outputs = [
        {"dataset": "prefopt", "instruction": prompt, "output": text.strip(), "generator": name}
        for prompt, text, name in zip(texts["prompt"], texts["text"], texts["run"], strict=True)
    ]
    return json.dumps(outputs, indent=1, ensure_ascii=False) + "\n"


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
        "form", choices=["alpaca_eval", "datasets", "tensorboard", "markdown", "latex"], help="what is made"
    )
    parser.add_argument(
        "source",
        type=Path,
        help="a samples table, a preferences table, for tensorboard a folder (results/training or work), else a CSV file",
    )
    parser.add_argument("--prompts", type=Path, help="prompts table, for alpaca_eval")
    parser.add_argument("--run", help="whose completions, for alpaca_eval, where the table holds several runs")
    parser.add_argument("--temperature", type=float, help="at which, for alpaca_eval, where there are several")
    parser.add_argument("--columns", nargs="+", help="of a CSV file, in this order (default: all)")
    parser.add_argument(
        "--out", required=True, type=Path, help="file or, for datasets and tensorboard, folder that is made"
    )


def run(args: argparse.Namespace) -> None:
    """Writes one form of one result.

    Raises:
        UserError: something that the form needs is not there.
    """
    if args.form == "alpaca_eval":
        if args.prompts is None:
            raise UserError("alpaca_eval holds the prompts too: give --prompts, results/data/TASK/prompts.parquet.")
        prompts = read_table(args.prompts, "prompts")
        samples = read_table(args.source, "samples", prompts=prompts.attrs["manifest"]["content_hash"])
        write_text(args.out, alpaca_eval(samples, prompts, args.run, args.temperature))
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
