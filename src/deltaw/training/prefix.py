"""The frozen body, computed once per example: what lies below every trained weight is a constant of the example.

Exact up to rounding while the body is deterministic, so it runs in eval mode. Only what the head reads is kept: a
probe poisons each output with NaN, in turn, and looks whether the model's answer notices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Outputs = dict[str, Tensor]
ONLY = "output"
"""Name of the single output of a body that returns a tensor."""


def is_frozen(module: nn.Module) -> bool:
    """True if nothing in `module` is trained."""
    return not any(p.requires_grad for p in module.parameters())


class Prefix:
    """Records the outputs of `body` and plays them back.

    `answer(batch)` runs the whole model on a batch. The body must return a tensor or a mapping of tensors, batch first.
    """

    def __init__(self, body: nn.Module, answer: Callable[[Any], Tensor]) -> None:
        self.body = body
        self.answer = answer
        self.kind: type[Any] | None = None
        self.kept: dict[str, str] | None = None  # name -> "all", "first" (position 0 only) or "none"

    @torch.no_grad()
    def record(self, batch: Any, lengths: Sequence[int] | None) -> list[Outputs]:
        """One dictionary of kept outputs per example of `batch`."""
        seen: list[Any] = []
        handle = self.body.register_forward_hook(lambda _m, _a, output: seen.append(output))
        try:
            self.answer(batch)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise TypeError(f"the body was called {len(seen)} times in one forward pass")
        outputs = self._named(seen[0])
        if self.kept is None:
            self.kept = self._probe(outputs, batch)
        count = len(next(iter(outputs.values())))
        rows: list[Outputs] = []
        for i in range(count):
            row = {}
            for name, use in self.kept.items():
                if use == "first":
                    row[name] = outputs[name][i, :1].clone()
                elif use == "all":
                    whole = outputs[name][i]
                    cut = lengths is not None and whole.ndim >= 2 and whole.shape[0] == max(lengths)
                    row[name] = (whole[: lengths[i]] if cut and lengths is not None else whole).clone()
            rows.append(row)
        return rows

    @contextmanager
    def playing(self, rows: Sequence[Outputs]) -> Iterator[None]:
        """While inside, the body returns the recorded outputs of these examples instead of computing them."""
        assert self.kept is not None
        device = next(self.body.parameters()).device
        outputs: Outputs = {}
        for name, use in self.kept.items():
            if use == "none":
                outputs[name] = torch.empty(len(rows), 0, device=device)
            else:
                outputs[name] = nn.utils.rnn.pad_sequence([r[name] for r in rows], batch_first=True).to(device)
        with self._replaced(outputs):
            yield

    def _named(self, output: Any) -> Outputs:
        if isinstance(output, Tensor):
            return {ONLY: output}
        if isinstance(output, dict) and all(isinstance(v, Tensor) for v in output.values()):
            self.kind = type(output)
            return dict(output)
        raise TypeError(f"the body returns {type(output).__name__}, not a tensor or a mapping of tensors")

    @contextmanager
    def _replaced(self, outputs: Outputs) -> Iterator[None]:
        value = outputs[ONLY] if self.kind is None else self.kind(**outputs)
        object.__setattr__(self.body, "forward", lambda *_a, **_k: value)
        try:
            yield
        finally:
            object.__delattr__(self.body, "forward")

    def _probe(self, outputs: Outputs, batch: Any) -> dict[str, str]:
        """Which outputs the head reads, and how far."""
        found = {}
        for name, tensor in outputs.items():
            poisoned = torch.full_like(tensor, float("nan"))
            if self._finite({**outputs, name: poisoned}, batch):
                found[name] = "none"
                continue
            found[name] = "all"
            if tensor.ndim >= 3 and tensor.shape[1] > 1:
                poisoned[:, 0] = tensor[:, 0]
                if self._finite({**outputs, name: poisoned}, batch):
                    found[name] = "first"
        return found

    def _finite(self, outputs: Outputs, batch: Any) -> bool:
        with self._replaced(outputs):
            return bool(torch.isfinite(self.answer(batch)).all())
