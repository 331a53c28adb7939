"""Dense or 8 bit: which kernel an 8-bit weight's products run on, decided once and kept on record.

Speed. Which of the two products of a shape is faster in 8 bit depends on the machine: `time_int8` measures it once per
shape where timing was asked for. Without timing the rule is: 8 bit wherever the processor can (`int8_available`).

Accuracy. An input with outliers (a few features a hundred times larger than the others, as large language models have)
leaves the other features no codes. So at calls 1, 2, 4 ... 64 of each product, and at every 64th from there on, a sample
of its rows is computed in full precision too. What counts is the error relative to what a row gives without its largest
hundredth: beside the product of the outliers themselves it would look small, although all the rest is lost. Above `LIMIT`
that product goes on with the dense weight, and says so.

A `Choices` is the record of both. It is written into a run and its checkpoints, so that a resumed run takes the same
kernels, to the bit, without timing anything again.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deltaw.errors import ConfigError
from deltaw.ops.int8 import int8_available, int8_matmul, int8_matmul_grad, quantize_int8
from deltaw.ops.matmul import linear
from deltaw.ops.terms import flat

LIMIT = 0.15
"""Largest error that is borne. MiniLM's and whisper-tiny's inputs have at most .06, their gradients at most .13."""
FEW = 100
"""One feature in so many may be an outlier."""
SAMPLE = 64
"""Rows that are looked at, at least (where there are so many), and fewer than twice as many."""
EVERY = 64
"""Calls from one look to the next, once as many were made."""

Side = Literal["forward", "gradient"]
SIDES: tuple[Side, Side] = ("forward", "gradient")
Key = tuple[int, int, int]
"""(out, in, tokens)."""


class OutlierWarning(UserWarning):
    """A product has left 8 bit because outliers made it too inexact."""


@dataclass
class Look:
    """One product of one weight: how often it ran in 8 bit, and whether it is dense from now on."""

    calls: int = 0
    dense: bool = False


@dataclass
class Choices:
    """The kernels of a model's 8-bit weights.

    timed: time each new shape once. int8: (out, in, tokens) -> whether 8 bit is faster forward, and for the input
    gradient. looks: "weight forward" or "weight gradient" -> what was seen of its accuracy.
    """

    timed: bool = False
    int8: dict[Key, tuple[bool, bool]] = field(default_factory=dict)
    looks: dict[str, Look] = field(default_factory=dict)

    def to_json(self) -> str:
        """As kept in a run's folder and in its checkpoints."""
        rows = [{"shape": list(shape), "int8": list(use)} for shape, use in sorted(self.int8.items())]
        looks = {name: [look.calls, look.dense] for name, look in sorted(self.looks.items())}
        facts = {"choices": 1, "threads": torch.get_num_threads(), "timed": self.timed}
        return json.dumps({**facts, "kernels": rows, "looks": looks})

    @staticmethod
    def from_json(text: str) -> Choices:
        """The inverse of `to_json`.

        Raises:
            ConfigError: it is no record of choices.
        """
        try:
            found = json.loads(text)
            rows = [(r["shape"], r["int8"]) for r in found["kernels"]]
            kernels = {(int(a), int(b), int(c)): (bool(f), bool(g)) for (a, b, c), (f, g) in rows}
            looks = {str(name): Look(int(calls), bool(dense)) for name, (calls, dense) in found["looks"].items()}
            return Choices(bool(found["timed"]), kernels, looks)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a record of kernel choices: {error}; write one with Choices.to_json") from error

    def take(self, other: Choices) -> None:
        """Go on from another record."""
        self.timed, self.int8, self.looks = other.timed, dict(other.int8), dict(other.looks)

    def choose(self, rows_out: int, columns_in: int, tokens: int) -> tuple[bool, bool]:
        """Whether 8 bit is used for a shape, forward and backward. Always dense where there is no VNNI."""
        if not int8_available():
            return False, False
        key = (rows_out, columns_in, 1 << max(0, tokens - 1).bit_length())  # tokens up to the next power of two
        if key not in self.int8:
            if not self.timed:
                return True, True
            self.int8[key] = time_int8(*key)
        return self.int8[key]

    def product(
        self,
        name: str,
        side: Side,
        shape: tuple[int, ...],
        x: Tensor,
        narrow: Callable[[Tensor], tuple[Tensor, Tensor]],
        wide: Callable[[Tensor], Tensor],
        columns: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`narrow(x)`, a product (T, n) and what its rows have still to be multiplied with, or `wide(x)` and None where that is
        faster or outliers ask for it.

        name, shape: of the weight (out, in). columns: what x is multiplied with before it is quantised, (k,).
        """
        tokens = x.numel() // max(1, x.shape[-1])
        key = f"{name} {side}"
        look = self.looks.get(key)
        if (look is not None and look.dense) or not self.choose(shape[0], shape[1], tokens)[SIDES.index(side)]:
            return wide(x), None
        y, scales = narrow(x)
        if tokens == 0:
            return y, scales
        look = self.looks.setdefault(key, Look())
        look.calls += 1
        if look.calls & (look.calls - 1) and look.calls % EVERY:  # no power of two
            return y, scales
        some = sample(tokens, look.calls)
        error = error_beside_outliers(y[some] * scales[some], flat(x)[some], wide, columns)
        if error <= LIMIT:
            return y, scales
        look.dense = True
        what = "outputs" if side == "forward" else "input gradients"
        warnings.warn(
            f"{name or 'a weight'}: 8 bit moves its {what} by {error:.0%} (outliers); this product goes on with fp32",
            OutlierWarning,
            stacklevel=2,
        )
        return wide(x), None

    def lines(self) -> list[str]:
        """What was decided, for people."""
        words = {True: "8 bit", False: "dense"}
        found = [
            f"{out} x {width}, up to {tokens} rows: forward {words[f]}, gradient {words[g]} (timed)"
            for (out, width, tokens), (f, g) in sorted(self.int8.items())
        ]
        return found + [f"{name}: dense (outliers)" for name, look in sorted(self.looks.items()) if look.dense]


def sample(tokens: int, call: int) -> Tensor:
    """The rows that are looked at in a call: one of each of `SAMPLE` stretches, where in it as `call` decides.

    (The first of each would be the same place of every sequence, if those are as long.)
    """
    if tokens < 2 * SAMPLE:
        return torch.arange(tokens)
    stretch = tokens // SAMPLE
    place = torch.randint(0, stretch, (SAMPLE,), generator=torch.Generator().manual_seed(call))
    return torch.arange(0, SAMPLE * stretch, stretch) + place


def error_beside_outliers(
    y: Tensor, x: Tensor, wide: Callable[[Tensor], Tensor], columns: Tensor | None = None
) -> float:
    """Mean over the rows of ‖y - wide(x)‖ / ‖wide(x without its largest entries)‖; rows that this leaves nothing of, or
    that are not finite, are left out. y: (rows, n). x: (rows, k).
    """
    size = x.abs() if columns is None else (x * columns).abs()
    largest = size.topk(max(1, x.shape[1] // FEW), dim=1).indices
    exact, without = wide(torch.cat([x, x.scatter(1, largest, 0.0)])).float().chunk(2)  # W is made dense once
    rest, gap = torch.linalg.vector_norm(without, dim=1), torch.linalg.vector_norm(y.float() - exact, dim=1)
    there = (rest > 0) & gap.isfinite()
    return float((gap[there] / rest[there]).mean()) if bool(there.any()) else 0.0


def time_int8(rows_out: int, columns_in: int, tokens: int, repeats: int = 5) -> tuple[bool, bool]:
    """Whether 8 bit is faster for x Wᵀ, and for g W, than making W dense and multiplying: medians, taken in turns."""
    noise = torch.Generator().manual_seed(0)
    packed = quantize_int8(torch.randn(rows_out, columns_in, generator=noise))
    x, g = (torch.randn(tokens, side, generator=noise) for side in (columns_in, rows_out))
    pairs: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: int8_matmul(x.view_as(x), packed), lambda: linear(x, packed.dense())),
        (lambda: int8_matmul_grad(g, packed), lambda: linear(g, packed.dense().t())),
    ]
    faster = []
    with torch.no_grad():
        for narrow, wide in pairs:
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(repeats + 1):
                for one, spent in zip((narrow, wide), times, strict=True):
                    start = time.perf_counter()
                    one()
                    spent.append(time.perf_counter() - start)
            faster.append(statistics.median(times[0][1:]) < statistics.median(times[1][1:]))
    return faster[0], faster[1]
