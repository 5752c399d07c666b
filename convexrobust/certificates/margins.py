r"""Margins as differences of outputs.

The *margin* of a sample is :math:`y f(x)` with one output and labels -1 / +1, and the smallest
:math:`f_y(x) - f_c(x)` over the rivals c with several: the smallest :math:`r'f(x)` over some
directions r in the space of outputs.
"""

from __future__ import annotations

import numpy as np

from convexrobust.backends import numpy as numpy_backend

_PULLS, _HALVINGS = 10, 30  # of an adversarial point towards its sample
_OVERSHOOTS = (1.0 + 1e-9, 1.0 + 1e-4, 1.01)  # beyond the boundary, in search of its other side


def rows_by_label(network, y, n) -> list:
    """Return each label with its rows, making sure that the labels fit the network.

    Raises
    ------
    ValueError
        For labels that the network's outputs do not stand for.
    """
    y, n_outputs = np.asarray(y), network.n_outputs
    legal = [-1, 1] if n_outputs == 1 else list(range(n_outputs))
    if y.shape != (n,) or not np.isin(y, legal).all():
        raise ValueError(
            f"y must have shape ({n},) and hold only {legal} for this network, got shape {y.shape} "
            f"with {np.unique(y)[:5]}."
        )
    return [(label, np.flatnonzero(y == label)) for label in np.unique(y).astype(int)]


def directions_of_label(network, label) -> np.ndarray:
    """Return the directions (E, C) of the margin of a label."""
    identity = np.eye(network.n_outputs)
    if network.n_outputs == 1:
        return label * identity
    return identity[label] - identity[np.arange(network.n_outputs) != label]


def margin_directions(network, y, n) -> np.ndarray:
    """Return the directions (n, E, C) of the margins of the labels y (n,)."""
    groups = rows_by_label(network, y, n)
    directions = np.zeros((n, max(network.n_outputs - 1, 1), network.n_outputs))
    for label, rows in groups:
        directions[rows] = directions_of_label(network, label)
    return directions


def smallest(network, X, directions) -> np.ndarray:
    """Return the smallest output (n,) of the network over each row's directions (n, E, C)."""
    return np.einsum("nec,nc->ne", directions, network.predict(X)).min(axis=1)


def nearer(network, X, X_adv, directions, ball) -> np.ndarray:
    """Return adversarial points (n, d) at most as far from X as those given.

    They are pulled in to the decision boundary, then moved along it to the point that is nearest
    if the network is linear there, as long as that helps (compare DeepFool, arXiv 1511.04599).
    """
    best, (lo, hi) = np.array(X_adv), ball.feature_range(X.shape[1])
    for _ in range(_PULLS):
        best = _pulled_in(network, X, best, directions)
        outputs = np.einsum("nec,nc->ne", directions, network.predict(best))
        lowest = directions[np.arange(len(X)), outputs.argmin(axis=1)]
        downhill = -network.gradient(best, lowest)
        steepest = ball.steepest(numpy_backend, downhill)
        rise = np.sum(downhill * (best - X), axis=1)
        slope = np.sum(downhill * steepest, axis=1)
        reach = np.where(slope > 0.0, rise / np.where(slope > 0.0, slope, 1.0), 0.0)
        length, improved = ball.length(best - X), np.zeros(len(X), dtype=bool)
        for overshoot in _OVERSHOOTS:
            points = np.clip(X + (overshoot * reach)[:, None] * steepest, lo, hi)
            better = ball.length(points - X) < length
            better &= ~improved & (smallest(network, points, directions) <= 0.0)
            best[better], improved = points[better], improved | better
        if not improved.any():
            break
    return best


def _pulled_in(network, X, X_adv, directions):
    """Return the first misclassified points found on the ways from X to X_adv, by bisection."""
    near, far = np.zeros((len(X), 1)), np.ones((len(X), 1))
    for _ in range(_HALVINGS):
        middle = (near + far) / 2.0
        points = X + middle * (X_adv - X)
        wrong = (smallest(network, points, directions) <= 0.0)[:, None]
        near, far = np.where(wrong, near, middle), np.where(wrong, middle, far)
    return np.where(far < 1.0, X + far * (X_adv - X), X_adv)
