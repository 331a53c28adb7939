"""Extract: the low-rank adapter nearest to a full fine-tune minus its base, by singular value decomposition.

Per matrix, the best rank-k approximation of W' - W (Eckart and Young), k given, or the smallest that holds a share of the
squared norm. What is no matrix (biases, norms) is kept as a copy. The relative error of every weight is in `.error`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Change, join_key, split_key
from deltaw.core.base_weights import base_weight
from deltaw.core.registry import hosts, variants
from deltaw.core.true_change import true_change
from deltaw.errors import AdapterError, ConfigError
from deltaw.io import fingerprint as prints
from deltaw.model.state import own_modules
from deltaw.ops.product import Product
from deltaw.ops.truncated_svd import rank_for_energy, top_singular

Weights = nn.Module | Mapping[str, Tensor]


def extract(
    tuned: Weights,
    base: Weights,
    rank: int | None = None,
    *,
    energy: float | None = None,
    copies: bool = True,
    added: Collection[str] = (),
) -> Adapter:
    """The adapter of rank `rank` (or of the smallest rank that holds the share `energy`) that turns `base` into `tuned`.

    tuned, base: models, or mappings of parameter names to tensors. copies: keep parameters that are no matrices, and
    differ, as full copies; False refuses them. added: parameters that only the fine-tune has (its head), whatever `base`
    holds in their place: always full copies.

    Raises:
        ConfigError: neither rank nor energy is given, or both.
        AdapterError: the two have other parameters or shapes, or are the same.
    """
    if (rank is None) == (energy is None):
        raise ConfigError("extract needs either rank= (for example 16) or energy= (for example 0.95)")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank={rank!r}: must be a whole number of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy={energy!r}: must be a share in (0, 1]")
    new, old = ({k: t.detach() for k, t in tensors_of(w).items()} for w in (tuned, base))
    check_names(new, old)
    owners = places(base) if isinstance(base, nn.Module) else {}
    ties = same_storage(base) if isinstance(base, nn.Module) else {}
    changes: dict[str, Change] = {}
    errors: dict[str, float] = {}
    for key, before in old.items():
        after = new[key]
        new_here = key in added
        if not new_here and (not before.is_floating_point() or torch.equal(after.to(before.dtype), before)):
            continue
        if not bool(torch.isfinite(after).all()) or not bool(torch.isfinite(before).all()):
            raise AdapterError(f"{key!r} holds NaN or infinite values")
        module = owners.get(split_key(key)[0])
        family, matrix = as_matrix(module, split_key(key)[1], after.double() - before.double())
        shape, tied = tuple(before.shape), ties.get(key, ())
        if matrix is None or new_here:
            if not copies and not new_here:
                raise AdapterError(f"{key!r} is no matrix and differs: pass copies=True to keep a copy of it")
            changes[key] = Change(variants["full"](), {"value": after.detach().clone()}, family, shape, tied)
            continue
        change, errors[key] = low_rank(matrix, rank, energy, factor_dtype(before))
        changes[key] = Change(change.variant, change.tensors, family, shape, tied)
    if not changes:
        raise AdapterError("the two models are the same: there is nothing to extract")
    facts = {"fingerprint": prints.fingerprint(base)} if isinstance(base, nn.Module) else {}
    return Adapter(changes, facts, {}, errors)


def low_rank(
    matrix: Tensor | Product, rank: int | None, energy: float | None, dtype: torch.dtype
) -> tuple[Change, float]:
    """(the nearest LoRA to a (out, in) matrix, its relative error).

    ‖M - M_k‖² = ‖M‖² - Σ σ² of the values kept.
    """
    if isinstance(matrix, Product):
        U, S, V = matrix.svd()
        total = float(S.square().sum())
    else:
        total = float(matrix.square().sum())
        U, S, V = top_singular(matrix, min(matrix.shape) if energy is not None else rank or 1)
    k = min(rank_for_energy(S, energy, total) if energy is not None else rank or 1, len(S))
    root = S[:k].sqrt()
    A, B = (root[:, None] * V[:k]).to(dtype).contiguous(), (U[:, :k] * root).to(dtype).contiguous()
    if rank is not None and k < rank:  # a rank above the matrix's: the rest is zero
        A, B = nn.functional.pad(A, (0, 0, 0, rank - k)), nn.functional.pad(B, (0, rank - k))
    left = max(0.0, total - float(S[:k].square().sum()))
    change = Change(variants["lora"](rank=A.shape[0], alpha=A.shape[0]), {"A": A, "B": B})
    return change, (left / total) ** 0.5 if total else 0.0


def approximate(adapter: Adapter, rank: int, base: Weights | None = None, *, added: Collection[str] = ()) -> Adapter:
    """`adapter` with every change of a matrix as the nearest plain LoRA of rank `rank`; the errors are in `.error`.

    base: needed for methods whose ΔW depends on the base weight (DoRA, IA3). added: parameters that the base does not
    have (a new head), whatever `base` holds in their place: their copies stay.

    Raises:
        ConfigError: the base is needed and not given.
    """
    changes: dict[str, Change] = {}
    errors = dict(adapter.error)
    for key, change in adapter.changes.items():
        if change.variant.kind == "lora" and change.variant.rank <= rank:  # type: ignore[attr-defined]
            changes[key] = change
            continue
        if change.variant.any_shape and (key in added or change.shape is None or len(change.shape) != 2):
            changes[key] = change
            continue
        delta = true_change(key, change, None if base is None else base_weight(base, key, change))
        first = next(iter(change.tensors.values()))
        new, errors[key] = low_rank(delta, rank, None, first.dtype)
        changes[key] = Change(new.variant, new.tensors, change.layer, change.shape, change.tied)
    return adapter.replace(changes=changes, error=errors)


def factor_dtype(before: Tensor) -> torch.dtype:
    """fp32 over a 16-bit base, else the base's."""
    return before.dtype if before.dtype.itemsize > 2 else torch.float32


def tensors_of(weights: Weights) -> Mapping[str, Tensor]:
    """Name -> tensor, each storage once, adapters left out."""
    if not isinstance(weights, nn.Module):
        return weights
    return {name: tensor for name, tensor, _ in prints.base_tensors(weights)}


def check_names(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    """Refuse two models that have not the same parameters."""
    odd = sorted(set(new) ^ set(old))
    if odd:
        raise AdapterError(f"the two models have other parameters, for example {odd[0]!r}: no difference can be formed")
    for key, before in old.items():
        if new[key].shape != before.shape:
            raise AdapterError(
                f"{key!r} is {tuple(new[key].shape)} in one model and {tuple(before.shape)} in the other"
            )


def places(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of the base."""
    return dict(own_modules(model))


def same_storage(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The name of a tied parameter -> its other names."""
    names: dict[int, list[str]] = {}
    for path, module in own_modules(model):
        for site, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(join_key(path, site))
    return {same[0]: tuple(same[1:]) for same in names.values() if len(same) > 1}


def as_matrix(module: nn.Module | None, site: str, stored: Tensor) -> tuple[str | None, Tensor | None]:
    """(layer family, the parameter as its layer's (out, in) matrix, or None if it is none)."""
    for family, host in families(module):
        if site in host.sites(module):
            matrix: Tensor = host.to_matrix(module, site, stored)
            return family, matrix if matrix.ndim == 2 else None
    if module is not None:
        return ("module", stored) if stored.ndim == 2 else (None, None)
    return None, stored if stored.ndim == 2 else None


def families(module: nn.Module | None) -> Iterator[tuple[str, Any]]:
    """The hosts that adapt a module."""
    if module is not None:
        yield from ((family, h) for family, h in reversed(hosts.items()) if not h.full_only and h.accepts(module))
