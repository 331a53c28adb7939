"""Many adapters in one batch: every row as if it were alone."""

from __future__ import annotations

import pytest
import torch

from deltaw.core.variant import LowRank
from deltaw.errors import ConfigError
from deltaw.ops import adapted_linear, grouped
from deltaw.ops.grouped import Segment, grouped_linear, grouped_linear_reference
from deltaw.ops.select import is_narrow
from deltaw.ops.terms import in_force
from tests.unit.ops.test_linear import Doubled


def adapter(rank: int, gain: bool = False, dropout: float = 0.0, at: str = "input") -> LowRank:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return LowRank(noise(rank, 5), noise(4, rank), 0.7, noise(4) if gain else None, dropout, at)


def batch(
    *lead: int, gain: bool = False, dropout: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Segment]]:
    """Ten rows: bare, adapter a, two adapters at once, a hole, b, an empty segment, c alone in its row."""
    torch.manual_seed(0)
    x = torch.randn(10, *lead, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    a, b, c = adapter(2), adapter(3, gain, dropout), adapter(1, gain, dropout, "output")
    segments = [
        Segment(0, 1),
        Segment(1, 3, (a,)),
        Segment(3, 6, (a, b)),
        Segment(7, 9, (b,)),
        Segment(9, 9, (c,)),
        Segment(9, 10, (c,)),
    ]
    return x, weight, bias, segments


def leaves(segments: list[Segment]) -> list[torch.Tensor]:
    found = {id(t): t for s in segments for a in s.adapters for t in (a.A, a.B, a.gain) if t is not None}
    return list(found.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_differentiable_twice(dropout: float) -> None:
    x, weight, bias, segments = batch(2, gain=True, dropout=dropout)

    def op(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(4)
        return grouped_linear(x, weight, bias, segments, training=True)

    torch.autograd.gradgradcheck(op, (x, weight, bias, *leaves(segments)))


@pytest.mark.parametrize("lead", [(), (2,), (40,), (3, 4)])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_equal_to_the_plain_twin_with_every_gradient(
    lead: tuple[int, ...], gain: bool, dropout: float, bias: bool
) -> None:
    x, weight, b, segments = batch(*lead, gain=gain, dropout=dropout)
    tensors = [x, weight, *([b] if bias else []), *leaves(segments)]
    results = []
    for op in (grouped_linear, grouped_linear_reference):
        torch.manual_seed(4)
        y = op(x, weight, b if bias else None, segments, training=True)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lead", [(), (40,)])
def test_each_row_equals_the_row_alone(lead: tuple[int, ...]) -> None:
    x, weight, bias, segments = batch(*lead, gain=True)
    y = grouped_linear(x, weight, bias, segments, training=False)
    owners: list[tuple[LowRank, ...]] = [()] * 10
    for s in segments:
        owners[s.start : s.stop] = [tuple(s.adapters)] * (s.stop - s.start)
    for row, adapters in enumerate(owners):
        alone = adapted_linear(x[row : row + 1], weight, bias, adapters, training=False)
        torch.testing.assert_close(y[row : row + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (40,)])
@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_full_of_nan_changes_its_own_rows_only(lead: tuple[int, ...], training: bool) -> None:
    x, weight, bias, segments = batch(*lead)
    healthy = grouped_linear(x, weight, bias, segments, training=training)
    canary = LowRank(torch.full((2, 5), float("nan"), dtype=torch.float64), segments[1].adapters[0].B, 1.0)
    segments[1] = Segment(1, 3, (canary,))
    y = grouped_linear(x, weight, bias, segments, training=training)
    others = [0, *range(3, 10)]
    assert y[1:3].isnan().all()
    assert torch.equal(y[others], healthy[others])
    gradient = torch.autograd.grad(y[others].sum(), x)[0]
    assert torch.isfinite(gradient[others]).all()


def test_a_frozen_form() -> None:
    x, weight, bias, segments = batch(2, gain=True)
    tensors = [x, bias, *leaves(segments)]
    results = []
    for frozen in (Doubled(weight.detach() / 2), None):
        y = grouped_linear(x, None if frozen else weight, bias, segments, training=False, frozen=frozen)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("spans", [[(3, 5), (1, 2)], [(0, 4), (3, 6)], [(0, 99)], [(4, 2)]])
def test_segments_that_do_not_fit_are_refused(spans: list[tuple[int, int]]) -> None:
    x, weight, bias, _ = batch()
    with pytest.raises(ConfigError, match="sort the rows"):
        grouped_linear(x, weight, bias, [Segment(a, b, (adapter(2),)) for a, b in spans], training=False)


@pytest.mark.parametrize("lead", [(), (40,)])
@pytest.mark.parametrize("training", [False, True])
def test_the_same_bits_with_and_without_gradients(lead: tuple[int, ...], training: bool) -> None:
    x, weight, bias, segments = batch(*lead, gain=True, dropout=0.3)
    torch.manual_seed(1)
    recorded = grouped_linear(x, weight, bias, segments, training=training)
    torch.manual_seed(1)
    with torch.no_grad():
        bare = grouped_linear(x, weight, bias, segments, training=training)
    assert recorded.requires_grad
    assert not bare.requires_grad
    assert torch.equal(recorded, bare)


@pytest.mark.parametrize("lead", [(), (3,), (3, 2), (2, 300)])
@pytest.mark.parametrize("bias", [True, False])
def test_short_segments_of_equal_length_share_their_products(
    lead: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(*lead[:1], 12, *lead[1:], 5, dtype=torch.float64)
    x = x.transpose(0, 1) if lead else x  # rows that do not lie one behind the other
    weight, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 5), (4,)))
    two, one, other = adapter(2), adapter(2)._replace(scale=-3.0), adapter(3)
    spans = [
        (0, 1, two),
        (1, 2, one),
        (2, 3, two),
        (4, 5, two),
        (5, 7, one),
        (7, 9, two),
        (9, 10, other),
        (10, 12, other),
    ]
    segments = [Segment(start, stop, (a,)) for start, stop, a in spans]
    stacked: list[int] = []
    done = grouped.add_stacked_
    monkeypatch.setattr(grouped, "add_stacked_", lambda y, rows, run: (stacked.append(len(run)), done(y, rows, run)))
    with torch.no_grad():
        y = grouped_linear(x, weight, b if bias else None, segments, training=False)
        reference = grouped_linear_reference(x, weight, b if bias else None, segments, training=False)
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    assert stacked == ([] if lead == (2, 300) else [3, 2])  # 600 tokens a row are no short segment


@pytest.mark.parametrize("swept", [False, True])
def test_factors_full_of_nan_or_infinity_change_their_own_rows_only(
    swept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swept:
        monkeypatch.setattr(grouped, "is_swept", lambda *_: False)
    x = torch.randn(6, 2, 5)
    weight = torch.randn(4, 5)
    healthy = [LowRank(torch.randn(2, 5), torch.randn(4, 2), 1.0) for _ in range(6)]
    broken = list(healthy)
    broken[2] = LowRank(torch.full((2, 5), float("nan")), healthy[2].B, 1.0)
    broken[4] = LowRank(healthy[4].A, torch.full((4, 2), float("inf")), 1.0)
    with torch.no_grad():
        y, expected = (
            grouped_linear(x, weight, None, [Segment(i, i + 1, (a,)) for i, a in enumerate(own)], training=False)
            for own in (broken, healthy)
        )
    assert not y[[2, 4]].isfinite().any()
    assert torch.equal(y[[0, 1, 3, 5]], expected[[0, 1, 3, 5]])


compiled = pytest.mark.skipif(not is_narrow(8), reason="thin products without dropout are left to torch here")


def swept_batch(
    rows: int, each: int, rank: int, out: int = 29, columns: int = 45
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Segment]]:
    """Four adapters of one rank in segments of unequal length; rows without any before, between and after them."""
    torch.manual_seed(rows * each + rank)
    x, weight, bias = torch.randn(rows, each, columns), torch.randn(out, columns), torch.randn(out)
    adapters = [LowRank(torch.randn(rank, columns), torch.randn(out, rank), i - 1.5) for i in range(4)]
    spans = [(1, 2), (2, 5), (6, 7), (7, rows - 1)]
    return x, weight, bias, [Segment(*span, (a,)) for span, a in zip(spans, adapters)]


@compiled
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 8, 11, 16])
@pytest.mark.parametrize(("rows", "each"), [(12, 1), (12, 37), (41, 13)])
@pytest.mark.parametrize("turned", [False, True])
def test_one_sweep_for_all_segments(
    rows: int, each: int, rank: int, bias: bool, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, b, segments = swept_batch(rows, each, rank)
    if turned:  # in another order in memory
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        segments = [
            s._replace(
                adapters=[a._replace(A=a.A.t().contiguous().t(), B=a.B.t().contiguous().t()) for a in s.adapters]
            )
            for s in segments
        ]
    swept: list[int] = []
    values = grouped.swept_values
    monkeypatch.setattr(grouped, "swept_values", lambda *a: (swept.append(1), values(*a))[1])
    with torch.no_grad():
        y = grouped_linear(x, weight, b if bias else None, segments, training=False)
        wide = [
            Segment(s.start, s.stop, [a._replace(A=a.A.double(), B=a.B.double()) for a in s.adapters]) for s in segments
        ]
        exact = grouped_linear_reference(
            x.double(), weight.double(), b.double() if bias else None, wide, training=False
        )
        base = torch.nn.functional.linear(x, weight, b if bias else None)
        bare = [0, 5, rows - 1]
    assert swept == [1]
    assert (y - exact).norm() <= 5e-7 * exact.norm()
    assert torch.equal(y[bare], base[bare])


@compiled
def test_a_row_of_a_sweep_does_not_depend_on_who_else_is_there() -> None:
    x, weight, bias, segments = swept_batch(40, 3, 8)
    with torch.no_grad():
        y = grouped_linear(x, weight, bias, segments, training=False)
        others = [
            s if i == 1 else s._replace(adapters=[a._replace(A=-a.A) for a in s.adapters])
            for i, s in enumerate(segments)
        ]
        again = grouped_linear(x, weight, bias, others, training=False)
    assert torch.equal(y[2:5], again[2:5])
    assert not torch.equal(y[6:], again[6:])


@compiled
def test_a_sweep_over_a_frozen_form() -> None:
    x, weight, bias, segments = swept_batch(20, 40, 8, 64, 48)
    found = []
    for frozen in (Doubled(weight / 2), None):
        with torch.no_grad():
            found.append(grouped_linear(x, None if frozen else weight, bias, segments, training=False, frozen=frozen))
    assert (found[0] - found[1]).norm() <= 5e-7 * found[1].norm()


@compiled
def test_what_is_not_swept() -> None:
    x, _, bias, segments = swept_batch(12, 2, 4)
    rows, parts = (
        x.flatten(0, 1),
        [(s.start * 2, s.stop * 2, [in_force(a, False, False, x.device) for a in s.adapters]) for s in segments],
    )
    assert grouped.is_swept(rows, bias, parts)
    assert not grouped.is_swept(rows.double(), bias.double(), parts)
    assert not grouped.is_swept(rows, bias, parts[:1]), "a single adapter is linear.py's"
    for other in (
        adapter(3),
        adapter(17),
        LowRank(torch.randn(4, 45), torch.randn(29, 4), 1.0, torch.randn(29)),
    ):
        term = in_force(other, False, False, x.device)
        assert not grouped.is_swept(rows, bias, [*parts[:3], (14, 22, [term])])
    assert not grouped.is_swept(rows, bias, [*parts[:3], (14, 22, parts[3][2] * 2)]), "two adapters in a row"
