"""S8: a batch of 32 rows with 8 different adapters, and with one, in eval / the base model alone; PEFT beside it."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import deltaw as dw
from benchmarks import methods
from benchmarks.measure import alternate, medians, ratio, record, row
from benchmarks.workloads import minilm

ROWS, ADAPTERS = 32, 8


def main(rounds: int = 15) -> None:
    work = minilm(length=64, batch=ROWS)
    ids = torch.randint(0, 30000, (ROWS, 64), generator=torch.Generator().manual_seed(0))
    names = [f"a{i % ADAPTERS}" for i in range(ROWS)]

    base = work.build().eval()
    ours = work.build().eval()
    for i in range(ADAPTERS):
        dw.attach(ours, dw.LoRA(rank=methods.RANK, alpha=methods.ALPHA), targets=list(work.targets), name=f"a{i}")
    config = LoraConfig(r=methods.RANK, lora_alpha=methods.ALPHA, target_modules=list(work.targets))
    theirs = get_peft_model(work.build(), config, adapter_name="a0")
    for i in range(1, ADAPTERS):
        theirs.add_adapter(f"a{i}", config)
    theirs.eval()
    fill(ours)
    fill(theirs)
    ours.eval()

    def mixed() -> torch.Tensor:
        with dw.rows(ours, names):
            return ours(input_ids=ids).last_hidden_state

    def one() -> torch.Tensor:
        with dw.use(ours, "a0"):
            return ours(input_ids=ids).last_hidden_state

    def peft_mixed() -> torch.Tensor:
        return theirs(input_ids=ids, adapter_names=names).last_hidden_state

    def peft_one() -> torch.Tensor:
        theirs.base_model.set_adapter("a0")
        return theirs(input_ids=ids).last_hidden_state

    with torch.no_grad():
        torch.testing.assert_close(mixed(), peft_mixed(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one(), peft_one(), rtol=1e-4, atol=1e-4)
        plain = base(input_ids=ids).last_hidden_state
        assert not torch.allclose(plain, one(), atol=1e-3), "the adapters change nothing"
        steps = {
            "base": lambda: base(input_ids=ids),
            "deltaw 8": mixed,
            "deltaw 1": one,
            "peft 8": peft_mixed,
            "peft 1": peft_one,
        }
        t = alternate(steps, rounds)
    rows: list[dict[str, Any]] = [
        row("32 rows, 8 adapters: deltaw / base", ratio(t, "deltaw 8", "base"), 1.15),
        row("32 rows, 1 adapter: deltaw / base", ratio(t, "deltaw 1", "base"), 1.06),
        row("32 rows, 8 adapters: PEFT / base", ratio(t, "peft 8", "base")),
        row("32 rows, 1 adapter: PEFT / base", ratio(t, "peft 1", "base")),
    ]
    record("S8", rows, milliseconds=medians(t))


def fill(model: torch.nn.Module) -> None:
    """The same factors under the same adapter names in both libraries."""
    named = []
    for name, p in model.named_parameters():
        for i in range(ADAPTERS):
            if f".adapters.a{i}." in name or f".a{i}.weight" in name:
                named.append((f"{methods.shared_name(name)} a{i}", p))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in sorted(named, key=lambda pair: pair[0]):
            p.copy_(torch.randn(p.shape, generator=noise) * 0.1)


if __name__ == "__main__":
    main()
