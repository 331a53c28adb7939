"""deltaw against PEFT and plain torch on a GPU: correctness first, then times and peak memory. One command:

python -m benchmarks.gpu            # needs torch with CUDA, peft, transformers, deltaw; Triton for the kernels
python -m benchmarks.gpu --small    # a few layers, also on a CPU: does the script run at all

Writes results/gpu.json. Times are CUDA events, medians of alternating rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import deltaw as dw
from benchmarks.measure import SEED, record
from benchmarks.methods import shared_name
from deltaw.core.variant import LowRank
from deltaw.ops import adapted_linear, adapted_linear_reference

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        action()
        return 1e3 * (time.perf_counter() - start)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    action()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def medians(steps: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each, in turns, after two warm-ups."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            spent = timed(step, device)
            if turn >= 2:
                times[name].append(spent)
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def check_operation(device: torch.device) -> None:
    """Values and gradients of the fused operation in float64 on the device."""
    for dropout in (0.0, 0.2):
        for gain in (False, True):
            tensors = [
                torch.randn(*s, device=device, dtype=torch.float64, requires_grad=True)
                for s in ((70, 41), (9, 41), (9,), (3, 41), (9, 3), (9,))
            ]
            x, W, b, A, B, c = tensors
            results = []
            for op in (adapted_linear, adapted_linear_reference):
                torch.manual_seed(SEED)
                y = op(x, W, b, [LowRank(A, B, 0.5, c if gain else None, dropout)], training=True)
                results.append([y, *torch.autograd.grad(y.square().sum(), tensors[: 6 if gain else 5])])
            torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    print("fused operation: values and gradients equal to the plain twin")


def thin_products(device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """The Triton kernels: checked against the plain twins, then timed against them."""
    try:
        from deltaw.ops import triton_thin as thin
    except ImportError:
        print("Triton is not installed: its kernels are left out")
        return {}
    seed = torch.tensor(7, dtype=torch.int32, device=device)

    def one_shape(rows: int, width: int, out: int) -> dict[str, float]:
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        A = torch.randn(16, width, device=device, dtype=torch.bfloat16)
        B = torch.randn(16, out, device=device, dtype=torch.bfloat16)
        y = torch.zeros(rows, out, device=device, dtype=torch.bfloat16)
        h = thin.shrink(x, A, seed=seed, p=0.05)
        torch.testing.assert_close(h, thin.shrink_reference(x, A, seed=seed, p=0.05), rtol=2e-2, atol=0.5)
        expected = thin.expand_reference(y, h, B, 0.5)
        torch.testing.assert_close(thin.expand_(y.clone(), h, B, 0.5), expected, rtol=2e-2, atol=1.0)
        torch.testing.assert_close(thin.outer(h, x), thin.outer_reference(h, x), rtol=2e-2, atol=rows**0.5)
        thin16 = h.bfloat16()
        steps: dict[str, Callable[[], object]] = {
            "shrink with dropout": lambda: thin.shrink(x, A, seed=seed, p=0.05),
            "torch: dropout, mm": lambda: torch.dropout(x, 0.05, True) @ A.t(),
            "expand_": lambda: thin.expand_(y, h, B, 0.5),
            "torch: addmm_": lambda: y.addmm_(thin16, B, alpha=0.5),
            "outer": lambda: thin.outer(h, x),
            "torch: mm": lambda: thin16.t() @ x,
        }
        return medians(steps, device, rounds)

    return {f"{t} x {k} -> {n}": one_shape(t, k, n) for t, k, n in [(4096, 2048, 2048), (8192, 4096, 11008)]}


def model_of(small: bool, device: torch.device) -> nn.Module:
    """A Llama with random weights in bf16: 1.2 B parameters, or two tiny layers."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=64 if small else 2048,
        intermediate_size=160 if small else 5632,
        num_hidden_layers=2 if small else 22,
        num_attention_heads=4 if small else 32,
        num_key_value_heads=2 if small else 4,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)


def contender(name: str, small: bool, device: torch.device) -> nn.Module:
    """The model prepared by one method; dropout in force where the name says so."""
    model = model_of(small, device)
    dropout = 0.05 if "dropout" in name else 0.0
    if name.startswith("deltaw"):
        kind = dw.DoRA if "dora" in name else dw.LoRA
        dw.attach(model, kind(rank=16, alpha=32, dropout=dropout), targets=TARGETS)
    elif name.startswith("peft"):
        config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, lora_dropout=dropout, use_dora="dora" in name)
        model = get_peft_model(model, config)
    noise = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for key, p in sorted((shared_name(n), p) for n, p in model.named_parameters() if p.requires_grad):
            if key.endswith((" A", " B")):
                p.copy_(0.02 * torch.randn(p.shape, generator=noise).to(p))
    return model.train()


def one_model(name: str, small: bool, device: torch.device, rounds: int) -> dict[str, float]:
    """Loss, gradient norm, median step and peak memory above the loaded model."""
    model = contender(name, small, device)
    ids = torch.randint(
        0, 32000, (2 if small else 4, 16 if small else 1024), generator=torch.Generator().manual_seed(1)
    )
    ids = ids.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {shared_name(n): p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    norm = float(torch.stack([g.norm() for g in grads.values()]).norm())
    assert norm > 0, f"{name}: no gradient"
    optimizer.zero_grad()
    del grads

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    figures = {
        "loss": round(loss.item(), 5),
        "gradient_norm": norm,
        "ms": medians({"step": step}, device, rounds)["step"],
    }
    if device.type == "cuda":
        figures["mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.small:
        raise SystemExit("no CUDA device: run with --small to check the script on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_operation(device)
    thin = thin_products(device, options.rounds) if device.type == "cuda" else {}
    names = ["full", "peft", "deltaw", "peft dropout", "deltaw dropout", "peft dora", "deltaw dora"]
    table: dict[str, dict[str, float]] = {}
    for name in names:
        table[name] = one_model(name, options.small, device, options.rounds)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for kind in ("", " dora"):
        ours, theirs = table[f"deltaw{kind}"], table[f"peft{kind}"]
        assert abs(ours["loss"] - theirs["loss"]) < 0.02 * theirs["loss"], f"losses differ: {ours} {theirs}"
        assert 0.9 < ours["gradient_norm"] / theirs["gradient_norm"] < 1.1, f"gradients differ: {ours} {theirs}"
    print(f"{'':16s} {'loss':>8s} {'ms':>10s} {'MiB':>10s}")
    for name, figures in table.items():
        print(f"{name:16s} {figures['loss']:8.4f} {figures['ms']:10.2f} {figures.get('mib', float('nan')):10.1f}")
    rows: list[dict[str, Any]] = []
    for kind in ("", " dropout", " dora"):
        ours, theirs = table[f"deltaw{kind}"], table[f"peft{kind}"]
        rows.append({"what": f"step{kind}: deltaw / PEFT", "ratio": round(ours["ms"] / theirs["ms"], 4)})
        if "mib" in ours:
            rows.append({"what": f"memory{kind}: deltaw / PEFT", "ratio": round(ours["mib"] / theirs["mib"], 4)})
    if device.type == "cuda":
        record("gpu", rows, models=table, thin_products=thin, device=torch.cuda.get_device_name())
    else:
        for r in rows:
            print(f"{r['what']:40s} {r['ratio']:.3f}  (CPU, small: not recorded)")


if __name__ == "__main__":
    main()
