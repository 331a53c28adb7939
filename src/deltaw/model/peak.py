"""Peak memory of a training step, counted tensor by tensor while one forward and backward pass runs.

What autograd saves is not the peak: gradients appear while activations go, and operations need temporaries (logits, the
gradient of an addition, a dropout's noise). So every storage that any operation makes is counted from its birth to its
death, in the forward and in the backward pass, and the largest sum is kept. On a GPU the allocator's own count is read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LIBRARIES = 16 << 20
"""What the first step touches of the maths libraries' own code and buffers, on a CPU (benchmarks/estimate.py)."""


@dataclass(frozen=True)
class Peak:
    """Bytes above the loaded model. forward: held when the forward pass ended, what its backward needs and its output.
    step: most at any instant of forward and backward, gradients included, an optimizer's state not."""

    forward: int
    step: int


def measured(model: nn.Module, loss: Callable[[], Tensor]) -> Peak:
    """Run `loss()` and its backward once, and count. Gradients, buffers and the generator are put back."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.enable_grad(), torch.random.fork_rng(), _as_it_was(model):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            value = loss()
            forward = torch.cuda.memory_allocated(device) - before
            _backward(value)
            return Peak(forward, torch.cuda.max_memory_allocated(device) - before)
        meter = Meter([*model.parameters(), *model.buffers()])
        with meter:
            value = loss()
            forward = meter.now
            _backward(value)
        return Peak(forward, meter.most)


def _backward(value: Tensor) -> None:
    if value.requires_grad:
        torch.autograd.backward(value)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards no gradient is there that was not, and every buffer holds what it held."""
    gradients = {p: p.grad for p in model.parameters()}
    buffers = {b: b.detach().clone() for b in model.buffers()}
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers.items():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations make inside, but those of `known`. now: alive; most: at once."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._alive = {key: 0 for key in map(_key, known) if key is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._count(given, made=False)  # the batch, of which an operation may return a view
        out = func(*args, **(kwargs or {}))
        for found in tree_leaves(out):
            if isinstance(found, Tensor):
                self._count(found, made=True)
        return out

    def _count(self, tensor: Tensor, made: bool) -> None:
        key = _key(tensor)
        if key is None or key in self._alive:
            return
        held: Any = tensor if key < 0 else tensor.untyped_storage()
        size = tensor.numel() * tensor.element_size() if key < 0 else held.nbytes()
        self._alive[key] = size if made else 0
        self.now += self._alive[key]
        self.most = max(self.most, self.now)
        weakref.finalize(held, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


def _key(tensor: Tensor) -> int | None:
    """What identifies a tensor's storage while it lives; negative for one without (weights packed by oneDNN)."""
    if tensor.device.type == "meta":
        return None
    if tensor.layout == torch._mkldnn:  # type: ignore[attr-defined]
        return -id(tensor)
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None
