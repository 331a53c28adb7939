"""Causal language models by hub id, folder or GGUF file, as plain trainable modules in float32 (or bf16)."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaw.errors import DataError, MissingExtra
from deltaw.training.hub import load_pretrained, quiet_transformers, resolve


def language_model(
    name: str, revision: str | None = None, dtype: torch.dtype = torch.float32, base_dropout: float | None = None
) -> nn.Module:
    """The model that `name` means.

    A GGUF file is read dequantised. transformers would mark such a model as quantised, and then refuse to save or train
    it, though its weights are plain: they are put into a model without that mark.

    Raises:
        DataError: it cannot be loaded. MissingExtra: a GGUF file without the package gguf.
    """
    from transformers import AutoModelForCausalLM

    place, options, _ = _place(name, revision)
    drop: dict[str, Any] = {} if base_dropout is None else {"base_dropout": base_dropout}
    if "gguf_file" not in options:
        model: nn.Module = load_pretrained(AutoModelForCausalLM, place, name, revision=revision, dtype=dtype, **drop)
        model.config._name_or_path = name  # type: ignore[union-attr]
        return model
    with redirect_stderr(StringIO()):  # the bar of the conversion heeds no setting
        read: Any = load_pretrained(AutoModelForCausalLM, place, name, dtype=dtype, **options)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with quiet_transformers():
        plain: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.config._name_or_path = name
    return plain  # type: ignore[no-any-return]


def tokenizer_of(name: str, revision: str | None = None) -> tuple[Any, str]:
    """The tokenizer, with a padding token, and a phrase that says where it is from."""
    from transformers import AutoTokenizer

    place, options, where = _place(name, revision)
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, **options)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"model={name}: no tokenizer ({str(error).strip().splitlines()[0][:200]})") from error
    if not tokenizer.is_fast:
        raise DataError(f"model={name}: its tokenizer cannot tell which text a token stands for; a fast one is needed")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer, where


def _place(name: str, revision: str | None) -> tuple[str, dict[str, Any], str]:
    """(what to hand to `from_pretrained`, its options, a phrase)."""
    if Path(name).suffix == ".gguf":
        if not Path(name).is_file():
            raise DataError(f"model={name}: no such file")
        place, where = name, name
    else:
        place, where = resolve(name, revision)
    if Path(place).suffix != ".gguf":
        return place, {}, where
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"model={name} is a GGUF file: pip install 'deltaw[gguf]'") from error
    file = Path(place)
    return str(file.parent), {"gguf_file": file.name}, f"{where} ({file.name}, dequantised)"
