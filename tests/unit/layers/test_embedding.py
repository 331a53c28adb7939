"""Embeddings: max_norm without writing W, gradients of padding and frequency, sparse ones, scaled ones of HF."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaw as dw
from tests.laws.conftest import Wrapped, shaken

IDS = torch.tensor([[1, 4, 1], [0, 10, 4]])
VARIANTS = [dw.LoRA(rank=2), dw.DoRA(rank=2), dw.Full()]


def made(**options) -> Wrapped:
    torch.manual_seed(0)
    return Wrapped(nn.Embedding(11, 6, **options)).double()


def plain_of(model: Wrapped, **options) -> nn.Embedding:
    """A plain embedding with W + ΔW, a leaf."""
    plain = nn.Embedding(11, 6, **options).double()
    with torch.no_grad():
        plain.weight.copy_(model.layer.changed("weight"))
    return plain


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_max_norm_holds_for_the_changed_rows_and_writes_nothing(variant, norm_type):
    options = {"max_norm": 1.0, "norm_type": norm_type}
    model = made(**options)
    dw.attach(model, variant, targets=["layer"])
    before = model.layer.weight.clone()
    fresh = model(IDS)
    assert torch.equal(model.layer.weight, before)
    shaken(model)
    out = model(IDS)
    assert torch.equal(model.layer.weight, before)
    torch.testing.assert_close(out, plain_of(model, **options)(IDS), rtol=1e-12, atol=1e-12)
    assert float(torch.linalg.vector_norm(out, norm_type, dim=-1).max()) <= 1.0 + 1e-6
    with dw.disabled(model):
        model(IDS)
    assert torch.equal(model.layer.weight, before)
    dw.detach(model)
    assert torch.equal(model(IDS), fresh)  # the plain layer, which now writes
    assert not torch.equal(model.layer.weight, before)


@pytest.mark.parametrize(
    "options",
    [{"padding_idx": 4}, {"scale_grad_by_freq": True}, {"padding_idx": 1, "scale_grad_by_freq": True}],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_gradients_are_nn_embeddings_chained_through_the_change(variant, options):
    model = made(**options)
    shaken(dw.attach(model, variant, targets=["layer"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(0.5, 1.5, 36, dtype=torch.float64).view(2, 3, 6)
    mine = torch.autograd.grad((model(IDS).square() * weights).sum(), trained)

    plain = plain_of(model, **options)
    (by_weight,) = torch.autograd.grad((plain(IDS).square() * weights).sum(), plain.weight)
    theirs = torch.autograd.grad(model.layer.changed("weight"), trained, by_weight)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's bincount, row by row
@pytest.mark.parametrize(
    "options",
    [{"padding_idx": 4}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}, {"max_norm": 1.0, "padding_idx": 1}],
    ids=str,
)
@pytest.mark.parametrize("variant", [dw.LoRA(rank=2), dw.DoRA(rank=2)], ids=repr)
def test_gradients_row_by_row_and_forward_derivatives(variant, options):
    model = made(**options)
    shaken(dw.attach(model, variant, targets=["layer"]))
    at = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values, ids):
        return torch.func.functional_call(model, values, (ids,)).square().sum()

    per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(at, IDS)
    for row, ids in enumerate(IDS):
        expected = torch.autograd.grad(model(ids).square().sum(), [model.get_parameter(name) for name in at])
        for name, gradient in zip(at, expected):
            torch.testing.assert_close(per_row[name][row], gradient)
    along = {name: torch.ones_like(p) for name, p in at.items()}
    slope = torch.func.jvp(lambda values: loss(values, IDS), (at,), (along,))[1]
    torch.testing.assert_close(slope, sum(g.sum() for g in torch.func.grad(loss)(at, IDS).values()))


def test_sparse_gradients_where_the_embedding_is_trained_in_full():
    model = made(sparse=True)
    dw.attach(model, dw.Full(), targets=["layer"])
    model(IDS).sum().backward()
    assert model.layer.deltas("default")["weight"].value.grad.is_sparse
    other = made(sparse=True)
    dw.attach(other, dw.LoRA(rank=2), targets=["layer"])
    other(IDS).sum().backward()
    assert not other.layer.deltas("default")["weight"].A.grad.is_sparse


def test_no_dense_change_is_formed(monkeypatch):
    model = made()
    shaken(dw.attach(model, dw.DoRA(rank=2), targets=["layer"]))
    monkeypatch.setattr(type(model.layer.deltas("default")["weight"]), "delta_weight", None)
    model(IDS)


def test_input_dropout_drops_whole_tokens():
    model = made().train()
    shaken(dw.attach(model, dw.LoRA(rank=2, dropout=0.5), targets=["layer"]))
    with torch.no_grad():
        change = model(IDS) - nn.functional.embedding(IDS, model.layer.weight)
        model.eval()
        whole = model(IDS) - nn.functional.embedding(IDS, model.layer.weight)
    ratio = change / whole
    assert all(
        torch.allclose(r, r[:1].expand(6)) and float(r[0]) in (0.0, pytest.approx(2.0)) for r in ratio.view(-1, 6)
    )


def test_gemmas_scaled_embedding_keeps_its_forward():
    pytest.importorskip("transformers")
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    model = Wrapped(Gemma3TextScaledWordEmbedding(11, 6, padding_idx=0, embed_scale=2.5)).double()
    before = model(IDS)
    dw.attach(model, dw.LoRA(rank=2), targets=["layer"])
    assert torch.equal(model(IDS), before)
    shaken(model)
    torch.testing.assert_close(
        model(IDS), 2.5 * nn.functional.embedding(IDS, model.layer.changed("weight")), rtol=1e-12, atol=1e-12
    )
    assert dw.get(model).changes["layer.weight"].layer == "embedding"
    dw.detach(model)
    assert type(model.layer) is Gemma3TextScaledWordEmbedding


def test_ids_out_of_range_stay_an_error():
    model = made()
    dw.attach(model, dw.LoRA(rank=2), targets=["layer"])
    with pytest.raises(IndexError):
        model(torch.tensor([11]))


@pytest.mark.parametrize("init", ["kaiming", "gaussian/rank"])
def test_factors_start_the_other_way_round_and_padding_never_moves(init):
    model = made(padding_idx=4).train()
    plain = model.layer.weight.clone()
    dw.attach(model, dw.LoRA(rank=2, init=init), targets=["layer"])
    delta = model.layer.deltas("default")["weight"]
    assert not delta.A.any()
    assert delta.B.all()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(IDS).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (model.layer.changed("weight") != plain).any(1).nonzero().flatten().tolist()
    assert moved == [0, 1, 10]  # the tokens seen, without the padding


def test_a_frozen_a_starts_at_random_everywhere():
    model = made()
    dw.attach(model, dw.LoRAFA(rank=2), targets=["layer"])
    assert model.layer.deltas("default")["weight"].A.all()
