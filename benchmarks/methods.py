"""The contenders: one training step of full fine-tuning, PEFT, deltaw, and the frozen floor, on equal terms.

Equal terms: the same base weights, the same starting factors (B is not zero, so that every gradient is alive), the same
AdamW, the same batch. `agree` asserts that two contenders' losses and gradients are the same function, before any timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import deltaw as dw
from benchmarks.measure import SEED
from benchmarks.workloads import Workload

RANK = 8
ALPHA = 16


@dataclass
class Contender:
    """A model ready to train. `step` is forward, backward, AdamW, zero_grad; returns the loss."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    train: bool = True
    optimizer: torch.optim.Optimizer | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if trained:
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.model.train(self.train)

    def step(self) -> Tensor:
        """One step."""
        loss = self.loss(self.model)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss, and the gradient of every factor under a name that both libraries share."""
        loss = self.loss(self.model)
        loss.backward()  # type: ignore[no-untyped-call]
        found = {shared_name(n): p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        for p in self.model.parameters():
            p.grad = None
        return loss.item(), found


def full(work: Workload) -> Contender:
    """Every parameter trained."""
    return Contender(work.build(), work.loss)


def floor(work: Workload) -> Contender:
    """No adapters at all, but the gradient flows through every frozen block: what no adapter method can go below."""
    model = work.build().requires_grad_(False)
    first = model.get_submodule(work.first_block)
    first.register_forward_pre_hook(
        lambda module, args, kwargs: (
            tuple(a.requires_grad_(True) if i == 0 else a for i, a in enumerate(args)),
            {k: v.requires_grad_(True) if k == "hidden_states" else v for k, v in kwargs.items()},
        ),
        with_kwargs=True,
    )
    return Contender(model, work.loss)


def peft(work: Workload, *, dropout: float = 0.0, dora: bool = False) -> Contender:
    """HF PEFT."""
    from peft import LoraConfig, get_peft_model  # seconds, which processes without it need not spend

    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(work.targets), lora_dropout=dropout, use_dora=dora
    )
    model = get_peft_model(work.build(), config)
    start(model)
    return Contender(model, work.loss)


def deltaw(work: Workload, *, dropout: float = 0.0, dora: bool = False, int8: bool = False) -> Contender:
    """deltaw."""
    model = work.build()
    kind = dw.DoRA if dora else dw.LoRA
    dw.attach(model, kind(rank=RANK, alpha=ALPHA, dropout=dropout), targets=list(work.targets))
    if int8:
        dw.quantize(model, dw.Int8())
    start(model)
    return Contender(model, work.loss)


def shared_name(name: str) -> str:
    """PEFT's and deltaw's parameter names -> "layer.path A", "layer.path B", "layer.path m"."""
    name = name.removeprefix("base_model.model.")
    for there, letter in ((".lora_A.", "A"), (".lora_B.", "B"), (".lora_magnitude_vector.", "m")):
        if there in name:
            return f"{name.split(there)[0]} {letter}"
    if ".adapters." in name:
        return f"{name.split('.adapters.')[0]} {name.rsplit('.', 1)[1]}"
    return name


def start(model: nn.Module) -> None:
    """The same factors in either library: seeded noise in the order of the shared names; DoRA's m stays as it started."""
    named = sorted((shared_name(n), p) for n, p in model.named_parameters() if p.requires_grad)
    noise = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, p in named:
            if name.endswith((" A", " B")):
                p.copy_(
                    torch.randn(p.shape, generator=noise)
                    * ((p.numel() / p.shape[0]) ** -0.5 if name.endswith(" A") else 0.01)
                )


def agree(one: Contender, other: Contender, tolerance: float = 1e-3) -> None:
    """Assert that losses and all gradients are equal within `tolerance` of the gradient's norm, and not zero."""
    loss, grads = one.gradients()
    loss_other, grads_other = other.gradients()
    assert abs(loss - loss_other) <= 1e-4 * max(abs(loss), 1e-2), f"losses differ: {loss} and {loss_other}"
    assert grads, "no gradients"
    assert grads.keys() == grads_other.keys(), f"trained tensors differ: {grads.keys() ^ grads_other.keys()}"
    for name, g in grads.items():
        size = float(grads_other[name].norm())
        gap = float((g.flatten() - grads_other[name].flatten()).norm())  # PEFT keeps a kernel's shape
        assert size > 0, f"the gradient of {name} is zero"
        assert gap <= tolerance * size, f"gradients of {name} differ by {gap / size:.1e} of their norm"
