"""After the first call of a model with a new adapter: was every adapted layer called?

A layer whose weight is fetched in a way that nobody foresaw, or that the forward never reaches, takes no effect, however
long one trains. So `attach` and `load` leave a hook on the model, which takes itself away in the model's first call and
warns of the layers that were neither called nor read, themselves or through a layer tied to them. A layer that is only
used at times (layer dropout, one of several heads) may be among them: hence a warning. The hook waits for a call in which
the adapter speaks. Compiled calls are not looked into; `check_gradients` sees those too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from deltaw.core.host import Host
from deltaw.core.roster import Roster
from deltaw.model.state import Layout


class FirstCall:
    """A forward hook for one call."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or getattr(module, "_is_replica", False):
            return
        compiled = any(m._compiled_call_impl is not None for m in module.modules())
        layout = Layout(module)
        hosts, uncalled = [] if compiled else layout.hosts(), self.roster.uncalled
        through = {owner for _, host in hosts if id(host) not in uncalled for owner in owners(host)}
        missed = [(path, host) for path, host in hosts if id(host) in uncalled and id(host) not in through]
        paths = [path for path, host in missed if host.active_sites() and host.adapters._modules]
        silent = {id(host) for _, host in missed if not host.active_sites()}  # no adapter of theirs spoke in this call
        self.roster.uncalled = silent
        if not silent:
            remove(layout, self.roster)
        if paths:
            more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
            warnings.warn(
                f"{', '.join(map(repr, paths[:5]))}{more} of {type(module).__name__.removesuffix('Host')} carry a change, but "
                "were not called in the model's first call: if that is so in every call, the change has no effect. Is the "
                "layer used at all, or is its weight read by code outside of the modules around it? Leave it out (exclude=), or, "
                "if it is used only at times, take no notice; dw.check_gradients(model) after a backward tells",
                stacklevel=2,
            )


def watch(layout: Layout, roster: Roster, changed: Iterable[nn.Module]) -> None:
    """Look at the first call of the model for the layers `changed`."""
    remove(layout, roster)
    ids = {id(layer) for layer in changed}
    roster.uncalled |= ids | {id(host) for _, host in layout.hosts() if host.adapters.tied and ids & owners(host)}
    layout.root.register_forward_hook(FirstCall(roster))


def owners(host: Host) -> set[int]:
    """The ids of the tied layers whose changes act through `host`."""
    return {id(owner) for sites in host.adapters.tied.values() for owner, _ in sites.values()}


def remove(layout: Layout, roster: Roster) -> None:
    """Take the hooks for `roster` off the model and all modules inside it."""
    for module in layout.modules:
        if module._forward_hooks:
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, FirstCall) and hook.roster is roster:
                    del module._forward_hooks[key]
