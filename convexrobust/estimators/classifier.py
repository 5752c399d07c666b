"""The classifier."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.special import expit, softmax
from sklearn.base import ClassifierMixin
from sklearn.callback import with_callbacks
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from convexrobust import attacks, certificates
from convexrobust.estimators.base import (
    ConvexRobustEstimator,
    check_method,
    warn_undecided,
)
from convexrobust.estimators.problem import Problem
from convexrobust.losses import Hinge, Logistic

_MULTI_CLASS = ("joint", "ovr")


class ConvexRobustClassifier(ClassifierMixin, ConvexRobustEstimator):
    r"""Two-layer ReLU network, trained adversarially by convex optimisation.

    Minimises a certified bound of the mean worst-case loss over all perturbations of the training
    points, plus weight decay, over all networks whose neurons have one of the activation patterns
    used. The problem is convex: its optimum is global over these networks and comes with a lower
    bound that proves it.

    Parameters
    ----------
    epsilon : float or array of shape (n_features,), default=0.1
        Radius of the perturbations in units of X, one or one per feature (0 = immutable).
        0 trains without perturbations.
    norm : {1, 2, numpy.inf} or {"l1", "l2", "linf"}, default=numpy.inf
        Norm of the perturbations.
    beta : float, default=1e-3
        Weight decay.
    loss : Loss, optional
        `Hinge` (default), `SquaredHinge` or `Logistic` of `convexrobust.losses`.
    formulation : {"soft", "one-sided", "hard", "exchange"}, default="soft"
        "soft" bounds the worst case by slacks and is always feasible; "hard" is the published
        program, whose neurons may not change sign on any ball; "one-sided" lies between.
        "exchange" trains on worst perturbations instead of a bound, by `convexrobust.Exchange`
        with growing patterns; they are exact for up to 200 rows, else found by an attack.
    n_patterns : int, optional
        Activation patterns to sample. By default they are generated, see ``solver``, or sampled
        where that is not so: 4 to 50, fewer for more features and classes.
    solver : Solver, optional
        Solves the convex programs, under "exchange" those on the copies (or is itself a
        `convexrobust.Exchange`, with a time limit for instance). By default
        `convexrobust.default_solver` chooses one for the size; with the soft formulation, and
        neither ``n_patterns`` nor ``patterns``, a `convexrobust.WorkingSet` around it generates
        the patterns, to a gap of 1e-2 of the objective of the zero network (1e-3 if epsilon is 0
        and there are two classes).
    bounds : tuple (lo, hi), optional
        Legal range of the features, numbers or arrays of shape (n_features,).
    fit_intercept : bool, default=True
        Give the neurons a bias. It is never perturbed.
    patterns : str or array of shape (n, P), optional
        Where patterns come from: the name of a sampler ("gaussian", "data", "means", "pca"; see
        `convexrobust.patterns.sample_patterns`), or the 0/1 matrix itself, for the rows of X. By
        default they are generated where ``solver`` says so, else "gaussian".
    warm_start : bool, default=False
        Add the patterns of the previous fit, so that the objective improves on that of its network
        up to the solver's tolerance, and start from there.
    multi_class : {"joint", "ovr"}, default="joint"
        More than two classes: one program with certified pairwise margins, or one binary program
        for each class over shared patterns.
    random_state : int, RandomState or None
        Seed of the sampler, and of what generates patterns or attacks.

    Attributes
    ----------
    classes_ : ndarray
        Class labels.
    network_ : TwoLayerReLU
        The network.
    solution_ : Solution
        The convex solution, with its patterns ``solution_.D`` and, in
        ``solution_.lower_bound_scope``, what the lower bound is about; under "exchange" a
        `convexrobust.ExchangeSolution` (unless ``multi_class="ovr"`` joins several).
    patterns_ : ndarray of shape (n_rows, P)
        The patterns used, ``solution_.D``, for the distinct rows of X (for all of them where
        ``patterns`` is a matrix); under "exchange" those of the network's neurons.
    objective_ : float
        Worst-case objective: a valid upper bound of the network's on the training data.
    lower_bound_ : float
        Valid lower bound on the optimum over the patterns used; under "exchange" over those at the
        copies of the last round.
    gap_ : float
        ``objective_ - lower_bound_``.
    n_iter_ : int
        Iterations of the solver, or rounds of exchange.
    solver_ : Solver
        The solver used.

    Notes
    -----
    Equal rows are merged and rows of weight 0 dropped before anything else, so that integer
    weights and repeated rows give the same network.

    References
    ----------
    Bai, Gautam, Gai, Sojoudi, arXiv 2105.12237. Pilanci, Ergen, arXiv 2002.10553.

    Examples
    --------
    >>> from sklearn.datasets import load_breast_cancer
    >>> from sklearn.preprocessing import scale
    >>> from convexrobust import ConvexRobustClassifier
    >>> X, y = load_breast_cancer(return_X_y=True)
    >>> model = ConvexRobustClassifier(epsilon=0.2, beta=1e-2, random_state=0)
    >>> model = model.fit(scale(X)[:100], y[:100])
    >>> model.robust_score(scale(X)[100:], y[100:]) > 0.7  # proven, not attacked
    True
    """

    def __init__(
        self,
        epsilon=0.1,
        norm=np.inf,
        beta=1e-3,
        loss=None,
        formulation="soft",
        n_patterns=None,
        solver=None,
        bounds=None,
        fit_intercept=True,
        patterns=None,
        warm_start=False,
        multi_class="joint",
        random_state=None,
    ):
        super().__init__(
            epsilon=epsilon,
            norm=norm,
            beta=beta,
            loss=loss,
            formulation=formulation,
            n_patterns=n_patterns,
            solver=solver,
            bounds=bounds,
            fit_intercept=fit_intercept,
            patterns=patterns,
            warm_start=warm_start,
            random_state=random_state,
        )
        self.multi_class = multi_class

    @with_callbacks
    def fit(self, X, y, sample_weight=None):
        """Train the network.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Data, best standardised: epsilon and the penalty are in its units.
        y : array-like of shape (n,)
            Class labels, two or more.
        sample_weight : array-like of shape (n,), optional
            Weights.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For data or parameters that cannot be, naming the argument.
        SolverError
            If the solver fails.

        Warns
        -----
        ConvergenceWarning
            If the solver stopped early, by Ctrl-C or a callback too: the best network so far stays.
        UserWarning
            If fewer patterns exist than asked for, or the network came out constant or nearly so.
        """
        return self._fit(X, y, sample_weight)

    def _problem(self, X, y, sample_weight=None) -> Problem:
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        loss = self._checked_parameters(Hinge(), "classification")
        if self.multi_class not in _MULTI_CLASS:
            raise ValueError(f"multi_class must be one of {_MULTI_CLASS}, got {self.multi_class!r}")
        classes, labels = np.unique(y, return_inverse=True)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        n_used = len(np.unique(labels[weight > 0]))
        if n_used < 2:
            raise ValueError(
                f"y must have at least two classes with positive weight, got {n_used} class(es)."
            )
        if len(classes) == 2:
            return Problem([self._program(X, 2 * labels - 1, weight, loss, 1)], classes)
        program = self._program(X, labels, weight, loss, len(classes))
        return Problem([program] if self.multi_class == "joint" else _one_vs_rest(program), classes)

    def decision_function(self, X):
        """Return the outputs of the network: (n,) for two classes, else (n, n_classes)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        outputs = self.network_.predict(X)
        return outputs[:, 0] if len(self.classes_) == 2 else outputs

    def predict(self, X):
        """Return the class labels, shape (n,)."""
        scores = self.decision_function(X)
        chosen = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        return self.classes_[chosen]

    @available_if(lambda self: isinstance(self.loss, Logistic))
    def predict_proba(self, X):
        """Return class probabilities (n, n_classes), with the logistic loss only."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return np.column_stack([expit(-scores), expit(scores)])
        return softmax(scores, axis=1)

    @available_if(lambda self: isinstance(self.loss, Logistic))
    def predict_log_proba(self, X):
        """Return log-probabilities (n, n_classes), with the logistic loss only."""
        return np.log(self.predict_proba(X))

    def robust_score(self, X, y, epsilon=None, method="certified", sample_weight=None):
        """Return the accuracy that remains when every point may be perturbed.

        Parameters
        ----------
        X, y : array-like
            Data and true labels.
        epsilon : float or array, optional
            Radius; default the one trained with.
        method : {"certified", "attack", "exact"}
            "certified" proves points robust by the interval bound: a lower bound of the truth,
            in one matrix product. "attack" counts what survives projected gradient ascent: an
            upper bound. "exact" decides every point, by branch and bound.
        sample_weight : array-like of shape (n,), optional
            Weights.

        Returns
        -------
        float
        """
        check_is_fitted(self)
        check_method(method)
        X, y = validate_data(self, X, y, reset=False, dtype=np.float64)
        known = np.isin(y, self.classes_)
        labels = self._labels(np.where(known, y, self.classes_[0]))
        robust = known & self._robust(X, labels, self._ball(epsilon), method)
        return float(np.average(robust, weights=sample_weight))

    def certified_radius(self, X):
        """Return the largest epsilon at which the prediction provably cannot change, (n,).

        For one epsilon per feature it is the largest entry of the scaled vector.
        """
        labels = self._labels(self.predict(X))
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return certificates.certified_radius(self.network_, X, labels, self._ball())

    def _labels(self, y):
        """Return labels as the network's margins count them: -1 / +1, or class numbers."""
        labels = np.searchsorted(self.classes_, y)
        return 2 * labels - 1 if len(self.classes_) == 2 else labels

    def _robust(self, X, labels, ball, method):
        if method == "certified":
            return certificates.margin_bounds(self.network_, X, labels, ball) > 0.0
        if method == "attack":
            objective = attacks.worst_margin_objective(self.network_, labels)
            X_adv = attacks.pgd(objective, X, ball, n_restarts=5, random_state=0)
            return objective(X_adv)[0] < 0.0
        result = certificates.certify(self.network_, X, labels, ball, "exact")
        warn_undecided(result)
        return result.status == certificates.Verdict.ROBUST


def _one_vs_rest(program):
    """Return a program of two classes for each class: it, or any other."""
    return [
        replace(program, y=np.where(program.y == c, 1, -1), n_outputs=1)
        for c in range(program.n_outputs)
    ]
