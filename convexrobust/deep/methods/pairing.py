"""Logit pairing: outputs at a point and at its attacked version are pulled together."""

from __future__ import annotations

import torch

from convexrobust.deep.methods.attacked import Attacked

LABELS_AT = ("attacked", "clean")


class Pairing(Attacked):
    r"""Minimise a cross-entropy plus the distance of the outputs before and after the attack.

    .. math:: \ell(f(x''), y) + \text{weight}\, \|f(x') - f(x)\|_2

    where :math:`x''` is the attacked point :math:`x'` in adversarial logit pairing (ALP) and x
    itself in what comparisons call clean logit pairing (CLP). The CLP of the paper pairs two random
    samples instead, without an attack.

    Parameters
    ----------
    ball, attack, mode
        As in `Attacked`.
    weight : float
        Weight of the distance.
    labels_at : {"attacked", "clean"}
        Where the cross-entropy is taken: ALP or CLP.

    References
    ----------
    Kannan, Kurakin and Goodfellow, arXiv 1803.06373.
    """

    def __init__(self, ball, weight=1.0, labels_at="attacked", attack=None, mode="eval"):
        if labels_at not in LABELS_AT:
            raise ValueError(f"labels_at must be one of {LABELS_AT}, got {labels_at!r}.")
        super().__init__(ball, attack, mode)
        self.weight, self.labels_at = weight, labels_at

    def loss(self, model, x, points, y):
        """Return the mean cross-entropy plus the weighted mean distance."""
        clean, attacked = model(x), model(points)
        distance = self.mean(self.distances(clean, attacked, y))
        labelled = attacked if self.labels_at == "attacked" else clean
        loss = self.mean(self.losses(labelled, y)) + self.weight * distance
        return loss, self.figures(attacked, y) | {"distance": distance.item()}

    def distances(self, clean, attacked, y) -> torch.Tensor:
        """Return how far the outputs of each sample are apart, (b,)."""
        return torch.linalg.vector_norm((attacked - clean).reshape(len(clean), -1), dim=1)
