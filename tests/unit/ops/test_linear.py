"""The fused adapted linear: equal to its plain twin in value and every gradient, on awkward shapes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import deltaw as dw
from deltaw.core.variant import LowRank
from deltaw.ops import adapted_linear, adapted_linear_reference, recompute, select, steps
from deltaw.ops import linear as module
from deltaw.ops.gain import alias
from tests.unit.ops.cases import Case

CASES = [
    Case(),
    Case(lead=(200,)),  # many rows: W' is formed
    Case(lead=(2, 3)),  # few rows: factors are added
    Case(lead=()),
    Case(lead=(0,)),
    Case(lead=(2, 0, 3)),
    Case(lead=(1,)),
    Case(bias=False),
    Case(rank=9),  # larger than both sides
    Case(count=3),
    Case(gain=True),
    Case(gain=True, lead=(2, 3)),
    Case(gain=True, bias=False, count=2),
    Case(gain=True, lead=(300,), dropout=0.3),
    Case(dropout=0.3),
    Case(dropout=0.3, at="output"),
    Case(dropout=0.3, at="output", gain=True, count=2),
    Case(dropout=1.0),
    Case(dropout=0.3, lead=(0,)),
    Case(lead=(9, 41), width=41, out=9, dropout=0.1, count=2),
    Case(lead=(3,), width=1, out=1, rank=1),
]


@pytest.fixture(autouse=True, params=["fused", "fused, thin products last", "composed"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """No shape is too small for the fused operation, in one order of its products or the other, or every one is."""
    kind, _, order = request.param.partition(", ")
    for limit in ("SMALL", "LIGHT", "FORMED"):
        monkeypatch.setattr(select, limit, -1 if kind == "fused" else 1 << 62)

    def in_place(x: Tensor, weight: Tensor) -> bool:  # as with MKL, on every machine
        wide = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
        return not order and wide and not torch.compiler.is_compiling()

    for file in (module, steps):
        monkeypatch.setattr(file, "adds_in_place", in_place)
    return kind


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients_are_the_plain_ones(case: Case) -> None:
    y, grads = case.gradients(adapted_linear)
    z, expected = case.gradients(adapted_linear_reference)
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    for g, e in zip(grads, expected):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", [c for c in CASES if c.count == 1 and c.lead in ((7,), (2, 3), ())], ids=str)
def test_gradcheck(case: Case) -> None:
    assert torch.autograd.gradcheck(lambda *t: case.run(adapted_linear, t), tuple(case.tensors))


@pytest.mark.parametrize("case", [c for c in CASES if 0 not in c.lead], ids=str)
def test_many_gradients_at_once(case: Case) -> None:
    if case.gain:
        case.tensors[5 if case.bias else 4].data[0] = -1  # c = 0, of one adapter
    y = case.run(adapted_linear)
    probes = torch.randn(3, *y.shape, dtype=y.dtype)
    found = torch.autograd.grad(y, case.tensors, probes, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, case.tensors, probe, retain_graph=True) for probe in probes]
    for g, e in zip(found, zip(*each)):
        torch.testing.assert_close(g, torch.stack(e), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_blocks_of_rows_do_not_change_the_result(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaw.ops.dropout.BLOCK", 35)  # 7 rows of x, 8 of y: the last block is shorter
    case = Case(lead=(101,), gain=True, dropout=dropout)
    whole = case.gradients(adapted_linear_reference)
    torch.testing.assert_close(case.gradients(adapted_linear), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(3,), (500,), (2, 3, 5), ()])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_neutral_adapter_changes_no_bit(dtype: torch.dtype, lead: tuple[int, ...], gain: bool, bias: bool) -> None:
    x, weight = torch.randn(*lead, 24).to(dtype), torch.randn(16, 24).to(dtype)
    b = torch.randn(16).to(dtype) if bias else None
    term = LowRank(torch.randn(4, 24), torch.zeros(16, 4), 2.0, torch.zeros(16) if gain else None, 0.1)
    for training in (True, False):
        for strided in (x, x.mT.contiguous().mT, x.transpose(0, -2)) if lead else (x,):
            assert torch.equal(
                adapted_linear(strided, weight, b, [term], training=training), F.linear(strided, weight, b)
            )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("columns", "out"), [(384, 1536), (1537, 129)])
def test_a_neutral_adapter_changes_no_bit_of_large_products(
    columns: int, out: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # this machine's own order
    weight, b = torch.randn(out, columns), torch.randn(out) if bias else None
    term = LowRank(torch.randn(8, columns), torch.zeros(out, 8), 2.0, None, 0.1)
    for x in (torch.randn(257, columns), torch.randn(3, 257, columns), torch.randn(257, 3, columns).transpose(0, 1)):
        assert torch.equal(adapted_linear(x, weight, b, [term], training=True), F.linear(x, weight, b))


def test_strided_inputs_and_gradients() -> None:
    case = Case(lead=(6, 8))
    x = case.tensors[0].detach().transpose(0, 1).requires_grad_()
    results = []
    for op in (adapted_linear, adapted_linear_reference):
        y = case.run(op, (x, *case.tensors[1:]))
        results.append([y, *torch.autograd.grad(y.transpose(0, 1).sum(), [x, *case.tensors[1:]])])  # expanded gradient
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_the_output_may_be_changed_in_place() -> None:
    for gain in (False, True):
        case = Case(lead=(2, 9), gain=gain)
        results = []
        for op in (adapted_linear, adapted_linear_reference):
            y = torch.relu_(case.run(op))
            results.append([y, *torch.autograd.grad(y.square().sum(), case.tensors)])
        torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_large_bias_does_not_drown_the_gains_gradient(dtype: torch.dtype) -> None:
    """Where y is rounded to 16 bit, or kept so (compact), it is rounded at the size of the bias."""
    case = Case(lead=(256,), width=96, out=80, gain=True)
    x, weight, bias, A, B, gain = (t.detach() for t in case.tensors)
    exact = [x, weight, 100 * bias, A, B, 0.1 * gain]
    exact = [t.to(dtype).double() for t in exact[:3]] + exact[3:]
    grad = torch.randn(256, 80, dtype=torch.float64).to(dtype).double()

    def of_gain(op: Any, narrow: torch.dtype, packed: bool) -> Tensor:
        tensors = [t.to(narrow) for t in exact[:3]] + [
            t.to(torch.promote_types(narrow, torch.float32)) for t in exact[3:]
        ]
        tensors = [t.detach().requires_grad_(i > 2) for i, t in enumerate(tensors)]
        with dw.compact(torch.nn.Module()) if packed else contextlib.nullcontext():
            y = case.run(op, tuple(tensors))
        y.backward(grad.to(y.dtype))
        assert tensors[-1].grad is not None
        return tensors[-1].grad.double()

    right = of_gain(adapted_linear_reference, torch.float64, False)
    packed = dtype == torch.float32
    ours, plain = (
        float((of_gain(op, dtype, packed) - right).norm() / right.norm())
        for op in (adapted_linear, adapted_linear_reference)
    )
    assert ours <= 2 * plain + 1e-3


def test_the_gains_gradient_where_the_strength_is_small_or_zero() -> None:
    case = Case(lead=(50,), gain=True)
    with torch.no_grad():
        case.tensors[-1][0], case.tensors[-1][1] = -1.0, -1.0 + 1e-9
    _, grads = case.gradients(adapted_linear)
    _, expected = case.gradients(adapted_linear_reference)
    torch.testing.assert_close(grads[-1], expected[-1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", ["fused"], indirect=True)
def test_saves_one_copy_of_x_and_little_else() -> None:
    x = torch.randn(64, 32, requires_grad=True)
    weight = torch.randn(48, 32)
    factors = [LowRank(torch.randn(4, 32, requires_grad=True), torch.randn(48, 4, requires_grad=True), 1.0, None, 0.1)]
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for _ in range(3):
            adapted_linear(x, weight, None, factors, training=True)
    known = {x.data_ptr(), weight.data_ptr(), factors[0].A.data_ptr(), factors[0].B.data_ptr()}
    extra = sum(t.numel() for t in saved if t.data_ptr() not in known)
    assert extra == 3 * (4 * 64 + 1), "besides x and the weights: h (rank, T) and the dropout seed of each call"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rows", [2, 64])
def test_where_only_B_learns_x_is_not_kept(rows: int, dropout: float) -> None:
    x, weight, A = torch.randn(rows, 32).requires_grad_(), torch.randn(48, 32), torch.randn(4, 32)
    term = LowRank(A, torch.randn(48, 4, requires_grad=True), 1.5, None, dropout)
    saved: list[int] = []
    results = []
    for op in (adapted_linear, adapted_linear_reference):
        torch.manual_seed(0)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t):
            y = op(x, weight, None, [term], training=True)
        if op is adapted_linear:
            assert x.data_ptr() not in saved
        results.append(torch.autograd.grad(y.square().sum(), [x, term.B]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-2)  # sums of numbers of some thousands


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("trained", "expected"),
    [((), 0), (("A",), 2), (("B",), 1), (("A", "B"), 3), (("x",), 3), (("x", "A", "B"), 5), (("bias",), 0)],
)
def test_nothing_is_computed_for_what_needs_no_gradient(trained: tuple[str, ...], expected: int) -> None:
    case = Case(lead=(2,))
    tensors = dict(zip(("x", "weight", "bias", "A", "B"), (t.detach() for t in case.tensors)))
    for name in trained:
        tensors[name].requires_grad_()
    x, weight, bias, A, B = tensors.values()
    with Products() as forward:
        y = adapted_linear(x, weight, bias, [LowRank(A, B, 1.0)], training=True)
    assert forward.count == 3  # base, A, B
    if trained:
        with Products() as backward:
            y.sum().backward()
        assert backward.count == expected


def test_a_gain_that_is_not_read_from_the_output_takes_one_product() -> None:
    case = Case(lead=(64,), gain=True, dtype=torch.bfloat16)  # with a bias y is rounded too coarsely to read it there
    x, weight, bias, A, B, gain = (t.detach() for t in case.tensors)
    gain.requires_grad_()
    loss = adapted_linear(x, weight, bias, [LowRank(A, B, 1.0, gain)], training=True).float().square().sum()
    with Products() as backward:
        loss.backward()
    assert backward.count <= 1  # x Wᵀ at most, nothing for A and B


@pytest.mark.parametrize("case", [c for c in CASES if c.count == 1 and c.lead in ((7,), (2, 3), ())], ids=str)
def test_differentiable_twice(case: Case) -> None:
    def op(*tensors: Tensor) -> Tensor:
        return case.run(adapted_linear, tensors)

    torch.autograd.gradgradcheck(op, case.tensors)


def test_second_derivatives_of_a_form_are_those_of_its_products() -> None:
    form = dw.Int8().keep(torch.randn(40, 48))
    x = torch.randn(5, 48, requires_grad=True)
    factors = LowRank(torch.randn(2, 48, requires_grad=True), torch.randn(40, 2, requires_grad=True), 1.0)
    found = []
    for op in (adapted_linear, adapted_linear_reference):
        y = op(x, None, None, [factors], training=True, frozen=form)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (x, factors.A, factors.B)))
    for ours, theirs in zip(*found, strict=True):
        # a last bit that differs in g may move one of its 8-bit codes by a step, 1/127 of its row's largest
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2 * float(theirs.abs().mean()))


def test_a_penalty_on_the_gradient_of_a_linear_loss() -> None:
    """Which needs the second derivatives though the incoming gradient is a constant."""
    case = Case(bias=False)
    x, weight, A, B = case.tensors
    y = adapted_linear(x, weight.detach(), None, [LowRank(A, B, 1.0)], training=True)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    expected = weight.sum(0) + B.sum(0) @ A  # of every row
    truth = torch.autograd.grad(len(x) * expected.square().sum(), (A, B))
    for ours, theirs in zip(torch.autograd.grad(dx.square().sum(), (A, B)), truth, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tied", [False, True])
def test_second_derivatives_through_an_input_that_is_made_again(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v read one GELU's output, which nobody keeps; with one tensor in two places its shares are not counted twice."""
    monkeypatch.setattr(recompute, "WORTH", 0)
    torch.manual_seed(0)
    z, weight, B = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, 5), (5, 5), (5, 2)))
    A = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    other = A if tied else torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    terms = [LowRank(A, B, 1.5), LowRank(other, B, 1.0, weight[0].detach())]
    found = []
    for op in (adapted_linear, adapted_linear_reference):
        x = F.gelu(z)
        y = torch.stack([op(x, weight * i, None, terms, training=True) for i in (1, 2, 3)])
        firsts = torch.autograd.grad(y.pow(3).sum(), (z, A, B), create_graph=True)
        seconds = torch.autograd.grad(sum(f.square().sum() for f in firsts), (z, weight, A, B))
        found.append((*firsts, *seconds))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_graph_of_gradients_in_a_checkpointed_part_where_x_is_not_kept() -> None:
    """Which gives out what it saved but once."""
    case = Case(bias=False)
    x, weight, A, B = case.tensors
    terms = [LowRank(A.detach(), B, 1.0)]

    def part(x: Tensor) -> Tensor:
        return adapted_linear(x, weight.detach(), None, terms, training=True)

    found = [
        torch.autograd.grad(y.square().sum(), (x, B), create_graph=True)
        for y in (part(x), checkpoint(part, x, use_reentrant=False))
    ]
    torch.testing.assert_close(*found)


def test_second_derivatives_are_refused_where_x_is_not_kept() -> None:
    case = Case(bias=False)
    x, weight, A, B = case.tensors
    for op in (adapted_linear, adapted_linear_reference):
        y = op(x, weight.detach(), None, [LowRank(A.detach(), B, 1.0)], training=True)
        firsts = torch.autograd.grad(y.square().sum(), (x, B), create_graph=True)
        if op is adapted_linear and select.SMALL < 0:
            with pytest.raises(RuntimeError, match="second derivatives"):
                torch.autograd.grad(firsts[1].sum(), x)
        else:
            torch.autograd.grad(firsts[1].sum(), x)


@pytest.mark.parametrize("kind", [dw.LoRA, dw.DoRA])
@pytest.mark.parametrize("bias", [False, True])
def test_tracers_that_have_no_numbers_to_look_at(kind: Any, bias: bool) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(48, 40, bias=bias))
    dw.attach(layer, kind(rank=2), targets=["0"])
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1)
    x = torch.randn(6, 48)
    torch.testing.assert_close(make_fx(layer)(x)(x), layer(x))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(6, 48)).shape == (6, 40)


def test_sixteen_bit_base_with_adapters_in_32_bit() -> None:
    case = Case(lead=(64,), width=48, out=40, rank=4, gain=True, dtype=torch.float32)
    exact = Case(lead=(64,), width=48, out=40, rank=4, gain=True, dtype=torch.float64)
    truth = exact.run(adapted_linear_reference)
    wide = case.tensors
    half = tuple(t.detach().bfloat16().requires_grad_() if i < 3 else t for i, t in enumerate(wide))
    errors = []
    for op in (adapted_linear, adapted_linear_reference):
        y = case.run(op, half)
        assert y.dtype == torch.bfloat16
        grads = torch.autograd.grad(y.float().square().sum(), half)
        assert [g.dtype for g in grads] == [t.dtype for t in half]
        errors.append(((y.double() - truth).norm() / truth.norm()).item())
    assert errors[0] < 2 * errors[1], f"fused {errors[0]:.1e}, plain {errors[1]:.1e}"


def test_autocast_is_that_of_a_linear_layer() -> None:
    case = Case(lead=(2, 30), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = case.run(adapted_linear), case.run(adapted_linear_reference)
        plain = F.linear(case.tensors[0], case.tensors[1], case.tensors[2])
    assert y.dtype == z.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(y, z, rtol=3e-2, atol=6e-2)
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in case.tensors)


@pytest.mark.parametrize("case", [Case(lead=(2, 3)), Case(lead=(60,)), Case(gain=True), Case(dropout=0.3)], ids=str)
def test_compiles_into_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: case.run(adapted_linear, t, training=False), fullgraph=True)
    y = compiled(*case.tensors)
    grads = torch.autograd.grad(y.square().sum(), case.tensors)
    z = case.run(adapted_linear_reference, training=False)
    expected = torch.autograd.grad(z.square().sum(), case.tensors)
    torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-9)


def test_compiled_dropout_drops_the_stated_share() -> None:
    torch._dynamo.reset()
    A, B = torch.ones(1, 64), torch.ones(1, 1)

    @torch.compile(fullgraph=True)
    def step(x: torch.Tensor) -> torch.Tensor:
        return adapted_linear(x, torch.zeros(1, 64), None, [LowRank(A, B, 1.0, None, 0.25)], training=True)

    kept = step(torch.ones(2000, 64)) * 0.75 / 64
    assert abs(float(kept.mean()) - 0.75) < 0.02


@pytest.mark.parametrize("gain", [False, True])
def test_checkpointing_makes_the_same_dropout_again(gain: bool) -> None:
    case = Case(dropout=0.4, lead=(30,), gain=gain)
    y = case.run(adapted_linear)
    expected = torch.autograd.grad(y.square().sum(), case.tensors)
    torch.manual_seed(11)
    z = torch.utils.checkpoint.checkpoint(lambda *t: case.run(adapted_linear, t), *case.tensors, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(z.square().sum(), case.tensors), expected)


def test_function_transforms_use_plain_operations() -> None:
    case = Case()
    x, weight, bias, A, B = (t.detach() for t in case.tensors)

    def loss(A: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return adapted_linear(row, weight, bias, [LowRank(A, B, 0.5)], training=False).square().sum()

    per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(A, x)
    torch.testing.assert_close(per_row.sum(0), torch.func.grad(loss)(A, x))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(A, torch.ones_like(A))
        slope = torch.autograd.forward_ad.unpack_dual(loss(dual, x)).tangent
    torch.testing.assert_close(slope, torch.func.grad(loss)(A, x).sum())


class Doubled:
    """A frozen form for the tests: it holds V and stands for W = 2 V."""

    def __init__(self, v: torch.Tensor) -> None:
        self.v = v

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * (x @ self.v.t())

    def matmul_grad(self, g: torch.Tensor) -> torch.Tensor:
        return 2 * (g @ self.v)


@pytest.mark.parametrize("case", [Case(), Case(lead=(2, 3), gain=True), Case(gain=True, dropout=0.2)], ids=str)
def test_a_frozen_form_is_asked_for_its_products(case: Case) -> None:
    trained = [t for i, t in enumerate(case.tensors) if i != 1]
    results = []
    for frozen in (True, False):

        def op(x, weight, bias, adapters, training, frozen=frozen):  # type: ignore[no-untyped-def]
            if frozen:
                return adapted_linear(x, None, bias, adapters, training=training, frozen=Doubled(weight.detach() / 2))
            return adapted_linear_reference(x, weight, bias, adapters, training=training)

        y = case.run(op)
        results.append([y, *torch.autograd.grad(y.square().sum(), trained)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


def test_the_base_alone_in_a_frozen_form() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    v = torch.randn(4, 5)
    y = adapted_linear(x, None, None, (), training=True, frozen=Doubled(v))
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * v.sum(0).expand(3, 5))


def test_the_witness_sees_writes_to_the_output_and_to_its_views() -> None:
    y = torch.randn(4, 3)
    kept, unchanged = alias(y)
    assert unchanged()
    assert kept.data_ptr() == y.data_ptr()
    y.view(-1)[0] = 7.0
    assert not unchanged()
