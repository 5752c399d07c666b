"""Logit pairing: outputs at a point and at its attacked version are pulled together."""

from __future__ import annotations

from convexrobust.deep.methods.attacked import Attacked

LABELS_AT = ("attacked", "clean")


class Pairing(Attacked):
    r"""Minimise a loss plus the distance of the outputs before and after the attack.

    .. math:: \ell(f(x''), y) + \text{weight}\, \|f(x') - f(x)\|_2

    where :math:`x''` is the attacked point :math:`x'` in adversarial logit pairing (ALP) and x
    itself in what comparisons call clean logit pairing (CLP). The CLP of the paper pairs two random
    samples instead, without an attack. With `HalfSquares` the distance is half its square.

    Parameters
    ----------
    ball, attack, mode, sample_loss
        As in `Attacked`.
    weight : float
        Weight of the distance.
    labels_at : {"attacked", "clean"}
        Where the loss is taken: ALP or CLP.

    References
    ----------
    Kannan, Kurakin and Goodfellow, arXiv 1803.06373.
    """

    def __init__(
        self, ball, weight=1.0, labels_at="attacked", attack=None, mode="eval", sample_loss=None
    ):
        if labels_at not in LABELS_AT:
            raise ValueError(f"labels_at must be one of {LABELS_AT}, got {labels_at!r}.")
        super().__init__(ball, attack, mode, sample_loss)
        self.weight, self.labels_at = weight, labels_at

    def loss(self, model, x, points, y):
        """Return the mean loss plus the weighted mean distance."""
        clean, attacked = model(x), model(points)
        distance = self.mean(self.sample_loss.distances(clean, attacked, y))
        labelled = attacked if self.labels_at == "attacked" else clean
        loss = self.mean(self.losses(labelled, y)) + self.weight * distance
        return loss, self.figures(attacked, y) | {"distance": distance.item()}
