"""Modules that read the weight of a layer inside them without calling it: the change takes effect (law 7)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deltaw as dw
from deltaw.core.host import Host
from deltaw.layers.reading import Read, reads_in
from tests.laws.conftest import shaken


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Linear(8, 8)


class LanguageModel(nn.Module):
    """Reads the embedding for its output (in a method), and a layer of a layer; asks a third for its dtype only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.inner = nn.Embedding(20, 8), nn.Linear(8, 8), Inner()

    def head(self, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, self.embed.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        if isinstance(self.first.weight, torch.Tensor):
            h = self.first(h.to(self.first.weight.dtype))
        return self.head(F.linear(h.tanh(), self.inner.deep.weight, self.inner.deep.bias))


IDS = torch.tensor([[1, 5, 7], [2, 2, 0]])
VARIANTS = [dw.LoRA(rank=2), dw.DoRA(rank=2), dw.IA3(), dw.LoRA(rank=2, bias=True)]


def built() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel().double()


def test_what_a_class_reads_and_what_it_only_asks():
    reads = {r for each in reads_in(LanguageModel).values() for r in each if r.site in ("weight", "bias")}
    assert reads == {
        Read(("embed",), "weight"),
        Read(("inner", "deep"), "weight"),
        Read(("inner", "deep"), "bias"),
        Read(("first",), "weight", values=False),
    }
    assert reads_in(nn.MultiheadAttention) == {}, "torch's own have hosts of their own"


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_the_change_takes_effect_and_is_the_merged_one(variant, mode):
    model = built().train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        base = model(IDS)
        dw.attach(model, variant, ["embed", "inner.deep"])
        assert torch.equal(model(IDS), base)
        shaken(model)
        out = model(IDS)
    for target in ("embed", "inner.deep"):
        one = built()
        dw.attach(one, variant, [target])
        shaken(one)
        assert not torch.allclose(one(IDS), base)
    with dw.disabled(model):
        assert torch.equal(model(IDS), base)
    dw.merge(model)
    torch.testing.assert_close(model(IDS), out, rtol=1e-12, atol=1e-12)
    dw.unmerge(model)
    dw.detach(model)
    assert type(model) is LanguageModel
    assert not any(isinstance(m, Host) for m in model.modules())
    assert torch.equal(model(IDS), base)


def test_every_tensor_gets_a_gradient():
    model = built()
    dw.attach(model, dw.LoRA(rank=2, dropout=0.2), ["embed", "first", "inner.deep"])
    shaken(model)
    model(IDS).square().sum().backward()
    dw.check_gradients(model)


def test_copies_rows_and_compiled_code():
    model = built()
    dw.attach(model, dw.LoRA(rank=2), ["embed", "inner.deep"], name="a")
    dw.attach(model, dw.DoRA(rank=2), ["embed"], name="b")
    shaken(model)
    dw.activate(model, "a")
    a = model(IDS)
    assert torch.equal(copy.deepcopy(model)(IDS), a)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS), a)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), a)
    with dw.use(model, "b"):
        b = model(IDS)
    with dw.rows(model, ["b", "a"]):
        torch.testing.assert_close(model(IDS), torch.stack([b[0], a[1]]))
    torch._dynamo.reset()


def test_a_quantised_weight_that_is_read_is_the_weight_it_stands_for():
    model = built().float()
    base = model(IDS)
    dw.quantize(model, dw.Int8(), targets=["first", "inner.deep"])
    assert not torch.equal(model(IDS), base)
    torch.testing.assert_close(model(IDS), base, rtol=0.1, atol=0.1)


def test_leaving_with_the_last_change_of_what_is_read():
    model = built()
    dw.attach(model, dw.LoRA(rank=2), ["inner.deep"], name="a")
    dw.attach(model, dw.LoRA(rank=2), ["first"], name="b")
    assert isinstance(model, Host)
    dw.detach(model, "a")
    assert type(model) is LanguageModel
    assert isinstance(model.first, Host)


def test_mamba():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, state_size=4, time_step_rank=2)
    model = transformers.MambaForCausalLM(config).eval()
    dw.attach(model, dw.LoRA(rank=2), ["dt_proj", "conv1d", "x_proj"])
    shaken(model)
    out = model(IDS, use_cache=False).logits
    out.square().sum().backward()
    dw.check_gradients(model)
    with dw.merged(model):
        torch.testing.assert_close(model(IDS, use_cache=False).logits, out, rtol=1e-4, atol=1e-5)
