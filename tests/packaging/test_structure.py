"""The house: imports point down, folders keep their underscored names, files are short, an option is written once."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import negcache_fn
from negcache_fn.nn import NegativeCacheLoss

PACKAGE = Path(negcache_fn.__file__).parent
# Lowest first. A module imports from its own part and from those before it.
PARTS = (
    *(
        "random",
        "compilation",
        "_checks",
        "_features",
        "_options",
        "_codec",
        "_operators",
        "_kernels",
        "_ranks",
        "_checkpoints",
        "_cache",
    ),
    *(
        "_encoders",
        "_scores",
        "_draws",
        "_loss",
        "_monitor",
        "_batch",
        "_step",
        "dataset_rows",
        "distributed",
        "frequency",
        "plots",
        "nn",
    ),
    *("integrations", "__init__"),
)
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
LONGEST = 300
# Options that more public functions take as a keyword than three files can hold: `score`, `top_negatives`,
# `sample_gumbel`, `loss` and `exact_loss`.
WRITTEN_IN = {"score_transform": 6, "hardness": 5}


def part_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imports_of(source: str) -> Iterator[tuple[str, str | None]]:
    """The package's modules that are imported, as paths below it, each with an imported name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "negcache_fn":
            module = (node.module or "").partition(".")[2]
            for alias in node.names:
                yield module or alias.name, alias.name if module else None
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("negcache_fn."):
                    yield alias.name.partition(".")[2], None


def upward_imports(path: Path, source: str) -> list[str]:
    own = PARTS.index(part_of(path))
    return [module for module, _ in imports_of(source) if PARTS.index(module.split(".")[0]) > own]


def private_imports(part: str | None, source: str) -> list[str]:
    """Names with an underscore that are imported from another part; modules of the package are no names."""
    return [
        f"{module}.{name}"
        for module, name in imports_of(source)
        if name is not None and name.startswith("_") and module.split(".")[0] != part
    ]


def test_every_file_has_its_part() -> None:
    assert {part_of(path) for path in FILES} == set(PARTS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path: Path) -> None:
    source = (PACKAGE / path).read_text(encoding="utf-8")
    assert upward_imports(path, source) == []
    assert private_imports(part_of(path), source) == []


def test_the_checks_of_imports_bite() -> None:
    upward = "from negcache_fn._step import step_\nfrom negcache_fn._cache.ids import find_slots\n"
    assert upward_imports(Path("_cache/update.py"), upward) == ["_step"]
    assert upward_imports(Path("_checks.py"), "import negcache_fn._features") == ["_features"]
    assert upward_imports(Path("_kernels/dispatch.py"), "from negcache_fn import nn") == ["nn"]
    private = "from negcache_fn._draws.sample import Draw, _describe"
    assert private_imports("_loss", private) == ["_draws.sample._describe"]
    assert private_imports("_draws", private) == []


def test_examples_import_no_private_name() -> None:
    for path in sorted((PACKAGE.parent / "examples").rglob("*.py")):
        assert private_imports(None, path.read_text(encoding="utf-8")) == [], path


@pytest.mark.parametrize("suffix", ["py", "cpp", "h"])
def test_files_are_short(suffix: str) -> None:
    paths = list(PACKAGE.rglob(f"*.{suffix}"))
    assert paths
    for path in paths:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST, path


def names_in(source: str) -> set[str]:
    """The identifiers of a file: not its strings, comments and docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(negcache_fn.StepOptions)])
def test_an_option_is_written_in_three_files(option: str) -> None:
    found = [path for path in FILES if option in names_in((PACKAGE / path).read_text(encoding="utf-8"))]
    assert len(found) <= WRITTEN_IN.get(option, 3), found


def test_a_step_has_at_most_thirteen_parameters() -> None:
    for function in (negcache_fn.step, negcache_fn.step_, NegativeCacheLoss.forward, NegativeCacheLoss.__init__):
        assert len(inspect.signature(function).parameters) <= 13
