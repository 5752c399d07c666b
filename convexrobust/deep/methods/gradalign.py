"""GradAlign: one-step training that keeps gradients inside the ball in one direction."""

from __future__ import annotations

import torch

from convexrobust.deep.methods.attacked import Attacked, one_step_on
from convexrobust.deep.methods.base import Around, input_gradient, uniform_noise


class GradAlign(Attacked):
    r"""Attack by one step, and add how far gradients in the ball differ in direction.

    .. math:: \ell(x') + \text{weight}\, \bigl(1 - \cos(\nabla_x \ell(x),
              \nabla_x \ell(x + \eta))\bigr), \qquad \eta \text{ uniform in the ball}

    Only the second gradient is differentiated, as in the published code; samples with a gradient
    of 0 are left out of the mean.

    Parameters
    ----------
    ball : LpBall
        The threat model.
    weight : float
        Weight of the second term.
    attack : callable, optional
        As in `Attacked`; by default one full step from the point itself.
    mode : {"eval", "train"}
        The mode of the model while it is attacked.
    sample_loss : SampleLoss, optional
        `CrossEntropy`, the default, or `HalfSquares` of `convexrobust.deep.losses`.

    References
    ----------
    Andriushchenko and Flammarion, arXiv 2007.02617.
    """

    def __init__(self, ball, weight=0.2, attack=None, mode="train", sample_loss=None):
        attack = attack or one_step_on(sample_loss or self.sample_loss)
        super().__init__(ball, attack, mode, sample_loss)
        self.weight = weight

    def loss(self, model, x, points, y):
        """Return the mean loss of the attacked points plus the weighted misalignment."""
        ball = self.current_ball
        there = Around(x, ball).moved(x + uniform_noise(x, ball)).requires_grad_()
        here = input_gradient(model, x, y, mode=None, losses=self.losses)
        losses = self.losses(model(there), y)
        (gradient,) = torch.autograd.grad(losses.sum(), there, create_graph=True)
        apart = misalignment(here, gradient, self.sample_weights)
        outputs = model(points)
        loss = self.mean(self.losses(outputs, y)) + self.weight * apart
        return loss, self.figures(outputs, y) | {"misalignment": apart.item()}


def misalignment(first, second, weights=None):
    """Return the mean of 1 - cos, times weights, between rows of two batches of gradients not 0."""
    first, second = first.flatten(1), second.flatten(1)
    used = (first.detach().abs().amax(1) > 0.0) & (second.detach().abs().amax(1) > 0.0)
    weights = second.new_ones(len(second)) if weights is None else weights
    first, second, weights = first[used], second[used], weights[used]
    if len(first) == 0:
        return second.sum()
    # Scaled first: a product of two small gradients could be 0.
    first = first / torch.linalg.vector_norm(first, dim=1, keepdim=True)
    second = second / torch.linalg.vector_norm(second, dim=1, keepdim=True)
    return weights.mean() - (weights * (first * second).sum(dim=1)).mean()
