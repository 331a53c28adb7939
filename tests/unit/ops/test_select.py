"""The rules by which kernels are chosen."""

from __future__ import annotations

import pytest
import torch

from deltaw.ops import select


def test_merging_is_chosen_where_it_is_less_work() -> None:
    for out, width in [(384, 384), (1536, 384), (49152, 576)]:
        bound = out * width / (out + width)
        assert select.use_merged(out, width, int(bound) + 1, torch.float32)
        assert not select.use_merged(out, width, int(bound) - 1, torch.float32)
        assert not select.use_merged(out, width, 10**6, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "kernel", "reason"),
    [
        ({}, "merged", "3200 rows > in·out/(in+out) = 192"),
        ({"dropout": 0.05}, "added", "dropout 0.05"),
        ({"dtype": torch.bfloat16}, "added", "bfloat16 would round"),
        ({"form": "nf4"}, "added", "kept as nf4"),
        ({"form": "int8", "device": "cuda"}, "added", "no 8-bit kernels"),
    ],
)
def test_the_explanation_names_kernel_and_reason(options: dict, kernel: str, reason: str) -> None:
    found = select.explain(384, 384, 3200, 8, **options)
    assert found.kernel == kernel
    assert reason in str(found)
    assert 0 < found.share < 0.1


def test_few_rows_are_added() -> None:
    assert "the factors are cheaper" in select.explain(384, 384, 10, 8).reason
