"""Which kernel runs, and why: the rules that `deltaw ops` prints, and the choices made by timing.

Merged or added. Applying a rank-r change to T rows costs 2Tr(in + out) operations and a pass over the output; forming
W' = W + s B A costs 2r·in·out and a pass over the weight. So W' is cheaper where T > in·out / (in + out). It is exact
up to one rounding per weight in 32 and 64 bit; in 16 bit that rounding would swallow a small change, so never there.

Dense or 8 bit. Which of the two products of an 8-bit weight is faster than the dense one depends on the machine and the
shape: `time_int8` measures it once per shape, and a `Choices` keeps the answers, so that a resumed run takes the same
kernels. Without a record the rule is: 8 bit wherever the processor can (`int8_available`).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from deltaw.errors import ConfigError
from deltaw.ops.int8 import int8_available, int8_matmul, int8_matmul_grad, quantize_int8
from deltaw.ops.matmul import linear

WIDE = (torch.float32, torch.float64)


def use_merged(rows_out: int, columns_in: int, tokens: int, dtype: torch.dtype) -> bool:
    """Whether the adapted linear forms W' for this call (if W is dense; an adapter with dropout is added all the same)."""
    return dtype in WIDE and tokens * (rows_out + columns_in) > rows_out * columns_in


@dataclass(frozen=True)
class Explanation:
    """The kernel that runs for a call, the reason, and what the adapter costs beside the frozen products."""

    kernel: str
    reason: str
    share: float
    """Multiplications of the adapter, forward and backward, over those of the frozen products."""

    def __str__(self) -> str:
        return f"{self.kernel}: {self.reason}; the adapter costs {self.share:.1%} of the frozen products"


def explain(
    rows_out: int,
    columns_in: int,
    tokens: int,
    rank: int,
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    form: str = "dense",
    device: str = "cpu",
) -> Explanation:
    """What `adapted_linear` does with x (tokens, in), W (out, in) kept in `form`, and one adapter in training."""
    bound = rows_out * columns_in / (rows_out + columns_in)
    thin = tokens * rank * (rows_out + columns_in)  # one thin product on each side
    frozen = 2 * tokens * rows_out * columns_in
    if form == "dense" and not dropout and use_merged(rows_out, columns_in, tokens, dtype):
        work = 2 * thin + 2 * rank * rows_out * columns_in
        return Explanation(
            "merged", f"{tokens} rows > in·out/(in+out) = {bound:.0f}: W' = W + sBA is cheaper to form", work / frozen
        )
    if form != "dense":
        reason = f"W is kept as {form}, its own kernels make the frozen products"
        if form == "int8" and (device != "cpu" or not int8_available()):
            reason = "W is kept as int8, but there are no 8-bit kernels here: it is made dense for each product"
    elif dropout:
        reason = f"dropout {dropout:g} is part of the adapter's input, so it cannot be merged into W"
    elif dtype not in WIDE:
        reason = f"{str(dtype).removeprefix('torch.')} would round a small change away if it were merged into W"
    else:
        reason = f"{tokens} rows <= in·out/(in+out) = {bound:.0f}: the factors are cheaper to apply than W' to form"
    return Explanation("added", reason, 3 * thin / frozen)


@dataclass
class Choices:
    """Kernels chosen by timing: (out, in, tokens) -> whether 8 bit is used forward, and for the input gradient."""

    int8: dict[tuple[int, int, int], tuple[bool, bool]] = field(default_factory=dict)

    def to_json(self) -> str:
        """As kept in a run's folder and in its checkpoints."""
        rows = [{"shape": list(shape), "int8": list(use)} for shape, use in sorted(self.int8.items())]
        return json.dumps({"choices": 1, "threads": torch.get_num_threads(), "kernels": rows})

    @staticmethod
    def from_json(text: str) -> Choices:
        """The inverse of `to_json`.

        Raises:
            ConfigError: it is no record of choices.
        """
        try:
            rows = json.loads(text)["kernels"]
            found = {
                (int(a), int(b), int(c)): (bool(f), bool(g)) for (a, b, c), (f, g) in (tuple(r.values()) for r in rows)
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"not a record of kernel choices: {error}; write one with Choices.to_json") from error
        return Choices(found)

    def choose(self, rows_out: int, columns_in: int, tokens: int) -> tuple[bool, bool]:
        """Forward and backward for a shape, by timing if it is not on record. Always dense where there is no VNNI."""
        if not int8_available():
            return False, False
        key = (rows_out, columns_in, 1 << max(0, tokens - 1).bit_length())  # tokens up to the next power of two
        if key not in self.int8:
            self.int8[key] = time_int8(*key)
        return self.int8[key]


def time_int8(rows_out: int, columns_in: int, tokens: int, repeats: int = 5) -> tuple[bool, bool]:
    """Whether 8 bit is faster than fp32 for x Wᵀ, and for g W: medians of `repeats`, taken in turns."""
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(rows_out, columns_in, generator=noise)
    x, g = (torch.randn(tokens, side, generator=noise) for side in (columns_in, rows_out))
    packed = quantize_int8(weight)
    pairs: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: int8_matmul(x, packed), lambda: linear(x, weight)),
        (lambda: int8_matmul_grad(g, packed), lambda: linear(g, weight.t())),
    ]
    faster = []
    with torch.no_grad():
        for narrow, wide in pairs:
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(repeats + 1):
                for one, spent in zip((narrow, wide), times):
                    start = time.perf_counter()
                    one()
                    spent.append(time.perf_counter() - start)
            faster.append(statistics.median(times[0][1:]) < statistics.median(times[1][1:]))
    return faster[0], faster[1]
