"""A 16-bit tensor that is widened block by block: the same bits as widened at once, and never wide as a whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import deltaw as dw
from deltaw.ops import narrow
from deltaw.ops.compact import Compact
from deltaw.ops.narrow import Narrow, View

KEEPS_ITS_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu of tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "square": lambda z: z * z,
}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[View]:
    """Small blocks; and the tensors that were widened as a whole."""
    seen: list[View] = []

    def widened(view: View) -> Tensor:
        seen.append(view)
        return plainly(view)

    plainly = View.widened
    monkeypatch.setattr(narrow, "BLOCK", 1024)
    monkeypatch.setattr(View, "widened", widened)
    return seen


def gradients(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Of a curved loss of `function`: under compact saves, and of the rounded input without."""
    hooks, found = Compact(set()), []
    for packed in (True, False):
        leaf = (z if packed else z.bfloat16().float()).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack) if packed else nullcontext():
            y = function(leaf)
        found += torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel()).view(y.shape))
    return found[0], found[1]


@pytest.mark.parametrize("name", KEEPS_ITS_INPUT)
def test_in_blocks_to_the_bit(name: str, at_once: list[View]) -> None:
    found, wanted = gradients(KEEPS_ITS_INPUT[name], torch.randn(70, 90))
    assert torch.equal(found, wanted)
    assert type(found) is Tensor
    assert not at_once


def test_another_order_of_the_entries_is_widened_at_once(at_once: list[View]) -> None:
    found, wanted = gradients(F.gelu, torch.randn(90, 70).t())
    assert torch.equal(found, wanted)
    assert len(at_once) == 1


def test_an_operation_without_a_loop_gets_it_widened() -> None:
    hooks, z = Compact(set()), torch.randn(70, 90)
    standing = hooks.unpack(hooks.pack(z))
    assert isinstance(standing, Narrow)
    assert (standing.shape, standing.dtype) == (z.shape, torch.float32)
    assert torch.equal(standing + 1, z.bfloat16().float() + 1)
    assert torch.equal(F.layer_norm(standing, (90,)), F.layer_norm(z.bfloat16().float(), (90,)))


def test_an_adapted_layer_that_will_make_its_input_again_widens_nothing_in_forward(at_once: list[View]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    dw.attach(net, dw.LoRA(rank=4), targets="all-linear")
    x = torch.randn(300, 64)
    with dw.compact(net):
        loss = net(x).square().mean()
    assert not at_once
    loss.backward()
    assert all(p.grad is not None and type(p.grad) is Tensor for p in net.parameters() if p.requires_grad)


def perceptron(targets: list[str], approximate: str = "none") -> tuple[nn.Sequential, Tensor]:
    """Linear, GELU, linear; adapted and moved."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(approximate), nn.Linear(256, 64))
    dw.attach(net, dw.LoRA(rank=4), targets=targets)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape))
    return net, torch.randn(300, 64) * 3


def gelu_input(net: nn.Sequential, x: Tensor) -> tuple[Tensor, View]:
    """The output of `net` under compact saves, and what GELU keeps for its backward."""
    kept: list[View] = []
    hook = net[1].register_forward_hook(lambda layer, inputs, y: kept.append(y.grad_fn._raw_saved_self.data))
    with dw.compact(net):
        y = net(x)
    hook.remove()
    return y, kept[0]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_byte_for_the_derivative_where_the_layer_behind_gelu_is_frozen(approximate: str) -> None:
    net, x = perceptron(["0"], approximate)
    trained = [p for p in net.parameters() if p.requires_grad]
    exact = torch.autograd.grad(net(x).square().mean(), trained)
    y, kept = gelu_input(net, x)
    assert kept.packed.kept.dtype == torch.uint8
    z = torch.linspace(-6, 6, 3000).bfloat16().float().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(z, approximate=approximate).sum(), z)
    assert slope.min() > -0.13
    assert slope.max() < 1.13
    for wanted, found in zip(exact, torch.autograd.grad(y.square().mean(), trained), strict=True):
        assert 0 < (wanted - found).norm() <= 2.0**-7 * wanted.norm()


def test_derivatives_are_off_by_what_is_said_and_0_and_1_not_at_all() -> None:
    net, _ = perceptron(["0"])
    z = torch.linspace(-9, 9, 300 * 256).bfloat16().float().view(300, 256).requires_grad_()
    with dw.compact(net):
        loss = net[2](net[1](z)) @ torch.ones(64)
    (found,) = torch.autograd.grad(loss.sum(), z)
    dy = net[2].weight.detach().sum(0)
    wide = z.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(wide).sum(), wide)
    assert ((found.double() / dy.double() - slope).abs() <= slope.abs().sqrt() / 178 + 3e-5).all()
    settled = z.detach().abs() > 5.5
    assert torch.allclose(found[settled].double(), (dy * slope.round())[settled], rtol=1e-4, atol=0)


@pytest.mark.parametrize("targets", [["2"], ["0", "2"]])
def test_z_is_kept_where_an_adapted_layer_makes_gelu_of_z_again(targets: list[str]) -> None:
    net, x = perceptron(targets)
    net[0].requires_grad_(True)  # so that GELU's backward runs
    _, kept = gelu_input(net, x)
    assert kept.packed.kept.dtype == torch.bfloat16


class Fork(nn.Module):
    """A GELU that a frozen and an adapted layer read, in this order or the other; the second perhaps in a part that is
    computed again."""

    def __init__(self, frozen_first: bool, again: bool) -> None:
        super().__init__()
        self.up, self.frozen, self.adapted = nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(256, 64)
        self.frozen_first, self.again = frozen_first, again

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.up(x))
        first, then = (self.frozen, self.adapted) if self.frozen_first else (self.adapted, self.frozen)
        return 2 * first(y) - (checkpoint(then, y, use_reentrant=True) if self.again else then(y))


@pytest.mark.parametrize("frozen_first", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_the_derivative_is_never_taken_for_the_input(frozen_first: bool, again: bool) -> None:
    torch.manual_seed(0)
    net, x = Fork(frozen_first, again), torch.randn(300, 64)
    dw.attach(net, dw.LoRA(rank=4), targets=["up", "adapted"])
    trained = [p for p in net.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.copy_(torch.randn(p.shape))
    found: list[list[Tensor]] = []
    for packed in (False, True):
        net.zero_grad()
        with dw.compact(net) if packed else nullcontext():
            net(x).square().mean().backward()  # inside: a part that is computed again is so under compact saves too
        found.append([p.grad.clone() for p in trained])
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded).norm() <= 2.0**-7 * exact.norm()  # two roundings to 8 bits


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_z_is_kept_where_it_is_not_finite(value: float) -> None:
    net, _ = perceptron(["0"])
    z = torch.randn(300, 256)
    z[7, 9] = value
    z.requires_grad_()
    (exact,) = torch.autograd.grad(net[2](net[1](z)).sum(), z)
    with dw.compact(net):
        y = net[1](z)
        loss = net[2](y).sum()
    assert y.grad_fn._raw_saved_self.data.packed.kept.dtype == torch.bfloat16
    (found,) = torch.autograd.grad(loss, z)
    assert torch.equal(found[7, 9].isfinite(), exact[7, 9].isfinite())


def test_units_that_are_almost_off_keep_their_gradients() -> None:
    net, _ = perceptron(["0"])
    z = torch.full((300, 256), -3.2).add_(torch.randn(300, 256) * 0.1).requires_grad_()
    found = []
    for packed in (True, False):
        with dw.compact(net) if packed else nullcontext():
            loss = (net[2](net[1](z)) @ torch.randn(64, generator=torch.Generator().manual_seed(1))).sum()
        found.append(torch.autograd.grad(loss, z)[0])
    assert (found[0] - found[1]).norm() <= 0.06 * found[1].norm()  # half a step at |d| = .0075, code 15 of the root's


def test_a_second_derivative_of_what_was_not_kept_is_an_error_that_says_so() -> None:
    net, _ = perceptron(["0"])
    z = torch.randn(300, 256, requires_grad=True)
    with dw.compact(net):
        loss = net[2](net[1](z)).square().sum()
    with pytest.raises(RuntimeError, match="only its derivative"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_codes_of_the_derivative_are_never_multiplied_as_if_they_were_the_input() -> None:
    net, _ = perceptron(["0"])
    saved: list[Tensor] = []
    net[1].register_forward_hook(lambda layer, inputs, y: saved.append(y))
    with dw.compact(net):
        _ = net[2](net[1](torch.randn(300, 256, requires_grad=True)))
    with pytest.raises(RuntimeError, match="only its derivative"):
        saved[0].grad_fn._saved_self * torch.ones(300, 256)


def test_differentiable_twice() -> None:
    hooks = Compact(set())
    z = torch.randn(70, 90, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        y = F.gelu(z)
    (first,) = torch.autograd.grad(y.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    rounded = z.detach().bfloat16().double().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(rounded).sum(), rounded, create_graph=True)
    (wanted,) = torch.autograd.grad(slope.sum(), rounded)
    assert torch.allclose(second.double(), wanted, atol=1e-4)  # fp32 beside float64; values reach 0.8
