"""Adapters as values: what a file must prove at load, a value must prove at install, add and replace."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import BaseMismatch, NonFinite
from deltaw.io import AdapterNotice
from tests.laws.conftest import shaken


def made(seed: int, layers: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)])


def kept(model: nn.Module, folder) -> dw.Adapter:
    dw.save(shaken(dw.attach(model, dw.LoRA(rank=2), ["0"])), folder)
    return dw.read(folder)


VERBS = {
    "install": lambda model, adapter, **options: dw.install(model, adapter, "x", **options),
    "add": lambda model, adapter, **options: dw.add(model, adapter, "x", **options),
    "replace": lambda model, adapter, **options: dw.replace(
        dw.attach(model, dw.LoRA(rank=2), ["0"], name="x"), "x", adapter, **options
    ),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_an_adapter_of_another_base_is_refused_as_at_load(verb, tmp_path):
    adapter = kept(made(1), tmp_path / "a")
    verb(made(1), adapter)
    with pytest.raises(BaseMismatch, match="allow_base_mismatch=True if you mean this one"):
        verb(made(2), adapter)
    with pytest.warns(AdapterNotice, match="accepted"):
        model = verb(made(2), adapter, allow_base_mismatch=True)
    assert torch.equal(model[0].adapters.x.weight.A, adapter.changes["0.weight"].tensors["A"])


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_values_that_are_not_finite_are_refused_as_at_load(verb):
    adapter = dw.get(dw.attach(made(1), dw.LoRA(rank=2), ["0"]))
    adapter.changes["0.weight"].tensors["A"][0, 0] = float("nan")
    with pytest.raises(NonFinite):
        verb(made(1), adapter)


@pytest.mark.filterwarnings("error::deltaw.io.AdapterNotice")
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_a_value_that_was_made_in_memory_is_taken_without_a_word(verb):
    verb(made(1), dw.get(dw.attach(made(2), dw.LoRA(rank=2), ["0"])))


def test_threads_that_load_and_delete_leave_the_model_as_it_was(tmp_path):
    model = made(1, 20)
    dw.save(dw.attach(model, dw.LoRA(rank=2)), tmp_path / "a")
    dw.detach(model)
    names, faults = set(model.state_dict()), []

    def churn(who: int) -> None:
        for turn in range(25):
            try:
                dw.load(model, tmp_path / "a", name=f"t{who}_{turn}", active=False)
                dw.delete(model, f"t{who}_{turn}")
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=churn, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert all(type(layer) is nn.Linear for layer in model)
    assert set(model.state_dict()) == names
