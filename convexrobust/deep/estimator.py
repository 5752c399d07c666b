"""Scikit-learn estimators of networks that are trained by gradient descent, also adversarially.

The non-convex counterparts of `convexrobust.ConvexRobustClassifier` and its regressor: the words,
the units and what is learned are the same, so that one can be put in the place of the other.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from functools import partial
from numbers import Real

import numpy as np
import torch
from scipy.special import log_expit, log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from convexrobust import certificates
from convexrobust.conversion import as_network, network_labels
from convexrobust.deep import attacks, least_squares
from convexrobust.deep.catalogue import create_method, network_for
from convexrobust.deep.model_loss import ModelLoss, left_as_found
from convexrobust.deep.training import train
from convexrobust.perturbations import LpBall
from convexrobust.threads import threads_for

SCORES = ("certified", "attack", "exact")  # as of the convex estimators
_ROWS_AT_ONCE = 1000  # predicted or attacked at once
_ATTACK = {"n_restarts": 5, "random_state": 0}  # of `robust_score`


class _AdversarialEstimator(BaseEstimator):
    """What classifier and regressor share: from clean arrays to a trained network."""

    def __init__(
        self,
        epsilon=0.1,
        norm=np.inf,
        beta=1e-3,
        method="pgd",
        width=64,
        network=None,
        n_epochs=100,
        learning_rate=0.01,
        batch_size=128,
        warmup=1.0 / 3.0,
        bounds=None,
        training=None,
        random_state=None,
    ):
        self.epsilon = epsilon
        self.norm = norm
        self.beta = beta
        self.method = method
        self.width = width
        self.network = network
        self.n_epochs = n_epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.warmup = warmup
        self.bounds = bounds
        self.training = training
        self.random_state = random_state

    def _ball(self, epsilon=None) -> LpBall:
        return LpBall(self.norm, self.epsilon if epsilon is None else epsilon, self.bounds)

    def _check_parameters(self, X):
        ball = self._ball()
        ball.epsilons(X.shape[1])
        ball.check_inside(X)
        if not isinstance(self.beta, Real) or not 0.0 <= self.beta < np.inf:
            raise ValueError(f"beta must be a finite number >= 0, got {self.beta!r}.")
        for name in ("width", "n_epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}.")

    def _learn(self, X, y, weight, n_outputs, beta):
        """Train a new network on targets that it understands; set the learned attributes."""
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model_ = network_for(self.network, X.shape[1], n_outputs, width=self.width)
        options = {
            "n_epochs": self.n_epochs,
            "sample_weight": weight,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "optimizer": partial(torch.optim.Adam, weight_decay=beta),
            "schedule": "cosine",
            "warmup": self.warmup,
            "random_state": seed,
        }
        supplied = {"n_rows": len(X), "random_state": seed, "task": self._task}
        method = create_method(self.method, self._ball(), **supplied)
        data = torch.tensor(X), torch.tensor(y)  # copies: X may be read-only
        n_products = min(len(X), self.batch_size) * (X.shape[1] + n_outputs) * self.width
        with threads_for(n_products) if self.network is None else nullcontext():
            self.history_ = train(self.model_, method, *data, **options | (self.training or {}))
        self.n_iter_ = len(self.history_.epochs)

    def _read_network(self):
        """Set network_ if the model is a two-layer network, else make sure that there is none."""
        self.__dict__.pop("network_", None)
        with nullcontext() if self.network is None else suppress(ValueError):
            self.network_ = as_network(self.model_)

    def _tensors(self, X, y=None):
        """Return points as the model takes them, and targets beside them."""
        parameter = next(self.model_.parameters())
        x = torch.tensor(X).to(parameter)  # a copy: X may be read-only
        return x if y is None else (x, torch.tensor(y, device=parameter.device))

    def _outputs(self, X):
        """Return the outputs (n, C) of the model."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        with torch.no_grad(), left_as_found(self.model_, "eval"):
            parts = [
                self.model_(x).reshape(len(x), -1) for x in self._tensors(X).split(_ROWS_AT_ONCE)
            ]
        return torch.cat(parts).double().cpu().numpy()

    def _check_score(self, method):
        check_is_fitted(self)
        if method not in SCORES:
            raise ValueError(f"method must be one of {SCORES}, got {method!r}.")
        if method != "attack" and not hasattr(self, "network_"):
            raise ValueError(
                f"method={method!r} needs a two-layer network (Linear, ReLU, Linear), of which "
                "certificates exist, and the model is another one; for it there is "
                "method='attack' only."
            )


def _weighed(X, y, sample_weight):
    """Return the rows with a positive weight, and these weights; None if all are the same."""
    weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    kept = weight > 0.0
    weight = weight[kept]
    return X[kept], y[kept], None if len(np.unique(weight)) <= 1 else weight


class AdversarialClassifier(ClassifierMixin, _AdversarialEstimator):
    r"""Network of any kind, trained by gradient descent on perturbed data.

    .. math:: \min_\theta \frac1n \sum_k \max_{\delta \in \Delta} \ell(f_\theta(x_k + \delta), y_k)
              + \frac{\beta}{2} \|\theta\|^2

    with the cross-entropy, or what ``method`` puts in the place of this objective. By default the
    network has two layers, as that of `convexrobust.ConvexRobustClassifier`; the optimum found is
    a local one and comes without a bound.

    Parameters
    ----------
    epsilon : float or array of shape (n_features,), default=0.1
        Radius of the perturbations in units of X, one or one per feature (0 = immutable).
    norm : {1, 2, numpy.inf} or {"l1", "l2", "linf"}, default=numpy.inf
        Norm of the perturbations.
    beta : float, default=1e-3
        Weight decay, of all parameters.
    method : str or callable, default="pgd"
        A name in `convexrobust.deep.catalogue.METHODS` ("standard", "fgsm", "fast", "n-fgsm",
        "pgd", "free", "gradalign", "trades", "mart", "alp", "clp", "awp", "trades-awp", "dale",
        "fast-bat", "ssds", "nolam", "nolag", "certified", "ibp"), or what makes a method of a
        ball: a class of `convexrobust.deep.methods`, with options by `functools.partial`.
    width : int, default=64
        Neurons of the two-layer network.
    network : callable, optional
        Called as ``network(n_features, n_outputs)``, returns another ``torch.nn.Module`` from
        points (n, n_features) to outputs (n, n_outputs); for images it begins with ``Unflatten``.
    n_epochs : int, default=100
        Passes over the data.
    learning_rate : float, default=0.01
        First learning rate of Adam; it falls to 0 along a cosine.
    batch_size : int, default=128
        Rows of a step.
    warmup : float, default=1/3
        Share of the epochs in which the radius grows to epsilon.
    bounds : tuple (lo, hi), optional
        Legal range of the features, numbers or arrays of shape (n_features,).
    training : dict, optional
        More arguments of `convexrobust.deep.training.train`, or others than those above:
        optimizer, schedule, device, precision, checkpoint, log, ... Validation data has the labels
        of the network: -1 / +1 for two classes, else 0, 1, ...
    random_state : int, RandomState or None
        Seed of the first weights, the batches and the method.

    Attributes
    ----------
    classes_ : ndarray
        Class labels.
    model_ : torch.nn.Module
        The network: one output for two classes, else one for each.
    network_ : TwoLayerReLU
        The same, if it has two layers: what certificates, displays and evaluation read.
    history_ : History
        Figures of the epochs.
    n_iter_ : int
        Epochs trained.

    References
    ----------
    Madry et al., arXiv 1706.06083, and those of the methods.

    Examples
    --------
    >>> from sklearn.datasets import load_breast_cancer
    >>> from sklearn.preprocessing import scale
    >>> from convexrobust.deep import AdversarialClassifier
    >>> X, y = load_breast_cancer(return_X_y=True)
    >>> model = AdversarialClassifier(epsilon=0.2, beta=1e-2, method="trades", random_state=0)
    >>> model = model.fit(scale(X)[:100], y[:100])
    >>> model.robust_score(scale(X)[100:], y[100:], method="certified") > 0.5
    True
    """

    _task = "classification"

    def fit(self, X, y, sample_weight=None):
        """Train the network.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Data, best standardised: epsilon and the weight decay are in its units.
        y : array-like of shape (n,)
            Class labels, two or more.
        sample_weight : array-like of shape (n,), optional
            Weights, which multiply the losses of the samples. Only their ratios matter; a row of
            weight 0 is left out, with its class if that has no other. A whole weight is as many
            rows where a batch holds all data; in smaller batches on average only.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For data or parameters that cannot be, naming the argument.
        FloatingPointError
            If the loss is not finite.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        X, y, weight = _weighed(X, y, sample_weight)
        self._check_parameters(X)
        self.classes_ = np.unique(y)
        n_classes = len(self.classes_)
        if n_classes < 2:
            raise ValueError(
                f"y must have at least two classes with positive weight, got {n_classes} class(es)."
            )
        labels = network_labels(self, y)
        self._learn(X, labels, weight, 1 if n_classes == 2 else n_classes, self.beta)
        self._read_network()
        return self

    def decision_function(self, X):
        """Return the outputs of the network: (n,) for two classes, else (n, n_classes)."""
        outputs = self._outputs(X)
        return outputs[:, 0] if len(self.classes_) == 2 else outputs

    def predict(self, X):
        """Return the class labels, shape (n,)."""
        scores = self.decision_function(X)
        chosen = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        return self.classes_[chosen]

    def predict_proba(self, X):
        """Return class probabilities (n, n_classes)."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X):
        """Return log-probabilities (n, n_classes)."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return np.column_stack([log_expit(-scores), log_expit(scores)])
        return log_softmax(scores, axis=1)

    def robust_score(self, X, y, epsilon=None, method="certified", sample_weight=None):
        """Return the accuracy that remains when every point may be perturbed.

        Parameters
        ----------
        X, y : array-like
            Data and true labels.
        epsilon : float or array, optional
            Radius; default the one trained with.
        method : {"certified", "attack", "exact"}
            As of `convexrobust.ConvexRobustClassifier.robust_score`. "certified" proves points
            robust by the interval bound: a lower bound of the truth. "attack" counts what survives
            projected gradient ascent: an upper bound. "exact" decides every point, by branch and
            bound, and those it cannot decide count as not robust. Models that are no two-layer
            network, which have no ``network_``, can only be attacked.
        sample_weight : array-like of shape (n,), optional
            Weights.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            For a method that the model does not have, naming those that it has.
        """
        self._check_score(method)
        X, y = validate_data(self, X, y, reset=False, dtype=np.float64)
        known = np.isin(y, self.classes_)
        labels = network_labels(self, np.where(known, y, self.classes_[0]))
        robust = known & self._robust(X, labels, self._ball(epsilon), method)
        return float(np.average(robust, weights=sample_weight))

    def _robust(self, X, labels, ball, method):
        if method == "certified":
            return certificates.margin_bounds(self.network_, X, labels, ball) > 0.0
        if method == "exact":
            verdicts = certificates.certify(self.network_, X, labels, ball, "exact").status
            return verdicts == certificates.Verdict.ROBUST
        x, y = self._tensors(X, labels)
        points = attacks.pgd(self.model_, x, y, ball, batch_size=_ROWS_AT_ONCE, **_ATTACK)
        with torch.no_grad(), left_as_found(self.model_, "eval"):
            margin_loss = ModelLoss(self.model_, y, x.shape[1:])(points)
        return (margin_loss < 0.0).cpu().numpy()


class AdversarialRegressor(RegressorMixin, _AdversarialEstimator):
    r"""Network of any kind, trained by gradient descent on the worst residuals.

    .. math:: \min_\theta \frac1n \sum_k \max_{\delta \in \Delta} \tfrac12
              (f_\theta(x_k + \delta) - y_k)^2 + \frac{\beta}{2} \|\theta\|^2

    The counterpart of `convexrobust.ConvexRobustRegressor`. y is standardised while training, and
    the weight decay divided by its deviation, so that the optimum of a two-layer network is that
    of the objective above in the units of y.

    Parameters
    ----------
    epsilon, norm, beta
        As of `AdversarialClassifier`.
    method : str or callable, default="pgd"
        As of `AdversarialClassifier`, but "mart", "certified" and "ibp", which are about classes;
        the loss is `convexrobust.deep.losses.HalfSquares`. Losses, and the margin of "dale", are of
        standardised y.
    width, network, n_epochs, learning_rate, batch_size, warmup, bounds
        As of `AdversarialClassifier`.
    training, random_state
        As of `AdversarialClassifier`; validation data for ``training`` is not taken.

    Attributes
    ----------
    model_ : torch.nn.Module
        As of `AdversarialClassifier`; it predicts y in its units.
    network_ : TwoLayerReLU
        As of `AdversarialClassifier`.
    history_ : History
        As of `AdversarialClassifier`.
    n_iter_ : int
        Epochs.
    """

    _task = "regression"

    def fit(self, X, y, sample_weight=None):
        """Train the network; see `AdversarialClassifier.fit`."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        X, y, weight = _weighed(X, y, sample_weight)
        self._check_parameters(X)
        if "validation" in (self.training or {}):
            raise ValueError("training must not hold validation data for regression.")
        offset, scale = least_squares.mean_and_deviation(y, weight)
        self._learn(X, (y - offset) / scale, weight, 1, self.beta / scale)
        self.model_ = least_squares.rescaled(self.model_, scale, offset)
        self._read_network()
        return self

    def predict(self, X):
        """Return the predictions, shape (n,)."""
        return self._outputs(X)[:, 0]

    def robust_score(self, X, y, epsilon=None, method="certified", sample_weight=None):
        r"""Return the coefficient of determination for the worst residuals under perturbation.

        It is :math:`R^2` with every residual replaced by the largest that a perturbation can
        cause: bounded from above ("certified"), reached by an attack, or exact. A model that is no
        two-layer network can only be attacked, and other methods raise ValueError.
        """
        self._check_score(method)
        X, y = validate_data(self, X, y, reset=False, dtype=np.float64, y_numeric=True)
        residual = self._worst_residual(X, y, self._ball(epsilon), method)
        return float(r2_score(y, y + residual, sample_weight=sample_weight))

    def _worst_residual(self, X, y, ball, method):
        if method != "attack":
            how = "interval" if method == "certified" else "exact"
            lo, hi = certificates.output_interval(self.network_, X, ball, how)
            return np.maximum(hi[:, 0] - y, y - lo[:, 0])
        x, target = self._tensors(X, y)
        points = least_squares.largest_residuals(self.model_, x, target, ball, **_ATTACK)
        with torch.no_grad(), left_as_found(self.model_, "eval"):
            return least_squares.residuals(self.model_, points, target).abs().double().cpu().numpy()
