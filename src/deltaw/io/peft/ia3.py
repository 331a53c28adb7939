"""`peft_type: "IA3"`: `ia3_l` is (out, 1), or (1, in) for the modules that `feedforward_modules` names, whose input it scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from deltaw.core.adapter import Change
from deltaw.core.registry import variants
from deltaw.errors import AdapterError
from deltaw.io.pattern import pattern
from deltaw.io.peft.claims import names
from deltaw.io.peft.per_module import PerModule


class Ia3Grammar(PerModule):
    """IA3."""

    peft_type: ClassVar[str] = "IA3"
    kind: ClassVar[str] = "ia3"
    suffixes: ClassVar[Mapping[str, str]] = {"ia3_l": "l"}

    def change(self, config: Mapping[str, Any], path: str, parts: Mapping[str, Tensor]) -> Change:
        wanted = names(config, "feedforward_modules")
        if isinstance(wanted, str):
            inner = pattern(wanted).fullmatch(path)
        else:
            inner = any(path.endswith(name) for name in wanted or ())
        l = parts["l"]
        if l.ndim > 2 and not inner and l.shape[1] == l.numel():
            l = l.reshape(-1, 1)  # a convolution's (1, out, 1, 1)
        if l.ndim != 2 or l.shape[0 if inner else 1] != 1:
            raise AdapterError(f"ia3_l has shape {tuple(l.shape)}; expected {'(1, in)' if inner else '(out, 1)'}")
        return Change(variants[self.kind](of="input" if inner else "output"), {"l": l.reshape(-1)})

    def tensors(self, path: str, change: Change) -> dict[str, Tensor]:
        l = change.tensors["l"]
        return {"l": l[None, :] if change.variant.of == "input" else l[:, None]}  # type: ignore[attr-defined]

    def config_of(self, changes: Mapping[str, Change]) -> dict[str, Any]:
        inner = sorted(p for p, c in changes.items() if c.variant.of == "input")  # type: ignore[attr-defined]
        return {"feedforward_modules": inner}

    def cannot_also(self, changes: Mapping[str, Change]) -> str | None:
        inner = [p for p, c in changes.items() if c.variant.of == "input"]  # type: ignore[attr-defined]
        for path in changes:
            if path not in inner and any(path.endswith(p) for p in inner):
                return f"PEFT would take {path!r} for a feedforward module, since its path ends like one"
        if any(c.tensors["l"].ndim != 1 for c in changes.values()):
            return "it has no stacks of weights"
        return None


GRAMMAR = Ia3Grammar()
