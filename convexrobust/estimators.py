"""Scikit-learn estimators: validate, sample patterns, solve, recover, predict."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from convexrobust import attacks, certificates
from convexrobust.losses import Hinge, Logistic, Squared
from convexrobust.network import TwoLayerReLU
from convexrobust.patterns import sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram, Solution
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import default_solver

METHODS = ("certified", "attack", "exact")
_MULTI_CLASS = ("joint", "ovr")
_DEFAULT_SIZE = 40_000  # n * d * P that Clarabel takes in seconds
_DEFAULT_PATTERNS = (4, 20)  # fewest and most patterns sampled by default


class _ConvexRobustEstimator(BaseEstimator):
    """What classifier and regressor share: from clean arrays to a network."""

    def _ball(self, epsilon=None) -> LpBall:
        return LpBall(self.norm, self.epsilon if epsilon is None else epsilon, self.bounds)

    def _design(self, X):
        return np.hstack([X, np.ones((len(X), 1))]) if self.fit_intercept else X

    def _sampled_patterns(self, design, y, n_outputs):
        """Return the patterns that the parameters ask for."""
        if self.patterns is not None and not isinstance(self.patterns, str):
            return np.asarray(self.patterns)
        options = {
            "y": y,
            "directions": "gaussian" if self.patterns is None else self.patterns,
            "random_state": check_random_state(self.random_state),
        }
        if self.n_patterns is not None:
            return sample_patterns(design, self.n_patterns, **options)
        fewest, most = _DEFAULT_PATTERNS
        wanted = int(np.clip(_DEFAULT_SIZE // (design.size * n_outputs**2), fewest, most))
        with warnings.catch_warnings():
            # The default asks for what is there, so that finding fewer is no news.
            warnings.filterwarnings("ignore", category=UserWarning)
            return sample_patterns(design, wanted, **options)

    def _program(self, X, y, weight, loss, n_outputs) -> ConvexProgram:
        if self.patterns is None or isinstance(self.patterns, str):
            # A matrix of patterns belongs to the rows as they are; anything else is free to merge.
            rows, weight = _distinct_rows(X, y, weight)
            X, y = X[rows], y[rows]
        design = self._design(X)
        return ConvexProgram(
            design,
            y,
            self._sampled_patterns(design, y, n_outputs),
            loss,
            GroupLasso(self.beta),
            self._ball(),
            self.formulation,
            weight,
            self.fit_intercept,
            n_outputs,
        )

    def _solve(self, programs) -> Solution:
        """Solve the programs and join their outputs into one solution."""
        warm = self.warm_start and getattr(self, "network_", None) is not None
        start = None
        if warm:
            programs, start = self._warm(programs)
        if self.solver is not None:
            self.solver_ = self.solver
        elif not (warm and hasattr(self, "solver_")):
            self.solver_ = default_solver(programs[0])
        solutions = [self.solver_.solve(program, start) for program in programs]
        self.patterns_ = programs[0].D
        return solutions[0] if len(solutions) == 1 else _joined(solutions)

    def _warm(self, programs):
        """Add the patterns of the previous network, and return it as a starting point."""
        program, network = programs[0], self.network_
        n_features = program.X.shape[1] - program.intercept
        if network.n_features != n_features or network.intercept != program.intercept:
            return programs, None
        V, W, D = network.to_convex(program.X[:, :n_features], program.D)
        programs = [replace(old, D=D) for old in programs]
        start = Solution(V, W, np.inf) if V.shape == programs[0].shape else None
        return programs, start

    def _learn(self, programs, offset=None):
        """Set the learned attributes from the solved programs."""
        self.solution_ = self._solve(programs)
        self.network_ = TwoLayerReLU.from_solution(
            self.solution_, intercept=self.fit_intercept, offset=offset
        )
        self.objective_ = self.solution_.objective
        self.lower_bound_ = self.solution_.lower_bound
        self.gap_ = self.solution_.gap
        self.n_iter_ = self.solution_.n_iter
        if not np.any(self.network_.hidden[: self.n_features_in_]):
            self._warn_constant(programs[0])
        return self

    def _warn_constant(self, program):
        cause = "beta or epsilon is so large that no neuron pays for its penalty; lower them"
        if self.formulation != "soft" and self.solution_.status == "optimal":
            cause = (
                f"no useful neuron is stable on the balls around all rows, for any of the "
                f"{program.D.shape[1]} patterns (the robust cones are empty or nearly so), or beta "
                "is too large; use formulation='soft', or lower epsilon or beta"
            )
        warnings.warn(
            f"The fitted network is constant (formulation={self.formulation!r}): {cause}.",
            UserWarning,
            stacklevel=4,
        )


class ConvexRobustClassifier(ClassifierMixin, _ConvexRobustEstimator):
    r"""Two-layer ReLU network, trained adversarially by convex optimisation.

    Minimises the mean worst-case loss over all perturbations of the training points plus weight
    decay, over all networks whose neurons have one of the sampled activation patterns. The
    problem is convex: its optimum is global and comes with a lower bound that proves it.

    Parameters
    ----------
    epsilon : float or array of shape (n_features,), default=0.1
        Radius of the perturbations in units of X, one or one per feature (0 = immutable).
        0 trains without perturbations.
    norm : {1, 2, numpy.inf}, default=numpy.inf
        Norm of the perturbations.
    beta : float, default=1e-3
        Weight decay.
    loss : Loss, optional
        `Hinge` (default), `SquaredHinge` or `Logistic` of `convexrobust.losses`.
    formulation : {"soft", "one-sided", "hard"}, default="soft"
        "soft" bounds the worst case by slacks and is always feasible; "hard" is the published
        program, whose neurons may not change sign on any ball; "one-sided" lies between.
    n_patterns : int, optional
        Activation patterns to sample. Default: 4 to 20, fewer for larger data, so that the fit
        takes seconds.
    solver : Solver, optional
        Default: ``convexrobust.solvers.default_solver``, Clarabel.
    bounds : tuple (lo, hi), optional
        Legal range of the features, numbers or arrays of shape (n_features,).
    fit_intercept : bool, default=True
        Give the neurons a bias. It is never perturbed.
    patterns : str or array of shape (n, P), optional
        Where patterns come from: the name of a sampler ("gaussian", "data", "means", "pca"; see
        `convexrobust.patterns.sample_patterns`), or the 0/1 matrix itself, for the rows of X.
    warm_start : bool, default=False
        Add the patterns of the previous fit's network, so that the objective can only improve on
        it, and start from there.
    multi_class : {"joint", "ovr"}, default="joint"
        More than two classes: one program with certified pairwise margins, or one binary program
        for each class over shared patterns.
    random_state : int, RandomState or None
        Seed of the sampler.

    Attributes
    ----------
    classes_ : ndarray
        Class labels.
    network_ : TwoLayerReLU
        The network.
    solution_ : Solution
        The convex solution.
    patterns_ : ndarray of shape (n_rows, P)
        The patterns used, for the distinct rows of X.
    objective_ : float
        Worst-case objective: a valid upper bound of the network's on the training data.
    lower_bound_ : float
        Valid lower bound on the optimum over the patterns used.
    gap_ : float
        ``objective_ - lower_bound_``.
    n_iter_ : int
        Iterations of the solver.
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
    >>> model = ConvexRobustClassifier(epsilon=0.2, random_state=0).fit(scale(X)[:100], y[:100])
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
        self.epsilon = epsilon
        self.norm = norm
        self.beta = beta
        self.loss = loss
        self.formulation = formulation
        self.n_patterns = n_patterns
        self.solver = solver
        self.bounds = bounds
        self.fit_intercept = fit_intercept
        self.patterns = patterns
        self.warm_start = warm_start
        self.multi_class = multi_class
        self.random_state = random_state

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
            If the solver stopped early.
        UserWarning
            If fewer patterns exist than asked for, or the network came out constant.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        loss = _checked_loss(self.loss, Hinge(), "classification")
        if self.multi_class not in _MULTI_CLASS:
            raise ValueError(f"multi_class must be one of {_MULTI_CLASS}, got {self.multi_class!r}")
        self.classes_, labels = np.unique(y, return_inverse=True)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if len(np.unique(labels[weight > 0])) < 2:
            raise ValueError(
                "y must have at least two classes with positive weight, got "
                f"{len(np.unique(labels[weight > 0]))} class(es)."
            )
        n_classes = len(self.classes_)
        if n_classes == 2:
            programs = [self._program(X, 2 * labels - 1, weight, loss, 1)]
        elif self.multi_class == "joint":
            programs = [self._program(X, labels, weight, loss, n_classes)]
        else:
            programs = self._one_vs_rest(self._program(X, labels, weight, loss, n_classes))
        return self._learn(programs)

    def _one_vs_rest(self, program):
        return [
            replace(program, y=np.where(program.y == c, 1, -1), n_outputs=1)
            for c in range(program.n_outputs)
        ]

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
            upper bound. "exact" decides every point by integer programming.
        sample_weight : array-like of shape (n,), optional
            Weights.

        Returns
        -------
        float
        """
        check_is_fitted(self)
        _check_method(method)
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
        result = certificates.exact_margins(self.network_, X, labels, ball, verdict_only=True)
        _warn_undecided(result)
        return result.status == "robust"


class ConvexRobustRegressor(RegressorMixin, _ConvexRobustEstimator):
    r"""Two-layer ReLU regression, trained adversarially by convex optimisation.

    Minimises the mean worst-case loss over all perturbations of the training points plus weight
    decay; see `ConvexRobustClassifier`, whose parameters and attributes these are. The mean of y
    becomes the network's output bias.

    Parameters
    ----------
    epsilon : float or array of shape (n_features,), default=0.1
        Radius of the perturbations in units of X, one or one per feature (0 = immutable).
    norm : {1, 2, numpy.inf}, default=numpy.inf
        Norm of the perturbations.
    beta : float, default=1e-3
        Weight decay.
    loss : Loss, optional
        `Squared` (default), `Absolute` or `EpsilonInsensitive` of `convexrobust.losses`.
    formulation : {"soft", "one-sided", "hard"}, default="soft"
        Treatment of the robust cones; "one-sided" is the same as "hard" here.
    n_patterns : int, optional
        Activation patterns to sample. Default: 4 to 20, fewer for larger data.
    solver : Solver, optional
        Default: Clarabel.
    bounds : tuple (lo, hi), optional
        Legal range of the features.
    fit_intercept : bool, default=True
        Give the neurons a bias and the network an output bias.
    patterns : str or array of shape (n, P), optional
        Where patterns come from.
    warm_start : bool, default=False
        Add the patterns of the previous fit's network and start from it.
    random_state : int, RandomState or None
        Seed of the sampler.

    Attributes
    ----------
    network_, solution_, patterns_, objective_, lower_bound_, gap_, n_iter_, solver_
        As of `ConvexRobustClassifier`.
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
        random_state=None,
    ):
        self.epsilon = epsilon
        self.norm = norm
        self.beta = beta
        self.loss = loss
        self.formulation = formulation
        self.n_patterns = n_patterns
        self.solver = solver
        self.bounds = bounds
        self.fit_intercept = fit_intercept
        self.patterns = patterns
        self.warm_start = warm_start
        self.random_state = random_state

    def fit(self, X, y, sample_weight=None):
        """Train the network; see `ConvexRobustClassifier.fit`."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        y = y.astype(np.float64)
        loss = _checked_loss(self.loss, Squared(), "regression")
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        offset = np.average(y, weights=weight) if self.fit_intercept else 0.0
        program = self._program(X, y - offset, weight, loss, 1)
        return self._learn([program], offset=np.array([offset]))

    def predict(self, X):
        """Return the predictions, shape (n,)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return self.network_.predict(X)[:, 0]

    def predict_interval(self, X, epsilon=None):
        """Return a certified lower and upper end (n,) of the predictions under perturbation."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        lo, hi = certificates.output_interval(self.network_, X, self._ball(epsilon))
        return lo[:, 0], hi[:, 0]

    def robust_score(self, X, y, epsilon=None, method="certified", sample_weight=None):
        r"""Return the coefficient of determination for the worst residuals under perturbation.

        It is :math:`R^2` with every residual replaced by the largest that a perturbation can
        cause: bounded from above ("certified"), reached by an attack, or exact.
        """
        check_is_fitted(self)
        _check_method(method)
        X, y = validate_data(self, X, y, reset=False, dtype=np.float64, y_numeric=True)
        residual = self._worst_residual(X, y, self._ball(epsilon), method)
        return float(r2_score(y, y + residual, sample_weight=sample_weight))

    def _worst_residual(self, X, y, ball, method):
        if method == "attack":
            objective = attacks.worst_margin_objective(self.network_, y, task="regression")
            X_adv = attacks.pgd(objective, X, ball, n_restarts=5, random_state=0)
            return objective(X_adv)[0]
        if method == "certified":
            lo, hi = certificates.output_interval(self.network_, X, ball)
            return np.maximum(hi[:, 0] - y, y - lo[:, 0])
        lowest, highest = (
            certificates.exact_margins(self.network_, X, np.full(len(X), sign), ball)
            for sign in (1, -1)
        )
        _warn_undecided(lowest, highest)
        return np.maximum(-highest.lower - y, y - lowest.lower)


def _checked_loss(loss, default, task):
    """Return the loss or its default, making sure that it is one of this task."""
    loss = default if loss is None else loss
    if getattr(loss, "task", None) != task:
        raise ValueError(
            f"loss must be a {task} loss of convexrobust.losses, e.g. {default!r}; got {loss!r}."
        )
    return loss


def _check_method(method):
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")


def _warn_undecided(*results):
    undecided = sum(int(np.sum(result.status == "unknown")) for result in results)
    if undecided:
        warnings.warn(
            f"{undecided} points could not be decided; they count as not robust (bounds are used).",
            UserWarning,
            stacklevel=4,
        )


def _distinct_rows(X, y, weight):
    """Return the rows to keep and their weights: weight 0 dropped, equal (x, y) merged.

    Sorted, so that a problem given by repeated rows and the same by weights are the same array.
    """
    used = np.flatnonzero(weight > 0.0)
    _, first, group = np.unique(
        np.column_stack([X[used], y[used]]), axis=0, return_index=True, return_inverse=True
    )
    return used[first], np.bincount(group.ravel(), weights=weight[used])


def _joined(solutions) -> Solution:
    """Return independent one-output solutions as one with several outputs."""
    return Solution(
        V=np.concatenate([s.V for s in solutions]),
        W=np.concatenate([s.W for s in solutions]),
        objective=sum(s.objective for s in solutions),
        lower_bound=sum(s.lower_bound for s in solutions),
        cone_violation=max(s.cone_violation for s in solutions),
        status=next((s.status for s in solutions if s.status != "optimal"), "optimal"),
        solver=solutions[0].solver,
        n_iter=max(s.n_iter for s in solutions),
        seconds=sum(s.seconds for s in solutions),
        solver_seconds=sum(s.solver_seconds for s in solutions),
    )
