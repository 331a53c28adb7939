"""Compact saves: what a forward keeps for its backward is kept in 16 bit, a half of the activations' memory.

Every 32-bit tensor that autograd saves inside `with compact(model):` is kept as bfloat16 and widened again when backward
asks for it (block by block where that can be, `ops/narrow.py`). The forward and its loss are untouched to the bit, and so
are the gradients' own sums; only the activations that gradients are made of carry one rounding to 8 bits (relative 2⁻⁹
each, as in training in bfloat16, but the products stay in 32 bit). The gradient of a tensor is off by that order,
relative to its size.

Kept as they are: weights and buffers of the model (they are kept anyway), views of a part of a larger tensor, tensors of
other classes, and small tensors, which hold statistics that an exponential follows (attention's log-sum-exp) or a
variance, and cost no memory.

A tensor that several operations save is packed once: packs are found by the storage they were made from, which a weak
reference proves to be still the same.

Of GELU's input only the derivative is kept, in 8 bit, where a frozen layer reads GELU's output: off by .006 at most, where
it is small by less (`narrow.keep_slope`). Second derivatives of such a GELU are an error.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from deltaw.ops.narrow import Narrow, Packed, View, keep_slope, reads_in_blocks

SMALL = 1 << 12
"""Fewer numbers than this are kept as they are ..."""

SHARE = 16
"""... and so are tensors of less than one such part of the largest that this forward has saved (statistics per row)."""


class Compact:
    """The pair of saved-tensor hooks of one `with compact(model):`."""

    def __init__(self, known: set[int]) -> None:
        self.known = known
        self.largest = 0
        self.packs: weakref.WeakValueDictionary[tuple[int, int], Packed] = weakref.WeakValueDictionary()

    def pack(self, saved: Tensor) -> Tensor | View:
        """What is kept of `saved`."""
        if isinstance(saved, Narrow):  # read in forward (recompute.py), to be saved once more
            saved.view_of.packed.saves += 1
            return saved.view_of
        storage = saved.untyped_storage()
        whole = storage.nbytes() == 4 * saved.numel()
        if (
            saved.dtype != torch.float32
            or saved.layout != torch.strided
            or type(saved) is not Tensor
            or not whole
            or storage._cdata in self.known
            or torch.compiler.is_compiling()
        ):
            return saved
        self.largest = max(self.largest, saved.numel())
        if saved.numel() < max(SMALL, self.largest // SHARE):
            return saved
        key = storage._cdata, saved._version
        found = self.packs.get(key)
        if found is None or found.numbers is None or found.origin.expired():  # type: ignore[no-untyped-call]
            flat = saved.detach().as_strided((saved.numel(),), (1,), 0)
            found = self.packs[key] = Packed(flat.to(torch.bfloat16), StorageWeakRef(storage))  # type: ignore[no-untyped-call]
        found.saves += 1
        return View(found, saved.shape, saved.stride(), int(saved.storage_offset()))

    def unpack(self, kept: Tensor | View) -> Tensor:
        """The tensor again, in 32 bit."""
        if isinstance(kept, Tensor):
            return kept
        return Narrow(kept) if kept.packed.numbers is None or reads_in_blocks() else kept.widened()


class compact:
    """`with compact(model): loss = model(...)`: what the forward keeps for backward is kept in 16 bit.

    Around the forward only; `loss.backward()` may come after it. Nests with checkpointing, whose own choice of what to
    keep wins inside of it. Not seen by compiled regions, which decide themselves what they keep.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.entered: list[ExitStack] = []

    def __enter__(self) -> None:
        known = {t.untyped_storage()._cdata for t in (*self.model.parameters(), *self.model.buffers())}
        both = Compact(known)
        with ExitStack() as undo:  # undone at once, should something go wrong in between
            for layer in self.model.modules():
                if frozen_leaf(layer):
                    undo.callback(layer.register_forward_pre_hook(before_frozen).remove)
            undo.enter_context(torch.autograd.graph.saved_tensors_hooks(both.pack, both.unpack))
            self.entered.append(undo.pop_all())

    def __exit__(self, *error: object) -> None:
        self.entered.pop().close()


def frozen_leaf(layer: nn.Module) -> bool:
    """Whether a layer has weights of its own, all frozen, and no layers inside: its backward does not read its input."""
    own = layer._parameters.values()
    if isinstance(layer, torch.jit.ScriptModule) or layer._modules or not own:
        return False
    return not any(p is not None and p.requires_grad for p in own)


def before_frozen(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """What a frozen layer is given is not made again by it."""
    if not torch.compiler.is_compiling() and are_compact(hooks_in_force()):
        for x in inputs:
            if isinstance(x, Tensor):
                keep_slope(x)


def hooks_in_force() -> Any:
    """The pair of saved-tensor hooks that an operation meets now, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[attr-defined]


def are_compact(hooks: Any) -> bool:
    """Whether these hooks are `Compact`'s."""
    return hooks is not None and isinstance(getattr(hooks[0], "__self__", None), Compact)


def is_kept_wide(activations: Tensor) -> bool:
    """Whether backward will see `activations` in 32 bit or more."""
    return activations.dtype in (torch.float32, torch.float64) and not are_compact(hooks_in_force())


def as_saved(activations: Tensor) -> Tensor:
    """What an operation saves of small activations, which `Compact` would take for statistics: 16 bit where it is in force."""
    narrow = activations.dtype == torch.float32 and not torch.compiler.is_compiling() and are_compact(hooks_in_force())
    return activations.bfloat16() if narrow else activations
