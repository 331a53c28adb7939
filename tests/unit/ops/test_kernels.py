"""What `deltaw ops` says is what runs."""

from __future__ import annotations

import torch

from deltaw.ops.choices import Choices
from deltaw.ops.kernels import TYPICAL, Shape, kernels, measure
from deltaw.ops.matmul import by_onednn


def test_the_library_named_is_the_one_taken() -> None:
    for shape in (*TYPICAL[:5], Shape(2, 8, 8, 2)):
        taken = by_onednn(torch.empty(shape.tokens, shape.columns_in), torch.empty(shape.rows_out, shape.columns_in))
        assert kernels(shape, Choices()).products.startswith("oneDNN" if taken else "MKL")
    with torch.backends.mkldnn.flags(enabled=False):
        assert kernels(TYPICAL[2], Choices()).products.startswith("MKL")


def test_every_kernel_is_measured() -> None:
    found = measure(Shape(40, 32, 48, 2), repeats=1)
    assert {"merged", "added", "composed"} <= found.keys()
    assert all(spent > 0 for spent in found.values())
