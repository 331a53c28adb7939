"""The adapters of a model as a list that one edits: copy, rename, delete, status (`dw.adapters` lists them)."""

from __future__ import annotations

import copy as copying
from typing import Any

from torch import nn

from deltaw.core.roster import Roster
from deltaw.model import state
from deltaw.model.attach import checked_name, detach
from deltaw.model.changing import changing
from deltaw.model.one_roster import one_roster, outside_contexts
from deltaw.model.summary import Status, adapters


@changing
def copy(model: nn.Module, source: str, name: str) -> nn.Module:
    """A second adapter `name` with the values of `source`, its own tensors, trainable as those are. Not switched to.

    Raises:
        UnknownName: the model has no adapter `source`.
        NameTaken, ConfigError: `name` is there already, or cannot be one.
        ModelError: changes are merged into the weights.
    """
    layout = state.Layout(model)
    roster = _roster(layout, source, "copy an adapter")
    checked_name(layout, name)
    memo: dict[int, Any] = {}  # one for all layers: tensors that they share stay shared
    copies = []
    for _, host in layout.hosts():
        for site, delta in host.deltas(source).items():
            memo[id(delta.variant)] = delta.variant
            copies.append((host, site, copying.deepcopy(delta, memo)))
    for host, site, delta in copies:
        host.add_delta(name, site, delta)
    for _, host in layout.hosts():
        if source in host.adapters.tied:
            host.adapters.tied[name] = dict(host.adapters.tied[source])
    roster.names.append(name)
    if source in roster.notes:
        roster.notes[name] = copying.deepcopy(roster.notes[source])
    return model


@changing
def rename(model: nn.Module, old: str, new: str) -> nn.Module:
    """Call the adapter `old` by the name `new`: the same tensors, the same place in the order, active if it was.

    Raises:
        UnknownName, NameTaken, ConfigError: as `copy`.
        ModelError: changes are merged, or the calling thread is inside of `use`, `disabled` or `rows`. (Other threads
            must not be either: their contexts know the old name.)
    """
    layout = state.Layout(model)
    roster = _roster(layout, old, "rename an adapter")
    checked_name(layout, new)
    outside_contexts([roster], f"rename {old!r}")
    for _, host in layout.hosts():
        for table in (host.adapters._modules, host.adapters.tied):
            if old in table:
                entries = [(new if name == old else name, value) for name, value in table.items()]
                table.clear()
                table.update(entries)  # type: ignore[arg-type]
    roster.names = [new if name == old else name for name in roster.names]
    roster.default = tuple((new if name == old else name, weight) for name, weight in roster.default)
    if old in roster.notes:
        roster.notes[new] = roster.notes.pop(old)
    return model


def delete(model: nn.Module, name: str) -> nn.Module:
    """Take the adapter `name` out of the model. As `detach`, but the name must be given."""
    return detach(model, name)


def status(model: nn.Module, name: str) -> Status:
    """What `name` is and whether it speaks in the calling thread. UnknownName if the model has no such adapter."""
    state.known(model, name)
    return next(s for s in adapters(model) if s.name == name)


def _roster(layout: state.Layout, name: str, verb: str) -> Roster:
    rosters = layout.rosters()
    state.known_in(rosters, layout.root, name)
    state.unmerged_in(rosters, verb)
    return one_roster(layout, verb)
