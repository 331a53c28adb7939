"""Verbs that change a model: one at a time, whatever thread they come from, and never in inference mode.

A verb looks at a model, plans, and then changes classes and tables; another one in between would act on what is gone.
Calls of the model do not wait: one that is under way meets what was there before, or what is there now. What a verb makes
is meant to last, to be trained and saved for backward, which tensors made inside of `torch.inference_mode()` can never be.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])

_LOCK = threading.RLock()


def changing(verb: F) -> F:
    """`verb`, while which no other of these runs, and for which inference mode is left."""

    @functools.wraps(verb)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _LOCK:
            if not torch.is_inference_mode_enabled():
                return verb(*args, **kwargs)
            with torch.inference_mode(False), torch.no_grad():
                return verb(*args, **kwargs)

    return cast(F, call)
