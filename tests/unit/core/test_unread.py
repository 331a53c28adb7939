"""Changes that need no weight, those that do, and mistakes that are neither."""

from __future__ import annotations

import pytest
import torch

import deltaw as dw
from deltaw.core.true_change import true_change
from deltaw.core.unread import Read, stand_in, unread
from deltaw.errors import ConfigError
from deltaw.variants.lora import LoRADelta


def test_facts_are_given_and_values_are_not():
    weight = torch.randn(3, 4)
    for tensor in (unread(weight), stand_in((3, 4), weight)):
        assert (tensor.shape, tensor.dtype, tensor.ndim, tensor.is_meta) == ((3, 4), torch.float32, 2, False)
        for read in (lambda t: t + 1, torch.zeros_like, lambda t: t[0], lambda t: t.mT, lambda t: t.tolist()):
            with pytest.raises(Read):
                read(tensor)


def test_an_error_within_a_change_is_not_taken_for_a_missing_weight(monkeypatch):
    change = dw.Change(dw.LoRA(rank=1), {"A": torch.ones(1, 4), "B": torch.ones(3, 1)})
    needing = dw.Change(dw.DoRA(rank=1), {**change.tensors, "m": torch.ones(3)})
    for ask in (needing.delta_weight, lambda: true_change("x.weight", needing)):
        with pytest.raises(ConfigError, match="depends on the base weight"):
            ask()

    def broken(self, *present):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(LoRADelta, "delta_weight", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        change.delta_weight()
