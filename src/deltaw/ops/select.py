"""Which kernel runs, and why: the rules that `deltaw ops` prints. The choices made by timing are in choices.py.

Merged or added. Applying a rank-r change to T rows costs 2Tr(in + out) operations, forming W' = W + s B A 2r·in·out. So
W' takes fewer of them where T > in·out / (in + out). Where MKL multiplies thin matrices slowly (matmul.py) that count
decides; elsewhere memory traffic does. Forward and backward, W' reads and writes the weight four times (a copy and a
product, twice), the added change reads and writes y and ∂x once (h and u are made either way, for ∂B and ∂A): so W' is
cheaper from four times as many rows on. A gain, which in W' is free, is a pass over y and one over g: from twice as many.
W' is exact up to one rounding per weight in 32 and 64 bit; in 16 bit that rounding would swallow a small change, so never
there.

For a convolution it is passes and thin products that cost, W' the gradient of a whole weight. Measured with rank 8
(benchmarks/convolution.py), W' is cheaper for kernels of fewer than `KERNEL` numbers (.51 to .96 of the factors' time; about
as much at `KERNEL`, more above).

Fused or composed. The fused operation saves passes and memory and has the faster products, for some 60 to 90
microseconds of Python. Below `SMALL` multiplications that is more than it saves, and torch's own operations are composed.

A small weight that is kept in 8 or 4 bit is made dense for each call (`is_formed`): what
its inputs' quantisation costs in Python, the narrow product cannot save.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltaw.ops.matmul import mkl_is_slow

WIDE = (torch.float32, torch.float64)


def use_merged(
    rows_out: int, columns_in: int, tokens: int, dtype: torch.dtype, gain: bool = False, device: str = "cpu"
) -> bool:
    """Whether the adapted linear forms W' for this call (if W is dense; an adapter with dropout is added all the same).

    gain: whether an adapter has one. device: the type of x's.
    """
    return dtype in WIDE and surely(tokens * (rows_out + columns_in) > worth(gain, device) * rows_out * columns_in)


def worth(gain: bool, device: str = "cpu") -> int:
    """From how many times in·out / (in + out) rows on W' is formed."""
    if device == "cpu" and not torch.compiler.is_compiling() and mkl_is_slow():
        return 1
    return 2 if gain else 4


def surely(holds: bool) -> bool:
    """`holds`; or, if a compiler knows the sizes in it as symbols only, whether it is so for all of them, without a guard."""
    if not torch.compiler.is_compiling():
        return holds
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(holds)


SMALL = 1 << 23
"""Multiplications of the frozen product: 56 rows through 384 x 384 are about as many."""

LIGHT = 1 << 16
"""Numbers of an input (256 KiB) of which copies may be kept for backward, as torch's own operations do where there is
dropout."""

FORMED = 1 << 17
"""Numbers of a weight: below MiniLM's and whisper-tiny's 384 x 384, where 8 bit is faster (S4)."""


def is_small(rows_out: int, columns_in: int, tokens: int) -> bool:
    """Whether the adapted linear is composed of torch's own operations for this call (if W is dense)."""
    return tokens * rows_out * columns_in <= SMALL and tokens * columns_in <= LIGHT


def is_formed(rows_out: int, columns_in: int) -> bool:
    """Whether a W that is kept in another form is made dense for every call, as it is so small.

    By its shape alone: were it by the number of rows as well, a row would round otherwise in another batch.
    """
    return rows_out * columns_in <= FORMED


SHORT = 256
"""Tokens of a segment; where MKL is slow (matmul.py), whose batched products these are, a sixteenth of them."""

THIN = 1 << 14
"""Numbers of both factors of an adapter (64 KiB): rank 8 of 1024 x 1024."""


def is_stacked(rows_out: int, columns_in: int, tokens: int, rank: int, device: str = "cpu") -> bool:
    """Whether segments of so many tokens each, in a batch with many adapters, share two batched products without gradients.

    Their factors are copied side by side for it, which costs less than two calls of Python's for each as long as they are
    small (docs/decisions/023).
    """
    slow = device == "cpu" and mkl_is_slow()
    return tokens <= (SHORT >> 4 if slow else SHORT) and rank * (rows_out + columns_in) <= THIN


NARROW = 8
"""Ranks that thin.c keeps in registers beside each other, with AVX-512."""


def is_narrow(rank: int, shared: bool = False) -> bool:
    """Whether thin products without dropout run compiled (cpu_thin.py): where they are one sweep's that `shared` what it
    reads, at twice the rank. With dropout they do at every rank: torch's operations write drop(x) to memory first."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and not mkl_is_slow()
    return wide and rank <= (2 * NARROW if shared else NARROW)


KERNEL = 1 << 16
"""Numbers of a convolution's weight."""


def is_small_kernel(numbers: int) -> bool:
    """Whether a convolution, whose weight has so many numbers, forms W' for a call."""
    return numbers < KERNEL


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
) -> Explanation:
    """What `adapted_linear` does with x (tokens, in), a dense W (out, in) and one adapter in training, in fp32 on a CPU."""
    times = worth(False)
    bound = times * rows_out * columns_in / (rows_out + columns_in)
    limit = f"{times if times > 1 else ''} in·out/(in+out) = {bound:.0f}".lstrip()
    thin = tokens * rank * (rows_out + columns_in)  # one thin product on each side
    frozen = 2 * tokens * rows_out * columns_in
    if is_small(rows_out, columns_in, tokens):
        reason = (
            f"{tokens * rows_out * columns_in:,} multiplications do not pay for the fused operation ({SMALL:,} would)"
        )
        return Explanation("composed", reason, 3 * thin / frozen)
    if not dropout and use_merged(rows_out, columns_in, tokens, torch.float32):
        work = 2 * thin + 2 * rank * rows_out * columns_in
        return Explanation("merged", f"{tokens} rows > {limit}: W' = W + sBA is cheaper to form", work / frozen)
    if dropout:
        reason = f"dropout {dropout:g} is part of the adapter's input, so it cannot be merged into W"
    else:
        reason = f"{tokens} rows <= {limit}: the factors are cheaper to apply than W' to form"
    return Explanation("added", reason, 3 * thin / frozen)
