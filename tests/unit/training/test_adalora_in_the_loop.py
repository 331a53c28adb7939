"""The loop drives AdaLoRA: the budget falls over the run's own number of steps, and the penalty is part of the gradient."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import deltaw as dw
from deltaw.core.host import Host
from deltaw.recipes.configure import build
from deltaw.recipes.recipe import recipes
from deltaw.training.fit import Fit
from deltaw.training.run import train
from tests.unit.training.power_cut import power_cut


def go(tiny, folder, *, resume=False, **changes):
    given = {
        "recipe": "text-classification", "method": "adalora", "model": str(tiny / "model"),
        "data": str(tiny / "data.csv"), "epochs": 3, "batch_size": 8, "checkpoint_every": 3, "lr": 5e-3,
        "keep": "last", "adalora": {"rank": 4, "target": 2}, **changes,
    }  # fmt: skip
    config = build(given)
    return train(lambda: recipes["text-classification"].task(config), config, folder, resume=resume, quiet=True)


def deltas(model):
    return [d for m in model.modules() if isinstance(m, Host) for d in m.deltas("default").values() if hasattr(d, "E")]


def test_the_budget_reaches_its_target_with_the_last_step(tiny, tmp_path, monkeypatch):
    alive, totals = [], set()
    real = Fit._after_step

    def watching(fit, steps):
        alive.append(sum(int(d.alive.sum()) for d in deltas(fit.bare)))
        totals.update(d.variant.total for d in deltas(fit.bare))
        real(fit, steps)

    monkeypatch.setattr(Fit, "_after_step", watching)
    go(tiny, tmp_path / "run")
    assert totals == {24}, "8 steps in each of 3 epochs"
    assert len(alive) == 24
    assert alive == sorted(alive, reverse=True)
    kept = load_file(tmp_path / "run" / "adapter_model.safetensors")
    directions = {k: t for k, t in kept.items() if k.endswith("lora_E")}
    assert alive[-1] == 2 * len(directions)
    assert sum(int((t != 0).sum()) for t in directions.values()) <= 2 * len(directions)


def test_the_penalty_is_in_the_gradient(tiny, tmp_path, monkeypatch):
    """With and without: the first gradients of A differ by that of dw.orthogonality_loss, accumulation or not."""
    found = {}

    class Enough(Exception):
        pass

    for weight in (0.0, 0.5):

        def stop(fit, weight=weight):
            found[weight] = {
                n: p.grad.clone() for n, p in fit.bare.named_parameters() if p.grad is not None and n.endswith(".A")
            }
            with torch.enable_grad():
                penalty = dw.orthogonality_loss(fit.bare)
                if weight:
                    parameters = {n: p for n, p in fit.bare.named_parameters() if n in found[weight]}
                    found["penalty"] = dict(
                        zip(parameters, torch.autograd.grad(penalty, list(parameters.values())), strict=True)
                    )
            raise Enough

        with monkeypatch.context() as patch:
            patch.setattr(Fit, "_clip", stop)
            options = {"rank": 4, "target": 2, "orthogonality": weight}
            with pytest.raises(Enough):
                go(tiny, tmp_path / f"run{weight}", adalora=options, batch_size=4, accumulate=2)
    assert found[0.5]
    for name, gradient in found[0.5].items():
        torch.testing.assert_close(gradient - found[0.0][name], found["penalty"][name])
        assert found["penalty"][name].abs().max() > 0


def test_resumed_in_the_middle_it_ends_in_the_same_bits(tiny, tmp_path, monkeypatch):
    go(tiny, tmp_path / "calm")
    with power_cut(14):
        go(tiny, tmp_path / "broken")
    go(tiny, tmp_path / "broken", resume=True)
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("calm", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
