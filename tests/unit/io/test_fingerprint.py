"""The same base in any precision or form is recognised, another one is not, whatever the model carries at the moment."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import BaseMismatch, ModelError
from deltaw.io import fingerprint as prints
from deltaw.io.fingerprint import compare, fingerprint
from deltaw.io.notices import AdapterNotice
from deltaw.io.sketch import distance, sketch
from tests.unit.io.adapter_folders import net, shaken


def wide(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(96, 128), nn.LayerNorm(128), nn.Linear(128, 64)).eval()


def saved(tmp_path: Path, model: nn.Module) -> Path:
    dw.attach(model, dw.LoRA(rank=2), "all-linear")
    return dw.save(shaken(model), tmp_path / "a")


@pytest.mark.parametrize("here", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("there", [torch.float32, torch.float16, torch.bfloat16])
def test_precisions(tmp_path: Path, here: torch.dtype, there: torch.dtype) -> None:
    folder = saved(tmp_path, wide().to(here))
    if here == there:
        dw.load(wide().to(there), folder)
    else:
        with pytest.warns(AdapterNotice, match="another precision"):
            dw.load(wide().to(there), folder)
    for other in (wide(1).to(there), wide().to(there)):
        with torch.no_grad():
            other[2].weight[3, 5] += 0.5
        if {here, there} == {torch.float16, torch.bfloat16}:
            continue  # compared by the sketch: one entry is within the rounding of all
        with pytest.raises(BaseMismatch):
            dw.load(other, folder)


@pytest.mark.parametrize("form", ["Int8", "NF4"])
def test_quantised_forms(tmp_path: Path, form: str) -> None:
    forms = pytest.importorskip("deltaw.core.registry").forms
    kind = dict(forms.items())[form.lower()]
    folder = saved(tmp_path, wide())
    for seed in (0, 1):
        model = wide(seed)
        dw.quantize(model, kind())
        if seed == 0:
            with pytest.warns(AdapterNotice, match="another precision"):
                dw.load(model, folder)
            again = dw.save(model, tmp_path / "b")
            dw.load(wide(), again)  # it recorded the original's fingerprint, not the codes'
        else:
            with pytest.raises(BaseMismatch):
                dw.load(model, folder)


def test_adapters_and_merges_are_looked_through() -> None:
    model = net()
    plain = fingerprint(model)
    dw.attach(model, dw.LoRA(rank=2), ["first", "0"], train=["norm"])
    shaken(model)
    assert fingerprint(model) == plain
    for keep in ("memory", "file"):
        dw.merge(model, keep=keep)
        assert fingerprint(model) == plain
        dw.unmerge(model)
    dw.merge(model, keep=None)
    with pytest.raises(ModelError, match="merged for good"):
        fingerprint(model)


def test_a_changed_weight_is_read_again() -> None:
    model = net()
    before = fingerprint(model)
    with torch.no_grad():
        model.first.weight[0, 0] += 1
    after = fingerprint(model)
    assert after["parameters"]["first.weight"] != before["parameters"]["first.weight"]
    assert after["parameters"]["head.weight"] == before["parameters"]["head.weight"]
    assert compare(model, before).other == {"first.weight": "other values"}


def test_names_on_one_side_only() -> None:
    model = net()
    recorded = fingerprint(model)
    more = copy.deepcopy(model)
    more.extra = nn.Linear(2, 2)
    assert set(compare(more, recorded).other) == {"extra.weight", "extra.bias"}
    assert set(compare(model, fingerprint(more)).other) == {"extra.weight", "extra.bias"}
    assert not compare(more, recorded, {"extra.weight", "extra.bias"}).other


def test_buffers_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    recorded = fingerprint(model)
    model[1].running_mean += 0.1
    assert set(compare(model, recorded).other) == {"1.running_mean"}


@pytest.mark.parametrize("shape", [(3,), (7, 5), (300, 41), (4097,), (1, 1)])
def test_the_sketch_estimates_distances(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator)
    assert distance(sketch(W), sketch(W)) == 0
    assert distance(sketch(W), sketch(W.bfloat16())) < 0.01
    noises = [torch.randn(shape, generator=generator) for _ in range(20)]
    estimates = [distance(sketch(W), sketch(W + 0.1 * noise * W.norm() / noise.norm())) for noise in noises]
    assert 0.03 < sum(estimates) / 20 < 0.3


def test_the_sketch_is_the_same_everywhere() -> None:
    """A golden value: 8 projections of 0, 1, ... 99 by signs from SHAKE-256."""
    found = sketch(torch.arange(100.0))
    assert found[0] == pytest.approx(573.0183, abs=1e-3)
    assert all(abs(v) < 5 for v in found[1:])
    assert sketch(torch.arange(100.0).half()) == found


def test_a_large_base_is_completed_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.io import known_weights

    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))
    monkeypatch.setattr(known_weights, "LARGE", 0)
    before = fingerprint(wide())
    (file,) = (tmp_path / "fingerprints").iterdir()
    made: list[object] = []
    monkeypatch.setattr(known_weights, "derived", lambda *args: made.append(args) or {"sketch": []})
    assert fingerprint(wide()) == before  # another model object, the same bytes
    assert not made
    fingerprint(wide(1))  # other bytes
    assert made
    whole = file.read_bytes()
    for damage in (b"", whole[:-9], whole.replace(b"sketch", b"sketck", 1), b"[]"):
        made.clear()
        file.write_bytes(damage)
        fingerprint(wide())
        assert made


def test_a_replaced_parameter_is_read_again() -> None:
    model = wide()
    before = fingerprint(model)
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)
    model[2].weight.data.mul_(2)  # a write that PyTorch does not count
    assert set(compare(model, before).other) == {"0.weight", "2.weight"}


class Tied(nn.Module):
    """An embedding and a head that share their weight, a linear layer and a norm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.body, self.norm = nn.Embedding(50, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.words.weight


def untied(model: Tied) -> None:
    model.head.weight = nn.Parameter(model.words.weight.detach() * 2)


def transposed(model: Tied) -> None:
    model.body.weight.data = model.body.weight.data.t()


def more(model: Tied) -> None:
    model.extra = nn.Linear(2, 2)


def merged_for_good(model: Tied) -> None:
    dw.attach(model, dw.LoRA(rank=2), targets=["body"])
    with torch.no_grad():
        model.body.adapters.default.weight.B.fill_(1.0)
    dw.merge(model, keep=None)
    dw.detach(model)


def passing(model: Tied) -> None:
    model.norm.register_buffer("running_mean", model.norm.running_mean, persistent=False)


CHANGES: dict[str, tuple[Callable[[Tied], object], set[str]]] = {
    "a write": (lambda m: torch.nn.init.ones_(m.body.bias), {"body.bias"}),
    "a write past the version": (lambda m: m.body.weight.data.mul_(2), {"body.weight"}),
    "other memory": (lambda m: setattr(m.body.weight, "data", m.body.weight.data * 2), {"body.weight"}),
    "another order of the same memory": (transposed, {"body.weight"}),
    "another parameter": (lambda m: setattr(m.body, "weight", nn.Parameter(torch.ones(8, 8))), {"body.weight"}),
    "a tie cut": (untied, {"head.weight"}),
    "statistics": (lambda m: m.norm(torch.randn(4, 8)), {"norm.running_mean", "norm.running_var"}),
    "a buffer replaced": (lambda m: setattr(m.norm, "running_mean", torch.ones(8)), {"norm.running_mean"}),
    "a buffer that is no longer kept": (passing, {"norm.running_mean"}),
    "a layer more": (more, {"extra.weight", "extra.bias"}),
    "a layer less": (lambda m: delattr(m, "norm"), {f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")}),
    "a change merged for good": (merged_for_good, {"body.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_nothing_that_changes_after_a_look_is_taken_for_unchanged(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = Tied(), []
    before = fingerprint(model)
    looked_at = prints.looked_at
    monkeypatch.setattr(prints, "looked_at", lambda *args: asked.append(1) or looked_at(*args))
    for _ in range(3):
        assert not compare(model, before).other
    assert len(asked) == 1, "the second and third look find nothing changed"
    change, names = CHANGES[what]
    change(model)
    for _ in range(2):
        assert set(compare(model, before).other) == names


def test_a_base_that_agreed_with_one_record_need_not_agree_with_another(tmp_path: Path) -> None:
    folder = saved(tmp_path, wide())
    model, adapter = wide(), dw.read(folder)
    recorded = adapter.base["fingerprint"]
    entries = recorded["parameters"]
    name = next(iter(entries))
    for i in range(3):  # the first look is the long one
        dw.load(model, folder, name=f"n{i}")
    for wrong in ({**entries, name: {**entries[name], "sha256": "0" * 64}}, {**entries, "more": entries[name]}):
        with pytest.raises(BaseMismatch):
            dw.load(
                model, adapter.replace(base={**adapter.base, "fingerprint": {**recorded, "parameters": wrong}}), "x"
            )
    fewer = {n: e for n, e in entries.items() if n != name}
    with pytest.raises(BaseMismatch):
        dw.load(model, adapter.replace(base={**adapter.base, "fingerprint": {**recorded, "parameters": fewer}}), "x")


def test_adapters_that_come_and_speak_are_no_change_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tied()
    before = fingerprint(model)
    assert not compare(model, before).other
    dw.attach(model, dw.LoRA(rank=2), targets=["body"])
    dw.merge(model)
    assert not compare(model, before).other
    dw.unmerge(model)
    dw.quantize(model, dw.Int8())
    found = compare(model, before)
    assert not found.other
    assert set(found.precision) == {"body.weight"}


def test_a_wrapped_model_is_the_model() -> None:
    model = wide()
    before = fingerprint(model)
    assert fingerprint(torch.compile(model)) == before
    assert not compare(torch.compile(model), before).other


def test_an_adapter_that_replaces_every_weight_of_its_base_has_nothing_to_be_compared(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 7))
    dw.attach(model, dw.Full(), ["0"])
    dw.save(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dw.load(nn.Sequential(nn.Linear(5, 7)), tmp_path / "a")
