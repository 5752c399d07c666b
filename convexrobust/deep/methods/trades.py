"""TRADES: accuracy on the data traded against stability around it."""

from __future__ import annotations

import torch

from convexrobust.deep.methods.base import Around, LossMethod, log_probabilities
from convexrobust.deep.model_loss import autograd_objective, left_as_found

_FIRST_NOISE = 0.03  # of the radius, as in the paper; at x itself the divergence has no gradient


class Trades(LossMethod):
    r"""Minimise the cross-entropy of the data plus the divergence of attacked outputs.

    .. math:: \ell(f(x), y) + \text{weight}\, \max_{x'} \mathrm{KL}(p(x) \,\|\, p(x'))

    The attack climbs the divergence from a point near x by steps of constant length.

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

    References
    ----------
    Zhang et al., arXiv 1901.08573.
    """

    def __init__(self, ball, weight=6.0, n_steps=10, step=0.25, mode="eval"):
        super().__init__(ball)
        self.weight, self.n_steps, self.length, self.mode = weight, n_steps, step, mode

    def points(self, model, x, y):
        """Return the points whose output diverges most from that at x."""
        around = Around(x, self.current_ball)
        noise = around.region.epsilon * torch.randn_like(x.flatten(1))
        points = around.moved(x + _FIRST_NOISE * noise.reshape(x.shape))
        with left_as_found(model, self.mode):
            with torch.no_grad():
                clean = model(x)
            climb = autograd_objective(lambda points: self.distances(clean, model(points), y))
            for _ in range(self.n_steps):
                points = around.moved(around.stepped(points, climb(points)[1], self.length))
        return around.checked(points)

    def loss(self, model, x, points, y):
        """Return the mean cross-entropy at x plus the weighted mean divergence."""
        outputs, attacked = model(x), model(points)
        apart = self.mean(self.distances(outputs, attacked, y))
        loss = self.mean(self.losses(outputs, y)) + self.weight * apart
        return loss, self.figures(attacked, y) | {"divergence": apart.item()}

    def distances(self, clean, attacked, y) -> torch.Tensor:
        """Return how far the outputs of each sample are apart, (b,)."""
        return divergence(log_probabilities(clean, y)[0], log_probabilities(attacked, y)[0])


def divergence(p, q):
    r"""Return :math:`\mathrm{KL}(p \| q)` of each row of two (b, C) of log-probabilities, (b,)."""
    return torch.sum(p.exp() * (p - q), dim=1)
