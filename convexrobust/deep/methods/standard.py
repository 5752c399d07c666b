"""Training without an attack: the baseline."""

from __future__ import annotations

from convexrobust.deep.methods.base import LossMethod


class Standard(LossMethod):
    """Minimise the cross-entropy of the data.

    Parameters
    ----------
    ball : LpBall, optional
        Only for the validation of the loop: the threat model of its attack.
    """

    def __init__(self, ball=None):
        super().__init__(ball)

    def loss(self, model, x, points, y):
        """Return the mean cross-entropy."""
        outputs = model(x)
        return self.mean(self.losses(outputs, y)), self.figures(outputs, y)
