"""Adversarial weight perturbation: the loss is lowered where the weights are at their worst."""

from __future__ import annotations

import torch

from convexrobust.deep.methods.base import LossMethod, WrappedMethod, backward
from convexrobust.deep.model_loss import left_as_found


class WeightPerturbed(WrappedMethod):
    r"""Any method with a loss, its gradient taken at perturbed weights (AWP).

    Of each weight matrix or kernel :math:`\theta_l`

    .. math:: \theta_l + v_l, \qquad v_l = \gamma \frac{\|\theta_l\|}{\|g_l\|} g_l, \qquad
              g = \nabla_\theta L(\theta)

    where L is the method's loss at its attacked points. The gradient of L at :math:`\theta + v` is
    then used for the step from :math:`\theta`. Biases and parameters of normalisation, those with
    one axis, are not perturbed.

    Parameters
    ----------
    method : LossMethod
        The method. One without `points` and `loss`, such as `Free`, cannot be perturbed.
    gamma : float
        Size of the perturbation relative to the weights.

    References
    ----------
    Wu, Xia and Wang, arXiv 2004.05884.
    """

    def __init__(self, method, gamma=5e-3):
        if not isinstance(method, LossMethod):
            is_class = isinstance(method, type)
            name = method.__name__ if is_class else type(method).__name__
            reason = (
                f"is a class: give {name}(ball)"
                if is_class
                else "updates the weights in another way"
            )
            raise TypeError(
                "method must be one with a loss of its own, such as Attacked(ball) or "
                f"Trades(ball); {name} {reason}."
            )
        if not gamma >= 0.0:
            raise ValueError(f"gamma must be at least 0, got {gamma!r}.")
        super().__init__(method)
        self.gamma = gamma

    def step(self, model, optimizer, x, y, rows) -> dict[str, float]:
        """Update the model's parameters by one batch; see `Method.step`."""
        points = self.method.points(model, x, y)
        weights = [w for w in model.parameters() if w.ndim > 1 and w.requires_grad]
        with left_as_found(model, None):  # this pass moves no statistics
            gradients = torch.autograd.grad(
                self.method.loss(model, x, points, y)[0], weights, allow_unused=True
            )
        before = [weight.detach().clone() for weight in weights]
        try:
            self._perturb(weights, gradients)
            loss, figures = self.method.loss(model, x, points, y)
            value = backward(optimizer, loss)
        finally:
            with torch.no_grad():
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)
        optimizer.step()
        return {"loss": value} | figures

    @torch.no_grad()
    def _perturb(self, weights, gradients):
        for weight, gradient in zip(weights, gradients, strict=True):
            length = 0.0 if gradient is None else gradient.norm()
            if length > 0.0:
                weight += (self.gamma * weight.norm() / length) * gradient
