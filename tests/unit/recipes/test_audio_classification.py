"""audio-classification: folders of real audio files, of any rate and length, damaged ones counted and left out."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.errors import DataError
from deltaw.recipes.configure import build
from deltaw.recipes.kept import open_kept, score
from deltaw.recipes.start import start
from deltaw.training.config import DataConfig
from deltaw.training.sounds import read_sounds, sounds_to_score

soundfile = pytest.importorskip("soundfile")
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Low and high tones in noise: wav and flac, 8 and 16 kHz, mono and stereo, half a second and a little less."""
    folder = tmp_path_factory.mktemp("tones")
    random = np.random.default_rng(0)
    for name, pitch in (("low", 300), ("high", 1500)):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(30):
            rate = (8000, 16_000)[i % 2]
            time = np.arange(int(rate * (0.5 - 0.002 * i))) / rate
            wave = 0.3 * np.sin(2 * np.pi * pitch * time + i) + 0.05 * random.standard_normal(len(time))
            stereo = np.stack([wave, wave], axis=1) if i % 3 == 0 else wave
            soundfile.write(folder / "data" / name / f"{i}.{('wav', 'flac')[i % 2]}", stereo, rate)
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, max_target_positions=8, max_source_positions=100, init_std=0.3,
    )  # fmt: skip
    transformers.WhisperModel(config).save_pretrained(folder / "model")
    return folder


def test_it_learns_and_tells_new_files_apart(tones, tmp_path):
    config = build(
        {
            "recipe": "audio-classification",
            "model": str(tones / "model"),
            "data": {"path": str(tones / "data"), "validation": 0.2, "test": 0.2},
            "epochs": 15,
            "batch_size": 8,
            "lr": 3e-3,
        }
    )
    results = start(config, tmp_path / "run", quiet=True)
    assert results["facts"]["labels"] == ["high", "low"]
    assert results["examples"] == {"train": 38, "validation": 10, "test": 12}
    assert results["test"]["accuracy"] > 0.9
    other = score(tmp_path / "run", [f"data={tones / 'data'}"])
    assert (other["split"], other["examples"]) == ("all", 60)
    _, task, model = open_kept(tmp_path / "run")
    answers = task.predict(model, [str(tones / "data" / "low" / "0.wav"), str(tones / "data" / "high" / "1.flac")])
    low, high = (answer["probabilities"]["low"] for answer in answers)
    assert low > high


def test_damaged_files_are_counted_and_lengths_cut(tones, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            soundfile.write(tmp_path / name / f"{i}.wav", np.full(1600 + 100 * i, 0.1 * (name == "b")), 16_000)
    (tmp_path / "a" / "broken.wav").write_bytes(b"RIFF no audio")
    soundfile.write(tmp_path / "b" / "empty.wav", np.zeros(0), 16_000)
    found, notes = read_sounds(DataConfig(path=str(tmp_path), validation=0.4, test=0.2), 0, seconds=0.1)
    assert {name: len(part) for name, part in found.items()} == {"train": 4, "validation": 4, "test": 2}
    assert found["train"].waves.shape[1:] == (1, 1600)
    assert any("1 unreadable" in note and "1 empty" in note and "8 (only" in note for note in notes)


def test_copies_are_dropped_and_no_recording_is_in_two_splits(tmp_path):
    def write(place, number):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / place, np.full(800, number / 100), 16_000)

    for i in range(6):
        write(f"train/a/{i}.wav", i)
        write(f"train/b/{i}.wav", 10 + i)
    for place, number in {
        "train/a/copy.wav": 0,
        "train/b/5.flac.wav": 5,
        "test/a/0.wav": 1,
        "test/b/0.wav": 20,
    }.items():
        write(place, number)
    found, notes = read_sounds(DataConfig(path=str(tmp_path)), 0)
    assert {name: len(part) for name, part in found.items()} == {"train": 8, "validation": 2, "test": 2}
    assert "dropped: 2 duplicate, 1 also in another split, 1 with contradicting labels" in notes
    assert len(sounds_to_score(DataConfig(path=str(tmp_path), split="train"))[1]) == 14


def test_one_class_or_no_folder_is_refused(tmp_path):
    (tmp_path / "only").mkdir()
    soundfile.write(tmp_path / "only" / "a.wav", np.zeros(100), 16_000)
    with pytest.raises(DataError, match="of 1 classes"):
        read_sounds(DataConfig(path=str(tmp_path)), 0)
    with pytest.raises(DataError, match="no such folder"):
        read_sounds(DataConfig(path=str(tmp_path / "gone")), 0)
