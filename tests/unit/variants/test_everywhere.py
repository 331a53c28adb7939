"""Every variant in the surroundings of real training: compiled, under autocast, over a 16-bit base, copied and pickled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import deltaw as dw

VARIANTS = [
    dw.LoRA(rank=2, init="pissa", rank_dropout=0.5, module_dropout=0.5),
    dw.DoRA(rank=2, module_dropout=0.5),
    dw.LoRAFA(rank=2),
    dw.VeRA(rank=5),
    dw.LoHa(rank=2, rank_dropout=0.5),
    dw.LoKr(rank=2),
    dw.IA3(),
    dw.IA3(of="input"),
    dw.AdaLoRA(rank=4, target=2, total=9),
    dw.Diff(),
    dw.Rows(indices=(0,)),
]


def adapted(variant, dtype=torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    dw.attach(model, variant, targets=["0", "2"])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model, torch.randn(3, 16, dtype=dtype)


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_compiles_without_a_graph_break(variant):
    torch._dynamo.reset()
    model, x = adapted(variant)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x))


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_forward_mode_derivatives_are_those_of_the_gradient(variant):
    model, x = adapted(variant, torch.float64)
    model.eval()
    at = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    along = {name: torch.randn_like(p) for name, p in at.items()}
    by_gradient = sum((g * along[name]).sum() for name, g in torch.func.grad(loss)(at).items())
    torch.testing.assert_close(torch.func.jvp(loss, (at,), (along,))[1], by_gradient)


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_over_a_16_bit_base_and_under_autocast(variant):
    model, x = adapted(variant, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    wide, x = adapted(variant)
    wide.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(wide(x).float(), wide(x.float()).float(), rtol=0.1, atol=0.1)
        assert wide(x).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_copies_and_pickles_compute_the_same(variant):
    model, x = adapted(variant)
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_what_get_gives_installs_to_the_same_outputs(variant):
    model, x = adapted(variant)
    adapter = dw.get(model.eval())
    again = dw.install(dw.detach(copy.deepcopy(model)), adapter).eval()
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-6)
    if not getattr(variant, "rewrites_base", False):
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_printing_a_variant_prints_the_call_that_makes_it(variant):
    assert eval(repr(variant), vars(dw) | {type(variant).__name__: type(variant)}) == variant
