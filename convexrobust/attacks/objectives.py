"""What attacks on a two-layer network increase, with its gradient in closed form (NumPy)."""

from __future__ import annotations

from functools import partial

import numpy as np


def worst_margin_objective(network, y, *, task="classification", scales=1.0):
    r"""Return the loss and gradient that attacks on a two-layer network increase (NumPy).

    The loss is minus the smallest margin, a decreasing function of which every loss of
    `convexrobust.losses` is (cross-entropy of several classes nearly): :math:`-y f(x)` with one
    output, :math:`\max_{c \ne y} f_c(x) - f_y(x)` with several, so that a row is misclassified
    where it is above 0, and :math:`|f(x) - y|` for regression. Unlike a hinge, it has a slope
    also where the margin is large. Where a regression loss scales its margins y - f(x) and
    f(x) - y, as `Pinball` does, the larger of the two scaled residuals takes the place of the last.

    Parameters
    ----------
    network : TwoLayerReLU
        The network.
    y : array of shape (n,)
        Labels -1 / +1 with one output, class numbers 0 .. C-1 with several; targets if regression.
    task : {"classification", "regression"}
        Which margins are meant.
    scales : float or tuple of two floats
        Of regression: the ``margin_scales`` of the loss.

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
        over, under = np.broadcast_to(np.asarray(scales, dtype=np.float64), 2)
        return partial(_residual, network, y.astype(np.float64), over, under)
    legal = [-1, 1] if network.n_outputs == 1 else list(range(network.n_outputs))
    if not np.isin(y, legal).all():
        raise ValueError(f"y must hold only {legal} for this network, got {np.unique(y)[:5]}.")
    if network.n_outputs == 1:
        return partial(_signed_output, network, y.astype(np.float64))
    return partial(_largest_rival, network, y.astype(np.intp))


def _signed_output(network, y, X):
    return -y * network.predict(X)[:, 0], network.gradient(X, -y[:, None])


def _residual(network, y, over, under, X):
    residual = network.predict(X)[:, 0] - y
    slope = np.sign(residual) * np.where(residual > 0.0, over, under)
    return slope * residual, network.gradient(X, slope[:, None])


def _largest_rival(network, y, X):
    outputs, rows = network.predict(X), np.arange(len(y))
    rivals = outputs.copy()
    rivals[rows, y] = -np.inf
    rival = rivals.argmax(axis=1)
    identity = np.eye(network.n_outputs)
    loss = outputs[rows, rival] - outputs[rows, y]
    return loss, network.gradient(X, identity[rival] - identity[y])
