"""Shallow twins of modules, with changed tensors in place of their own: how a layer computes with W + ΔW, nothing mutated."""

from __future__ import annotations

from torch import Tensor, nn

from deltaw.core.host import CHILD, FORMS, Host


def shell(
    module: nn.Module,
    base: type[nn.Module],
    tensors: dict[str, Tensor | None],
    buffers: dict[str, Tensor | None] | None = None,
) -> nn.Module:
    """A shallow twin of `module`, of class `base`, whose own parameters (and buffers) are `tensors`: nothing shared is mutated.

    `base.forward(shell(...), x)` computes the layer with changed weights, safely in any number of threads.
    """
    twin = base.__new__(base)
    state = dict(module.__dict__)
    state["_parameters"] = {**module._parameters, **tensors}
    if buffers is not None:
        state["_buffers"] = {**module._buffers, **buffers}
    object.__setattr__(twin, "__dict__", state)
    return twin


def written_out(module: nn.Module) -> nn.Module:
    """A twin of `module` and of all layers inside it without hosts: every active change is written into its weights.

    What reads the weights of a layer inside without calling it (a fast path) thereby sees W + ΔW. Nothing is mutated.
    """
    tensors: dict[str, Tensor | None] = {}
    buffers: dict[str, Tensor | None] = {}
    base = type(module)
    if isinstance(module, Host):
        base = module.base_class
        held = module._modules.get(FORMS)
        for site in module.active_sites().union(() if held is None else held._modules):
            (buffers if site in module._buffers else tensors)[site] = module.changed(site)
    twin = shell(module, base, tensors, buffers)
    twin.__dict__["_modules"] = {
        name: None if child is None else written_out(child)
        for name, child in module._modules.items()
        if name not in (CHILD, FORMS)
    }
    return twin
