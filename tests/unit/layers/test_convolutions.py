"""Convolutions over the grid of their attributes (pains row 25; PEFT faults: dilation raises, padding_mode is lost)."""

from __future__ import annotations

import copy
import itertools
import types

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import deltaw as dw
from deltaw.layers.conv import ConvHost
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
    calls = []
    real = ConvHost.inner
    monkeypatch.setattr(ConvHost, "inner", lambda *given: calls.append(1) or real(*given))
    x = torch.randn(1, 16, 4, 4)
    for outputs, expected in ((454, 0), (456, 1)):  # 65,376 numbers and 65,664
        model = Wrapped(nn.Conv2d(16, outputs, 3, padding=1))
        dw.attach(model, dw.LoRA(rank=2, dropout=0.5), targets=["layer"])
        model.eval()
        calls.clear()
        model(x)
        assert len(calls) == expected
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        model.train()
        model(x)  # dropout
        model.eval().bfloat16()(x.bfloat16())
        assert len(calls) == expected + 3


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [dw.LoRA, dw.DoRA])
def test_a_pointwise_convolution_by_products_is_the_dense_one(n, stride, bias, kind):
    """Many places (products per sample, the weight's own where this machine's library likes them) and few, both ways of
    laying an image down, and its derivatives, against W + ΔW in float64."""
    torch.manual_seed(0)
    side = {1: 130, 2: 16, 3: 8}[n]
    conv = CONV[n](6, 20, 1, stride, bias=bias)
    model = Wrapped(conv).double()
    shaken(dw.attach(model, kind(rank=2, alpha=3), targets=["layer"]))
    merged = copy.deepcopy(model)
    dw.merge(merged)
    dense = merged.layer
    w = dense.weight.detach().clone().requires_grad_()
    for shape in ((3, 6, *(side,) * n), (1, 6, *(3,) * n), (4, 6, *(1,) * n), (0, 6, *(1,) * n), (6, *(side,) * n)):
        x = torch.randn(*shape, dtype=torch.float64)
        if n == 2 and len(shape) == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = model(x1)
        expected = dense._conv_forward(x2, w, dense.bias)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        g = torch.randn_like(y)
        y.backward(g)
        expected.backward(g)
        torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-10, atol=1e-10)
        delta = model.layer.deltas("default")["weight"]
        if kind is dw.LoRA:
            torch.testing.assert_close(delta.A.grad, 1.5 * delta.B.T @ w.grad.flatten(1))
            torch.testing.assert_close(delta.B.grad, 1.5 * w.grad.flatten(1) @ delta.A.T)
        model.zero_grad()
        w.grad = None


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_conv_forward_of_a_layers_own_is_called_and_what_it_keeps_is_not_written_to(kernel_size):
    layer = nn.Conv2d(3, 5, kernel_size)
    layer._conv_forward = types.MethodType(lambda s, x, w, b: torch.exp(nn.functional.conv2d(x, w, b)), layer)
    model = Wrapped(layer).double()
    shaken(dw.attach(model, dw.LoRA(rank=2, alpha=3, dropout=0.1), targets=["layer"]))
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    delta = model.layer.deltas("default")["weight"]
    change = 1.5 * (delta.B @ delta.A).view(layer.weight.shape)
    model.eval()
    if select.KERNEL < 0:  # by factors: the layer's own beside the change
        expected = layer._conv_forward(x, layer.weight, layer.bias) + nn.functional.conv2d(x, change)
    else:
        expected = layer._conv_forward(x, layer.weight + change, layer.bias)
    torch.testing.assert_close(model(x), expected)
    model.train()
    torch.autograd.gradcheck(lambda x: (torch.manual_seed(0), model(x))[1], (x,), fast_mode=True)


def test_tracers_and_exporters_keep_the_number_of_samples_open():
    model = nn.Sequential(nn.Conv2d(3, 300, 3, padding=1), nn.ReLU(True), nn.Conv2d(300, 300, 1), nn.Conv2d(300, 9, 3))
    shaken(dw.attach(model, dw.LoRA(rank=4), targets=["0", "2", "3"]))
    x, more = torch.randn(2, 3, 12, 12), torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        model.eval()
        expected = model(more)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        places = {2: torch.export.Dim("height", min=4, max=40), 3: torch.export.Dim("width", min=4, max=40)}
        torch.export.export(model, (x,), dynamic_shapes=(places,))
        for found in (exported(more), torch.jit.trace(model, x)(more)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(make_fx(model)(x)(x), model(x), rtol=1e-4, atol=1e-4)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert model(torch.empty(2, 3, 12, 12)).shape == (2, 9, 10, 10)


def test_what_a_subclass_keeps_of_its_output_is_not_written_to():
    class Squared(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            y = super()._conv_forward(x, weight, bias)
            return torch.exp(y)  # keeps what it gives

    model = Wrapped(Squared(3, 5, 3)).double()
    shaken(dw.attach(model, dw.LoRA(rank=2, dropout=0.1), targets=["layer"]))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: (torch.manual_seed(0), model(x))[1], (x,))


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
