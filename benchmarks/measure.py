"""Timing by alternation, and the record of a measurement.

Every round runs each contender once, so that a machine that slows down slows all of them; the figure is the ratio of
medians, with the quartiles of the per-round ratios beside it to show what the machine's noise amounts to.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
SEED = 0
CLOCK = time.process_time if os.environ.get("DELTAW_BENCH_CLOCK") == "cpu" else time.perf_counter
"""Wall time; CPU time on request, for a machine that others use (then with OMP_NUM_THREADS=1)."""

BUDGET = 8.0
"""Seconds after which no further round is begun, once there are `FEWEST`: all claims together take under 15 minutes."""
FEWEST = 3

Times = dict[str, list[float]]


def alternate(steps: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> Times:
    """Seconds of each step, taken in turns: `rounds` of each, or fewer where they take long."""
    for _ in range(warmup):
        for step in steps.values():
            step()
    times: Times = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    began = time.perf_counter()
    try:
        for done in range(rounds):
            if done >= FEWEST and time.perf_counter() - began > BUDGET:
                break
            for name, step in steps.items():
                start = CLOCK()
                step()
                times[name].append(CLOCK() - start)
    finally:
        gc.enable()
    return times


def ratio(times: Times, one: str, other: str) -> dict[str, float]:
    """Median time of `one` over that of `other`, and the quartiles of the ratios of the single rounds."""
    pairs = [a / b for a, b in zip(times[one], times[other], strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else (pairs[0], pairs[0], pairs[0])
    return {
        "ratio": statistics.median(times[one]) / statistics.median(times[other]),
        "quartile_low": low,
        "quartile_high": high,
    }


def medians(times: Times) -> dict[str, float]:
    """Median milliseconds."""
    return {name: round(1e3 * statistics.median(values), 3) for name, values in times.items()}


def record(claim: str, rows: list[dict[str, Any]], *, out: Path | None = None, **facts: Any) -> None:
    """Print the rows and write them, with versions, machine and seed, to results/<claim>.json (or `out`)."""
    for row in rows:
        verdict = "" if "target" not in row else f"  target {row['target']:.2f}  {'ok' if row['met'] else 'MISSED'}"
        spread = f" [{row['quartile_low']:.2f}, {row['quartile_high']:.2f}]" if "quartile_low" in row else ""
        print(f"{claim}  {row['what']:<60s} {row['ratio']:.3f}{spread}{verdict}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"claim": claim, "rows": rows, **facts, "seed": SEED, "machine": machine()}, indent=1)
    (out or RESULTS / f"{claim}.json").write_text(text + "\n")


def row(what: str, figures: Mapping[str, float], target: float | None = None, **more: Any) -> dict[str, Any]:
    """One line of a result: what was compared, the ratio, and whether it meets the target (at most)."""
    rounded = {k: round(v, 4) for k, v in figures.items()}
    verdict = {} if target is None else {"target": round(target, 4), "met": figures["ratio"] <= target}
    return {"what": what, **rounded, **verdict, **more}


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    names = ("torch", "peft", "transformers", "deltaw")
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "clock": CLOCK.__name__,
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in names},
    }


def processor() -> str:
    """The processor's name and the vector units that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split("\t: ", 1) for line in (li.replace("\t\t", "\t") for li in lines) if "\t: " in line)
    flags = set(facts.get("flags", "").split())
    units = [f for f in ("avx2", "avx512f", "avx512_vnni", "amx_tile") if f in flags]
    return f"{facts.get('model name', 'unknown')} ({' '.join(units)})"


def installed(name: str) -> str:
    """A package's version, or "absent"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
