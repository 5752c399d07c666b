"""Points that lie in the sets of two samples with different targets: no model is right there."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from convexrobust.backends import numpy as numpy_backend

_METRICS = {1: "cityblock", 2: "euclidean", np.inf: "chebyshev"}
_FIXED = 1e-100  # in place of epsilon 0: any difference is too far
_MOST_PAIRED = 1000  # samples: an assignment takes seconds then


def conflicts(program) -> tuple[np.ndarray, np.ndarray, float]:
    r"""Return points that two samples have in common, whose they are, and what they cost any model.

    At a point in the sets of samples i and j the two losses add up to at least l_ij, what no output
    can avoid. An assignment with each sample in two pairs at most gives the bound
    sum min(w_i, w_j) / 2 l_ij (following Bhagoji et al., arXiv 1909.12272).
    """
    X, y, n = program.X, np.asarray(program.y), len(program.X)
    d = X.shape[1] - program.intercept
    if program.sets.unperturbed or n > _MOST_PAIRED:
        return X[:0], np.arange(0), 0.0
    scaled = X[:, :d] / np.maximum(program.perturbation.epsilons(d), _FIXED)
    distances = cdist(scaled, scaled, _METRICS[program.perturbation.p])
    i, j = np.nonzero((distances < 2.0 * (1.0 - 1e-9)) & (y[:, None] != y))
    costs = np.zeros((n, n))
    costs[i, j] = _unavoidable(program.loss, np.abs(y[i] - y[j])) / 2.0
    costs *= np.minimum(program.weight[:, None], program.weight)
    i, j = linear_sum_assignment(costs, maximize=True)
    i, j = np.column_stack([i, j])[costs[i, j] > 0.0].T
    middle = (X[i] + X[j]) / 2.0
    return np.vstack([middle, middle]), np.append(i, j), (1.0 - 1e-12) * costs[i, j].sum()


def _unavoidable(loss, distances) -> np.ndarray:
    """Return a lower bound on the two losses together of any output, for targets so far apart.

    Two labels at odds lose most equally at a margin of 0, by convexity. Two targets pull at the
    output in the middle; the larger pull is lessened to the smaller one, so that both cancel, and
    the conjugates bound the losses from below. That is sharp for the losses of
    `convexrobust.losses`.
    """
    if loss.task == "classification":
        alike = np.ptp(loss.margin_scales) == 0.0  # else a margin of 0 need not be the best
        return 2.0 * alike * loss.value(numpy_backend, np.zeros((len(distances), 1)))
    scales = np.broadcast_to(loss.margin_scales, 2)
    both = np.zeros(len(distances))
    ways = np.array([[0.5, -0.5], [-0.5, 0.5]])  # the target above, the one below
    margins = [scales * way * distances[:, None] for way in ways]
    multipliers = [loss.multipliers(m) for m in margins]
    towards = [-2.0 * a @ (scales * way) for a, way in zip(multipliers, ways, strict=True)]
    pulls = np.maximum(towards, 0.0)
    for m, a, pull in zip(margins, multipliers, pulls, strict=True):
        a = a * np.divide(pulls.min(axis=0), pull, out=0.0 * pull, where=pull > 0.0)[:, None]
        both -= np.sum(a * m, axis=1) + loss.conjugate(a)
    return both
