"""MART: training that looks harder at samples which are misclassified already."""

from __future__ import annotations

import torch

from convexrobust.deep.losses import accuracy, divergence, log_probabilities
from convexrobust.deep.methods.attacked import Attacked


class Mart(Attacked):
    r"""Minimise a boosted cross-entropy plus the divergence of uncertain samples.

    .. math:: -\log p_y(x') - \log(1 - \max_{c \ne y} p_c(x'))
              + \text{weight}\; \mathrm{KL}(p(x) \,\|\, p(x'))\, (1 - p_y(x))

    Parameters
    ----------
    ball, attack, mode, sample_loss
        As in `Attacked`, but it cannot be a loss of regression.
    weight : float
        Weight of the last term.

    References
    ----------
    Wang et al., Improving adversarial robustness requires revisiting misclassified examples,
    ICLR 2020.
    """

    only_classes = "it needs the probabilities of classes; 'trades' is nearest to it"

    def __init__(self, ball, weight=5.0, attack=None, mode="eval", sample_loss=None):
        super().__init__(ball, attack, mode, sample_loss)
        self.weight = weight

    def loss(self, model, x, points, y):
        """Return the mean of the formula over the batch."""
        clean, attacked = model(x), model(points)
        (p, labels), (q, _) = log_probabilities(clean, y), log_probabilities(attacked, y)
        own = labels[:, None]
        rival = q.detach().scatter(1, own, -torch.inf).argmax(dim=1, keepdim=True)
        # 1 - p_c is the sum of the other probabilities, which needs no subtraction.
        without_rival = torch.logsumexp(q.scatter(1, rival, -torch.inf), dim=1)
        boosted = -q.gather(1, own)[:, 0] - without_rival
        unsure = 1.0 - p.gather(1, own)[:, 0].exp()
        loss = self.mean(boosted + self.weight * divergence(p, q) * unsure)
        return loss, {"accuracy": accuracy(attacked, y)}
