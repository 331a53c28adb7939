"""A bare module is what nn.Module makes, and shares no container with another one."""

from __future__ import annotations

import copy

import torch
from torch import nn

from deltaw.core.bare import Bare


def test_it_holds_what_every_module_holds() -> None:
    one, other, module = Bare(), Bare(), nn.Module()
    assert list(vars(one)) == list(vars(module))
    for name, value in vars(module).items():
        assert type(vars(one)[name]) is type(value)
        assert vars(one)[name] == value
        assert value is None or isinstance(value, bool) or vars(one)[name] is not vars(other)[name]


def test_it_is_used_as_any_module() -> None:
    one, other = Bare(), Bare()
    one.weight = nn.Parameter(torch.ones(2))
    one.inner = nn.Linear(2, 2)
    one.register_buffer("seen", torch.zeros(1), persistent=False)
    handle = one.register_forward_hook(lambda *_: None)
    assert list(one.state_dict()) == ["weight", "inner.weight", "inner.bias"]
    assert not other.state_dict()
    assert not other._forward_hooks
    assert list(copy.deepcopy(one).state_dict()) == list(one.state_dict())
    handle.remove()
    assert not one._forward_hooks
