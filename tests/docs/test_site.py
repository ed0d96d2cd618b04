"""The site as a browser gets it: built strictly, with no link that leads nowhere, and nothing loaded from elsewhere."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import negcache_fn

pytest.importorskip("material", reason="mkdocs-material builds the site")
yaml = pytest.importorskip("yaml", reason="mkdocs brings it")
pytest.importorskip("latex2mathml", reason="it makes the formulas")

ROOT = Path(__file__).parents[2]
# What a browser fetches by itself, by tag; `a` waits for the reader, who may go elsewhere.
LOADS = {"img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src", "object": "data"}
# Modules to import from, each with the extra that it needs.
PUBLIC_MODULES = {
    "negcache_fn": None,
    "negcache_fn.nn": None,
    "negcache_fn.distributed": None,
    "negcache_fn.plots": None,
    "negcache_fn.random": None,
    "negcache_fn.frequency": None,
    "negcache_fn.dataset_rows": None,
    "negcache_fn.compilation": None,
    "negcache_fn.integrations.port": None,
    "negcache_fn.integrations.lightning": "lightning",
    "negcache_fn.integrations.sentence_transformers": "sentence_transformers",
}
NOT_TEXT = {"a", "pre", "b", "h1", "h2", "h3", "h4", "h5", "h6"}
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
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
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
    text = (site / "api" / "step" / "index.html").read_text(encoding="utf-8")
    signatures = "".join(re.findall(r'<div class="doc-signature.*?</div>', text, re.DOTALL))
    links = set(Page(signatures).links)
    for target in ("#negcache_fn.StepOptions", "#negcache_fn.StepOutput", "#negcache_fn._features.Features"):
        assert target in links
    assert {"../draws/#negcache_fn.Draw", "../scores/#negcache_fn.FalseNegatives"} <= links
    assert "https://docs.pytorch.org/docs/stable/tensors.html#torch.Tensor" in links
    plain = re.sub(r"<a .*?</a>", "", signatures, flags=re.DOTALL)
    assert not re.search(r">(Tensor|TensorDictBase|Draw|StepOutput|FalseNegatives)<", plain)


def public_entries(module_name: str) -> Iterator[str]:
    """The anchors that document a module: its names, and the fields of its tuples and dataclasses."""
    module = importlib.import_module(module_name)
    for name in module.__all__:
        value = getattr(module, name)
        home = "negcache_fn" if getattr(negcache_fn, name, None) is value else module_name
        yield f"{home}.{name}"
        fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else ()
        yield from (f"{home}.{name}.{field}" for field in getattr(value, "_fields", fields))


@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_every_public_name_and_field_is_shown(module_name: str, site: Path) -> None:
    if extra := PUBLIC_MODULES[module_name]:
        pytest.importorskip(extra, reason=f"{module_name} needs it")
    anchors = {anchor for file in (site / "api").rglob("*.html") for anchor in Page(file.read_text("utf-8")).anchors}
    assert set(public_entries(module_name)) - anchors == set()


def test_entries_have_fields() -> None:
    assert {"negcache_fn.Draw.slot", "negcache_fn.StepOptions.evict"} <= set(public_entries("negcache_fn"))


def test_all_public_modules_are_listed() -> None:
    folder = Path(negcache_fn.__file__).parent
    found = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts)
        for path in (*folder.iterdir(), *(folder / "integrations").iterdir())
        if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").is_file())
    }
    assert found - {"negcache_fn.integrations"} == PUBLIC_MODULES.keys() - {"negcache_fn"}


def examples(site: Path) -> Iterator[tuple[str, str]]:
    """The page and the source of every example in the API pages, as a browser copies it."""
    for file in sorted((site / "api").rglob("*.html")):
        for block in re.findall(
            r'<div class="language-python highlight">(.*?)</div>', file.read_text("utf-8"), re.DOTALL
        ):
            yield str(file.relative_to(site)), unescape(re.sub(r"<[^>]+>", "", block))


def test_examples_can_be_pasted(site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each is a program with its imports and without prompts; a line that must raise says so in a comment."""
    pytest.importorskip("lightning", reason="an example needs it")
    pytest.importorskip("sentence_transformers", reason="an example needs it")
    monkeypatch.chdir(tmp_path)
    sources = list(examples(site))
    assert len(sources) > 40
    for page, source in sources:
        assert ">>>" not in source, page
        raises = re.search(r"^# Raises (\w+)", source, re.MULTILINE)
        run = compile(source, page, "exec")
        if raises is None:
            exec(run, {"__name__": page})
        else:
            with pytest.raises(Exception, match=r".") as caught:
                exec(run, {"__name__": page})
            assert caught.typename == raises[1]


class Text(HTMLParser):
    """The code in running text that is not part of a link, a heading or a block."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.code: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {*NOT_TEXT, "code"}:
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if self.inside == ["code"]:
            self.code.append(re.sub(r"\(.*\)$", "", data, flags=re.DOTALL))


def unlinked(text: str, names: set[str]) -> list[str]:
    return sorted({name for name in Text(text).code if name.removeprefix("negcache_fn.") in names})


def test_public_names_in_text_are_links(site: Path) -> None:
    names = {*negcache_fn.__all__, "nn.NegativeCacheLoss", "NegativeCacheLoss", "distributed.save_checkpoint"}
    for file in sorted(site.rglob("*.html")):
        page = str(file.parent.relative_to(site))
        missing = unlinked(file.read_text(encoding="utf-8"), names)
        assert missing == (["step"] if page == "api/cache" else []), page  # there it is a key of the state


def test_the_search_for_unlinked_names_bites() -> None:
    text = "<p><code>step</code> <a><code>take</code></a> <code>StepOptions(top_k=3)</code> <code>other</code></p>"
    assert unlinked(f"{text}<pre><code>loss</code></pre>", set(negcache_fn.__all__)) == ["StepOptions", "step"]


def test_formulas_are_mathml(site: Path) -> None:
    text = (site / "method" / "index.html").read_text(encoding="utf-8")
    assert text.count('<math xmlns="http://www.w3.org/1998/Math/MathML"') > 20
    assert "```math" not in text
    assert "$`" not in text


def test_every_function_answers_a_task() -> None:
    """The index of the API has every public name but the results of others."""
    index = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    assert {name for name in negcache_fn.__all__ if f"`{name}`" not in index} == {"Draw", "StepOutput"}


def test_links_to_the_repository_exist() -> None:
    repository = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["repo_url"]
    assert f'Repository = "{repository}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    linked = re.findall(rf"{re.escape(repository)}/(?:tree|blob)/main/([\w/.]+)", pages)
    assert linked
    assert [path for path in linked if not (ROOT / path).exists()] == []


def test_pages_show_version_and_source(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    assert f"negcache_fn {negcache_fn.__version__}" in text
    assert "/edit/main/docs/index.md" in text
    assert "[Unreleased]" in (site / "changelog" / "index.html").read_text(encoding="utf-8")


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
