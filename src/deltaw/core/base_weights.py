"""The frozen weights of a base, asked for one at a time as (out, in) matrices, from a model or from plain tensors.

A layer family knows how its stored parameter is a matrix (GPT-2's Conv1D stores the transpose, a convolution four
dimensions); this asks it. Nothing is copied ahead: a lazily read safetensors mapping is read one weight at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Change, join_key, split_key
from deltaw.core.host import Host, parameter_names
from deltaw.core.part import parameter_of, part, rows_of
from deltaw.core.registry import hosts
from deltaw.core.variant import fits
from deltaw.errors import AdapterError, ModelError, UnknownName, did_you_mean

Base = nn.Module | Mapping[str, Tensor]
"""A model, plain or adapted (its frozen weights count), or parameter name -> tensor in stored shape."""


def base_weight(base: Base, key: str, change: Change) -> Tensor:
    """The base weight behind `change`: the (out, in) matrix (its part, for a site like "weight[0:64]"), or the stored
    parameter for a change of any shape.

    Raises:
        UnknownName: the base has no parameter `key`.
        ModelError: an adapter is merged into the weight, so that it is no longer the base's.
        AdapterError: the weight does not have the shape that the change is for.
    """
    path, site = split_key(key)
    name = join_key(path, parameter_of(site))
    weight = _from_model(base, name, change) if isinstance(base, nn.Module) else _from_mapping(base, name, change)
    weight = part(weight, rows_of(site))
    if not fits(change.matrix_shape, weight.shape):
        raise AdapterError(
            f"{key}: the base has {tuple(weight.shape)}, the adapter changes {tuple(change.matrix_shape)}: "
            f"give the base that the adapter was trained on"
        )
    return weight.detach()


def has_weight(base: Base, key: str) -> bool:
    """Whether the base has the parameter (or buffer) `key` at all."""
    path, site = split_key(key)
    name = join_key(path, parameter_of(site))
    if not isinstance(base, nn.Module):
        return name in base
    try:
        module = base.get_submodule(path)
    except AttributeError:
        return False
    return parameter_of(site) in {*parameter_names(module), *module._buffers}


def _from_model(model: nn.Module, key: str, change: Change) -> Tensor:
    path, site = split_key(key)
    try:
        module = model.get_submodule(path)
        held = isinstance(module, Host) and module.form_of(parameter_of(site)) is not None
        if held and isinstance(module, Host):
            stored = module.stored_parameter(site)
        else:
            stored = module.get_parameter(site) if site in module._parameters else module.get_buffer(site)
    except AttributeError:
        known = [name for name, _ in model.named_parameters()]
        raise UnknownName(
            f"{type(model).__name__} has no parameter {key!r}{did_you_mean(key, known)}; "
            f"the adapter was made for another model"
        ) from None
    if isinstance(module, Host):
        if module.roster.merged is not None:
            raise ModelError(f"adapters are merged into {key}: call dw.unmerge(model) first")
        return stored if change.variant.any_shape else module.frozen_matrix(site).dense()
    if change.variant.any_shape:
        return stored
    for family, host in hosts.items():
        right = host.accepts(module) if change.layer is None else family == change.layer
        if right and not host.full_only:
            matrix: Tensor = host.to_matrix(module, site, stored)
            return matrix
    return _by_shape(stored, change)


def _from_mapping(tensors: Mapping[str, Tensor], key: str, change: Change) -> Tensor:
    if key not in tensors:
        raise UnknownName(
            f"the base weights given hold no {key!r}{did_you_mean(key, tensors)}; "
            f"names must be those of the model's parameters"
        )
    stored = tensors[key]
    if change.variant.any_shape:
        return stored
    if change.layer is not None and change.layer in hosts:
        host = hosts[change.layer]
        try:
            blank: Host = object.__new__(host)
            matrix = blank.to_matrix(split_key(key)[1], stored)
        except AttributeError:  # this family reads the layer's own attributes, and there is no layer here
            return _by_shape(stored, change)
        return matrix
    return _by_shape(stored, change)


def _by_shape(stored: Tensor, change: Change) -> Tensor:
    """The matrix that the shapes alone suggest: as stored, flattened behind the first dimension, or transposed."""
    if len(change.matrix_shape) != 2 or fits(change.matrix_shape, stored.shape):
        return stored
    rows, columns = change.matrix_shape
    if stored.ndim > 2 and stored.shape[0] == rows and stored.numel() == rows * columns:
        return stored.reshape(rows, columns)
    if tuple(stored.shape) == (columns, rows):
        return stored.T
    return stored


def dense_base(base: Base, key: str, change: Change) -> Tensor:
    """`base_weight` in float64, on the device of the change's tensors."""
    device = next(iter(change.tensors.values())).device
    return base_weight(base, key, change).to(device, torch.float64)
