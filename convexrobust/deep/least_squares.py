"""Adversarial least squares: the methods of regression, the attack on residuals, the units of y.

The methods are those of `convexrobust.deep.methods`, with half the square of the residual in the
place of the cross-entropy, and half the square of the difference of two outputs in the place of
their divergence. What needs probabilities or margins of classes has no counterpart here.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from convexrobust import attacks
from convexrobust.backends import torch as torch_backend
from convexrobust.deep.methods.attacked import noisy_step, random_step
from convexrobust.deep.methods.base import LossMethod
from convexrobust.deep.methods.dale import Dale
from convexrobust.deep.methods.fast_bat import FastBat
from convexrobust.deep.methods.free import Free
from convexrobust.deep.methods.gradalign import GradAlign
from convexrobust.deep.methods.pairing import Pairing
from convexrobust.deep.methods.ssds import Ssds
from convexrobust.deep.methods.trades import Trades
from convexrobust.deep.model_loss import autograd_objective, left_as_found

ATTACKS = ("standard", "fgsm", "fast", "n-fgsm", "pgd")


class SquaredLoss:
    r"""What makes a method one of regression: :math:`\ell = \tfrac12 (f(x) - y)^2`."""

    task = "regression"

    def losses(self, outputs, y) -> torch.Tensor:
        """Return half the square of each residual, (b,)."""
        return half_squares(outputs, y)

    def figures(self, outputs, y) -> dict[str, float]:
        """Return the mean size of the residuals at the points trained on."""
        return {"residual": _residuals(outputs, y).abs().mean().item()}

    def distances(self, clean, attacked, y) -> torch.Tensor:
        """Return half the square of each difference of outputs, (b,)."""
        return half_squares(attacked, clean.reshape(len(y)))

    def log_losses(self, outputs, y) -> torch.Tensor:
        """Return the logarithm of each loss, (b,), with a gradient of 0 where that is 0."""
        losses = self.losses(outputs, y)
        return losses.clip(min=torch.finfo(losses.dtype).tiny).log()


class LeastSquares(SquaredLoss, LossMethod):
    r"""Minimise :math:`\tfrac12 (f(x') - y)^2` at points with a large residual.

    Parameters
    ----------
    ball : LpBall
        The threat model.
    attack : {"standard", "fgsm", "fast", "n-fgsm", "pgd"}
        The points :math:`x'`: the data, one steepest step, one from a random start, one from noise
        that may leave the ball (as of `convexrobust.deep.methods.Attacked`), or projected gradient
        ascent.
    n_steps : int
        Steps of "pgd".

    Raises
    ------
    ValueError
        For another attack.
    """

    def __init__(self, ball, attack="pgd", n_steps=10):
        if attack not in ATTACKS:
            raise ValueError(f"attack must be one of {ATTACKS}, got {attack!r}.")
        super().__init__(ball)
        self.attack, self.n_steps = attack, n_steps

    def points(self, model, x, y) -> torch.Tensor:
        """Return the points of the batch that are trained on."""
        if self.attack == "standard":
            return x
        if self.attack == "pgd":
            return largest_residuals(model, x, y, self.current_ball, n_steps=self.n_steps)
        one_step = {
            "fgsm": partial(_attacked, attacks.fgsm),
            "fast": partial(random_step, losses=self.losses),
            "n-fgsm": partial(noisy_step, losses=self.losses),
        }
        return one_step[self.attack](model, x, y, self.current_ball)

    def loss(self, model, x, points, y) -> tuple[torch.Tensor, dict[str, float]]:
        """Return half the mean square of the residuals."""
        outputs = model(points)
        return self.mean(self.losses(outputs, y)), self.figures(outputs, y)


class SquaredFree(SquaredLoss, Free):
    """`Free` for regression."""


class SquaredTrades(SquaredLoss, Trades):
    """`Trades` for regression."""


class SquaredDale(SquaredLoss, Dale):
    """`Dale` for regression; its margin is one of half the mean square of the residuals."""


class SquaredFastBat(SquaredLoss, FastBat):
    """`FastBat` for regression."""


class SquaredSsds(SquaredLoss, Ssds):
    """`Ssds` for regression."""


class SquaredGradAlign(SquaredLoss, GradAlign):
    """`GradAlign` for regression; one steepest step raises the residual by default."""

    def __init__(self, ball, weight=0.2, attack=None, mode="train"):
        super().__init__(ball, weight, attack or partial(_attacked, attacks.fgsm), mode)


class SquaredPairing(SquaredLoss, Pairing):
    """`Pairing` for regression; 10 steps of projected ascent raise the residual by default."""

    def __init__(self, ball, weight=1.0, labels_at="attacked", attack=None, mode="eval"):
        attack = attack or partial(largest_residuals, n_steps=10)
        super().__init__(ball, weight, labels_at, attack, mode)


def half_squares(outputs, y) -> torch.Tensor:
    """Return half the square of each residual, (b,), at least in single precision."""
    return 0.5 * _residuals(outputs, y).square()


def residuals(model, x, y) -> torch.Tensor:
    """Return f(x) - y, (n,), of a model with one output.

    Raises
    ------
    ValueError
        If the model has several.
    """
    return _residuals(model(x), y)


def _residuals(outputs, y):
    if outputs.numel() != len(y):
        raise ValueError(f"a model for regression has one output, this has {outputs.shape[1:]}.")
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32)).reshape(len(y)) - y


def largest_residuals(model, x, y, ball, *, mode="eval", **options) -> torch.Tensor:
    """Return points of the ball with large residuals; options as in `convexrobust.attacks.pgd`."""
    return _attacked(attacks.pgd, model, x, y, ball, mode=mode, **options)


def _attacked(attack, model, x, y, ball, *, mode="eval", **options):
    def climb(points):
        return residuals(model, points.reshape(x.shape), y).abs()

    with left_as_found(model, mode):
        points = attack(autograd_objective(climb), x.flatten(1), ball, xp=torch_backend, **options)
    return points.reshape(x.shape)


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
