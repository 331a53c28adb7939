"""Pretrained models by folder or hub id, through transformers; one message when one cannot be had."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from deltaw.errors import ConfigError, DataError, did_you_mean
from deltaw.training.copies import COPIES, how_to_get, installed


def resolve(name: str, revision: str | None = None) -> tuple[str, str]:
    """(what to hand to `from_pretrained`, a phrase that says where the model comes from).

    Raises:
        DataError: `name` looks like a path, and nothing is there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DataError(
                f"model={name}: the folder has no config.json (found {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'})"
            )
        return str(path), name
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(f"model={name}: {'a file, not a model folder' if path.exists() else 'no such folder'}{near}")
    copy = installed(name)
    if copy is not None and revision is None:
        return str(copy), f"{name}, from the installed package {COPIES[name].package}"
    return name, name


def load_pretrained(
    auto: Any, folder: str, name: str, *, with_missing: bool = False, base_dropout: float | None = None, **options: Any
) -> Any:
    """`auto.from_pretrained(folder)`, quietly; with `with_missing`, also the parameters that the checkpoint lacks.

    base_dropout: overrides every dropout probability of the model's configuration.

    Raises:
        DataError: it cannot be loaded; the message says how to get it.
    """
    if os.path.isdir(folder):
        options.pop("revision", None)
    with quiet_transformers():
        try:
            if base_dropout is not None:
                from transformers import AutoConfig

                config = AutoConfig.from_pretrained(folder, revision=options.get("revision"))
                options |= {k: base_dropout for k, v in config.to_dict().items() if _is_dropout(k, v)}
            if not with_missing:
                return auto.from_pretrained(folder, **options)
            model, info = auto.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise DataError(f"model={name} cannot be loaded: {reason}; {how_to_get(name)}") from error
    model.config._name_or_path = name  # what adapters record as their base: the id, not where it lies on this machine
    lacking = set(info["missing_keys"]) | {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    return model, [key for key, _ in model.named_parameters() if key in lacking]


def _is_dropout(key: str, value: Any) -> bool:
    return isinstance(value, float) and ("dropout" in key or key in {"attn_pdrop", "embd_pdrop", "resid_pdrop"})


def position_rows(model: nn.Module) -> int | None:
    """How many positions the model has learned a row for (BERT, RoBERTa, GPT-2 and their like); None: it has no such table."""
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe"):
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return None


def check_length(longest: int, max_length: int, name: str, room: int | None) -> None:
    """Refuse texts of more tokens than the model `name` has positions for."""
    if room is not None and longest > room:
        raise ConfigError(
            f"max_length={max_length}: the data have texts of {longest} tokens, and "
            f"{name} has positions for {room}: set max_length={room}, which cuts them"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the library's load bars and reports out of our log."""
    from transformers.utils import logging as theirs

    before, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        theirs.set_verbosity(before)
        if bars:
            theirs.enable_progress_bar()
