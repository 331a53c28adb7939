"""Audio and strain classification: any Whisper encoder, its context cut to the signal, over one or several channels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltaw.errors import DataError
from deltaw.training.band_maxima import band_maxima
from deltaw.training.config import RunConfig
from deltaw.training.hub import resolve
from deltaw.training.listener import Listener
from deltaw.training.log_mel import FRAME_PAIR, log_mel, samples
from deltaw.training.sounds import read_sound, read_sounds, sounds_to_score
from deltaw.training.task import Batch, Classified, Task, answer
from deltaw.training.whisper import cut_context, empty_encoder, is_openai, load_pretrained_config, whisper_encoder

CHUNK = 100
WHOLE = "listener.json"
"""In the folder of a model trained in full: sizes and the encoder's configuration."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a listener is made for. samples at rate (a second), played `speed` times faster; hidden: units of the head."""

    channels: int
    samples: int
    rate: float
    speed: float
    hidden: int

    @property
    def positions(self) -> int:
        """How long the encoder's context must be."""
        return samples(self.samples, self.rate, self.speed) // FRAME_PAIR


class AudioClassification(Task):
    """Recordings and their classes.

    speed: playback relative to the recording. hidden: units of the head. shift: in training, every recording starts up to
        so many seconds earlier or later, anew in each epoch (its end wraps around); 0 computes the mels once.
    labels, shape: of a kept run. read: "no" builds the task without data; "whole" takes what `to_score` does, as one split.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        speed: float = 1.0,
        hidden: int = 256,
        shift: float = 0.0,
        seconds: float | None = None,
        labels: Sequence[str] | None = None,
        shape: Mapping[str, Any] | None = None,
        read: Literal["splits", "whole", "no"] = "splits",
    ) -> None:
        if config.model is None:
            raise DataError("no model: set model=FOLDER or a hub id, for example model=openai/whisper-small")
        self.config = config
        self.model_name = config.model
        self.notes: list[str] = []
        self.augments = shift > 0
        self.labels = list(labels or ())
        self.mels: dict[str, Tensor] = {}
        self.targets_of: dict[str, Tensor] = {}
        self.waves: Tensor | None = None
        self.splits = {}
        self.mel_bins = _mel_bins(config)
        if shape is not None:
            self.shape = Shape(**shape)
        if read != "no":
            self._read(speed, hidden, shift, seconds, labels, shape, whole=read == "whole")
        self.metric = "auc" if len(self.labels) == 2 else "accuracy"

    def _read(
        self,
        speed: float,
        hidden: int,
        shift: float,
        seconds: float | None,
        labels: Sequence[str] | None,
        shape: Mapping[str, Any] | None,
        *,
        whole: bool,
    ) -> None:
        if whole:
            name, part, notes = sounds_to_score(self.config.data, seconds)
            found = {name: part}
        else:
            found, notes = read_sounds(self.config.data, self.config.seed, seconds)
        first = next(iter(found.values()))
        if labels is not None and list(first.names) != self.labels:
            raise DataError(f"the data have the classes {list(first.names)}, the kept result knows {self.labels}")
        self.labels = list(first.names)
        channels, count = first.waves.shape[1:]
        if shape is None:
            self.shape = Shape(channels=channels, samples=count, rate=first.rate, speed=speed, hidden=hidden)
        elif (channels, count, first.rate) != (self.shape.channels, self.shape.samples, self.shape.rate):
            raise DataError(
                f"the data are {channels} x {count:,} at {first.rate:g} Hz, the kept result is made for "
                f"{self.shape.channels} x {self.shape.samples:,} at {self.shape.rate:g} Hz"
            )
        self.notes += notes
        self.splits = {name: range(len(part)) for name, part in found.items()}
        self.targets_of = {name: torch.from_numpy(part.labels) for name, part in found.items()}
        self.mels = {name: self.mel(part.waves) for name, part in found.items()}
        if shift > 0:
            self.waves, self.most = torch.from_numpy(first.waves), round(shift * first.rate)
        cut = self.shape.positions
        self.notes.append(
            f"context: {cut} positions for {count / first.rate:g} s played {self.shape.speed:g} times faster, of the encoder's 1,500"
        )
        if not whole:
            self.notes.append(self._baseline())

    def mel(self, waves: np.ndarray[Any, Any] | Tensor) -> Tensor:
        """(n, channels, samples) -> (n, channels, mels, frames)."""
        tensor = torch.as_tensor(waves)
        parts = [
            log_mel(tensor[i : i + CHUNK], self.shape.rate, self.mel_bins, self.shape.speed)
            for i in range(0, len(tensor), CHUNK)
        ]
        return torch.cat(parts)

    def _baseline(self) -> str:
        """The score of a logistic regression on the maximum of each mel band, as a line of the log."""
        tally = Classified(len(self.labels))
        logits = band_maxima(self.mels["train"], self.targets_of["train"], self.mels["validation"])
        if not logits.isfinite().all():  # ranks of NaN would make an area above 1
            return "baseline: none (the regression on the maximum of each mel band gave no finite numbers)"
        missing = len(self.labels) - logits.shape[1]
        tally.add(nn.functional.pad(logits, (0, missing), value=-1e9), {"labels": self.targets_of["validation"]})
        scores = "  ".join(f"{name} {value:.4f}" for name, value in tally.scores().items())
        return f"baseline: logistic regression on the maximum of each mel band: validation {scores}"

    # ---- the model

    def build(self) -> nn.Module:
        whole = Path(self.model_name)
        classes = len(self.labels)
        if (whole / WHOLE).is_file():
            encoder = empty_encoder(json.loads((whole / WHOLE).read_text())["encoder"])
            model = self._listener(encoder, classes)
            model.load_state_dict(load_file(whole / "model.safetensors"))
            return model
        encoder, where = whisper_encoder(self.model_name, self.config.revision)
        if (note := f"model: {where}") not in self.notes:
            self.notes.insert(0, note)
        drop = self.config.base_dropout
        if drop is not None:
            for name in ("dropout", "attention_dropout", "activation_dropout"):
                setattr(encoder.config, name, drop)
                for module in encoder.modules():
                    if isinstance(getattr(module, name, None), float):
                        setattr(module, name, drop)
        cut_context(encoder, self.shape.positions)
        return self._listener(encoder, classes)

    def _listener(self, encoder: Any, classes: int) -> nn.Module:
        torch.manual_seed(self.config.seed)  # the head starts the same every time
        return Listener(encoder, self.shape.channels, encoder.config.d_model, self.shape.hidden, classes)

    def new_modules(self, model: nn.Module) -> list[str]:
        return ["head"]

    def drawn_modules(self) -> list[str]:
        return [] if (Path(self.model_name) / WHOLE).is_file() else ["head"]

    def prefix(self, model: nn.Module) -> str | None:
        return "body"

    def targets(self) -> str:
        """All linear layers of the encoder; the head is trained in full anyway."""
        return r"body\.encoder\.layers\..*(_proj|fc1|fc2)"

    def keep_model(self, model: nn.Module, folder: Path) -> None:
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        encoder: Any = model.get_submodule("body.encoder")
        known = ("num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
        config = {k: getattr(encoder.config, k) for k in (*known, "max_source_positions", "activation_function")}
        (folder / WHOLE).write_text(json.dumps({"encoder": config, **self.facts()}, indent=2) + "\n")

    # ---- the examples

    def example(self, split: str, index: int, random: np.random.Generator | None) -> tuple[Tensor, int]:
        label = int(self.targets_of[split][index])
        if split == "train" and random is not None and self.waves is not None:
            shifted = self.waves[index].roll(int(random.integers(-self.most, self.most + 1)), dims=-1)
            return log_mel(shifted, self.shape.rate, self.mel_bins, self.shape.speed), label
        return self.mels[split][index], label

    def collate(self, examples: Sequence[tuple[Tensor, int]]) -> Batch:
        return {
            "mel": torch.stack([mel for mel, _ in examples]),  # (batch, channels, mels, frames)
            "labels": torch.tensor([label for _, label in examples]),
        }

    def render(self, example: tuple[Tensor, int]) -> str:
        mel, label = example
        channels, bins, frames = mel.shape
        return (
            f"{self.labels[label]}  <-  {channels} channel{'s' if channels > 1 else ''}, log-mel of {bins} bands x {frames} "
            f"frames from {mel.min():.2f} to {mel.max():.2f}"
        )

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch["mel"])
        return nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="sum"), logits

    def tally(self) -> Classified:
        return Classified(len(self.labels))

    # ---- afterwards

    def facts(self) -> dict[str, Any]:
        return {"task": "audio-classification", "labels": self.labels, "shape": asdict(self.shape)}

    @torch.no_grad()
    def predict(self, model: nn.Module, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """For each file (audio, or an .npy of (channels, samples)): the label, and the probability of every class."""
        model.eval()
        shape = self.shape
        found = []
        for name in inputs:
            waves = read_sound(Path(name), shape.rate, shape.samples, shape.channels)
            shares = model(self.mel(waves[None]))[0].float().softmax(-1)
            found.append(answer(name, self.labels, shares))
        return found


def _mel_bins(config: RunConfig) -> int:
    """How many mel bands the encoder was made for (80, and 128 for large-v3)."""
    assert config.model is not None
    name = config.model
    if (Path(name) / WHOLE).is_file():
        return int(json.loads((Path(name) / WHOLE).read_text())["encoder"]["num_mel_bins"])
    if is_openai(name):
        encoder: Any = whisper_encoder(name)[0]
        return int(encoder.config.num_mel_bins)
    from transformers import AutoConfig

    folder, _ = resolve(name, config.revision)
    return int(getattr(load_pretrained_config(AutoConfig, folder, name, config.revision), "num_mel_bins", 80))
