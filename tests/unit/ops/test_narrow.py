"""A 16-bit tensor that is widened block by block: the same bits as widened at once, and never wide as a whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

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
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    dw.attach(net, dw.LoRA(rank=4), targets="all-linear")
    x = torch.randn(300, 64)
    with dw.compact(net):
        loss = net(x).square().mean()
    assert not at_once
    loss.backward()
    assert all(p.grad is not None and type(p.grad) is Tensor for p in net.parameters() if p.requires_grad)


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
