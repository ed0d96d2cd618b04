"""What is released, sdist and wheel: complete, alike, and at work in an environment that holds no more than they do."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import negcache_fn
from tests.docs.test_code_blocks import python_blocks

ROOT = Path(__file__).parents[2]
VERSION = negcache_fn.__version__
STEM = f"negcache_fn-{VERSION}"
# Tracked, but of use in the repository alone.
NOT_RELEASED = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")
GENERATED = {"PKG-INFO", "setup.cfg"} | {
    f"negcache_fn.egg-info/{name}"
    for name in ("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "requires.txt", "top_level.txt")
}
# These modules need an extra, or what torch brings on some platforms only; the rest has the dependencies alone.
FRAMEWORKS = ("lightning", "sentence_transformers", "transformers")
NEEDS_MORE = (
    *(f"negcache_fn/integrations/{name}" for name in FRAMEWORKS),
    "negcache_fn/plots.py",
    "negcache_fn/_kernels/triton/block_logsumexp.py",
    "negcache_fn/_kernels/triton/gumbel.py",
    "negcache_fn/_kernels/triton/products.py",
    "negcache_fn/_kernels/triton/slot_masses.py",
)

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what is released is what git tracks")


class Built(NamedTuple):
    """File names to contents, the sdist's below its top folder."""

    tree: dict[str, bytes]
    sdist: dict[str, bytes]
    wheel: dict[str, bytes]  # built from the tree
    wheel_of_sdist: dict[str, bytes]
    wheel_path: Path
    metadata: Metadata


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output; an error shows both streams. No variable that leads Python elsewhere is passed on."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_", "COVERAGE_"))}
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def unzipped(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def untarred(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            top, _, name = member.name.partition("/")
            assert top == STEM
            content = archive.extractfile(member)
            if content is not None:  # a folder has none
                yield name, content.read()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip("build", reason="the extra test is not installed")
    folder = tmp_path_factory.mktemp("built")
    tree, dist, again = folder / "tree", folder / "dist", folder / "again"
    listed = [name for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0") if (ROOT / name).is_file()]
    # A copy, so that the build leaves nothing in the repository, and what is not tracked has no part in it.
    for name in listed:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    original = {name: (tree / name).read_bytes() for name in listed}
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--wheel", "--outdir", again, tree, cwd=folder)
    shutil.rmtree(tree / "build")  # setuptools would put what lies there into the next wheel
    run(*build, "--outdir", dist, tree, cwd=folder)  # an sdist, and from it a wheel
    wheel_name = f"{STEM}-py3-none-any.whl"
    assert {path.name for path in dist.iterdir()} == {f"{STEM}.tar.gz", wheel_name}
    wheel = unzipped(again / wheel_name)
    return Built(
        tree=original,
        sdist=dict(untarred(dist / f"{STEM}.tar.gz")),
        wheel=wheel,
        wheel_of_sdist=unzipped(dist / wheel_name),
        wheel_path=dist / wheel_name,
        metadata=Metadata.from_email(wheel[f"{STEM}.dist-info/METADATA"]),  # raises on what an index would refuse
    )


@pytest.fixture(scope="session")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, and with torch and the rest from this environment's folder."""
    folder = tmp_path_factory.mktemp("installed")
    venv.EnvBuilder(symlinks=True).create(folder)
    python = folder / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*install, built.wheel_path, cwd=folder)
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    # Only after the installation, which would find negcache_fn there. The .pth files of that folder, and with them the
    # link to this repository, are not read, and what is installed here comes first.
    (Path(where.strip()) / "shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


def run_installed(python: Path, code: str, folder: Path, **environment: str) -> str:
    """What the code prints, run where nothing but the environment is on the path."""
    prelude = f"import sys\nassert {str(ROOT)!r} not in sys.path\n"
    return run(python, "-I", "-c", prelude + code, cwd=folder, **environment)


def test_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    package = {name: content for name, content in built.tree.items() if name.startswith("negcache_fn/")}
    kernels = {f"negcache_fn/_kernels/cpu/{name}" for name in ("scores.cpp", "scans.cpp", "problem.h")}
    assert {"negcache_fn/py.typed", "negcache_fn/__init__.py", *kernels} <= set(package)
    information = {f"{STEM}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt")}
    licence = f"{STEM}.dist-info/licenses/LICENSE"
    assert set(built.wheel) == {*package, *information, licence}
    assert {name: built.wheel[name] for name in package} == package
    assert built.wheel[licence] == built.tree["LICENSE"]
    assert built.wheel[f"{STEM}.dist-info/top_level.txt"].split() == [b"negcache_fn"]


def test_sdist_holds_what_git_tracks(built: Built) -> None:
    """So that `make test` runs in it: tests, examples, documentation, locks, Makefile."""
    expected = {name: content for name, content in built.tree.items() if not name.startswith(NOT_RELEASED)}
    assert set(built.sdist) - GENERATED == set(expected)
    assert {name: built.sdist[name] for name in expected} == expected


def test_wheel_of_the_sdist_is_that_of_the_tree(built: Built) -> None:
    assert built.wheel_of_sdist == built.wheel


def test_metadata(built: Built) -> None:
    metadata = built.metadata
    assert metadata.name == "negcache-fn"
    assert str(metadata.version) == VERSION
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE"]
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description is not None
    assert metadata.description.strip() == built.tree["README.md"].decode().strip()
    assert "Typing :: Typed" in (metadata.classifiers or ())
    # An index refuses both of a licence expression and a licence classifier.
    assert not any(line.startswith("License ::") for line in metadata.classifiers or ())


def lower_bound(specifiers: SpecifierSet) -> Version:
    """Of requirements that have no other: an application chooses its own upper ones."""
    (only,) = specifiers
    assert only.operator == ">=", specifiers
    return Version(only.version)


def dependencies(metadata: Metadata) -> dict[str, Version]:
    """Names of what an installation without extras brings, and the oldest that will do."""
    return {each.name: lower_bound(each.specifier) for each in metadata.requires_dist or () if each.marker is None}


def of_extra(metadata: Metadata, extra: str) -> list[Requirement]:
    return [
        each
        for each in metadata.requires_dist or ()
        if each.marker is not None
        and each.marker.evaluate({"extra": extra})
        and not each.marker.evaluate({"extra": ""})
    ]


def test_extras_refer_to_extras_that_exist(built: Built) -> None:
    extras = set(built.metadata.provides_extra or ())
    assert extras >= {"plots", "test", "docs", "examples", "bench", "dev"}
    for extra in extras:
        requirements = of_extra(built.metadata, extra)
        assert requirements, extra
        for each in requirements:
            if each.name == "negcache-fn":
                assert each.extras
                assert each.extras <= extras - {extra}
            else:
                lower_bound(each.specifier)


def test_extras_named_in_text_exist(built: Built) -> None:
    """In pages, in messages of errors: `pip install negcache-fn[plots]`."""
    extras = set(built.metadata.provides_extra or ())
    named = {
        (name, extra.strip())
        for name, content in built.tree.items()
        if name.endswith((".md", ".py")) and not name.startswith("tests/")
        for found in re.findall(rb"negcache-fn\[([^\]]+)\]", content)
        for extra in found.decode().split(",")
    }
    assert ("negcache_fn/plots.py", "plots") in named
    assert {(name, extra) for name, extra in named if extra not in extras} == set()


def test_bounds_allow_the_oldest_python(built: Built) -> None:
    """A bound at the version that is installed here is one whose own bound on Python can be read."""
    oldest = str(lower_bound(built.metadata.requires_python or SpecifierSet()))
    for each in built.metadata.requires_dist or ():
        if each.name != "negcache-fn" and importlib.util.find_spec(each.name.replace("-", "_")) is not None:
            found = importlib.metadata.distribution(each.name)
            if Version(Version(found.version).public) == lower_bound(each.specifier):
                assert oldest in SpecifierSet(found.metadata["Requires-Python"] or ""), (
                    f"{each} is not for Python {oldest}"
                )


def test_locks_are_within_the_bounds(built: Built) -> None:
    """What the locks pin is what the tests run with, so a bound above it would be one that nobody tried."""
    pinned: dict[str, Version] = {}
    for name in ("train.txt", "dev.txt", "bench.txt"):
        for line in built.tree[f"requirements/{name}"].decode().splitlines():
            if line and not line.startswith(("#", "-r")):
                requirement = Requirement(line)
                (only,) = requirement.specifier
                pinned[re.sub(r"[-_.]+", "-", requirement.name).lower()] = Version(only.version)
    assert pinned
    for each in built.metadata.requires_dist or ():
        if each.name in pinned:
            assert pinned[each.name] in each.specifier, each
    assert set(dependencies(built.metadata)) <= set(pinned)


def test_oldest_versions_are_those_stated_and_tested(built: Built) -> None:
    oldest = dependencies(built.metadata)
    assert built.metadata.requires_python is not None
    python = lower_bound(built.metadata.requires_python)
    stated = {
        name: found
        for name, content in built.tree.items()
        if name.endswith(".md")
        for found in re.findall(r"Python (\S+) and\s+torch (\S+), or newer", content.decode())
    }
    assert {"README.md", "docs/getting_started.md"} <= set(stated)
    assert set(stated.values()) == {(str(python), str(oldest["torch"]))}, stated
    # One job of CI installs exactly these.
    job = built.tree[".github/workflows/ci.yml"].decode().partition("lower-bounds:")[2]
    assert f'python-version: "{python}"' in job
    assert f'"torch=={oldest["torch"]}.*"' in job
    assert f'"tensordict=={oldest["tensordict"]}"' in job
    assert f'pythonVersion = "{python}"' in built.tree["pyproject.toml"].decode()


def imported(source: bytes) -> set[str]:
    """Names of the top packages that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_imports_are_declared(built: Built) -> None:
    """Not left to what a dependency happens to bring."""
    requirements = built.metadata.requires_dist or ()
    required = {name.replace("-", "_") for name in dependencies(built.metadata)}
    extra = {each.name.replace("-", "_") for each in requirements if each.marker is not None}
    always = {"negcache_fn", *sys.stdlib_module_names}
    for name, source in built.wheel.items():
        if name.endswith(".py"):
            # torch brings triton where there is one.
            allowed = required | extra | {"triton"} if name.startswith(NEEDS_MORE) else required
            assert imported(source) <= always | allowed, name


def test_versions_agree(built: Built) -> None:
    """The changelog ends in the version, or in what comes after it; the licence is the same in every place."""
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", built.tree["CHANGELOG.md"].decode(), re.MULTILINE)
    assert len(headings) == built.tree["CHANGELOG.md"].decode().count("\n## "), "a heading has another form"
    assert headings[0][0] in {"Unreleased", VERSION}
    released = [Version(name) for name, date in headings if name != "Unreleased" and date]
    assert len(released) == len([name for name, _ in headings if name != "Unreleased"]), "a release has no date"
    assert released == sorted(released, reverse=True)
    assert not released or released[0] <= Version(VERSION)
    citation = built.tree["CITATION.cff"].decode()
    assert re.findall(r"^license: (.+)$", citation, re.MULTILINE) == [built.metadata.license_expression]
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) in ([], [VERSION])


def test_installed_modules_import_and_bring_no_framework(built: Built, installed: Path, tmp_path: Path) -> None:
    """Drawing needs matplotlib, importing what draws does not."""
    modules = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in built.wheel
        if name.endswith(".py") and (not name.startswith(NEEDS_MORE) or name == "negcache_fn/plots.py")
    ]
    assert len(modules) > 20
    code = f"""
import importlib, importlib.metadata, json
frameworks = {{"accelerate", "datasets", "lightning", "matplotlib", "pytorch_lightning", "scipy",
              "sentence_transformers", "sklearn", "tensorboard", "transformers"}}
import negcache_fn
by_package = sorted(frameworks & set(sys.modules))
for module in {modules}:
    importlib.import_module(module)
by_modules = sorted(frameworks & set(sys.modules))
versions = [importlib.metadata.version("negcache-fn"), negcache_fn.__version__]
print(json.dumps([versions, negcache_fn.__file__, by_package, by_modules]))
"""
    versions, file, by_package, by_modules = json.loads(run_installed(installed, code, tmp_path))
    assert versions == [VERSION, VERSION]
    assert Path(file).is_relative_to(installed.parents[1])
    assert (by_package, by_modules) == ([], [])


def test_readme_example_runs_installed(built: Built, installed: Path, tmp_path: Path) -> None:
    example = python_blocks(built.tree["README.md"].decode())[0].source
    assert "negcache_fn.step(" in example
    code = example + "\nassert negcache_fn.occupancy(state) == 1\nprint(float(out.loss.detach()))"
    assert 0 < float(run_installed(installed, code, tmp_path)) < float("inf")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_kernel_builds_from_the_installed_source(installed: Path, tmp_path: Path) -> None:
    code = """
import torch
from negcache_fn._kernels import dispatch
queries, embeddings = torch.randn(3, 8), torch.randn(150, 8)
bias, excluded = torch.zeros(150), torch.empty(3, 0, dtype=torch.int64)
blocks = dispatch.block_logsumexp(dispatch.Problem(queries, embeddings, bias, excluded, None))
assert blocks is not None
scores = (queries.double() @ embeddings.double().T).split(64, 1)
torch.testing.assert_close(blocks.double(), torch.stack([part.logsumexp(1) for part in scores], 1), rtol=0, atol=1e-5)
"""
    run_installed(installed, code, tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert list((tmp_path / "negcache_fn").glob("cpu-*.so"))


# A line's comment is what the checker says of it: a type, or the rules that it breaks. tensordict 0.15 computes the
# bases of TensorDictBase, so that for a checker it may be a descriptor, and an attribute that holds one has no known
# type. A variable of that type has, and so has what is unpacked.
OUTSIDE = """
import torch
from torch import Tensor, nn

import negcache_fn
from negcache_fn import Draw, StepOutput


def encode(features: Tensor) -> Tensor:
    return features


rows = torch.zeros(4, 8)
state = negcache_fn.init_cache(64, 8, features=rows)
options = negcache_fn.StepOptions(draws_per_query=2)
out = negcache_fn.step(state, rows, rows, nn.Linear(8, 8), options=options, scale=torch.ones(()))
loss, state, metrics, draw = out
reveal_type(out)  # StepOutput
reveal_type(loss)  # Tensor
reveal_type(out.loss)  # Tensor
reveal_type(state)  # TensorDictBase
reveal_type(metrics)  # dict[str, Tensor]
reveal_type(out.draw)  # Draw
reveal_type(draw.slot)  # Tensor
reveal_type(negcache_fn.update(state, rows, rows))  # TensorDictBase
reveal_type(negcache_fn.sample_gumbel(state, rows))  # Draw
reveal_type(negcache_fn.top_negatives(state, rows, 3))  # tuple[Tensor, Tensor]
reveal_type(negcache_fn.loss(rows, rows, draw.embedding, draw))  # Tensor
reveal_type(negcache_fn.FalseNegatives(max_score=0.9).max_score)  # float | Tensor | ((Tensor) -> Tensor) | None
reveal_type(negcache_fn.__version__)  # str
kept = out.state  # reportUnknownMemberType, reportUnknownVariableType
negcache_fn.StepOptions(draws_per_query="two")  # reportArgumentType
negcache_fn.step(state, rows, rows, encode, options=2)  # reportArgumentType
negcache_fn.step(state, rows, rows, encode, number=2)  # reportCallIssue
negcache_fn.step(state, rows, rows, print)  # reportArgumentType
negcache_fn.nonsense  # reportAttributeAccessIssue, reportUnknownMemberType


def given(out: StepOutput) -> Draw:
    return out.loss  # reportReturnType
"""


def pyright(python: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    """Its report. It takes the interpreter from the path, as `--verifytypes` has no other way."""
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "pyright", "--outputjson", *arguments]
    environment = {**os.environ, "PATH": path, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode in {0, 1}, finished.stderr + finished.stdout  # 1: it has found errors
    return json.loads(finished.stdout)


def test_types_are_seen_from_outside(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyright", reason="the extra dev is not installed")
    (tmp_path / "outside.py").write_text(OUTSIDE)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict", "reportUnusedExpression": false}')
    found: dict[int, set[str]] = {}
    for each in pyright(installed, tmp_path)["generalDiagnostics"]:
        revealed = re.fullmatch(r'Type of ".*" is "(.*)"', each["message"])
        said = revealed[1] if each["severity"] == "information" and revealed else each["rule"]
        found.setdefault(each["range"]["start"]["line"], set()).add(said)
    seen = {line: ", ".join(sorted(said)) for line, said in found.items()}
    expected = {number: line.partition("  # ")[2] for number, line in enumerate(OUTSIDE.splitlines()) if "  # " in line}
    assert seen == expected


def test_every_public_type_is_known(installed: Path, tmp_path: Path) -> None:
    """By the checker's own count, of all that the modules export; what frameworks leave untyped is theirs."""
    pytest.importorskip("pyright", reason="the extra dev is not installed")
    report = pyright(installed, tmp_path, "--verifytypes", "negcache_fn", "--ignoreexternal")["typeCompleteness"]
    assert report.get("pyTypedPath")
    assert sum(symbol["isExported"] for symbol in report["symbols"]) > 100  # it has found the package
    absent = tuple(f"negcache_fn.integrations.{name}" for name in FRAMEWORKS if importlib.util.find_spec(name) is None)
    unknown = {
        symbol["name"]: [each["message"] for each in symbol["diagnostics"]]
        for symbol in report["symbols"]
        if symbol["isExported"] and not (symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"])
    }
    assert {name: why for name, why in unknown.items() if not name.startswith(absent)} == {}
