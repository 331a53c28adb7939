"""What the int8 base costs in quality: runs over several seeds with and without it, and the GW curves of S6.

    deltaw compare sentiment --methods lora --seeds 0,1,2 quantize=int8 --out int8
    deltaw compare sentiment --methods lora --seeds 0,1,2 --out fp32
    python -m benchmarks.int8_quality --fp32 fp32/lora-seed* --int8 int8/lora-seed* [--gw benchmarks/results/S6.json]

Several recipes: --fp32 and --int8 once for each, in the same order. Writes docs/results/int8.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "int8.md"
HEAD = """# The int8 base: what it costs in quality

"""


def runs_of(folders: list[Path]) -> dict[int, dict[str, Any]]:
    """Results by seed."""
    found = [json.loads((folder / "results.json").read_text()) for folder in folders]
    return {run["seed"]: run for run in found}


def summary(name: str, values: list[float]) -> str:
    """Mean and, of several values, their standard deviation."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{name} {statistics.mean(values):.4f}{spread}"


def compared(fp32: dict[int, dict[str, Any]], int8: dict[int, dict[str, Any]]) -> str:
    """The table of the seeds that both have."""
    seeds = sorted(fp32.keys() & int8.keys())
    run = fp32[seeds[0]]
    metric = run["metric"]
    lines = [
        f"## {run['recipe']}: {run['method']} on {run['model']}",
        "",
        f"| seed | best validation {metric}, fp32 | int8 | test {metric}, fp32 | int8 |",
        "|---|---:|---:|---:|---:|",
    ]
    pairs: dict[str, tuple[list[float], list[float]]] = {}
    for part in ("best", "test"):
        pairs[part] = tuple([runs[s][part][metric] for s in seeds] for runs in (fp32, int8))  # type: ignore[assignment]
    for i, seed in enumerate(seeds):
        cells = [f"{values[i]:.4f}" for part in ("best", "test") for values in pairs[part]]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    lines.append("")
    for part, (exact, narrow) in pairs.items():
        gap = statistics.mean(narrow) - statistics.mean(exact)
        lines.append(f"{part}: {summary('fp32', exact)}, {summary('int8', narrow)}, difference of means {gap:+.4f}.")
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return "\n".join([*lines, "", f"{versions}.", ""])


def heard(claim: dict[str, Any]) -> str:
    """The table of S6's seeds that are whole. Both LoRAs have the same rank, layers, rate and batches."""
    names = ("full", "peft", "deltaw")
    lines = [
        f"## gw: LoRA on whisper-tiny's encoder, {claim['epochs']} epochs, the runs of S6",
        "",
        "| seed | best validation AUC: full | PEFT's LoRA, fp32 | deltaw's LoRA, int8 | AUC after the last epoch: full | PEFT's | deltaw's |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    found: dict[str, dict[str, list[float]]] = {"best": {n: [] for n in names}, "last": {n: [] for n in names}}
    for seed, curves in claim["seeds"].items():
        if any(len(curves[name]) < claim["epochs"] for name in names):
            continue
        for name in names:
            auc = [epoch["auc"] for epoch in curves[name]]
            found["best"][name].append(max(auc))
            found["last"][name].append(auc[-1])
        cells = [f"{found[part][name][-1]:.4f}" for part in found for name in names]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    lines.append("")
    for part, values in found.items():
        exact, narrow = values["peft"], values["deltaw"]
        gap = statistics.mean(narrow) - statistics.mean(exact)
        words = f"{summary('fp32 (PEFT)', exact)}, {summary('int8 (deltaw)', narrow)}"
        lines.append(f"{part}: {words}, difference of means {gap:+.4f}.")
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--fp32", type=Path, nargs="+", action="append", required=True)
    words.add_argument("--int8", type=Path, nargs="+", action="append", required=True)
    words.add_argument("--gw", type=Path, default=RESULTS / "S6.json")
    asked = words.parse_args(arguments)
    command = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[0]
    tables = [compared(runs_of(exact), runs_of(narrow)) for exact, narrow in zip(asked.fp32, asked.int8, strict=True)]
    text = HEAD + command + "\n\n" + "\n".join(tables)
    if asked.gw.is_file():
        text += "\n" + heard(json.loads(asked.gw.read_text()))
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
