"""Not saving x: where x is the output of an operation that keeps its own input for backward, x is made again from that.

∂A = uᵀ x needs x, so every LoRA layer keeps its input alive: next to what GELU, SiLU·up and LayerNorm keep for their
own backward that is a second copy of the same information, and most of what LoRA saves. So instead of x the adapted
linear keeps what x's producer keeps already, and makes x again, one elementwise pass beside a matrix product.

    GELU, SiLU     x = f(z)
    product        x = a · b                      where both are kept: the gate of a SwiGLU
    RMSNorm        x = γ · (z · rstd)             where γ is frozen, so that nobody keeps z · rstd
    attention      x = o, heads side by side       where that was a copy
    LayerNorm      x = (z - mean) rstd γ + β

A compiled sweep (cpu_thin.py) makes each tile of x when it comes to it, in the cache, so that x is in memory nowhere; its
functions are torch's to a rounding or two. Elsewhere x is made whole, by torch's operations and to the bit (LayerNorm: to a
rounding or two, as the kernel's order of operations is its own), and layers that read the same x (q, k, v) share it, held
from the first of their backwards to the last. Under `create_graph=True` it is made by operations that can be differentiated.

Left alone: graphs under saved-tensor hooks (checkpointing, offloading; not compact.py's), compilers (they decide themselves),
small inputs, and an x that was written to since its producer made it, under `no_grad` too. (Not seen: such a write to the
inner product of γ · (a · b), and any write that PyTorch does not count, through `.data` or NumPy.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.ops.compact import are_compact, hooks_in_force
from deltaw.ops.cpu_thin import Made
from deltaw.ops.narrow import Narrow

WORTH = 1 << 14
"""Below so many numbers x is simply kept."""

KEY = "deltaw.recipe"

Maker = Callable[..., Tensor]
Describer = Callable[..., Made | None]


class Recipe:
    """How x is made again from `tensors`; shared by all layers that read the same x.

    make: by torch's operations, whole. describe: what a sweep makes it of, a tile at a time, if it can.
    """

    def __init__(self, make: Maker, describe: Describer, shape: torch.Size) -> None:
        self.make = make
        self.describe = describe
        self.shape = shape
        self.readers = 0
        self.left = 0
        self.made: Tensor | None = None

    def take(self, tensors: Sequence[Tensor]) -> Tensor:
        """x, made by the first reader, forgotten after the last; with a graph where one is asked for (twice.py)."""
        made = self.made
        if made is None:
            self.left = self.readers
        if made is None or (torch.is_grad_enabled() and not made.requires_grad):
            made = self.make(*tensors).view(self.shape)
        self.left -= 1
        self.made = made if self.left > 0 else None
        return made

    def tiles(self, tensors: Sequence[Tensor]) -> Made | None:
        """x as a sweep makes it for one reader, if nobody has made it whole."""
        return self.describe(*tensors) if self.made is None else None

    def pass_by(self) -> None:
        """One reader less has need of `take`."""
        self.readers -= 1


def recipe_of(x: Tensor) -> tuple[Recipe, tuple[Tensor, ...]] | None:
    """The recipe for x and the tensors it needs, all of them kept by x's producer anyway; None where x is to be kept."""
    if torch.compiler.is_compiling() or x.numel() < WORTH or not torch.is_grad_enabled():
        return None
    node: Any = x.grad_fn
    known = None if node is None else PRODUCERS.get(node.name())
    if known is None or x._version:
        return None
    hooks = hooks_in_force()
    if hooks is not None and not are_compact(hooks):  # they may count on being asked for x
        return None
    try:
        found = known(node)
    except RuntimeError:  # written to, or freed: the producer's own backward will say so
        return None
    if found is None:
        return None
    tensors, make, describe = found
    recipe = node.metadata.setdefault(KEY, Recipe(make, describe, x.shape))
    recipe.readers += 1
    return recipe, tensors


Found = tuple[tuple[Tensor, ...], Maker, Describer] | None


def rows_of(z: Tensor) -> Tensor | None:
    """z as (T, k), if that is a view."""
    return z.view(-1, z.shape[-1]) if z.is_contiguous() else None


def gelu(node: Any) -> Found:
    """x = gelu(z), where z is kept and not only the derivative there."""
    z, approximate = node._saved_self, node._saved_approximate
    if isinstance(z, Narrow) and z.view_of.packed.slopes is not None:
        return None
    function = "gelu" if approximate == "none" else "gelu tanh"
    return (z,), lambda z: F.gelu(z, approximate=approximate), lambda z: described(z, function=function)


def silu(node: Any) -> Found:
    """x = silu(z)."""
    return (node._saved_self,), F.silu, lambda z: described(z, function="silu")


def product(node: Any) -> Found:
    """x = a · b, if the producer keeps both; x = γ · (a · b), if it keeps γ and the producer of the product both."""
    a, b = node._saved_self, node._saved_other
    if a is not None and b is not None:
        return (a, b), torch.mul, multiplied
    gamma = b if a is None else a
    inner = node.next_functions[0 if a is None else 1][0]
    if gamma is None or inner is None or inner.name() != "MulBackward0":
        return None
    a, b = inner._saved_self, inner._saved_other
    if a is None or b is None:
        return None
    return (a, b, gamma), lambda a, b, gamma: gamma * (a * b), multiplied


def multiplied(a: Tensor, b: Tensor, gamma: Tensor | None = None) -> Made | None:
    """γ · (a · b), where one of a and b may have a single number for each row, and γ has one for each column."""
    if a.numel() < b.numel():
        a, b = b, a
    if gamma is not None and gamma.shape != a.shape[-1:]:
        return None
    if a.shape == b.shape:
        return described(a, by=rows_of(b), gain=gamma) if b.is_contiguous() else None
    if b.shape == (*a.shape[:-1], 1):
        return described(a, rstd=b, gain=gamma)
    return None


def described(z: Tensor, **rest: Any) -> Made | None:
    """`Made` of z (..., k), if its rows lie one behind the other."""
    rows = rows_of(z)
    return None if rows is None else Made(rows, **rest)


def layer_norm(node: Any) -> Found:
    """x = (z - mean) rstd γ + β; mean and rstd have one entry per row."""
    affine = {"gamma": node._saved_weight, "beta": node._saved_bias}
    names = [name for name, t in affine.items() if t is not None]
    tensors = (node._saved_input, node._saved_result1, node._saved_result2, *(affine[name] for name in names))
    last = tuple(range(-len(node._saved_normalized_shape), 0))

    def make(z: Tensor, mean: Tensor, rstd: Tensor, *given: Tensor) -> Tensor:
        known = dict(zip(names, given, strict=True))
        if torch.is_grad_enabled():  # to be differentiated (twice.py): mean and rstd = 1 / sqrt(variance + eps) are z's
            variance, mean = torch.var_mean(z.to(mean.dtype), last, correction=0, keepdim=True)
            eps = (rstd**-2 - variance).detach()
            x = (z - mean) * (variance + eps).rsqrt() * known.get("gamma", 1) + known.get("beta", 0)
            return x.to(z.dtype)
        gamma, beta = known.get("gamma"), known.get("beta")
        z = z.contiguous()  # as x was, whatever the order of z: its readers take x's rows
        wide = torch.addcmul(-mean * rstd, z, rstd)
        if gamma is not None and beta is not None:
            wide = torch.addcmul(beta, wide, gamma, out=wide)
        elif gamma is not None:
            wide.mul_(gamma)
        elif beta is not None:
            wide.add_(beta)
        return wide.to(z.dtype)

    def describe(z: Tensor, mean: Tensor, rstd: Tensor, *given: Tensor) -> Made | None:
        known = dict(zip(names, given, strict=True))
        return described(z, mean=mean, rstd=rstd, gain=known.get("gamma"), shift=known.get("beta"))

    return tensors, make, describe if len(last) == 1 else lambda *_: None


def attention(node: Any) -> Found:
    """x = o.transpose(1, 2).contiguous().reshape(B, T, -1), if that copied attention's output o, which attention keeps.

    `node` is the reshape's. Between o and the transposition transformers puts a reshape that changes nothing.
    """
    inside = tuple(int(n) for n in node._saved_self_sym_sizes)  # (B, T, H, D)
    for name in ("CloneBackward0", "TransposeBackward0"):
        node = node.next_functions[0][0]
        if node is None or node.name() != name:
            return None
    if (node._saved_dim0, node._saved_dim1) != (1, 2):
        return None
    node = node.next_functions[0][0]
    if node is not None and node.name() in VIEWS:
        node = node.next_functions[0][0]
    if node is None or node.name() != "ScaledDotProductFlashAttentionForCpuBackward0":
        return None
    output: Tensor = node._saved_output
    B, H, T, D = output.shape
    if inside != (B, T, H, D):  # a reshape that did change something
        return None
    return (output,), lambda o: o.transpose(1, 2).contiguous(), lambda o: Made(o)


VIEWS = ("ViewBackward0", "UnsafeViewBackward0")

PRODUCERS: dict[str, Callable[[Any], Found]] = {
    "GeluBackward0": gelu,
    "SiluBackward0": silu,
    "MulBackward0": product,
    "NativeLayerNormBackward0": layer_norm,
    **dict.fromkeys(VIEWS, attention),
}
