"""Dense or 8 bit: the record of choices, the timing, and outliers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import deltaw as dw
from deltaw.errors import ConfigError
from deltaw.model.quantize import kernel_choices
from deltaw.ops import choices as module
from deltaw.ops.choices import Choices, Look, OutlierWarning, time_int8
from deltaw.ops.int8 import int8_available

vnni = pytest.mark.skipif(not int8_available(), reason="no VNNI on this processor")


def quantized(timed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    dw.attach(model, dw.LoRA(rank=2), targets=nn.Linear)
    dw.quantize(model, dw.Int8(), targets=nn.Linear, choices=Choices(timed=timed))
    return model


def with_outliers(rows: int = 32) -> Tensor:
    """What the inputs of large language models look like: a few features hundreds of times larger than the others."""
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 3000
    return x


def test_choices_survive_the_file() -> None:
    record = Choices(True, {(384, 1536, 1024): (True, False), (8, 8, 1): (False, False)}, {"a forward": Look(5, True)})
    assert Choices.from_json(record.to_json()) == record
    taken = Choices()
    taken.take(record)
    assert taken == record


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"kernels": [{"shape": [1, 2], "int8": [true]}], "looks": {}}'])
def test_a_damaged_record_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a record of kernel choices"):
        Choices.from_json(text)


def test_a_shape_is_timed_once_and_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "int8_available", lambda: True)
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(module, "time_int8", lambda *shape: (calls.append(shape), (True, False))[1])
    assert Choices().choose(16, 8, 100) == (True, True)
    assert calls == []
    record = Choices(timed=True)
    assert record.choose(16, 8, 100) == (True, False)
    assert record.choose(16, 8, 128) == (True, False)  # the same power of two
    assert calls == [(16, 8, 128)]
    assert record.lines() == ["16 x 8, up to 128 rows: forward 8 bit, gradient dense (timed)"]
    monkeypatch.setattr(module, "int8_available", lambda: False)
    assert record.choose(16, 8, 128) == (False, False)


@vnni
def test_timing_answers_for_both_products() -> None:
    assert [type(a) for a in time_int8(24, 16, 8, repeats=1)] == [bool, bool]


@vnni
def test_the_chosen_kernels_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time_int8", lambda *_: (False, False))
    dense, narrow, x = quantized(timed=True), quantized(), torch.randn(8, 64)
    exact = dw.dequantize(quantized(), into="dense")(x)
    assert torch.allclose(dense(x), exact, atol=1e-5)
    assert not torch.allclose(narrow(x), exact, atol=1e-5)
    record = kernel_choices(dense)
    assert record is not None
    assert set(record.int8) == {(96, 64, 8), (32, 96, 8)}
    assert record.looks == {}


@vnni
def test_outliers_in_the_input_send_that_product_back_to_fp32_and_it_says_so() -> None:
    model = quantized()
    with pytest.warns(OutlierWarning, match=r"^0\.weight: 8 bit moves its outputs by \d+% \(outliers\)"):
        y = model[0](with_outliers())
    exact = dw.dequantize(quantized(), into="dense")[0](with_outliers())
    assert torch.allclose(y, exact, rtol=1e-4, atol=1e-2)
    record = kernel_choices(model)
    assert record is not None
    assert record.lines() == ["0.weight forward: dense (outliers)"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 64))  # it stays dense, and says so once; the other layer stays in 8 bit


@vnni
def test_outliers_in_the_gradient_send_only_the_gradient_back() -> None:
    model = quantized()
    x = torch.randn(32, 64, requires_grad=True)
    g = torch.randn(32, 96)
    g[:, 7] *= 5000
    with pytest.warns(OutlierWarning, match=r"0\.weight: 8 bit moves its input gradients"):
        model[0](x).backward(g)
    record = kernel_choices(model)
    assert record is not None
    assert record.looks == {"0.weight forward": Look(1, False), "0.weight gradient": Look(1, True)}


@vnni
def test_inputs_are_looked_at_again_ever_more_rarely() -> None:
    model, looked = quantized(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "error_beside_outliers", lambda *_: looked.append(1) or 0.0)
        for calls, looks in [(20, 5), (44, 7), (64, 8), (64, 9)]:  # 1, 2, 4, 8, 16; 32, 64; 128; 192
            for _ in range(calls):
                model[0](torch.randn(4, 64))
            assert len(looked) == looks
        model = quantized()
        for _ in range(3):
            model[0](torch.randn(4, 64))
    with pytest.warns(OutlierWarning):
        model[0](with_outliers())


@vnni
def test_the_rows_that_are_looked_at_are_not_the_same_place_of_every_sequence() -> None:
    model = quantized()
    x = with_outliers(64 * 100).view(64, 100, 64)
    x[:, 0, 5] /= 3000  # first tokens have none
    with pytest.warns(OutlierWarning):
        model[0](x)
    found = [module.sample(6400, call) for call in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    for rows in found:
        assert torch.equal(rows // 100, torch.arange(64))


@vnni
def test_a_row_that_is_not_finite_hides_no_outliers() -> None:
    x = with_outliers()
    x[3, 3] = float("inf")
    with pytest.warns(OutlierWarning):
        quantized()[0](x)


@vnni
def test_the_norm_of_dora_is_no_input() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96))
    dw.quantize(model, dw.Int8(), targets=nn.Linear)
    dw.attach(model, dw.DoRA(rank=2), targets=nn.Linear)
    with pytest.warns(OutlierWarning):
        model(with_outliers())


@vnni
def test_a_restored_record_gives_the_same_bits() -> None:
    one = quantized()
    with pytest.warns(OutlierWarning):
        one(with_outliers())
    record = kernel_choices(one)
    assert record is not None
    other = quantized()
    there = kernel_choices(other)
    assert there is not None
    there.take(Choices.from_json(record.to_json()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(other(with_outliers()), one(with_outliers()))


def test_a_weight_with_outliers_is_left_as_it_is_and_the_report_says_so() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32))
    with torch.no_grad():
        model[0].weight[:, 3] *= 1000
    report = dw.quantize(model, dw.Int8(), targets=nn.Linear)
    assert [w.key for w in report.weights] == ["1.weight"]
    assert "outliers" in report.skipped["0.weight"]
    assert "0.weight (outliers: 8 bit would move its entries by" in str(report)


@vnni
def test_nothing_else_is_moved_by_an_outlier() -> None:
    """Rows of zeros and rows that are not finite are no outliers."""
    model = quantized()
    x = torch.randn(8, 64)
    x[1], x[2, 0] = 0.0, float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = model(x)
    assert torch.isfinite(y[[0, 1, 3, 4, 5, 6, 7]]).all()
    record = kernel_choices(model)
    assert record is not None
    assert not any(look.dense for look in record.looks.values())
