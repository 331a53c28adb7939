"""AdamW's moments of all trained tensors in one buffer instead of two small tensors for each.

An adapter is many small tensors (SmolLM2-135M: 420). One buffer is allocated once, before the first activations, and a step
walks through memory in order. The parameters stay tensors of their own, and torch's AdamW does the arithmetic: the bits are
those without this (decision 020).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LINE = 64
"""Bytes of a line of the cache: every moment begins on one."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def lay_flat(optimizer: torch.optim.Optimizer) -> None:
    """Let the state of an AdamW (`fused=True`) lie in one buffer for each device and dtype of its parameters.

    What state there is already (of a checkpoint) is kept; what is not yet begins at zero, as in AdamW's first step.
    Parameters that are sharded keep tensors of their own.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if type(parameter) in (Tensor, nn.Parameter):
                alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for (device, dtype), parameters in alike.items():
        line = LINE // dtype.itemsize
        room = [-(-p.numel() // line) * line for p in parameters]
        moments = torch.zeros(len(MOMENTS) * sum(room), dtype=dtype, device=device)
        steps = torch.zeros(len(parameters), device=device)
        places = iter(torch.split(moments, [r for r in room for _ in MOMENTS]))
        for parameter, step in zip(parameters, steps):
            views = {m: next(places)[: parameter.numel()].view(parameter.shape) for m in MOMENTS}
            held = optimizer.state[parameter]
            for name, view in {"step": step, **views}.items():
                if name in held:
                    view.copy_(held[name])
                held[name] = view
