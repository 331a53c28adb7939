"""The base inside a model: its modules, and the weights that it keeps, without adapters and through merges and forms.

One walk costs well under a millisecond for a large model, however many adapters it carries: their modules are never entered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaw.core.adapter import join_key
from deltaw.core.frozen import FrozenWeight, foreign_dense
from deltaw.core.host import Host
from deltaw.errors import ModelError
from deltaw.model.state import Layout, own_modules, sharded, whole

PLAIN = (Tensor, nn.Parameter, nn.parameter.Buffer)


@dataclass(frozen=True)
class Inventory:
    """What one walk found: `modules` by path, and `stored`, every parameter and buffer by name (all names of a tied one).

    answers: to questions that were asked of it already, as it holds for one verb.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    stored: Mapping[str, Tensor]
    answers: dict[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> stored shape, in the order in which the model registers them."""
        return {name: tuple(tensor.shape) for name, tensor in self.stored.items()}


def inventory(model: nn.Module | Layout) -> Inventory:
    """The modules and stored tensors of the base of `model`."""
    layout = model if isinstance(model, Layout) else Layout(model)
    modules: dict[str, nn.Module] = {}
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in layout.layers.items():
        if id(module) in seen:
            continue
        seen.add(id(module))
        modules[path] = module
        if module._parameters or module._buffers:
            front = f"{path}." if path else ""
            for site, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    stored[front + site] = tensor
    return Inventory(layout.root, modules, stored)


class Kept(NamedTuple):
    """A weight of the base, as the model keeps it.

    tensors: those in memory that decide its values. form: "dense", or how a quantised weight is kept. dtype: that of the
    weight that it stands for. dense: gives that weight; None if it holds no real numbers.
    """

    name: str
    tensors: tuple[Tensor, ...]
    form: str
    dtype: torch.dtype
    dense: Callable[[], Tensor | None]


def kept_weights(model: nn.Module) -> Iterator[Kept]:
    """Parameters and persistent float buffers of the base, each storage once, merged changes looked through.

    Those that are sharded are gathered one after the other, by all processes together.

    Raises:
        ModelError: adapters were merged for good.
    """
    seen: set[int] = set()
    originals: Mapping[str, Tensor] = {}
    forms: Mapping[str, FrozenWeight] = {}
    asked = False
    for path, module in own_modules(model):
        host = module if isinstance(module, Host) else None
        if host is not None:
            if not asked:
                originals, forms = _before_merging(host)
                asked = True
            for site in host.held_names():
                name = join_key(path, site)
                form = forms.get(name) or host.form_of(site)
                assert form is not None
                yield _formed(name, host, site, form)
        for buffers, held in ((False, module._parameters), (True, module._buffers)):
            for site, tensor in held.items():
                if tensor is None or id(tensor) in seen:
                    continue
                if buffers and site in module._non_persistent_buffers_set:
                    continue
                seen.add(id(tensor))
                name = join_key(path, site)
                if host is not None and name in forms:
                    yield _formed(name, host, site, forms[name])
                    continue
                tensor = originals.get(name, tensor)
                if type(tensor) not in PLAIN and sharded(tensor):
                    tensor = whole(tensor)
                if type(tensor) not in PLAIN:
                    yield Kept(name, (tensor,), _form_of(tensor), tensor.dtype, _foreign(module, tensor))
                elif tensor.is_floating_point():
                    yield Kept(name, (tensor,), "dense", tensor.dtype, tensor.detach)


def _formed(name: str, host: Host, site: str, form: FrozenWeight) -> Kept:
    tensors = tuple(b for b in form._buffers.values() if b is not None)
    return Kept(name, tensors, form.form.kind, form.dtype, lambda: host.from_matrix(site, form.dense()).detach())


def _form_of(tensor: Tensor) -> str:
    kind = type(tensor)
    plain = tensor.is_floating_point() and getattr(kind, "dequantize", None) is Tensor.dequantize
    return "dense" if plain else kind.__name__.lower()


def _foreign(module: nn.Module, tensor: Tensor) -> Callable[[], Tensor | None]:
    def dense() -> Tensor | None:
        found = foreign_dense(module, tensor)
        if found is None and tensor.is_floating_point():
            found = tensor.detach()
        return found

    return dense


def _before_merging(host: Host) -> tuple[Mapping[str, Tensor], Mapping[str, FrozenWeight]]:
    """What merging put aside, by name: plain weights and those in another form."""
    merged = host.roster.merged
    if merged is None:
        return {}, {}
    if merged.final:
        raise ModelError(
            "adapters were merged for good (keep=None, or the file with the originals is gone): the base that a fingerprint "
            "would be of is gone"
        )
    if merged.file is not None:
        return merged.file.read("load the base model again"), dict(merged.forms)
    return dict(merged.originals), dict(merged.forms)
