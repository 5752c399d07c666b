"""Scikit-learn estimators: validate, choose patterns, solve, recover, predict."""

from convexrobust.estimators.classifier import ConvexRobustClassifier
from convexrobust.estimators.path import RegularizationPath, largest_beta, regularization_path
from convexrobust.estimators.regressor import ConvexRobustRegressor

__all__ = [
    "ConvexRobustClassifier",
    "ConvexRobustRegressor",
    "RegularizationPath",
    "largest_beta",
    "regularization_path",
]
