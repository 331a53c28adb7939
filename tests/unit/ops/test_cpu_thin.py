"""The compiled sweeps beside their plain twin and float64: awkward shapes, dropout, threads, both widths, and none at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import deltaw as dw
from deltaw.core.variant import LowRank
from deltaw.ops import adapted_linear, adapted_linear_reference, compiled, cpu_thin, int8, kernels
from deltaw.ops.choices import Choices
from deltaw.ops.cpu_thin import Made, Sweep, takes
from deltaw.ops.dropout import Mask, bit_tape, tape
from deltaw.ops.recompute import Recipe
from deltaw.ops.select import is_narrow
from deltaw.ops.steps import Change, Plain, finish_
from deltaw.ops.terms import Term, merged_weight

pytestmark = pytest.mark.skipif(
    isinstance(compiled.library(), str), reason=f"no compiled operations here: {compiled.library()}"
)

SHAPES = [(1, 1), (1, 17), (2, 16), (3, 5), (7, 31), (41, 341), (130, 33), (9, 4231), (300, 640)]
RANKS = [1, 2, 3, 4, 7, 8, 9, 17]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So many threads, for jobs of any size."""
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu_thin, "GRAIN", 0)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def mask_of(x: Tensor, p: float, dtype: torch.dtype = torch.float32) -> Mask | None:
    return Mask(torch.tensor(-7, dtype=torch.int32), x.shape[0], x.shape[1], p, dtype) if p else None


def close(found: Tensor, exact: Tensor, terms: int) -> None:
    """As near to float64 as sums of so many products of numbers of size 1 are."""
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=2e-6 * max(terms, 4) ** 0.5 * 4)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_every_operation_against_float64(rows: int, columns: int, rank: int, p: float, threads: int) -> None:
    x, A, h, b, gain = (
        numbers(rows, columns),
        numbers(rank, columns),
        numbers(rows, rank),
        numbers(columns),
        numbers(columns, seed=1),
    )
    scales, y = numbers(rows, 1), numbers(rows, columns, seed=2)
    mask, exact = mask_of(x, p), mask_of(x, p, torch.float64)
    sweep, twin = Sweep(), Plain()
    product = sweep.shrink(x, A, mask)
    outer, across = sweep.outer(h, x, 1.5, mask), sweep.outer(h, x, 1.5, mask, transposed=True)
    built = sweep.outer(product, x, 1.0)  # on what the same sweep makes
    dots, plain_dots = sweep.dots(x, y, b), sweep.dots(x, y)
    full = sweep.expand_(y.clone(), h, A, 1.5, mask, rowscale=scales, gain=gain, shift=b)
    beside = sweep.expand_(torch.empty_like(y), h, A, 1.5, mask, rowscale=scales, gain=gain, shift=b, source=y)
    added, first = (
        sweep.expand_(y.clone(), h, A, 1.5, mask),
        sweep.expand_(torch.empty_like(y), h, A, 1.5, mask, shift=b, first=True),
    )
    sweep.run()
    X, H, Y, wide_A = x.double(), h.double(), y.double(), A.double()
    truth = twin.shrink(X, wide_A, exact)
    change = twin.expand_(torch.zeros_like(Y), H, wide_A, 1.5, exact)
    spread = 1.0 if p in (0.0, 1.0) else 1.0 / (1.0 - p)
    close(product, truth, int(columns * spread**2))
    close(outer, twin.outer(H, X, 1.5, exact), int(4 * rows * spread**2))
    assert torch.equal(across, outer.t())
    torch.testing.assert_close(built.double(), truth.t() @ X, rtol=1e-5, atol=1e-4 * (rows * columns) ** 0.5)
    close(dots, (X * (Y - b.double())).sum(0), 4 * rows)
    close(plain_dots, (X * Y).sum(0), rows)
    close(added, Y + change, int(4 * rank * spread**2))
    close(first, b.double() + change, int(4 * rank * spread**2))
    assert torch.equal(beside, full)
    close(full, scales.double() * gain.double() * Y + b.double() + change, int(8 * rank * spread**2))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_codes_are_those_of_torchs_passes(
    rows: int, columns: int, weighted: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = numbers(rows, columns), numbers(columns) if weighted else None
    x[rows // 2] = 0.0
    codes, scales = int8.quantize_rows(x, w)
    monkeypatch.setattr(cpu_thin, "library", lambda: "the twin")
    plain, plain_scales = int8.quantize_rows(x, w)
    torch.testing.assert_close(scales, plain_scales, rtol=1e-6, atol=0)
    assert (codes.int() - plain.int()).abs().max() <= 1, "a product with a reciprocal that is rounded otherwise"
    assert (codes != plain).float().mean() <= 0.02, "which moves only what lies half-way between two codes"
    assert (codes[rows // 2] == 128).all()


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, A = numbers(9, 40), numbers(3, 40)
    clean = int8.quantize_rows(x)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = x.clone()
        spoiled[4, 7] = bad
        codes, scales = int8.quantize_rows(spoiled)
        keep = torch.arange(9) != 4
        assert not scales[4].isfinite()
        assert torch.equal(codes[keep], clean[0][keep])
        assert torch.equal(scales[keep], clean[1][keep])
        sweep = Sweep()
        h = sweep.shrink(spoiled, A)
        sweep.run()
        assert not h[4].isfinite().any()
        assert h[keep].isfinite().all()


def test_a_row_depends_on_no_other_and_on_no_team(threads: int) -> None:
    x, A, B = numbers(101, 77), numbers(5, 77), numbers(5, 50)

    def both(rows: Tensor) -> tuple[Tensor, Tensor]:
        sweep = Sweep()
        h = sweep.shrink(rows, A)
        y = sweep.expand_(rows.new_empty(len(rows), 50), h, B, 2.0, first=True)
        sweep.run()
        return h, y

    whole = both(x)
    for some in (slice(0, 1), slice(3, 4), slice(10, 55), slice(64, 101)):
        for all_rows, own in zip(whole, both(x[some].clone()), strict=True):
            assert torch.equal(all_rows[some], own)


def test_the_same_decisions_as_the_mask() -> None:
    assert torch.equal(
        torch.tensor([bit_tape(4096, 0.3)[k // 8] >> (k % 8) & 1 for k in range(500)]).bool(),
        tape(4096, 0.3, torch.float32, torch.device("cpu"))[:500] != 0,
    )
    x = torch.ones(2000, 600)  # three blocks of the mask
    mask = mask_of(x, 0.25)
    assert mask is not None
    sweep = Sweep()
    y = sweep.expand_(torch.empty_like(x), torch.ones(2000, 1), torch.ones(1, 600), 1.0, mask, first=True)
    sweep.run()
    assert torch.equal(y != 0, mask.rows(slice(None)) != 0)


def test_rows_with_gaps_between_them_and_factors_in_any_order(threads: int) -> None:
    wide, A = numbers(30, 90), numbers(50, 6)
    x, y = wide[:, 20:70], wide.clone()[:, 20:70]
    sweep = Sweep()
    h = sweep.shrink(x, A.t())
    sweep.expand_(y, h, A.t(), 0.5)
    sweep.run()
    close(h, x.double() @ A.double(), 50)
    close(y, x.double() + 0.5 * h.double() @ A.double().t(), 50 * 6)


@pytest.mark.parametrize("rank", [1, 5, 8, 17])
@pytest.mark.parametrize("stops", [[300], [1, 299, 300], [7, 7, 130, 200, 300]])
def test_segments_with_factors_of_their_own(stops: list[int], rank: int, threads: int) -> None:
    x, y, b, scales = numbers(300, 70), numbers(300, 45), numbers(45), numbers(300, 1)
    terms = [
        Term(numbers(rank, 70, seed=i), numbers(45, rank, seed=i), None, None, 0.5 + i, 0.0, False, False)
        for i in range(len(stops))
    ]
    own = cpu_thin.Segments([(stop, None if i == 1 else t) for i, (stop, t) in enumerate(zip(stops, terms))])
    sweep = Sweep()
    h = sweep.shrink(x, own)
    added = sweep.expand_(y.clone(), h, own, 1.0)
    first = sweep.expand_(torch.empty_like(y), h, own, 1.0, shift=b, first=True)
    scaled = sweep.expand_(y.clone(), h, own, 1.0, rowscale=scales, shift=b)
    sweep.run()
    for i, (start, stop) in enumerate(zip([0, *stops], stops)):
        A, B, part = terms[i].A.double(), terms[i].B.double(), slice(start, stop)
        change = (x[part].double() @ A.t() @ B.t() * terms[i].scale) * (i != 1)
        for found, before in ((added, y), (first, b.expand_as(y)), (scaled, scales * y + b)):
            exact = before[part].double() + change
            assert (found[part] - exact).norm() <= 5e-7 * exact.norm()


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    crc32 = compiled.zlib.crc32
    monkeypatch.setattr(compiled.zlib, "crc32", lambda text: crc32(text) + 1)
    why = compiled.library.__wrapped__()
    assert isinstance(why, str)
    assert "install deltaw again" in why


def test_what_is_left_to_torch() -> None:
    x = numbers(6, 8)
    assert takes(x, factors=(x, None))
    for other in (x.double(), x.bfloat16(), x[:, ::2], x[:0], x.to("meta")):
        assert not takes(other)
    with torch.autograd.forward_ad.dual_level():
        assert not takes(x)


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("at", ["input", "output"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "rank"), [(300, 3), (300, 12), (1000, 40), (1, 2)])
def test_the_operation_against_float64(rows: int, rank: int, p: float, at: str, gain: bool, threads: int) -> None:
    shapes = ((rows, 41), (57, 41), (57,), (rank, 41), (57, rank), (57,))
    tensors = [numbers(*s, seed=i).mul_(0.5).requires_grad_() for i, s in enumerate(shapes)]
    found = []
    for op, dtype in ((adapted_linear, torch.float32), (adapted_linear_reference, torch.float64)):
        torch.manual_seed(3)
        x, weight, bias, A, B, c = (t.to(dtype) for t in tensors)
        terms = [LowRank(A, B, 1.5, c if gain else None, p, at), LowRank(A * 2, B * 0.5, 0.5, None, 0.0)]
        y = op(x, weight, bias, terms, training=True)
        found.append([y, *torch.autograd.grad(y.square().sum(), tensors[: 6 if gain else 5])])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= 3e-5 * exact.norm()  # ∂gain is a difference of sums ten times as large


def test_finishing_by_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    y, scales, gain, shift = numbers(20, 33), numbers(20, 1), numbers(33), numbers(33, seed=3)
    changes = [Change(numbers(20, r, seed=r), numbers(r, 33), 0.5, mask_of(y, p)) for r, p in ((2, 0.0), (5, 0.2))]
    for given in ((None, None, None), (scales, None, shift), (scales, gain, shift), (None, gain, None)):
        for some in (changes, changes[:1], changes[1:], []):
            compiled, plain = y.clone(), y.clone()
            finish_(compiled, *given, some)
            with monkeypatch.context() as patch:
                patch.setattr(cpu_thin, "library", lambda: "the twin")
                finish_(plain, *given, some)
            torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_over_a_form_changes_no_bit() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(384, 512), torch.nn.Linear(512, 384, bias=False))
    dw.quantize(model, dw.Int8())
    x = numbers(70, 384)
    before = model(x)
    for method in (dw.LoRA(rank=4, dropout=0.1), dw.DoRA(rank=4)):
        dw.attach(model, method, targets=["0", "1"])
        model.train()
        assert torch.equal(model(x), before)
        dw.detach(model)


CHECK = """
import torch
from deltaw.core.variant import LowRank
from deltaw.ops import adapted_linear, adapted_linear_reference, compiled
print(compiled.library() if isinstance(compiled.library(), str) else "compiled")
torch.manual_seed(0)
tensors = [torch.randn(s).requires_grad_() for s in ((400, 90), (70, 90), (70,), (6, 90), (70, 6))]
found = []
for op in (adapted_linear, adapted_linear_reference):
    torch.manual_seed(1)
    x, W, b, A, B = tensors
    y = op(x, W, b, [LowRank(A, B, 0.5, None, 0.1)], training=True)
    found.append(torch.autograd.grad(y.square().sum(), tensors))
for ours, plain in zip(*found):
    assert (ours - plain).norm() <= 1e-5 * plain.norm()
"""


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "compiled"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "this processor"),
        ({"DELTAW_COMPILED": "0"}, "DELTAW_COMPILED is 0"),
    ],
)
def test_in_a_process_with_less(setting: dict[str, str], says: str) -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], env={**os.environ, **setting}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(says)


def test_deltaw_ops_names_them() -> None:
    lines = kernels.kernels(kernels.TYPICAL[1], Choices()).lines()
    assert any("thin products" in line and "compiled" in line for line in lines)


FUNCTIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda v: v,
    "gelu": functional.gelu,
    "gelu tanh": lambda v: functional.gelu(v, approximate="tanh"),
    "silu": functional.silu,
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("given", ["", "mean rstd", "rstd gain", "by", "by gain", "mean rstd by gain shift"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_tiles_of_what_was_not_kept(rows: int, columns: int, given: str, function: str | None, threads: int) -> None:
    shapes = {"mean": (rows, 1), "rstd": (rows, 1), "by": (rows, columns), "gain": (columns,), "shift": (columns,)}
    z = numbers(rows, columns)
    rest = {name: numbers(*shapes[name], seed=i) for i, name in enumerate(shapes) if name in given.split()}
    exact = {name: t.double() for name, t in rest.items()}
    x = (z.double() - exact.get("mean", 0)) * exact.get("rstd", 1) * exact.get("by", 1)
    x = FUNCTIONS[function](x) * exact.get("gain", 1) + exact.get("shift", 0)
    A, u, mask = numbers(3, columns), numbers(rows, 5), mask_of(z, 0.3)
    sweep = Sweep()
    tiles = sweep.make(Made(z, **rest, function=function))
    h, dropped, outer = sweep.shrink(tiles, A), sweep.shrink(tiles, A, mask), sweep.outer(u, tiles, 0.5)
    sweep.run()
    size = max(1.0, float(x.abs().max()))
    close(h / size, x @ A.double().t() / size, columns)
    close(dropped / size, Plain().shrink(x, A.double(), mask_of(z, 0.3, torch.float64)) / size, 2 * columns)
    close(outer / size, 0.5 * u.double().t() @ x / size, rows)


@pytest.mark.parametrize("function", ["gelu", "gelu tanh", "silu"])
def test_functions_of_large_and_small_numbers(function: str) -> None:
    z = torch.cat([torch.linspace(-200, 200, 4001), torch.linspace(-6, 6, 4001), torch.tensor([0.0, 1e-30, -1e-30])])[
        None
    ]
    ones, eye = torch.ones(1, 1), numbers(1, z.shape[1])
    sweep = Sweep()
    x = sweep.outer(ones, sweep.make(Made(z, function=function)), 1.0)
    sweep.run()
    # erf's formula is good to 1.5e-7; quotient and product add some roundings of 6e-8
    torch.testing.assert_close(x.double(), FUNCTIONS[function](z.double()), rtol=3e-7, atol=3e-7)
    for bad in (torch.nan, torch.inf):
        spoiled = z.clone()
        spoiled[0, 7] = bad
        sweep = Sweep()
        h = sweep.shrink(sweep.make(Made(spoiled, function=function)), eye)
        sweep.run()
        assert not h.isfinite().any()


@pytest.mark.parametrize(("samples", "heads", "each", "width"), [(2, 3, 7, 16), (1, 4, 30, 5), (5, 1, 1, 33)])
def test_tiles_of_attentions_heads(samples: int, heads: int, each: int, width: int, threads: int) -> None:
    output = numbers(samples, each, heads, width).transpose(1, 2)
    for z in (output, output.contiguous()):
        u = numbers(samples * each, 2)
        sweep = Sweep()
        outer = sweep.outer(u, sweep.make(Made(z)), 1.0)
        sweep.run()
        x = z.transpose(1, 2).reshape(samples * each, heads * width)
        close(outer, u.double().t() @ x.double(), samples * each)


PRODUCERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
    "gate": lambda z: functional.silu(z) * (z + 1),
    "norm": lambda z: functional.layer_norm(z, (96,), *torch.linspace(-1, 1, 192, dtype=z.dtype).view(2, 96)),
    "norm without affine": lambda z: functional.layer_norm(z, (96,)),
    "rms norm": lambda z: torch.linspace(-1, 1, 96, dtype=z.dtype) * (z * z.pow(2).mean(-1, keepdim=True).rsqrt()),
    "attention": lambda z: (
        functional.scaled_dot_product_attention(*[z.view(8, 100, 4, 24).transpose(1, 2).contiguous()] * 3)
        .transpose(1, 2)
        .contiguous()
        .reshape(8, 100, 96)
    ),
}


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_an_input_that_was_not_kept_is_never_whole_again(
    producer: str, p: float, gain: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, W, b = numbers(8, 100, 96).requires_grad_(), numbers(130, 96), numbers(130)
    A, B, c = (numbers(*s, seed=5).mul_(0.3).requires_grad_() for s in ((6, 96), (130, 6), (130,)))
    inputs = [start, A, B, *([c] if gain else [])]
    found = []
    for op, dtype in ((adapted_linear, torch.float32), (adapted_linear_reference, torch.float64)):
        torch.manual_seed(3)
        x = PRODUCERS[producer](start.to(dtype))
        terms = [LowRank(A.to(dtype), B.to(dtype), 1.5, c.to(dtype) if gain else None, p)]
        wide = [op(x, W.to(dtype), b.to(dtype), terms, training=True) for _ in range(2)]  # two readers
        with monkeypatch.context() as patch:
            if p or is_narrow(6, shared=True):  # else MKL's thin products, which read x
                patch.setattr(Recipe, "take", lambda *_: pytest.fail("x was made whole"))
            found.append(torch.autograd.grad(sum(y.square().sum() for y in wide), inputs))
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= 3e-5 * exact.norm()  # ∂gain is a difference of sums ten times as large


@pytest.mark.parametrize("rank", [1, 8, 17])
@pytest.mark.parametrize("shape", [(5, 3), (130, 77), (77, 640)])
def test_the_merged_weight_under_a_gain(shape: tuple[int, int], rank: int, threads: int) -> None:
    W, A, B, gain = numbers(*shape), numbers(rank, shape[1]), numbers(shape[0], rank), numbers(shape[0])
    term = Term(A, B, gain, None, 0.5, 0.0, False, True)
    close(merged_weight(W, [term]), (1 + gain.double())[:, None] * W + 0.5 * B.double() @ A.double(), 4 * rank)
    fresh = term._replace(B=torch.zeros_like(B), gain=torch.zeros_like(gain))
    assert torch.equal(merged_weight(W, [fresh]), W)


def test_more_kinds_of_dropout_than_tapes_are_kept() -> None:
    x, A = numbers(50, 60), numbers(3, 60)
    masks = [mask_of(x, 0.02 + 0.03 * i) for i in range(12)]
    sweep = Sweep()
    found = [sweep.shrink(x, A, mask) for mask in masks]
    sweep.run()
    for h, mask in zip(found, masks, strict=True):
        torch.testing.assert_close(h, Plain().shrink(x, A, mask), rtol=1e-4, atol=1e-4)
