"""Classification of pictures of any size and colour, read when they are needed, with a network of any library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.errors import ConfigError, DataError
from deltaw.training.config import RunConfig
from deltaw.training.image_files import ImageSource, open_picture, read_images
from deltaw.training.labelled import labelled, labelled_whole
from deltaw.training.preparation import Preparation
from deltaw.training.task import Batch, Classified, Task, answer
from deltaw.training.vision_models import VisionModel

Example = tuple[np.ndarray[Any, Any], int]


class PhotoClassification(Task):
    """Pictures and their classes.

    model: the network. flip, crop: augmentation, see `Preparation`.
    labels, prepared: class names and preparation of a kept run. read: as in `TextClassification`.
    """

    metric = "accuracy"

    def __init__(
        self,
        config: RunConfig,
        model: VisionModel,
        *,
        flip: bool = False,
        crop: float = 1.0,
        labels: Sequence[str] | None = None,
        prepared: Mapping[str, Any] | None = None,
        read: Literal["splits", "whole", "no"] = "splits",
    ) -> None:
        self.config, self.model = config, model
        self.model_name = model.name
        self.flip, self.crop, self.augments = flip, crop, flip or crop < 1
        self.preparation = (
            model.preparation()
            if prepared is None
            else Preparation(**{**prepared, "mean": tuple(prepared["mean"]), "std": tuple(prepared["std"])})
        )
        self.labels = list(labels or ())
        self.splits: dict[str, Sequence[tuple[str, int]]] = {}
        self.source = ImageSource("no data")
        wanted = self.preparation
        self.notes = [f"model: {model.name}", f"pictures are brought to {wanted.height}x{wanted.width} pixels"]
        if read == "no":
            return
        self.source = found = read_images(config.data)
        self.notes.append(f"data: {found.where}")
        if read == "whole":
            name, rows, why = labelled_whole(found.rows, found.where, config.data, self.labels, dropped=found.dropped)
            self.notes[-1] += f", {len(rows):,} pictures"
            self.notes += why
            self.splits = {name: rows}
            return
        data = labelled(found.rows, found.where, config.data, config.seed, dropped=found.dropped)
        if labels is not None and data.labels != self.labels:
            raise DataError(f"the data have the classes {data.labels}, the kept result knows {self.labels}")
        self.labels = data.labels
        self.notes += data.notes()
        self.splits = dict(data.splits)

    # ---- the model

    def build(self) -> nn.Module:
        model, self._new = self.model.build(self.labels, self.config.seed, self.config.base_dropout)
        wanted = self.preparation
        try:
            with torch.no_grad():
                out = _logits(model.eval()(torch.zeros(1, len(wanted.mean), wanted.height, wanted.width)))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"model={self.model_name} does not take pictures of {wanted.height}x{wanted.width} "
                f"({str(error).splitlines()[0][:200]}): leave image-classification.size out"
            ) from error
        if out.shape != (1, len(self.labels)):
            raise DataError(f"model={self.model_name} answers {tuple(out.shape)}, wanted (1, {len(self.labels)})")
        layers = dict(model.named_modules())
        linear = [path for path, layer in layers.items() if isinstance(layer, nn.Linear)]
        whole = [path for path, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.groups == 1]
        self._convolutions = whole if whole and len(linear) < 2 else None
        return model

    def new_modules(self, model: nn.Module) -> list[str]:
        return self._new

    def drawn_modules(self) -> list[str]:
        return self._new

    def targets(self) -> list[str] | None:
        """Every convolution (depthwise ones left out), where all Linear layers but the head are missing; else the configuration's choice."""
        return self._convolutions

    def keep_model(self, model: nn.Module, folder: Path) -> None:
        self.model.keep(model, folder, self.labels, self.preparation)

    # ---- the examples

    def example(self, split: str, index: int, random: np.random.Generator | None) -> Example:
        key, label = self.splits[split][index]
        image = open_picture(self.source.items[key])
        return self.preparation(image, random if split == "train" else None, flip=self.flip, crop=self.crop), label

    def collate(self, examples: Sequence[Example]) -> Batch:
        pixels = np.stack([image for image, _ in examples])  # (batch, channels, height, width)
        return {"pixels": torch.from_numpy(pixels), "labels": torch.tensor([label for _, label in examples])}

    def render(self, example: Example) -> str:
        image, label = example
        size = "x".join(map(str, image.shape))
        return f"{self.labels[label]}  <-  {size} values from {image.min():.2f} to {image.max():.2f}, mean {image.mean():.2f}"

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = _logits(model(batch["pixels"]))
        return nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="sum"), logits

    def tally(self) -> Classified:
        return Classified(len(self.labels))

    # ---- afterwards

    def facts(self) -> dict[str, Any]:
        return {"task": "image-classification", "labels": self.labels, "prepared": asdict(self.preparation)}

    @torch.no_grad()
    def predict(self, model: nn.Module, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """For each picture file: the label, and the probability of every class."""
        model.eval()
        found = []
        for name in inputs:
            image = self.preparation(open_picture(Path(name).expanduser()))
            shares = _logits(model(torch.from_numpy(image)[None]))[0].float().softmax(-1)
            found.append(answer(name, self.labels, shares))
        return found


def _logits(answer: Any) -> Tensor:
    """(batch, classes), of a plain network or of one of transformers."""
    return answer if isinstance(answer, Tensor) else answer.logits  # type: ignore[no-any-return]
