"""The same base in any precision or form is recognised, another one is not, whatever the model carries at the moment."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import BaseMismatch, ModelError
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
