"""Links from public names in running text, and from torch's types in signatures, to their documentation."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SENTENCE_TRANSFORMERS = "negcache_fn.integrations.sentence_transformers"
ELSEWHERE = {
    "torch.Tensor": "https://docs.pytorch.org/docs/stable/tensors.html#torch.Tensor",
    "torch.dtype": "https://docs.pytorch.org/docs/stable/tensor_attributes.html#torch.dtype",
    "torch.device": "https://docs.pytorch.org/docs/stable/tensor_attributes.html#torch.device",
    "torch.distributed.ProcessGroup": "https://docs.pytorch.org/docs/stable/distributed.html",
    "tensordict.TensorDictBase": "https://docs.pytorch.org/tensordict/stable/reference/generated/tensordict.TensorDictBase.html",
}
# Names that stand for something else where they have no module in front of them.
WITH_MODULE_ONLY = {"NegativeCacheCallback", "main", "EMPTY", "metrics", "ages", "gumbel", "philox"}
NOT_TEXT = {"a", "autoref", "b", "pre", "h1", "h2", "h3", "h4", "h5", "h6"}


def identifiers(page: str) -> dict[str, str]:
    """What each name in the text of a page stands for: the objects of the API pages, by all their names."""
    found: dict[str, str] = {}
    for file in sorted((ROOT / "docs" / "api").glob("*.md")):
        for path in re.findall(r"^::: (negcache_fn\.[\w.]+)$", file.read_text(encoding="utf-8"), re.MULTILINE):
            parts = path.split(".")
            if any(part.startswith("_") for part in parts) or path == "negcache_fn.distributed":
                continue
            for start in range(len(parts) - 1):
                found.setdefault(".".join(parts[start:]), path)
            if parts[-1] not in WITH_MODULE_ONLY:
                found.setdefault(parts[-1], path)
    if page.startswith("integrations/sentence_transformers") or page == "api/integrations.md":
        loss = f"{SENTENCE_TRANSFORMERS}.NegativeCacheLoss"
        found |= {"NegativeCacheLoss": loss, "NegativeCacheCallback": f"{SENTENCE_TRANSFORMERS}.NegativeCacheCallback"}
        found |= {name: f"{loss}.{name}" for name in ("prefill", "reset", "resize")}
    elif page == "api/cache.md":
        found.pop("step")  # there it is a key of the state
    elif page == "integrations/lightning.md":
        found["NegativeCacheCallback"] = "negcache_fn.integrations.lightning.NegativeCacheCallback"
    return found


def linked(html: str, names: dict[str, str]) -> str:
    """The page with links around the names that stand in code by themselves."""
    tokens = re.split(r"(<[^>]+>)", html)
    inside = 0
    for place, token in enumerate(tokens):
        tag = re.match(r"</?(\w+)", token)
        if tag and tag[1] in NOT_TEXT:
            inside += -1 if token.startswith("</") else 1
        if token != "<code>" or inside or tokens[place + 2 : place + 3] != ["</code>"]:
            continue
        identifier = names.get(re.sub(r"\(.*\)$", "", tokens[place + 1], flags=re.DOTALL))
        if identifier:
            tokens[place] = f'<autoref identifier="{identifier}"><code>'
            tokens[place + 2] = "</code></autoref>"
    return "".join(tokens)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Before the references of a page are resolved."""
    for identifier, url in ELSEWHERE.items():
        pattern = rf'<autoref [^>]*identifier="{re.escape(identifier)}"[^>]*>(.*?)</autoref>'
        html = re.sub(pattern, rf'<a href="{url}">\1</a>', html)
    return linked(html, identifiers(page.file.src_uri))
