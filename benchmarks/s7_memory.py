"""S7: peak memory of a training step above the loaded model, dropout 0.05, each method in a process of its own.

The peak is the kernel's own count of resident pages (VmHWM, reset after loading), so it holds what the allocator keeps.
Nothing is timed here: as many processes as there are cores run at once, with one thread each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.measure import record, row

METHODS = {
    "deltaw": "methods.deltaw(work, dropout=0.05)",
    "deltaw compact": "compacted(methods.deltaw(work, dropout=0.05))",
    "peft": "methods.peft(work, dropout=0.05)",
    "full": "methods.full(work)",
    "floor": "methods.floor(work)",
    "deltaw DoRA": "methods.deltaw(work, dropout=0.05, dora=True)",
    "peft DoRA": "methods.peft(work, dropout=0.05, dora=True)",
    "deltaw q, v": "methods.deltaw(query_and_value(work), dropout=0.05)",
    "deltaw q, v compact": "compacted(methods.deltaw(query_and_value(work), dropout=0.05))",
    "peft q, v": "methods.peft(query_and_value(work), dropout=0.05)",
}
CLAIMED = 4
"""So many of them have a target; the others are measured on the first model only."""

CHILD = """
import dataclasses, gc, importlib, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import deltaw as dw
from benchmarks import methods

def kilobytes(name):
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name)).split()[1])

def compacted(contender):
    loss = contender.loss
    def inner(model):
        with dw.compact(model):
            return loss(model)
    contender.loss = inner
    return contender

def query_and_value(work):
    return dataclasses.replace(work, targets=tuple(t for t in work.targets if t[0] in "qv"))

module, _, name = sys.argv[1].partition(".")
work = getattr(importlib.import_module("benchmarks." + module), name)()
contender = eval(sys.argv[2])
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
for _ in range(2):
    contender.step()
print(kilobytes("VmHWM") - before)
"""


def peaks(work: str, methods: Sequence[str]) -> dict[str, float]:
    """MiB above the loaded model, of each method. work: the function that makes the workload, "module.name"."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {m: round(p, 1) for m, p in zip(methods, pool.map(lambda m: peak(work, m), methods), strict=True)}


def peak(work: str, method: str) -> float:
    """The same of one."""
    root = Path(__file__).parents[1]
    # Freed memory goes back at once in every process, so that the peak counts what is in use.
    env = {**os.environ, "PYTHONPATH": str(root), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, work, METHODS[method]], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024


def main() -> None:
    rows: list[dict[str, Any]] = []
    table = {}
    for make in (workloads.whisper_tiny, workloads.minilm, workloads.smollm2):
        name = make().name
        mib = peaks(f"workloads.{make.__name__}", list(METHODS)[: CLAIMED if table else None])
        table[name] = mib
        rows.append(row(f"{name}: memory deltaw / PEFT", {"ratio": mib["deltaw"] / mib["peft"]}, 0.60))
        rows.append(row(f"{name}: memory deltaw / full", {"ratio": mib["deltaw"] / mib["full"]}, 0.65))
        rows.append(row(f"{name}: compact / full", {"ratio": mib["deltaw compact"] / mib["full"]}, 0.42))
        beside = ("deltaw q, v", "peft q, v"), ("deltaw q, v compact", "full")
        for one, other in (("floor", "full"), ("deltaw DoRA", "peft DoRA"), *beside):
            if one in mib:
                rows.append(row(f"{name}: memory {one} / {other}", {"ratio": mib[one] / mib[other]}))
    record("S7", rows, mebibytes=table)


if __name__ == "__main__":
    main()
