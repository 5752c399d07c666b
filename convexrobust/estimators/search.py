"""The weight decay, chosen by cross-validation along regularization paths."""

from __future__ import annotations

import warnings
from numbers import Real

import numpy as np
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import check_cv
from sklearn.utils import _safe_indexing, get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import (
    _check_sample_weight,
    _check_y,
    check_is_fitted,
    indexable,
)

from convexrobust.estimators.base import METHODS
from convexrobust.estimators.path import beta_grid, regularization_path


def _where_available(method):
    """Offer a method where the estimator has it, fitted or, before that, as it was given."""

    def available(self):
        getattr(getattr(self, "best_estimator_", self.estimator), method.__name__)
        return True  # an AttributeError of the line above says more than False

    return available_if(available)(method)


class RegularizationPathCV(MetaEstimatorMixin, BaseEstimator):
    """Choose beta by cross-validated robustness, then fit on all data.

    In every fold one `convexrobust.regularization_path` visits all betas, each fit starting from
    the solution of the last and, where patterns are generated, stopping at a wide gap. In a
    ``GridSearchCV`` every fit starts anew and goes to full accuracy; here only the last one does,
    that of the best beta on all data.

    Parameters
    ----------
    estimator : ConvexRobustClassifier or ConvexRobustRegressor
        Everything but beta is taken from it. It is not changed.
    betas : array-like, optional
        Weight decays to choose from. Default: those of `convexrobust.regularization_path`.
    cv : int, splitter or iterable, optional
        As in scikit-learn; 5 folds by default, stratified for a classifier.
    scoring : {"certified", "attack", "exact"} or callable, default="certified"
        What is maximised on held-out rows: a method of ``robust_score``, or a function of the
        fitted estimator, X and y.
    tol : float, default=0.05
        Gap of the fits in the folds, relative to the objective of the zero network, where patterns
        are generated. Betas whose objectives are as small are hardly told apart; lower it for them.
    refit : bool, default=True
        Whether the best beta is fitted on all data; without, a search cannot predict.

    Attributes
    ----------
    best_estimator_ : ConvexRobustClassifier or ConvexRobustRegressor
        Fitted on all data, with the best beta. All methods of the search are its methods.
    best_beta_, best_score_ : float
        The best beta and its mean score; of equally good ones the first of ``betas_``.
    betas_ : ndarray of shape (n_betas,)
        The betas, in the order given.
    scores_ : ndarray of shape (n_folds, n_betas)
        The scores on held-out rows.

    Notes
    -----
    Warnings of fits that stop early are those of the last fit; in the folds it is intended.

    Examples
    --------
    >>> from sklearn.datasets import load_breast_cancer
    >>> from sklearn.preprocessing import scale
    >>> from convexrobust import ConvexRobustClassifier, RegularizationPathCV
    >>> X, y = load_breast_cancer(return_X_y=True)
    >>> X, y = scale(X)[:100], y[:100]
    >>> model = ConvexRobustClassifier(epsilon=0.2, random_state=0)
    >>> search = RegularizationPathCV(model, betas=[0.01, 0.1], cv=2).fit(X, y)
    >>> search.scores_.shape, search.best_beta_ in search.betas_
    ((2, 2), True)
    """

    def __init__(
        self, estimator, *, betas=None, cv=None, scoring="certified", tol=0.05, refit=True
    ):
        self.estimator = estimator
        self.betas = betas
        self.cv = cv
        self.scoring = scoring
        self.tol = tol
        self.refit = refit

    def fit(self, X, y, sample_weight=None):
        """Score every beta in every fold, and fit the best one on all data.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Data.
        y : array-like of shape (n,)
            Labels or targets.
        sample_weight : array-like of shape (n,), optional
            Weights in training and, unless ``scoring`` is a function, in the scores.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            For data or parameters that cannot be, naming the argument.
        SolverError
            If the solver fails.
        """
        vars(self).pop("best_estimator_", None)  # of other data, or other parameters
        known = isinstance(self.scoring, str) and self.scoring in METHODS
        if not (known or callable(self.scoring)):
            raise ValueError(
                f"scoring must be one of {METHODS} or a function, got {self.scoring!r}."
            )
        if y is None:
            raise ValueError("fit requires y to be passed, but the target y is None.")
        X, y = indexable(X, _check_y(y, estimator=self))
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        self.betas_ = beta_grid(self.estimator, X, y, self.betas, sample_weight)
        folds = check_cv(self.cv, y, classifier=is_classifier(self.estimator)).split(X, y)
        self.scores_ = np.array([self._scores(X, y, sample_weight, *fold) for fold in folds])
        if len(self.scores_) == 0:
            raise ValueError(
                "cv gave no folds: use a number, a splitter or a list (a generator serves one fit)."
            )
        means = self.scores_.mean(axis=0)
        self.best_beta_, self.best_score_ = float(self.betas_[means.argmax()]), float(means.max())
        if self.refit:
            best = clone(self.estimator).set_params(beta=self.best_beta_)
            self.best_estimator_ = best.fit(X, y, sample_weight=sample_weight)
        return self

    def _scores(self, X, y, sample_weight, train, test):
        """Return the scores of all betas in one fold."""
        weights = [None, None]
        if sample_weight is not None:
            weights = [sample_weight[part] for part in (train, test)]
            if not weights[1].any():
                raise ValueError("sample_weight is 0 for all held-out rows of a fold of cv.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            path = regularization_path(
                self.estimator,
                _safe_indexing(X, train),
                _safe_indexing(y, train),
                betas=self.betas_,
                sample_weight=weights[0],
                tol=self.tol,
            )
        models = dict(zip(path.betas, path.estimators[0], strict=True))
        held_out = _safe_indexing(X, test), _safe_indexing(y, test)
        return [self._score(models[beta], *held_out, weights[1]) for beta in self.betas_]

    def _score(self, model, X, y, sample_weight):
        if callable(self.scoring):
            score = self.scoring(model, X, y)
        else:
            score = model.robust_score(X, y, method=self.scoring, sample_weight=sample_weight)
        if not (isinstance(score, Real) and np.isfinite(score)):
            raise ValueError(
                f"scoring must return finite numbers, got {score!r} on {len(y)} held-out rows."
            )
        return score

    # ------------------------------------------------------------ what the best estimator does

    def _best(self):
        if not self.refit and hasattr(self, "scores_"):
            raise NotFittedError("refit=False fits no estimator on all data; set refit=True.")
        check_is_fitted(self)
        return self.best_estimator_

    def predict(self, X):
        """Return the predictions of the best estimator."""
        return self._best().predict(X)

    @_where_available
    def decision_function(self, X):
        """Return the outputs of the best classifier's network."""
        return self._best().decision_function(X)

    @_where_available
    def predict_proba(self, X):
        """Return the class probabilities of the best classifier, with the logistic loss only."""
        return self._best().predict_proba(X)

    @_where_available
    def predict_log_proba(self, X):
        """Return the logarithms of the class probabilities."""
        return self._best().predict_log_proba(X)

    @_where_available
    def predict_interval(self, X, epsilon=None, method="interval"):
        """Return the certified ends of the best regressor's predictions under perturbation."""
        return self._best().predict_interval(X, epsilon, method)

    @_where_available
    def certified_radius(self, X):
        """Return the radii at which the best classifier's predictions provably cannot change."""
        return self._best().certified_radius(X)

    def score(self, X, y, sample_weight=None):
        """Return the score of the best estimator on data as they are."""
        return self._best().score(X, y, sample_weight)

    def robust_score(self, X, y, epsilon=None, method="certified", sample_weight=None):
        """Return the score of the best estimator on data that may be perturbed."""
        return self._best().robust_score(X, y, epsilon, method, sample_weight)

    @property
    def classes_(self):
        """Class labels, of a classifier."""
        return self._best().classes_

    @property
    def network_(self):
        """The network of the best estimator."""
        return self._best().network_

    @property
    def n_features_in_(self):
        """Number of features seen in `fit`."""
        return self._best().n_features_in_

    @property
    def feature_names_in_(self):
        """Names of the features seen in `fit`, where X had any."""
        return self._best().feature_names_in_

    def __sklearn_is_fitted__(self):
        return hasattr(self, "best_estimator_")

    def __sklearn_tags__(self):
        tags, inner = super().__sklearn_tags__(), get_tags(self.estimator)
        tags.estimator_type = inner.estimator_type
        tags.classifier_tags, tags.regressor_tags = inner.classifier_tags, inner.regressor_tags
        tags.target_tags, tags.input_tags = inner.target_tags, inner.input_tags
        return tags
