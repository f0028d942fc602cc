"""Changes the meaning of a module in one place at a time and counts the changes that its tests notice.

    python tests/mutation/run.py objectives lm.kl --tests tests/unit/test_objectives.py tests/unit/lm
    python tests/mutation/run.py training.preference --sample 60
    python tests/mutation/run.py --group judging

mutmut (`pip install 'mutmut>=3.8,<4'`) makes the changes and `trial.py` tries them. Changes of what code only says (log
lines, texts of errors), of what it says of all that it is given (`strict`, `encoding`), and those listed in
`equivalent.yaml`, which change nothing that can be observed, are left out. `--sample` tries that many of each module,
drawn at random. Give it tests that run in this process and end soon. Constants of modules and of tests are made before
the changes, so that a change there can look missed.

Of the groups of `groups.yaml` (`--group NAME`, seed 0), changes that are not equivalent and were noticed. Tests were
written for what was missed, or were left out of the group, and those changes alone were tried again. The first eleven but
generation.sample were scored by mutmut itself at an earlier commit: of a module that changed since, others are drawn now.

    objectives                334 of 334
    lm.reading                166 of 166
    lm.sampling                97 of 97
    analysis                   66 of 66
    generation.sample          15 of 15
    judging.stage              45 of 45
    judging                   147 of 147
    data.raw                  104 of 104
    data                       90 of 90
    training.supervised        75 of 75
    training.rewards           60 of 60
    training.labels            98 of 98
    training.evaluation        75 of 75
    analysis.statistics        56 of 56
    analysis.tables           146 of 146
    analysis.diagnosis         59 of 59
    analysis.overoptimization  60 of 60
    data.own_records          120 of 120
    data.rounds                72 of 72
    generation.best_of_n       59 of 59
    generation.evaluations     74 of 74
    lm.chat                    59 of 59
    judging.calls             129 of 129
    data.files                102 of 102
    training.checkpoints       60 of 60
    lm.loading                 52 of 58
    data.synthetic            107 of 107
    fetched                    77 of 77
    training.rounds            90 of 90
    analysis.shown             88 of 88

The six of lm.loading that are left are of lm.sharding in several processes, which tests/unit/training/test_processes.py
starts and no fork sees.

The copy of package and tests in which all this happens is left in `--lab`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]
GROUPS = yaml.safe_load((Path(__file__).parent / "groups.yaml").read_text(encoding="utf-8"))
sys.path.insert(0, str(REPOSITORY / "workflow"))

from prefopt.store.fingerprint import _dump, _Unspoken  # noqa: E402

# Exit codes of `trial.py`: 1 a test failed, 0 none did, 33 none runs the function; of the signal of a test that hung.
NAMES = {0: "survived", 33: "no test"}
CONFIG = """
[tool.mutmut]
source_paths = ["prefopt"]
only_mutate = {modules}
also_copy = ["workflow/", "models/", "prompts/", "schemas/", "config/", "profiles/", "Snakefile", "README.md", "docs/"]
pytest_add_cli_args_test_selection = ["no test"]
"""


class _Assumed(ast.NodeTransformer):
    """Code without what it says of all that it is ever given."""

    def visit_keyword(self, node: ast.keyword) -> ast.keyword | None:
        """Takes the lengths of what is zipped, and the encoding of a file, out."""
        self.generic_visit(node)
        return None if node.arg in ("strict", "encoding") else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Takes what a number that is not finite is called out, too."""
        if isinstance(node.func, ast.Name) and node.func.id == "require_finite":
            return ast.Call(node.func, [part for part in ast.walk(node) if isinstance(part, ast.Name)], [])
        return self.generic_visit(node)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="below prefopt, e.g. objectives, lm.kl")
    parser.add_argument("--group", choices=GROUPS, help="modules, sample and tests of `groups.yaml`")
    parser.add_argument("--tests", nargs="+", help="default: the tests that mirror the modules")
    parser.add_argument("--sample", type=int, help="changes of each module that are tried (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lab", type=Path, default=Path("/tmp/prefopt-mutants"))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.lab = args.lab.resolve()  # other processes work in it
    if args.group:
        group = GROUPS[args.group]
        args.modules, args.sample = group["modules"], group.get("sample")
        args.tests = without(group["tests"], group.get("without", []))
    if not args.modules:
        parser.error("name modules or a group")
    tests = args.tests or [path for module in args.modules for path in mirrored(module)]
    build(args.lab, args.modules)
    mutmut(args.lab)
    chosen = [name for module in args.modules for name in drawn(args.lab, module, args.sample, args.seed)]
    report(args.lab, args.modules, tried(args.lab, chosen, tests, args.processes))


def mirrored(module: str) -> list[str]:
    """The test of a module, else those of its folder."""
    folder, _, name = module.replace(".", "/").rpartition("/")
    own = Path("tests/unit", folder, f"test_{name}.py")
    return [str(own)] if (REPOSITORY / own).exists() else [str(own.parent)]


def without(tests: list[str], left_out: list[str]) -> list[str]:
    """Tests, but of a file that holds some that are left out the others one by one."""
    chosen = []
    for test in tests:
        file = REPOSITORY / test
        names = re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE) if file.is_file() else []
        kept = [f"{test}::{name}" for name in names if name not in left_out]
        chosen += kept if len(kept) < len(names) else [test]
    return chosen


def build(lab: Path, modules: list[str]) -> None:
    """Lays out a copy of the project with the package at its top, where mutmut looks for it."""
    shutil.rmtree(lab, ignore_errors=True)
    for name in ("workflow", "config", "profiles", "tests", "docs"):
        shutil.copytree(REPOSITORY / name, lab / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (lab / "workflow" / "prefopt").rename(lab / "prefopt")
    for module in modules:
        file = lab / "prefopt" / f"{module.replace('.', '/')}.py"
        file.write_text(undecorated(file.read_text(encoding="utf-8")), encoding="utf-8")
    for name in ("Snakefile", "README.md"):
        shutil.copy2(REPOSITORY / name, lab / name)
    files = [f"prefopt/{module.replace('.', '/')}.py" for module in modules]
    settings = CONFIG.format(modules=json.dumps(files))
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    # In one process: `trial.py` forks it.
    text = text.replace(" -n 2 --dist loadfile --no-loadscope-reorder", "")
    (lab / "pyproject.toml").write_text(text + settings, encoding="utf-8")
    (lab / "mutants").mkdir()  # Python does not look again for what it did not find on its path at first


def undecorated(source: str) -> str:
    """The code with `f = decorator(f)` below each function in place of `@decorator` above it, which mutmut would skip."""
    lines = source.splitlines()
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.decorator_list]
    for node in sorted(nodes, key=lambda node: node.lineno, reverse=True):
        value = node.name
        for decorator in reversed(node.decorator_list):
            value = f"{ast.unparse(decorator)}({value})"
        if value.startswith(("staticmethod(", "classmethod(")):  # mutmut knows these
            continue
        lines.insert(node.end_lineno or 0, f"{' ' * node.col_offset}{node.name} = {value}")
        del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "\n".join(lines) + "\n"


def mutmut(lab: Path) -> None:
    """Has mutmut make the changes, after which it ends for want of a test; what it prints goes to a file."""
    with (lab / "mutmut.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1"]
        subprocess.run(command, cwd=lab, env=surroundings(lab), stdout=log, stderr=log, check=False)


def tried(lab: Path, chosen: list[str], tests: list[str], processes: int) -> dict[str, int]:
    """Exit code of each change, see `trial.py`."""
    changes, codes = lab / "changes.json", lab / "codes.json"
    changes.write_text(json.dumps(chosen), encoding="utf-8")
    trial = Path(__file__).parent / "trial.py"
    command = [sys.executable, str(trial), str(changes), str(codes), str(processes), *tests]
    with (lab / "trial.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=lab / "mutants", env=surroundings(lab), stdout=log, stderr=log, check=True)
    found: dict[str, int] = json.loads(codes.read_text(encoding="utf-8"))
    if not found:
        raise SystemExit(f"The tests fail in the lab without a change: see {lab}/trial.log.")
    return found


def surroundings(lab: Path) -> dict[str, str]:
    """Environment of a process that takes the package from the lab."""
    return {**os.environ, "PYTHONPATH": str(lab / "mutants"), "OMP_NUM_THREADS": "1"}


def drawn(lab: Path, module: str, count: int | None, seed: int) -> list[str]:
    """Names of a module's changes that compute something else, all or so many of them."""
    mutated = ast.parse(mutant_file(lab, module).read_text(encoding="utf-8"))
    codes = {}
    for node in ast.walk(mutated):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "__mutmut_" in node.name:
            name, node.name = node.name, ""
            codes[name] = _dump(_Assumed().visit(_Unspoken().visit(node)))
    computing = [
        key for key in names(lab, module) if codes[function(key)] != codes[f"{function(key).rpartition('_')[0]}_orig"]
    ]
    if count is None or count >= len(computing):
        return computing
    return random.Random(f"{seed} {module}").sample(computing, count)


def report(lab: Path, modules: list[str], codes: dict[str, int]) -> None:
    """Prints what survived, and a line for each module and all of them."""
    equivalent = yaml.safe_load((Path(__file__).parent / "equivalent.yaml").read_text(encoding="utf-8")) or []
    total: Counter[str] = Counter()
    lines = []
    for module in modules:
        counts: Counter[str] = Counter()
        for key in names(lab, module):
            if key not in codes:
                continue
            outcome = NAMES.get(codes[key], "noticed")
            if outcome != "noticed":
                change = difference(lab, module, key)
                if any(known["module"] == module and known["change"].strip() == change for known in equivalent):
                    outcome = "equivalent"
                else:
                    print(f"{outcome}: {key}\n{change}\n")
            counts[outcome] += 1
        lines.append(score(module, counts))
        total += counts
    print("\n".join([*lines, score("all", total)]))


def score(name: str, counts: Counter[str]) -> str:
    """A line of counts; the score is the share of noticed changes among those that are not equivalent."""
    tried = sum(counts.values()) - counts["equivalent"]
    share = f"{100 * counts['noticed'] / tried:.1f}%" if tried else "-"
    return f"{name}: {share} of {tried} noticed; " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))


def names(lab: Path, module: str) -> list[str]:
    """Names of all changes of a module."""
    return list(json.loads(Path(f"{mutant_file(lab, module)}.meta").read_text(encoding="utf-8"))["exit_code_by_key"])


def mutant_file(lab: Path, module: str) -> Path:
    """Where mutmut keeps all changes of a module."""
    return lab / "mutants" / "prefopt" / f"{module.replace('.', '/')}.py"


def function(key: str) -> str:
    """The function that holds a change."""
    return key.rpartition(".")[2]


def difference(lab: Path, module: str, key: str) -> str:
    """A change as its lines, `- before` and `+ after`."""
    command = [sys.executable, "-m", "mutmut", "show", key]
    shown = subprocess.run(command, cwd=lab, env=surroundings(lab), capture_output=True, text=True, check=False).stdout
    changed = [line for line in shown.splitlines() if re.match(r"[-+](?![-+]{2})", line)]
    return "\n".join(re.sub(r"^([-+])\s*", r"\1 ", line) for line in changed)


if __name__ == "__main__":
    main()
