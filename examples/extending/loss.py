"""A loss: the sum of the hinges of all rivals, after Weston and Watkins (ESANN, 1999).

For margins :math:`m_e = f_y(x) - f_e(x)` against each other class e it is
:math:`\\sum_e (1 - m_e)_+`. It is no function of the smallest margin alone, so its kind is "other":
solvers that need more refuse it, and `convexrobust.ConicSolver` takes it.
"""

from dataclasses import dataclass

import numpy as np

from convexrobust.losses import MarginLoss


@dataclass(frozen=True)
class SumOfHinges(MarginLoss):
    """The sum over the rivals of what their margins lack to 1."""

    smoothness = np.inf
    largest_multiplier = np.inf  # of all margins of a sample together
    margin_limits = 1.0  # of each

    def value(self, xp, margins):
        """Return the loss of each sample; margins (n, E) gives shape (n,)."""
        return xp.row_sum(xp.pos(1.0 - margins))

    def conjugate(self, multipliers):
        """Return what -a'm - value(m) is at most over m, for each row a in [0, 1]^E."""
        return -multipliers.sum(axis=1)

    def multipliers(self, margins):
        """Return minus a subgradient: 1 for each margin below 1."""
        return np.where(margins < 1.0, 1.0, 0.0)
