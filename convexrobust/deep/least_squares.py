"""Adversarial least squares: the method of regression, the attack on residuals, the units of y."""

from __future__ import annotations

import torch

from convexrobust import attacks
from convexrobust.backends import torch as torch_backend
from convexrobust.deep.methods.base import LossMethod
from convexrobust.deep.model_loss import autograd_objective, left_as_found

ATTACKS = ("standard", "fgsm", "pgd")


class LeastSquares(LossMethod):
    r"""Minimise :math:`\tfrac12 (f(x') - y)^2` at points with a large residual.

    Parameters
    ----------
    ball : LpBall
        The threat model.
    attack : {"standard", "fgsm", "pgd"}
        The points :math:`x'`: the data, one steepest step, or projected gradient ascent.
    n_steps : int
        Steps of "pgd".

    Raises
    ------
    ValueError
        For another attack.
    """

    task = "regression"

    def __init__(self, ball, attack="pgd", n_steps=10):
        if attack not in ATTACKS:
            raise ValueError(f"method must be one of {ATTACKS} for regression, got {attack!r}.")
        super().__init__(ball)
        self.attack, self.n_steps = attack, n_steps

    def points(self, model, x, y) -> torch.Tensor:
        """Return the points of the batch that are trained on."""
        if self.attack == "standard":
            return x
        if self.attack == "fgsm":
            return _attacked(attacks.fgsm, model, x, y, self.current_ball)
        return largest_residuals(model, x, y, self.current_ball, n_steps=self.n_steps)

    def loss(self, model, x, points, y) -> tuple[torch.Tensor, dict[str, float]]:
        """Return half the mean square of the residuals."""
        residual = residuals(model, points, y)
        return 0.5 * residual.square().mean(), {"residual": residual.abs().mean().item()}


def residuals(model, x, y) -> torch.Tensor:
    """Return f(x) - y, (n,), of a model with one output.

    Raises
    ------
    ValueError
        If the model has several.
    """
    outputs = model(x)
    if outputs.numel() != len(x):
        raise ValueError(f"a model for regression has one output, this has {outputs.shape[1:]}.")
    return outputs.reshape(len(x)) - y


def largest_residuals(model, x, y, ball, **options) -> torch.Tensor:
    """Return points of the ball with large residuals; options as in `convexrobust.attacks.pgd`."""
    return _attacked(attacks.pgd, model, x, y, ball, **options)


def _attacked(attack, model, x, y, ball, **options):
    def climb(points):
        return residuals(model, points.reshape(x.shape), y).abs()

    with left_as_found(model, "eval"):
        points = attack(autograd_objective(climb), x.flatten(1), ball, xp=torch_backend, **options)
    return points.reshape(x.shape)


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
