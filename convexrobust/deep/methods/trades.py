"""TRADES: accuracy on the data traded against stability around it."""

from __future__ import annotations

import torch

from convexrobust.deep.methods.base import Around, LossMethod
from convexrobust.deep.model_loss import autograd_objective, left_as_found

_FIRST_NOISE = 0.03  # of the radius, as in the paper; at x itself the divergence has no gradient


class Trades(LossMethod):
    r"""Minimise the loss of the data plus the divergence of attacked outputs.

    .. math:: \ell(f(x), y) + \text{weight}\, \max_{x'} \mathrm{KL}(p(x) \,\|\, p(x'))

    The attack climbs the divergence from a point near x by steps of constant length. With
    `HalfSquares` the divergence is half the square of the difference of the outputs.

    Parameters
    ----------
    ball : LpBall
        The threat model.
    weight : float
        Weight of the second term, :math:`1 / \lambda` of the paper.
    n_steps : int
        Steps of the attack.
    step : float
        Their length in units of the ball.
    mode : {"eval", "train"}
        The mode of the model while it is attacked.
    sample_loss : SampleLoss, optional
        `CrossEntropy`, the default, or `HalfSquares` of `convexrobust.deep.losses`.

    References
    ----------
    Zhang et al., arXiv 1901.08573.
    """

    def __init__(self, ball, weight=6.0, n_steps=10, step=0.25, mode="eval", sample_loss=None):
        super().__init__(ball, sample_loss)
        self.weight, self.n_steps, self.length, self.mode = weight, n_steps, step, mode

    def points(self, model, x, y):
        """Return the points whose output diverges most from that at x."""
        around, apart = Around(x, self.current_ball), self.sample_loss.divergences
        noise = around.region.epsilon * torch.randn_like(x.flatten(1))
        points = around.moved(x + _FIRST_NOISE * noise.reshape(x.shape))
        with left_as_found(model, self.mode):
            with torch.no_grad():
                clean = model(x)
            climb = autograd_objective(lambda points: apart(clean, model(points), y))
            for _ in range(self.n_steps):
                points = around.moved(around.stepped(points, climb(points)[1], self.length))
        return around.checked(points)

    def loss(self, model, x, points, y):
        """Return the mean loss at x plus the weighted mean divergence."""
        outputs, attacked = model(x), model(points)
        apart = self.mean(self.sample_loss.divergences(outputs, attacked, y))
        loss = self.mean(self.losses(outputs, y)) + self.weight * apart
        return loss, self.figures(attacked, y) | {"divergence": apart.item()}
