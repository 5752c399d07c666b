"""Training without an attack: the baseline."""

from __future__ import annotations

from convexrobust.deep.methods.base import LossMethod, accuracy, sample_losses


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
        return sample_losses(outputs, y).mean(), {"accuracy": accuracy(outputs, y)}
