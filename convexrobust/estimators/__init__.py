"""Scikit-learn estimators: validate, choose patterns, solve, recover, predict."""

from convexrobust.estimators.classifier import ConvexRobustClassifier
from convexrobust.estimators.path import RegularizationPath, largest_beta, regularization_path
from convexrobust.estimators.regressor import ConvexRobustRegressor
from convexrobust.estimators.search import RegularizationPathCV

__all__ = [
    "ConvexRobustClassifier",
    "ConvexRobustRegressor",
    "RegularizationPath",
    "RegularizationPathCV",
    "largest_beta",
    "regularization_path",
]
