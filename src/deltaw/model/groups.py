"""Optimizer groups and the step hook."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltaw.core import options
from deltaw.errors import ModelError
from deltaw.model import state


def param_groups(
    model: nn.Module, lr: float, b_ratio: float | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters of `model` as groups for a torch optimizer.

    b_ratio: LoRA+ (arXiv:2402.12354): B learns with lr · b_ratio, everything else with lr.

    Raises:
        ModelError: nothing is trainable.
    """
    options.positive("lr", lr, 2e-4)
    if b_ratio is not None:
        options.positive("b_ratio", b_ratio)
    fast: dict[int, nn.Parameter] = {}
    if b_ratio is not None:
        for _, host in state.hosts(model):
            for name in host.roster.names:
                for delta in host.deltas(name).values():
                    fast |= {id(p): p for n, p in delta.named_parameters() if n in delta.fast and p.requires_grad}
    slow = [p for p in state.unwrap(model).parameters() if p.requires_grad and id(p) not in fast]
    groups: list[dict[str, Any]] = [{"params": slow, "lr": lr}] if slow else []
    if fast:
        groups.append({"params": list(fast.values()), "lr": lr * (b_ratio or 1.0)})
    if not groups:
        raise ModelError(
            "nothing to train: no parameter requires a gradient; attach an adapter, or load it with trainable=True"
        )
    if weight_decay is not None:
        for group in groups:
            group["weight_decay"] = weight_decay
    return groups


def after_step(model: nn.Module, step: int) -> None:
    """To be called once after every optimizer step: methods that move rank between layers (AdaLoRA) do it here."""
    by_variant: dict[Any, dict[str, Any]] = {}
    for path, host in state.hosts(model):
        for name in host.roster.names:
            for site, delta in host.deltas(name).items():
                by_variant.setdefault((name, delta.variant), {})[f"{path}.{site}"] = delta
    for (_, variant), deltas in by_variant.items():
        variant.after_step(deltas, step)
