"""A classifier of sounds: a speech encoder listens to each channel (detector, microphone) alone, a small head to all.

mel (batch, channels, mels, frames) -> encoder -> (batch * channels, time, width)
    -> mean and maximum over time -> (batch, channels * 2 * width) -> LayerNorm -> hidden layer -> logits
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Body(nn.Module):
    """The encoder, one pass per channel (folded into the batch), pooled over time."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, mel: Tensor) -> Tensor:
        batch, channels = mel.shape[:2]
        found = self.encoder(mel.flatten(0, 1))
        time = found if isinstance(found, Tensor) else found.last_hidden_state  # (batch * channels, time, width)
        pooled = torch.cat([time.mean(dim=1), time.amax(dim=1)], dim=-1)
        return pooled.reshape(batch, channels * pooled.shape[-1])


class Head(nn.Module):
    """LayerNorm, one hidden layer, logits."""

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.hidden = nn.Linear(features, hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.out(nn.functional.gelu(self.hidden(self.norm(features))))
        return logits


class Listener(nn.Module):
    """Body and head. `mel` is (batch, channels, mels, frames); the answer is (batch, classes)."""

    def __init__(self, encoder: nn.Module, channels: int, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.body = Body(encoder)
        self.head = Head(channels * 2 * width, hidden, classes)

    def forward(self, mel: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(mel))
        return logits
