"""Convex training of two-layer ReLU networks with proven adversarial robustness."""

from __future__ import annotations

from convexrobust.estimators import ConvexRobustClassifier, ConvexRobustRegressor
from convexrobust.losses import (
    Absolute,
    EpsilonInsensitive,
    Hinge,
    Logistic,
    Squared,
    SquaredHinge,
)
from convexrobust.network import TwoLayerReLU
from convexrobust.patterns import (
    count_patterns,
    enumerate_patterns,
    patterns_of,
    required_patterns,
    sample_patterns,
)
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram, Solution
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import ConicSolver, SolverError, default_solver

__version__ = "0.1.0"

__all__ = [
    "Absolute",
    "ConicSolver",
    "ConvexProgram",
    "ConvexRobustClassifier",
    "ConvexRobustRegressor",
    "EpsilonInsensitive",
    "GroupLasso",
    "Hinge",
    "Logistic",
    "LpBall",
    "Solution",
    "SolverError",
    "Squared",
    "SquaredHinge",
    "TwoLayerReLU",
    "count_patterns",
    "default_solver",
    "enumerate_patterns",
    "patterns_of",
    "required_patterns",
    "sample_patterns",
]
