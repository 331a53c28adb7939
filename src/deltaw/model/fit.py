"""The plan of a load: every change of an adapter finds its parameter, and fits it. Nothing changes while it is made."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from deltaw.core.adapter import Adapter, join_key, split_key
from deltaw.core.host import Host, parameter_names
from deltaw.core.part import parameter_of, rows_of
from deltaw.core.variant import fits
from deltaw.errors import AdapterError, did_you_mean
from deltaw.model import targeting, ties
from deltaw.model.planned import Planned, full_host
from deltaw.model.state import Layout


def fitted(layout: Layout, adapter: Adapter) -> list[Planned]:
    """The plan that puts every change of `adapter` on its parameter.

    Raises:
        AdapterError: changes that do not fit, all of them listed.
    """
    if not adapter.changes:
        raise AdapterError("the adapter is empty: it changes no weight")
    shared = ties.shared(layout.parameters)
    wrong: list[str] = []
    plan: list[Planned] = []
    for key in adapter.changes:
        item = fitted_one(layout, shared, adapter, key)
        if isinstance(item, Planned):
            plan.append(item)
        else:
            wrong.append(item)
    if wrong:
        more = f"\n  ... and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise AdapterError(
            f"the adapter does not fit {type(layout.root).__name__} ({len(wrong)} of {len(adapter.changes)} changes):\n  "
            + "\n  ".join(wrong[:8])
            + more
        )
    return plan


def fitted_one(
    layout: Layout, shared: Mapping[Hashable, list[ties.Place]], adapter: Adapter, key: str
) -> Planned | str:
    """The plan for one change, or what is wrong with it."""
    change = adapter.changes[key]
    path, site = split_key(key)
    name = parameter_of(site)
    layer = layout.layers.get(path)
    there = layer is not None and (name in parameter_names(layer) or layer._buffers.get(name) is not None)
    if layer is None or not there:
        every = [join_key(p, s) for p, m in layout.layers.items() for s in parameter_names(m)]
        return f"{key!r} is no parameter of {type(layout.root).__name__}{did_you_mean(key, every, 1)}"
    cls = full_host(layer) if change.variant.any_shape else targeting.host_for_parameter(layer, name)
    why = None if cls is None or isinstance(layer, Host) or change.variant.any_shape else cls.refusal(layer)
    if cls is None or why is not None:
        kind, method = type(layer).__name__, type(change.variant).__name__
        return f"{key!r} belongs to a {kind}, which {method} cannot adapt" + (f": {why}" if why else "")
    rows = rows_of(site)
    if rows is not None and (change.variant.any_shape or rows.stop > cls.sites(layer)[name][-2]):
        return f"{key!r}: {name!r} of the model has no such part"
    item = Planned(path, layer, site, change.variant, cls)
    try:
        found = change.matrix_shape
    except KeyError as missing:
        return f"{key!r}: tensor {missing} of {change.variant} is missing"
    if not fits(found, item.shape):
        return f"{key!r} changes a {tuple(found)} weight, the model's is {item.shape}"
    places = ties.others(shared, layer, name)
    absent = set(change.tied) - {join_key(p, s) for p, _, s in places}
    if absent:
        return f"{key!r} was one parameter with {', '.join(map(repr, sorted(absent)))}, which this model does not tie to it"
    item.tied = [p for p in places if join_key(p[0], p[2]) in change.tied]
    return item
