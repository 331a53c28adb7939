"""One model, one roster: a verb that changes a model first brings parts that were adapted on their own under one roster.

What a verb does to a roster it does to all of its hosts, so it must be given a module that holds all of them, and is
refused on a part (decision 027). `use` and `activate` change no host, and speak to all of them from wherever they are asked.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

from torch import nn

from deltaw.core.host import Host
from deltaw.core.roster import Active, Roster
from deltaw.errors import ModelError
from deltaw.model import first_call
from deltaw.model.state import Layout, names_in

FROZE = "_deltaw_froze"
"""Where a layer notes which of its own parameters required a gradient until adapters came, each with their roster."""


def one_roster(layout: Layout, verb: str) -> Roster:
    """The roster of this model, a new one if it has none.

    Raises:
        ModelError: a roster has hosts outside of this model, or parts of it cannot come under one.
    """
    found = layout.rosters()
    for roster in found:
        check_whole(layout, roster, verb)
    if len(found) > 1:
        unite(layout, found, verb)
    return found[0] if found else Roster()


def check_whole(layout: Layout, roster: Roster, verb: str) -> None:
    """Refuse a verb on a module that does not hold all hosts of `roster`. Of a copy, those that it holds are all."""
    if not roster.touched:
        roster.touched.update(host for _, host in layout.hosts() if host.roster is roster)
    if hosts_outside(layout, roster):
        gc.collect()  # a module that only holds itself (by a bound forward) belongs to no model any more
    outside = hosts_outside(layout, roster)
    if outside:
        raise ModelError(
            f"cannot {verb}: {type(layout.root).__name__.removesuffix('Host')} holds some of the layers that carry "
            f"{', '.join(map(repr, roster.names)) or 'quantised weights'}, not all: {len(outside)} "
            f"more ({outside[0].base_class.__name__} ...) are outside of it. If it is a part of a model, give that; two models "
            "that share layers are adapted together, dw.attach(torch.nn.ModuleList([one, other]), ...), or each with "
            "a copy of its own (copy.deepcopy) of what they share"
        )


def hosts_outside(layout: Layout, roster: Roster) -> list[Host]:
    """The hosts of `roster` that are not in this model."""
    inside = set(map(id, layout.modules))
    return [m for m in roster.touched if id(m) not in inside and isinstance(m, Host) and m.roster is roster]


def unite(layout: Layout, rosters: Sequence[Roster], verb: str) -> None:
    """Bring all hosts and frozen parameters under the first roster. What the model computes does not change."""
    first, *others = rosters
    if any(roster.merged is not first.merged for roster in others):
        raise ModelError(
            f"cannot {verb}: changes are merged into parts of the model that were adapted on their own: dw.unmerge each of "
            "them first (or dw.detach those that were merged for good)"
        )
    outside_contexts(rosters, verb)
    first.default = said_by_all(rosters, verb)
    first.names = names_in(rosters)
    for other in others:
        first.notes = {**other.notes, **first.notes}
        first.touched |= other.touched
        first.uncalled |= other.uncalled
        first_call.remove(layout, other)
    if first.uncalled:
        first_call.watch(layout, first, ())
    for module in {*layout.modules, *first.touched}:
        if isinstance(module, Host) and module.roster in others:
            object.__setattr__(module, "roster", first)
        for name, roster in froze(module).items():
            if roster in others:
                froze(module)[name] = first


def outside_contexts(rosters: Sequence[Roster], verb: str) -> None:
    """Refuse what would take an adapter away from a context of the calling thread. (Other threads' contexts are not seen.)"""
    if any(len(roster.frames()) > 1 for roster in rosters):
        raise ModelError(f"cannot {verb} inside of dw.use, dw.disabled or dw.rows: leave the context first")


def said_by_all(rosters: Sequence[Roster], verb: str) -> Active:
    """The active adapters of all parts.

    Raises:
        ModelError: an adapter speaks in one part, and in another that has it too it does not, or with another weight.
    """
    weights: dict[str, float] = {}
    for name in names_in(rosters):
        said = {dict(roster.default).get(name) for roster in rosters if name in roster.names}
        if len(said) > 1:
            raise ModelError(
                f"cannot {verb}: adapter {name!r} is not active alike in the parts of the model that were adapted on their "
                f"own: say for all of them which adapters speak, dw.activate(model, [{name!r}]) or dw.activate(model, None)"
            )
        weight = said.pop()
        if weight is not None:
            weights[name] = weight
    return tuple(weights.items())


# ---- what adapters froze


def froze(layer: nn.Module) -> dict[str, Roster]:
    """The parameters of a layer that required a gradient until adapters came, each with the roster that froze it."""
    found: dict[str, Roster] = layer.__dict__.get(FROZE, {})
    return found


def note_frozen(layer: nn.Module, name: str, roster: Roster) -> None:
    """Note that a parameter required a gradient, for `thaw`."""
    noted = layer.__dict__.setdefault(FROZE, {})
    if roster not in noted.values():
        roster.touched.add(layer)
    noted.setdefault(name, roster)


def thaw(layout: Layout, roster: Roster) -> None:
    """Let every parameter that was frozen for `roster` require a gradient again."""
    for layer in {*layout.modules, *roster.touched}:
        noted = froze(layer)
        for name in [n for n, owner in noted.items() if owner is roster]:
            del noted[name]
            parameter = layer._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(True)
            if not noted:
                del layer.__dict__[FROZE]
