"""What stands in several places says the same in each."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from running import REPOSITORY, snakemake

from prefopt.cli import STAGES
from prefopt.experiment.config import _allowed, load_schema
from prefopt.experiment.methods import METHODS, trained
from prefopt.store.fingerprint import reached

RULES = sorted((REPOSITORY / "workflow" / "rules").glob("*.smk"))
ENVIRONMENTS = sorted((REPOSITORY / "envs").glob("*.yaml"))
CONDA_NAMES = {"torch": "pytorch", "yaml": "pyyaml", "sklearn": "scikit-learn"}


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def edges(mermaid: str) -> set[tuple[str, str]]:
    """Pairs of rules (from, to) in a mermaid graph."""
    names = dict(re.findall(r"(\w+)\[(\w+)\]", mermaid))
    return {(names.get(a, a), names.get(b, b)) for a, b in re.findall(r"(\w+) --> (\w+)", mermaid)}


def test_the_rule_graph_in_the_documents_is_the_rule_graph(tmp_path: Path) -> None:
    result = snakemake("results/tldr_winrates.csv", "--rulegraph", "mermaid-js", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = edges(result.stdout)
    shown = read("docs/stages.md").partition("```mermaid")[2].partition("```")[0]
    lines = "\n".join(f"    {a} --> {b}" for a, b in sorted(expected))
    assert edges(shown) == expected, f"docs/stages.md should hold:\n{lines}"


def specifications() -> dict[str, str]:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    return dict(re.fullmatch(r"([\w.-]+)(.*)", line.replace(" ", "")).groups() for line in project["dependencies"])  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_conda_environments_take_the_versions_of_pyproject(path: Path) -> None:
    wanted = {CONDA_NAMES.get(name, name): versions for name, versions in specifications().items()}
    wanted["python"] = tomllib.loads(read("pyproject.toml"))["project"]["requires-python"]
    environment: dict[str, Any] = yaml.safe_load(path.read_text())
    for line in environment["dependencies"]:
        name, versions = re.fullmatch(r"([\w.-]+)(.*)", line).groups()  # type: ignore[union-attr]
        assert versions == wanted[name], f"{path.name}: {name} should be {wanted[name]}"


def test_the_lock_file_has_a_version_within_the_range_of_everything_that_is_asked_for() -> None:
    lines = [line for line in read("envs/lock.txt").splitlines() if not line.startswith("#")]
    locked = dict(line.split("==") for line in lines)
    assert len(locked) == len(lines) > 100 and lines == sorted(lines, key=lambda line: line.split("==")[0])
    project = tomllib.loads(read("pyproject.toml"))["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for line in map(Requirement, asked):
        version = locked.get(canonicalize_name(line.name))
        assert version is not None and version in line.specifier, f"envs/lock.txt has {version} of {line}"


STAGE = re.compile(r'(table|model|judging)_stage\(\s*"([\w{}.]+)')


def rules() -> dict[str, str]:
    """Text of each rule that runs a stage."""
    parts = [re.split(r"^ *rule ?(\w*):$", path.read_text(), flags=re.MULTILINE)[1:] for path in RULES]
    # The rule of all methods has no name of its own.
    found = {name or "train": text for part in parts for name, text in zip(part[::2], part[1::2], strict=True)}
    return {name: text for name, text in found.items() if STAGE.search(text)}


@pytest.mark.parametrize("rule", rules())
def test_a_rule_names_the_code_that_it_runs_and_an_environment_that_suffices(rule: str) -> None:
    text = rules()[rule]
    stage = STAGE.search(text)[2]  # type: ignore[index]
    if stage == "{params.stage}":
        stages = [str(METHODS[name].trainer) for name in trained()]
        assert "fingerprint(*targets.trainer_code(" in text
    else:
        stages = [stage]
        module = STAGES[stage][0]
        assert f'fingerprint("{module}"' in text or f'judge_params("{module}")' in text
    environment = re.search(r"\.\./\.\./envs/(\w+)\.yaml", text)[1]  # type: ignore[index]
    lines = yaml.safe_load(read(f"envs/{environment}.yaml"))["dependencies"]
    offered = {re.match(r"[\w.-]+", line)[0] for line in lines}  # type: ignore[index]
    for module in (STAGES[name][0] for name in stages):
        modules = {name.partition(":")[0] for name in reached(module)}
        needed = {CONDA_NAMES.get(name, name) for name in third_party_imports(modules)}
        assert needed <= offered, f"envs/{environment}.yaml lacks {', '.join(sorted(needed - offered))}"


def test_every_rule_says_where_it_logs_and_what_it_needs() -> None:
    for name, text in rules().items():
        for directive in ("log", "benchmark", "conda", "threads", "resources"):
            assert re.search(rf"^(    ){{1,2}}{directive}:", text, re.MULTILINE), f"rule {name} lacks {directive}:"
    (table,) = re.findall(r"^TABLE_RESOURCES = \{(.*?)\}$", read("workflow/rules/common.smk"), re.MULTILINE)
    assert set(re.findall(r'"(\w+)":', table)) == {"gpu", "nodes", "mem_mb", "runtime"}


def test_a_rule_that_runs_a_model_asks_for_what_its_own_stage_needs() -> None:
    asked = {name: re.findall(r"\*\*(?:model|judge)_needs\(\"?(\w+)\"?\)", text) for name, text in rules().items()}
    of_models = {name for name, text in rules().items() if STAGE.search(text)[1] != "table"}  # type: ignore[index]
    # A rule that inherits another, and so the text after it, overrides its resources.
    inherited = {
        "reference": ["reference_labels"],
        **{
            "pair_samples": ["ceiling_samples"],
            "subsets": ["judge_candidates"],
            "true_rewards": ["run_rewards", "candidate_rewards"],
        },
        "round_evaluations": ["sampled_rounds"],
        "round_prompts": ["round_samples", "round_scores", "round_true_rewards"],
        "round_judge_labels": ["round_reference"],
    }
    judging = {"judge_items": ["judge"], "train": ["method"]}
    for name, stages in asked.items():
        own = judging.get(name, [name] if name in of_models else [])
        assert stages == own + inherited.get(name, []), name


def test_no_tracked_file_is_a_rules_output() -> None:
    result = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("not a git checkout, so no file is tracked")
    outputs = [text.partition("    output:")[2].partition("    log:")[0] for text in rules().values()]
    places = {path.partition("/")[0] for text in outputs for path in re.findall(r'"([^"]*/[^"]*\{task\}[^"]*)"', text)}
    assert places - {".."} == {"results"}
    tracked = [path for path in result.stdout.splitlines() if path.startswith(("results/", "logs/", "work/"))]
    assert tracked == ["results/.gitignore"]


def third_party_imports(modules: frozenset[str]) -> set[str]:
    names: set[str] = set()
    for module in modules:
        path = REPOSITORY / "workflow" / Path(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add((node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names) - {"prefopt"}


def documented_keys() -> dict[str, list[str]]:
    """The rows that config/README.md must hold under each heading."""
    schema = load_schema()
    tasks = schema["properties"]["tasks"]["properties"]
    shared = {"Every trainer": ("batch_size", "training"), "Every PPO": ("prompts_per_update", "ppo")}
    rows: dict[str, list[str]] = {}

    def add(section: str, below: dict[str, Any]) -> None:
        for key, value in below["properties"].items():
            if value.get("x-internal"):
                continue
            inner = value.get("additionalProperties", value) if key == "runs" else value
            if "properties" in inner:
                name = f"{section}.{key}".lstrip(".").replace("tasks.tldr", "tasks.NAME")
                # Said once, where another task has the same section.
                if section == "tasks" and key != "tldr" and inner == tasks["tldr"]:
                    continue
                if section.startswith("tasks.") and inner == _same_section(tasks, section, key):
                    continue
                if inner == schema["$defs"]["adapter"]["adapter"]:
                    name = "Every adapter"
                add(f"{name}.RUN" if key == "runs" else name, inner)
                continue
            if "x-short" in value.get("items", {}):
                add(f"{section}.{key}", value["items"])
            headings = [
                heading
                for heading, (mark, group) in shared.items()
                if mark in below["properties"] and schema["$defs"][group].get(key) == value
            ]
            default = _shown(value["default"]) if "default" in value else "config.yaml"
            row = f"| `{key}` | {default} | {_allowed(value)} | {value['description']} |"
            rows.setdefault((headings or [section or "Top level"])[0], []).append(row)

    add("", schema)
    return {heading: list(dict.fromkeys(lines)) for heading, lines in rows.items()}


def _same_section(tasks: dict[str, Any], section: str, key: str) -> Any:
    """What `tasks.NAME` has in the same place; None for itself and where there is no such place."""
    task, *inner = section.removeprefix("tasks.").split(".")
    found = None if task == "NAME" else tasks["tldr"]
    for part in [*inner, key]:
        found = (found or {}).get("properties", {}).get(part)
    return found


def test_every_key_of_the_config_is_documented() -> None:
    found = re.findall(r"^## `?([\w. ]+?)`?\n(.*?)(?=^## |\Z)", read("config/README.md"), re.MULTILINE | re.DOTALL)
    sections = {heading: text.splitlines() for heading, text in found}
    for heading, rows in documented_keys().items():
        table = [line for line in sections[heading] if line.startswith("| `")]
        # In any order: that of merged keys is another from one release of PyYAML to the next.
        assert sorted(table) == sorted(rows), f"config/README.md, {heading}: write\n" + "\n".join(rows)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_commands_name_their_targets_before_options_that_take_many_values() -> None:
    """Such an option would take a target for one more of its values."""
    places = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("config/*")]
    for path in places:
        # Indented and fenced lines are commands, and what stands in backticks may go over the end of a line.
        prose, *fenced = re.split(r"^```\w*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        lines = [line for block in fenced[::2] for line in block.splitlines()]
        for text in [prose, *fenced[1::2]]:
            lines += [line for line in text.splitlines() if line.startswith("    ")]
            lines += re.findall(r"`([^`]+)`", re.sub(r"\n#? *", " ", text))
        for words in lines:
            greedy = re.search(r"snakemake .*--(configfile|resources|config|set-\w+) [^-]*?results/", words)
            assert greedy is None, f"{path.name}: {words}"


def test_the_snakefile_is_a_table_of_contents() -> None:
    lines = read("workflow/Snakefile").splitlines()
    assert len(lines) <= 70
    included = {Path(line.split('"')[1]).name for line in lines if line.startswith("include:")}
    assert included == {path.name for path in RULES}


def test_what_a_run_makes_is_ignored_by_git() -> None:
    made = ["results/tldr_winrates.csv", "results/models/tldr/dpo", "logs/tldr/dpo.log", "work/tldr", ".snakemake/log"]
    result = subprocess.run(["git", "check-ignore", *made], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if result.returncode == 128:
        pytest.skip("not a git checkout")
    assert result.stdout.split() == made


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = re.findall(r"^    (.*&& pytest)$", read("README.md"), re.MULTILINE)
    assert command.startswith("python3 -m venv .venv")
    assert "README.md" in read(".ci/run")


def anchors(text: str) -> set[str]:
    """What a Markdown page's headings are linked by."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere() -> None:
    pages = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("*/README.md")]
    assert len(pages) > 20
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if re.match(r"https?:|mailto:", link):
                continue
            name, _, anchor = link.partition("#")
            found = (page.parent / name).resolve() if name else page
            assert found.exists(), f"{page.relative_to(REPOSITORY)}: {link}"
            if anchor:
                assert anchor in anchors(found.read_text(encoding="utf-8")), f"{page.relative_to(REPOSITORY)}: {link}"


def test_the_readme_names_every_document() -> None:
    linked = set(re.findall(r"\]\(docs/([^)#]+\.md)", read("README.md")))
    assert linked == {path.name for path in REPOSITORY.glob("docs/*.md")}


def test_a_release_has_one_version() -> None:
    declared = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    released = re.findall(r"^## (\d\S*)", read("CHANGELOG.md"), re.MULTILINE)
    assert yaml.safe_load(read("CITATION.cff"))["version"] == released[0] == declared
