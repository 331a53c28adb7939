"""The count of a step's memory: what is alive at once, in forward and backward, and nothing is moved by counting."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.model.peak import Meter, measured

MIB = 2**20


def test_what_is_made_and_freed_is_counted_at_its_highest():
    known = torch.zeros(1000)
    with Meter([known]) as meter:
        a = torch.zeros(1000)
        b = a + 1
        a.add_(1)
        view = b[10:]
        assert meter.now == 8000
        del a
        assert meter.now == 4000
        c = known.view(10, 100) * 2
        assert (meter.now, meter.most) == (8000, 8000)
    del b, view, c


def test_a_view_of_what_was_there_before_is_not_counted():
    batch = torch.zeros(1000)
    with Meter([]) as meter:
        rows = batch.view(10, 100)
        assert (meter.now, meter.most) == (0, 0)
        del rows, batch
        again = torch.zeros(1000)  # where the batch was, perhaps
        assert meter.now == 4000
    del again


def test_a_step_is_activations_then_gradients():
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.ReLU(), nn.Linear(512, 256, bias=False))
    x = torch.randn(1024, 256)
    peak = measured(model, lambda: model(x).sum())
    hidden, out, weights = 1024 * 512 * 4, 1024 * 256 * 4, 2 * 256 * 512 * 4
    assert peak.forward == hidden + 4  # ReLU's result and the loss; what went into ReLU is gone
    assert hidden + weights <= peak.step <= 2 * hidden + weights + 2 * out


def test_nothing_is_moved_by_counting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    kept = nn.Parameter(torch.ones(2))
    model[3].bias.grad = kept.detach().clone()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    dw.summary(model, torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model[0].weight.grad is None
    assert torch.equal(model[3].bias.grad, kept)


@pytest.mark.parametrize("inputs", [torch.randn(8, 4), (torch.randn(8, 4),), {"input": torch.randn(8, 4)}])
def test_the_summary_takes_inputs_in_any_form_and_says_the_peak(inputs):
    model = nn.Sequential(nn.Linear(4, 3))
    found = dw.summary(model[0] if isinstance(inputs, dict) else model, inputs)
    assert found.peak_bytes is not None
    assert found.activation_bytes is not None
    assert found.peak_bytes > found.gradient_bytes + found.optimizer_bytes + found.activation_bytes
    assert "at its peak" in str(found)
    assert found.total_bytes == found.weight_bytes + found.peak_bytes


def test_an_adapter_needs_less_than_full_training():
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))

    x = torch.randn(64, 256)
    full = dw.summary(model(), x).peak_bytes
    lora = dw.summary(dw.attach(model(), dw.LoRA(rank=2), targets=["1", "2", "3", "4", "5"]), x).peak_bytes
    assert full is not None
    assert lora is not None
    assert lora < full - 3 * 5 * 256 * 256 * 4
