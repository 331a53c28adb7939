"""`deltaw doctor`: does an adapter change anything? It runs inputs with the adapter on and off, and looks at every weight.

Dead: ΔW is zero, or the layer was never called. Exploding: ΔW is larger than the weight itself, or the output is not
finite. Three of four "the adapter has no effect" reports end with one of these lines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter
from deltaw.core.base_weights import base_weight
from deltaw.core.host import Host
from deltaw.core.true_change import true_change
from deltaw.errors import ModelError
from deltaw.model import state
from deltaw.model.activate import disabled, use
from deltaw.model.attach import get
from deltaw.ops.product import Product

NEGLIGIBLE = 1e-6
"""Relative change of a weight or of the output below which it counts as none."""


def doctor(model: nn.Module, name: str = "default", inputs: Any = None, seed: int = 0) -> dict[str, Any]:
    """The findings about adapter `name` of `model`, as JSON values.

    inputs: what the model is called with (a tensor, a tuple or a mapping); random ones are made for transformers models.

    Raises:
        ModelError: no inputs are given, and none can be made; or weights are on the meta device.
    """
    root = state.unwrap(model)
    adapter = get(root, name)
    given = inputs if inputs is not None else made_inputs(root, seed)
    called: set[int] = set()
    paths = dict(state.hosts(root))
    hooks = [h.register_forward_hook(lambda module, *_: called.add(id(module))) for h in paths.values()]
    training = root.training
    root.eval()
    try:
        with torch.no_grad():
            with use(root, name):
                on = output(root, given)
            with disabled(root):
                off = output(root, given)
    finally:
        root.train(training)
        for hook in hooks:
            hook.remove()
    weights = {key: weight(root, adapter, key) for key in adapter.changes}
    for key, facts in weights.items():
        owner = paths.get(key.rpartition(".")[0])
        facts["called"] = owner is not None and (id(owner) in called or not _own_call(owner))
    finite = bool(torch.isfinite(on).all())
    change = relative(on - off, off) if finite else None
    dead = [k for k, f in weights.items() if f["change"] <= NEGLIGIBLE or not f["called"]]
    # a fresh head trained in full may well be longer than it was; that is no fault
    exploding = [k for k, f in weights.items() if not f["change"] < (math.inf if f["method"] == "full" else 1.0)]
    return {
        "finite": finite,
        "output_change": change,
        "effective": finite and change is not None and change > NEGLIGIBLE,
        "dead": dead,
        "exploding": exploding,
        "weights": weights,
        "healthy": finite and change is not None and change > NEGLIGIBLE and not dead and not exploding,
    }


def _own_call(host: Host) -> bool:
    """False for layers that are read and never called (out_proj of nn.MultiheadAttention)."""
    return "out_proj" not in host.family


def weight(model: nn.Module, adapter: Adapter, key: str) -> dict[str, Any]:
    """‖ΔW‖ and its share of ‖W‖."""
    change = adapter.changes[key]
    W = base_weight(model, key, change)
    if W.is_meta:
        raise ModelError("the base is on the meta device: the doctor needs its weights")
    delta = true_change(key, change, W)
    norm = delta.norm() if isinstance(delta, Product) else float(torch.linalg.vector_norm(delta))
    size = float(torch.linalg.vector_norm(W.double()))
    return {"method": change.variant.kind, "norm": norm, "change": norm / size if size else float(norm > 0)}


def made_inputs(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random inputs that a transformers model takes.

    Raises:
        ModelError: what it takes cannot be told.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    draw = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if name == "input_ids" and isinstance(vocabulary, int):
        found = {"input_ids": torch.randint(0, vocabulary, (2, 12), generator=draw)}
        if getattr(config, "is_encoder_decoder", False):
            found["decoder_input_ids"] = torch.randint(0, vocabulary, (2, 4), generator=draw)
    elif name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size, channels = config.image_size, getattr(config, "num_channels", 3)
        found = {"pixel_values": torch.randn(2, channels, size, size, generator=draw).to(like.dtype)}
    elif name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions
        found = {"input_features": torch.randn(1, config.num_mel_bins, frames, generator=draw).to(like.dtype)}
        if isinstance(vocabulary, int):
            found["decoder_input_ids"] = torch.randint(0, vocabulary, (1, 4), generator=draw)
    else:
        raise ModelError(f"no inputs can be made up for {type(model).__name__}: pass inputs=")
    return {k: t.to(like.device) for k, t in found.items()}


def output(model: nn.Module, inputs: Any) -> Tensor:
    """The model's first output of real numbers, as one vector."""
    if isinstance(inputs, Mapping):
        found = model(**inputs)
    else:
        found = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    values = [found] if isinstance(found, Tensor) else list(found.values() if isinstance(found, Mapping) else found)
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    if not tensors:
        raise ModelError(f"{type(model).__name__} gives no tensor of real numbers")
    return tensors[0].double().flatten()


def relative(difference: Tensor, reference: Tensor) -> float:
    """‖difference‖ / ‖reference‖."""
    size = float(torch.linalg.vector_norm(reference))
    return float(torch.linalg.vector_norm(difference)) / (size or 1.0)


def text(findings: dict[str, Any]) -> str:
    """The findings for people."""
    if not findings["finite"]:
        head = "the output with the adapter is not finite"
    elif findings["effective"]:
        head = f"the adapter changes the output by {findings['output_change']:.3g} of its norm"
    else:
        head = "the adapter changes nothing in the output"
    lines = [head]
    for key in findings["dead"]:
        facts = findings["weights"][key]
        lines.append(f"dead: {key} ({'ΔW is zero' if facts['called'] else 'its layer was never called'})")
    for key in findings["exploding"]:
        lines.append(f"exploding: {key} (‖ΔW‖ is {findings['weights'][key]['change']:.3g} times ‖W‖)")
    lines.append(f"{'weight':<60} {'‖ΔW‖':>10} {'of ‖W‖':>10}")
    for key, facts in findings["weights"].items():
        lines.append(f"{key:<60} {facts['norm']:>10.4g} {facts['change']:>10.2%}")
    return "\n".join(lines)
