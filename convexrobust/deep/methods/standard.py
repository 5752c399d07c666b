"""Training without an attack: the baseline."""

from __future__ import annotations

from convexrobust.deep.methods.base import LossMethod


class Standard(LossMethod):
    """Minimise the loss of the data.

    Parameters
    ----------
    ball : LpBall, optional
        Only for the validation of the loop: the threat model of its attack.
    sample_loss : SampleLoss, optional
        `CrossEntropy`, the default, or `HalfSquares` of `convexrobust.deep.losses`.
    """

    def __init__(self, ball=None, sample_loss=None):
        super().__init__(ball, sample_loss)

    def loss(self, model, x, points, y):
        """Return the mean loss."""
        outputs = model(x)
        return self.mean(self.losses(outputs, y)), self.figures(outputs, y)
