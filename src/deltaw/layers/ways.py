"""How a subclass's own forward uses its weight, by its code and by trial: which way a change of the weight is to take.

"beneath": it only calls `super().forward`. "added": what it returns is a product with W, plus what W does not touch.
"changed": anything else. "unused": its output does not depend on W. The ways themselves are in own_forward.py.
A trial is made once for all layers of a class with the same plain values (sizes, switches, factors).
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Hashable
from types import CodeType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.core.beside import own_class
from deltaw.core.host import Host
from deltaw.core.twin import shell
from deltaw.core.unread import FACTS, unread

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
