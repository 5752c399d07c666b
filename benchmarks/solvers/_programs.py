"""The programs that the solvers are compared on: data sets times objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from sklearn.datasets import load_breast_cancer, load_digits

from convexrobust import ConvexProgram, GroupLasso, Hinge, LpBall, Squared, sample_patterns
from convexrobust.losses import Loss


@dataclass(frozen=True)
class DataSet:
    """Features with the constant 1 last, labels -1 / +1, and a number of patterns."""

    load: Callable[[], tuple[np.ndarray, np.ndarray]]
    n_patterns: int
    nominal_only: bool = False


@dataclass(frozen=True)
class Objective:
    """What is minimised; without a beta it is 1 % of the smallest one with a zero optimum."""

    formulation: str
    loss: Loss
    epsilon: float
    beta: float | None


def synthetic(n, d):
    """Return Gaussian features labelled by the sign of a product, as in conic_compilation.py."""
    rng = np.random.default_rng(0)
    X = np.hstack([rng.normal(size=(n, d)), np.ones((n, 1))])
    return X, np.where(X[:, 0] * X[:, 1] + 0.5 * X[:, 2] > 0, 1, -1)


def standardised(X, positive):
    """Return standardised features without constant ones, the intercept, and labels -1 / +1."""
    X = X[:, X.std(axis=0) > 0]
    X = (X - X.mean(axis=0)) / X.std(axis=0)
    return np.hstack([X, np.ones((len(X), 1))]), np.where(positive, 1, -1)


def breast_cancer():
    X, y = load_breast_cancer(return_X_y=True)
    return standardised(X, y == 1)


def digits():
    X, y = load_digits(return_X_y=True)
    used = np.isin(y, (3, 8))
    return standardised(X[used], y[used] == 8)


DATA = {
    "synthetic N=200 d=20 P=30": DataSet(lambda: synthetic(200, 20), 30),
    "synthetic N=500 d=20 P=50": DataSet(lambda: synthetic(500, 20), 50),
    "breast cancer P=50": DataSet(breast_cancer, 50),
    "breast cancer P=500": DataSet(breast_cancer, 500, nominal_only=True),
    "digits 3 v 8 P=50": DataSet(digits, 50),
}
SMOKE_DATA = {"smoke N=40 d=4 P=5": DataSet(lambda: synthetic(40, 4), 5)}
OBJECTIVES = {
    "soft hinge": Objective("soft", Hinge(), 0.1, 1e-3),
    "hard hinge": Objective("hard", Hinge(), 0.05, 1e-3),
    "nominal squared": Objective("hard", Squared(), 0.0, None),
}


def named(name) -> ConvexProgram:
    """Return the program called 'DATA SET, OBJECTIVE'."""
    data_name, objective_name = name.split(", ")
    data, objective = (DATA | SMOKE_DATA)[data_name], OBJECTIVES[objective_name]
    X, y = data.load()
    D = sample_patterns(X, data.n_patterns, random_state=0)
    beta = 0.01 * zero_beta(X, y, D) if objective.beta is None else objective.beta
    ball = LpBall(np.inf, objective.epsilon)
    return ConvexProgram(
        X, y, D, objective.loss, GroupLasso(beta), ball, formulation=objective.formulation
    )


def zero_beta(X, y, D) -> float:
    """Return the smallest beta at which the nominal hard squared-loss program is solved by 0.

    That is the longest projection of a gradient at 0 on its cone {u : S_i X u >= 0}, and the length
    of a projection is the distance from the polar cone: non-negative least squares.
    """
    gradients, signs = X.T @ (D * y[:, None]) / len(y), 2.0 * D - 1.0
    return max(
        nnls(X.T * signs[:, i], side * gradients[:, i])[1]
        for i in range(D.shape[1])
        for side in (-1.0, 1.0)
    )
