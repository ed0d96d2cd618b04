"""Formulas as MathML, made when the site is built: a browser loads nothing for them.

They are written in the two forms that GitHub shows as formulas too.
"""

import re
from typing import Any

from latex2mathml.converter import convert

DISPLAY = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"\$`([^`]+)`\$")
PLACE = re.compile(r"formula(\d+)formula")
_formulas: dict[str, list[str]] = {}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Takes formulas out of the text, which markdown would read as its own."""
    found = _formulas[page.file.src_uri] = []

    def taken(source: str, display: str) -> str:
        found.append(convert(source.strip(), display=display))
        return f"formula{len(found) - 1}formula"

    markdown = DISPLAY.sub(lambda match: f'<div class="formula">{taken(match[1], "block")}</div>', markdown)
    return INLINE.sub(lambda match: taken(match[1], "inline"), markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Puts them back."""
    found = _formulas.pop(page.file.src_uri, [])
    return PLACE.sub(lambda match: found[int(match[1])], html)
