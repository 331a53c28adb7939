"""What a person sees while a run trains: rich bars on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from deltaw.training.memory import MIB, resident_bytes

EVERY_SECONDS = 10.0


class Progress:
    """Reports a run called `name`. Silent if `quiet`."""

    def __init__(self, name: str, *, quiet: bool = False) -> None:
        self.name = name
        self.quiet = quiet
        self.console = Console(stderr=False, highlight=False, soft_wrap=True)
        self.live = not quiet and sys.stdout.isatty()
        self.bars: Bars | None = None
        self.total = 0
        self.first = 0
        self.started = self.spoken = time.perf_counter()
        self.busy: Any = 0

    def say(self, text: str) -> None:
        """One line of text."""
        if not self.quiet:
            self.console.print(f"[{self.name}] {text}" if self.name else text, markup=False)
            sys.stdout.flush()

    def complain(self, text: str) -> None:
        """One line of text on stderr, also when quiet."""
        self.finish()
        print(text, file=sys.stderr, flush=True)

    def start(self, total: int, done: int) -> None:
        """Training begins, at step `done` of `total`."""
        self.total, self.first = total, done
        self.started = self.spoken = time.perf_counter()
        if self.live:
            self.bars = Bars(
                TextColumn(f"[{self.name}]", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}", markup=False),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bars.start()
            self.busy = self.bars.add_task("", total=total, completed=done)

    def step(self, facts: dict[str, Any]) -> None:
        """An optimizer step is done."""
        now = time.perf_counter()
        line = f"loss {facts['loss']:.3f}  {facts['examples_per_second']:.0f} examples/s"
        if self.bars is not None:
            if now - self.spoken > 0.2:
                line += f"  {resident_bytes() / MIB:,.0f} MiB"
                self.spoken = now
                self.bars.update(self.busy, completed=facts["step"], description=line)
        elif now - self.spoken > EVERY_SECONDS and not self.quiet:
            self.spoken = now
            left = (now - self.started) / max(1, facts["step"] - self.first) * (self.total - facts["step"])
            self.say(f"step {facts['step']}/{self.total}  {line}  {resident_bytes() / MIB:,.0f} MiB  {left:.0f} s left")

    def epoch(self, row: dict[str, Any], *, best: bool) -> None:
        """An epoch has been evaluated."""
        scores = "  ".join(
            f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float) and k not in ("seconds", "train_loss")
        )
        self.say(
            f"epoch {row['epoch']}  {row['seconds']:.1f} s  train loss {row['train_loss']:.4f}  validation {scores}{'  *' if best else ''}"
        )

    def finish(self) -> None:
        """Training is over."""
        if self.bars is not None:
            self.bars.stop()
            self.bars = None
