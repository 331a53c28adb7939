"""gw: the samples are what real-world checks say they are, files are a function of the seed, and the recipe learns."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from deltaw.errors import ConfigError, DataError
from deltaw.recipes.configure import build
from deltaw.recipes.gw_data import NAMES
from deltaw.recipes.gw_waves import BAND, RATE, Sky
from deltaw.recipes.kept import open_kept, score
from deltaw.recipes.start import start
from deltaw.training.signals_file import Signals, read_signals, write_signals
from deltaw.training.whisper import empty_encoder

SIMULATED = pytest.mark.skipif(find_spec("lalsimulation") is None, reason="lalsuite is not installed")


@SIMULATED
def test_noise_signal_and_their_ratio():
    from deltaw.recipes.gw_waves import sample

    sky = Sky(snr=(12.0, 12.0))
    found = [sample(0, "train", i, sky, segment=True) for i in range(160)]
    noise = np.stack([s.data for s in found if not s.signal])
    width = (BAND[1] - BAND[0]) / (RATE / 2)
    assert abs(noise.std() - np.sqrt(width)) < 0.01  # .685: 80 x 3 x 4,096 draws, some 0.1 % of error
    signals = [s for s in found if s.signal]
    for s in signals:
        assert np.isclose(np.sqrt((s.clean**2).sum()), 12.0)
        assert abs(np.abs(s.clean).max(0).argmax() / RATE - 7.0) < 0.05  # light travels through the Earth in .043 s
        assert sky.masses[0] <= s.facts["mass2"] <= s.facts["mass1"] <= sky.masses[1]
        assert 1.0 <= s.facts["merger"] <= 1.8
    matched = np.array([(s.clean * s.noisy).sum() / 12.0 for s in signals])
    assert abs(matched.mean() - 12.0) < 4 / np.sqrt(len(matched))
    assert 0.75 < matched.std() < 1.25  # a unit Gaussian around the ratio: 80 draws, 3 standard errors


@SIMULATED
def test_files_depend_on_seed_and_index_only(tmp_path):
    from deltaw.recipes.gw_data import make

    sky = Sky()
    make(tmp_path / "one", {"train": 6, "validation": 4}, 3, sky, processes=1)
    make(tmp_path / "two", {"train": 6, "validation": 4}, 3, sky, processes=2)
    make(tmp_path / "other", {"train": 10, "validation": 4}, 4, sky, processes=1)
    make(tmp_path / "longer", {"train": 10, "validation": 4}, 3, sky, processes=1)
    read = {n: read_signals(tmp_path / n / "train.safetensors") for n in ("one", "other", "longer")}
    for split in ("train", "validation"):
        name = f"{split}.safetensors"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert np.array_equal(read["one"].waves, read["longer"].waves[:6])
    assert not np.array_equal(read["longer"].waves, read["other"].waves)
    assert not np.array_equal(read["one"].waves[:4], read_signals(tmp_path / "one" / "validation.safetensors").waves)
    one = read["one"]
    assert one.waves.shape == (6, 3, 4096)
    assert one.waves.dtype == np.float16
    assert one.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert np.isnan(one.columns["snr"][::2]).all()
    assert ((one.columns["snr"][1::2] >= 8) & (one.columns["snr"][1::2] <= 20)).all()
    assert json.loads((tmp_path / "one" / "dataset.json").read_text())["seed"] == 3


@SIMULATED
def test_waveforms_of_both_models_merge_at_the_same_time():
    from deltaw.recipes.gw_waves import sample

    for approximant in ("IMRPhenomD", "SEOBNRv4_opt"):
        found = sample(1, "train", 1, Sky(approximant=approximant, masses=(30.0, 40.0)), segment=True)
        assert abs(np.abs(found.clean).max(0).argmax() / RATE - 7.0) < 0.05


def test_impossible_ranges_are_refused():
    with pytest.raises(ConfigError, match="snr=20:8"):
        Sky(snr=(20.0, 8.0))
    with pytest.raises(ConfigError, match="did you mean 'IMRPhenomD'"):
        Sky(approximant="IMRphenomd")


# ---- the recipe, on bursts that need no lalsuite


@pytest.fixture(scope="module")
def bursts(tmp_path_factory) -> Path:
    """Noise, and noise with a burst, in two channels; and a tiny Whisper with random weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gw")
    random = np.random.default_rng(0)
    for split, count in (("train", 64), ("validation", 32), ("test", 32)):
        waves = random.standard_normal((count, 2, 1024))
        labels = np.arange(count) % 2
        waves[labels == 1, :, 400:600] += 6 * np.sin(2 * np.pi * 100 * np.arange(200) / 2048)
        write_signals(
            folder / "data" / f"{split}.safetensors",
            Signals(
                waves=waves.astype(np.float16),
                labels=labels,
                rate=2048.0,
                names=NAMES,
                channels=["H1", "L1"],
                columns={},
            ),
        )
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, max_target_positions=8, max_source_positions=100, init_std=0.3,
    )  # fmt: skip
    transformers.WhisperModel(config).save_pretrained(folder / "model")
    return folder


def configured(bursts, **changed):
    given = {
        "recipe": "gw",
        "model": str(bursts / "model"),
        "data": {"path": str(bursts / "data")},
        "epochs": 3,
        "batch_size": 16,
        "lr": 1e-2,
    }
    return build({**given, **changed})


@pytest.mark.parametrize("method", ["head", "lora", "full"])
def test_every_method_learns_and_its_result_opens_again(bursts, tmp_path, method):
    config = configured(bursts, method=method)
    results = start(config, tmp_path / "run", quiet=True)
    assert results["metric"] == "auc"
    assert results["best"]["auc"] > 0.9
    assert any("baseline: logistic regression" in note for note in results["notes"])
    assert any("context: 7 positions" in note for note in results["notes"])
    found = score(tmp_path / "run", [], "test")
    assert found["auc"] == pytest.approx(results["test"]["auc"], abs=1e-6)
    for split, examples in ((None, 32), ("test", 32), ("train", 64)):
        other = score(tmp_path / "run", [f"data={bursts / 'data'}"], split)
        assert (other["split"], other["examples"]) == (split or "test", examples)
    _, task, model = open_kept(tmp_path / "run")
    waves = read_signals(bursts / "data" / "test.safetensors").waves.astype(np.float32)
    for name, wave in (("quiet", waves[0]), ("loud", waves[1])):
        np.save(tmp_path / f"{name}.npy", wave)
    answers = task.predict(model, [str(tmp_path / "quiet.npy"), str(tmp_path / "loud.npy")])
    quiet, loud = (answer["probabilities"]["signal"] for answer in answers)
    assert loud > quiet


def test_the_three_methods_train_what_they_say(bursts, tmp_path):
    counts = {}
    for method in ("head", "lora", "full"):
        results = start(configured(bursts, method=method, epochs=1), tmp_path / method, quiet=True)
        counts[method] = results["parameters"]["trainable"]
    head = 2 * (2 * 2 * 16) + (64 * 256 + 256) + (256 * 2 + 2)  # norm, hidden, out; 2 channels x mean and maximum x 16
    assert counts["head"] == head
    assert counts["lora"] == head + 3 * 8 * (16 + 16)  # q, k, v at rank 8
    assert counts["full"] > counts["lora"]


def test_an_augmented_example_is_a_function_of_its_generator(bursts):
    from deltaw.training.order import generator
    from deltaw.training.tasks.audio_classification import AudioClassification

    task = AudioClassification(configured(bursts), speed=4.0, shift=0.1)
    assert task.augments
    first = task.example("train", 3, generator("example", 0, 0, 3))[0]
    assert torch.equal(first, task.example("train", 3, generator("example", 0, 0, 3))[0])
    assert not torch.equal(first, task.example("train", 3, generator("example", 0, 1, 3))[0])
    assert torch.equal(task.example("validation", 3, generator("x", 1))[0], task.mels["validation"][3])


def test_precomputed_mels_are_those_of_the_waves(bursts):
    from deltaw.training.tasks.audio_classification import AudioClassification

    task = AudioClassification(configured(bursts), speed=4.0)
    wave = read_signals(bursts / "data" / "train.safetensors").waves[5]
    assert torch.equal(task.mels["train"][5], task.mel(wave[None])[0])


def test_damaged_data_are_refused_with_the_place(bursts, tmp_path):
    found = read_signals(bursts / "data" / "train.safetensors")
    found.waves[7, 0, 3] = np.nan
    write_signals(tmp_path / "train.safetensors", found)
    with pytest.raises(DataError, match="1 signals hold NaN or infinity, the first is number 7"):
        read_signals(tmp_path / "train.safetensors")
    with pytest.raises(DataError, match="deltaw data gw"):
        start(configured(bursts, data={"path": str(tmp_path / "nowhere")}), tmp_path / "run", quiet=True)


def test_seed_001s_counts_on_whisper_small():
    with torch.device("meta"):
        encoder = empty_encoder(
            {
                "num_mel_bins": 80, "d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12,
                "encoder_ffn_dim": 3072, "max_source_positions": 1500,
            }
        )  # fmt: skip
    import deltaw as dw

    every = sum(p.numel() for p in encoder.parameters())
    positions = encoder.embed_positions.weight.numel()
    assert (every, every - positions) == (88_154_112, 87_002_112)
    head = 2_320_000
    assert round((every - positions + head) / 1e6) == 89  # openai-whisper's positions are no parameter
    dw.attach(encoder, dw.LoRA(rank=8, alpha=8), targets=["q_proj", "v_proj", "fc1", "fc2"])
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert trained == 1_032_192
    assert round((head + trained) / 1e6, 1) == 3.4


def test_projections_are_chosen_as_the_seeds_flags_do(bursts, tmp_path):
    from deltaw.recipes.configure import load

    options = [f"model={bursts / 'model'}", f"data={bursts / 'data'}", "epochs=1", "lora.rank=2"]
    config = load("gw", [*options, "targets=q_proj,v_proj"])
    assert config.targets == ["q_proj", "v_proj"]
    trained = start(config, tmp_path / "qv", quiet=True)["parameters"]["trainable"]
    wider = start(load("gw", [*options, "targets=all-linear"]), tmp_path / "all", quiet=True)["parameters"]["trainable"]
    head = 2 * (2 * 2 * 16) + (64 * 256 + 256) + (256 * 2 + 2)
    assert trained == head + 2 * 2 * (16 + 16)
    assert wider == head + 4 * 2 * (16 + 16) + 2 * 2 * (16 + 32)  # the encoder's, not the head's
