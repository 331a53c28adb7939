"""Our variants against PEFT's, tensor for tensor: the same outputs, the same training, the same start."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deltaw as dw

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """Two linear layers of different widths, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 18)
        self.v = nn.Linear(18, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v(torch.tanh(self.q(x)))


SIZES = {"q": (18, 12), "v": (8, 18)}


def pair(config, variant) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The same base under PEFT's adapter and under ours, in eval mode, and an input."""
    torch.manual_seed(0)
    base = Net()
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    ours = dw.attach(base, variant if isinstance(variant, dict) else {"q": variant, "v": variant}).eval()
    return theirs, ours, torch.randn(5, 12)


def shake(model: nn.Module) -> None:
    """Random values for all that is trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)


def put(ours: nn.Module, path: str, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors into our delta of the layer `path`."""
    delta = ours.get_submodule(path).deltas("default")["weight"]
    with torch.no_grad():
        for name, tensor in tensors.items():
            own = getattr(delta, name)
            own.copy_(tensor.reshape(own.shape))


def theirs_of(theirs: nn.Module, path: str, *names: str) -> list[torch.Tensor]:
    layer = theirs.base_model.model.get_submodule(path)
    return [getattr(layer, name)["default"].detach() for name in names]


def assert_same(theirs: nn.Module, ours: nn.Module, x: torch.Tensor) -> None:
    expected = theirs(x)
    assert not torch.allclose(expected, base_of(theirs, x), atol=1e-3), "the test must change something"
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    with dw.merged(ours):
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


def base_of(theirs: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with theirs.disable_adapter():
        return theirs(x)


def test_loha():
    theirs, ours, x = pair(peft.LoHaConfig(r=3, alpha=5, target_modules=["q", "v"]), dw.LoHa(rank=3, alpha=5))
    shake(theirs)
    for path in SIZES:
        B1, A1, B2, A2 = theirs_of(theirs, path, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        put(ours, path, {"A1": A1, "B1": B1, "A2": A2, "B2": B2})
    assert_same(theirs, ours, x)


@pytest.mark.parametrize(
    ("rank", "both", "factor"),
    [(1, True, -1), (1, False, -1), (2, True, 6), (2, False, 5), (16, False, -1), (3, True, 2)],
)
def test_lokr(rank, both, factor):
    config = peft.LoKrConfig(r=rank, alpha=5, decompose_both=both, decompose_factor=factor, target_modules=["q", "v"])
    theirs, ours, x = pair(config, dw.LoKr(rank=rank, alpha=5, decompose_both=both, factor=factor))
    shake(theirs)
    names = {
        "C": "lokr_w1",
        "C_left": "lokr_w1_a",
        "C_right": "lokr_w1_b",
        "D": "lokr_w2",
        "D_left": "lokr_w2_a",
        "D_right": "lokr_w2_b",
    }
    for path in SIZES:
        delta = ours.get_submodule(path).deltas("default")["weight"]
        own = dict(delta.named_parameters())
        layer = theirs.base_model.model.get_submodule(path)
        assert {n for n in names if "default" in getattr(layer, names[n])} == set(own)
        put(ours, path, {n: theirs_of(theirs, path, names[n])[0] for n in own})
    assert_same(theirs, ours, x)


def test_vera_and_its_start():
    config = peft.VeraConfig(r=7, d_initial=0.3, target_modules=["q", "v"])
    theirs, ours, x = pair(config, dw.VeRA(rank=7, d=0.3))
    delta = ours.q.deltas("default")["weight"]
    torch.testing.assert_close(delta.d.detach(), theirs_of(theirs, "q", "vera_lambda_d")[0])
    wide_A, wide_B = theirs.base_model.vera_A["default"], theirs.base_model.vera_B["default"]
    assert abs(float(ours.v.deltas("default")["weight"].A.std() / wide_A.std()) - 1) < 0.2  # the same width, 18
    shake(theirs)
    for path, (out, columns) in SIZES.items():
        b, d = theirs_of(theirs, path, "vera_lambda_b", "vera_lambda_d")
        put(ours, path, {"A": wide_A[:, :columns], "B": wide_B[:out], "b": b, "d": d})
    assert_same(theirs, ours, x)


def test_ia3_scales_outputs_with_their_bias_and_inputs():
    config = peft.IA3Config(target_modules=["q", "v"], feedforward_modules=["v"])
    theirs, ours, x = pair(config, {"q": dw.IA3(), "v": dw.IA3(of="input")})
    shake(theirs)
    for path in SIZES:
        put(ours, path, {"l": theirs_of(theirs, path, "ia3_l")[0]})
    assert_same(theirs, ours, x)


def test_adalora_trains_and_allocates_alike():
    total = 30
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=3, tfinal=6, deltaT=2, total_step=total, lora_alpha=9, target_modules=["q", "v"]
    )
    variant = dw.AdaLoRA(rank=6, target=2, warmup=3, settle=6, every=2, total=total, alpha=9)
    theirs, ours, x = pair(config, variant)
    for path in SIZES:
        A, B, E = theirs_of(theirs, path, "lora_A", "lora_B", "lora_E")
        put(ours, path, {"A": A, "B": B, "E": E})
    goal = torch.randn(5, 8)
    alive = []
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for step in range(1, total + 1):
            nn.functional.mse_loss(model(x), goal).backward()
            optimizer.step()
            if model is theirs:
                model.base_model.update_and_allocate(step)
            else:
                dw.after_step(model, step)
            optimizer.zero_grad()
        model.eval()
        if model is theirs:
            alive.append([int((theirs_of(theirs, p, "lora_E")[0] != 0).sum()) for p in SIZES])
        else:
            alive.append([int((ours.get_submodule(p).deltas("default")["weight"].E != 0).sum()) for p in SIZES])
    assert alive[0] == alive[1]
    assert sum(alive[1]) == 2 * 2
    assert alive[1] != [6, 6]
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-3, atol=2e-3)  # thirty steps of AdamW amplify roundings


def test_orthogonality_loss_is_that_of_peft():
    config = peft.AdaLoraConfig(init_r=6, target_r=2, total_step=9, orth_reg_weight=0.7, target_modules=["q", "v"])
    theirs, ours, _ = pair(config, dw.AdaLoRA(rank=6, target=2, total=9, orthogonality=0.7))
    shake(theirs)
    expected = 0.0
    for path in SIZES:
        A, B, E = theirs_of(theirs, path, "lora_A", "lora_B", "lora_E")
        put(ours, path, {"A": A, "B": B, "E": E})
        for gram in (A @ A.T, B.T @ B):
            expected += 0.7 * float(torch.norm(gram - torch.eye(6), p="fro")) / 4
    assert float(dw.orthogonality_loss(ours)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_rewrite_the_base_train_alike_over_a_base_that_stays(init):
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, target_modules=["q", "v"])
    theirs, ours, x = pair(config, dw.LoRA(rank=4, alpha=6, init=init))
    torch.manual_seed(0)
    base = Net()
    for path in SIZES:
        delta = ours.get_submodule(path).deltas("default")["weight"]
        A, B = (getattr(theirs.base_model.model.get_submodule(path), n)["default"].weight for n in ("lora_A", "lora_B"))
        torch.testing.assert_close(delta.B @ delta.A, (B @ A).detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.get_submodule(path).weight, base.get_submodule(path).weight)
    goal = torch.randn(5, 8)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(8):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), goal).backward()
            optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)

    kept = dw.get(ours)
    plain = dw.install(copy.deepcopy(base), kept).eval()
    torch.testing.assert_close(plain(x), ours(x), rtol=1e-5, atol=1e-5)
    assert {c.variant.init for c in kept.changes.values()} == {"kaiming"}
    assert {c.variant.rank for c in kept.changes.values()} == {8}
