"""Classification of images that fit into memory: arrays in, logits out, any model that takes (batch, features)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltaw.errors import DataError
from deltaw.training.config import RunConfig
from deltaw.training.pictures import Pictures, read_picture
from deltaw.training.task import Batch, Classified, Task, answer


class ImageClassification(Task):
    """Pictures and their classes, for a network that `make` builds.

    make: () -> the network, freshly initialised. A base is its weights, a safetensors file that config.model names;
        without one the network starts from nothing.
    data: split -> pictures; None to predict only. labels: the class names. name: what the untrained
        network is called. picture_shape: (height, width).
    """

    metric = "accuracy"

    def __init__(
        self,
        config: RunConfig,
        make: Callable[[], nn.Module],
        data: Mapping[str, Pictures] | None,
        labels: Sequence[str],
        name: str,
        picture_shape: tuple[int, int],
    ) -> None:
        self.picture_shape = picture_shape
        self.config, self.make, self.labels = config, make, list(labels)
        self.model_name = name if config.model is None else config.model
        self.data = data or {}
        self.splits = {split: range(len(pictures.labels)) for split, pictures in self.data.items()}
        self.notes = [
            f"{split}: {len(pictures.labels):,} pictures of {'x'.join(map(str, pictures.images.shape[1:]))}"
            for split, pictures in self.data.items()
        ]

    def build(self) -> nn.Module:
        torch.manual_seed(self.config.seed)
        model = self.make()
        if self.config.model is not None:
            path = Path(self.config.model)
            if not path.is_file():
                raise DataError(
                    f"model={path}: no such file; give a safetensors file with the network's weights, or leave model out"
                )
            try:
                model.load_state_dict(load_file(path))
            except RuntimeError as error:
                raise DataError(
                    f"model={path} does not fit the network: {' '.join(str(error).split())[:300]}"
                ) from None
        return model

    def new_modules(self, model: nn.Module) -> list[str]:
        return []

    def keep_model(self, model: nn.Module, folder: Path) -> None:
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )

    def collate(self, examples: Sequence[Any]) -> Batch:
        pixels = np.stack([image for image, _ in examples])  # (batch, height, width), 0 .. 1
        return {"pixels": torch.from_numpy(pixels), "labels": torch.tensor([label for _, label in examples])}

    def example(self, split: str, index: int, random: np.random.Generator | None) -> tuple[np.ndarray[Any, Any], int]:
        pictures = self.data[split]
        return pictures.images[index], int(pictures.labels[index])

    def render(self, example: tuple[np.ndarray[Any, Any], int]) -> str:
        image, label = example
        size = "x".join(map(str, image.shape))
        return f"{self.labels[label]}  <-  {size} pixels from {image.min():.2f} to {image.max():.2f}, mean {image.mean():.2f}"

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch["pixels"])
        return nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="sum"), logits

    def tally(self) -> Classified:
        return Classified(len(self.labels))

    @torch.no_grad()
    def predict(self, model: nn.Module, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """For each image file: the label, and the probability of every class."""
        model.eval()
        shape = self.picture_shape
        found = []
        for name in inputs:
            image = read_picture(Path(name), shape)
            shares = model(torch.from_numpy(image)[None])[0].float().softmax(-1)
            found.append(answer(name, self.labels, shares))
        return found

    def facts(self) -> dict[str, Any]:
        return {"task": "image-classification", "labels": self.labels, "picture": list(self.picture_shape)}
