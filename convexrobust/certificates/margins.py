r"""Margins as differences of outputs.

The *margin* of a sample is :math:`y f(x)` with one output and labels -1 / +1, and the smallest
:math:`f_y(x) - f_c(x)` over the rivals c with several: the smallest :math:`r'f(x)` over some
directions r in the space of outputs.
"""

from __future__ import annotations

import numpy as np


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
