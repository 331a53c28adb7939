"""Adapters whose start looks at data (init=eva, corda, lora-ga): the first training examples, in the order of epoch 0.

One that makes up for quantisation (init=loftq) is given the unquantised weights, which the task builds again.

A pure function of seed and data, so that a run that is resumed starts from the same values before its own are restored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.starting import Waiting
from deltaw.errors import ConfigError
from deltaw.model.initialize import initialize
from deltaw.training.config import RunConfig
from deltaw.training.order import batches, generator
from deltaw.training.scoring import to_device
from deltaw.training.task import Batch, Task

EXAMPLES = 256
"""Training examples that are looked at, at most."""


class Call(dict[str, Any]):
    """The keyword arguments with which a task calls its model for `batch`."""

    batch: Batch


class _Seen(Exception):
    """The model was called; it need not run."""


def start_from_data(
    model: nn.Module, task: Task, config: RunConfig, device: torch.device, say: Callable[[str], object]
) -> None:
    """Start what waits for data or for the unquantised weights, if anything does.

    Raises:
        ConfigError: a start looks at what quantisation loses, and nothing is quantised. Others as `dw.initialize`.
    """
    starts = [m.awaits for m in model.modules() if isinstance(m, Waiting) and m.waiting]
    needs = {each.looks_at for each in starts if each is not None}
    if not needs:
        return
    if "original" in needs and config.quantize is None:
        raise ConfigError("this init starts from what quantisation loses, and nothing is quantised: set quantize=nf4")
    originals = task.build().to(device) if "original" in needs else None
    lengths = task.lengths("train") if config.bucket else None
    order = batches(len(task.splits["train"]), config.batch_size, config.seed, 0, lengths)
    chosen = order[: -(-EXAMPLES // config.batch_size)]
    calls = [call_of(model, task, _batch(task, config, some, device)) for some in chosen]

    def loss(_model: nn.Module, call: Call) -> Tensor:
        return task.loss(model, dict(call.batch))[0] / task.weight(call.batch)

    initialize(model, calls, loss=loss, originals=originals)
    seen = f"what its layers see in {sum(map(len, chosen)):,} training examples"
    say(f"the adapter starts from {seen if originals is None else 'what quantisation takes from the weights'}")


def _batch(task: Task, config: RunConfig, chosen: Sequence[int], device: torch.device) -> Batch:
    draw = [generator("example", config.seed, 0, i) if task.augments else None for i in chosen]
    return to_device(task.collate([task.example("train", i, random) for i, random in zip(chosen, draw)]), device)


def call_of(model: nn.Module, task: Task, batch: Batch) -> Call:
    """How `task` calls `model` for a batch."""
    found = Call()
    found.batch = batch

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            many = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            found.update(value if many else {name: value})
        raise _Seen

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        task.loss(model, dict(batch))
    except _Seen:
        pass
    finally:
        handle.remove()
    return found
