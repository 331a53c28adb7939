"""The log-mel spectrogram is Whisper's own, and a faster playback is a higher pitch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaw.training.log_mel import filters, log_mel, resample, samples


@pytest.mark.parametrize("mels", [80, 128])
def test_it_is_the_feature_extractors(mels):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.WhisperFeatureExtractor(feature_size=mels)
    wave = 0.1 * np.random.default_rng(0).standard_normal(480_000).astype("float32")
    expected = theirs(wave, sampling_rate=16_000, return_tensors="np").input_features[0]
    found = log_mel(torch.from_numpy(wave), 16_000, mels).numpy()
    assert found.shape == (mels, 3000)
    assert np.abs(found - expected).max() < 1e-4  # the same operations in float32, maybe in another order


def test_two_seconds_of_strain_at_four_times_the_speed_are_fifty_frames():
    assert samples(4096, 2048, 4.0) == 8000
    assert log_mel(torch.randn(3, 2, 4096), 2048, speed=4.0).shape == (3, 2, 80, 50)


def test_playback_speed_moves_a_tone_up():
    time = torch.arange(4096) / 2048
    loudest = {
        s: int(log_mel(torch.sin(2 * torch.pi * 100 * time), 2048, speed=s).mean(-1).argmax()) for s in (1.0, 4.0)
    }
    centre = filters(80) @ torch.arange(201.0) * 40 / filters(80).sum(1)
    assert abs(float(centre[loudest[1.0]]) - 100) < 60
    assert abs(float(centre[loudest[4.0]]) - 400) < 60


def test_resampling_keeps_what_both_rates_hold():
    time = torch.arange(1000) / 1000
    wave = torch.sin(2 * torch.pi * 7 * time)[None]
    there = resample(wave, 1600)
    assert torch.allclose(there, torch.sin(2 * torch.pi * 7 * torch.arange(1600) / 1600)[None], atol=1e-5)
    assert torch.allclose(resample(there, 1000), wave, atol=1e-5)


def test_the_end_is_padded_to_whole_positions():
    assert samples(16_001, 16_000) == 16_320
    assert log_mel(torch.randn(16_001), 16_000).shape == (80, 102)
