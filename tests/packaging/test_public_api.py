"""Every public name is documented, typed, in the API pages, and has an example that runs."""

import doctest
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import typing
from pathlib import Path
from types import ModuleType

import pytest
import torch

import negcache_fn

ROOT = Path(__file__).parents[2]
MODULES = ["negcache_fn", *(module.name for module in pkgutil.walk_packages(negcache_fn.__path__, "negcache_fn."))]
PUBLIC = {name: getattr(negcache_fn, name) for name in negcache_fn.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
EXPECTED = {
    *("init_cache", "score", "sample_gumbel", "merge_draws", "take", "loss", "exact_loss", "update", "update_"),
    *("step", "step_", "top_negatives", "stalest", "occupancy", "Draw", "StepOutput"),
}


def section(docstring: str, name: str) -> str:
    """The indented body of a google-style section, empty if there is none."""
    found = re.search(rf"^{name}:[^\n]*\n((?:[ \t]+[^\n]*\n|\n)*)", docstring + "\n", re.MULTILINE)
    return found[1] if found else ""


def test_public_names_are_those_of_the_design() -> None:
    assert len(negcache_fn.__all__) == len(set(negcache_fn.__all__))
    assert set(PUBLIC) >= EXPECTED
    # Whatever the package shows beyond its own modules is meant to be public.
    shown = {name for name, value in vars(negcache_fn).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert shown <= set(PUBLIC)


def _import(module_name: str) -> ModuleType:
    if module_name.startswith("negcache_fn._kernels.triton.") and not module_name.endswith(".call"):
        pytest.importorskip("triton", reason="the kernel of this module is Triton's, which is not installed")
    return importlib.import_module(module_name)


@pytest.mark.parametrize("module_name", MODULES)
def test_modules_have_docstrings_and_true_all(module_name: str) -> None:
    module = _import(module_name)
    assert module.__doc__
    assert module.__doc__.strip()
    for name in module.__all__:
        assert hasattr(module, name)


@pytest.mark.parametrize("module_name", MODULES)
def test_shared_names_have_docstrings(module_name: str) -> None:
    """Of modules with an underscore too, where ruff does not look."""
    module = _import(module_name)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert (inspect.getdoc(value) or "").strip(), name


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_documented(name: str) -> None:
    value = PUBLIC[name]
    docstring = inspect.getdoc(value)
    # A NamedTuple without a docstring of its own shows its signature.
    assert docstring
    assert not docstring.startswith(f"{name}(")
    first, *rest = docstring.splitlines()
    assert first.rstrip().endswith((".", ":"))
    assert not rest or not rest[0].strip()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_document_every_argument(name: str) -> None:
    signature = inspect.signature(FUNCTIONS[name])
    docstring = inspect.getdoc(FUNCTIONS[name]) or ""
    if name.endswith("_"):
        # The twin in place: documented by reference, so its arguments must be the same.
        assert docstring.startswith(f"`{name[:-1]}` in place")
        assert signature == inspect.signature(FUNCTIONS[name[:-1]])
    elif len(signature.parameters) > 1:
        documented = re.findall(r"^    (\w+(?:, \w+)*)(?: \([^)]*\))?:", section(docstring, "Args"), re.MULTILINE)
        assert [part for entry in documented for part in entry.split(", ")] == list(signature.parameters)
        assert section(docstring, "Returns").strip()
    assert ">>> " in section(docstring, "Examples?")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_typed(name: str) -> None:
    # The recursive alias `Features` is a string that names what its own module imports.
    names = {**vars(importlib.import_module("negcache_fn._features")), **vars(inspect.getmodule(FUNCTIONS[name]))}
    hints = typing.get_type_hints(FUNCTIONS[name], globalns=names)
    assert set(hints) == {*inspect.signature(FUNCTIONS[name]).parameters, "return"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_keyword_only(name: str) -> None:
    """What has a default is an option, and options are named at the call."""
    for parameter in inspect.signature(FUNCTIONS[name]).parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter


@pytest.mark.parametrize("name", CLASSES)
def test_classes_type_their_fields(name: str) -> None:
    fields = getattr(CLASSES[name], "_fields", None) or tuple(CLASSES[name].__dataclass_fields__)
    assert fields
    assert set(typing.get_type_hints(CLASSES[name])) == set(fields)
    source = inspect.getsource(CLASSES[name]) + (inspect.getdoc(CLASSES[name]) or "")
    for field in fields:
        assert re.search(rf"^\s+{field}: .*\S", source, re.MULTILINE), f"{name}.{field} is not described"


def test_api_pages_show_every_public_name() -> None:
    """Their fields too: tests/docs/test_site.py looks for those in the built site."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    shown = set(re.findall(r"^::: negcache_fn(?:\.\w+)*\.(\w+)$", pages, re.MULTILINE))
    assert shown >= {*FUNCTIONS, *CLASSES}


@pytest.mark.parametrize("module_name", MODULES)
def test_docstring_examples_run(module_name: str) -> None:
    module = _import(module_name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    # Examples may use torch and every public name without importing them.
    namespace = {**vars(module), **PUBLIC, "torch": torch}
    for case in doctest.DocTestFinder(exclude_empty=True).find(module, module_name, globs=namespace):
        runner.run(case, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
    examples = sum(
        ">>> " in (inspect.getdoc(value) or "") for value in FUNCTIONS.values() if value.__module__ == module_name
    )
    assert runner.tries >= examples


def test_version_is_written_once() -> None:
    assert importlib.metadata.version("negcache-fn") == negcache_fn.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)


def test_typed_marker_ships() -> None:
    assert (Path(negcache_fn.__file__).parent / "py.typed").exists()
