"""How much memory this process used at most."""

from __future__ import annotations

import contextlib
import importlib
import resource
import sys
from pathlib import Path

from torch import nn

MIB = 1 << 20
PAGE = 1 << 12


def peak_bytes() -> int:
    """The largest resident size of this process so far, in bytes.

    Linux's VmHWM rather than ru_maxrss: that one is inherited from a larger parent.
    """
    found = _status("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Let `peak_bytes` count from now on, where the system can (Linux); elsewhere nothing changes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """The resident size of this process now, in bytes (the peak where the system does not tell)."""
    found = _status("VmRSS")
    return peak_bytes() if found is None else found


def loaded_bytes(model: nn.Module) -> int:
    """The resident size with all of `model` in memory; from now on `peak_bytes` counts anew.

    Weights that are mapped from their file come into memory where they are first read: one number of each page is. The
    compiler's modules, a hundred MiB of program that the first optimizer imports, are there before.
    """
    importlib.import_module("torch._dynamo")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            tensor.detach().view(-1)[:: PAGE // tensor.element_size()].clone()
    reset_peak()
    return resident_bytes()


def _status(key: str) -> int | None:
    path = Path("/proc/self/status")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None
