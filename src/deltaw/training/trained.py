"""What training changes, as named tensors: trained parameters, the buffers that move with them, the optimizer's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from deltaw.core.host import CHILD
from deltaw.model.state import whole


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> the very tensors (not copies, and sharded where FSDP has sharded them) that training may change.

    Parameters that require a gradient, the persistent buffers of adapters, and all persistent buffers if the base
    itself is trained (running statistics).
    """
    for module in model.modules():
        if isinstance(
            module, FSDPModule
        ):  # after a forward without backward it holds gathered copies, maybe freed ones
            module.reshard()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    base_trained = any(f".{CHILD}." not in f".{n}" for n in parameters)
    kept = model.state_dict(keep_vars=True)
    buffers = {n: b for n, b in model.named_buffers() if n in kept and (base_trained or f".{CHILD}." in f".{n}")}
    return {**parameters, **buffers}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained tensors, whole and on the CPU. Under FSDP every process must call it."""
    return {name: whole(t).to("cpu", copy=True) for name, t in trained_tensors(model).items()}


def sharded_as(full: Tensor, live: Tensor) -> Tensor:
    """`full` in the form of `live`: as it is, or this process's shard of it."""
    if not isinstance(live, DTensor):
        return full
    return distribute_tensor(full.to(live.device), live.device_mesh, live.placements, src_data_rank=None)


def restore(model: nn.Module, kept: dict[str, Tensor]) -> None:
    """Put a snapshot back. The names must be exactly the model's."""
    live = trained_tensors(model)
    if live.keys() != kept.keys():
        differing = sorted(live.keys() ^ kept.keys())
        raise ValueError(
            f"the checkpoint's tensors are not the model's; {len(differing)} differ, for example {differing[0]!r}"
        )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(sharded_as(kept[name], tensor))


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and JSON. Under FSDP every process must call it."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, entry in sorted(optimizer.state_dict()["state"].items()):
        for name, value in sorted(entry.items()):  # one order in all processes: gathering waits for the others
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = whole(value)
            else:
                plain[f"{index}.{name}"] = value
    return tensors, plain


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """The inverse of `pack_optimizer`; options of the groups stay as they are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **plain}.items():
        index, _, name = key.partition(".")
        live = parameters[int(index)]
        if isinstance(value, Tensor) and value.shape == live.shape:
            value = sharded_as(value, live)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_state() -> dict[str, Tensor]:
    """The states of torch's generators (dropout draws from them, nothing else does)."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(kept: dict[str, Tensor]) -> None:
    """Put the generators back."""
    torch.set_rng_state(kept["cpu"])
    if "cuda" in kept:
        torch.cuda.set_rng_state(kept["cuda"])
