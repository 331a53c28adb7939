"""VeRA, LoHa, LoKr, IA3, Diff and Rows beyond the laws."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deltaw as dw
from deltaw.core.adapter import Adapter, Change
from deltaw.core.variant import Site
from deltaw.variants.lokr import divided


def delta(model: nn.Module, path: str = "0", site: str = "weight"):
    return model.get_submodule(path).deltas("default")[site]


# ---- VeRA


def test_vera_layers_share_their_projections_also_after_loading():
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model = dw.attach(copy.deepcopy(base), dw.VeRA(rank=5), targets=["0", "1", "2"])
    again = dw.install(base, dw.get(model))
    for m in (model, again):
        assert delta(m, "0").A.data_ptr() == delta(m, "1").A.data_ptr() == delta(m, "2").A.data_ptr()
        assert delta(m, "0").B.data_ptr() == delta(m, "1").B.data_ptr() != delta(m, "2").B.data_ptr()
        assert torch.equal(delta(m, "0").B[:4], delta(m, "2").B)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 3 * 5 + 8 + 8 + 4


def test_vera_draws_from_its_own_seed_only():
    def A(seed: int) -> torch.Tensor:
        before = torch.get_rng_state()
        made = dw.VeRA(rank=4, seed=seed).create(Site((6, 9)), {}).A
        assert torch.equal(torch.get_rng_state(), before)
        return made

    assert torch.equal(A(0), A(0))
    assert not torch.equal(A(0), A(1))


# ---- LoKr


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [(256, -1, (16, 16)), (128, -1, (8, 16)), (127, -1, (1, 127)), (128, 4, (4, 32)), (1, -1, (1, 1)), (10, 4, (2, 5))],
)
def test_sides_are_divided_as_lycoris_divides_them(size, factor, expected):
    assert divided(size, factor) == expected


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), factor=st.one_of(st.just(-1), st.integers(1, 64)))
def test_sides_multiply_to_the_size(size, factor):
    small, large = divided(size, factor)
    assert small * large == size


def test_lokr_entries_are_those_of_the_formula():
    torch.manual_seed(0)
    made = dw.LoKr(rank=1, alpha=3, split=(2, 3), whole="C").create(Site((8, 15), torch.float64), {})
    with torch.no_grad():
        for p in made.parameters():
            p.normal_()
    C, D = made.C, made.D_left @ made.D_right
    assert C.shape == (2, 3)
    assert D.shape == (4, 5)
    change = made.delta_weight(torch.empty(8, 15))
    for i, k, j, l in [(0, 0, 0, 0), (1, 3, 2, 4), (1, 0, 0, 3), (0, 2, 1, 1)]:
        assert float(change[i * 4 + k, j * 5 + l].detach()) == pytest.approx(3 * float((C[i, j] * D[k, l]).detach()))


def test_lokr_refuses_what_does_not_divide_and_stacks():
    with pytest.raises(dw.errors.ConfigError, match=r"split=\(3, 2\) does not divide a weight \(8, 8\)"):
        dw.attach(nn.Sequential(nn.Linear(8, 8)), dw.LoKr(split=(3, 2)))
    with pytest.raises(dw.errors.TargetError, match=r"use dw\.LoRA"):
        dw.LoKr().create(Site((2, 8, 8)), {})
    made = dw.LoKr(rank=1, split=(4, 2)).create(Site((8, 8)), {}).state_dict()
    with pytest.raises(dw.errors.AdapterError, match="give split="):
        dw.LoKr(rank=1).matrix_shape(made)


# ---- IA3


def test_ia3_is_made_of_one_vector_and_needs_the_base_for_its_shape():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6))
    model = dw.attach(copy.deepcopy(base), {"0": dw.IA3(), "1": dw.IA3(of="input")})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    adapter = dw.get(model)
    assert [tuple(c.tensors["l"].shape) for c in adapter.changes.values()] == [(5,), (5,)]
    x = torch.randn(3, 7)
    assert torch.equal(dw.install(copy.deepcopy(base), adapter)(x), model(x))
    change = adapter.changes["0.weight"]
    assert change.matrix_shape == (5, -1)
    torch.testing.assert_close(
        change.delta_weight(base[0].weight.detach()), (change.tensors["l"] - 1)[:, None] * base[0].weight.detach()
    )
    with pytest.raises(ValueError, match="pass `weight`"):
        change.delta_weight()
    other = nn.Sequential(nn.Linear(7, 4), nn.Linear(4, 6))
    with pytest.raises(dw.errors.AdapterError, match="does not fit"):
        dw.install(other, adapter)


# ---- Diff and Rows


def test_diff_adds_and_takes_weights():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 3))
    D = torch.randn(3, 4)
    model = copy.deepcopy(base)
    for name in ("a", "b"):
        dw.install(model, Adapter({"0.weight": Change(dw.Diff(), {"diff": D})}), name=name)
    x = torch.randn(2, 4)
    with dw.use(model, {"a": 0.75, "b": -0.25}):
        expected = nn.functional.linear(x, base[0].weight + 0.5 * D, base[0].bias)
        torch.testing.assert_close(model(x), expected)


def test_diff_keeps_running_statistics_as_copies():
    torch.manual_seed(0)
    model = dw.attach(nn.Sequential(nn.BatchNorm1d(3)), dw.Diff(), targets=["0"])
    model.train()
    model(torch.randn(8, 3) + 5)
    adapter = dw.get(model)
    kinds = {k: c.variant.kind for k, c in adapter.changes.items()}
    assert kinds["0.weight"] == "diff"
    assert kinds["0.running_mean"] == "full"
    assert float(adapter.changes["0.running_mean"].tensors["value"].mean()) > 0.3
    assert not model[0].running_mean.any()


def test_rows_trains_the_chosen_tokens_only():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 4))
    before = base[0].weight.detach().clone()
    model = dw.attach(copy.deepcopy(base), dw.Rows(indices=(7, 2)), targets=["0"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8
    tokens = torch.arange(9)
    assert torch.equal(model(tokens), before)
    model(tokens).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    after = model(tokens).detach()
    moved = (after != before).any(1).nonzero().flatten().tolist()
    assert moved == [2, 7]
    torch.testing.assert_close(after[[7, 2]], before[[7, 2]] * 0.8)
    adapter = dw.get(model)
    assert adapter.changes["0.weight"].matrix_shape == (-1, 4)
    assert torch.equal(dw.install(copy.deepcopy(base), adapter)(tokens), after)


def test_rows_refuses_indices_that_cannot_be():
    for bad, word in [
        ((), "name the rows"),
        ((1, -1), "counted from 0"),
        ((3, 3), "row 3 twice"),
        ((True,), "counted"),
    ]:
        with pytest.raises(dw.errors.ConfigError, match=word):
            dw.Rows(indices=bad)
    with pytest.raises(dw.errors.TargetError, match="no row 9"):
        dw.attach(nn.Sequential(nn.Embedding(9, 4)), dw.Rows(indices=(0, 9)), targets=["0"])


def test_tensors_of_the_wrong_shape_are_refused():
    bad = torch.zeros(3, 3)
    for variant, tensors in [
        (dw.LoHa(rank=2), {"A1": bad, "B1": bad, "A2": bad, "B2": bad}),
        (dw.VeRA(rank=2), {"A": bad, "B": bad, "b": bad[0], "d": bad[0]}),
        (dw.AdaLoRA(rank=9), {"A": bad, "B": bad, "E": bad[0]}),
        (dw.IA3(), {"l": torch.zeros(2, 2, 2)}),
        (dw.Rows(indices=(1,)), {"value": bad}),
        (dw.LoKr(rank=2), {"C": bad, "D_left": bad, "D_right": bad}),
    ]:
        with pytest.raises(dw.errors.AdapterError, match=type(variant).__name__):
            variant.matrix_shape(tensors)
