"""The command `diff`: two result folders side by side, the parameters that differ and the tables' numbers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.errors import UserError
from prefopt.store.tables import read_csv, read_manifest

# What names a row of a table, in this order; the columns of these that it has.
_KEYS = (
    *("task", "run", "method", "other", "stage", "temperature", "selected_temperature", "opponent"),
    *("opponent_temperature", "n", "step", "seed", "conservativeness", "beta", "texts", "bin"),
)
# Tables whose rows are named by less than all of these.
_KEYS_OF = {
    "winrates": ("task", "run", "temperature"),
    "winrates_by_seed": ("task", "run", "temperature", "seed"),
    "comparisons": ("task", "run", "opponent"),
}


def parameters(folder: Path) -> dict[str, Any]:
    """Every value of every recipe in a result folder, by "stage file: key"."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.parquet")):
        if recipe := read_manifest(path).get("recipe"):
            found |= {f"{path.relative_to(folder)}: {key}": value for key, value in _flat(recipe)}
    for path in sorted(folder.rglob("*manifest.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        recipe = content.get("recipe") or content.get("identity", {}).get("recipe") or {}
        found |= {f"{path.relative_to(folder)}: {key}": value for key, value in _flat(recipe)}
    return found


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _flat(below, f"{name}.{key}".lstrip("."))
    else:
        yield name, value


def compare_tables(first: pd.DataFrame, second: pd.DataFrame, name: str) -> pd.DataFrame:
    """The numbers that differ: a row per number, with the row's names, the column, both values and their difference.

    Rows that only one table has are given with the other value missing.
    """
    wanted = next((keys for ending, keys in _KEYS_OF.items() if name.endswith(ending)), _KEYS)
    keys = [key for key in wanted if key in first.columns and key in second.columns]
    numbers = [
        column
        for column in first.columns.intersection(second.columns)
        if column not in keys and pd.api.types.is_numeric_dtype(first[column]) and first[column].dtype != bool
    ]
    # An index of row numbers keeps rows apart that the names do not.
    sides = [
        frame.assign(row=frame.groupby(keys, dropna=False).cumcount() if keys else range(len(frame)))
        for frame in (first, second)
    ]
    joined = sides[0].merge(sides[1], on=[*keys, "row"], how="outer", suffixes=(" in A", " in B"))
    parts = []
    for column in numbers:
        a, b = joined[f"{column} in A"], joined[f"{column} in B"]
        differs = ~((a == b) | (a.isna() & b.isna()))
        part = joined.loc[differs, keys].assign(column=column, A=a[differs], B=b[differs])
        parts.append(part.assign(difference=part["B"] - part["A"]))
    empty = pd.DataFrame(columns=[*keys, "column", "A", "B", "difference"])
    return pd.concat(parts, ignore_index=True) if parts else empty


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command `diff`."""
    parser.add_argument("first", type=Path, metavar="A", help="a folder `results`")
    parser.add_argument("second", type=Path, metavar="B", help="another")


def run(args: argparse.Namespace) -> None:
    """Prints what differs."""
    for folder in (args.first, args.second):
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: name two folders of results.")
    print(report(args.first, args.second))


def report(first: Path, second: Path) -> str:
    """The comparison as text."""
    lines = [f"A: {first}", f"B: {second}", "", "Parameters that differ"]
    a, b = parameters(first), parameters(second)
    differing = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    shared = [name for name in differing if name in a and name in b]
    lines += [f"  {name}: {json.dumps(a[name])} | {json.dumps(b[name])}" for name in shared] or ["  none"]
    for label, mine, other in (("A", a, b), ("B", b, a)):
        files = sorted({name.partition(":")[0] for name in mine} - {name.partition(":")[0] for name in other})
        lines += [f"  only in {label}: {file}" for file in files]
    tables = [{path.stem: path for path in sorted(folder.glob("*.csv"))} for folder in (first, second)]
    for name in sorted(tables[0].keys() | tables[1].keys()):
        lines += ["", f"{name}.csv"]
        if missing := [label for label, found in zip("AB", tables, strict=True) if name not in found]:
            lines.append(f"  not in {missing[0]}")
            continue
        difference = compare_tables(read_csv(tables[0][name]), read_csv(tables[1][name]), name)
        text = difference.to_string(index=False, na_rep="", float_format=lambda x: f"{x:.4g}")
        lines += [f"  {line}" for line in text.splitlines()] if len(difference) else ["  the same numbers"]
    return "\n".join(lines)
