"""Convolutions over the grid of their attributes (pains row 25; PEFT faults: dilation raises, padding_mode is lost)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.ops import select
from tests.laws.conftest import Wrapped, shaken


@pytest.fixture(autouse=True, params=["factors", "changed"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is small enough for W + ΔW, or every one is."""
    monkeypatch.setattr(select, "KERNEL", -1 if request.param == "factors" else 1 << 62)


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SPACE = {1: (9,), 2: (8, 7), 3: (6, 5, 5)}
GRID = [
    (n, mode, padding, stride, dilation, groups)
    for n, mode, padding, stride, dilation, groups in itertools.product(
        (1, 2, 3), ("zeros", "reflect", "replicate", "circular"), (0, 1, "same", "valid"), (1, 2), (1, 2), (1, 2, 4)
    )
    if not (padding == "same" and stride != 1) and (n < 3 or (stride + dilation + groups) % 2)
]


def agree(model: nn.Module, x: torch.Tensor, rank: int, **call) -> None:
    """Laws 1 to 3 for LoRA on one layer."""
    with torch.no_grad():
        before = model(x, **call)
        dw.attach(model, dw.LoRA(rank=rank), targets=["layer"])
        assert torch.equal(model(x, **call), before)
        shaken(model)
        out = model(x, **call)
        assert not torch.equal(out, before)
        dw.merge(model)
        torch.testing.assert_close(model(x, **call), out, rtol=1e-10, atol=1e-10)
        dw.unmerge(model)
        dw.detach(model)
        assert torch.equal(model(x, **call), before)


@pytest.mark.parametrize(("n", "mode", "padding", "stride", "dilation", "groups"), GRID)
def test_merged_equals_unmerged_over_the_grid(n, mode, padding, stride, dilation, groups):
    torch.manual_seed(0)
    conv = CONV[n](4, 12, 3, stride, padding, dilation, groups, padding_mode=mode)
    agree(Wrapped(conv).double(), torch.randn(2, 4, *SPACE[n]).double(), 2)


@pytest.mark.parametrize(
    ("n", "stride", "padding", "extra", "dilation", "groups"),
    [
        case
        for case in itertools.product((1, 2), (1, 2, 3), (0, 1), (0, 1), (1, 2), (1, 2, 4))
        if case[3] < max(case[1], case[4])
    ],
)
def test_transposed_convolutions(n, stride, padding, extra, dilation, groups):
    torch.manual_seed(0)
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}[n]
    conv = kind(4, 12, 3, stride, padding, extra, groups, dilation=dilation)
    agree(Wrapped(conv).double(), torch.randn(2, 4, *SPACE[n]).double(), 2)


def test_the_size_asked_of_a_transposed_convolution():
    model = Wrapped(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)).double()
    x = torch.randn(1, 4, 5, 5).double()
    for size in ([9, 9], [10, 10], [1, 6, 9, 10]):
        agree(model, x, 2, output_size=size)


def test_factors_are_convolved_and_no_dense_change_is_formed(monkeypatch):
    monkeypatch.setattr(select, "KERNEL", -1)
    model = Wrapped(nn.Conv2d(4, 32, 3, groups=2, padding=1))
    shaken(dw.attach(model, dw.DoRA(rank=2), targets=["layer"]))
    monkeypatch.setattr(type(model.layer.deltas("default")["weight"]), "delta_weight", None)
    model(torch.randn(1, 4, 5, 5)).sum().backward()


def test_a_depthwise_convolution_runs_with_its_changed_weight(monkeypatch):
    """Groups times rank are more than the outputs: factors would cost more than W + ΔW."""
    import deltaw.layers.conv as conv

    model = Wrapped(nn.Conv1d(8, 8, 3, groups=8))
    shaken(dw.attach(model, dw.LoRA(rank=4), targets=["layer"]))
    x = torch.randn(2, 8, 9)
    out = model(x)
    monkeypatch.setattr(conv, "cheaper_changed", lambda *given: False)
    torch.testing.assert_close(model(x), out)


def test_a_small_kernel_runs_with_its_changed_weight_where_that_loses_nothing(monkeypatch):
    monkeypatch.undo()  # the limits as they are
    model = Wrapped(nn.Conv2d(16, 32, 3, padding=1))
    dw.attach(model, dw.LoRA(rank=2, dropout=0.5), targets=["layer"])
    host = type(model.layer)
    calls = []
    real = host.by_factors
    monkeypatch.setattr(host, "by_factors", lambda *given: calls.append(1) or real(*given))
    few, many = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 16, 16)
    model.eval()
    for x, expected in ((few, 1), (many, 0)):  # 4,608 numbers: from 256 places on
        model(x)
        assert len(calls) == expected
        calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(many)
    model.train()
    model(many)  # dropout
    model.eval().bfloat16()(many.bfloat16())
    assert len(calls) == 3


def test_true_groups_keep_their_channels_apart():
    model = Wrapped(nn.Conv1d(4, 12, 1, groups=2)).double()
    shaken(dw.attach(model, dw.LoRA(rank=2), targets=["layer"]))
    assert model.layer.deltas("default")["weight"].A.shape == (2, 2)
    x = torch.randn(1, 4, 5).double()
    y = x.clone()
    y[:, 2:] += 1
    assert torch.equal(model(x)[:, :6], model(y)[:, :6])
    assert not torch.equal(model(x)[:, 6:], model(y)[:, 6:])
    assert dw.get(model).changes["layer.weight"].layer == "conv1d (grouped)"
