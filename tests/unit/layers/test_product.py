"""nn.Linear and Conv1D compute as one: whatever order the weight lies in, and for rows with adapters of their own."""

from typing import Any

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.layers import product


@pytest.mark.parametrize("variant", [dw.Full(), dw.LoKr(rank=2), dw.LoHa(rank=2), dw.LoRA(rank=2)], ids=repr)
@pytest.mark.parametrize("shape", [(24, 40), (64, 64), (33, 17)])
def test_a_weight_that_lies_transposed_keeps_the_outputs_bits(variant: Any, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    model[0].weight = nn.Parameter(torch.randn(shape[1], shape[0]).t())
    x = torch.randn(5, shape[1])
    with torch.no_grad():
        before = model(x)
        dw.attach(model, variant, targets=["0"])
        assert torch.equal(model(x), before)


def test_conv1d_takes_all_rows_in_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(12, 7), nn.Tanh(), transformers.pytorch_utils.Conv1D(3, 12))
    names = ["a", "b", "a"]
    for name in ("a", "b"):
        dw.attach(model, dw.LoRA(rank=2), targets=["0", "2"], name=name)
    for path, parameter in model.named_parameters():
        if path.endswith(".B"):
            nn.init.normal_(parameter)
    x = torch.randn(3, 4, 7)
    calls = []
    real = product.grouped_linear
    monkeypatch.setattr(product, "grouped_linear", lambda *a, **k: calls.append(1) or real(*a, **k))
    expected = []
    for i, name in enumerate(names):
        with dw.use(model, name):
            expected.append(model(x[i : i + 1]))
    with dw.rows(model, names):
        found = model(x)
    assert calls == [1, 1]
    torch.testing.assert_close(found, torch.cat(expected))
