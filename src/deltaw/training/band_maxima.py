"""The baseline beside the networks: logistic regression on the loudest moment of each mel band. It knows no order in time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def band_maxima(train: Tensor, labels: Tensor, others: Tensor, penalty: float = 1e-2) -> Tensor:
    """Logits (n, classes) for `others` of a regression fitted to `train`. Both are mels (n, channels, mels, frames).

    Features are standardised; the mean cross entropy plus penalty / 2 · ||weights||^2 is minimised by L-BFGS.
    """
    x, y = train.amax(-1).flatten(1).double(), others.amax(-1).flatten(1).double()
    mean, spread = x.mean(0), x.std(0) + 1e-8
    x, y = (x - mean) / spread, (y - mean) / spread
    weight = torch.zeros(int(labels.max()) + 1, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return (y @ weight.T + bias).detach()
