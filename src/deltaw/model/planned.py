"""One entry of a plan: a parameter (or a part of one) that is to change, where it is, and by what."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaw.core.adapter import join_key
from deltaw.core.host import CHILD, FORMS, Host
from deltaw.core.host_class import hidden
from deltaw.core.part import parameter_of, rows_of
from deltaw.core.variant import Site, Variant
from deltaw.errors import TargetError
from deltaw.model import targeting, ties
from deltaw.model.entry import Entry


@dataclass
class Planned:
    """One parameter (or part of one) to be changed: where, by what, and the host class that its layer will have.

    tied: the other places of the same parameter, which follow this change.
    """

    path: str
    layer: nn.Module
    site: str
    variant: Variant
    host: type[Host]
    pattern: str = ""
    tied: Sequence[ties.Place] = ()

    @property
    def key(self) -> str:
        """The parameter's name in the base."""
        return join_key(self.path, self.site)

    @property
    def stored(self) -> Tensor:
        """The frozen parameter or buffer, whole; for one that is kept in another form a stand-in without memory."""
        name = parameter_of(self.site)
        form = self.layer.form_of(name) if isinstance(self.layer, Host) else None
        if form is not None:
            assert isinstance(self.layer, Host)
            empty = torch.zeros((), dtype=form.dtype, device=form.codes.device)
            return self.layer.from_matrix(name, empty.expand(form.shape))
        if self.host.foreign and name in self.host.sites(self.layer):
            empty = torch.zeros((), device=self.layer._parameters[name].device)  # type: ignore[union-attr]
            return empty.expand(self.host.sites(self.layer)[name])
        found = self.layer._parameters.get(name)
        return found if found is not None else self.layer._buffers[name]  # type: ignore[return-value]

    @property
    def identity(self) -> Hashable:
        """Equal for the same parameter, however many layers hold it."""
        name = parameter_of(self.site)
        form = self.layer.form_of(name) if isinstance(self.layer, Host) else None
        kept = self.layer._parameters.get(name) if form is None else form.codes
        return ties.identity(self.stored if kept is None else kept)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what changes: (out, in) of the matrix or of its part; as stored for variants of any shape."""
        if self.variant.any_shape:
            return tuple(self.stored.shape)
        *front, out, columns = self.host.sites(self.layer)[parameter_of(self.site)]
        rows = rows_of(self.site)
        return (*front, out if rows is None else rows.stop - rows.start, columns)

    def site_seen(self) -> Site:
        """The site as the variant sees it: shape, dtype and device of the adapter's tensors."""
        stored = self.stored
        if stored.is_complex():
            raise TargetError(
                f"{self.key!r} holds complex numbers ({str(stored.dtype).removeprefix('torch.')}), which no method here changes: "
                "leave it out of the targets (exclude=) and of train="
            )
        buffer = self.site in self.layer._buffers
        dtype = stored.dtype
        if not buffer and (dtype.itemsize <= 2 or not dtype.is_floating_point):
            dtype = torch.float32
        return Site(self.shape, dtype, stored.device, buffer and self.variant.any_shape, self.host.lookup)


def full_host(layer: nn.Module) -> type[Host]:
    """The host under which a layer's parameters are trained in full: its family's own, or the host of last resort."""
    return targeting.host_for(layer) or targeting.host_of_any(layer)


def check_free(path: str, layer: nn.Module) -> None:
    """Refuse a layer that has something of its own under a name that an adapted layer needs."""
    if isinstance(layer, Host):
        return
    if hidden(layer) and not isinstance(layer.forward, Entry):
        raise TargetError(
            f"{path!r} ({type(layer).__name__}) has a forward of its own on the instance, which would not come to the "
            "adapter: attach first, and wrap the model after that (as accelerator.prepare does)"
        )
    places = (layer.__dict__, layer._modules, layer._parameters, layer._buffers, needed_in(type(layer)))  # type: ignore[arg-type]
    if not all(map(NEEDED.isdisjoint, places)):
        attribute = min(NEEDED.intersection(name for place in places for name in place))
        raise TargetError(
            f"{path!r} ({type(layer).__name__}) has an attribute {attribute!r} of its own, which deltaw needs: "
            "rename it, or leave the module out (exclude=)"
        )


NEEDED = frozenset({CHILD, FORMS, "roster", *(n for n in vars(Host) if not n.startswith("_"))} - set(dir(nn.Module)))
"""The names under which an adapted layer is asked for what is ours."""


@functools.lru_cache(maxsize=1024)
def needed_in(kind: type) -> frozenset[str]:
    """Those that a class has for something else."""
    return frozenset(name for name in NEEDED if hasattr(kind, name))
