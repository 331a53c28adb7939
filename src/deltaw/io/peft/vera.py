"""`peft_type: "VERA"`: two random matrices for the whole file, as large as the largest layer; each layer takes its corner.

deltaw's narrower layers may have their corner times a constant (their own Kaiming bound): d takes that constant.
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
from deltaw.io.peft.per_module import Beside, PerModule

NAMES = {"A": "base_model.vera_A", "B": "base_model.vera_B"}


class VeraGrammar(PerModule):
    """VeRA."""

    peft_type: ClassVar[str] = "VERA"
    kind: ClassVar[str] = "vera"
    suffixes: ClassVar[Mapping[str, str]] = {"vera_lambda_b": "b", "vera_lambda_d": "d"}

    def take_shared(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for part, name in NAMES.items():
            if name not in tensors:
                raise AdapterError(
                    f"the random matrix {part} is not in the file (save_projection was false): it depends on the "
                    f"generator of the machine that made it. Save it again from there with save_projection=True"
                )
        big = {name: tensors.pop(name) for name in NAMES.values()}
        if any(t.ndim != 2 for t in big.values()):
            raise AdapterError("vera_A and vera_B must be matrices")
        return big

    def change(self, config: Mapping[str, Any], path: str, parts: Mapping[str, Tensor], beside: Beside) -> Change:
        big_A, big_B = (beside.shared[NAMES[part]] for part in "AB")
        b, d = parts["b"], parts["d"]
        rank = int(config.get("r", 256))
        columns = width(beside.shapes.get(f"{path}.weight"), len(b) if b.ndim else 0)
        if b.ndim != 1 or d.ndim != 1 or len(b) > len(big_B) or len(d) != rank:
            raise AdapterError(
                f"b {tuple(b.shape)} and d {tuple(d.shape)} do not fit rank {rank} and B {tuple(big_B.shape)}"
            )
        variant = variants[self.kind](
            rank=rank,
            seed=int(config.get("projection_prng_key") or 0),
            d=float(config.get("d_initial") or 0.1),
            dropout=float(config.get("vera_dropout") or 0.0),
        )
        A = big_A if columns is None else big_A[:, :columns]
        return Change(variant, {"A": A, "B": big_B[: len(b)], "b": b, "d": d})

    def tensors(self, path: str, change: Change) -> dict[str, Tensor]:
        return {"b": change.tensors["b"], "d": change.tensors["d"]}

    def config_of(self, changes: Mapping[str, Change]) -> dict[str, Any]:
        v: Any = next(iter(changes.values())).variant
        config = {"r": v.rank, "projection_prng_key": v.seed, "save_projection": True}
        fields.put(config, "vera_dropout", v.dropout, 0.0)
        return config

    def shared(self, changes: Mapping[str, Change]) -> dict[str, Tensor]:
        widest = max(changes.values(), key=lambda c: c.tensors["A"].shape[1])
        tallest = max(changes.values(), key=lambda c: c.tensors["B"].shape[0])
        return {NAMES["A"]: widest.tensors["A"], NAMES["B"]: tallest.tensors["B"]}

    def cannot_also(self, changes: Mapping[str, Change]) -> str | None:
        if len({c.variant.rank for c in changes.values()}) > 1:  # type: ignore[attr-defined]
            return "one file has one rank"
        if any(c.tensors["b"].ndim != 1 for c in changes.values()):
            return "it has no stacks of weights"
        big = self.shared(changes)
        for path, change in changes.items():
            A, B = change.tensors["A"], change.tensors["B"]
            if not torch.equal(A, big[NAMES["A"]][:, : A.shape[1]]) or not torch.equal(
                B, big[NAMES["B"]][: B.shape[0]]
            ):
                return f"the random matrices of {path!r} are not a corner of the largest layer's"
        return None


def width(shape: tuple[int, ...] | None, rows: int) -> int | None:
    """The number of inputs of a weight with `rows` outputs, stored either way round; None if its shape is not known.

    The file does not say it: without the model, A keeps the width of the widest layer.
    """
    if shape is None or len(shape) != 2:
        return None
    return shape[1] if shape[0] == rows else shape[0]


GRAMMAR = VeraGrammar()
