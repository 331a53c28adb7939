"""Tied weights: parameters that several layers share, such as the embedding and the output head of a language model.

An adapter attached here has one change per storage: one layer holds it, the others follow it (transposed, where their
matrix is), so it is applied once and merged once. A file that targets one side only (PEFT's) keeps its one-sided
meaning: the sides then differ, and cannot be merged into the one storage.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from torch import Tensor, nn

from deltaw.core.adapter import join_key
from deltaw.core.host import Host
from deltaw.core.roster import Active
from deltaw.errors import ModelError

Place = tuple[str, nn.Module, str]
"""Where a parameter is held: path, layer, name."""


def identity(tensor: Tensor) -> Hashable:
    """Equal for tensors that are the same values in memory, whether or not they are the same object."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    try:
        return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
    except RuntimeError:  # a tensor subclass without memory of its own
        return id(tensor)


def shared(parameters: Sequence[tuple[str, nn.Module, str, nn.Parameter]]) -> dict[Hashable, list[Place]]:
    """Those parameters (`state.parameters_of`) that more than one layer holds, by `identity`. A layer reached by two paths
    counts once."""
    if len({address(parameter) for _, _, _, parameter in parameters}) == len(parameters):
        return {}
    found: dict[Hashable, dict[tuple[int, str], Place]] = {}
    for path, layer, site, parameter in parameters:
        found.setdefault(identity(parameter), {}).setdefault((id(layer), site), (path, layer, site))
    return {key: list(places.values()) for key, places in found.items() if len(places) > 1}


def address(tensor: Tensor) -> int:
    """Equal for tensors of one `identity`, and quick to tell."""
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor subclass without memory of its own
        return id(tensor)


def others(ties: Mapping[Hashable, list[Place]], layer: nn.Module, site: str) -> list[Place]:
    """The other places of the parameter `site` of `layer`."""
    stored = layer._parameters.get(site)
    if stored is None or not ties:
        return []
    return [p for p in ties.get(identity(stored), []) if not (p[1] is layer and p[2] == site)]


def refuse_one_sided(ties: Mapping[Hashable, list[Place]], active: Active) -> None:
    """Refuse to merge changes that differ between the layers which share the parameter.

    Raises:
        ModelError: a side has a change that another does not have; the message names both.
    """
    for places in ties.values():
        said = [changes_of(layer, site, active) for _, layer, site in places]
        if any(s != said[0] for s in said):
            names = [join_key(path, site) for path, _, site in places]
            raise ModelError(
                f"cannot merge: {' and '.join(map(repr, names))} are one parameter, and the adapter changes them differently "
                "(it targets one side, as a PEFT file does): untie them first, for example "
                "layer.weight = torch.nn.Parameter(layer.weight.clone()), or attach to both sides"
            )


def changes_of(layer: nn.Module, site: str, active: Active) -> list[tuple[int, float]]:
    """Which deltas `active` adapters put on a parameter, with their weights."""
    if not isinstance(layer, Host):
        return []
    with layer.roster.using(active):
        spoken = [*layer.speaking(site), *layer.feeding(site)]
    return sorted((id(s.delta), s.weight) for s in spoken)
