"""How many steps there are, and the learning rate as a pure function of the step: no scheduler state to lose."""

from __future__ import annotations

import math


def steps(examples: int, batch: int, epochs: int) -> tuple[int, int]:
    """(optimizer steps per epoch, in all epochs), for `batch` examples per step over all processes."""
    per_epoch = math.ceil(examples / batch)
    return per_epoch, per_epoch * epochs


def factor(step: int, total: int, warmup: float, shape: str) -> float:
    """What the peak rate is multiplied with at `step` (0 .. total-1).

    Rises linearly over the first `warmup` share of the steps, then falls to 0 (linear, cosine) or stays (constant).
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[shape]
