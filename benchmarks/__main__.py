"""`python -m benchmarks [S1 S2 ...]`: run the claims (all by default), print the ratios, write results/*.json.

At the end results/table.md and the README's table are written from them. S6 takes an hour and is run alone (s6_gw.py).
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings

from benchmarks import table

CLAIMS = {
    "S9": "s9_switch",
    "S1": "s1_step",
    "S2": "s2_dropout",
    "S3": "s3_dora",
    "S4": "s4_int8",
    "S5": "s4_int8",
    "S7": "s7_memory",
    "S8": "s8_rows",
    "S10": "s10_merged",
    "S11": "s11_sentiment",
}
"""In the order in which they run: the milliseconds of S9 while nothing else has filled the process."""


def main(names: list[str]) -> int:
    """Run the claims; how many failed to run."""
    warnings.simplefilter("ignore")
    unknown = [n for n in names if n not in CLAIMS]
    if unknown:
        print(f"unknown claim {', '.join(unknown)}; there are {', '.join(CLAIMS)}", file=sys.stderr)
        return 2
    failed, began = 0, time.perf_counter()
    for module in dict.fromkeys(CLAIMS[n] for n in names or CLAIMS):
        start = time.perf_counter()
        try:
            importlib.import_module(f"benchmarks.{module}").main()
        except Exception as error:
            failed += 1
            print(f"{module}: did not run: {type(error).__name__}: {error}", flush=True)
        print(f"# {module}: {time.perf_counter() - start:.0f} s", flush=True)
    table.write()
    print(f"# all: {time.perf_counter() - began:.0f} s; {table.FILE}", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
