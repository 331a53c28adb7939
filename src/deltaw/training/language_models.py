"""Causal language models by hub id, folder or GGUF file, as plain trainable modules in float32 (or bf16)."""

from __future__ import annotations

from collections.abc import Sequence
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
        DataError: it cannot be loaded, or is no complete causal language model.
        MissingExtra: a GGUF file without the package gguf.
    """
    from transformers import AutoModelForCausalLM

    place, options, _ = _place(name, revision)
    drop: dict[str, Any] = {} if base_dropout is None else {"base_dropout": base_dropout}
    if "gguf_file" not in options:
        model, missing = load_pretrained(
            AutoModelForCausalLM, place, name, with_missing=True, revision=revision, dtype=dtype, **drop
        )
        _check_causal(model, name, missing)
        return model  # type: ignore[no-any-return]
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


def _check_causal(model: Any, name: str, missing: Sequence[str]) -> None:
    """Refuse an encoder, whose tokens see those that they are to predict, and parts that would be drawn at random."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    config = model.config
    if config.model_type in MASKED and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False)):
        raise DataError(f"model={name} is an encoder ({config.model_type}): take a causal language model")
    if missing:
        what = "no language-model head" if all("head" in key for key in missing) else "not all weights"
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"model={name} has {what}: {missing[0]} is missing{more}; take a causal language model")


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
