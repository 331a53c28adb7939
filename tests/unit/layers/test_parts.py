"""Chosen slices of a fused projection: q and v of a qkv weight, as loralib and litgpt adapt them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.core.part import parameter_of, part, placed, rows_of
from deltaw.errors import TargetError
from tests.laws.conftest import Wrapped, shaken


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(q * k.sigmoid() + v)


def block() -> Block:
    torch.manual_seed(0)
    return Block().double().eval()


X = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
TARGET = "qkv[0:6,12:18]"


@pytest.mark.parametrize("variant", [dw.LoRA(rank=2), dw.DoRA(rank=2), dw.LoRA(rank=3, bias=True)], ids=repr)
def test_only_the_named_rows_change(variant):
    model = block()
    out = model(X)
    plain = model.qkv.weight.clone()
    dw.attach(model, variant, targets=[TARGET])
    assert torch.equal(model(X), out)
    shaken(model)
    assert {"weight[0:6]", "weight[12:18]"} <= set(model.qkv.deltas("default"))
    adapted = model(X)
    dw.merge(model)
    torch.testing.assert_close(model(X), adapted, rtol=1e-12, atol=1e-12)
    moved = (model.qkv.weight != plain).any(1)
    assert moved.tolist() == [True] * 6 + [False] * 6 + [True] * 6
    dw.unmerge(model)
    assert torch.equal(model.qkv.weight, plain)
    dw.detach(model)
    assert torch.equal(model(X), out)


def test_each_part_may_have_its_own_rank_and_is_a_change_of_its_own():
    model = block()
    shaken(dw.attach(model, {"qkv[0:6]": dw.LoRA(rank=4), "qkv[12:18]": dw.LoRA(rank=1), "out": dw.LoRA(rank=2)}))
    adapter = dw.get(model)
    assert {k: c.matrix_shape for k, c in adapter.changes.items()} == {
        "qkv.weight[0:6]": (6, 6),
        "qkv.weight[12:18]": (6, 6),
        "out.weight": (6, 6),
    }
    assert adapter.changes["qkv.weight[0:6]"].shape == (18, 6)
    fresh = block()
    dw.install(fresh, adapter)
    assert torch.equal(fresh(X), model(X))


def test_parts_equal_a_whole_change_whose_other_rows_are_zero():
    model, whole = block(), block()
    shaken(dw.attach(model, dw.LoRA(rank=2), targets=["qkv[6:12]"]))
    dw.attach(whole, dw.LoRA(rank=2), targets=["qkv"])
    small, large = model.qkv.deltas("default")["weight[6:12]"], whole.qkv.deltas("default")["weight"]
    with torch.no_grad():
        large.A.copy_(small.A)
        large.B.zero_()
        large.B[6:12] = small.B
    torch.testing.assert_close(model(X), whole(X), rtol=1e-12, atol=1e-12)


def test_a_part_of_attention_and_of_gpt2s_conv1d():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    for layer, target, args in (
        (nn.MultiheadAttention(6, 2), "layer.in_proj_weight[0:6]", (torch.randn(3, 2, 6).double(),) * 3),
        (Conv1D(18, 6), "layer[6:18]", (torch.randn(3, 6).double(),)),
    ):
        model = Wrapped(layer).double().eval()
        shaken(dw.attach(model, dw.LoRA(rank=2), targets=[target]))
        out = model(*args)
        dw.merge(model)
        after = model(*args)
        for x, y in zip(out if isinstance(out, tuple) else (out,), after if isinstance(after, tuple) else (after,)):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("target", "message"),
    [("qkv[0:19]", "has the rows 0:18; 0:19"), ("qkv[6:6]", "6:6 is no part"), ("kvq[0:6]", "closest: 'qkv'")],
)
def test_a_part_that_is_none_is_refused(target, message):
    model = block()
    with pytest.raises(TargetError, match=message):
        dw.attach(model, dw.LoRA(rank=2), targets=[target])
    assert type(model.qkv) is nn.Linear


def test_parts_of_a_layer_with_several_weights_need_the_weights_name():
    model = Wrapped(nn.LSTM(4, 5))
    with pytest.raises(TargetError, match=r"name the one that is meant, for example 'layer\.weight_ih_l0\[\.\.\.\]'"):
        dw.attach(model, dw.LoRA(rank=2), targets=["layer[0:5]"])
    dw.attach(model, dw.LoRA(rank=2), targets=["layer.weight_hh_l0[0:5]"])
    assert list(model.layer.deltas("default")) == ["weight_hh_l0[0:5]"]


def test_whole_parameters_have_no_parts():
    with pytest.raises(TargetError, match="Full changes whole parameters"):
        dw.attach(block(), dw.Full(), targets=["qkv[0:6]"])


def test_a_site_reads_back_into_parameter_and_rows():
    assert (parameter_of("weight[2:5]"), rows_of("weight[2:5]")) == ("weight", slice(2, 5))
    assert (parameter_of("weight"), rows_of("weight")) == ("weight", None)
    matrix = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(
        placed(part(matrix, slice(2, 5)), slice(2, 5), 6), matrix * torch.tensor([0, 0, 1, 1, 1, 0])[:, None]
    )
