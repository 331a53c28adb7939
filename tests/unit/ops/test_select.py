"""The rules by which kernels are chosen."""

from __future__ import annotations

import pytest
import torch

from deltaw.ops import select


@pytest.fixture(params=[True, False], ids=["slow MKL", "fast MKL"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether thin products are slow on the machine."""
    monkeypatch.setattr(select, "mkl_is_slow", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("gain", [False, True])
def test_merging_is_chosen_where_it_is_less_work(slow: bool, gain: bool) -> None:
    times = 1 if slow else 2 if gain else 4
    for out, width in [(384, 384), (1536, 384), (49152, 576)]:
        bound = times * out * width / (out + width)
        assert select.use_merged(out, width, int(bound) + 1, torch.float32, gain)
        assert not select.use_merged(out, width, int(bound) - 1, torch.float32, gain)
        assert not select.use_merged(out, width, 10**6, torch.bfloat16, gain)


@pytest.mark.parametrize(
    ("options", "kernel", "reason"),
    [
        ({}, "merged", "3200 rows > 4 in·out/(in+out) = 768"),
        ({"dropout": 0.05}, "added", "dropout 0.05"),
    ],
)
def test_the_explanation_names_kernel_and_reason(
    options: dict, kernel: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "mkl_is_slow", lambda: False)
    found = select.explain(384, 384, 3200, 8, **options)
    assert found.kernel == kernel
    assert reason in str(found)
    assert 0 < found.share < 0.1


def test_the_processor_decides_for_tensors_that_lie_on_it_only(slow: bool) -> None:
    assert select.worth(False, "cuda") == 4
    assert select.worth(True, "cuda") == 2
    assert select.is_stacked(64, 64, select.SHORT, 8, "cuda")
    assert select.is_stacked(64, 64, select.SHORT, 8) is not slow


def test_few_rows_are_added() -> None:
    assert "the factors are cheaper" in select.explain(384, 384, 10, 8).reason
