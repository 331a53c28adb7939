"""Whisper's log-mel spectrogram (arXiv:2212.04356, section 2.2), for signals of any rate and length, on tensors.

Unusual: no padding to 30 s, and the playback may be sped up, which moves slow signals to where speech lies: at speed 4
a strain of 20 to 500 Hz sounds like 80 to 2,000 Hz, and 2 s of it are 50 frames.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

RATE = 16_000
WINDOW = 400
HOP = 160
FRAME_PAIR = 2 * HOP
"""Samples per position of the encoder, whose second convolution halves the frames."""


def samples(count: int, rate: float, speed: float = 1.0) -> int:
    """How many samples at 16 kHz `count` samples at `rate` become, rounded up to whole positions of the encoder."""
    return math.ceil(round(count * RATE / (rate * speed)) / FRAME_PAIR) * FRAME_PAIR


def log_mel(waves: Tensor, rate: float, mels: int = 80, speed: float = 1.0) -> Tensor:
    """(..., samples) at `rate` -> (..., mels, frames), about -1 to 1.5 for speech.

    The signal is resampled to 16 kHz, cut into windows of 25 ms every 10 ms, and its energy in `mels` bands is taken as
    log10, at most 8 below the recording's maximum.
    """
    shape = waves.shape[:-1]
    flat = waves.float().reshape(-1, waves.shape[-1])
    flat = resample(flat, round(flat.shape[-1] * RATE / (rate * speed)))
    flat = torch.nn.functional.pad(flat, (0, samples(waves.shape[-1], rate, speed) - flat.shape[-1]))
    spectrum = torch.stft(
        flat, WINDOW, HOP, window=torch.hann_window(WINDOW, device=flat.device), center=True, return_complex=True
    )
    energy = spectrum[..., :-1].abs() ** 2  # (n, 201, frames)
    bands = (filters(mels).to(flat.device) @ energy).clamp(min=1e-10).log10()
    bands = torch.maximum(bands, bands.amax(dim=(1, 2), keepdim=True) - 8.0)
    found: Tensor = ((bands + 4.0) / 4.0).reshape(*shape, mels, -1)
    return found


def resample(waves: Tensor, count: int) -> Tensor:
    """(n, samples) -> (n, count), the same signal through its Fourier series: exact for what both rates can hold."""
    length = waves.shape[-1]
    if count == length:
        return waves
    spectrum = torch.fft.rfft(waves.double())
    bins = count // 2 + 1
    if bins <= spectrum.shape[-1]:
        spectrum = spectrum[..., :bins]
    else:
        spectrum = torch.nn.functional.pad(spectrum, (0, bins - spectrum.shape[-1]))
    found: Tensor = torch.fft.irfft(spectrum, n=count) * (count / length)
    return found.float()


@cache
def filters(mels: int) -> Tensor:
    """(mels, 201): Slaney's mel filters up to 8 kHz, as Whisper was trained with."""
    from transformers.audio_utils import mel_filter_bank

    found = mel_filter_bank(
        num_frequency_bins=WINDOW // 2 + 1,
        num_mel_filters=mels,
        min_frequency=0.0,
        max_frequency=RATE / 2,
        sampling_rate=RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(found.T.copy()).float()
