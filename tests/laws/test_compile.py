"""torch.compile(fullgraph=True): forward and backward without graph breaks, adapters switched and replaced afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import deltaw as dw

from .conftest import shaken


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


def compiled_of(*variants, dtype=torch.float64) -> tuple[nn.Module, nn.Module]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = Model().to(dtype)
    for name, variant in zip("abcdef", variants):
        dw.attach(model, variant, targets=["first", "second"], train=["norm"], name=name)
    return shaken(model), torch.compile(model, fullgraph=True, backend="aot_eager")


def same_forward_and_backward(model: nn.Module, compiled: nn.Module, x: torch.Tensor, **tolerance) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    found, expected = compiled(x), model(x)
    torch.testing.assert_close(found, expected, **tolerance)
    if expected.requires_grad:
        pairs = (torch.autograd.grad(y.square().sum(), trained, allow_unused=True) for y in (found, expected))
        for f, e in zip(*pairs):
            assert (f is None) == (e is None)
            if f is not None:
                torch.testing.assert_close(f, e, **tolerance)


@pytest.mark.parametrize("variant", [dw.LoRA(rank=2), dw.DoRA(rank=2), dw.LoRA(rank=2, bias=True)], ids=repr)
def test_no_graph_break_and_no_stale_adapter(variant):
    model, compiled = compiled_of(variant, dw.LoRA(rank=3))
    x = torch.randn(5, 6, dtype=torch.float64)
    for choice in ("a", "b", None, ["a", "b"], {"a": 0.5, "b": -1.0}, "b", "a"):
        with dw.use(model, choice):
            same_forward_and_backward(model, compiled, x)
    for choice in ("a", "b"):
        dw.activate(compiled, choice)
        same_forward_and_backward(model, compiled, x)
    assert not counters["graph_break"]


def test_dropout_is_drawn_anew_and_agrees_between_forward_and_backward():
    model, compiled = compiled_of(dw.LoRA(rank=2, dropout=0.5))
    x = torch.randn(50, 6, dtype=torch.float64)
    torch.manual_seed(1)
    once, twice = compiled(x), compiled(x)
    assert not torch.equal(once, twice)
    delta = model.first.deltas("default" if "default" in model.first.adapters else "a")["weight"]
    with torch.no_grad():
        delta.A.zero_()
    y = compiled(x)
    (gradient,) = torch.autograd.grad(y.sum(), delta.A)
    assert bool(gradient.any())
    assert not counters["graph_break"]


def test_replaced_tensors_are_served_without_compiling_again():
    model, compiled = compiled_of(dw.LoRA(rank=4, alpha=6))
    other, _ = compiled_of(dw.LoRA(rank=2, alpha=3.5))
    shaken(other, seed=5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 6, dtype=torch.float64)
    compiled(x)
    graphs = counters["stats"]["unique_graphs"]
    tensors = dict(model.named_parameters())
    dw.replace(compiled, "a", dw.get(other, "a"))
    torch.testing.assert_close(compiled(x), other(x))
    torch.testing.assert_close(model(x), other(x))
    assert counters["stats"]["unique_graphs"] == graphs
    assert all(p is tensors[n] for n, p in model.named_parameters())
    same_forward_and_backward(model, compiled, x)


def test_rows_of_a_compiled_model_are_split_at_its_entry():
    model, compiled = compiled_of(dw.LoRA(rank=2), dw.DoRA(rank=2))
    x, choices = torch.randn(4, 6, dtype=torch.float64), ["a", None, "b", "a"]
    with dw.rows(model, choices):
        expected = model(x)
    for _ in range(2):
        with dw.rows(compiled, choices) as report:
            found = compiled(x)
        assert report.strategy == "split"
        torch.testing.assert_close(found, expected)
    model.second.compile(backend="aot_eager")
    with dw.rows(model, choices) as report:
        torch.testing.assert_close(model(x), expected)
    assert report.strategy == "split"
    assert not counters["graph_break"]


def test_merged_detached_and_attached_again():
    model, compiled = compiled_of(dw.LoRA(rank=2))
    x = torch.randn(5, 6, dtype=torch.float64)
    adapted = compiled(x).detach()
    dw.merge(compiled)
    torch.testing.assert_close(compiled(x), adapted)
    dw.unmerge(compiled)
    torch.testing.assert_close(compiled(x), adapted)
    adapter = dw.get(compiled, "a")
    dw.detach(compiled)
    plain = model(x).detach()
    torch.testing.assert_close(compiled(x), plain)
    assert not torch.allclose(plain, adapted)
    dw.install(compiled, adapter, "a")
    torch.testing.assert_close(compiled(x), adapted)


def test_autocast():
    model, compiled = compiled_of(dw.LoRA(rank=2), dtype=torch.float32)
    x = torch.randn(5, 6)
    full = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        assert found.dtype == torch.bfloat16
        same_forward_and_backward(model, compiled, x, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found.float(), full, rtol=5e-2, atol=5e-2)
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_inductor():
    model, _ = compiled_of(dw.LoRA(rank=2), dw.DoRA(rank=2))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 6, dtype=torch.float64)
    for choice in ("a", "b", None):
        with dw.use(model, choice):
            same_forward_and_backward(model, compiled, x)
    assert not counters["graph_break"]
