"""The learning rate as a pure function of the step: there is no scheduler state to lose."""

from __future__ import annotations

import math


def factor(step: int, total: int, warmup: float, shape: str) -> float:
    """What the peak rate is multiplied with at `step` (0 .. total-1).

    Rises linearly over the first `warmup` share of the steps, then falls to 0 (linear, cosine) or stays (constant).
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[shape]
