"""The model card (README.md) of an adapter, with the front matter that the hub and PEFT's users expect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from deltaw import __version__
from deltaw.core.adapter import Adapter
from deltaw.io.digest import digest


def card(adapter: Adapter, config: Mapping[str, Any]) -> str:
    """Markdown with YAML front matter: base model, library, tags; methods, sizes, digest, how to load."""
    name = adapter.base.get("name")
    kinds = Counter(repr(c.variant) for c in adapter.changes.values())
    in_peft = config.get("peft_type") != "DELTAW"
    front = ["---", f"library_name: {'peft' if in_peft else 'deltaw'}"]
    if name:
        front.append(f"base_model: {name}")
    tags = ["deltaw", *sorted({c.variant.kind for c in adapter.changes.values()})]
    if name:
        tags.insert(0, f"base_model:adapter:{name}")
    front += ["tags:", *(f"- {tag}" for tag in tags), "---", ""]
    lines = [
        f"# Adapter{f' for {name}' if name else ''}",
        "",
        f"A change of {len(adapter.changes)} weights ({adapter.numel:,} values), made with deltaw {__version__}.",
        "",
        "| change | weights |",
        "|---|---|",
        *(f"| `{kind}` | {count} |" for kind, count in kinds.most_common()),
        "",
        f"Digest: `{digest(adapter)}`",
        "",
    ]
    metrics = adapter.extra.get("metrics")
    if isinstance(metrics, Mapping):
        lines += ["| metric | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in metrics.items()), ""]
    use = ["```python", "import deltaw as dw", "", 'dw.load(model, "path/or/user/repo")', "```"]
    if in_peft:
        use += [
            "",
            "or",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            'PeftModel.from_pretrained(model, "path/or/user/repo")',
            "```",
        ]
    return "\n".join([*front, *lines, *use, ""])
