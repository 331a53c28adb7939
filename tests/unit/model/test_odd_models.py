"""Models that are unlike most: parametrised, lazy and scripted layers, modules without a forward, odd attributes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import deltaw as dw
from deltaw.core.host import Host
from deltaw.errors import ModelError, TargetError
from tests.laws.conftest import shaken

X = torch.randn(3, 4, dtype=torch.float64)


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original0"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "weight_norm, old": (weight_norm, "weight_g"),
    "spectral_norm, old": (spectral_norm, "weight_orig"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_is_computed_is_refused_with_what_it_is_computed_from(how):
    norm, source = COMPUTED[how]
    model = Model(nn.Linear(4, 4), norm(nn.Linear(4, 4)))
    with pytest.raises(TargetError, match=r"'layers.1'.*computed from") as error:
        dw.attach(model, dw.LoRA(rank=2))
    assert source in str(error.value)
    assert not any(isinstance(m, Host) for m in model.modules())
    dw.attach(model, dw.LoRA(rank=2), exclude=["layers.1"])


def test_a_computed_weight_is_trained_in_full(tmp_path):
    model = Model(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4))).double()
    base = model(X)
    dw.attach(model, dw.LoRA(rank=2), ["layers.0"], train=["layers.1"])
    assert torch.equal(model(X), base)
    shaken(model)
    out = model(X)
    out.sum().backward()
    dw.check_gradients(model)
    with dw.merged(model):
        torch.testing.assert_close(model(X), out)
    dw.save(model, tmp_path / "a")
    dw.detach(model)
    assert torch.equal(model(X), base)
    assert torch.equal(dw.load(model, tmp_path / "a")(X), out)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Model(nn.Linear(4, 4), nn.LazyLinear(4)), "LazyLinear have no shape yet; run the model once"),
        (lambda: torch.jit.script(Model(nn.Linear(4, 4))), "Model is scripted or traced"),
        (lambda: Model(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4))), "Linear is scripted or traced"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_layers_that_cannot_be_adapted_yet_or_any_more(model, words):
    model = model()
    with pytest.raises(ModelError, match=words):
        dw.attach(model, dw.LoRA(rank=2), ["layers.0"])


def test_what_verbs_make_inside_of_inference_mode_can_be_trained(tmp_path):
    model, x = Model(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)

    def trains(*names):
        for speaking in names:
            with dw.use(model, speaking):
                model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert not parameter.is_inference()
            assert (parameter.grad is not None) == parameter.requires_grad, name
            parameter.grad = None

    with torch.inference_mode():
        dw.attach(model, dw.DoRA(rank=2), ["layers.0"], train=["layers.1"])
        dw.copy(model, "default", "other")
        dw.save(model, tmp_path / "a", name="default")
    trains("default", "other")
    with torch.inference_mode():
        dw.load(model, tmp_path / "a", name="third", active=False)
        dw.load(model, tmp_path / "a", name="fourth", trainable=True)
    trains("default", "other", "fourth")
    dw.activate(model, "third")
    model(x.clone().requires_grad_()).sum().backward()
    with torch.inference_mode():
        dw.merge(model, "third")
        dw.unmerge(model)
        dw.merge(model, "third", keep=None)
    dw.detach(model)
    model.requires_grad_(True)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_module_of_complex_numbers_is_refused():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 2, dtype=torch.complex64))
    for targets, train in ((["0"], []), (["0"], ["1"])):
        with pytest.raises(TargetError, match="complex numbers"):
            dw.attach(model, dw.LoRA(rank=2), targets, train=train)
    assert type(model[0]) is nn.Linear


def test_layers_are_called_by_torchs_own_keywords():
    cases = [
        (nn.Linear(4, 4), {"input": torch.randn(2, 4)}),
        (nn.Embedding(5, 4), {"input": torch.tensor([1, 2])}),
        (nn.Conv1d(3, 4, 2), {"input": torch.randn(2, 3, 5)}),
        (nn.ConvTranspose1d(3, 4, 3, stride=2), {"input": torch.randn(2, 3, 5), "output_size": [12]}),
    ]
    for layer, given in cases:
        for variant in (dw.LoRA(rank=1), dw.DoRA(rank=1), dw.Full()):
            model = nn.Sequential(layer)
            dw.attach(model, variant, ["0"])
            shaken(model)
            assert torch.equal(model[0](**given), model[0](*given.values()))
            dw.detach(model)


class Scaled(nn.Linear):
    """A forward with an argument of which the probe knows nothing."""

    def forward(self, x, scale=1.0):
        return nn.functional.linear(x, self.weight * scale, self.bias)


def test_further_arguments_of_an_own_forward_reach_it():
    model, x = nn.Sequential(Scaled(4, 4)), torch.randn(2, 4)
    shaken(dw.attach(model, dw.LoRA(rank=2), ["0"]))
    found = [model[0](x), model[0](x, 0.5), model[0](x, scale=0.5), model[0](x=x)]
    dw.merge(model)
    expected = [model[0](x), model[0](x, 0.5), model[0](x, scale=0.5), model[0](x)]
    for y, z in zip(found, expected):
        torch.testing.assert_close(y, z)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Bilinear(5, 4, 3)

    def forward(self, a, b):
        return self.mix(a, b)


def test_ia3_on_a_parameter_of_an_unknown_module_leaves_its_bias_alone():
    model, a, b = Mixed(), torch.randn(2, 5), torch.randn(2, 4)
    shaken(dw.attach(model, dw.IA3(), ["mix.weight"]))
    y = model(a, b)
    dw.merge(model)
    torch.testing.assert_close(model(a, b), y)


def test_a_parameter_that_was_resized_under_its_trained_copy_is_told():
    model = Model(nn.Embedding(5, 4))
    dw.attach(model, {"layers.0": dw.Full()})
    model.layers[0].weight = nn.Parameter(torch.zeros(7, 4))
    with pytest.raises(ModelError, match=r"is \(7, 4\) now and was \(5, 4\)"):
        model(torch.tensor([6]))


def test_sequences_of_different_lengths_in_one_nested_tensor():
    x = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=torch.jagged)
    model = nn.Sequential(nn.Linear(6, 8))
    plain = model(x).detach()
    dw.attach(model, dw.DoRA(rank=2), ["0"])
    assert all(torch.equal(a, b) for a, b in zip(model(x).unbind(), plain.unbind(), strict=True))
    shaken(model)
    (model(x) + plain).values().sum().backward()  # both are of one shape
    for y, part in zip(model(x).unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(y, model(part))


def test_a_layer_without_inputs():
    model = nn.Sequential(nn.Linear(0, 5))
    dw.attach(model, dw.LoRA(rank=2), ["0"])
    assert model(torch.randn(3, 0)).shape == (3, 5)


BASE_CHANGES = {
    "a checkpoint is loaded": lambda layer: layer.load_state_dict(nn.Linear(4, 4).state_dict(), strict=False),
    "written in place": lambda layer: torch.no_grad()(layer.weight.mul_)(3),
    "a new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(4, 4))),
    "new data": lambda layer: setattr(layer.weight, "data", torch.randn(4, 4)),
}


@pytest.mark.parametrize("change", BASE_CHANGES)
def test_dora_follows_a_base_that_changes_after_attach(change):
    model, x = Model(nn.Linear(4, 4)), torch.randn(3, 4)
    layer = model.layers[0]
    shaken(dw.attach(model, dw.DoRA(rank=2), ["layers.0"]))
    model(x)
    BASE_CHANGES[change](layer)
    delta = layer.adapters.default.weight
    changed = (layer.weight + delta.variant.scale * delta.B @ delta.A).double()
    expected = x.double() @ (delta.m[:, None] * changed / changed.norm(dim=1, keepdim=True)).T + layer.bias
    y = model(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    dw.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("freeze", [False, True])
def test_dora_follows_a_base_that_is_trained_with_it(freeze, options):
    model, x = Model(nn.Linear(4, 4)), torch.randn(3, 4)
    shaken(dw.attach(model, dw.DoRA(rank=2), ["layers.0"], freeze=freeze))
    model(x)
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, **options)  # the fused one does not count its writes
    for _ in range(4):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = model.layers[0].adapters.default.weight
    for trained in (True, False):  # then frozen again
        model.requires_grad_(trained)
        y = model(x)
        delta.squares = None
        torch.testing.assert_close(model(x), y)


def test_a_weight_that_became_computed_is_not_merged_into():
    for compute in (parametrizations.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)):
        model, x = Model(nn.Linear(4, 4)), torch.randn(3, 4)
        shaken(dw.attach(model, dw.LoRA(rank=2), ["layers.0"]))
        compute(model.layers[0])
        y = model(x)
        with pytest.raises(ModelError, match=r"'layers.0.weight'.*is computed from other parameters"):
            dw.merge(model)
        assert torch.equal(model(x), y)


def test_what_was_merged_for_good_is_the_base_of_the_others(tmp_path):
    model, x = Model(nn.Linear(4, 4)), torch.randn(3, 4)
    for name in ("a", "b"):
        shaken(dw.attach(model, dw.LoRA(rank=2), ["layers.0"], name=name))
    with dw.use(model, "a"):
        y = model(x)
    dw.merge(model, "a", keep=None)
    dw.detach(model, "a")
    with dw.disabled(model):
        torch.testing.assert_close(model(x), y)
    dw.activate(model, "b")
    z = model(x)
    dw.save(model, tmp_path / "b", name="b")
    dw.detach(model)
    torch.testing.assert_close(dw.load(model, tmp_path / "b")(x), z)


def test_dora_is_exported():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval(), torch.randn(4, 6)
    shaken(dw.attach(model, dw.DoRA(rank=2), nn.Linear))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("variant", [dw.LoRA(rank=2), dw.DoRA(rank=2), dw.LoHa(rank=2)], ids=repr)
def test_exported_for_any_batch(variant):
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 300)).eval()
    shaken(dw.attach(model, variant, ["0"]))
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (torch.randn(64, 256),), dynamic_shapes=batch).module()
    for rows in (2, 300):
        x = torch.randn(rows, 256)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_layer_without_parameters_that_looks_like_a_container():
    model = Model(nn.Linear(4, 4), nn.Identity())
    with pytest.raises(TargetError, match=r"'layers.1', a Identity, which has no parameter that LoRA could adapt"):
        dw.attach(model, dw.LoRA(rank=2), ["layers.1"])


class Raw(nn.Module):
    """Parameters in containers that have no forward, and a module of which another method is called."""

    def __init__(self) -> None:
        super().__init__()
        self.named = nn.ParameterDict({"k": torch.randn(4, 4)})
        self.listed = nn.ParameterList([torch.randn(4, 4)])
        self.bare = nn.Module()
        self.bare.register_parameter("w", nn.Parameter(torch.randn(4, 4)))
        self.other = Projection()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for w in self.listed:
            x = x @ w
        return self.other.project(x @ self.named["k"] @ self.bare.w)


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x)


@pytest.mark.parametrize("target", ["named.k", "listed.0", "bare.w", "other.w"])
@pytest.mark.parametrize("how", ["adapted", "trained in full"])
def test_parameters_of_modules_that_are_never_called_take_effect(target, how):
    model = Raw().double()
    base = model(X)
    if how == "adapted":
        dw.attach(model, dw.LoRA(rank=2), [target])
    else:
        dw.attach(model, {target: dw.Full()})
    assert torch.equal(model(X), base)
    shaken(model)
    out = model(X)
    assert not torch.allclose(out, base)
    with dw.merged(model):
        torch.testing.assert_close(model(X), out)
    dw.detach(model)
    assert torch.equal(model(X), base)
    assert type(model) is Raw


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.named, self.first = nn.ParameterDict({"k": torch.randn(4, 4)}), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) @ self._modules["named"]["k"]


def test_parameters_that_are_reached_by_ways_unknown_are_refused_and_nothing_changes():
    model = Hidden()
    with pytest.raises(TargetError, match=r"'named' .ParameterDict. has no forward and is never called"):
        dw.attach(model, dw.LoRA(rank=2), ["first", "named.k"])
    assert not any(isinstance(m, Host) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


class Tower(nn.Module):
    """As CLIP: a parameter of its own that is read by a method which is called by itself as well."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Linear(6, 5)
        self.projection = nn.Parameter(torch.randn(5, 4))
        self.seen = 0

    def encode(self, x):
        return self.tower(x) @ self.projection

    def count(self):
        self.seen += self.projection.shape[0]

    def reset_parameters(self):
        nn.init.zeros_(self.projection)

    def forward(self, x):
        return nn.functional.normalize(self.encode(x), dim=-1)


@pytest.mark.parametrize("targets", [["tower"], ["tower", "projection"]])
def test_methods_besides_forward_see_a_changed_parameter(targets):
    model, x = Tower(), torch.randn(3, 6)
    plain = model.encode(x)
    dw.attach(model, dw.LoRA(rank=2), targets, train=["projection"] if len(targets) == 1 else [])
    assert torch.equal(model.encode(x), plain)
    shaken(model)
    y = model.encode(x)
    torch.testing.assert_close(nn.functional.normalize(y, dim=-1), model(x))
    with dw.merged(model):
        torch.testing.assert_close(model.encode(x), y)
    with dw.disabled(model):
        assert torch.equal(model.encode(x), plain)
    model.count()
    model.reset_parameters()
    assert model.seen == 5
    assert not model.projection.any()
    dw.detach(model)
    assert "encode" not in vars(type(model)) or type(model) is Tower


class ReadsDense(nn.Module):
    """Reads the weight of a layer called `dense`, as BLOOM's attention may, and has others with names of everyday use."""

    def __init__(self):
        super().__init__()
        self.dense, self.form = nn.Linear(6, 6), nn.Linear(6, 6)
        self.matrix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return nn.functional.linear(x, self.dense.weight) + self.form(x) @ self.matrix


def test_layers_with_everyday_names_inside_of_a_reader():
    model, x = Model(ReadsDense()), torch.randn(3, 6)
    y = model(x)
    shaken(dw.attach(model, dw.LoRA(rank=2), ["dense"]))
    assert isinstance(model.layers[0].dense, nn.Linear)
    assert model.get_submodule("layers.0.dense") is model.layers[0].dense
    with dw.disabled(model):
        assert torch.equal(model(x), y)
    changed = model(x)
    assert not torch.allclose(changed, y)
    with dw.merged(model):
        torch.testing.assert_close(model(x), changed)


def test_a_layer_that_has_one_of_our_names_is_refused_by_it():
    class Family(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.deltas = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.deltas(nn.functional.linear(x, self.layer.weight))

    model = Model(Family())
    with pytest.raises(TargetError, match="'deltas' of its own, which deltaw needs"):
        dw.attach(model, dw.LoRA(rank=2), ["layer"])
    assert type(model.layers[0].layer) is nn.Linear


def test_the_norm_of_a_weight_at_an_address_that_is_used_again():
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64)
    dw.attach(model, dw.DoRA(rank=4), ["0"])
    weight, m = model[0].weight.detach().clone(), model[0].adapters.default.weight.m.detach()
    for scale in (1.0, 2.0, 3.0, 4.0):
        W = weight * scale
        expected = nn.functional.linear(x, (m / W.norm(dim=1))[:, None] * W, model[0].bias)
        del W
        torch.testing.assert_close(torch.func.functional_call(model, {"0.weight": weight * scale}, (x,)), expected)
    for _ in range(20):
        model[0].weight.data = torch.randn(64, 64)
        model(x)
        model[0].weight.data = model[0].weight.data * 2
        W = model[0].weight.detach()
        expected = nn.functional.linear(x, (m / W.norm(dim=1))[:, None] * W, model[0].bias)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), model(x))


class Tied(nn.Module):
    """An embedding whose weight the model reads once more, as its head."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(20, 16), nn.Linear(16, 16)

    def forward(self, ids):
        return self.body(self.embed(ids)).relu() @ self.embed.weight.T


def test_a_forward_of_the_instance_that_hides_a_reader_is_refused():
    model = Tied()
    plain = model.forward
    model.forward = lambda *args: plain(*args)
    with pytest.raises(TargetError, match="attach first, and wrap the model after that"):
        dw.attach(model, dw.LoRA(rank=2), ["embed"])
    assert not isinstance(model, Host)
    shaken(dw.attach(model, dw.LoRA(rank=2), ["body"]))  # nobody reads this one past its call


def test_hooks_of_accelerate_before_and_after_adapters():
    hooks = pytest.importorskip("accelerate.hooks")
    ids = torch.randint(0, 20, (3, 5))
    for first in (True, False):
        model = Tied()
        base = model(ids)
        if first:
            for module in (model, model.embed, model.body):
                hooks.add_hook_to_module(module, hooks.ModelHook())
        shaken(dw.attach(model, dw.LoRA(rank=2), ["embed", "body"]))
        if not first:
            for module in (model, model.embed, model.body):
                hooks.add_hook_to_module(module, hooks.ModelHook())
        changed = model(ids)
        assert not torch.allclose(changed, base)
        with dw.merged(model):
            torch.testing.assert_close(model(ids), changed)
        dw.detach(model)
        assert torch.equal(model(ids), base)
        hooks.remove_hook_from_module(model, recurse=True)
        assert torch.equal(model(ids), base)


def test_a_wrapper_that_came_after_an_adapter_outlives_it():
    model, ids = Tied(), torch.randint(0, 20, (3, 5))
    base = model(ids)
    shaken(dw.attach(model, dw.LoRA(rank=2), ["embed"]))
    ours = model.forward
    model.forward = lambda *args: ours(*args)
    changed = model(ids)
    assert not torch.allclose(changed, base)
    dw.detach(model)
    assert torch.equal(model(ids), base)
