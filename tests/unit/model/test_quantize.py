"""Forms of the frozen weight: what is kept, what is computed, what is refused, and the way back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.core.registry import forms, variants
from deltaw.errors import ConfigError, ModelError, NonFinite, TargetError
from deltaw.frozen.nf4 import normal_float_4
from tests.laws.conftest import shaken

FORMS = [f for _, cls in forms.items() for f in cls.examples()]
VARIANTS = [v for _, cls in variants.items() for v in cls.examples() if not v.any_shape]


def plain(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 33, bias=False), nn.Tanh(), nn.Linear(33, 5)).to(
        dtype
    )


def dense_twin(model: nn.Module) -> nn.Module:
    """The same model with the plain weights that the forms stand for."""
    return dw.dequantize(copy.deepcopy(model), into="dense")


def closeness(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


X = torch.randn(64, 40)


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_products_are_those_of_the_weight_that_the_form_stands_for(form):
    weight = torch.randn(33, 48) * 0.1
    kept = form.keep(weight)
    x, g = torch.randn(7, 48), torch.randn(2, 3, 33)
    bound = max(form.rounding, 1e-5)
    assert kept.dense().shape == (33, 48)
    assert kept.dense().dtype == torch.float32
    assert closeness(kept.matmul(x), x @ kept.dense().T) <= bound
    assert closeness(kept.matmul_grad(g), g @ kept.dense()) <= bound
    assert kept.matmul(x[:0]).shape == (0, 33)
    assert kept.matmul(x[0]).shape == (33,)
    assert kept.nbytes < weight.numel() * 4
    assert repr(form) in repr(kept)


def test_nf4_is_the_papers():
    published = [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
    values = normal_float_4()
    torch.testing.assert_close(values, torch.tensor(published), rtol=0, atol=2e-7)
    weight = torch.randn(9, 31)
    blocks = nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % 64)).reshape(-1, 64)
    size = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / size)[..., None].sub(values).abs().argmin(-1)
    expected = (values[nearest] * size).reshape(-1)[: weight.numel()].reshape(9, 31)
    torch.testing.assert_close(dw.NF4().keep(weight).dense(), expected)
    double = dw.NF4(double=True).keep(torch.randn(256, 512))
    assert abs(double.nbytes * 8 / (256 * 512) - 4.127) < 0.02
    assert torch.equal(dw.NF4().keep(torch.zeros(4, 4)).dense(), torch.zeros(4, 4))


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
@pytest.mark.parametrize("first", ["quantize", "attach"])
def test_adapters_over_a_form(form, variant, first):
    model = plain()
    if first == "quantize":
        dw.quantize(model, form)
    dw.attach(model, variant)
    if first == "attach":
        dw.quantize(model, form)
    shaken(model, size=0.1).eval()
    twin = dense_twin(model)
    x = X.clone().requires_grad_()
    found, expected = model(x), twin(x)
    bound = max(3 * form.rounding, 5e-4)
    assert closeness(found, expected) <= bound
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    others = [x, *(p for p in twin.parameters() if p.requires_grad)]
    up = torch.randn_like(found)
    for f, e in zip(torch.autograd.grad(found, trained, up), torch.autograd.grad(expected, others, up)):
        assert closeness(f, e) <= 3 * bound or float(e.norm()) < 1e-6


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_a_fresh_adapter_over_a_form_changes_no_bit_and_leaves_no_trace(form):
    model = plain()
    dw.quantize(model, form, keep="memory")
    before, keys = model(X), list(model.state_dict())
    dw.attach(model, dw.LoRA(rank=2), name="a")
    assert torch.equal(model(X), before)
    dw.detach(model)
    assert torch.equal(model(X), before)
    assert list(model.state_dict()) == keys
    dw.dequantize(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]


@pytest.mark.parametrize("keep", ["memory", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_way_back_is_exact(keep, dtype):
    model = plain(dtype)
    reference = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    report = dw.quantize(model, dw.Int8(), keep=keep)
    assert len(report.weights) == 3
    assert "3 weights as Int8()" in str(report)
    assert not any("weight" in n for n, _ in model.named_parameters())
    dw.attach(model, dw.LoRA(rank=2))
    dw.dequantize(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)
    dw.detach(model)
    assert list(model.state_dict()) == list(reference.state_dict())
    for (name, found), expected in zip(model.named_parameters(), reference.parameters()):
        assert torch.equal(found, expected)
        assert found.dtype == dtype
        assert found.requires_grad
        if keep == "memory":
            assert found is parameters[name]
    assert type(model[0]) is nn.Linear


def test_without_the_originals_the_way_back_is_an_error_that_says_so():
    model = plain()
    dw.quantize(model, dw.NF4())
    with pytest.raises(ModelError, match=r"originals of 3 weights were not kept \(0\.weight.*into='dense'"):
        dw.dequantize(model)
    expected = model(X)
    dw.dequantize(model, into="dense")
    torch.testing.assert_close(model(X), expected)
    with pytest.raises(ModelError, match="nothing is quantised"):
        dw.dequantize(model)


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_copies_and_state_dicts(form):
    model = plain()
    dw.quantize(model, form)
    dw.attach(model, dw.LoRA(rank=2))
    shaken(model)
    before = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), before)
    state = model.state_dict()
    assert "0.forms.weight.codes" in state
    assert "0.weight" not in state
    other = plain()
    with torch.no_grad():
        other[0].weight.mul_(2)
    dw.quantize(other, form)
    dw.attach(other, dw.LoRA(rank=2))
    other(X)
    other.load_state_dict(state)
    assert torch.equal(other(X), before)


def test_the_kept_tensors_are_never_cast():
    model = plain()
    dw.quantize(model, dw.Int8())
    scales = model[0].form_of("weight").scales.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model[0].form_of("weight").scales, scales)
    assert model[0].form_of("weight").dense().dtype == torch.bfloat16
    assert model(X.bfloat16()).dtype == torch.bfloat16
    assert model[0].weight.dtype == torch.int8
    assert model[0].weight.shape == (48, 40)
    with pytest.raises(RuntimeError):
        nn.functional.linear(X, model[0].weight)


def test_trained_and_shared_weights_are_left_alone():
    model = plain()
    dw.attach(model, dw.LoRA(rank=2), targets=["0"], train=["4"])
    report = dw.quantize(model, dw.Int8())
    assert [w.key for w in report.weights] == ["0.weight", "2.weight"]
    assert report.skipped == {"4.weight": "an adapter trains a copy of it"}
    with pytest.raises(TargetError, match="quantised already"):
        dw.quantize(model, dw.Int8(), targets=["0"])
    model = plain()
    dw.attach(model, dw.LoRA(rank=2), targets=["0"], freeze=False)
    with pytest.raises(TargetError, match="it is trained"):
        dw.quantize(model, dw.Int8(), targets=["2"])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert set(dw.quantize(model, dw.Int8()).skipped) == {"0.weight", "1.weight"}


def test_training_a_copy_over_a_form():
    model = plain()
    dw.quantize(model, dw.Int8())
    before = model(X)
    dw.attach(model, dw.LoRA(rank=2), targets=["0"], train=["4"])
    delta = model[4].deltas("default")["weight"]
    assert torch.equal(delta.value, model[4].form_of("weight").dense())
    assert closeness(model(X), before) < 0.03
    model(X).sum().backward()
    assert delta.value.grad is not None


def test_refusals_leave_the_model_as_it_was():
    model = plain()
    with pytest.raises(ConfigError, match="Int8"):
        dw.quantize(model, "int8")
    with pytest.raises(ConfigError, match="keep"):
        dw.quantize(model, dw.Int8(), keep="disk")
    with pytest.raises(TargetError, match="matches no layer"):
        dw.quantize(model, dw.Int8(), targets=["layer"])
    with pytest.raises(ConfigError, match="even"):
        dw.NF4(block=3)
    with pytest.raises(ConfigError, match="bfloat16"):
        dw.Dense16(dtype=torch.float32)
    with pytest.raises(ConfigError, match="beyond its range"):
        dw.Dense16(dtype=torch.float16).keep(torch.full((2, 2), 1e6))
    conv = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    with pytest.raises(TargetError, match="linear layers can be quantised"):
        dw.quantize(conv, dw.Int8(), targets=["0", "1"])
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    with pytest.raises(NonFinite, match=r"4\.weight"):
        dw.quantize(model, dw.Int8())
    with torch.device("meta"):
        away = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ModelError, match="meta device"):
        dw.quantize(away, dw.Int8())
    assert [type(m) for m in model[::2]] == [nn.Linear] * 3
    dw.attach(conv, dw.LoRA(rank=1), targets=["0"])
    with dw.merged(conv), pytest.raises(ModelError, match="unmerge"):
        dw.quantize(conv, dw.Int8())


def test_rows_threads_and_checkpoints_work_over_forms():
    model = plain()
    dw.quantize(model, dw.Int8())
    for name in "ab":
        dw.attach(model, dw.LoRA(rank=2), name=name)
    shaken(model).eval()
    choices = ["a", None, "b", "a"]
    rows = []
    for row, choice in zip(X[:4], choices):
        with dw.use(model, choice):
            rows.append(model(row[None]))
    for how in ("one pass", "split"):
        with dw.rows(model, choices, how=how):
            torch.testing.assert_close(model(X[:4]), torch.cat(rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_compiled_without_graph_breaks(form):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = plain()
    dw.quantize(model, form)
    dw.attach(model, dw.DoRA(rank=2))
    shaken(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = X.clone().requires_grad_()
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    found, expected = compiled(x), model(x)
    bound = max(3 * form.rounding, 1e-4)
    assert closeness(found, expected) <= bound
    for f, e in zip(torch.autograd.grad(found.sum(), trained), torch.autograd.grad(expected.sum(), trained)):
        assert closeness(f, e) <= 3 * bound
    assert not torch._dynamo.utils.counters["graph_break"]


def test_an_encoder_layers_fast_path_sees_the_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        dw.quantize(model, dw.Int8(), targets=["linear1", "linear2"])
        assert closeness(model(x), expected) < 0.03
        dw.attach(model, dw.LoRA(rank=2), targets=["linear1"])
        dw.detach(model)
        assert closeness(model(x), expected) < 0.03
        dw.dequantize(model, into="dense")
    assert type(model[0]) is nn.TransformerEncoderLayer


def test_gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(30, (2, 7))
    before = model(ids).logits
    report = dw.quantize(model, dw.Int8(), keep="memory")
    assert len(report.weights) == 8
    assert 0 < closeness(model(ids).logits, before) < 0.05
    dw.attach(model, dw.LoRA(rank=2), targets=["c_attn"])
    shaken(model)
    found, expected = model(ids).logits, dense_twin(model)(ids).logits
    assert closeness(found, expected) < 0.05
    dw.detach(model)
    dw.dequantize(model)
    assert torch.equal(model(ids).logits, before)
