"""Initialize: run a model on a few batches, and let the adapters that wait for data start from what their layers saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import join_key
from deltaw.core.host import Host
from deltaw.core.starting import Observer, Waiting
from deltaw.errors import ConfigError, ModelError, TargetError, UnknownName, did_you_mean
from deltaw.model import state
from deltaw.model.activate import disabled

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Seat:
    """One weight whose start waits: where it is, its delta, and what takes in what it sees."""

    key: str
    host: Host
    site: str
    delta: Any
    observer: Observer | None = None
    seen: Tensor | None = None
    calls: int = 0


def initialize(
    model: nn.Module,
    batches: Iterable[Any] = (),
    *,
    loss: Loss | None = None,
    originals: Mapping[str, Tensor] | nn.Module | None = None,
    spread: float = 1.0,
    name: str | None = None,
) -> nn.Module:
    """Start the adapters whose init looks at data: "eva", "corda", "corda-kpm", "lora-ga", "loftq". Before the optimizer is made.

    batches: what the model is called with: a mapping of keyword arguments, a tuple of arguments, or one argument.
    loss: (model, batch) -> scalar, for "lora-ga"; by default the model's own `.loss`.
    originals: the unquantised weights for "loftq", by parameter name, or a model that holds them.
    spread: with "eva" and spread > 1, ranks are shared out: layers whose inputs vary in more directions get up to
        spread x rank, others less (at least 1), the scale of each stays, and the total stays (but for that 1).
    name: only this adapter; default all that wait.

    The model runs without its adapters, in eval mode; modes and flags are put back.

    Raises:
        ModelError: no adapter waits, or a layer was never called.
        ConfigError: batches, originals or a loss are missing; spread is below 1; a rank does not suit a weight.
        TargetError: a start that looks at inputs is on a layer that is not linear.
    If anything is wrong, the adapters are left as they were.
    """
    root = state.unwrap(model)
    if not spread >= 1:
        raise ConfigError(f"spread={spread!r}: must be 1 (all layers keep their rank) or above, for example 2")
    seats = waiting(root, name)
    by_need: dict[str, list[Seat]] = {}
    for seat in seats:
        by_need.setdefault(seat.delta.awaits.looks_at, []).append(seat)
    read_originals(by_need.get("original", []), originals)
    data = list(batches) if "inputs" in by_need and "gradient" in by_need else batches
    if "inputs" in by_need:
        watch(root, data, loss, by_need["inputs"], spread, gradient=False)
    if "gradient" in by_need:
        watch(root, data, loss, by_need["gradient"], 1.0, gradient=True)
    ranks = shared_out(seats, spread)
    begin(seats, ranks)
    return model


def waiting(model: nn.Module, name: str | None) -> list[Seat]:
    """The weights of `model` whose start waits for data."""
    if name is not None:
        state.known(model, name)
    found = []
    for path, host in state.hosts(model):
        for each in host.roster.names if name is None else [name]:
            for site, delta in host.deltas(each).items():
                if isinstance(delta, Waiting) and delta.waiting:
                    found.append(Seat(join_key(path, site), host, site, delta))
    if not found:
        raise ModelError(
            "nothing to initialize: no adapter waits for data; attach one whose init looks at it, "
            "for example dw.attach(model, dw.LoRA(init='eva'))"
        )
    return found


def read_originals(seats: Sequence[Seat], originals: Mapping[str, Tensor] | nn.Module | None) -> None:
    """Give each seat its unquantised weight as a matrix."""
    if not seats:
        return
    if originals is None:
        raise ConfigError(
            "init='loftq' compares with the unquantised weights: dw.initialize(model, originals=unquantised_model), "
            "or a mapping of parameter names to tensors"
        )
    named = dict(originals.named_parameters()) if isinstance(originals, nn.Module) else originals
    for seat in seats:
        if seat.key not in named:
            raise UnknownName(f"originals hold no {seat.key!r}{did_you_mean(seat.key, named)}")
        seat.seen = seat.host.to_matrix(seat.site, named[seat.key].detach())
        if tuple(seat.seen.shape) != seat.delta.site.shape:
            raise ConfigError(
                f"originals[{seat.key!r}] is {tuple(seat.seen.shape)}, the weight is {seat.delta.site.shape}"
            )


def watch(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None, seats: Sequence[Seat], spread: float, *, gradient: bool
) -> None:
    """Run `batches` and give each seat what its layer saw.

    Raises:
        ConfigError, ModelError, TargetError: as `initialize`.
    """
    for seat in seats:
        seat.observer = seat.delta.awaits.observer(round(seat.delta.directions * spread))
    count = 0
    with still(model), disabled(model), gradients(seats) if gradient else inputs(seats):
        for batch in batches:
            count += 1
            if gradient:
                with torch.enable_grad():
                    torch.autograd.backward(loss_of(model, batch, loss))
            else:
                with torch.no_grad():
                    call(model, batch)
    if not count:
        raise ConfigError("this init looks at data: dw.initialize(model, batches) needs at least one batch")
    unused = [seat.key for seat in seats if not seat.calls]
    if unused:
        raise ModelError(
            f"{', '.join(map(repr, unused[:3]))} ({len(unused)} weights) were not used by any of the {count} batches: "
            "give batches that reach them, or do not target them"
        )
    for seat in seats:
        assert seat.observer is not None
        seat.seen = seat.observer.result()


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Within the context everything is in eval mode and no gradient stays behind."""
    modes = {m: m.training for m in model.modules()}
    before = {p: p.grad for p in model.parameters()}
    model.eval()
    for parameter in before:
        parameter.grad = None
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, grad in before.items():
            parameter.grad = grad


@contextmanager
def inputs(seats: Sequence[Seat]) -> Iterator[None]:
    """Within the context each seat sees the inputs of its layer, (tokens, in)."""
    for seat in seats:
        base = seat.host.base_class
        if not issubclass(base, nn.Linear) and base.__name__ != "Conv1D":
            raise TargetError(
                f"{seat.key!r}: init={seat.delta.variant.init!r} looks at the inputs of linear layers, this is a "
                f"{base.__name__}: give it another init"
            )

    def hook(seat: Seat) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            if x.numel():
                assert seat.observer is not None
                seat.observer.see(x.detach().reshape(-1, x.shape[-1]))
                seat.calls += 1

        return see

    handles = [seat.host.register_forward_pre_hook(hook(seat), with_kwargs=True) for seat in seats]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gradients(seats: Sequence[Seat]) -> Iterator[None]:
    """Within the context each seat sees every gradient of its frozen weight, which is freed at once."""
    owners: dict[int, tuple[Tensor, list[Seat]]] = {}
    for seat in seats:
        parameter = seat.host.stored_parameter(seat.site)
        if not parameter.is_floating_point() or not isinstance(parameter, nn.Parameter):
            raise ConfigError(
                f"{seat.key!r}: init={seat.delta.variant.init!r} looks at the weight's gradient, which a quantised "
                "weight does not have: initialize first, then quantize"
            )
        owners.setdefault(id(parameter), (parameter, []))[1].append(seat)

    def hook(seats: Sequence[Seat]) -> Callable[[Tensor], None]:
        def see(parameter: Tensor) -> None:
            assert parameter.grad is not None
            for seat in seats:
                assert seat.observer is not None
                seat.observer.see(seat.host.to_matrix(seat.site, parameter.grad))
                seat.calls += 1
            parameter.grad = None

        return see

    flags = {p: p.requires_grad for p, _ in owners.values()}
    handles = []
    try:
        for parameter, owned in owners.values():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(hook(owned)))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def call(model: nn.Module, batch: Any) -> Any:
    """Call the model with a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """The scalar whose gradients are looked at."""
    if loss is not None:
        return loss(model, batch)
    output = call(model, batch)
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise ConfigError(
            "init='lora-ga' looks at the loss's gradient, and the model returns no `.loss` for these batches: "
            "add labels to them, or give dw.initialize(model, batches, loss=lambda model, batch: ...)"
        )
    return found


def shared_out(seats: Sequence[Seat], spread: float) -> dict[str, int]:
    """Key -> rank, for the seats whose ranks are shared out by how much their directions explain."""
    offers = []
    if spread > 1:
        for seat in seats:
            shares = seat.delta.awaits.shares(seat.seen)
            if shares is not None:
                offers.append((seat, shares[: round(seat.delta.directions * spread)]))
    if not offers:
        return {}
    total = sum(seat.delta.directions for seat, _ in offers)
    order = torch.cat([shares for _, shares in offers]).argsort(descending=True, stable=True)[:total]
    owner = torch.cat([torch.full((len(s),), i) for i, (_, s) in enumerate(offers)])
    counts = torch.bincount(owner[order.cpu()], minlength=len(offers)).tolist()
    return {seat.key: max(1, n) for (seat, _), n in zip(offers, counts)}


def begin(seats: Sequence[Seat], ranks: Mapping[str, int]) -> None:
    """Start every seat; if one refuses, all are put back."""
    before = [snapshot(seat.delta) for seat in seats]
    try:
        for seat in seats:
            assert seat.seen is not None
            seat.delta.resize(ranks.get(seat.key, seat.delta.directions))
            seat.delta.begin(seat.host.frozen_matrix(seat.site), seat.seen)
    except BaseException:
        for put_back in before:
            put_back()
        raise


def snapshot(delta: Any) -> Callable[[], None]:
    """A function that puts a delta back to what it is now."""
    variant, waiting = delta.variant, delta.waiting
    parameters, buffers = dict(delta._parameters), dict(delta._buffers)
    values = {name: t.detach().clone() for name, t in {**parameters, **buffers}.items() if t is not None}

    def put_back() -> None:
        delta.variant, delta.waiting = variant, waiting
        delta._parameters.update(parameters)
        delta._buffers.update(buffers)
        with torch.no_grad():
            for name, tensor in {**parameters, **buffers}.items():
                if tensor is not None:
                    tensor.copy_(values[name])

    return put_back
