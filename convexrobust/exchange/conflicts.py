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

    At a point in the sets of samples i and j the two losses add up to at least l_ij, twice the loss
    of the output in the middle, by convexity. An assignment with each sample in two pairs at most
    gives the bound sum min(w_i, w_j) / 2 l_ij (following Bhagoji et al., arXiv 1909.12272).
    """
    X, y, n = program.X, np.asarray(program.y), len(program.X)
    d = X.shape[1] - program.intercept
    if program.sets.unperturbed or n > _MOST_PAIRED:
        return X[:0], np.arange(0), 0.0
    scaled = X[:, :d] / np.maximum(program.perturbation.epsilons(d), _FIXED)
    distances = cdist(scaled, scaled, _METRICS[program.perturbation.p])
    i, j = np.nonzero((distances < 2.0 * (1.0 - 1e-9)) & (y[:, None] != y))
    halves = np.abs(y[i] - y[j])[:, None] / 2.0
    margins = 0.0 * halves if program.loss.task == "classification" else [-1.0, 1.0] * halves
    costs = np.zeros((n, n))
    costs[i, j] = program.loss.value(numpy_backend, margins)
    costs *= np.minimum(program.weight[:, None], program.weight)
    i, j = linear_sum_assignment(costs, maximize=True)
    i, j = np.column_stack([i, j])[costs[i, j] > 0.0].T
    middle = (X[i] + X[j]) / 2.0
    return np.vstack([middle, middle]), np.append(i, j), (1.0 - 1e-12) * costs[i, j].sum()
