"""From a plan to a changed model, and back: the one place where layers become hosts and are released again.

Every walk over the model is the caller's `Layout`: a verb looks at the module tree once, whatever it asks of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from deltaw.core.host import FORMS, Host
from deltaw.core.part import parameter_of
from deltaw.core.roster import Roster
from deltaw.core.variant import Delta
from deltaw.errors import TargetError
from deltaw.model import beside, first_call, targeting
from deltaw.model.one_roster import note_frozen, one_roster, thaw
from deltaw.model.planned import Planned, check_free, full_host
from deltaw.model.quantizer_gate import close_gate, open_gate
from deltaw.model.state import Layout


def place(
    layout: Layout,
    deltas: Sequence[tuple[Planned, Delta]],
    name: str,
    notes: dict[str, Any],
    begin: Callable[[Planned, Delta, Host], None],
    *,
    freeze: bool,
    active: bool,
) -> None:
    """Give every planned parameter its delta, under `name`. If anything goes wrong, the model is left as it was.

    begin: what a delta does with the frozen weight before its host speaks with it (start, or prepare after a load).
    notes: what the roster keeps about this adapter.
    """
    roster = one_roster(layout, f"give the model an adapter {name!r}")
    try:
        for item, delta in deltas:
            host = item.layer if isinstance(item.layer, Host) else item.host.of(item.layer, roster)
            begin(item, delta, host)
            host.add_delta(name, item.site, delta)
            tie(item, host, name, roster)
        enter(layout, roster, name, [item.layer for item, _ in deltas], freeze=freeze, active=active)
        beside.settle(layout)
        roster.notes[name] = notes
    except BaseException:
        forget(layout, roster, name)
        raise


def tie(item: Planned, host: Host, name: str, roster: Roster) -> None:
    """Let the other layers that have the same parameter follow its change."""
    site = parameter_of(item.site)
    for _, layer, other in item.tied:
        follower = layer if isinstance(layer, Host) else full_host(layer).of(layer, roster)
        follower.adapters.tied.setdefault(name, {})[other] = (host, site)


def enter(
    layout: Layout, roster: Roster, name: str, changed: Iterable[nn.Module], *, freeze: bool, active: bool
) -> None:
    """Make `name` known, let parents that read `changed` weights know of it, and freeze the base."""
    roster.names.append(name)
    open_gate(layout.root)
    watch(layout, roster)
    first_call.watch(layout, roster, changed)
    if active:
        roster.default = ((name, 1.0),)
    if freeze:
        keep_still(layout, roster)
        for _, layer, site, parameter in layout.parameters:
            if parameter.requires_grad:
                note_frozen(layer, site, roster)
                parameter.requires_grad_(False)


def keep_still(layout: Layout, roster: Roster) -> None:
    """Host every module with running statistics, so that they do not move under a frozen base."""
    for module in layout.modules:
        if module._buffers and not isinstance(module, Host) and has_statistics(module):
            targeting.host_of_any(module).of(module, roster)


def has_statistics(module: nn.Module) -> bool:
    """Whether a module keeps running statistics (a BatchNorm)."""
    return isinstance(module._buffers.get("running_mean"), Tensor)


def watch(layout: Layout, roster: Roster) -> None:
    """Host every module that reads weights of layers inside it (fast paths, own code), where one of those changes."""
    for module in around(layout):
        cls = None if isinstance(module, Host) else targeting.reader_of(module)
        if cls is not None:
            check_free(next(p for p, m in layout.layers.items() if m is module), module)
            cls.of(module, roster)
    uncallable = [
        (path, host)
        for path, host in layout.hosts()
        if host.base_class.forward is nn.Module.forward and host.adapters._modules
    ]
    if not uncallable:
        return
    read = {id(inner) for _, host in layout.hosts() for inner in host.read_inside()}
    for path, host in uncallable:
        if id(host) not in read:
            raise TargetError(
                f"{path!r} ({host.base_class.__name__}) has no forward and is never called, and no module around it reads it "
                "as self.<name> in its own forward: a change of its parameters would have no effect; leave it out (exclude=), "
                "or read it in the forward of the module that holds it"
            )


def around(layout: Layout) -> list[nn.Module]:
    """The modules with a host inside of them, in no order."""
    paths: dict[str, None] = {}
    for path, module in layout.layers.items():
        if isinstance(module, Host):
            while path:
                path = path.rpartition(".")[0]
                if path in paths:
                    break
                paths[path] = None
    return [layout.layers[path] for path in paths]


def forget(layout: Layout, roster: Roster, name: str) -> None:
    """Take adapter `name` out of every layer; a layer without adapters becomes what it was."""
    if name in roster.names:
        roster.names.remove(name)
    roster.notes.pop(name, None)
    if roster.merged is not None and roster.merged.final and not set(roster.merged.names) & set(roster.names):
        roster.merged = None  # what was merged for good is the base now
    roster.default = tuple((n, w) for n, w in roster.default if n != name)
    last = not roster.names
    mine = [host for _, host in layout.hosts() if host.roster is roster]
    for host in mine:
        host.remove_adapter(name)
    quantised = any(FORMS in host._modules for host in mine)
    for host in mine:
        changes = host.adapters._modules or host.adapters.tied or FORMS in host._modules
        watches = isinstance(host, host.watches) or host.host.reads(host)
        stays = watches or has_statistics(host)
        if not changes and ((last and not (watches and quantised)) or not stays):
            host.release_layer()
    beside.settle(layout)
    if last:
        close_gate(layout.root)
        first_call.remove(layout, roster)
        roster.merged = None
        thaw(layout, roster)
