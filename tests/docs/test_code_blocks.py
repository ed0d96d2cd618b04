"""Every python block of the README and of the documentation runs, in order, each page in one namespace."""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,})[ \t]*(?P<language>[\w+-]*)[^\n]*\n"
    r"(?P<source>.*?)^(?P=indent)(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
# Pages that must have code, as must all recipes: a page whose blocks are no longer found would pass by running nothing.
WITH_CODE = {"README.md", "index.md", "getting_started.md", "method.md", "checkpoints.md", "scaling.md", "migrating.md"}


class Block(NamedTuple):
    line: int
    source: str


def python_blocks(text: str) -> list[Block]:
    """The python blocks of a markdown text, with the line number of their first line of code."""
    return [
        Block(text.count("\n", 0, match.start("source")) + 1, textwrap.dedent(match["source"]))
        for match in FENCE.finditer(text)
        if match["language"] in {"python", "py"}
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = python_blocks(page.read_text(encoding="utf-8"))
    assert (
        blocks
        or page.parent.name == "api"
        or (page.name not in WITH_CODE and page.parent.name not in {"recipes", "concepts", "integrations"})
    )
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        # Empty lines in front, so that a traceback names the line of the page.
        source = "\n" * (block.line - 1) + block.source
        exec(compile(source, str(page), "exec"), namespace)


def test_every_fence_names_its_language() -> None:
    """A block without a language would be skipped silently."""
    for page in PAGES:
        for match in FENCE.finditer(page.read_text(encoding="utf-8")):
            assert match["language"] in {"python", "sh", "text", "bibtex", "math"}, f"{page.name}: {match[0][:80]!r}"


def test_extraction_finds_nested_and_plain_blocks() -> None:
    text = "x\n```python\na = 1\n```\n\n!!! note\n    ```python\n    b = 2\n    ```\n```sh\nrm\n```\n"
    assert python_blocks(text) == [Block(3, "a = 1\n"), Block(8, "b = 2\n")]
    assert python_blocks("````python\nc = '''\n```\n'''\n````\n") == [Block(2, "c = '''\n```\n'''\n")]


def test_a_failing_block_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nvalue = 1\n```\n```python\nassert value == 2\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError):
        test_blocks_run(page, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name
)
def test_links_outside_the_site_exist(page: Path) -> None:
    """`mkdocs build --strict` checks those of docs/; these are read where the repository is."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        assert (ROOT / path).exists(), f"{page.name} links to {path}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
            }


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 110
