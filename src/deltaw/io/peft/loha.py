"""`peft_type: "LOHA"`: `hada_w1_a` is B1, `hada_w1_b` is A1, and so on; a convolution's Tucker core is multiplied out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from deltaw.core.adapter import Change
from deltaw.core.registry import variants
from deltaw.io.peft import config as fields
from deltaw.io.peft.per_module import LYCORIS, Beside, PerModule, alpha_of, rank_of, ranks_and_alphas, tucker


class LohaGrammar(PerModule):
    """LoHa."""

    peft_type: ClassVar[str] = "LOHA"
    kind: ClassVar[str] = "loha"
    suffixes: ClassVar[Mapping[str, str]] = {
        "hada_w1_a": "B1",
        "hada_w1_b": "A1",
        "hada_w2_a": "B2",
        "hada_w2_b": "A2",
        "hada_t1": "T1",
        "hada_t2": "T2",
    }
    layers: ClassVar[tuple[str, ...]] = LYCORIS

    def change(self, config: Mapping[str, Any], path: str, parts: Mapping[str, Tensor], beside: Beside) -> Change:
        variant = variants[self.kind](
            rank=rank_of(config, path),
            alpha=alpha_of(config, path, "alpha"),
            rank_dropout=config.get("rank_dropout") or 0.0,
            module_dropout=config.get("module_dropout") or 0.0,
        )
        found = {name: parts[name] for name in ("A1", "B1", "A2", "B2")}
        for n in ("1", "2"):
            if f"T{n}" in parts:
                found[f"B{n}"], found[f"A{n}"] = tucker(parts[f"T{n}"], parts[f"B{n}"], parts[f"A{n}"])
        return Change(variant, found)

    def tensors(self, path: str, change: Change) -> dict[str, Tensor]:
        return dict(change.tensors)

    def config_of(self, changes: Mapping[str, Change]) -> dict[str, Any]:
        config = ranks_and_alphas(changes, "r", "alpha")
        first: Any = next(iter(changes.values())).variant
        fields.put(config, "rank_dropout", first.rank_dropout, 0.0)
        fields.put(config, "module_dropout", first.module_dropout, 0.0)
        return config

    def cannot_also(self, changes: Mapping[str, Change]) -> str | None:
        if any(t.ndim != 2 for c in changes.values() for t in c.tensors.values()):
            return "it has no stacks of weights"
        return None


GRAMMAR = LohaGrammar()
