"""LSTM, GRU and RNN: batch-first, packed, with dropout between layers, single gates."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import deltaw as dw
from tests.laws.conftest import Wrapped, flat, shaken


def rounded(a: object, b: object) -> None:
    for x, y in zip(flat(a), flat(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [{"batch_first": True, "num_layers": 3}, {"bidirectional": True, "num_layers": 2, "batch_first": True}],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_adapted_equals_merged(kind, options, packed):
    torch.manual_seed(0)
    model = Wrapped(kind(4, 5, **options)).double()
    x = torch.randn(3, 6, 4).double()
    args = (
        (pack_padded_sequence(x, torch.tensor([6, 2, 4]), batch_first=True, enforce_sorted=False),) if packed else (x,)
    )
    with torch.no_grad():
        before = model(*args)
        dw.attach(model, dw.LoRA(rank=2, bias=True), targets=["layer"])
        rounded(model(*args), before)
        shaken(model)
        out = model(*args)
        dw.merge(model)
        rounded(model(*args), out)
        dw.unmerge(model)
    sum(t.square().sum() for t in flat(model(*args))).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert set(dw.get(model).changes) == {f"layer.{n}" for n in model.layer._flat_weights_names}
    dw.detach(model)
    assert type(model.layer) is kind
    assert all(
        w is model.layer._parameters[n] for n, w in zip(model.layer._flat_weights_names, model.layer._flat_weights)
    )
    rounded(model(*args), before)


def test_one_gate_of_an_lstm():
    model = Wrapped(nn.LSTM(4, 5)).double()
    plain = model.layer.weight_hh_l0.clone()
    shaken(dw.attach(model, dw.LoRA(rank=1), targets=["layer.weight_hh_l0[5:10]"]))
    dw.merge(model)
    assert (model.layer.weight_hh_l0 != plain).any(1).nonzero().flatten().tolist() == list(range(5, 10))


def test_dropout_between_layers_is_the_layers_own():
    model = Wrapped(nn.LSTM(4, 5, num_layers=2, dropout=0.5)).double().train()
    x = torch.randn(3, 2, 4).double()
    torch.manual_seed(1)
    before = model(x)[0]
    dw.attach(model, dw.LoRA(rank=2), targets=["layer"])
    torch.manual_seed(1)
    rounded(model(x)[0], before)


def test_the_change_of_device_or_precision_reaches_the_adapted_weights():
    model = Wrapped(nn.LSTM(4, 5))
    shaken(dw.attach(model, dw.LoRA(rank=2), targets=["layer"]))
    model.double()
    assert model(torch.randn(3, 2, 4).double())[0].dtype == torch.float64


def test_wrong_input_is_still_refused():
    model = Wrapped(nn.LSTM(4, 5))
    dw.attach(model, dw.LoRA(rank=2), targets=["layer"])
    with pytest.raises(RuntimeError, match="input_size"):
        model(torch.randn(3, 2, 7))
