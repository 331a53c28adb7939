"""Compact saves: the same loss to the bit, gradients within the stated rounding, half of what is kept."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltaw as dw
from deltaw.ops import select
from deltaw.ops.compact import Compact, compact, hooks_in_force
from deltaw.ops.narrow import Packed


class Block(nn.Module):
    """Norm, attention, norm, GELU: what a transformer's layer keeps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.reshape(8, 100, 2, 32).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(8, 100, 64))
        y: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return y


def model(**options: object) -> nn.Module:
    found = nn.Sequential(Block(), Block())
    dw.attach(found, dw.LoRA(rank=4, **options), targets="all-linear")  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in found.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=noise) * 0.1)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_loss_to_the_bit_and_gradients_within_a_rounding_of_what_they_are_made_of(dropout: float) -> None:
    net, x = model(dropout=dropout), torch.randn(8, 100, 64)
    losses, grads = [], []
    for kept in (False, True):
        torch.manual_seed(5)
        if kept:
            with compact(net):
                loss = net(x).square().mean()
        else:
            loss = net(x).square().mean()
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad]))
    assert torch.equal(*losses)
    for exact, rounded in zip(*grads):
        assert 0 < (exact - rounded).norm() <= 2.0**-7 * exact.norm()


@pytest.mark.parametrize("limit", [-1, 1 << 62])
def test_an_output_with_a_gain_to_the_bit_fused_and_composed(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SMALL", "LIGHT"):
        monkeypatch.setattr(select, name, limit)
    net, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(64, 64)
    dw.attach(net, dw.DoRA(rank=2), targets=["0"])
    nn.init.normal_(net.get_parameter("0.adapters.default.weight.B"), std=0.1)
    with compact(net):
        y = net(x)
    assert torch.equal(y, net(x))


def kept_bytes(net: nn.Module, x: Tensor, packed: bool) -> int:
    """Bytes that live only for the backward, each storage once."""
    own = {p.untyped_storage()._cdata for p in (*net.parameters(), *net.buffers(), x)}
    found: dict[int, int] = {}
    hooks = Compact(own) if packed else None

    def pack(t: Tensor) -> object:
        kept = t if hooks is None else hooks.pack(t)
        storage = (kept if isinstance(kept, Tensor) else kept[0].kept).untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
            held.append(storage)
            held.append(kept)
        return kept

    held: list[object] = []
    unpack = (lambda t: t) if hooks is None else hooks.unpack
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        net(x)
    return sum(found.values())


def test_about_half_is_kept() -> None:
    net, x = model(), torch.randn(8, 100, 64)
    assert kept_bytes(net, x, packed=True) <= 0.6 * kept_bytes(net, x, packed=False)


@pytest.mark.parametrize("packed", [False, True])
def test_the_thin_products_of_adapters_too(packed: bool) -> None:
    net, x = model(dropout=0.1), torch.randn(8, 100, 64)
    layer = net.get_submodule("0.up")
    with compact(net) if packed else nullcontext():
        y = layer(x)
    thin = [t for t in y.grad_fn.saved_tensors if t is not None and t.shape == (800, 4)]
    assert [t.dtype for t in thin] == [torch.bfloat16 if packed else torch.float32]


def test_a_tensor_that_two_operations_save_is_packed_once_and_anew_after_it_was_written_to() -> None:
    hooks, x = Compact(set()), torch.randn(100, 64)
    first, second, view = hooks.pack(x), hooks.pack(x), hooks.pack(x.view(64, 100).t())
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    assert isinstance(view, tuple)
    assert first[0] is second[0] is view[0]
    assert torch.equal(hooks.unpack(view), x.bfloat16().float().view(64, 100).t())
    again = hooks.unpack(first)
    third = hooks.pack(again)
    assert isinstance(third, tuple)
    assert third[0] is first[0], "what was widened in forward is known"
    x.add_(1)
    written = hooks.pack(x)
    assert isinstance(written, tuple)
    assert written[0] is not first[0]


def test_an_address_that_is_used_again_is_not_mistaken() -> None:
    hooks = Compact(set())
    packs: list[Packed] = []
    for value in range(20):
        kept = hooks.pack(torch.full((100, 64), float(value)))  # freed at once: the next one may lie in its place
        assert isinstance(kept, tuple)
        packs.append(kept[0])
        assert torch.equal(hooks.unpack(kept), torch.full((100, 64), float(value)))
    assert len({id(p) for p in packs}) == 20


def test_what_is_kept_as_it_is() -> None:
    weight = nn.Parameter(torch.randn(100, 100))
    hooks = Compact({weight.untyped_storage()._cdata})
    large = torch.randn(100, 1000)
    assert isinstance(hooks.pack(large), tuple)
    for same in (weight, weight.t(), torch.randn(60, 100), large.double(), large.long(), large[:50], torch.randn(3)):
        assert hooks.pack(same) is same


def test_the_hooks_end_with_the_context_also_after_an_error() -> None:
    net = model()
    with pytest.raises(RuntimeError), compact(net):
        net(torch.randn(3, 3))
    assert hooks_in_force() is None


def test_nested_and_entered_again() -> None:
    net = model()
    twice = compact(net)
    with twice:
        with twice:
            pass
        assert hooks_in_force() is not None
    assert hooks_in_force() is None
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_scripted_layers_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4))).requires_grad_(False)
    with compact(net):
        net(torch.randn(2, 4))


def test_nothing_stays_behind_where_entering_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    monkeypatch.setattr(net[1], "register_forward_pre_hook", lambda hook: 1 / 0)
    with pytest.raises(ZeroDivisionError), compact(net):
        pass
    assert hooks_in_force() is None
    assert not net[0]._forward_pre_hooks
