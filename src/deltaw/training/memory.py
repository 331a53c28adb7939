"""How much memory this process used at most."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

MIB = 1 << 20


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


def _status(key: str) -> int | None:
    path = Path("/proc/self/status")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None
