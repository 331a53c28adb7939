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
from deltaw.io.peft.per_module import PerModule, alpha_of, rank_of, ranks_and_alphas, tucker


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
        rule = variants[self.kind](
            **options, factor=config.get("decompose_factor", -1), decompose_both=bool(config.get("decompose_both"))
        )
        try:
            as_ruled = rule.sides((a * b, c * d)) == ((a, b), (c, d)) and rule.kept_whole(a, b, c, d) == whole
        except (TargetError, ConfigError):
            as_ruled = False
        return Change(rule if as_ruled else variants[self.kind](**options, split=(a, c), whole=whole), found)

    def tensors(self, path: str, change: Change) -> dict[str, Tensor]:
        return dict(change.tensors)

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
        if any(v.split is not None or v.whole is not None for v in every):
            return "PEFT divides weights by its own rule, and this one was divided otherwise"
        if len({(v.factor, v.decompose_both) for v in every}) > 1:
            return "one file has one decompose_factor"
        return None


GRAMMAR = LokrGrammar()
