"""Large frozen linear layers beside adapted ones: same numbers, the faster library, and nothing left behind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deltaw as dw
from deltaw.core.beside import FrozenLinear
from deltaw.core.host import Host
from deltaw.model import beside
from deltaw.ops import matmul
from tests.unit.ops.test_matmul import present

pytestmark = present


@pytest.fixture(autouse=True)
def _slow_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where the rule takes oneDNN."""
    monkeypatch.setattr(matmul, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(beside, "mkl_is_slow", lambda: True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.up, self.norm = nn.Linear(96, 128), nn.Linear(128, 160), nn.LayerNorm(160)
        self.small, self.head = nn.Linear(160, 8), nn.Linear(160, 300, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.relu(self.up(torch.relu(self.low(x)))))
        return self.head(h) + self.small(h).sum(-1, keepdim=True)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(200, 96, generator=torch.Generator().manual_seed(1))


def moved(net: Net) -> Net:
    with torch.no_grad():
        net.low.adapters.default.weight.B.normal_(std=0.1)  # type: ignore[union-attr]
    return net


def test_only_large_frozen_layers_and_only_while_an_adapter_is_there(net: Net) -> None:
    before = str(net)
    dw.attach(net, dw.LoRA(rank=4), targets=["low"])
    assert [type(m) for m in (net.up, net.head)] == [FrozenLinear] * 2
    assert type(net.small) is nn.Linear
    dw.attach(net, dw.LoRA(rank=4), targets=["up", "low"], name="second")
    assert isinstance(net.up, Host)
    dw.detach(net, "second")
    assert type(net.up) is FrozenLinear
    dw.detach(net)
    assert str(net) == before
    assert all(type(m) is nn.Linear and "told_by" not in m.__dict__ for m in (net.low, net.up, net.head))


def test_a_layer_that_trains_is_left_alone(net: Net) -> None:
    dw.attach(net, dw.LoRA(rank=4), targets=["low"], freeze=False)
    assert type(net.up) is nn.Linear
    net.up.requires_grad_(False)
    dw.attach(net, dw.LoRA(rank=4), targets=["low"], name="second", freeze=False)
    assert type(net.up) is FrozenLinear
    net.up.requires_grad_(True)
    net(X).sum().backward()
    assert net.up.weight.grad is not None
    assert net.up.bias.grad is not None


def test_fresh_silent_and_merged_adapters_change_no_bit(net: Net) -> None:
    plain = net(X)
    dw.attach(net, dw.LoRA(rank=4), targets=["low"])
    assert torch.equal(net(X), plain)
    moved(net)
    assert not torch.equal(net(X), plain)
    with dw.disabled(net):
        assert torch.equal(net(X), plain)
    changed = net(X)
    dw.merge(net)
    reference = Net()
    reference.load_state_dict({k: v for k, v in net.state_dict().items() if "adapters" not in k})
    assert torch.equal(net(X), reference(X))
    torch.testing.assert_close(net(X), changed, rtol=1e-4, atol=1e-5)


def test_outputs_and_gradients_are_those_of_plain_layers(net: Net) -> None:
    moved(dw.attach(net, dw.LoRA(rank=4), targets=["low"]))  # type: ignore[arg-type]
    wide = copy.deepcopy(net).double()
    x, x_wide = X.clone().requires_grad_(), X.double().requires_grad_()
    noise = torch.randn(200, 300, generator=torch.Generator().manual_seed(2))
    (net(x) * noise).sum().backward()
    (wide(x_wide) * noise).sum().backward()
    torch.testing.assert_close(net(X).double(), wide(X.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x_wide.grad, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
    ours, exact = (m.low.adapters.default.weight.A.grad for m in (net, wide))  # type: ignore[union-attr]
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-3)


def test_copies_files_and_other_precisions(net: Net) -> None:
    moved(dw.attach(net, dw.LoRA(rank=4), targets=["low"]))  # type: ignore[arg-type]
    twin = copy.deepcopy(net)
    assert twin.head.told_by is twin.low
    assert torch.equal(twin(X), net(X))
    assert sorted(k for k in net.state_dict() if k.startswith("head")) == ["head.weight"]
    half = copy.deepcopy(net).bfloat16()
    half(X.bfloat16()).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(X).dtype == torch.bfloat16
    dw.quantize(net, dw.Int8(), targets=["up"])
    assert isinstance(net.up, Host)
    assert torch.isfinite(net(X)).all()


def test_second_derivatives_pass(net: Net) -> None:
    dw.attach(net, dw.LoRA(rank=4), targets=["low"])
    h = torch.randn(200, 160, requires_grad=True)
    (g,) = torch.autograd.grad(net.head(h * h).sum(), h, create_graph=True)
    (second,) = torch.autograd.grad(g.sum(), h)
    torch.testing.assert_close(second, 2 * net.head.weight.sum(0).expand_as(h), rtol=1e-4, atol=1e-4)


def test_compilers_and_traces_see_a_plain_layer(net: Net) -> None:
    moved(dw.attach(net, dw.LoRA(rank=4), targets=["low"]))  # type: ignore[arg-type]
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), net(X), rtol=1e-4, atol=1e-5)
    compiled(X).sum().backward()
    traced = torch.fx.symbolic_trace(net.head)
    torch.testing.assert_close(traced(torch.ones(3, 160)), net.head(torch.ones(3, 160)))


def test_pickles(net: Net, tmp_path: Path) -> None:
    moved(dw.attach(net, dw.LoRA(rank=4), targets=["low"]))  # type: ignore[arg-type]
    torch.save(net, tmp_path / "net.pt")
    again = torch.load(tmp_path / "net.pt", weights_only=False)
    assert torch.equal(again(X), net(X))
    assert again.head.told_by is again.low
