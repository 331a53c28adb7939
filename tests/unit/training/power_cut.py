"""A run that ends in the middle of a step, as by a power cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deltaw.training.fit import Fit


class PowerCut(BaseException):
    """Nothing catches it on the way."""


@contextmanager
def power_cut(step: int) -> Iterator[None]:
    """Inside, training ends right after `step`; asserts that it did."""
    real = Fit._after_step

    def dying(fit: Fit, steps: int) -> None:
        real(fit, steps)
        if fit.state.step == step:
            raise PowerCut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "_after_step", dying)
        with pytest.raises(PowerCut):
            yield
