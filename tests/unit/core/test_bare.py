"""A bare module is what nn.Module makes, and shares no container with another one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from deltaw.core.bare import Bare


def test_it_holds_what_every_module_holds() -> None:
    one, other, module = Bare(), Bare(), nn.Module()
    for name, value in vars(module).items():
        held = getattr(one, name)
        assert type(held) is type(value)
        assert held == value
        assert getattr(one, name) is held  # made once
        assert value is None or isinstance(value, bool) or getattr(other, name) is not held
    assert set(vars(one)) == set(vars(module))
    with pytest.raises(AttributeError, match="'Bare' object has no attribute 'hooks'"):
        _ = one.hooks


def test_containers_for_hooks_take_no_memory_until_they_are_asked_for() -> None:
    assert set(vars(Bare())) == {"training", "_is_full_backward_hook", "_parameters", "_buffers", "_modules"}


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_whole_and_stand_alone(twin: Callable[[Bare], Bare]) -> None:
    one = Bare()
    one.weight = nn.Parameter(torch.ones(2))
    other = twin(one)
    other.register_forward_pre_hook(lambda *_: None)
    assert torch.equal(other.weight, one.weight)
    assert other.weight is not one.weight
    assert not one._forward_pre_hooks


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
