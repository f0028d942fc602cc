"""docs/extending.md makes what it says, in a copy of the workflow."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml
from running import REPOSITORY, TINY, copy_workflow, overlay, snakemake

PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
CHANGE = re.compile(
    r"^`([^`]+)`(?:, (above|below|in place of) `([^`]+)`)?:\n\n```\w+\n(.*?)```$", re.MULTILINE | re.DOTALL
)

READ = """
from prefopt.data.formats.recognise import FORMATS, recognised

row = {"instruction": "Sum it up.", "output": "Done."}
made = FORMATS[recognised(row)].parse(row, None)
print(recognised(row), made.post.prompt, made.response)
"""


def change(folder: Path, chapter: str) -> set[str]:
    """Makes the changes of a chapter; the files that it touches."""
    text = PAGE.partition(f"\n## {chapter}\n")[2].partition("\n## ")[0]
    files = set()
    for name, how, where, added in CHANGE.findall(text):
        path = folder / name
        files.add(name)
        if not how:
            path.write_text(added)
            continue
        content = path.read_text()
        assert content.count(where) == 1, f"{name} holds {where!r} {content.count(where)} times"
        line = content.index(where) if how != "below" else content.index(where) + len(where)
        if how == "above":
            line = content.rindex("\n", 0, line) + 1
        if added.startswith("def "):
            added += "\n\n"  # which a formatter of Markdown takes away
        new = {"above": added, "below": f"\n{added.rstrip()}", "in place of": added.rstrip()}[how]
        rest = content[line + len(where) :] if how == "in place of" else content[line:]
        path.write_text(content[:line] + new + rest)
    return files


def test_a_method_a_record_format_and_a_judge_are_added_as_the_page_says(tmp_path: Path) -> None:
    folder = copy_workflow(tmp_path / "copy")
    method, judge = change(folder, "A method that learns from pairs"), change(folder, "A judge")
    formats = change(folder, "A record format")
    assert len(method) == 3 and len(judge) == 4 and len(formats) == 2
    read = subprocess.run(
        [sys.executable, "-c", READ], cwd=folder / "workflow", capture_output=True, text=True, check=False
    )
    assert read.stdout.split() == ["instructions", "Sum", "it", "up.", "Done."], read.stderr
    for tool in (("ruff", "check"), ("ruff", "format", "--check")):
        files = [str(folder / name) for name in method | judge | formats if name.endswith(".py")]
        command = [sys.executable, "-m", *tool, "--config", str(REPOSITORY / "pyproject.toml"), *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    added = next(block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "apo_0.1" in block)
    own = yaml.safe_load(added)["tasks"]["tldr"]
    own["apo"] |= {"batch_size": 16, "warmup_steps": 1, "evaluate_every": 2}
    own["runs"] |= dict.fromkeys(("base", "preferred_ft", "dpo", "ppo", "best_of_4"))
    tasks = {**dict.fromkeys(("imdb", "hh", "cnndm")), "tldr": {**own, "judge": {"kind": "shorter"}, "human": None}}
    tasks["tldr"] |= {"frontier": None, "by_step": None, "other_judges": {"gold": None}}
    arguments = ("--configfile", TINY, overlay(tmp_path, {"tasks": tasks}))
    done = snakemake("--cores", "2", "results/tldr_winrates.svg", "results/compute.csv", *arguments, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    rates = pd.read_csv(folder / "results" / "tldr_winrates.csv")
    assert dict(zip(rates["run"], rates["method"], strict=True)) == {**{"sft": "sft", "apo": "apo", "apo_0.1": "apo"}}
    assert set(rates["judge"]) == {"shorter:v1"}
    costs = pd.read_csv(folder / "results" / "compute.csv").query("stage == 'total'").set_index("run")
    assert (costs.loc[["apo", "apo_0.1"], "training_flops"] > costs.loc["sft", "training_flops"]).all()
