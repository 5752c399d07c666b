"""What attacks on a two-layer network increase, with its gradient in closed form (NumPy)."""

from __future__ import annotations

from functools import partial

import numpy as np


def worst_margin_objective(network, y, *, task="classification"):
    r"""Return the loss and gradient that attacks on a two-layer network increase (NumPy).

    The loss is minus the smallest margin, a decreasing function of which every loss of
    `convexrobust.losses` is (cross-entropy of several classes nearly): :math:`-y f(x)` with one
    output, :math:`\max_{c \ne y} f_c(x) - f_y(x)` with several, so that a row is misclassified
    where it is above 0, and :math:`|f(x) - y|` for regression. Unlike a hinge, it has a slope
    also where the margin is large.

    Parameters
    ----------
    network : TwoLayerReLU
        The network.
    y : array of shape (n,)
        Labels -1 / +1 with one output, class numbers 0 .. C-1 with several; targets if regression.
    task : {"classification", "regression"}
        Which margins are meant.

    Returns
    -------
    callable
        From X (n, n_features) to the losses (n,) and their gradients (n, n_features).

    Raises
    ------
    ValueError
        If the labels do not fit the outputs.
    """
    y = np.asarray(y)
    if task not in ("classification", "regression"):
        raise ValueError(f"task must be 'classification' or 'regression', got {task!r}.")
    if task == "regression":
        if network.n_outputs != 1:
            raise ValueError("a network for regression must have one output.")
        return partial(_residual, network, y.astype(np.float64))
    legal = [-1, 1] if network.n_outputs == 1 else list(range(network.n_outputs))
    if not np.isin(y, legal).all():
        raise ValueError(f"y must hold only {legal} for this network, got {np.unique(y)[:5]}.")
    if network.n_outputs == 1:
        return partial(_signed_output, network, y.astype(np.float64))
    return partial(_largest_rival, network, y.astype(np.intp))


def _signed_output(network, y, X):
    return -y * network.predict(X)[:, 0], network.gradient(X, -y[:, None])


def _residual(network, y, X):
    residual = network.predict(X)[:, 0] - y
    return np.abs(residual), network.gradient(X, np.sign(residual)[:, None])


def _largest_rival(network, y, X):
    outputs, rows = network.predict(X), np.arange(len(y))
    rivals = outputs.copy()
    rivals[rows, y] = -np.inf
    rival = rivals.argmax(axis=1)
    identity = np.eye(network.n_outputs)
    loss = outputs[rows, rival] - outputs[rows, y]
    return loss, network.gradient(X, identity[rival] - identity[y])
