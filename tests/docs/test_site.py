"""The site as a browser gets it: built strictly, with no link that leads nowhere, and nothing loaded from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("material", reason="mkdocs-material builds the site")
yaml = pytest.importorskip("yaml", reason="mkdocs brings it")

ROOT = Path(__file__).parents[2]
# What a browser fetches by itself, by tag; `a` waits for the reader, who may go elsewhere.
LOADS = {"img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src", "object": "data"}
FOREIGN_IN_CSS = re.compile(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""")


class Page(HTMLParser):
    """The anchors and references of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.anchors |= {attributes[name] for name in ("id", "name") if name in attributes}
        self.classes |= set(attributes.get("class", "").split())
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if LOADS.get(tag) in attributes:
            self.loaded.append(attributes[LOADS[tag]])


def problems(site: Path) -> list[str]:
    """What is broken in the pages and style sheets under a folder, one line each."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    found: list[str] = []
    for file, page in pages.items():
        name = file.relative_to(site)
        found += [f"{name}: loads {url}" for url in page.loaded if urlsplit(url).netloc]
        if "mermaid" in page.classes:
            found.append(f"{name}: a diagram that the theme loads a library for")
        for url in page.links + page.loaded:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            path = unquote(parts.path)
            target = file if not path else site / path[1:] if path[0] == "/" else (file.parent / path).resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or not target.is_relative_to(site):
                found.append(f"{name}: no file for {url}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name}: no anchor for {url}")
    for file in sorted(site.rglob("*.css")):
        if FOREIGN_IN_CSS.search(file.read_text(encoding="utf-8")):
            found.append(f"{file.relative_to(site)}: loads from elsewhere")
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_nothing_leads_nowhere(site: Path) -> None:
    assert problems(site) == []


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    pages = {str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")}
    listed = entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(pages)
    for page in pages:
        path = Path(page)
        assert (site / (path.parent if path.name == "index.md" else path.with_suffix("")) / "index.html").is_file()


def entries(nav: object) -> list[str]:
    """The files of a navigation, sections opened."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    assert isinstance(parts, (list, type({}.values())))
    return [entry for part in parts for entry in entries(part)]


def test_types_in_signatures_are_links(site: Path) -> None:
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    anchors = Page(text).anchors
    signatures = "".join(re.findall(r'<div class="doc-signature.*?</div>', text, re.DOTALL))
    assert "TensorDictBase" in signatures
    links = set(Page(signatures).links)
    for name in ("FalseNegatives", "StepOptions", "StepOutput"):
        assert f"negcache_fn.{name}" in anchors
        assert f"#negcache_fn.{name}" in links


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('<a href="other/">', None),
        ('<a href="other/#here">', None),
        ('<a href="#top">', None),
        ('<a href="https://example.org/">', None),
        ('<img src="picture.svg#only-dark">', None),
        ('<a href="none/">', "no file for none/"),
        ('<a href="other/#there">', "no anchor for other/#there"),
        ('<a href="#there">', "no anchor for #there"),
        ('<a href="../outside.html">', "no file for ../outside.html"),
        ('<img src="none.svg#only-dark">', "no file for none.svg#only-dark"),
        ('<link rel="stylesheet" href="/none.css">', "no file for /none.css"),
        ('<script src="https://example.org/x.js">', "loads https://example.org/x.js"),
        ('<img src="//example.org/x.png">', "loads //example.org/x.png"),
        ('<pre class="mermaid">', "a diagram that the theme loads a library for"),
    ],
)
def test_the_crawler_bites(content: str, problem: str | None, tmp_path: Path) -> None:
    folder = tmp_path.resolve() / "site"
    (folder / "other").mkdir(parents=True)
    (folder / "other" / "index.html").write_text('<h1 id="here">', encoding="utf-8")
    (folder / "picture.svg").write_text("<svg/>", encoding="utf-8")
    (tmp_path / "outside.html").write_text("", encoding="utf-8")
    (folder / "index.html").write_text(f'<h1 id="top">{content}', encoding="utf-8")
    assert problems(folder) == ([] if problem is None else [f"index.html: {problem}"])


def test_the_crawler_reads_style_sheets(tmp_path: Path) -> None:
    sheet = tmp_path / "x.css"
    sheet.write_text("a{background:url(../x.svg)}", encoding="utf-8")
    assert problems(tmp_path) == []
    sheet.write_text('@font-face{src:url("https://example.org/x.woff2")}', encoding="utf-8")
    assert problems(tmp_path) == ["x.css: loads from elsewhere"]
