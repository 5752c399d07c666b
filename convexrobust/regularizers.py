r"""Weight decay, as it looks in the convex space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroupLasso:
    r"""The sum of column norms, :math:`\beta \sum_i \|u_i\|_2`.

    It is the image of weight decay :math:`\tfrac{\beta}{2} \sum_j (\|u_j\|^2 + \alpha_j^2)` on the
    balanced network (following Pilanci and Ergen, arXiv 2002.10553, and Neyshabur et al.).

    Parameters
    ----------
    beta : float
        Strength, at least 0.
    """

    beta: float

    def __post_init__(self):
        if not (np.isscalar(self.beta) and np.isfinite(self.beta) and self.beta >= 0.0):
            raise ValueError(f"beta must be a finite number >= 0, got {self.beta!r}.")

    def value(self, xp, U, beta=None):
        """Return the penalty of the columns of U (d, P); ``beta`` overrides the strength."""
        return (self.beta if beta is None else beta) * xp.sum(xp.norm(U, 2, axis=0))

    def prox(self, xp, U, step):
        r"""Return the proximal point of ``step`` times the penalty.

        .. math:: \arg\min_Z\ \tfrac12 \|Z - U\|_F^2 + \text{step} \cdot \beta \sum_i \|z_i\|_2


        Each column is shrunk towards 0 by ``step * beta`` and is 0 where it is shorter than that.
        """
        lengths = xp.norm(U, 2, axis=0)
        shrunk = xp.pos(lengths - step * self.beta)
        return U * (shrunk / xp.where(lengths > 0.0, lengths, 1.0))
