"""`peft_type: "IA3"`: `ia3_l` is (out, 1), or (1, in) for the modules that `feedforward_modules` names, whose input it scales.

Of a convolution it is (1, channels, 1, 1) in both cases. Its matrix is (out, in · kernel), so that each input's factor stands
there once for every place in the kernel, whose size only the base tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from deltaw.core.adapter import Change
from deltaw.core.registry import variants
from deltaw.errors import AdapterError
from deltaw.io.pattern import pattern
from deltaw.io.peft.claims import names
from deltaw.io.peft.per_module import CONVOLUTIONS, Beside, PerModule


class Ia3Grammar(PerModule):
    """IA3."""

    peft_type: ClassVar[str] = "IA3"
    kind: ClassVar[str] = "ia3"
    suffixes: ClassVar[Mapping[str, str]] = {"ia3_l": "l"}
    layers: ClassVar[tuple[str, ...]] = (*PerModule.layers, "conv2d", "conv3d")

    def change(self, config: Mapping[str, Any], path: str, parts: Mapping[str, Tensor], beside: Beside) -> Change:
        wanted = names(config, "feedforward_modules")
        if isinstance(wanted, str):
            inner = pattern(wanted).fullmatch(path)
        else:
            inner = any(path.endswith(name) for name in wanted or ())
        l = parts["l"]
        convolution = l.ndim > 2
        shape = (1, l.numel(), *[1] * (l.ndim - 2)) if convolution or inner else (l.numel(), 1)
        if l.shape != shape:
            raise AdapterError(f"ia3_l has shape {tuple(l.shape)}; expected {'(1, in)' if inner else '(out, 1)'}")
        variant = variants[self.kind](of="input" if inner else "output")
        if not convolution:
            return Change(variant, {"l": l.reshape(-1)})
        base = beside.shapes.get(f"{path}.weight")
        if not inner:
            return Change(variant, {"l": l.reshape(-1)}, f"conv{len(shape) - 2}d", base)
        if base is None:
            raise AdapterError(
                "it scales the inputs of a convolution, whose kernel only the model can tell: load it onto the model "
                "(dw.load) and save it from there"
            )
        if base[1] != l.numel():
            raise AdapterError(
                f"it scales {l.numel()} inputs, and the convolution's weight {base} has {base[1]} (of each group): train it "
                f"again here"
            )
        places = l.reshape(-1).repeat_interleave(math.prod(base[2:]))
        return Change(variant, {"l": places}, f"conv{len(shape) - 2}d", base)

    def tensors(self, path: str, change: Change) -> dict[str, Tensor]:
        l = change.tensors["l"]
        if change.layer in CONVOLUTIONS:
            return {"l": channels(change)[:, 0].reshape(1, -1, *[1] * int(change.layer[4]))}
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
        for path in inner:
            change = changes[path]
            if change.layer in CONVOLUTIONS and not whole_channels(change):
                return f"it scales whole channels, and the inputs of {path!r} are scaled place by place of the kernel"
        return None


def channels(change: Change) -> Tensor:
    """l of a convolution as (channels, kernel), or (channels, 1) for the outputs."""
    l = change.tensors["l"]
    return l.reshape(change.shape[1] if change.variant.of == "input" and change.shape else len(l), -1)  # type: ignore[attr-defined]


def whole_channels(change: Change) -> bool:
    """Whether the factors of a convolution's inputs are the same in the whole kernel."""
    return change.shape is not None and bool((channels(change) == channels(change)[:, :1]).all())


GRAMMAR = Ia3Grammar()
