"""Laws 1-3 over the forms of the frozen weight: (layer that takes forms x form x method), from the registry."""

from __future__ import annotations

import copy

import pytest
import torch

import deltaw as dw
from deltaw.core.registry import forms, variants
from tests.laws.conftest import adapted, built, flat, layer_examples, shaken

LAYERS = [
    pytest.param(example, id=f"{family}/{example.label}".replace(" ", "_"))
    for family, cls, example in layer_examples()
    if cls.takes_forms
]
FORMS = [pytest.param(form, id=repr(form)) for _, cls in forms.items() for form in cls.examples()]
VARIANTS = [pytest.param(next(iter(cls.examples())), id=kind) for kind, cls in variants.items()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("example", LAYERS)
def test_over_a_form(example, form, variant):
    model, args = built(example, torch.float32)
    dw.quantize(model, form, targets=["layer"])
    model.eval()
    with torch.no_grad():
        base = flat(model(*args, **example.kwargs))
        adapted(model, variant)
        for x, y in zip(base, flat(model(*args, **example.kwargs)), strict=True):
            assert torch.equal(x, y)  # neutral start, to the bit

        shaken(model, size=0.03)
        out = flat(model(*args, **example.kwargs))
        plain = copy.deepcopy(model)
        dw.merge(plain, keep=None)
        for x, y in zip(out, flat(plain(*args, **example.kwargs)), strict=True):
            # merged into the weight that the form stands for; the form's own products round by `form.rounding` of
            # the largest product that there can be, ‖x‖ (‖W‖ + ‖W'‖): bias and ΔW may cancel most of it
            size = (
                float(args[0].norm() * (plain.layer.weight.norm() + model.layer.frozen_matrix("weight").dense().norm()))
                + 1e-6
            )
            assert float((x - y).norm()) <= max(2 * form.rounding, 1e-4) * size

        dw.merge(model)
        dw.unmerge(model)
        assert all(torch.equal(x, y) for x, y in zip(out, flat(model(*args, **example.kwargs)), strict=True))
        dw.detach(model)
        assert all(torch.equal(x, y) for x, y in zip(base, flat(model(*args, **example.kwargs)), strict=True))
