"""The regressor."""

from __future__ import annotations

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.callback import with_callbacks
from sklearn.metrics import r2_score
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from convexrobust import attacks, certificates
from convexrobust.estimators.base import ConvexRobustEstimator, check_method
from convexrobust.estimators.problem import Problem
from convexrobust.losses import Squared


class ConvexRobustRegressor(RegressorMixin, ConvexRobustEstimator):
    r"""Two-layer ReLU regression, trained adversarially by convex optimisation.

    Minimises a certified bound of the mean worst-case loss over all perturbations of the training
    points, plus weight decay; see `ConvexRobustClassifier`, whose parameters and attributes these
    are. The mean of y becomes the network's output bias; for `Pinball` and `Huber` it is the best
    constant prediction, the quantile and Huber's estimate of location.

    Parameters
    ----------
    epsilon : float or array of shape (n_features,), default=0.1
        Radius of the perturbations in units of X, one or one per feature (0 = immutable).
    norm : {1, 2, numpy.inf} or {"l1", "l2", "linf"}, default=numpy.inf
        Norm of the perturbations.
    beta : float, default=1e-3
        Weight decay.
    loss : Loss, optional
        `Squared` (default), `Absolute`, `EpsilonInsensitive`, `Huber` or `Pinball` of
        `convexrobust.losses`.
    formulation : {"soft", "one-sided", "hard", "exchange"}, default="soft"
        Treatment of the robust cones, where "one-sided" is the same as "hard" here; "exchange"
        trains on worst perturbations, see `convexrobust.Exchange`.
    n_patterns : int, optional
        Activation patterns to sample. By default they are generated, see ``solver``, or sampled
        where that is not so: 4 to 50, fewer for more features.
    solver : Solver, optional
        As in `ConvexRobustClassifier`. By default `convexrobust.default_solver` chooses one for the
        size; with the soft formulation, and neither ``n_patterns`` nor ``patterns``, a
        `convexrobust.WorkingSet` around it generates the patterns, to a gap of 1e-2 of the
        objective of the zero network (1e-3 if epsilon is 0).
    bounds : tuple (lo, hi), optional
        Legal range of the features.
    fit_intercept : bool, default=True
        Give the neurons a bias and the network an output bias.
    patterns : str or array of shape (n, P), optional
        Where patterns come from: a sampler, or the 0/1 matrix for the rows of X.
    warm_start : bool, default=False
        Add the patterns of the previous fit's network and start from it.
    random_state : int, RandomState or None
        Seed of the sampler, and of what generates patterns or attacks.

    Attributes
    ----------
    network_, solution_, patterns_, objective_, lower_bound_, gap_, n_iter_, solver_
        As of `ConvexRobustClassifier`.
    """

    @with_callbacks
    def fit(self, X, y, sample_weight=None):
        """Train the network; see `ConvexRobustClassifier.fit`."""
        return self._fit(X, y, sample_weight)

    def _problem(self, X, y, sample_weight=None) -> Problem:
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        y = y.astype(np.float64)
        loss = self._checked_parameters(Squared(), "regression")
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        offset = loss.location(y, weight) if self.fit_intercept else 0.0
        program = self._program(X, y - offset, weight, loss, 1)
        return Problem([program], offset=np.array([offset]))

    def predict(self, X):
        """Return the predictions, shape (n,)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return self.network_.predict(X)[:, 0]

    def predict_interval(self, X, epsilon=None, method="interval"):
        """Return a certified lower and upper end (n,) of the predictions under perturbation.

        ``method`` is one of `convexrobust.certificates.output_interval`; "exact" is the sharpest.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        lo, hi = certificates.output_interval(self.network_, X, self._ball(epsilon), method)
        return lo[:, 0], hi[:, 0]

    def robust_score(self, X, y, epsilon=None, method="certified", sample_weight=None):
        r"""Return the coefficient of determination for the worst residuals under perturbation.

        It is :math:`R^2` with every residual replaced by the largest that a perturbation can
        cause: bounded from above ("certified"), reached by an attack, or exact.
        """
        check_is_fitted(self)
        check_method(method)
        X, y = validate_data(self, X, y, reset=False, dtype=np.float64, y_numeric=True)
        residual = self._worst_residual(X, y, self._ball(epsilon), method)
        return float(r2_score(y, y + residual, sample_weight=sample_weight))

    def _worst_residual(self, X, y, ball, method):
        if method == "attack":
            objective = attacks.worst_margin_objective(self.network_, y, task="regression")
            X_adv = attacks.pgd(objective, X, ball, n_restarts=5, random_state=0)
            return objective(X_adv)[0]
        how = "interval" if method == "certified" else "exact"
        lo, hi = certificates.output_interval(self.network_, X, ball, how)
        return np.maximum(hi[:, 0] - y, y - lo[:, 0])
