"""What is in an adapter: `inspect(path)` as a dict of JSON values, `text` of it for people."""

from __future__ import annotations

import math
import os
from collections import Counter
from typing import Any

import torch

from deltaw.core.adapter import Adapter, Change
from deltaw.core.true_change import as_product
from deltaw.io.admission import Admitted, admit
from deltaw.io.folder import Folder
from deltaw.io.readers import READERS, modules, verdict


def inspect(source: str | os.PathLike[str] | Folder | Admitted, *, verify: bool = True) -> dict[str, Any]:
    """Everything that an adapter says of itself, checked on the way in.

    Raises:
        AdapterError: as `dw.read`.
    """
    admitted = source if isinstance(source, Admitted) else admit(source, verify=verify)
    adapter = admitted.adapter
    weights = {key: weight(change) for key, change in adapter.changes.items()}
    norms = [w["norm"] for w in weights.values() if w["norm"] is not None]
    fingerprint = adapter.base.get("fingerprint")
    parameters = fingerprint.get("parameters", {}) if isinstance(fingerprint, dict) else {}
    return {
        "digest": admitted.digest,
        "peft_type": admitted.config.get("peft_type"),
        "sealed": admitted.sealed,
        "changes": dict(Counter(repr(c.variant) for c in adapter.changes.values())),
        "modules": modules(adapter),
        "weights": len(adapter.changes),
        "values": adapter.numel,
        "bytes": sum(admitted.files.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in adapter.tensors().values()}),
        "norm": math.sqrt(sum(n * n for n in norms)) if norms else None,
        "base": {
            "name": adapter.base.get("name"),
            "revision": adapter.base.get("revision"),
            "verifiable": bool(parameters),
            "parameters": len(parameters),
        },
        "extra": dict(adapter.extra),
        "error": dict(adapter.error),
        "readers": {r: readable(adapter, r, admitted.config) for r in READERS},
        "notes": list(admitted.notes),
        "per_weight": weights,
    }


def readable(adapter: Adapter, reader: str, config: Any) -> str:
    """ "yes", or why not."""
    found = verdict(adapter, reader, config)
    if found.fine:
        return "yes"
    return ("refuses: " if found.refuses else "misreads: ") + "; ".join(found.refuses or found.misreads)


def weight(change: Change) -> dict[str, Any]:
    """The facts of one change; `norm` is ‖ΔW‖ (None where it depends on the base)."""
    v = change.variant
    product = as_product(change)
    norm: float | None = None
    if product is not None:
        norm = product.norm()
    return {
        "method": v.kind,
        "rank": getattr(v, "rank", None),
        "scale": getattr(v, "scale", None),
        "shape": list(change.matrix_shape),
        "layer": change.layer,
        "norm": norm,
        "zero": all(not bool(torch.any(t)) for n, t in change.tensors.items() if n != "A"),
    }


def text(facts: dict[str, Any], every: bool = False) -> str:
    """`facts` of `inspect` for people; `every`: a line per weight."""
    size = facts["bytes"]
    rows = [
        ("digest", facts["digest"]),
        ("grammar", f"{facts['peft_type']}{', sealed by its checksum' if facts['sealed'] else ''}"),
        *(
            ("change" if i == 0 else "", f"{kind}  on {n} weights")
            for i, (kind, n) in enumerate(facts["changes"].items())
        ),
        ("modules", ", ".join(f"{name} x{n}" for name, n in facts["modules"].items())),
        ("size", f"{facts['values']:,} values, {size / 2**20:.2f} MiB, {' + '.join(facts['dtypes'])}"),
        ("‖ΔW‖", "depends on the base" if facts["norm"] is None else f"{facts['norm']:.4g}"),
        ("base", _base(facts["base"])),
        *((k, str(v)) for k, v in facts["extra"].items()),
        *(("read by" if i == 0 else "", f"{r}: {say}") for i, (r, say) in enumerate(facts["readers"].items())),
        *(("note", note) for note in facts["notes"]),
    ]
    if facts["error"]:
        worst = max(facts["error"].items(), key=lambda item: item[1])
        rows.append(("error", f"at most {worst[1]:.2%} of the exact ΔW ({worst[0]})"))
    lines = [f"{name:<9} {value}" for name, value in rows]
    if every:
        lines += ["", f"{'weight':<60} {'method':<7} {'rank':>5} {'scale':>8} {'‖ΔW‖':>10}  shape"]
        for key, w in facts["per_weight"].items():
            rank = "" if w["rank"] is None else w["rank"]
            scale = "" if w["scale"] is None else f"{w['scale']:.4g}"
            norm = "" if w["norm"] is None else f"{w['norm']:.4g}"
            lines.append(
                f"{key:<60} {w['method']:<7} {rank:>5} {scale:>8} {norm:>10}  {'x'.join(map(str, w['shape']))}"
            )
    return "\n".join(lines)


def _base(base: dict[str, Any]) -> str:
    name = base["name"] or "not named"
    revision = f" @ {base['revision']}" if base["revision"] else ""
    known = (
        f"fingerprint of {base['parameters']} parameters"
        if base["verifiable"]
        else "no fingerprint: cannot be verified"
    )
    return f"{name}{revision} ({known})"
