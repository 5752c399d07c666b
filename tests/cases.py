"""The small problems that several test modules share."""

import numpy as np

from convexrobust.losses import (
    Absolute,
    EpsilonInsensitive,
    Hinge,
    Huber,
    Logistic,
    Pinball,
    Squared,
    SquaredHinge,
)
from convexrobust.patterns import enumerate_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso

MARGIN_LOSSES = [Hinge(), SquaredHinge(), Logistic()]
RESIDUAL_LOSSES = [Squared(), Absolute(), EpsilonInsensitive(0.05), Pinball(0.8), Huber(0.3)]
LOSSES = MARGIN_LOSSES + RESIDUAL_LOSSES

N_FEATURES = 2
BALLS = [
    LpBall(1, 0.15),
    LpBall(2, 0.15),
    LpBall(np.inf, 0.15),
    LpBall(np.inf, np.array([0.2, 0.0])),
    LpBall(2, np.array([0.05, 0.2])),
    LpBall(np.inf, 0.15, bounds=(-1.3, 1.2)),
]


def name(value):
    """Return a short test id of a loss, a ball or anything else."""
    if isinstance(value, LpBall):
        shape = "per-feature" if np.ndim(value.epsilon) else "scalar"
        return f"l{value.p}-{shape}{'-bounds' if value.bounds else ''}"
    return type(value).__name__ if type(value).__module__.startswith("convexrobust") else str(value)


def small_data(task="classification", n_classes=2, n=9, seed=0):
    """Return X (n, 3) with an intercept column, and targets with every class in them."""
    rng = np.random.default_rng(seed)
    X = np.clip(rng.normal(size=(n, N_FEATURES)), -1.2, 1.1)
    if task == "regression":
        y = X[:, 0] ** 2 - X[:, 1] + 0.1 * rng.normal(size=n)
    elif n_classes == 2:
        y = np.where(X[:, 0] * X[:, 1] + 0.3 * X[:, 0] > 0, 1, -1)
        y[:2] = 1, -1
    else:
        y = np.arange(n) % n_classes
    return np.hstack([X, np.ones((n, 1))]), y


def small_program(loss, ball, formulation="soft", *, n_classes=2, beta=0.02, seed=0, D=None, n=9):
    """Return a program on `small_data`, by default with all its patterns."""
    X, y = small_data(loss.task, n_classes, n, seed)
    return ConvexProgram(
        X,
        y,
        enumerate_patterns(X) if D is None else D,
        loss,
        GroupLasso(beta),
        ball,
        formulation,
        n_outputs=n_classes if n_classes > 2 else 1,
    )
