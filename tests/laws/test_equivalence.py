"""Law 1: the plain layer with W + ΔW(W) and b + Δb(b) gives the output of the adapted layer.
Law 2: a fresh adapter changes no output bit. Law 3: detach and unmerge lead all the way back."""

from __future__ import annotations

import pytest
import torch

from deltaw.core.host import Host
from deltaw.model.activate import disabled
from deltaw.model.attach import detach
from deltaw.model.merge import merge, unmerge
from tests.laws.conftest import adapted, built, cases, flat, shaken

ROUNDINGS = 2**-40
"""Relative to the largest output: float64 has 2^-53, and sums of some hundred products and a norm lie between."""


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.shape == y.shape
        if x.numel():
            size = max(float(x.abs().max()), 1.0) if x.is_floating_point() else 1.0
            assert float((x - y).abs().max()) <= ROUNDINGS * size


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize(("example", "variant"), cases())
def test_a_fresh_adapter_changes_no_bit(example, variant, mode):
    model, args = built(example)
    model.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        torch.manual_seed(5)
        before = flat(model(*args, **example.kwargs))
        adapted(model, variant)
        torch.manual_seed(5)
        after = flat(model(*args, **example.kwargs))
    for x, y in zip(before, after):
        if getattr(variant, "rewrites_base", False):
            close([x], [y])
        else:
            assert torch.equal(x, y)


@pytest.mark.parametrize(("example", "variant"), cases())
def test_adapted_equals_merged_and_back_to_the_bit(example, variant):
    model, args = built(example)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    classes = {n: type(m) for n, m in model.named_modules()}
    model.eval()
    base = flat(model(*args, **example.kwargs))
    shaken(adapted(model, variant))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = flat(model(*args, **example.kwargs))
    if out[0].numel():
        unmoved = all(torch.equal(x, y) for x, y in zip(out, base))
        assert not unmoved or getattr(variant, "partial", False), "the change has no effect"
    merge(model)
    close(flat(model(*args, **example.kwargs)), out)

    unmerge(model)
    assert all(torch.equal(x, y) for x, y in zip(flat(model(*args, **example.kwargs)), out))
    with disabled(model):
        assert all(torch.equal(x, y) for x, y in zip(flat(model(*args, **example.kwargs)), base))

    detach(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any(isinstance(m, Host) for m in model.modules())
    state = model.state_dict()
    assert list(state) == list(plain)
    assert all(torch.equal(state[k], plain[k]) for k in plain)
    assert all(torch.equal(x, y) for x, y in zip(flat(model(*args, **example.kwargs)), base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("example", "variant"), cases())
def test_merge_and_unmerge_in_every_precision(example, variant, dtype):
    model, _ = built(example, dtype)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    shaken(adapted(model, variant), size=0.01)
    report = merge(model)
    assert all(w.relative < 1 or w.largest < 1e-2 for w in report.weights)
    unmerge(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in plain.items())
