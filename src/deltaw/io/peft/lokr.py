"""`peft_type: "LOKR"`: `lokr_w1` is C, `lokr_w2` is D, each whole or as `_a` times `_b`; a Tucker core is multiplied out.

How PEFT divides a weight into C and D follows from `decompose_factor` and the base's shape, so a change can be written only
if it was divided by that rule. Over a Conv1d with a whole D (b, d, kernel), PEFT (up to 0.21.2) computes
ΔW[k·a + i, l·c + j, t] = scale · C[i, j] · D[k, l, t], which is D ⊗ C and not C ⊗ D: such a file is read as a dense change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaw.core.adapter import Change
from deltaw.core.registry import variants
from deltaw.errors import AdapterError, ConfigError, TargetError
from deltaw.io.peft import config as fields
from deltaw.io.peft.grammar import Parsed, Shapes
from deltaw.io.peft.per_module import (
    CONVOLUTIONS,
    LYCORIS,
    Beside,
    PerModule,
    alpha_of,
    rank_of,
    ranks_and_alphas,
    tucker,
)
from deltaw.variants.lokr import divided

MAX_DENSE = 1 << 28
"""Values of a dense change that a few small factors may ask for."""


class LokrGrammar(PerModule):
    """LoKr."""

    peft_type: ClassVar[str] = "LOKR"
    kind: ClassVar[str] = "lokr"
    suffixes: ClassVar[Mapping[str, str]] = {
        "lokr_w1": "C",
        "lokr_w1_a": "C_left",
        "lokr_w1_b": "C_right",
        "lokr_w2": "D",
        "lokr_w2_a": "D_left",
        "lokr_w2_b": "D_right",
        "lokr_t2": "T",
    }

    layers: ClassVar[tuple[str, ...]] = LYCORIS

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes = None) -> Parsed:
        parsed = super().read(config, tensors, shapes)
        dense = [key for key, change in parsed.adapter.changes.items() if change.variant.kind == "diff"]
        if not dense:
            return parsed
        note = (
            f"PEFT multiplies the factors of {dense[0]!r}{' and others' if len(dense) > 1 else ''} in another order than "
            f"LoKr's formula, since it is a Conv1d: what it computes is read as a dense change"
        )
        return replace(parsed, notes=(*parsed.notes, note))

    def change(self, config: Mapping[str, Any], path: str, parts: Mapping[str, Tensor], beside: Beside) -> Change:
        found = {name: t.flatten(1) for name, t in parts.items() if name != "T"}
        if "T" in parts:
            found["D_left"], found["D_right"] = tucker(parts["T"], parts["D_left"], parts["D_right"])
        for side in "CD":
            if (side in found) == (f"{side}_left" in found and f"{side}_right" in found):
                raise AdapterError(f"{side} must be there whole or as two factors; found {', '.join(sorted(parts))}")
        whole = "".join(side for side in "CD" if side in found)
        options = {
            "rank": rank_of(config, path),
            "alpha": alpha_of(config, path, "alpha"),
            "rank_dropout": config.get("rank_dropout") or 0.0,
            "module_dropout": config.get("module_dropout") or 0.0,
        }
        rows = [found[n].shape[0] if n in found else found[f"{n}_left"].shape[0] for n in "CD"]
        columns = [found[n].shape[1] if n in found else found[f"{n}_right"].shape[1] for n in "CD"]
        (a, b), (c, d) = rows, columns
        options |= {
            "factor": config.get("decompose_factor", -1),
            "decompose_both": bool(config.get("decompose_both")),
        }
        rule = variants[self.kind](**options)
        try:
            as_ruled = rule.sides((a * b, c * d)) == ((a, b), (c, d)) and rule.kept_whole(a, b, c, d) == whole
        except (TargetError, ConfigError):
            as_ruled = False
        variant = rule if as_ruled else variants[self.kind](**options, split=(a, c), whole=whole)
        channels, *kernel = parts["D"].shape[1:] if "D" in parts else (d,)
        if not kernel:
            return Change(variant, found)
        change = Change(variant, found, f"conv{len(kernel)}d", (a * b, c * channels, *kernel))
        return as_peft_multiplies(change) if other_product(change) else change

    def tensors(self, path: str, change: Change) -> dict[str, Tensor]:
        found = dict(change.tensors)
        if "D" in found and change.layer in CONVOLUTIONS and change.shape is not None:
            found["D"] = found["D"].reshape(found["D"].shape[0], -1, *change.shape[2:])
        return found

    def config_of(self, changes: Mapping[str, Change]) -> dict[str, Any]:
        config = ranks_and_alphas(changes, "r", "alpha")
        first: Any = next(iter(changes.values())).variant
        fields.put(config, "decompose_factor", first.factor, -1)
        fields.put(config, "decompose_both", first.decompose_both, False)
        fields.put(config, "rank_dropout", first.rank_dropout, 0.0)
        fields.put(config, "module_dropout", first.module_dropout, 0.0)
        return config

    def cannot_also(self, changes: Mapping[str, Change]) -> str | None:
        every: list[Any] = [c.variant for c in changes.values()]
        for path, change in changes.items():
            if not as_peft_divides(change):
                return f"PEFT divides weights by its own rule, and that of {path!r} was divided otherwise"
            if other_product(change):
                return f"PEFT multiplies the factors of {path!r}, a Conv1d, in another order"
        if len({(v.factor, v.decompose_both) for v in every}) > 1:
            return "one file has one decompose_factor"
        return None


def as_peft_divides(change: Change) -> bool:
    """Whether PEFT, given the variant's factor, divides the weight into the same C and D, kept in the same way.

    It divides a convolution's channels, and lets D have the kernel.
    """
    v: Any = change.variant
    if change.layer not in CONVOLUTIONS:
        return v.split is None and v.whole is None
    if change.shape is None:
        return False
    out, channels = change.shape[:2]
    (a, b), (c, d) = divided(out, v.factor), divided(channels, v.factor)
    whole = ("" if v.decompose_both and v.rank < max(a, c) / 2 else "C") + ("" if v.rank < max(b, d) / 2 else "D")
    found = "".join(side for side in "CD" if side in change.tensors)
    return found == whole and sides_of_C(change) == (a, c)


def sides_of_C(change: Change) -> tuple[int, int]:
    """(a, c)."""
    t = change.tensors
    return t["C" if "C" in t else "C_left"].shape[0], t["C" if "C" in t else "C_right"].shape[1]


def other_product(change: Change) -> bool:
    """Whether PEFT computes another ΔW from these tensors: D ⊗ C, which is C ⊗ D only where a or b is 1 and c or d is 1."""
    if change.layer != "conv1d" or change.shape is None or "D" not in change.tensors:
        return False
    (a, c), (out, channels) = sides_of_C(change), change.shape[:2]
    return 1 not in (a, out // a) or 1 not in (c, channels // c)


def as_peft_multiplies(change: Change) -> Change:
    """What PEFT computes for a Conv1d, as a dense change: torch.kron of a (a, c) and a (b, d, kernel), in the weight's shape."""
    t, v, shape = change.tensors, change.variant, change.shape
    assert shape is not None
    if math.prod(shape) > MAX_DENSE:
        raise AdapterError(f"its factors make a weight {shape}, which no Conv1d has: the file is damaged")
    C = t["C"] if "C" in t else t["C_left"] @ t["C_right"]
    D = t["D"].reshape(len(t["D"]), -1, shape[2])
    diff = (torch.kron(C, D) * v.scale).reshape(shape)  # type: ignore[attr-defined]
    return Change(variants["diff"](), {"diff": diff}, None, shape)


GRAMMAR = LokrGrammar()
