"""After the first backward: did everything that is trained get a gradient?

Training that reaches nothing is the quietest failure there is: reentrant checkpointing whose input needs no gradient, an
adapter on a layer that the forward never calls, a fast path that reads weights behind the layer's back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from deltaw.core.adapter import join_key
from deltaw.core.host import CHILD
from deltaw.errors import ModelError, NonFinite
from deltaw.model import state


def check_gradients(model: nn.Module, names: str | Sequence[str] | None = None) -> None:
    """To be called once, after the first `backward` and before `zero_grad`.

    names: adapters to look at; default: those that speak now in the calling thread, and trained base parameters.

    Raises:
        ModelError: a trained tensor has no gradient, or all gradients of an adapter in one layer are zero.
        NonFinite: a gradient holds NaN or infinity.
        UnknownName: the model has no adapter of that name.
    """
    root = state.unwrap(model)
    every = state.rosters(root)
    if names is None:
        wanted = {name for roster in every for name, _ in roster.active()}
    else:
        wanted = {state.known(root, name) for name in ([names] if isinstance(names, str) else names)}
    tensors: list[tuple[str, str, nn.Parameter]] = []
    ours: set[int] = set()
    for path, host in state.hosts(root):
        for name in host.adapters._modules:
            for site, delta in host.deltas(name).items():
                for tensor, parameter in delta.named_parameters():
                    ours.add(id(parameter))
                    if name in wanted and parameter.requires_grad:
                        tensors.append((f"{name}: {join_key(path, site)}", tensor, parameter))
    if names is None:
        for key, parameter in root.named_parameters():
            if parameter.requires_grad and id(parameter) not in ours and f".{CHILD}." not in f".{key}":
                tensors.append((f"base: {key}", "", parameter))
    if not tensors:
        raise ModelError("nothing is trained: no tensor of an active adapter requires a gradient")
    without = [f"{place}.{tensor}".rstrip(".") for place, tensor, p in tensors if p.grad is None]
    if without:
        raise ModelError(
            f"{len(without)} of {len(tensors)} trained tensors got no gradient: {listed(without)}. Is the layer called in "
            "forward, does the loss depend on it, and, if you checkpoint with use_reentrant=True, does the input of the "
            "first checkpoint require a gradient (model.enable_input_require_grads(), or use_reentrant=False)?"
        )
    alive: dict[str, bool] = {}
    for place, _, p in tensors:
        assert p.grad is not None
        if not bool(torch.isfinite(p.grad).all()):
            raise NonFinite(
                f"the gradient of {place} holds NaN or infinity: lower the learning rate, or look at the data"
            )
        alive[place] = alive.get(place, False) or bool((p.grad != 0).any())
    dead = [place for place, moves in alive.items() if not moves]
    if dead:
        raise ModelError(
            f"all gradients are zero in {len(dead)} of {len(alive)} trained weights: {listed(dead)}. "
            "Does the loss depend on them?"
        )


def listed(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
