"""HOW a weight changes: a `Variant` (the options, a value) makes one `Delta` (the trained tensors) per weight.

A variant file knows matrices only. It never learns which layer the matrix belongs to or in what form it is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from deltaw.core.bare import Bare
from deltaw.core.options import Options
from deltaw.errors import AdapterError


@dataclass(frozen=True)
class Site:
    """One parameter of one layer, as a variant sees it.

    `shape` is (out, in): the weight as the matrix that multiplies inputs from the left, whatever the stored layout.
    For a variant with `any_shape` it is the stored shape itself. `dtype` and `device` are those of the adapter's
    tensors: fp32 over a 16-bit or quantised base, else the base's own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    buffer: bool = False
    """True for a buffer of the layer (running statistics), which is kept but not trained by gradients."""
    lookup: bool = False
    """True if the inputs are one-hot (an embedding): a call sees single columns of the matrix."""

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self.shape[1]


class LowRank(NamedTuple):
    """A change in the form that fused operations take: ΔW = diag(gain) W + scale · B A.

    `A` is (rank, in), `B` is (out, rank), `gain` is (out,) or None for zero; a stack of weights has a dimension in front. `dropout` is the probability of zeroing,
    in training, an entry of the input of A (`dropout_at="input"`) or of the low-rank output ("output").
    """

    A: Tensor
    B: Tensor
    scale: float
    gain: Tensor | None = None
    dropout: float = 0.0
    dropout_at: str = "input"


class FrozenMatrix(ABC):
    """What a delta may ask of the frozen weight W (out, in): products, and W itself as the last resort.

    lasting: the values are those that the layer keeps, not of one call only.
    trained: W is not frozen after all; optimizers write to it, and some (torch's fused ones) without counting that.
    """

    lasting: bool = True
    trained: bool = False

    @abstractmethod
    def state(self) -> Hashable:
        """Another one after W was written to, moved or replaced (not by a write through `.data`, which PyTorch does not
        count). None where that cannot be told."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ, (..., in) -> (..., out)."""

    def factor_matmul(self, A: Tensor) -> Tensor:
        """A Wᵀ, (rank, in) -> (rank, out), of an adapter's factor: `matmul` of what is no input of the layer."""
        return self.matmul(A)

    @abstractmethod
    def dense(self) -> Tensor:
        """W, (out, in), in the dtype in which it is computed with."""


class Dense(FrozenMatrix):
    """A frozen matrix that is simply there. `weight` is (out, in); `stored` the parameter of which it is the matrix."""

    def __init__(self, weight: Tensor, stored: Tensor | None = None) -> None:
        self.weight = weight
        self.stored = weight if stored is None else stored
        self.lasting = stored is not None
        self.trained = self.stored.requires_grad

    def state(self) -> Hashable:
        return state_of(self.stored)

    def matmul(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))

    def dense(self) -> Tensor:
        return self.weight


def state_of(*tensors: Tensor) -> Hashable:
    """`FrozenMatrix.state` of what these tensors decide.

    While a weak reference to a storage is kept, no other storage takes its place: an address alone is used again.
    """
    try:
        return tuple((StorageWeakRef(t.untyped_storage()), t.data_ptr(), t._version) for t in tensors)  # type: ignore[no-untyped-call]
    except RuntimeError:  # no memory of its own (a transform's), or no versions (made in inference mode)
        return None


class Delta(Bare, ABC):
    """The change of one weight: its trained tensors and the formula that turns them into ΔW.

    Parameters and persistent buffers of this module are exactly what a file keeps of it.
    """

    variant: Variant
    site: Site

    def __init__(self, variant: Variant, site: Site) -> None:
        super().__init__()
        self.__dict__.update(variant=variant, site=site)  # plain values: nn.Module need not look what they are

    @abstractmethod
    def delta_weight(self, weight: Tensor) -> Tensor:
        """ΔW(W), of W's shape. `weight` is W as an (out, in) matrix (any shape for `any_shape`).

        Dropout of activations never shows here; dropout of the change itself (rank_dropout, module_dropout) does, in
        training mode.
        """

    def new_weight(self, weight: Tensor) -> Tensor:
        """W + ΔW(W). Overridden where the changed weight is known directly, so that no rounding is added."""
        return weight + self.delta_weight(weight).to(weight.dtype)

    def delta_bias(self, bias: Tensor) -> Tensor | None:
        """Δb(b) of the layer's bias, for the few variants (IA3) whose one tensor changes both."""
        return None

    def low_rank(self, frozen: FrozenMatrix) -> tuple[LowRank, ...] | None:
        """The change as a sum of terms for the fused operations, or None if it is not of that form."""
        return None

    def start(self, frozen: FrozenMatrix) -> None:
        """Set the trained tensors that depend on W, once, when freshly attached (DoRA's norms, SVD inits). Not on meta."""
        return None

    def prepare(self, frozen: FrozenMatrix) -> None:
        """Cache what the forward needs of W and no file keeps (DoRA's row norms); after `start`, and after loading."""
        return None

    def kept(self) -> tuple[Variant, dict[str, Tensor]]:
        """What a file keeps of this change, exact over the plain base: the variant that reads it and its tensors."""
        return self.variant, dict(self.state_dict(keep_vars=True))

    def hot(self, variant: Variant, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values that this delta's tensors must take so that it computes what `variant` with `tensors` does.

        Shapes and options stay as they are, so that a running optimizer or compiled code need not know.

        Raises:
            AdapterError: that cannot be.
        """
        mine = {name: tuple(t.shape) for name, t in self.state_dict().items()}
        theirs = {name: tuple(t.shape) for name, t in tensors.items()}
        if type(variant) is not type(self.variant) or variant.at_work() != self.variant.at_work() or mine != theirs:
            raise AdapterError(f"{variant} with {theirs} does not fit into the place of {self.variant} with {mine}")
        return dict(tensors)

    def hold(self, tensors: Mapping[str, Tensor], trained: bool) -> None:
        """Take exactly these tensors, themselves and not copies, as the delta's own (`state_dict`'s names).

        trained: those that are parameters require a gradient.

        Raises:
            AdapterError: a tensor is missing, unknown, or of another shape.
        """
        mine = self.state_dict(keep_vars=True) if self._modules else self.held_here()
        if mine.keys() != tensors.keys():
            raise AdapterError(f"{self.variant} has the tensors {sorted(mine)}, the adapter holds {sorted(tensors)}")
        for key, tensor in tensors.items():
            old = mine[key]
            if old.shape != tensor.shape:
                raise AdapterError(
                    f"{self.variant}: {key!r} must be {tuple(old.shape)}, the adapter holds {tuple(tensor.shape)}"
                )
            path, _, name = key.rpartition(".")
            owner = self.get_submodule(path) if path else self
            if isinstance(old, nn.Parameter):
                owner._parameters[name] = nn.Parameter(tensor, trained)
            else:
                owner._buffers[name] = tensor

    def held_here(self) -> dict[str, Tensor]:
        """Name -> parameter or persistent buffer of this module itself, as `state_dict` of one without children gives them."""
        found = {name: parameter for name, parameter in self._parameters.items() if parameter is not None}
        passing = self._non_persistent_buffers_set
        return found | {n: b for n, b in self._buffers.items() if b is not None and n not in passing}  # type: ignore[return-value]

    changes_bias: ClassVar[bool] = False
    """True if `delta_bias` is defined."""
    fast: ClassVar[tuple[str, ...]] = ()
    """Tensors that LoRA+ gives the larger learning rate."""

    def extra_repr(self) -> str:
        return repr(self.variant)


@dataclass(frozen=True, kw_only=True, repr=False)
class Variant(Options, ABC):
    """Options and identity of one method. Equal variants are equal values; printing one prints the call that makes it.

    bias: also train the bias of every adapted layer, as a copy of its own.
    """

    kind: ClassVar[str]
    """The method's name in files, on the command line and in tables."""
    any_shape: ClassVar[bool] = False
    """True if the change is defined for a parameter of any shape, not only for a matrix."""
    only_training: ClassVar[tuple[str, ...]] = ("bias",)
    """Options that do not show in what a trained change computes."""

    bias: bool = False

    @abstractmethod
    def create(self, site: Site, shared: dict[str, Any]) -> Delta:
        """The delta of one weight. `shared` lives for one `attach`: tensors that all weights of an adapter share."""

    @abstractmethod
    def matrix_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The shape of the weight that these tensors change, (out, in) or the stored shape; -1 for a size that they do
        not tell (IA3's vector knows one side only).

        Raises KeyError, or AdapterError, if they are not this variant's tensors.
        """

    @classmethod
    def examples(cls) -> Iterable[Variant]:
        """Instances for the laws, awkward ones included."""
        return (cls(),)

    def after_step(self, deltas: Mapping[str, Delta], step: int) -> None:
        """Called by `dw.after_step` once per optimizer step, for methods that reallocate their rank (AdaLoRA)."""
        return None

    def at_work(self) -> dict[str, Any]:
        """The options that show in what a trained change computes."""
        return {k: v for k, v in self.options().items() if k not in self.only_training}


def fits(found: Iterable[int], expected: Iterable[int]) -> bool:
    """Whether `found`, a `matrix_shape`, is the shape `expected`: equal where it says something (-1 says nothing)."""
    found, expected = tuple(found), tuple(expected)
    return len(found) == len(expected) and all(f in (-1, e) for f, e in zip(found, expected))
