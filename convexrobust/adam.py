"""Gradient steps whose lengths follow the gradients met before."""

from __future__ import annotations

import numpy as np

_FLOOR = 1e-12  # below it a root mean square counts as this much


class Adam:
    r"""Adam, on a list of arrays.

    .. math:: m \leftarrow m + (1 - \beta_1) (g - m), \qquad
              s \leftarrow s + (1 - \beta_2) (g^2 - s), \qquad
              w \leftarrow w - \eta\, \frac{m / (1 - \beta_1^k)}{\sqrt{s / (1 - \beta_2^k)} + \tau}

    in the k-th step along gradients g, entry by entry.

    Parameters
    ----------
    weights : list of ndarray
        What will be moved; only the shapes are read.
    decays : tuple of float
        :math:`\beta_1` and :math:`\beta_2`, in [0, 1).
    floor : float
        :math:`\tau > 0`, for entries whose gradients are all 0.

    References
    ----------
    Kingma and Ba, arXiv 1412.6980.
    """

    def __init__(self, weights, decays=(0.9, 0.999), floor=_FLOOR):
        self.decays, self.floor, self.n_steps = decays, floor, 0
        self.mean = [np.zeros_like(w) for w in weights]
        self.square = [np.zeros_like(w) for w in weights]

    def step(self, weights, gradients, rate) -> list[np.ndarray]:
        r"""Return the weights after one step.

        Parameters
        ----------
        weights, gradients : list of ndarray
            Of the shapes given to the constructor.
        rate : float or ndarray
            :math:`\eta`, one for all entries or one each; a negative one climbs.
        """
        self.n_steps += 1
        of_mean, of_square = self.decays
        moved = []
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            self.mean[i] += (1.0 - of_mean) * (g - self.mean[i])
            self.square[i] += (1.0 - of_square) * (g * g - self.square[i])
            mean = self.mean[i] / (1.0 - of_mean**self.n_steps)
            square = self.square[i] / (1.0 - of_square**self.n_steps)
            moved.append(w - rate * mean / (np.sqrt(square) + self.floor))
        return moved
