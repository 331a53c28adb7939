"""Not saving x: where x is the output of an operation that keeps its own input for backward, x is made again from that.

∂A = uᵀ x needs x, so every LoRA layer keeps its input alive: next to what GELU, SiLU·up and LayerNorm keep for their
own backward that is a second copy of the same information, and most of what LoRA saves. So instead of x the adapted
linear keeps what x's producer keeps already, and makes x again, one elementwise pass beside a matrix product.

    GELU, SiLU     x = f(z)                       to the bit
    product        x = a · b                      to the bit (where both are kept: the gate of a SwiGLU)
    RMSNorm        x = γ · (z · rstd)             to the bit (where γ is frozen, so that nobody keeps z · rstd)
    attention      x = o, heads side by side       to the bit (where that was a copy)
    LayerNorm      x = (z - mean) rstd γ + β      to a rounding or two: the kernel's order of operations is its own

Layers that read the same x (q, k, v) share one recomputation, held from the first of their backwards to the last. Under
`create_graph=True` it is made by operations that can be differentiated. Left
alone: graphs under saved-tensor hooks (checkpointing, offloading; not compact.py's), compilers (they decide themselves),
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
from deltaw.ops.cpu_thin import Sweep, takes
from deltaw.ops.narrow import Narrow
from deltaw.ops.terms import flat

WORTH = 1 << 14
"""Below so many numbers x is simply kept."""

KEY = "deltaw.recipe"

Maker = Callable[..., Tensor]


class Recipe:
    """How x is made again from `tensors`; shared by all layers that read the same x."""

    def __init__(self, make: Maker, shape: torch.Size) -> None:
        self.make = make
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
    tensors, make = found
    recipe = node.metadata.setdefault(KEY, Recipe(make, x.shape))
    recipe.readers += 1
    return recipe, tensors


Found = tuple[tuple[Tensor, ...], Maker] | None


def gelu(node: Any) -> Found:
    """x = gelu(z), where z is kept and not only the derivative there."""
    z, approximate = node._saved_self, node._saved_approximate
    if isinstance(z, Narrow) and z.view_of.packed.slopes is not None:
        return None
    return (z,), lambda z: F.gelu(z, approximate=approximate)


def silu(node: Any) -> Found:
    """x = silu(z)."""
    return (node._saved_self,), F.silu


def product(node: Any) -> Found:
    """x = a · b, if the producer keeps both; x = γ · (a · b), if it keeps γ and the producer of the product both."""
    a, b = node._saved_self, node._saved_other
    if a is not None and b is not None:
        return (a, b), torch.mul
    gamma = b if a is None else a
    inner = node.next_functions[0 if a is None else 1][0]
    if gamma is None or inner is None or inner.name() != "MulBackward0":
        return None
    a, b = inner._saved_self, inner._saved_other
    return None if a is None or b is None else ((gamma, a, b), lambda gamma, a, b: gamma * (a * b))


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
        if len(last) == 1 and takes(z, factors=(mean, rstd, gamma, beta)):
            return normalised(z, mean, rstd, gamma, beta)
        wide = torch.addcmul(-mean * rstd, z, rstd)
        if gamma is not None and beta is not None:
            wide = torch.addcmul(beta, wide, gamma, out=wide)
        elif gamma is not None:
            wide.mul_(gamma)
        elif beta is not None:
            wide.add_(beta)
        return wide.to(z.dtype)

    return tensors, make


def normalised(z: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """(z - mean) rstd γ + β in one pass: z's rows times rstd and γ, with a change of rank 1, -mean rstd times γ."""
    rows = flat(z)
    x, change = torch.empty_like(rows), (-mean * rstd).view(-1, 1)
    Bt = (rows.new_ones(rows.shape[1]) if gamma is None else gamma).unsqueeze(0)
    sweep = Sweep()
    sweep.expand_(x, change, Bt, 1.0, rowscale=rstd, gain=gamma, shift=beta, source=rows)
    sweep.run()
    return x


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
    return (output,), lambda o: o.transpose(1, 2).contiguous()


VIEWS = ("ViewBackward0", "UnsafeViewBackward0")

PRODUCERS: dict[str, Callable[[Any], Found]] = {
    "GeluBackward0": gelu,
    "SiluBackward0": silu,
    "MulBackward0": product,
    "NativeLayerNormBackward0": layer_norm,
    **dict.fromkeys(VIEWS, attention),
}
