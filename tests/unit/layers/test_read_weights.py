"""PEFT fault 14: layers of nn.TransformerEncoder(Layer) and nn.MultiheadAttention whose weight is read, never called."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deltaw as dw
from tests.laws.conftest import shaken

TARGETS = [["linear1"], ["linear2"], ["self_attn"], ["out_proj"], ["linear1", "self_attn"]]


def layer(**options) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **options).double().eval()


X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])


def rounded(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_every_layer_inside_takes_effect(targets, mode):
    model = nn.Sequential(layer(dropout=0.0))
    model.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        before = model(X)
        dw.attach(model, dw.LoRA(rank=2), targets=targets)
        rounded(model(X), before)
        shaken(model)
        out = model(X)
        assert float((out - before).abs().max()) > 1e-3
        dw.merge(model)
        rounded(model(X), out)
        dw.unmerge(model)
        with dw.disabled(model):
            rounded(model(X), before)
    if mode != "no_grad":
        out.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n.endswith(".B"))
    classes = {type(m) for m in model.modules()}
    dw.detach(model)
    assert type(model[0]) is nn.TransformerEncoderLayer
    assert type(model[0].self_attn) is nn.MultiheadAttention
    assert not any(c.__name__.endswith("Host") for c in {type(m) for m in model.modules()})
    assert any(c.__name__ == "TransformerEncoderLayerHost" for c in classes)


def test_the_fast_path_is_kept_and_a_fresh_adapter_changes_no_bit_of_it():
    model = nn.Sequential(layer())
    with torch.no_grad():
        before = model(X)
        dw.attach(model, dw.LoRA(rank=2), targets=["linear1", "self_attn"])
        with torch.profiler.profile() as seen:
            after = model(X)
        assert torch.equal(after, before)
    assert any("transformer_encoder_layer_fwd" in e.key for e in seen.key_averages())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_an_encoder_with_padding_keeps_its_zeros(targets, norm_first):
    encoder = nn.TransformerEncoder(layer(norm_first=norm_first), 2, enable_nested_tensor=not norm_first).eval()
    model = nn.ModuleDict({"encoder": encoder})
    with torch.no_grad():
        before = encoder(X, src_key_padding_mask=PADDING)
        dw.attach(model, dw.LoRA(rank=2), targets=targets)
        assert torch.equal(encoder(X, src_key_padding_mask=PADDING), before)
        shaken(model)
        out = encoder(X, src_key_padding_mask=PADDING)
        dw.merge(model)
        rounded(encoder(X, src_key_padding_mask=PADDING), out)
    if not norm_first:
        assert not out[PADDING].any()  # the nested path pads its output with zeros
    assert float((out - before).abs().max()) > 1e-3
    dw.unmerge(model)
    dw.detach(model)
    assert type(model["encoder"]) is nn.TransformerEncoder


def test_nested_tensors_go_in_and_out():
    model = nn.Sequential(layer())
    nested = torch.nested.nested_tensor([X[0], X[1, :3]])
    with torch.no_grad():
        shaken(dw.attach(model, dw.LoRA(rank=2), targets=["linear1", "self_attn"]))
        out = model(nested).to_padded_tensor(0.0)
        rounded(out[0], model(X[:1])[0])


def test_two_adapters_and_leaving_one_of_them():
    model = nn.Sequential(layer())
    with torch.no_grad():
        base = model(X)
        dw.attach(model, dw.LoRA(rank=2), targets=["linear1"], name="a")
        shaken(dw.attach(model, dw.LoRA(rank=2), targets=["out_proj"], name="b"))
        with dw.use(model, "a"):
            a = model(X)
        dw.detach(model, "b")
        dw.activate(model, "a")
        rounded(model(X), a)
        with dw.disabled(model):
            assert torch.equal(model(X), base)


def test_modules_trained_in_full_inside_an_encoder_take_effect():
    model = nn.TransformerEncoder(layer(), 2).eval()
    with torch.no_grad():
        before = model(X)
        shaken(dw.attach(model, dw.LoRA(rank=2), targets=["layers.0.linear1"], train=["layers.1"]))
        out = model(X)
        dw.merge(model)
        rounded(model(X), out)
    assert not torch.equal(before, out)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_alone_in_its_fast_path(batch_first, heads, need_weights):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, heads, batch_first=batch_first)}).double().eval()
    call = lambda: model["attn"](X, X, X, need_weights=need_weights)  # noqa: E731
    with torch.no_grad():
        before = call()
        dw.attach(model, dw.LoRA(rank=2), targets=["attn"])
        rounded(call()[0], before[0])
        adapter = dw.get(shaken(model))
        assert set(adapter.changes) == {"attn.in_proj_weight", "attn.out_proj.weight"}
        assert {c.layer for c in adapter.changes.values()} == {"multihead_attention"}
        out = call()
        weights = {n: p.clone() for n, p in model["attn"].named_parameters() if "adapters" not in n}
        twin = copy.deepcopy(model)
        dw.merge(twin)
        after = twin["attn"](X, X, X, need_weights=need_weights)
    rounded(out[0], after[0])
    if need_weights:
        rounded(out[1], after[1])
    assert all(torch.equal(p, weights[n]) for n, p in model["attn"].named_parameters() if n in weights)


def test_all_linear_never_means_out_proj_alone():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    dw.attach(model, dw.LoRA(rank=2), targets="all-linear")
    assert set(dw.get(model).changes) == {"linear.weight"}


def test_attentions_own_dropout_still_drops_in_training():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, dropout=0.5)}).double().train()
    shaken(dw.attach(model, dw.LoRA(rank=2), targets=["attn"]))
    assert not torch.equal(model["attn"](X, X, X)[0], model["attn"](X, X, X)[0])


def test_a_decoder_and_a_whole_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True).double().eval()
    with torch.no_grad():
        before = model(X, X)
        dw.attach(model, dw.LoRA(rank=2), targets=["linear1", "self_attn", "multihead_attn"])
        rounded(model(X, X), before)
        shaken(model)
        out = model(X, X)
        dw.merge(model)
        rounded(model(X, X), out)


def test_a_part_is_adapted_first_and_then_the_whole_that_reads_its_weights() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        plain = layer(x)
    dw.attach(layer.self_attn, dw.LoRA(rank=2), targets=["out_proj"], name="a")
    dw.attach(layer, dw.LoRA(rank=2), targets=["out_proj"], name="b")
    with torch.no_grad():
        layer.self_attn.out_proj.adapters.b.weight.B.normal_()
        assert not torch.allclose(layer(x), plain, atol=1e-2)
