"""The memory that `deltaw train --dry-run` foretells against the peak of the run itself, each in its own process.

Both are bytes above the loaded model: `peak_bytes` of the dry run, and `peak_above_model_bytes` that the kernel's count of
resident pages gave the run (results.json). Nothing is set in the environment but the number of threads. How far an
allocator's memory is torn differs from process to process, so each is the median of `TIMES`, its range beside it.

    python -m benchmarks.run_estimates        # some forty minutes; writes docs/results/estimates.md
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from benchmarks.table import machine_of

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "estimates.md"
MIB = 1 << 20
TIMES = 3

RUNS = {
    "LoRA": ["--method", "lora"],
    "LoRA, dropout .05": ["--method", "lora", "lora.dropout=0.05"],
    "LoRA, int8 base": ["--method", "lora", "quantize=int8"],
    "LoRA, compact saves": ["--method", "lora", "compact=true"],
    "LoRA, bf16": ["--method", "lora", "precision=bf16"],
    "LoRA, batches of 4": ["--method", "lora", "batch_size=4"],
    "LoRA on value alone": ["--method", "lora", "targets=[value]"],
    "DoRA, dropout .05": ["--method", "dora", "dora.dropout=0.05"],
    "full fine-tuning": ["--method", "full"],
    "the head alone": ["--method", "head"],
}


def deltaw(*arguments: str) -> str:
    """What a `deltaw` of its own prints."""
    done = subprocess.run(
        [sys.executable, "-m", "deltaw.cli", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"deltaw {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def compared(folder: Path, options: list[str]) -> tuple[float, float, float]:
    """MiB of the model, foretold above it, and measured above it."""
    train = ["train", "sentiment", "epochs=1", *options]
    foretold: dict[str, Any] = json.loads(deltaw(*train, "--dry-run"))
    deltaw(*train, "--out", str(folder))
    found = json.loads((folder / "results.json").read_text())
    return tuple(b / MIB for b in (foretold["weight_bytes"], foretold["peak_bytes"], found["peak_above_model_bytes"]))  # type: ignore[return-value]


def main() -> None:
    """All of `RUNS`."""
    lines = [
        "# Memory foretold, and measured",
        "",
        "    python -m benchmarks.run_estimates",
        "",
        "`sentiment`, one epoch, by `deltaw train --dry-run` and by the run itself; MiB, the peak of the whole run "
        "(checkpoints, evaluation and the search for a frozen prefix included).",
        "",
        f"Medians of {TIMES} processes each, and their ranges.",
        "",
        "| run | model | foretold above it | measured above it | foretold / measured | with the model |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for i, (name, options) in enumerate(RUNS.items()):
            found = [compared(Path(scratch) / f"{i}-{time}", options) for time in range(TIMES)]
            model, foretold, measured = map(statistics.median, zip(*found))
            ranges = [f"({min(some):.0f} to {max(some):.0f})" for some in list(zip(*found))[1:]]
            lines.append(
                f"| {name} | {model:.0f} | {foretold:.0f} {ranges[0]} | {measured:.0f} {ranges[1]} | "
                f"{foretold / measured:.2f} | {(model + foretold) / (model + measured):.2f} |"
            )
            print(lines[-1], flush=True)
    RESULT.write_text("\n".join([*lines, "", machine_of(machine()), ""]))


if __name__ == "__main__":
    main()
