"""nn.LSTM, nn.GRU, nn.RNN and their cells: they run with W + ΔW, in any number of layers and directions.

Sites are the weights by their own names: weight_ih_l0 (gates · hidden, in), weight_hh_l0 (gates · hidden, hidden),
weight_hr_l0 (projection), each with "_reverse". One gate of an LSTM is a part: "lstm.weight_hh_l0[0:32]".
Sequences may be packed. A variant's dropout is the same for every time step (arXiv:1512.05287).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from deltaw.core.host import Example
from deltaw.core.registry import host
from deltaw.layers.weight import WeightHost


class RecurrentWeights(WeightHost):
    """The weights weight_* with their biases bias_*."""

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return isinstance(layer, cls.adapts)

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {
            s: tuple(p.shape)
            for s, p in layer._parameters.items()
            if p is not None and s.startswith("weight_") and p.ndim == 2
        }

    @classmethod
    def biases(cls, layer: nn.Module) -> tuple[str, ...]:
        return tuple(s for s, p in layer._parameters.items() if p is not None and s.startswith("bias_"))

    def bias_of(self, site: str) -> tuple[str, slice | None] | None:
        bias = "bias_" + site.removeprefix("weight_")
        return (bias, None) if self._parameters.get(bias) is not None else None


@host
class RecurrentHost(RecurrentWeights, nn.RNNBase):
    """An adapted LSTM, GRU or RNN."""

    family: ClassVar[str] = "recurrent"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.LSTM, nn.GRU, nn.RNN)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        def sequence(*shape: int) -> Callable[[torch.dtype], tuple[Tensor]]:
            return lambda dtype: (torch.randn(*shape, dtype=dtype),)

        def packed(dtype: torch.dtype) -> tuple[Any]:
            return (
                pack_padded_sequence(torch.randn(5, 3, 4, dtype=dtype), torch.tensor([2, 5, 3]), enforce_sorted=False),
            )

        def with_state(dtype: torch.dtype) -> tuple[Any, ...]:
            return torch.randn(3, 2, 4, dtype=dtype), torch.randn(2, 2, 5, dtype=dtype)

        yield Example("LSTM", lambda: nn.LSTM(4, 5), sequence(3, 2, 4))
        yield Example(
            "two layers, both ways",
            lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True),
            sequence(3, 2, 4),
        )
        yield Example("projected", lambda: nn.LSTM(4, 6, bidirectional=True, proj_size=2), sequence(3, 2, 4))
        yield Example("packed LSTM", lambda: nn.LSTM(4, 5, bias=False), packed)
        yield Example("unbatched GRU", lambda: nn.GRU(4, 5, bidirectional=True), sequence(3, 4))
        yield Example("GRU with a state", lambda: nn.GRU(4, 5, num_layers=2), with_state)
        yield Example("RNN", lambda: nn.RNN(4, 5, nonlinearity="relu"), sequence(3, 2, 4))

    def twin(self, sites: set[str]) -> nn.Module:
        twin = super().twin(sites)
        flat = [twin._parameters[name] for name in self._flat_weights_names]
        twin.__dict__["_flat_weights"] = flat
        twin.__dict__["_flat_weight_refs"] = [None if w is None else weakref.ref(w) for w in flat]
        return twin


@host
class CellHost(RecurrentWeights, nn.RNNCellBase):
    """An adapted LSTMCell, GRUCell or RNNCell."""

    family: ClassVar[str] = "recurrent_cell"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        yield Example("LSTMCell", lambda: nn.LSTMCell(4, 5), lambda dtype: (torch.randn(2, 4, dtype=dtype),))
        yield Example("GRUCell", lambda: nn.GRUCell(4, 5, bias=False), lambda dtype: (torch.randn(4, dtype=dtype),))
        yield Example("RNNCell", lambda: nn.RNNCell(4, 5), lambda dtype: (torch.randn(2, 4, dtype=dtype),))
