"""Adapters that PEFT made, combined and analysed, against dense float64 changes that PEFT's own merge shows."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.core.true_change import true_change

peft = pytest.importorskip("peft")
EXACT = 1e-12
"""Relative: everything is float64, and each way is a handful of products."""


class Net(nn.Module):
    """Words and a picture; one layer of every family that PEFT's LoRA adapts."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(13, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 12)}) for _ in range(2))
        self.eye = nn.Conv2d(3, 8, 3)

    def forward(self, ids, picture):
        x = self.words(ids) + self.eye(picture).mean((2, 3))[:, None]
        for block in self.blocks:
            x = x + block["v"](torch.tanh(block["q"](x)))[..., :8]
        return x


def plain():
    torch.manual_seed(0)
    return Net().double()


BASE = {name: p.detach() for name, p in plain().named_parameters()}
INPUTS = (torch.arange(10).view(2, 5), torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(3)).double())
CONFIGS = {
    "pattern": lambda: peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q", "v"], rank_pattern={r"blocks\.1\.q": 5}, alpha_pattern={"v": 2}
    ),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=5, use_rslora=True, target_modules=["q", "eye", "words"]),
    "dora": lambda: peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["v"]),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=["q", "v"]),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, decompose_factor=4, target_modules=["q", "v"]),
}


def dense(model):
    """Parameter -> what PEFT's merge changes, in the stored shape."""
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    return {name: (merged[name] - W).detach() for name, W in BASE.items() if not torch.equal(merged[name], W)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> (adapter as read from PEFT's folder, its dense changes)."""
    found = {}
    for n, (name, config) in enumerate(CONFIGS.items()):
        model = peft.get_peft_model(plain(), config())
        g = torch.Generator().manual_seed(n)
        for key, p in model.named_parameters():
            if p.requires_grad:
                scale = p.detach().abs() if "magnitude" in key else 0.4
                p.data = (p.detach() if "magnitude" in key else 0) + scale * torch.randn(p.shape, generator=g).double()
        folder = tmp_path_factory.mktemp("peft") / name
        model.save_pretrained(folder)
        found[name] = dw.read(folder), dense(model)
    return found


def of(result, tmp_path):
    """Parameter -> dense change of one of our adapters, as PEFT reads and merges it."""
    dw.write(result, tmp_path / "result")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dense(peft.PeftModel.from_pretrained(plain(), tmp_path / "result"))


def weighted(parts, weights):
    keys = {k for d in parts for k in d}
    return {k: sum(w * d.get(k, torch.zeros_like(BASE[k])) for d, w in zip(parts, weights)) for k in keys}


def distance(a, b):
    return float((a - b).norm() / b.norm())


def matrix(x):
    return x.flatten(1)


def test_what_is_read_is_what_peft_merges(made):
    for name, (adapter, exact) in made.items():
        assert set(adapter.changes) == set(exact), name
        for key, change in adapter.changes.items():
            found = true_change(key, change, matrix(BASE[key]))
            found = found.dense() if hasattr(found, "dense") else found
            expected = matrix(exact[key])
            expected = expected if found.shape == expected.shape else expected.T
            assert distance(found, expected) < 1e-6, (name, key)  # PEFT's file of DoRA holds m in the model's dtype


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (("pattern", "rslora"), (0.6, -0.4)),
        (("pattern", "rslora", "dora"), (1.5, 1.0, -2.0)),
        (("loha", "lokr", "pattern"), (1.0, -1.0, 0.5)),
        (tuple(CONFIGS), (0.2, 0.3, -0.4, 0.5, -0.6)),
    ],
)
def test_the_exact_sum_of_mixed_kinds_ranks_and_targets(made, tmp_path, names, weights):
    result = dw.combine([made[n][0] for n in names], weights, base=plain())
    exact = weighted([made[n][1] for n in names], weights)
    found = of(result, tmp_path)
    assert set(found) == set(exact)
    assert max(distance(found[k], exact[k]) for k in exact) < EXACT
    assert max(result.error.values()) < EXACT


def test_weights_by_block_and_truncation(made, tmp_path):
    (a, x), (b, y) = made["pattern"], made["rslora"]
    weights = {"blocks.0": [1.0, 0.0], r"blocks\.1\.q\.weight": [-1.0, 2.0], "*": [0.5, 0.5]}
    result = dw.combine([a, b], weights, how="svd", rank=2, base=plain())
    found = of(result, tmp_path)
    pick = lambda k: (1, 0) if "blocks.0" in k else (-1, 2) if k == "blocks.1.q.weight" else (0.5, 0.5)  # noqa: E731
    for key in weighted([x, y], (1, 1)):
        exact = matrix(weighted([x, y], pick(key))[key])
        U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
        best = U[:, :2] * S[:2] @ Vh[:2]
        assert distance(matrix(found[key]), best) < 1e-9
        assert result.error[key] == pytest.approx(float((S[2:].norm()) / S.norm()), rel=1e-6, abs=1e-12)


def largest(x, density):
    """`x` without all but the largest entries."""
    keep = max(1, round(density * x.numel()))
    return torch.where(x.abs() >= x.abs().flatten().sort(descending=True).values[keep - 1], x, 0.0)


def ties(parts, weights, density):
    each = torch.stack([w * largest(x, density) for x, w in zip(parts, weights)])
    agree = (each.sign() == each.sum(0).sign()) & (each != 0)
    return (each * agree).sum(0) / agree.sum(0).clamp(min=1)


def slerp(a, b, t):
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    arc = (math.sin((1 - t) * angle) * a / a.norm() + math.sin(t * angle) * b / b.norm()) / math.sin(angle)
    return ((1 - t) * a.norm() + t * b.norm()) * arc


WAYS = {
    "magnitude": lambda a, b: 0.7 * largest(a, 0.3) + 0.3 * largest(b, 0.3),
    "ties": lambda a, b: ties((a, b), (0.7, 0.3), 0.3),
    "slerp": lambda a, b: slerp(a, b, 0.3),
}


@pytest.mark.parametrize("how", WAYS)
def test_ways_that_work_on_entries_or_angles(made, tmp_path, how):
    (a, x), (b, y) = made["pattern"], made["loha"]
    options = {} if how == "slerp" else {"density": 0.3}
    result = dw.combine([a, b], [0.7, 0.3], how=how, rank=12, **options)
    found = of(result, tmp_path)
    for key in x:
        expected = WAYS[how](x[key], y[key])
        assert distance(found[key], expected) < 1e-9, key
        exact = 0.7 * x[key] + 0.3 * y[key]
        assert result.error[key] == pytest.approx(distance(expected, exact), rel=1e-6)


def test_dare_keeps_entries_rescaled(made, tmp_path):
    a, x = made["rslora"]
    found = of(dw.combine([a], how="dare", density=0.5, seed=1, rank=13), tmp_path)
    for key, exact in x.items():
        kept = (found[key] - 2 * exact).abs() < 1e-9
        assert bool((kept | (found[key].abs() < 1e-9)).all()), key
        assert 0.25 < float(kept.double().mean()) < 0.75


def test_pefts_own_linear_is_not_the_sum_and_ours_is(made, tmp_path):
    config = {"r": 4, "lora_alpha": 5, "target_modules": ["q", "eye", "words"]}  # of rsLoRAs PEFT's is off by √r too
    model = peft.get_peft_model(plain(), peft.LoraConfig(**config), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(**config))
    g = torch.Generator().manual_seed(9)
    for key, p in model.named_parameters():
        if "lora_" in key:
            p.data = 0.4 * torch.randn(p.shape, generator=g).double()
    parts, folders = [], []
    for name in ("one", "two"):
        model.set_adapter(name)
        parts.append(dense(model))
        model.save_pretrained(tmp_path / name, selected_adapters=[name])
        folders.append(tmp_path / name / name)
    exact = weighted(parts, (0.7, 0.3))
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", combination_type="linear")
    model.set_adapter("both")
    theirs = dense(model)
    both = [dw.read(f) for f in folders]
    assert min(distance(theirs[k], exact[k]) for k in exact) > 0.2
    ours = of(dw.combine(both, [0.7, 0.3]), tmp_path)
    assert max(distance(ours[k], exact[k]) for k in exact) < EXACT
    # and what PEFT calls linear is what we call linear, with the error said
    same = dw.combine(both, [0.7, 0.3], how="linear")
    for key in ("blocks.0.q.weight", "blocks.1.q.weight"):
        assert same.error[key] == pytest.approx(distance(theirs[key], exact[key]), rel=1e-6)


def test_weights_in_use_are_the_dense_sum_without_a_file(made):
    weights = {"pattern": 0.6, "rslora": -0.4, "dora": 1.0}
    model = plain().eval()
    for name in weights:
        dw.install(model, made[name][0], name=name, active=False)
    reference = plain().eval()
    exact = weighted([made[n][1] for n in weights], list(weights.values()))
    with torch.no_grad():
        for key, change in exact.items():
            reference.get_parameter(key).add_(change)
        with dw.use(model, weights):
            found = model(*INPUTS)
        assert torch.allclose(found, reference(*INPUTS), rtol=1e-10, atol=1e-10)


def test_analyses_are_the_dense_ones(made):
    a, x = made["rslora"]
    b, y = made["loha"]
    base = plain()
    found, phi, factors = dw.spectrum(a), dw.similarity(a, b), dw.amplification(a, base)
    for key, change in x.items():
        delta = matrix(change)
        values = torch.linalg.svdvals(delta)
        assert found[key].values == pytest.approx(values[: found[key].rank].tolist(), rel=1e-9)
        assert float(values[found[key].rank :].norm()) < 1e-6 * float(values[0])
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        k = found[key].rank
        along = torch.linalg.matrix_norm(U[:, :k].T @ matrix(BASE[key]) @ Vh[:k].T)
        assert factors[key].factor == pytest.approx(float(S[:k].norm() / along), rel=1e-8)
    for key, s in phi.items():
        V1, V2 = (torch.linalg.svd(matrix(d[key]), full_matrices=False)[2].T for d in (x, y))
        i, j = s.phi.shape
        expected = float((V1[:, :i].T @ V2[:, :j]).square().sum()) / min(i, j)
        assert s.whole == pytest.approx(expected, rel=1e-8)
