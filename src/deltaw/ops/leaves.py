"""Parameters on their way into a custom autograd function, when several threads build graphs over one model.

torch makes a leaf's gradient accumulator under a lock of that leaf, and needs the interpreter's lock (the GIL) while it
holds it (`TensorImpl::incref_pyobject`, torch 2.13). Its own operations ask for the accumulator with the GIL released;
`autograd.Function.apply` asks with the GIL held. Two threads that meet over one parameter, one in each, wait for each
other for ever. A view is no leaf: its own operation asks for the accumulator, and the function never does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor


def as_views(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """`tensors` with every leaf that requires a gradient as a view of itself; as they are where one thread runs."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or threading.active_count() == 1:
        return list(tensors)
    return [t.view_as(t) if t is not None and t.requires_grad and t.is_leaf else t for t in tensors]
