"""Writes combinations.md: which method suits which layer and which form, asked of the registry by trying each.

python docs/reference/combinations.py            writes the table
python docs/reference/combinations.py --check    ends with 1 if it is not up to date
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import torch
from torch import nn

import deltaw as dw
from deltaw.core.registry import forms, hosts, variants
from deltaw.errors import DeltawError

TABLE = Path(__file__).with_suffix(".md")


def around(layer: nn.Module) -> nn.Module:
    """A model with one layer, called `layer`."""
    model = nn.Module()
    model.layer = layer
    return model


def tried(family: str, variant: object) -> str:
    """ "yes", or why `attach` refuses the first example of a layer family with a variant."""
    examples = list(hosts[family].examples())
    if not examples:
        return ""
    reasons = []
    for example in examples:
        torch.manual_seed(0)
        try:
            dw.attach(around(example.layer()), variant, targets=["layer"])
            return "yes"
        except DeltawError as error:
            reasons.append(str(error).splitlines()[0])
    return reasons[0]


def formed(family: str, form: object) -> str:
    """ "yes", or why `quantize` refuses the layer family with a form."""
    examples = list(hosts[family].examples())
    if not examples:
        return ""
    reason = ""
    for example in examples:
        torch.manual_seed(0)
        try:
            dw.quantize(around(copy.deepcopy(example.layer())), form, targets=["layer"])
            return "yes"
        except DeltawError as error:
            reason = str(error).splitlines()[0]
    return reason


def table(rows: list[str], columns: dict[str, object], ask: object) -> list[str]:
    """A Markdown table with numbered reasons below it."""
    reasons: list[str] = []
    lines = ["| layer | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for family in rows:
        cells = []
        for thing in columns.values():
            answer = ask(family, thing)
            if answer not in ("yes", ""):
                answer = re.sub(r"^.*'layer', an? \w+, ", "a layer that ", answer).replace(
                    "a layer that which", "a layer that"
                )
                if answer not in reasons:
                    reasons.append(answer)
                answer = f"no ({reasons.index(answer) + 1})"
            cells.append(answer)
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return [*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]


def page() -> str:
    """The whole page."""
    families = [name for name, cls in hosts.items() if list(cls.examples())]
    methods = {kind: next(iter(cls.examples())) for kind, cls in variants.items()}
    kept = {kind: next(iter(cls.examples())) for kind, cls in forms.items()}
    return "\n".join(
        [
            "# What combines with what",
            "",
            "Generated from the registry by `python docs/reference/combinations.py`: every entry was tried. A combination",
            "that cannot be is refused when it is asked for, with the reason given below the table.",
            "",
            "## Methods and layers",
            "",
            *table(families, methods, tried),
            "",
            "## Forms of the frozen weight and layers",
            "",
            *table(families, kept, formed),
            "",
        ]
    )


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(
            0 if TABLE.exists() and TABLE.read_text() == text else f"{TABLE.name} is not up to date: run {__file__}"
        )
    TABLE.write_text(text)
