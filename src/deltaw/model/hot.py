"""Hot replacement: other values in the tensors of an adapter that is there, without attaching anything.

Values are copied in place, so compiled code, optimizers, `DistributedDataParallel` and references to the tensors go on
as they are. A LoRA of smaller rank is filled up with zeros, another scale goes into B: a server compiles once, for the
largest rank. A forward that runs in another thread meanwhile may see old and new values mixed: replace between calls.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, join_key
from deltaw.core.host import Host
from deltaw.core.variant import Delta
from deltaw.errors import AdapterError
from deltaw.model import state
from deltaw.model.gradients import listed


def replace(model: nn.Module, name: str, adapter: Adapter) -> nn.Module:
    """`deltaw.replace`, for an adapter of which its base and its values are known to be right."""
    root = state.unwrap(model)
    state.known(root, name)
    state.unmerged(root, "replace an adapter")
    places: dict[str, tuple[Host, str, Delta]] = {}
    for path, host in state.hosts(root):
        for site, delta in host.deltas(name).items():
            places[join_key(path, site)] = host, site, delta
    missing, extra = sorted(places.keys() - adapter.changes), sorted(adapter.changes.keys() - places)
    if missing or extra:
        both = [f"does not change {listed(missing)}"] * bool(missing) + [f"also changes {listed(extra)}"] * bool(extra)
        raise AdapterError(
            f"replace({name!r}): the new adapter {' and '.join(both)}; detach {name!r} and load the new one instead"
        )
    values: list[tuple[Tensor, Tensor]] = []
    for key, (_, _, delta) in places.items():
        change = adapter.changes[key]
        try:
            new = delta.hot(change.variant, change.tensors)
        except (AdapterError, KeyError) as error:
            raise AdapterError(f"replace({name!r}): {key!r}: {error}") from error
        values += [(tensor, new[k]) for k, tensor in delta.state_dict(keep_vars=True).items()]
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)
        for host, site, delta in places.values():
            if not delta.variant.any_shape and not host.stored_parameter(site).is_meta:
                delta.prepare(host.frozen_matrix(site))
    for roster in state.rosters(root):
        if name in roster.names:
            kept = roster.notes.get(name, {})
            roster.notes[name] = {**kept, "base": dict(adapter.base), "extra": dict(adapter.extra)}
    return model
