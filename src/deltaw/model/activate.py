"""Which adapters speak: `use` and `disabled` for a while and for this thread, `activate` for good."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn

from deltaw.core.roster import Active, Roster
from deltaw.errors import ConfigError, ModelError
from deltaw.model import state
from deltaw.model.changing import changing

Choice = str | Sequence[str] | Mapping[str, float] | None
"""One name, several (their changes add up), names with weights, or None for the bare base."""


def chosen(model: nn.Module, names: Choice) -> Active:
    """`names` as (name, weight) pairs, checked.

    Raises:
        UnknownName: the model has no adapter of that name.
        ConfigError: a name comes twice, a weight is not a finite number, or there is no adapter at all.
    """
    return chosen_in(state.rosters(model), model, names)


def chosen_in(rosters: Sequence[Roster], model: nn.Module, names: Choice) -> Active:
    """`chosen`, where the rosters are at hand."""
    if not rosters:
        raise ModelError("the model carries no adapter: dw.attach or dw.load one first")
    if names is None:
        return ()
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, (Mapping, Sequence, Set)):
        raise ConfigError(f"use({names!r}): give a name, a list of names, {{name: weight}}, or None for the bare base")
    weights = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    if len(weights) != len(names):
        raise ConfigError(f"use({list(names)!r}): a name comes twice; give it a weight instead, {{name: 2.0}}")
    for name, weight in weights.items():
        state.known_in(rosters, model, name)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"weight {weight!r} of adapter {name!r}: must be a finite number")
    return tuple((name, float(weight)) for name, weight in weights.items())


@contextmanager
def use(model: nn.Module, names: Choice) -> Iterator[nn.Module]:
    """Within the context, in this thread, exactly these adapters speak: W + Σ weight · ΔW.

    names: a name, a list of names, {name: weight} (weights may be negative), or None for the bare base.
    Contexts nest, and restore what was before, also after an exception. Tasks of asyncio share a thread, and so do a
    generator and its caller: do not await or yield inside.

    Raises:
        UnknownName: the model has no adapter of that name.
        ModelError: changes are merged into the weights, or contexts of this thread overlap instead of nesting.
    """
    rosters = state.rosters(model)
    active = chosen_in(rosters, model, names)
    state.unmerged_in(rosters, "switch adapters")
    with ExitStack() as stack:
        for roster in rosters:
            stack.enter_context(roster.using(active))
        yield model


def disabled(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Within the context, in this thread, no adapter speaks: the bare base answers."""
    return use(model, None)


@changing
def activate(model: nn.Module, names: Choice) -> nn.Module:
    """From now on and in every thread, these adapters speak (outside of `use`). Errors as `use`."""
    rosters = state.rosters(model)
    active = chosen_in(rosters, model, names)
    state.unmerged_in(rosters, "switch adapters")
    for roster in rosters:
        roster.default = active
    return model
