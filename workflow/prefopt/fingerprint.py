"""Names the code that a stage runs: a hash of its module and of everything in the package that it imports.

Snakemake sees a stage's command, not its code. With the fingerprint among a rule's params, an edit of a trainer
reruns that trainer; comments, docstrings, blank lines and line breaks inside brackets leave it as it is, and an
edit of a module that the stage does not import does too.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from pathlib import Path

_PACKAGE = Path(__file__).parent
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
_STATEMENT_STARTS = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
# From Python 3.12 on an f-string is many tokens; it is put together again, so that the fingerprint is the same
# under every Python version.
_STRING_STARTS = {getattr(tokenize, name) for name in ("FSTRING_START", "TSTRING_START") if hasattr(tokenize, name)}
_STRING_ENDS = {getattr(tokenize, name) for name in ("FSTRING_END", "TSTRING_END") if hasattr(tokenize, name)}


def fingerprint(module: str, package: Path = _PACKAGE) -> str:
    """SHA-256 (hex, 16 digits) of a module's code and of all modules of its package that it imports, directly or not.

    Imports inside functions count, and so do the `__init__` modules of the folders on the way.

    Args:
        module: dotted name, e.g. "prefopt.training.dpo".
        package: folder of the top-level package.

    Raises:
        ModuleNotFoundError: the package has no such module.
    """
    if _path_of(module, package) is None:
        raise ModuleNotFoundError(f"{module} is not a module of {package}")
    digest = hashlib.sha256()
    for name in sorted(import_closure(module, package)):
        digest.update(f"{name} {_code_hash(_require(name, package))}\n".encode())
    return digest.hexdigest()[:16]


@functools.cache
def import_closure(module: str, package: Path = _PACKAGE) -> frozenset[str]:
    """Names of the package's modules that run when `module` is imported and its functions are called."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        waiting.extend(_imports(name, package) - found)
        if "." in name:
            waiting.append(name.rpartition(".")[0])
    return frozenset(found)


def significant_tokens(source: str) -> list[str]:
    """A module's tokens without comments, docstrings, blank lines and the width of its indentation."""
    lines = source.splitlines(keepends=True)
    tokens: list[tuple[int, str]] = []
    depth, start = 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _STRING_STARTS:
            start = token.start if depth == 0 else start
            depth += 1
        elif token.type in _STRING_ENDS:
            depth -= 1
            if depth == 0:
                tokens.append((tokenize.STRING, _between(lines, start, token.end)))
        elif depth == 0 and token.type not in _LAYOUT:
            text = token.string if token.type not in _STATEMENT_STARTS else tokenize.tok_name[token.type]
            tokens.append((token.type, text))
    return [text for i, (_, text) in enumerate(tokens) if not _in_bare_string(tokens, i)]


def _in_bare_string(tokens: list[tuple[int, str]], index: int) -> bool:
    """Whether the token, or the line end after it, belongs to a statement that is one string: a docstring."""
    if tokens[index][0] == tokenize.NEWLINE:
        index -= 1
    before = tokens[index - 1][0] if index > 0 else tokenize.NEWLINE
    after = tokens[index + 1][0] if index + 1 < len(tokens) else tokenize.NEWLINE
    return tokens[index][0] == tokenize.STRING and before in _STATEMENT_STARTS and after == tokenize.NEWLINE


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    return "".join([lines[start[0] - 1][start[1] :], *lines[start[0] : end[0] - 1], lines[end[0] - 1][: end[1]]])


@functools.cache
def _code_hash(path: Path) -> str:
    return hashlib.sha256("\0".join(significant_tokens(path.read_text(encoding="utf-8"))).encode()).hexdigest()


def _imports(module: str, package: Path) -> set[str]:
    """The package's modules named by any import statement of a module."""
    path = _require(module, package)
    inside = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                ancestor = inside.split(".")[: len(inside.split(".")) - node.level + 1]
                base = ".".join([*ancestor, *([node.module] if node.module else [])])
            # `from package import name` may name a module or something in one.
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return {name for name in names if _path_of(name, package) is not None}


def _path_of(module: str, package: Path) -> Path | None:
    """A module's file, or None where the package has no such module."""
    top, *rest = module.split(".")
    if top != package.name:
        return None
    place = package.joinpath(*rest)
    candidates = (place / "__init__.py", place.with_suffix(".py")) if rest else (place / "__init__.py",)
    return next((path for path in candidates if path.is_file()), None)


def _require(module: str, package: Path) -> Path:
    path = _path_of(module, package)
    if path is None:
        raise ModuleNotFoundError(f"{module} is not a module of {package}")
    return path
