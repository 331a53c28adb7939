"""Verbs inside of `torch.inference_mode()`: what they make is meant to last, to be trained and saved for backward later."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def lasting(verb: F) -> F:
    """`verb`, for which inference mode is left: tensors that are made in it can never be trained."""

    @functools.wraps(verb)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return verb(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return verb(*args, **kwargs)

    return cast(F, call)
