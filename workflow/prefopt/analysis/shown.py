"""What a run says on the terminal at its end: the win rates that it has made, and where the rest stands."""

from __future__ import annotations

from pathlib import Path

from prefopt.store.tables import read_csv

_FIGURES = ("winrates.svg", "frontier.svg", "winrate_by_step.svg", "training.svg")


def shown(results: Path, since: float) -> str:
    """A short table of each `*_winrates.csv`, and the path of each table and figure, that was written after a time.

    Args:
        results: folder of the results.
        since: seconds since the epoch.

    Returns:
        Lines of text; empty where nothing of these was made.
    """
    made = sorted(path for path in results.glob("*") if path.is_file() and path.stat().st_mtime >= since)
    parts = [_win_rates(path) for path in made if path.name.endswith("_winrates.csv")]
    paths = [str(path) for path in made if path.name.endswith(("_frontier.csv", *_FIGURES))]
    return "\n".join([*parts, *paths])


def _win_rates(path: Path) -> str:
    """Each run at its selected temperature."""
    table = read_csv(path)
    rows = table[table["selected"]]
    width = max([len("run"), *(len(str(run)) for run in rows["run"])])
    judges = ", ".join(sorted(map(str, rows["judge"].unique())))
    lines = [f"{path}, on {rows['n'].max()} test prompts by the judge {judges}:"]
    lines.append(f"  {'run':{width}}  temperature  win rate, % [interval]  tokens")
    for row in rows.to_dict("records"):
        rate, low, high = (f"{100 * row[name]:.0f}" for name in ("win_rate", "ci_low", "ci_high"))
        interval = f"{rate} [{low}, {high}]"
        lines.append(f"  {row['run']:{width}}  {row['temperature']:<11g}  {interval:22}  {row['mean_tokens']:.0f}")
    return "\n".join(lines)
