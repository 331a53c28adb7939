"""Subclasses of Linear, Embedding and the convolutions with a forward of their own, which stays in charge.

How such a forward uses its weight decides how a change is added:
1. It only calls `super().forward` (Gemma's scaled embedding), as its code says and a trial shows: the host is mixed in
   beneath it, so that the adapted layer is what `super()` finds. Low-rank changes keep their fast way.
2. A Linear that multiplies by the weight itself (openai-whisper's casts it): low-rank terms are added to what it
   returns. Whether that is the same as the forward on W + ΔW (law 1) is tried out on a probe input.
3. Anything else runs on W + ΔW. A forward whose output does not depend on its weight is refused.

A trial is made once for all layers of a class with the same plain values (sizes, switches, factors).
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Hashable, Iterable
from types import CodeType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltaw.core.beside import own_class
from deltaw.core.host import Example, Host
from deltaw.core.registry import host
from deltaw.core.twin import shell
from deltaw.core.unread import FACTS, unread
from deltaw.core.variant import LowRank
from deltaw.layers.conv import ConvMatrix
from deltaw.layers.conv_transpose import ConvTransposeMatrix
from deltaw.layers.embedding import EmbeddingHost, EmbeddingMatrix
from deltaw.layers.linear import LinearHost, is_foreign
from deltaw.layers.output import OutputHost, added, dropped_input
from deltaw.layers.weight import WeightHost

Way = Literal["beneath", "added", "changed", "unused"]
PLAIN_VALUES = (bool, int, float, str, type(None))
CLOSE = 1e-3
"""A probe in 32 bit: relative difference above which two outputs are different functions."""


def own_forwards(kind: type[nn.Module], plain: type[nn.Module]) -> list[Any]:
    """The forwards that subclasses of `plain` put in front of its own."""
    above = kind.__mro__[: kind.__mro__.index(plain)]
    return [c.__dict__["forward"] for c in above if "forward" in c.__dict__ and not issubclass(c, Host)]


def way_of(layer: nn.Module, plain: type[nn.Module]) -> Way | None:
    """How a change of `layer`'s weight is to be applied; None if its forward is `plain`'s."""
    if type(layer) is plain or not isinstance(layer, plain):
        return None
    kind = layer.base_class if isinstance(layer, Host) else own_class(layer)
    if not own_forwards(kind, plain):
        return None
    alike = kind, plain, facts_of(layer)
    if alike not in _ways:
        _ways[alike] = found_way(layer, kind, plain)
    return _ways[alike]


_ways: dict[Hashable, Way] = {}


def facts_of(layer: nn.Module) -> Hashable:
    """What a forward may decide by which way it goes: the layer's plain values, and of what kind its parameters are."""
    values = [(n, v) for n, v in layer.__dict__.items() if isinstance(v, PLAIN_VALUES) and n != "training"]
    kinds = [(n, None if p is None else (p.dtype, p.is_meta)) for n, p in layer._parameters.items()]
    return frozenset(values), frozenset(kinds)


def found_way(layer: nn.Module, kind: type[nn.Module], plain: type[nn.Module]) -> Way:
    """`way_of` a layer of class `kind` with forwards in front of `plain`'s."""
    if all(only_super(f) for f in own_forwards(kind, plain)):
        return "beneath" if plain not in TRIED or leaves_weight(layer, kind, plain) else "changed"
    return probed(layer, kind) if plain is nn.Linear else "changed"


def only_super(forward: Any) -> bool:
    """Whether a function reaches the layer's parameters by `super()` alone, as far as its code tells."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return isinstance(code, CodeType) and "super" in names_in(code) and not reads_parameters(code)


def names_in(code: CodeType) -> set[str]:
    """The global names and attributes that a function uses, those inside it included."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*map(names_in, inner)) if inner else set(code.co_names)


def reads_parameters(code: CodeType) -> bool:
    """Whether a function reads values of `.weight` or `.bias` (not only their dtype, device or shape)."""
    steps = list(dis.get_instructions(code))
    for step, after in zip(steps, [*steps[1:], None]):
        if step.argval in ("weight", "bias") and "ATTR" in step.opname and (after is None or after.argval not in FACTS):
            return True
    return any(reads_parameters(c) for c in code.co_consts if isinstance(c, CodeType))


def leaves_weight(layer: nn.Module, kind: type[nn.Module], plain: type[nn.Module]) -> bool:
    """Whether the forwards in front of `plain`'s run, on a small input, without a value of the weight or the bias."""
    own = {n: p for n, p in layer._parameters.items() if p is not None and type(p) is nn.Parameter}
    weight = own.get("weight")
    if weight is None:
        return True  # packed or computed: nothing to watch

    below = at_rest(layer, plain, {})
    below.__dict__["max_norm"] = None  # nn.Embedding would write into its weight

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return plain.forward(below, *args, **kwargs)

    beneath = type(plain.__name__, (plain,), {"forward": forward})
    trial: type[nn.Module] = type(kind.__name__, (kind, beneath), {"__module__": kind.__module__})
    watched: dict[str, Tensor | None] = {n: unread(p) for n, p in own.items()}
    with torch.no_grad():
        try:
            trial.forward(at_rest(layer, trial, watched), TRIED[plain](weight))
        except Exception:  # it reads the weight, or takes other inputs: run it on W + ΔW, whatever they are
            return False
    return True


TRIED: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Linear: lambda weight: weight.new_ones(2, weight.shape[-1]),
    nn.Embedding: lambda weight: torch.zeros(1, 2, dtype=torch.long, device=weight.device),
}
"""Classes of which some host is mixed in beneath -> a small input for a layer with that weight."""


def probed(layer: nn.Module, kind: type[nn.Module]) -> Way:
    """What a Linear subclass makes of a changed weight: the output of W plus x δᵀ ("added"), another, or the same."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    right = weight is not None and weight.ndim == 2 and weight.is_floating_point() and not weight.is_meta
    size: Any = (layer.out_features, layer.in_features)
    if weight is None or not right or tuple(weight.shape) != size:
        return "added"  # a packed or absent weight cannot be probed; its forward is a product all the same
    with torch.no_grad():
        wide = weight.float()
        out, columns = weight.shape
        x = torch.sin(torch.arange(2.0 * columns, device=weight.device)).reshape(2, columns)
        typical = wide.abs().mean().clamp_min(1e-3)
        delta = typical * torch.outer(torch.cos(torch.arange(out, device=weight.device)), x[1])
        b = None if bias is None else bias.float()
        try:
            before = kind.forward(at_rest(layer, kind, {"weight": wide, "bias": b}), x)
            after = kind.forward(at_rest(layer, kind, {"weight": wide + delta, "bias": b}), x)
        except Exception:  # it takes other inputs: run it on W + ΔW, whatever they are
            return "changed"
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return "changed"
        if torch.equal(before, after):
            return "unused"
        expected = nn.functional.linear(x, delta)
        if before.shape != expected.shape:
            return "changed"
        found = after.float() - before.float()
        return "added" if float((found - expected).abs().max()) <= CLOSE * float(expected.abs().max()) else "changed"


def at_rest(layer: nn.Module, kind: type[nn.Module], tensors: dict[str, Tensor | None]) -> nn.Module:
    """A shell in evaluation mode."""
    twin = shell(layer, kind, tensors)
    twin.__dict__["training"] = False
    return twin


class OwnForwardHost(Host):
    """A subclass of a class in `adapts` with a forward of its own, which takes a change in one of the `ways`."""

    ways: ClassVar[tuple[Way, ...]]

    @classmethod
    def accepts_class(cls, kind: type[nn.Module]) -> bool:
        return any(issubclass(kind, plain) and own_forwards(kind, plain) for plain in cls.adapts)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return any(way_of(layer, plain) in cls.ways for plain in cls.adapts)


@host
class LinearBeneathHost(OwnForwardHost, LinearHost):
    """A subclass of nn.Linear whose own forward calls `super().forward`."""

    family: ClassVar[str] = "linear (beneath own forward)"
    beneath: ClassVar[bool] = True
    ways: ClassVar[tuple[Way, ...]] = ("beneath",)
    takes_forms: ClassVar[bool] = False  # the forward above may read the weight

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("scaled", lambda: ScaledLinear(7, 5), lambda dtype: (torch.randn(3, 7, dtype=dtype),))

    def listed_as(self) -> str:
        return LinearHost.family


@host
class EmbeddingBeneathHost(OwnForwardHost, EmbeddingHost):
    """A subclass of nn.Embedding whose own forward calls `super().forward`."""

    family: ClassVar[str] = "embedding (beneath own forward)"
    beneath: ClassVar[bool] = True
    ways: ClassVar[tuple[Way, ...]] = ("beneath",)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("scaled", lambda: ScaledEmbedding(9, 4), lambda dtype: (torch.tensor([[1, 8], [0, 1]]),))


@host
class OwnForwardLinearHost(OwnForwardHost, OutputHost):
    """A subclass of nn.Linear that multiplies by its weight in a forward of its own."""

    family: ClassVar[str] = "linear (own forward)"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    ways: ClassVar[tuple[Way, ...]] = ("added", "unused")

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return super().accepts(layer) and not is_foreign(layer)

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"weight": (layer.out_features, layer.in_features)}  # type: ignore[dict-item]

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        if way_of(layer, nn.Linear) == "unused":
            return "its own forward does not depend on its weight, so that a change would have no effect"
        return None

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("casting", lambda: CastingLinear(7, 5), lambda dtype: (torch.randn(3, 7, dtype=dtype),))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sites = self.active_sites()
        own = self.base_class.forward
        if not sites:
            return own(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        terms = self.low_rank()
        if not terms or args or kwargs:  # what further arguments do to the weight, the probe has not seen
            tensors: dict[str, Tensor | None] = {s: self.changed(s, dropout=self.training) for s in sites}
            return own(shell(self, self.base_class, tensors), x, *args, **kwargs)  # type: ignore[no-any-return]
        bias = self.changed_bias()
        y: Tensor = own(shell(self, self.base_class, {"bias": bias}) if "bias" in sites else self, x)

        def low(t: LowRank) -> Tensor:
            inputs = dropped_input(x.to(t.A.dtype), t, self.training)
            return nn.functional.linear(nn.functional.linear(inputs, t.A), t.B)

        return added(y, bias, terms, low, behind=0, training=self.training)


@host
class ForeignLinearHost(OwnForwardLinearHost):
    """A Linear whose weight bitsandbytes or torchao keep quantised (frozen/foreign.py): its own product stays in charge."""

    family: ClassVar[str] = "linear (quantised by another library)"
    foreign: ClassVar[bool] = True

    @classmethod
    def accepts_class(cls, kind: type[nn.Module]) -> bool:
        return issubclass(kind, nn.Linear)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and is_foreign(layer)

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return None

    @classmethod
    def examples(cls) -> Iterable[Example]:
        return ()

    def listed_as(self) -> str:
        return LinearHost.family

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "weight" in self.active_sites() and self.low_rank() is None:
            return nn.functional.linear(x, self.changed("weight").to(x.dtype), self.changed_bias())
        return super().forward(x, *args, **kwargs)


class ChangedHost(OwnForwardHost, WeightHost):
    """A layer whose own forward runs on W + ΔW."""

    ways: ClassVar[tuple[Way, ...]] = ("changed",)


@host
class ChangedLinearHost(ChangedHost, OutputHost):
    """A subclass of nn.Linear that does something else with its weight than to multiply by it."""

    family: ClassVar[str] = "linear (on W + ΔW)"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("normed weight", lambda: NormedLinear(7, 5), lambda dtype: (torch.randn(3, 7, dtype=dtype),))


@host
class ChangedEmbeddingHost(ChangedHost, EmbeddingMatrix):
    """A subclass of nn.Embedding that reads its weight itself (positions by slicing, as HF's Whisper)."""

    family: ClassVar[str] = "embedding (on W + ΔW)"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("positions", lambda: PositionEmbedding(9, 4), lambda dtype: (torch.zeros(2, 5),))


@host
class ChangedConvHost(ChangedHost, ConvMatrix):
    """A subclass of a convolution with a forward of its own (weight standardisation)."""

    family: ClassVar[str] = "convolution (on W + ΔW)"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    ways: ClassVar[tuple[Way, ...]] = ("beneath", "changed")

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example(
            "standardised", lambda: StandardConv(3, 6, 3), lambda dtype: (torch.randn(2, 3, 5, 5, dtype=dtype),)
        )


@host
class ChangedConvTransposeHost(ChangedHost, ConvTransposeMatrix):
    """A subclass of a transposed convolution with a forward of its own."""

    family: ClassVar[str] = "transposed convolution (on W + ΔW)"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    ways: ClassVar[tuple[Way, ...]] = ("beneath", "changed")


# ---- examples


class CastingLinear(nn.Linear):
    """As openai-whisper's Linear: the weight follows the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class ScaledLinear(nn.Linear):
    """Its own forward scales what nn.Linear gives."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x.to(self.weight.dtype))


class NormedLinear(nn.Linear):
    """Its own forward uses the weight with rows of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=-1), self.bias)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: scaled by the square root of the width."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.tensor(self.embedding_dim**0.5, dtype=self.weight.dtype)


class PositionEmbedding(nn.Embedding):
    """As HF's Whisper: a slice of the weight, as long as the input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[: x.shape[1]]


class StandardConv(nn.Conv2d):
    """A convolution with a standardised weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        y: Tensor = self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)
        return y
