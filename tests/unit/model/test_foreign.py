"""Models whose linear layers bitsandbytes or torchao have quantised adapt as they are."""

import copy

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.errors import ModelError, TargetError
from tests.laws.conftest import shaken

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


def bitsandbytes(kind: str, **options) -> nn.Module:
    library = pytest.importorskip("bitsandbytes")
    layers = []
    for layer in plain():
        if isinstance(layer, nn.Linear):
            new = getattr(library.nn, kind)(layer.in_features, layer.out_features, **options)
            new.load_state_dict(layer.state_dict())
            layers.append(new)
        else:
            layers.append(layer)
    return nn.Sequential(*layers).to("cpu").requires_grad_(False)


def torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = plain()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model.requires_grad_(False)


MODELS = {
    "bitsandbytes 4 bit": lambda: bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
    "bitsandbytes 8 bit": lambda: bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "torchao": torchao,
}
X = torch.randn(3, 64)


def dense_twin(model: nn.Module) -> nn.Module:
    """Plain layers with W + ΔW, from the dense weights that the quantised ones stand for."""
    twin = plain()
    with torch.no_grad():
        for mine, theirs in zip(model[::2], twin[::2]):
            theirs.weight.copy_(mine.changed("weight"))
            theirs.bias.copy_(mine.changed("bias"))
    return twin


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("variant", [dw.LoRA(rank=2), dw.DoRA(rank=2)], ids=repr)
def test_adapters_learn_over_a_foreign_form(kind, variant):
    model = MODELS[kind]()
    classes, before = [type(layer) for layer in model], model(X)
    dw.attach(model, variant)
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-5)
    shaken(model, size=0.1)
    x = X.clone().requires_grad_()
    found = model(x)
    expected = dense_twin(model)(X).detach()
    assert float((found.detach() - expected).norm() / expected.norm()) < 0.02
    found.square().sum().backward()
    dw.check_gradients(model)
    assert x.grad is not None
    with dw.rows(model, ["default", None, "default"]):
        mixed = model(X)
    torch.testing.assert_close(mixed[1], before[1], rtol=1e-2, atol=1e-2)
    assert {c.layer for c in dw.get(model).changes.values()} == {"linear"}
    with pytest.raises(ModelError, match="another library keeps it quantised"):
        dw.merge(model)
    dw.detach(model)
    assert [type(layer) for layer in model] == classes
    torch.testing.assert_close(model(X), before)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("variant", [dw.Full(), dw.LoHa(rank=2), dw.LoRA(rank=2, bias=True), dw.IA3()], ids=repr)
def test_other_variants(kind, variant):
    model = MODELS[kind]()
    before = model(X)
    dw.attach(model, variant, targets=["0", "2"])
    assert float((model(X) - before).detach().norm() / before.norm()) < 0.02
    shaken(model, size=0.05)
    expected = dense_twin(model)(X).detach()
    assert float((model(X).detach() - expected).norm() / expected.norm()) < 0.02
    model(X).square().sum().backward()
    dw.check_gradients(model)


@pytest.mark.parametrize("kind", MODELS)
def test_quantize_leaves_them_alone(kind):
    with pytest.raises(TargetError, match="another library"):
        dw.quantize(MODELS[kind](), dw.Int8())


def test_a_copy_answers_alike():
    model = dw.attach(MODELS["bitsandbytes 8 bit"](), dw.LoRA(rank=2))
    shaken(model)
    model(X)
    torch.testing.assert_close(copy.deepcopy(model)(X), model(X))
