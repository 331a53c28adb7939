"""Inputs that are made again instead of kept: the same gradients, less kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.core.variant import LowRank
from deltaw.ops import adapted_linear, adapted_linear_reference, recompute

SHAPE = (4, 200, 32)


def norm(z: Tensor) -> Tensor:
    torch.manual_seed(1)
    return F.layer_norm(z, (32,), torch.randn(32, dtype=z.dtype), torch.randn(32, dtype=z.dtype))


PRODUCERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "gate": lambda z: F.silu(z) * (z + 1),
    "rms norm": lambda z: torch.linspace(-1, 1, 32, dtype=z.dtype) * (z * z.pow(2).mean(-1, keepdim=True).rsqrt()),
    "rms norm, scale behind": lambda z: F.rms_norm(z, (32,), torch.linspace(-1, 1, 32, dtype=z.dtype)),
    "norm": norm,
    "norm without affine": lambda z: F.layer_norm(z, (32,)),
    "norm without shift": lambda z: F.layer_norm(z, (32,), torch.linspace(-1, 1, 32, dtype=z.dtype)),
    "norm without scale": lambda z: F.layer_norm(z, (32,), None, torch.linspace(-1, 1, 32, dtype=z.dtype)),
    "kept: written to behind autograd's back": lambda z: blanked(F.gelu(z)),
    "kept: relu": F.relu,
    "kept: by a number": lambda z: z * 3,
    "kept: a view": lambda z: F.gelu(z).transpose(0, 1),
}


def blanked(x: Tensor) -> Tensor:
    with torch.no_grad():
        x[..., :8] = 0
    return x


def attended(z: Tensor) -> Tensor:
    heads = z.view(4, 200, 4, 8).transpose(1, 2).contiguous()  # contiguous heads: what attention gives must be copied
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).contiguous().reshape(4, 200, 32)


PRODUCERS["attention"] = attended


def attended_as_transformers(z: Tensor) -> Tensor:
    heads = z.view(4, 200, 4, 8).transpose(1, 2).contiguous()
    out = F.scaled_dot_product_attention(heads, heads, heads)
    return out.reshape(4, -1, 200, 8).transpose(1, 2).contiguous().reshape(4, 200, 32)


def attended_otherwise(z: Tensor) -> Tensor:
    heads = z.view(4, 200, 4, 8).transpose(1, 2).contiguous()
    out = F.scaled_dot_product_attention(heads, heads, heads)  # (4, 4, 200, 8)
    return out.reshape(4, 2, 400, 8).transpose(1, 2).contiguous().reshape(4, 200, 32)  # other rows side by side


PRODUCERS["attention with an idle reshape"] = attended_as_transformers
PRODUCERS["kept: other heads than attention's"] = attended_otherwise


def factors(dtype: torch.dtype = torch.float64) -> list[LowRank]:
    g = torch.Generator().manual_seed(2)
    return [
        LowRank(
            torch.randn(3, 32, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
            torch.randn(24, 3, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),
            0.5,
        )
        for _ in range(3)
    ]


def weight_and_start() -> tuple[torch.Tensor, torch.Tensor]:
    """W (24, 32), and what a producer makes x from."""
    return torch.randn(24, 32, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", PRODUCERS)
def test_the_gradients_are_those_of_a_kept_input(name: str) -> None:
    weight, start = weight_and_start()
    results = []
    for op in (adapted_linear, adapted_linear_reference):
        terms = factors()
        x = PRODUCERS[name](start)
        made = recompute.recipe_of(x) is not None
        if made:
            x.grad_fn.metadata[recompute.KEY].readers -= 1  # the question itself reads nothing
        assert made == (not name.startswith("kept"))
        loss = sum(op(x, weight, None, [t], training=True).square().sum() for t in terms)
        results.append(torch.autograd.grad(loss, [start, *(t.A for t in terms), *(t.B for t in terms)]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [n for n in PRODUCERS if not n.startswith(("attention", "kept"))])
def test_second_derivatives_go_through_an_input_that_is_made_again(name: str) -> None:
    """Attention has none in torch."""
    weight, start = weight_and_start()
    results = []
    for op in (adapted_linear, adapted_linear_reference):
        terms = factors()
        x = PRODUCERS[name](start)
        loss = sum(op(x, weight, None, [t], training=True).pow(3).mean() for t in terms)
        inputs = [start, *(t.A for t in terms), *(t.B for t in terms)]
        firsts = torch.autograd.grad(loss, inputs, create_graph=True)
        results.append([*firsts, *torch.autograd.grad(sum(f.square().sum() for f in firsts), inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm()


@pytest.mark.parametrize("name", ["gelu", "norm"])
def test_a_look_at_one_readers_gradient_leaves_the_second_derivatives_of_the_others(name: str) -> None:
    weight, start = weight_and_start()
    results = []
    for look in (True, False):
        terms = factors()
        x = PRODUCERS[name](start)
        one, other = (adapted_linear(x, weight, None, [t], training=True).pow(3).mean() for t in terms[:2])
        if look:
            torch.autograd.grad(one, terms[0].A, retain_graph=True)
        firsts = torch.autograd.grad(other, [start, terms[1].A], create_graph=True)
        results.append([*firsts, *torch.autograd.grad(sum(f.square().sum() for f in firsts), [start, terms[1].A])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "name", ["gelu", "silu", "gate", "rms norm", "norm", "attention", "attention with an idle reshape"]
)
def test_what_is_made_again_is_the_input(name: str) -> None:
    x = PRODUCERS[name](torch.randn(SHAPE, requires_grad=True))
    recipe, tensors = recompute.recipe_of(x) or pytest.fail("no recipe")
    with torch.no_grad():
        again = recipe.take(tensors)
    if name == "norm":
        torch.testing.assert_close(again, x.detach(), rtol=4e-6, atol=4e-6)
    else:
        assert torch.equal(again, x)


def test_the_input_is_not_kept_alive() -> None:
    z = torch.randn(SHAPE, requires_grad=True)
    saved: list[int] = []
    x = F.gelu(z)
    y = adapted_linear(x, torch.randn(24, 32), None, factors(torch.float32), training=True)
    node = y.grad_fn
    while node is not None and not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    assert node is not None
    saved = [t.data_ptr() for t in node.saved_tensors if t is not None]
    assert z.data_ptr() in saved
    assert x.data_ptr() not in saved


def test_readers_of_one_input_share_one_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setitem(
        recompute.PRODUCERS,
        "SiluBackward0",
        lambda node: ((node._saved_self,), lambda z: (calls.append(1), F.silu(z))[1], lambda z: None),
    )
    x = F.silu(torch.randn(SHAPE, requires_grad=True))
    weight = torch.randn(24, 32)
    loss = sum(adapted_linear(x, weight, None, [t], training=True).sum() for t in factors(torch.float32))
    loss.backward(retain_graph=True)
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    assert x.grad_fn.metadata[recompute.KEY].made is None


def test_under_saved_tensor_hooks_the_input_is_kept() -> None:
    x = F.gelu(torch.randn(SHAPE, requires_grad=True))
    with torch.autograd.graph.save_on_cpu():
        assert recompute.recipe_of(x) is None
    with torch.no_grad():
        assert recompute.recipe_of(x) is None
    assert recompute.recipe_of(x[:1, :1]) is None


def test_a_producer_whose_input_was_overwritten_is_left_alone() -> None:
    z = torch.randn(SHAPE, requires_grad=True) * 2
    x = F.gelu(z)
    z.add_(1)
    assert recompute.recipe_of(x) is None


def test_checkpointing_through_a_producer() -> None:
    terms, weight = factors(), torch.randn(24, 32, dtype=torch.float64)
    start = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)

    def block(z: Tensor) -> Tensor:
        return adapted_linear(F.gelu(z), weight, None, terms, training=True)

    expected = torch.autograd.grad(block(start).square().sum(), [start, terms[0].A])
    again = torch.utils.checkpoint.checkpoint(block, start, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), [start, terms[0].A]), expected)
