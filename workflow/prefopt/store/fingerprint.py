"""Names the code that a stage runs: a hash of every function, class and constant that it reaches.

Snakemake sees a stage's command, not its code. With the fingerprint among a rule's params, an edit of a trainer
reruns that trainer. What the code says changes nothing: comments, docstrings, annotations of functions, log lines,
the texts of errors and of `--help`; nor does a function, in whatever module, that the stage never calls.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Reference = tuple[str, str | None]  # a module, and a definition in it; all of it where None

_PACKAGE = Path(__file__).parents[1]
# What `python -m prefopt STAGE` calls of a stage's module.
_ENTRIES = ("add_arguments", "run")
# Errors whose argument is a sentence for people. Others may carry a reason that a summary counts.
_SENTENCES = {"UserError", "Interrupted", "Malformed"} | {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)
}


@functools.cache
def fingerprint(module: str, package: Path = _PACKAGE, apart: frozenset[str] = frozenset()) -> str:
    """SHA-256 (hex, 16 digits) of the code that a stage reaches: see `reached`.

    Args:
        module: dotted name, e.g. "prefopt.training.preference".
        package: folder of the top-level package.
        apart: definitions that this run of the stage does not call, e.g. "prefopt.data.formats.hh:raw_tables".

    Raises:
        ModuleNotFoundError: the package has no such module.
    """
    digest = hashlib.sha256()
    for name, code in sorted(reached(module, package, apart).items()):
        digest.update(f"{name} {code}\n".encode() if code else b"")
    return digest.hexdigest()[:16]


@functools.cache
def reached(module: str, package: Path = _PACKAGE, apart: frozenset[str] = frozenset()) -> dict[str, str]:
    """What runs when a stage's module is imported and its entries are called.

    Whatever a reached definition names counts as called, a class as a whole, and a module that is handed on by name
    too. The statements of an imported module that define nothing run with its import.

    Args:
        module: dotted name; without `run` all of it is reached.
        package: folder of the top-level package.
        apart: definitions that are left out, and with them what they alone reach.

    Returns:
        The code without what it says, by "module:name", and by "module:" what else runs when that module is imported.
    """
    found: dict[str, str] = {}
    imported: set[str] = set()
    first = _read(module, package)
    entries = [name for name in _ENTRIES if name in first.definitions] if "run" in first.definitions else [None]
    waiting: list[Reference] = [(module, name) for name in entries]
    while waiting:
        place, name = waiting.pop()
        if f"{place}:{name}" in apart:
            continue
        own = _read(place, package)
        if place not in imported:
            imported.add(place)
            waiting += [(other, "") for other in own.imported]
            waiting.append((place, ""))
        if name is None:
            waiting += [(place, each) for each in own.definitions]
        elif name in own.definitions and f"{place}:{name}" not in found:
            found[f"{place}:{name}"], references = _code(place, name, package)
            waiting += references
        elif name in own.aliases:
            waiting += _target(*own.aliases[name], package)
    return found


@dataclasses.dataclass(frozen=True)
class _Module:
    """A module's code without what it says."""

    name: str
    inside: str  # what its relative imports start from
    definitions: dict[str, list[ast.stmt]]  # by the name that they bind; those that bind none by ""
    aliases: dict[str, tuple[str, list[str]]]  # by local name, the imported module and the attributes to follow
    imported: list[str]  # modules of the package that run when this one is imported


@functools.cache
def _read(module: str, package: Path) -> _Module:
    path = _path_of(module, package)
    if path is None:
        raise ModuleNotFoundError(f"{module} is not a module of {package}")
    tree = _Unspoken().visit(ast.parse(path.read_text(encoding="utf-8")))
    definitions: dict[str, list[ast.stmt]] = {"": []}
    for statement in tree.body:
        for name in _bound(statement):
            definitions.setdefault(name, []).append(statement)
    inside = module if path.name == "__init__.py" else module.rpartition(".")[0]
    aliases = _aliases(tree.body, inside)
    imported = {place for target in aliases.values() for place, _ in _target(*target, package)}
    if "." in module:
        imported.add(module.rpartition(".")[0])
    return _Module(module, inside, definitions, aliases, sorted(imported))


class _Unspoken(ast.NodeTransformer):
    """Takes out what code says and does not compute."""

    def __init__(self) -> None:
        self._kept: set[int] = set()  # annotations that the code reads

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        value = node.value
        text = isinstance(value, ast.Constant) and isinstance(value.value, str)
        call = value.func if isinstance(value, ast.Call) else None
        logged = isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) and call.value.id == "logger"
        return None if text or logged else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        error = node.exc
        name = error.func if isinstance(error, ast.Call) else None
        if isinstance(name, ast.Name) and name.id in _SENTENCES:
            return ast.Raise(exc=name)
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return self.generic_visit(ast.Assert(test=node.test))

    def visit_keyword(self, node: ast.keyword) -> ast.AST | None:
        return None if node.arg in ("help", "metavar") else self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        # Recipes are read by the types of their fields.
        kept = {id(each) for each in node.body if isinstance(each, ast.AnnAssign)}
        self._kept |= kept
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if id(node) in self._kept:
            return self.generic_visit(node)
        if node.value is None:
            return None
        return self.generic_visit(ast.Assign(targets=[node.target], value=node.value))

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(arg=node.arg)


def _bound(statement: ast.stmt) -> list[str]:
    """Names of the module that a statement at its top binds, "" where it binds none; imports are kept apart."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return []
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement]
    names = (node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
    return sorted({node.id for node in names if isinstance(node.ctx, ast.Store)}) or [""]


def _aliases(nodes: list[Any], inside: str) -> dict[str, tuple[str, list[str]]]:
    found: dict[str, tuple[str, list[str]]] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                # `import a.b` binds `a`.
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                found[alias.asname or name] = (name, [])
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                ancestor = inside.split(".")[: len(inside.split(".")) - node.level + 1]
                base = ".".join([*ancestor, *([node.module] if node.module else [])])
            found.update({alias.asname or alias.name: (base, [alias.name]) for alias in node.names})
    return found


@functools.cache
def _code(place: str, name: str, package: Path) -> tuple[str, list[Reference]]:
    """The code of a definition, and what of the package it names."""
    module = _read(place, package)
    nodes = module.definitions[name]
    return "\n".join(_dump(node) for node in nodes), sorted(set(_references(module, nodes, package)), key=str)


def _references(module: _Module, nodes: list[ast.stmt], package: Path) -> Iterator[Reference]:
    """Modules of the package, and definitions in them, that some code names."""
    every = [node for top in nodes for node in ast.walk(top)]
    aliases = module.aliases | _aliases(every, module.inside)
    # An attribute's own value is walked too, and names all of a module where the attribute names one thing in it.
    followed = {id(node.value) for node in every if isinstance(node, ast.Attribute)}
    for node in every:
        if not isinstance(node, ast.Name | ast.Attribute) or id(node) in followed:
            continue
        attributes: list[str] = []
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            attributes.insert(0, root.attr)
            root = root.value
        if not isinstance(root, ast.Name):
            continue
        if root.id in module.definitions:
            yield module.name, root.id
        elif root.id in aliases:
            base, path = aliases[root.id]
            yield from _target(base, [*path, *attributes], package)


def _target(module: str, attributes: list[str], package: Path) -> list[Reference]:
    """Where attributes of a module lead: submodules, then a definition; None for all of a module."""
    if _path_of(module, package) is None:
        return []
    for i, name in enumerate(attributes):
        if _path_of(f"{module}.{name}", package) is None:
            return [(module, attributes[i])]
        module = f"{module}.{name}"
    return [(module, None)]


def _dump(node: Any) -> str:
    """A tree as text, the same under every version of Python."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if name not in ("ctx", "kind", "type_comment"))
        inside = ",".join(f"{name}={_dump(value)}" for name, value in fields if value not in (None, []))
        return f"{type(node).__name__}({inside})"
    if isinstance(node, list):
        return "[" + ",".join(_dump(each) for each in node) + "]"
    return repr(node)


@functools.cache
def _path_of(module: str, package: Path) -> Path | None:
    """A module's file, or None where the package has no such module."""
    top, *rest = module.split(".")
    if top != package.name:
        return None
    place = package.joinpath(*rest)
    candidates = (place / "__init__.py", place.with_suffix(".py")) if rest else (place / "__init__.py",)
    return next((path for path in candidates if path.is_file()), None)
