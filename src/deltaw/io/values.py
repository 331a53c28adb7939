"""Adapters as values, given to a model: install, add, replace. What a file must prove at load, a value must prove as well."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from deltaw.core.adapter import Adapter
from deltaw.core.variant import Variant
from deltaw.errors import ConfigError
from deltaw.io.model_files import of_value
from deltaw.io.notices import AdapterNotice
from deltaw.model import hot, state
from deltaw.model.attach import attach, installed
from deltaw.model.changing import changing


@changing
def install(
    model: nn.Module,
    adapter: Adapter,
    name: str = "default",
    *,
    active: bool = True,
    trainable: bool = False,
    freeze: bool = True,
    allow_base_mismatch: bool = False,
) -> nn.Module:
    """Give `model` an adapter that exists already, as `name`. Strict: every change must find its parameter, and fit it.

    active: it speaks from now on, alone. trainable: its tensors require a gradient.
    allow_base_mismatch: accept a base with other weights than the one it was trained on, where it knows that.

    Raises:
        AdapterError: a change names no parameter of this model, or has another shape; all of them are listed.
        BaseMismatch: the base is not the one that it was trained on.
        NonFinite: a tensor holds NaN or infinity.
        NameTaken, ConfigError, ModelError: as `attach`.
    If anything is wrong, the model is left as it was.
    """
    checked(adapter, "install takes an Adapter, as dw.get and dw.read give it")
    layout = state.Layout(model)
    adapter = told(layout, adapter, allow_base_mismatch)
    installed(layout, adapter, name, active=active, trainable=trainable, freeze=freeze)
    return model


def add(model: nn.Module, what: Adapter | Variant, name: str, **options: Any) -> nn.Module:
    """One adapter more, beside those that are there and without switching to it: a value, or a fresh variant.

    options: those of `install` (trainable, freeze) for an Adapter, of `attach` (targets, train ...) for a variant.
    Errors as theirs.
    """
    if not isinstance(what, (Adapter, Variant)):
        raise ConfigError(f"add takes an Adapter or a variant such as dw.LoRA(rank=8); found {type(what).__name__}")
    verb: Callable[..., nn.Module] = install if isinstance(what, Adapter) else attach
    return verb(model, what, name=name, **{"active": False, **options})


@changing
def replace(model: nn.Module, name: str, adapter: Adapter, *, allow_base_mismatch: bool = False) -> nn.Module:
    """Give the adapter `name` of `model` the values of `adapter`, in place, and return `model`.

    Raises:
        AdapterError: it changes other weights than `name` does, by another method, or by one of larger rank.
        UnknownName: the model has no adapter of that name.
        BaseMismatch, NonFinite: as `install`, with `allow_base_mismatch`.
        ConfigError: `adapter` is no Adapter.
        ModelError: changes are merged into the weights.
    If anything is wrong, nothing is replaced.
    """
    checked(adapter, f"replace({name!r}) takes an Adapter, as dw.read and dw.get give it")
    state.known(model, name)
    return hot.replace(model, name, told(state.Layout(model), adapter, allow_base_mismatch))


def checked(adapter: Any, wanted: str) -> None:
    """Refuse what is no Adapter."""
    if not isinstance(adapter, Adapter):
        raise ConfigError(f"{wanted}; found {type(adapter).__name__}")


def told(layout: state.Layout, adapter: Adapter, allow: bool) -> Adapter:
    """The adapter as this model takes it; what is to be said of its base is said, if it comes from a file."""
    adapter, notes = of_value(layout, adapter, allow)
    for note in notes if adapter.base else ():
        warnings.warn(note, AdapterNotice, stacklevel=4)
    return adapter
