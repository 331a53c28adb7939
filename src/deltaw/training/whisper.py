"""Whisper's encoder (arXiv:2212.04356) from wherever it lies, its context cut to the signal's length.

A hub id or a folder of transformers is read as such. A checkpoint of openai-whisper (`small.pt`, or `openai:small`) is a
pickle, which nothing here opens: that package loads it, if it is installed. It holds the same weights under other names
and becomes the same module, so targets and adapters do not depend on the source.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import ConfigError, DataError, MissingExtra, did_you_mean
from deltaw.training.hub import load_pretrained, quiet_transformers, resolve

OPENAI = "openai:"
NAMES = (
    (r"^blocks\.(\d+)\.attn\.", r"layers.\1.self_attn."),
    (r"^blocks\.(\d+)\.", r"layers.\1."),
    (r"\.query\.", ".q_proj."),
    (r"\.key\.", ".k_proj."),
    (r"\.value\.", ".v_proj."),
    (r"\.out\.", ".out_proj."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
    (r"^ln_post\.", "layer_norm."),
    (r"^positional_embedding$", "embed_positions.weight"),
)
"""Names in openai-whisper -> names in transformers."""


def is_openai(name: str) -> bool:
    """Whether `name` means a model in openai-whisper's own format."""
    return name.startswith(OPENAI) or Path(name).suffix == ".pt"


def whisper_encoder(name: str, revision: str | None = None) -> tuple[nn.Module, str]:
    """The pretrained encoder in float32, and a phrase that says where it is from.

    Raises:
        DataError: nothing of that name, or no Whisper model.
        MissingExtra: `openai:NAME` or FILE.pt without the package openai-whisper.
    """
    if is_openai(name):
        return from_openai(_openai(name)), name if name.startswith(OPENAI) else f"{name} (openai-whisper)"
    try:
        from transformers import AutoConfig, WhisperModel
    except ImportError as error:
        raise MissingExtra("Whisper needs transformers: pip install 'deltaw[train]'") from error
    folder, where = resolve(name, revision)
    config = load_pretrained_config(AutoConfig, folder, name, revision)
    if config.model_type != "whisper":
        raise DataError(f"model={name} is a {config.model_type}, not a Whisper model; try openai/whisper-small")
    model = load_pretrained(WhisperModel, folder, name, revision=revision, dtype=torch.float32)
    return model.encoder, where


def load_pretrained_config(auto: Any, folder: str, name: str, revision: str | None) -> Any:
    """A model's configuration; an error that says what could not be loaded."""
    with quiet_transformers():
        try:
            return auto.from_pretrained(folder, revision=revision)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise DataError(
                f"model={name} cannot be loaded: {reason}; give a local folder or an openai-whisper .pt file instead"
            ) from error


def cut_context(encoder: Any, positions: int) -> None:
    """Make the encoder take 2 x `positions` frames instead of 3,000: cost falls with them, the positions kept are the same.

    Raises:
        ConfigError: the signal is longer than what the model was made for.
    """
    known = encoder.embed_positions.num_embeddings
    if positions > known:
        raise ConfigError(
            f"the signal is {positions * 2:,} frames long, the model takes {known * 2:,} (30 s): shorten it (seconds=) or raise speed="
        )
    if positions == known:
        return
    shorter = nn.Embedding(positions, encoder.embed_positions.embedding_dim)
    shorter.weight = nn.Parameter(encoder.embed_positions.weight.detach()[:positions].clone(), requires_grad=False)
    encoder.embed_positions = shorter
    encoder.max_source_positions = positions
    encoder.config.max_source_positions = positions


def empty_encoder(config: Any) -> nn.Module:
    """An encoder with random weights, from its configuration (a WhisperConfig, or the keys of one)."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    made = config if isinstance(config, WhisperConfig) else WhisperConfig(**config)
    encoder: nn.Module = WhisperEncoder(made)
    return encoder


def from_openai(model: Any) -> nn.Module:
    """The encoder of a model of the package openai-whisper (`whisper.load_model("small")`) as transformers' module.

    Raises:
        DataError: the weights are not such a model's.
    """
    dims = model.dims
    encoder = empty_encoder(
        {
            "num_mel_bins": dims.n_mels,
            "d_model": dims.n_audio_state,
            "encoder_layers": dims.n_audio_layer,
            "encoder_attention_heads": dims.n_audio_head,
            "encoder_ffn_dim": 4 * dims.n_audio_state,
            "max_source_positions": dims.n_audio_ctx,
        }
    )
    state: dict[str, Tensor] = {}
    for key, tensor in model.encoder.state_dict().items():
        renamed = key
        for pattern, new in NAMES:
            renamed = re.sub(pattern, new, renamed)
        state[renamed] = tensor.float()
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"the openai-whisper model does not fit: {' '.join(str(error).split())[:300]}") from None
    return encoder


def _openai(name: str) -> Any:
    """What the package openai-whisper loads under `openai:NAME` or from a .pt file: its format, so its loader."""
    wanted = name.removeprefix(OPENAI)
    if Path(wanted).suffix == ".pt" and not Path(wanted).expanduser().is_file():
        raise DataError(f"model={name}: no such file")
    try:
        import whisper
    except ImportError as error:
        raise MissingExtra(
            f"model={name} is openai-whisper's own format, which that package reads: pip install openai-whisper; "
            "or give the same model of transformers, for example model=openai/whisper-small"
        ) from error
    if Path(wanted).suffix != ".pt" and wanted not in whisper.available_models():
        raise DataError(
            f"model={name}: openai-whisper has no {wanted!r}{did_you_mean(wanted, whisper.available_models())}"
        )
    try:
        return whisper.load_model(str(Path(wanted).expanduser()) if Path(wanted).suffix else wanted, device="cpu")
    except Exception as error:  # its loader raises many kinds for a file that is no checkpoint, or without a network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(f"model={name}: openai-whisper cannot load it ({reason})") from error
