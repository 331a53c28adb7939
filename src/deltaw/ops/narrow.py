"""Read in pieces: a tensor that is kept in 16 bit, widened block by block by the operation that reads it.

The backward of GELU needs z, dy and room for dz side by side, three tensors as wide as the widest layer: a step's peak.
Where z is kept in 16 bit (`ops/compact.py`), only a block of it need ever be wide,

    for each block b:  dz[b] = gelu'(float(z[b])) · dy[b]           the same numbers as from float(z), one tensor less,

and a block stays in the cache between the two passes. `Narrow` stands for z on that way, and for what a forward hands on
without reading it (`ops/recompute.py`). Operations without a loop below get it widened.

Where nothing but that backward will read z, the derivative is enough, and 8 bits hold its root (`keep_slope`):

    d = gelu'(z) in [-0.129, 1.129]      code = round(178 sign(d) √|d|) + 64, one byte      d̂ = u |u|, u = (code - 64) / 178

0 and 1 are exact; |d̂ - d| is at most √|d| / 178 + 1e-5, so small derivatives keep small errors: .006 at 1, .0006 at .01.
Where an adapted layer makes gelu(z) again, z is kept: 16 bits serve both, 16 and 8 beside each other would be more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten

LOOPS = {
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, "grad_input"),
    aten.silu_backward.default: (aten.silu_backward.grad_input, "grad_input"),
    aten.mul.Tensor: (aten.mul.out, "out"),
}
"""Elementwise operations that backward calls with a saved tensor, how they write into a given result, and its keyword."""

READERS = frozenset({"GeluBackward0", "SiluBackward0", "MulBackward0"})
"""The autograd nodes that call them."""

BLOCK = 1 << 17
"""Numbers of one block: 512 KiB in 32 bit."""


STEPS, ZERO = 178, 64
"""Of a derivative's code: steps from 0 to 1, and the code of 0."""


class Packed:
    """One storage in 16 bit, as flat `numbers`. `origin` is the 32-bit storage of these numbers, while it lives.

    saves: how many operations keep it. slopes: in their place, 8-bit codes of GELU's derivative at these numbers.
    """

    __slots__ = ("__weakref__", "numbers", "origin", "saves", "slopes")

    def __init__(self, numbers: Tensor, origin: StorageWeakRef) -> None:
        self.numbers: Tensor | None = numbers
        self.slopes: Tensor | None = None
        self.origin = origin
        self.saves = 0

    @property
    def kept(self) -> Tensor:
        """The numbers or the codes."""
        found = self.numbers if self.slopes is None else self.slopes
        assert found is not None
        return found

    @property
    def whole(self) -> Tensor:
        """The numbers.

        Raises:
            RuntimeError: only GELU's derivative there was kept.
        """
        if self.numbers is None:
            raise RuntimeError(DERIVATIVE_ONLY)
        return self.numbers


class View(NamedTuple):
    """A pack with the shape, strides and offset of the tensor that was saved."""

    packed: Packed
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def widened(self) -> Tensor:
        """The tensor again, in 32 bit; raises as `Packed.whole`."""
        return self.packed.whole.float().as_strided(self.shape, self.stride, self.offset)


class Narrow(Tensor):
    """A tensor of 32 bit for whoever asks, of which there is only `view_of` until an operation reads it."""

    view_of: View

    @staticmethod
    def __new__(cls, view: View) -> Narrow:
        made: Narrow = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, view.shape, view.stride, view.offset, dtype=torch.float32, device=view.packed.kept.device
        )
        made.view_of = view
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if op is aten.detach.default:
            return cls(args[0].view_of)
        if op is aten.gelu_backward.default and isinstance(args[1], cls) and args[1].view_of.packed.slopes is not None:
            return _times_slope(args[0], args[1])
        if op in LOOPS and len(args) == 2 and all(_in_order(t, args[0].shape) for t in args):
            return _in_blocks(*LOOPS[op], *args, **kwargs)
        args, kwargs = tree_map_only(cls, lambda t: t.view_of.widened(), (args, kwargs))
        return op(*args, **kwargs)


def reads_in_blocks() -> bool:
    """Whether the autograd node that runs in this thread is one of `READERS`; or none is, and nobody reads yet."""
    node = torch._C._current_autograd_node()
    return node is None or node.name() in READERS


def _in_order(t: Any, shape: torch.Size) -> bool:
    """Whether `t` is a tensor of this shape whose blocks are pieces of memory, on a processor that a block is made for."""
    plain = isinstance(t, Tensor) and t.dtype == torch.float32 and t.device.type == "cpu"
    return plain and t.shape == shape and t.is_contiguous()


def _in_blocks(op: Any, into: str, one: Tensor, other: Tensor, **options: Any) -> Tensor:
    """op(one, other), elementwise, with at most a block of what is narrow in 32 bit."""
    result = torch.empty(one.shape, dtype=torch.float32, device=one.device)
    flat = [t.view_of.packed.whole if isinstance(t, Narrow) else t.reshape(-1) for t in (one, other, result)]
    for a, b, out in zip(*(torch.split(t, BLOCK) for t in flat), strict=True):
        op(a.float(), b.float(), **options, **{into: out})
    return result


def keep_slope(x: Tensor) -> None:
    """If x = gelu(z), and z is kept in 16 bit for nobody but GELU's backward, keep gelu'(z) in 8 bit instead.

    Not where a z is infinite or NaN: codes have no word for that.
    """
    node: Any = x.grad_fn
    if node is None or node.name() != "GeluBackward0":
        return
    view = node._raw_saved_self.data
    if not isinstance(view, View) or view.packed.saves > 1 or view.packed.numbers is None:
        return
    packed = view.packed
    codes = torch.empty_like(view.packed.numbers, dtype=torch.uint8)
    for z, code in zip(torch.split(view.packed.numbers, BLOCK), torch.split(codes, BLOCK), strict=True):
        one = z.new_ones((), dtype=torch.float32).expand(z.shape)
        slope = aten.gelu_backward(one, z.float(), approximate=node._saved_approximate)
        root = slope.abs().sqrt_().copysign_(slope)
        if not math.isfinite(root.sum().item()):
            return
        code.copy_(root.mul_(STEPS).add_(ZERO).round_())
    packed.numbers, packed.slopes = None, codes


def _times_slope(dy: Tensor, z: Narrow) -> Tensor:
    """gelu'(z) · dy, from the derivative's codes.

    Raises:
        RuntimeError: the result is to be differentiated again, which takes z.
    """
    view = z.view_of
    codes = view.packed.kept
    if torch.is_grad_enabled():
        raise RuntimeError(DERIVATIVE_ONLY)
    if not all(_in_order(t, view.shape) for t in (dy, z)):
        return dy * _slope(codes).as_strided(view.shape, view.stride, view.offset)
    result = torch.empty_like(dy)
    for code, part, out in zip(*(torch.split(t, BLOCK) for t in (codes, dy.view(-1), result.view(-1))), strict=True):
        torch.mul(_slope(code), part, out=out)
    return result


def _slope(codes: Tensor) -> Tensor:
    """The derivatives that codes stand for."""
    root = codes.float().sub_(ZERO).div_(STEPS)
    return root.abs().mul_(root)


DERIVATIVE_ONLY = (
    "GELU's input was not kept, only its derivative (in 8 bit: the layer behind it is frozen, and saves are compact). A "
    "second derivative, or whoever else reads the input, needs it: run the forward outside of `compact`"
)
