"""S9: attach to a DeBERTa-v3-large, load one adapter more beside many, switch the active one, import: each / PEFT."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import DebertaV2Model
from transformers.initialization import no_init_weights

import deltaw as dw
from benchmarks.measure import alternate, ratio, record, row
from benchmarks.workloads import deberta_config

TARGETS = ["query_proj", "value_proj"]
PRESENT = 1000
"""Adapters that are there already when one more is loaded."""


def deberta() -> nn.Module:
    """DeBERTa-v3-large with constant weights: what values they have costs neither library anything."""
    with no_init_weights():
        model = DebertaV2Model(deberta_config(1024, 24))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model


def seconds(action: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def attaching(rounds: int) -> dict[str, list[float]]:
    """Attach to a fresh model."""
    base = deberta()
    config = LoraConfig(r=8, target_modules=TARGETS)
    times: dict[str, list[float]] = {"deltaw": [], "peft": []}
    for _ in range(rounds + 1):
        times["deltaw"].append(seconds(lambda: dw.attach(base, dw.LoRA(rank=8), targets=TARGETS)))
        dw.detach(base)
        wrapped: list[Any] = []
        times["peft"].append(seconds(lambda wrapped=wrapped: wrapped.append(get_peft_model(base, config))))
        wrapped[0].unload()
    return {name: values[1:] for name, values in times.items()}


def private_bytes() -> int:
    """Memory that this process shares with nobody and no file could give back."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def loading_and_switching(
    rounds: int, folder: Path
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, float]]:
    """Load one more adapter beside `PRESENT` others (PEFT: beside a few, its time grows with them), and switch; and MB of
    private memory that an adapter takes, read and mapped."""
    ours = deberta()
    dw.attach(ours, dw.LoRA(rank=8), targets=TARGETS, name="first")
    dw.save(ours, folder / "one", name="first")
    taken = {}
    for kind, names in {"mapped": range(PRESENT // 2), "read": range(PRESENT // 2, PRESENT)}.items():
        before = private_bytes()
        for i in names:
            dw.load(ours, folder / "one", name=f"n{i}", active=False, mapped=kind == "mapped")
        taken[kind] = round((private_bytes() - before) / len(names) / 2**20, 2)
    theirs = PeftModel.from_pretrained(deberta(), folder / "one", adapter_name="first")
    for i in range(8):
        theirs.load_adapter(folder / "one", adapter_name=f"n{i}")
    loads: dict[str, list[float]] = {"deltaw": [], "mapped": [], "peft": []}
    for i in range(rounds + 1):
        loads["deltaw"].append(seconds(lambda i=i: dw.load(ours, folder / "one", name=f"m{i}", active=False)))
        loads["mapped"].append(
            seconds(lambda i=i: dw.load(ours, folder / "one", name=f"p{i}", active=False, mapped=True))
        )
        loads["peft"].append(seconds(lambda i=i: theirs.load_adapter(folder / "one", adapter_name=f"m{i}")))
    turn = [0]

    def switch_ours() -> None:
        turn[0] += 1
        dw.activate(ours, f"n{turn[0] % 8}")

    def switch_theirs() -> None:
        theirs.set_adapter(f"n{turn[0] % 8}")

    switches = alternate({"deltaw": switch_ours, "peft": switch_theirs}, rounds * 3)
    return {name: values[1:] for name, values in loads.items()}, switches, taken


def importing(rounds: int) -> dict[str, list[float]]:
    """Fresh interpreters that import one thing."""
    times: dict[str, list[float]] = {"deltaw": [], "torch": [], "peft": []}
    for _ in range(rounds):
        for name in times:
            times[name].append(
                seconds(lambda name=name: subprocess.run([sys.executable, "-c", f"import {name}"], check=True))
            )
    return times


def main(rounds: int = 11) -> None:
    attach = attaching(rounds)
    with tempfile.TemporaryDirectory() as folder:
        load, switch, taken = loading_and_switching(rounds, Path(folder))
    imports = importing(3)
    rows = [
        row("attach to DeBERTa-v3-large: deltaw / PEFT", ratio(attach, "deltaw", "peft"), 0.1),
        row(f"load one more beside {PRESENT}: deltaw / PEFT beside 8", ratio(load, "deltaw", "peft"), 0.1),
        row(f"load one more beside {PRESENT}, mapped: deltaw / PEFT beside 8", ratio(load, "mapped", "peft"), 0.1),
        row("switch the active adapter: deltaw / PEFT", ratio(switch, "deltaw", "peft"), 0.1),
        row("import deltaw / import torch", ratio(imports, "deltaw", "torch"), 1.1),
        row("import peft / import torch", ratio(imports, "peft", "torch")),
    ]
    every = {"attach": attach, "load": load, "switch": switch, "import": imports}
    ms = {k: {n: round(1e3 * statistics.median(v), 3) for n, v in t.items()} for k, t in every.items()}
    record("S9", rows, milliseconds=ms, private_mib_of_an_adapter=taken)


if __name__ == "__main__":
    main()
