"""Law 5, seen from a model: the gradients of every trained tensor and of the input are those of the dense formula."""

from __future__ import annotations

import pytest
import torch

from deltaw.core.host import Host
from deltaw.core.twin import written_out
from tests.laws.conftest import adapted, built, cases, flat, shaken


@pytest.mark.parametrize(("example", "variant"), cases())
def test_gradients_are_those_of_the_dense_formula(example, variant):
    model, args = built(example)
    shaken(adapted(model, variant)).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    given = [a.requires_grad_() for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]

    fast = loss(model(*args, **example.kwargs))
    mine = torch.autograd.grad(fast, [*trained, *given], allow_unused=True)

    layer = model.layer
    assert isinstance(layer, Host)
    dense = loss(written_out(layer).forward(*args, **example.kwargs))
    theirs = torch.autograd.grad(dense, [*trained, *given], allow_unused=True)

    for x, y in zip(mine, theirs):
        if x is None or y is None:
            assert x is None or not x.any()
            assert y is None or not y.any()
        elif x.numel():
            size = max(1.0, float(y.abs().max()))
            assert float((x - y).abs().max()) <= 2**-36 * size  # float64, long sums, a norm in between


def loss(output: object) -> torch.Tensor:
    """A smooth function of every output, so that no gradient is trivial."""
    return sum(
        ((t * torch.linspace(0.5, 1.5, max(t.numel(), 1), dtype=t.dtype)[: t.numel()].view_as(t)) ** 2).sum()
        for t in flat(output)
    )
