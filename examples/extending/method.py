"""A training method: the loss plus its first-order growth in the ball, after Lyu et al. (2015).

The largest value of a linear function over the ball is its dual norm, so that
:math:`\\ell(x) + \\epsilon \\|\\nabla_x \\ell(x)\\|_q` is what a linear model of the loss loses at
worst. No point is attacked; the price is a second derivative in each step.
"""

import torch

from convexrobust.backends import torch as torch_backend
from convexrobust.deep.methods.base import LossMethod


class GradientPenalty(LossMethod):
    """Descend on the loss plus the support of the ball in the direction of its gradient."""

    def loss(self, model, x, points, y):
        """Return the mean loss, with its graph, and figures for the log."""
        x = x.detach().clone().requires_grad_()
        outputs = model(x)
        losses = self.losses(outputs, y)
        (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        growth = self.current_ball.support(torch_backend, gradient.flatten(1).T)
        return self.mean(losses + growth), self.figures(outputs, y)
