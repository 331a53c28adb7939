"""loralib: a state dict with `<path>.lora_A` (r, in) and `<path>.lora_B` (out, r), and no config: alpha must be given.

A MergedLinear has A (r·n, in) and B (out/len·n, r) for its n enabled parts of `len`: as a low-rank change of the whole
weight, block by block. With one part its factors look like a Linear's: flags with one `true` make MergedLinears of all
of these but those that fill the base's weight. A convolution has A (r·k, in·k) and B (out/groups·k, r·k), whose product is
only reshaped into the kernel and so is kept as a dense change; that takes the base's shapes to see. loralib saves
pickles, which are not read: save the state dict as safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter, Change
from deltaw.core.registry import variants
from deltaw.errors import AdapterError
from deltaw.io.formats import format as shared
from deltaw.io.formats.format import Format, Hints

ALPHA = "lora_alpha"


class Loralib(Format):
    """microsoft/LoRA state dicts, as safetensors."""

    name: ClassVar[str] = "loralib"
    suffix: ClassVar[str] = ".safetensors"

    def recognises(self, path: Path) -> bool:
        return any(n.endswith(".lora_A") for n in shared.names_in(path))

    def read(self, path: Path, hints: Hints) -> Adapter:
        tensors, metadata = shared.open_tensors(path)
        alpha = hints.alpha if hints.alpha is not None else _number(metadata.get(ALPHA))
        if alpha is None:
            raise AdapterError("loralib files do not hold alpha: give the one that was trained with (--alpha)")
        paths = {n.removesuffix(".lora_A") for n in tensors if n.endswith(".lora_A")}
        odd = [n for n in tensors if not n.endswith((".lora_A", ".lora_B")) or n[: -len(".lora_A")] not in paths]
        if odd:
            raise AdapterError(f"{odd[0]!r} is no half of a pair .lora_A and .lora_B")
        changes = {}
        for module in sorted(paths):
            if f"{module}.lora_B" not in tensors:
                raise AdapterError(f"{module!r}: lora_B is missing")
            A, B = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
            shape = None if hints.shapes is None else hints.shapes.get(f"{module}.weight")
            changes[f"{module}.weight"] = change_of(module, A, B, alpha, shape, hints.enabled)
        return Adapter(changes)

    def cannot(self, adapter: Adapter) -> str | None:
        reason = shared.only(adapter, ("lora",), (*shared.LINEAR, "embedding"))
        if reason is None and any(not k.endswith(".weight") for k in adapter.changes):
            reason = "the format changes weights of modules only"
        return reason

    def write(self, adapter: Adapter, path: Path, hints: Hints) -> None:
        alphas = {c.variant.scale * c.variant.rank for c in adapter.changes.values()}  # type: ignore[attr-defined]
        alpha = alphas.pop() if len(alphas) == 1 else None
        tensors: dict[str, Tensor] = {}
        one = max(c.variant.rank for c in adapter.changes.values())  # type: ignore[attr-defined]
        for key, change in adapter.changes.items():
            module, v = shared.module_of(key), change.variant
            B = change.tensors["B"]
            if alpha is None:  # one alpha for all: the rest of each scale goes into B
                B = (B.double() * (v.scale * v.rank / one)).to(B.dtype)  # type: ignore[attr-defined]
            tensors |= {f"{module}.lora_A": change.tensors["A"], f"{module}.lora_B": B}
        with path.open("wb") as stream:
            shared.write_tensors(stream, tensors, {"format": "pt", ALPHA: repr(float(one if alpha is None else alpha))})


def change_of(
    module: str, A: Tensor, B: Tensor, alpha: float, shape: tuple[int, ...] | None, enabled: tuple[bool, ...] | None
) -> Change:
    """The change of one module.

    Raises:
        AdapterError: shapes that are none of loralib's layers'.
    """
    if A.ndim != 2 or B.ndim != 2:
        raise AdapterError(f"{module!r}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} must be matrices")
    if shape is not None and len(shape) > 2:
        rank = A.shape[0] // shape[-1]
        if B.shape[1] != A.shape[0] or B.shape[0] * A.shape[1] != torch.Size(shape).numel():
            raise AdapterError(f"{module!r}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not fill {shape}")
        dense = ((B.double() @ A.double()) * (alpha / rank)).to(A.dtype).reshape(shape)
        return Change(variants["diff"](), {"diff": dense}, None, shape)
    fills = shape is not None and shape[0] == B.shape[0]
    if B.shape[1] == A.shape[0] and (fills or sum(enabled or ()) != 1):
        return shared.lora(A, B, alpha)
    rank = B.shape[1]
    parts = A.shape[0] // rank
    if A.shape[0] % rank or B.shape[0] % parts:
        raise AdapterError(f"{module!r}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not fit together")
    flags = enabled or ((True,) * parts if fills else None)
    if flags is None or sum(flags) != parts:
        raise AdapterError(
            f"{module!r} is a MergedLinear with {parts} adapted parts: say which (--enabled true,false,true)"
        )
    size = B.shape[0] // parts
    wide = torch.zeros(size * len(flags), rank * parts, dtype=B.dtype)
    for n, place in enumerate(i for i, on in enumerate(flags) if on):
        wide[place * size : (place + 1) * size, n * rank : (n + 1) * rank] = B[n * size : (n + 1) * size]
    return shared.lora(A, wide, alpha * parts)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


FORMAT = Loralib()
