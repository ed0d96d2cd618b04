"""Plain English: a short list of idioms that must not come back, in documentation and package."""

import re
from pathlib import Path

import pytest

import negcache_fn

ROOT = Path(__file__).parents[2]
PACKAGE = Path(negcache_fn.__file__).parent
# Each with a way to say it. "There is no ..." is fine.
IDIOMS = {
    r"\bbut for\b": "apart from",
    r"(?<!there )\b(is|are|was|were|be) no\b(?! (longer|more))": "is not a ..., has no ...",
    r"\b(of|by|for|to|with|in|than|from|as|on|over|and|or) what\b(?! a drift)": "the noun itself",
    r"^\W*What [^.?\n]*[.:](\s|$)": "the noun itself",
    r"\bnothing that (was|is)\b": "we ... nothing",
    r"\bcomes? again\b": "is seen again",
    r"\bold self\b": "old entry",
    r"\bthose of all\b (?!ranks)": "the noun, repeated",
    r"\bfor want of\b": "without",
    r"\bbesides\b": "also, apart from, in addition",
    r"\blooked at\b": "read, logged",
    r"\bwhat else\b": "further ...",
    r"\ball there is\b": "the only ...",
    r"\banew\b": "again",
    r"\bgo(es)? on (from|where)\b": "resumes, continues",
    r"\bworth (its|their) price\b": "pays",
    r"\bnow and then\b": "occasionally",
    r"\b(has|have|takes?) no part\b": "does not enter, is left out",
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted(path for path in PACKAGE.rglob("*") if path.suffix in {".py", ".cpp", ".h"})


def found(text: str) -> list[str]:
    """The idioms in a text, with their lines. A text may break a line within an idiom."""
    lines: list[str] = []
    for idiom, instead in IDIOMS.items():
        pattern = idiom.replace(" ", r"\s+(?:(?:#|//)\s+)?") if "(?" not in idiom else idiom.replace(r"\b ", r"\b\s+")
        for match in re.finditer(pattern, text, re.IGNORECASE | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            lines.append(f"line {line}: {' '.join(match[0].split())!r}; write: {instead}")
    return lines


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_idiom_comes_back(path: Path) -> None:
    assert found(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "a step costs the same whatever C, but for one matrix product",
        "documents that are no negatives of a query",
        "The gradient of\n# what was drawn.",
        "What a step gives: the rest.",
        "nothing that was tried ends higher",
        "a document that comes again replaces its old self",
        "the queries of one rank and those of all others",
        "for want of a compiler",
        "and the metrics besides",
        "the rest is looked at",
        "while a cache fills they are all there is",
        "the same command goes on from there",
        "a larger M is worth its price",
        "empty slots take no part in anything",
        "the cache is distributed anew, now and then",
    ],
)
def test_the_list_bites(text: str) -> None:
    assert found(text)


def test_plain_english_passes() -> None:
    text = "There is no compiler. It is no longer there. Log what you read. Those of all ranks. A drift of .3."
    assert found(text) == []
