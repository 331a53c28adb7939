"""The memory estimate of `dw.summary(model, inputs)` and `--dry-run` against the measured peak, each in its own process.

Measured is what S7 measures: the kernel's count of resident pages at its highest over three steps, above the loaded model.
The estimate comes from one forward and backward pass in another process. Within 15 % is the promise.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import SEED, record, row
from benchmarks.workloads import Workload, minilm, smollm2, whisper_tiny

METHODS = {
    "full": "methods.full(work)",
    "head": "estimate.head(work)",
    "lora": "methods.deltaw(work)",
    "lora dropout .05": "methods.deltaw(work, dropout=0.05)",
    "dora": "methods.deltaw(work, dora=True)",
    "dora dropout .05": "methods.deltaw(work, dropout=0.05, dora=True)",
    "lora int8": "methods.deltaw(work, int8=True)",
}

CHILD = """
import gc, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from benchmarks import estimate, methods
from deltaw.model.peak import measured
from deltaw.model.summary import training_peak

def kilobytes(name):
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name)).split()[1])

work = estimate.WORKS[sys.argv[1]]()
contender = eval(sys.argv[2])
gc.collect()
if sys.argv[3] == "estimate":
    print(training_peak(contender.model, measured(contender.model, lambda: contender.loss(contender.model))) / 2**20)
else:
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    for _ in range(3):
        contender.step()
    print((kilobytes("VmHWM") - before) / 1024)
"""


def mlp() -> Workload:
    """A perceptron over a large batch of pictures."""

    def build() -> nn.Module:
        torch.manual_seed(SEED)
        sizes = (784, 2048, 2048, 1024, 10)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    x = torch.randn(4096, 784, generator=torch.Generator().manual_seed(SEED))
    return Workload("MLP 784-2048-2048-1024-10 x4096", build, ("0", "2", "4"), "0", _classes(x))


def cnn() -> Workload:
    """A small convolutional network with batch norms."""

    def build() -> nn.Module:
        torch.manual_seed(SEED)
        layers: list[nn.Module] = []
        for a, b in ((3, 32), (32, 64), (64, 128), (128, 256)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))

    x = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(SEED))
    return Workload("CNN 4 blocks 64x64 x64", build, ("4", "8", "12"), "0", _classes(x))


def _classes(x: torch.Tensor) -> Callable[[nn.Module], torch.Tensor]:
    labels = torch.arange(len(x)) % 10
    return lambda model: nn.functional.cross_entropy(model(x), labels)


def head(work: Workload) -> Any:
    """Only the last layer trained, as method `head` does."""
    import deltaw as dw
    from benchmarks.methods import Contender

    model = work.build()
    last = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    dw.attach(model, {last: dw.Full()})
    return Contender(model, work.loss)


WORKS: dict[str, Callable[[], Workload]] = {
    "MiniLM": minilm,
    "whisper-tiny": whisper_tiny,
    "SmolLM2": smollm2,
    "MLP": mlp,
    "CNN": cnn,
}


def child(work: str, method: str, what: str) -> float | str:
    """MiB, estimated or measured in a process of its own; the error's last line where it has none."""
    root = Path(__file__).parents[1]
    # as in S7: freed memory goes back at once, so that the peak counts what is in use
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    env |= {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, work, METHODS[method], what], cwd=root, env=env, capture_output=True, text=True
    )
    return float(done.stdout) if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def main(*which: str) -> None:
    """Every model and method, or those whose names are given."""
    rows: list[dict[str, Any]] = []
    for work in WORKS:
        for method in METHODS:
            if which and work not in which and method not in which:
                continue
            found = {what: child(work, method, what) for what in ("estimate", "measured")}
            estimate, measured = found["estimate"], found["measured"]
            if isinstance(estimate, str) or isinstance(measured, str):
                print(f"{work} {method}: not to be had here: {estimate if isinstance(estimate, str) else measured}")
                continue
            ratio = estimate / measured
            line = row(f"{work} {method}: estimate / measured", {"ratio": ratio})
            rows.append({**line, "estimate": round(estimate, 1), "measured": round(measured, 1)})
            print(f"{work:13s} {method:18s} {estimate:8.1f} / {measured:8.1f} MiB = {ratio:.3f}", flush=True)
    if not which:
        record("estimate", rows, within=0.15, worst=max(abs(r["ratio"] - 1) for r in rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
