"""Two networks that start from nothing: a perceptron and a small convolutional one. Both end in a Linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def perceptron(features: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    """Linear layers with ReLU between them, over the flattened picture."""
    sizes = [features, *hidden, classes]
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def convolutional(channels: int, classes: int, widths: Sequence[int] = (32, 64, 128)) -> nn.Sequential:
    """(batch, channels, height, width) -> (batch, classes): per width a 3x3 convolution, ReLU and a halving; then the mean."""
    layers: list[nn.Module] = []
    for before, width in zip((channels, *widths), widths):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
