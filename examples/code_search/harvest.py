"""Every function of a Python installation, as data: what it says of itself and what it is made of.

One file at a time: ``ast`` finds the functions, the docstring becomes the query, and the identifiers of everything else
become the document. Nothing is imported or run.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import site
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.code_search.tokens import token_ids

__all__ = ["Function", "FunctionNode", "described_functions", "harvest_file", "installation_roots", "source_files"]

MIN_QUERY_WORDS = 4
MAX_QUERY_WORDS = 64
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """One function or method, and what is known of it."""

    line: int
    name: str
    """Qualified inside its module: ``Class.method``."""
    body_hash: bytes
    """Equal for functions that differ only in name, docstring, comments and layout."""
    query: str
    """The docstring's first paragraph, or an empty string."""
    tokens: dict[int, int]
    """Token id to number of occurrences, docstring left out."""


def installation_roots() -> list[Path]:
    """The standard library and the installed packages of the running interpreter."""
    paths = sysconfig.get_paths()
    roots = [paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()]
    return [root for root in dict.fromkeys(Path(root).resolve() for root in roots) if root.is_dir()]


def source_files(roots: list[Path]) -> list[tuple[Path, Path]]:
    """All Python files under the roots as (root, file) pairs, test suites left out.

    Root by root, sorted: the order does not depend on where the roots are.
    """
    found = {file: root for root in roots for file in root.rglob("*.py") if not _is_skipped(file.relative_to(root))}
    return sorted(((root, file) for file, root in found.items()), key=lambda pair: (roots.index(pair[0]), pair[1]))


def harvest_file(file: Path, mask_names: bool = False) -> list[Function]:
    """The functions of one file in source order; none of a file that does not parse.

    Args:
        file: a Python source file.
        mask_names: leave a function's own name out of its document, so that a query must match what it does.
    """
    return [_describe(node, name, query, mask_names) for node, name, query in described_functions(file)]


def described_functions(file: Path) -> list[tuple[FunctionNode, str, str]]:
    """The functions of one file without their docstrings, each with its qualified name and its query.

    In source order; none of a file that does not parse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    queries: dict[ast.AST, str] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None:
                queries[node] = first_paragraph(docstring)
                del node.body[0]
    return [(node, name, queries.get(node, "")) for node, name in _functions(module, "") if not _is_trivial(node)]


def first_paragraph(docstring: str) -> str:
    """The docstring's first paragraph on one line, or an empty string where that is no sentence to search by.

    >>> first_paragraph("Parse a date\\n    from a string.\\n\\n    Returns a date.")
    'Parse a date from a string.'
    """
    lines: list[str] = []
    for line in inspect.cleandoc(docstring).splitlines():
        if not line.strip() or line.startswith((":", "@", ">>>", ".. ")):
            break
        lines.append(line.strip())
    words = " ".join(lines).split()
    return " ".join(words[:MAX_QUERY_WORDS]) if len(words) >= MIN_QUERY_WORDS else ""


def _is_skipped(relative: Path) -> bool:
    return bool(_SKIPPED_FOLDERS.intersection(relative.parts)) or relative.name.startswith(("test_", "conftest"))


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[FunctionNode, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = prefix + child.name
            if not isinstance(child, ast.ClassDef):
                yield child, name
            yield from _functions(child, name + ".")
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _functions(child, prefix)


def _is_trivial(node: FunctionNode) -> bool:
    """Nothing is left to find: ``pass``, ``...`` or ``raise NotImplementedError``."""
    if len(node.body) > 1:
        return False
    statement = node.body[0] if node.body else ast.Pass()
    is_ellipsis = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_ellipsis or isinstance(statement, ast.Pass | ast.Raise)


def _describe(node: FunctionNode, qualified_name: str, query: str, mask_names: bool) -> Function:
    digest: list[str] = []
    identifiers: Counter[str] = Counter()
    for part in [node.args, *node.body]:
        for child in ast.walk(part):
            digest.append(type(child).__name__)
            for identifier in _identifiers(child):
                digest.append(identifier)
                identifiers[identifier] += 1
            if isinstance(child, ast.Constant):
                digest.append(repr(child.value))
    if mask_names:
        del identifiers[node.name]
    else:
        identifiers[node.name] += 1
    for outer in qualified_name.split(".")[:-1]:
        identifiers[outer] += 1
    tokens: Counter[int] = Counter()
    for identifier, count in identifiers.items():
        for token in token_ids(identifier):
            tokens[token] += count
    body_hash = hashlib.blake2b("\0".join(digest).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return Function(node.lineno, qualified_name, body_hash, query, dict(tokens))


def _identifiers(node: ast.AST) -> list[str]:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
            return [name]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.keyword(arg=str(name)) | ast.alias(name=name):
            return [name]
        case _:
            return []
