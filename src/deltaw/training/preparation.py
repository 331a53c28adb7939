"""A picture as a network wants it: resized, cut, scaled, normalised. The numbers come from the network's own files.

With a generator, and where asked, the cut and the side on which a picture's left is are drawn: a function of the generator
alone, so that the same (seed, epoch, index) gives the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BICUBIC = 3
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a picture becomes an array.

    height, width: of the result. edge: first resize the shorter side to so many pixels and cut the middle; None squeezes
    the whole picture into (height, width). mean, std: per channel, for values 0 .. 1; one channel means grey.
    resample: PIL's number of the filter (2 bilinear, 3 bicubic).
    """

    height: int
    width: int
    edge: int | None = None
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    resample: int = BICUBIC

    def __call__(
        self, image: Any, random: np.random.Generator | None = None, *, flip: bool = False, crop: float = 1.0
    ) -> Array:
        """A PIL image -> (channels, height, width), float32.

        random, flip, crop: mirror every second picture; cut a part of `crop` .. 1 of its area, of shape 3:4 to 4:3.
        """
        image = image.convert("L" if len(self.mean) == 1 else "RGB")
        if random is not None and crop < 1:
            image = image.resize((self.width, self.height), self.resample, box=_box(image.size, crop, random))
        elif self.edge is None:
            image = image.resize((self.width, self.height), self.resample)
        else:
            image = _middle(image, self.edge, self.height, self.width, self.resample)
        if random is not None and flip and random.random() < 0.5:
            image = image.transpose(0)  # left and right exchanged
        pixels = np.asarray(image, dtype=np.float32).reshape(self.height, self.width, len(self.mean)) / 255.0
        mean, std = np.asarray(self.mean, dtype=np.float32), np.asarray(self.std, dtype=np.float32)
        return ((pixels - mean) / std).transpose(2, 0, 1)


def _box(size: tuple[int, int], least: float, random: np.random.Generator) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a random part of a picture of (width, height)."""
    width, height = size
    area = random.uniform(least, 1.0) * width * height
    shape = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    wide, high = min(width, math.sqrt(area * shape)), min(height, math.sqrt(area / shape))
    left, top = random.uniform(0, width - wide), random.uniform(0, height - high)
    return left, top, min(left + wide, width), min(top + high, height)


def _middle(image: Any, edge: int, height: int, width: int, resample: int) -> Any:
    short = min(image.size)
    size = tuple(max(1, edge if side == short else int(side * edge / short)) for side in image.size)
    image = image.resize(size, resample)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))


def from_processor(told: Mapping[str, Any], image_size: int, channels: int) -> Preparation:
    """The preparation that a preprocessor_config.json of transformers describes; without one, a squeeze to `image_size`."""
    size = told.get("size", image_size)
    size = {"shortest_edge": size} if isinstance(size, int) and told.get("do_center_crop") else size
    size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
    edge = size.get("shortest_edge")
    height, width = size.get("height", edge or image_size), size.get("width", edge or image_size)
    cut = told.get("crop_size") if told.get("do_center_crop", "crop_size" in told) else None
    if cut is not None:
        edge = edge or min(height, width)
        height, width = (cut, cut) if isinstance(cut, int) else (cut["height"], cut["width"])
    elif (
        edge is not None and edge < 384 and "crop_pct" in told
    ):  # ConvNext: cut below 384 pixels, squeeze from there on
        edge = int(edge / told["crop_pct"])
    elif told.get("crop_pct"):
        edge = None
    plain = told.get("do_normalize") is False
    mean = (0.0,) * channels if plain else tuple(told.get("image_mean", HALF))
    std = (1.0,) * channels if plain else tuple(told.get("image_std", HALF))
    return Preparation(
        height=int(height),
        width=int(width),
        edge=edge,
        mean=mean[:channels],
        std=std[:channels],
        resample=int(told.get("resample", 2)),
    )
