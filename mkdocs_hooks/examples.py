"""Examples of docstrings as programs: with their imports, and with outputs as comments, so that a copy of one runs."""

import ast
import builtins
import doctest
import re
import textwrap
from html import unescape
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r'<div class="highlight">(<pre><span></span><code><span class="gp">.*?</pre>)</div>', re.DOTALL)
IMPORTS = {
    "torch": "import torch",
    "nn": "from torch import nn",
    "F": "from torch.nn import functional as F",
    "Tensor": "from torch import Tensor",
    "dist": "import torch.distributed as dist",
    "Trainer": "from lightning import Trainer",
}


def public_imports(documented: str) -> dict[str, str]:
    """The line that imports each public name, in the documentation of one of them."""
    module, _, name = documented.rpartition(".")
    found = {name: f"from {module} import {name}"}
    for file in sorted((ROOT / "docs" / "api").glob("*.md")):
        for path in re.findall(r"^::: (negcache_fn\.[\w.]+)$", file.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, name = path.rpartition(".")
            found.setdefault(name, f"from {module} import {name}")
    return found


def program(session: str, documented: str) -> str:
    """A session of the interpreter, in the documentation of a name, as a program."""
    lines: list[str] = []
    for example in doctest.DocTestParser().get_examples(session):
        lines.append(example.source.rstrip("\n"))
        shown = example.want.rstrip("\n")
        if example.exc_msg:
            lines.append(textwrap.indent("Raises " + example.exc_msg.strip(), "# "))
        elif shown:
            lines.append(textwrap.indent(shown, "# ", lambda line: True))
    body = "\n".join(lines)
    return "\n".join([*imports(body, documented), "", body, ""])


def imports(body: str, documented: str) -> list[str]:
    """The lines that import what a program uses and does not make."""
    nodes = list(ast.walk(ast.parse(body)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    made = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    made |= {
        (alias.asname or alias.name).split(".")[0]
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    known = public_imports(documented) | IMPORTS
    missing = names - made - set(vars(builtins)) - set(known)
    if missing:
        raise ValueError(f"an example uses {sorted(missing)}, which it neither makes nor imports:\n{body}")
    lines = {known[name] for name in names - made if name in known}
    whole = sorted(line for line in lines if line.startswith("import"))
    modules: dict[str, list[str]] = {}
    for line in sorted(lines - set(whole)):
        module, _, name = line.removeprefix("from ").partition(" import ")
        modules.setdefault(module, []).append(name)
    return whole + [f"from {module} import {', '.join(names)}" for module, names in modules.items()]


def on_page_content(html: str, **_: Any) -> str:
    """Writes every session of the page as a program."""

    def written(match: re.Match[str]) -> str:
        documented = re.findall(r' id="(negcache_fn\.[\w.]+)"', html[: match.start()])[-1]
        source = program(unescape(re.sub(r"<[^>]+>", "", match[1])), documented)
        shown = highlight(source, PythonLexer(), HtmlFormatter(nowrap=True))
        return f'<div class="language-python highlight"><pre><span></span><code>{shown}</code></pre></div>'

    return BLOCK.sub(written, html)
