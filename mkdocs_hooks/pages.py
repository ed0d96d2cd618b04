"""The version in the footer, and the changelog as a page."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_config(config: Any) -> Any:
    """Shows the version of the package on every page."""
    source = (ROOT / "negcache_fn" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert found
    config.copyright = f"negcache_fn {found[1]} · Apache-2.0"
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts `CHANGELOG.md` into its page; its links start at the repository's root."""
    if page.file.src_uri != "changelog.md":
        return markdown
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
