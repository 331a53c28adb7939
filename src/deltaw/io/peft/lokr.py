"""`peft_type: "LOKR"`: `lokr_w1` is C, `lokr_w2` is D, each whole or as `_a` times `_b`; a Tucker core is multiplied out.

How PEFT divides a weight into C and D follows from `decompose_factor` and the base's shape, so a change can be written only
if it was divided by that rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from deltaw.core.adapter import Change
from deltaw.core.registry import variants
from deltaw.errors import AdapterError, ConfigError, TargetError
from deltaw.io.peft import config as fields
from deltaw.io.peft.per_module import CONVOLUTIONS, PerModule, alpha_of, rank_of, ranks_and_alphas, tucker
from deltaw.variants.lokr import divided


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

    layers: ClassVar[tuple[str, ...]] = (*PerModule.layers, *CONVOLUTIONS)

    def change(self, config: Mapping[str, Any], path: str, parts: Mapping[str, Tensor]) -> Change:
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
        return Change(rule if as_ruled else variants[self.kind](**options, split=(a, c), whole=whole), found)

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
    rows = change.tensors["C" if "C" in found else "C_left"].shape[0]
    columns = change.tensors["C" if "C" in found else "C_right"].shape[1]
    return found == whole and (rows, columns) == (a, c)


GRAMMAR = LokrGrammar()
