"""`peft_type: "ADALORA"`: `lora_E` is (r, 1); scale alpha / (init_r + 1e-5), whatever directions were cut.

PEFT leaves out cut directions in the file (`rank_pattern` says which); they come back here as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaw.core.adapter import Change
from deltaw.core.registry import variants
from deltaw.errors import AdapterError
from deltaw.io.peft import config as fields
from deltaw.io.peft.per_module import Beside, PerModule, alpha_value

SCHEDULE = {
    "target_r": "target",
    "total_step": "total",
    "tinit": "warmup",
    "tfinal": "settle",
    "deltaT": "every",
    "beta1": "smooth",
    "beta2": "smooth_spread",
    "orth_reg_weight": "orthogonality",
    "lora_dropout": "dropout",
}


class AdaloraGrammar(PerModule):
    """AdaLoRA."""

    peft_type: ClassVar[str] = "ADALORA"
    kind: ClassVar[str] = "adalora"
    cuts: ClassVar[bool] = True
    suffixes: ClassVar[Mapping[str, str]] = {"lora_A": "A", "lora_B": "B", "lora_E": "E"}
    unsupported: ClassVar[Mapping[str, str]] = {"use_dora": "DoRA with AdaLoRA", "use_rslora": "rsLoRA with AdaLoRA"}

    def change(self, config: Mapping[str, Any], path: str, parts: Mapping[str, Tensor], beside: Beside) -> Change:
        rank = int(config.get("init_r", 12))
        alpha = config.get("lora_alpha", 8)
        known = {ours: config[theirs] for theirs, ours in SCHEDULE.items() if config.get(theirs) is not None}
        known = {k: v for k, v in known.items() if k not in ("total", "warmup", "settle")}
        known["target"] = min(int(known.get("target", 8)), rank)
        variant = variants[self.kind](rank=rank, alpha=alpha if alpha > 0 else float(rank), **known)
        A, B, E = parts["A"], parts["B"], parts["E"].reshape(-1)
        kept = _kept(config.get("rank_pattern") or {}, path, rank, A.shape[0])
        if not (A.shape[0] == B.shape[1] == len(E) == int(kept.sum())):
            raise AdapterError(
                f"A {tuple(A.shape)}, B {tuple(B.shape)}, E {tuple(E.shape)}: not {int(kept.sum())} directions"
            )
        if A.shape[0] < rank:
            A, B, E = _spread(A, kept, 0), _spread(B, kept, 1), _spread(E, kept, 0)
        return Change(variant, {"A": A, "B": B, "E": E.contiguous()})

    def tensors(self, path: str, change: Change) -> dict[str, Tensor]:
        return {"A": change.tensors["A"], "B": change.tensors["B"], "E": change.tensors["E"][:, None]}

    def config_of(self, changes: Mapping[str, Change]) -> dict[str, Any]:
        v: Any = next(iter(changes.values())).variant
        config = {"init_r": v.rank, "lora_alpha": alpha_value(v), "target_r": v.target}
        total = v.total or v.warmup + v.settle + 1
        config |= {
            "total_step": total,
            "tinit": v.warmup,
            "tfinal": v.settle,
        }  # PEFT refuses a config without a schedule
        fields.put(config, "lora_dropout", v.dropout, 0.0)
        return config

    def cannot_also(self, changes: Mapping[str, Change]) -> str | None:
        every: list[Any] = [c.variant for c in changes.values()]
        if len({(v.rank, v.scale) for v in every}) > 1:
            return "one file has one rank and one scale"
        return None


def _kept(patterns: Mapping[str, Any], path: str, rank: int, found: int) -> Tensor:
    """Which of `rank` directions the file has for this module, as booleans (rank,)."""
    hits = [v for k, v in patterns.items() if k.removeprefix("base_model.model.").removesuffix(".lora_E") == path]
    if not hits:
        return torch.ones(rank, dtype=torch.bool)
    if isinstance(hits[0], list) and len(hits[0]) == rank and all(isinstance(v, bool) for v in hits[0]):
        return torch.tensor(hits[0])
    if type(hits[0]) is int and 0 <= hits[0] <= rank:
        return torch.arange(rank) < hits[0]
    raise AdapterError(
        f"rank_pattern says {str(hits[0])[:60]} for {path!r}, which is no choice of {rank} directions ({found} in the file)"
    )


def _spread(tensor: Tensor, kept: Tensor, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = len(kept)
    return torch.zeros(shape, dtype=tensor.dtype).index_copy(dim, kept.nonzero().reshape(-1), tensor)


GRAMMAR = AdaloraGrammar()
