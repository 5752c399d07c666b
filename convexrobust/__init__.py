"""Convex training of two-layer ReLU networks with proven adversarial robustness."""

from __future__ import annotations

from convexrobust.certificates import certify, exact_radius
from convexrobust.conversion import as_network
from convexrobust.environment import versions
from convexrobust.estimators import (
    ConvexRobustClassifier,
    ConvexRobustRegressor,
    RegularizationPath,
    RegularizationPathCV,
    largest_beta,
    regularization_path,
)
from convexrobust.exchange import Exchange, ExchangeSolution
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
from convexrobust.network import TwoLayerReLU
from convexrobust.patterns import (
    count_patterns,
    enumerate_patterns,
    patterns_of,
    required_patterns,
    sample_patterns,
)
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram, Solution, Status
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import (
    ConicSolver,
    InteriorPoint,
    SolverError,
    WorkingSet,
    default_solver,
)

__version__ = "0.1.0"

__all__ = [
    "Absolute",
    "ConicSolver",
    "ConvexProgram",
    "ConvexRobustClassifier",
    "ConvexRobustRegressor",
    "EpsilonInsensitive",
    "Exchange",
    "ExchangeSolution",
    "GroupLasso",
    "Hinge",
    "Huber",
    "InteriorPoint",
    "Logistic",
    "LpBall",
    "Pinball",
    "RegularizationPath",
    "RegularizationPathCV",
    "Solution",
    "SolverError",
    "Squared",
    "SquaredHinge",
    "Status",
    "TwoLayerReLU",
    "WorkingSet",
    "as_network",
    "certify",
    "count_patterns",
    "default_solver",
    "enumerate_patterns",
    "exact_radius",
    "largest_beta",
    "patterns_of",
    "regularization_path",
    "required_patterns",
    "sample_patterns",
    "versions",
]
