"""Regression: residuals of a model, attacks on them, and the units of its targets.

The loss of the methods is `convexrobust.deep.losses.HalfSquares`.
"""

from __future__ import annotations

import numpy as np
import torch

from convexrobust.deep import attacks
from convexrobust.deep.losses import output_residuals


def residuals(model, x, y) -> torch.Tensor:
    """Return f(x) - y, (n,), of a model with one output.

    Raises
    ------
    ValueError
        If the model has several.
    """
    return output_residuals(model(x), y)


def largest_residuals(model, x, y, ball, **options) -> torch.Tensor:
    """Return points of the ball with large residuals; options as in `deep.attacks.pgd`."""
    return attacks.pgd(model, x, y, ball, loss="residual", **options)


def mean_and_deviation(y, weight=None) -> tuple[float, float]:
    """Return weighted mean and standard deviation of targets (n,), 1 if they are constant."""
    mean = np.average(y, weights=weight)
    return float(mean), float(np.sqrt(np.average((y - mean) ** 2, weights=weight))) or 1.0


def rescaled(model, scale, offset) -> torch.nn.Module:
    """Return the model of scale * f + offset, by its last layer in place where that is linear."""
    last = model[-1] if isinstance(model, torch.nn.Sequential) else None
    if not isinstance(last, torch.nn.Linear) or last.bias is None:
        return torch.nn.Sequential(model, _Affine(scale, offset))
    with torch.no_grad():
        last.weight.mul_(scale)
        last.bias.mul_(scale).add_(offset)
    return model


class _Affine(torch.nn.Module):
    """The map from f to scale * f + offset."""

    def __init__(self, scale, offset):
        super().__init__()
        self.scale, self.offset = scale, offset

    def forward(self, outputs):
        return self.scale * outputs + self.offset
