r"""One evaluation for every classifier: clean, attacked, certified and exact accuracy.

All are measured on the same samples, sets and attacks, in units of the input. For every sample

.. math:: \text{certified} \le \text{exact} \le \text{worst attack} \le \text{clean},

and a violation is an error here, never a number.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import beta

from convexrobust import attacks
from convexrobust.certificates import certify
from convexrobust.certificates.margins import margin_directions, smallest
from convexrobust.conversion import as_network, network_labels
from convexrobust.perturbations import LpBall

SUITE = {
    "fgsm": {},
    "pgd": {"n_steps": 50, "n_restarts": 5},
    "apgd": {"n_steps": 100, "n_restarts": 2},
    "square": {"n_queries": 1000},
}
_GRADIENT_FREE = ("square",)
_SEEDED = ("pgd", "apgd", "square", "autoattack")


class Measurement(NamedTuple):
    """One measured accuracy.

    Attributes
    ----------
    model : str
        Name of the model.
    epsilon : float
        Radius, in units of the input.
    measure : str
        "clean", the name of an attack, "worst attack", "certified" or "exact".
    accuracy : float
        Share of the samples; nan where the model does not allow the measure.
    low, high : float
        Confidence interval of the accuracy on the population (Clopper and Pearson), nan likewise.
    n : int
        Number of samples.
    undecided : int
        Samples that "exact" did not decide in time; they count as not robust.
    seconds : float
        Time it took; 0 for "worst attack", which follows from the attacks.
    """

    model: str
    epsilon: float
    measure: str
    accuracy: float
    low: float
    high: float
    n: int
    undecided: int
    seconds: float


class RobustnessTable:
    """Measured accuracies, one row each; printed with a column for each measure.

    Parameters
    ----------
    rows : list of Measurement
        The measurements.
    """

    def __init__(self, rows):
        self.rows = list(rows)

    def accuracy(self, model, epsilon, measure) -> float:
        """Return one of the accuracies."""
        for row in self.rows:
            if (row.model, row.measure) == (model, measure) and np.isclose(
                row.epsilon, epsilon, atol=0.0
            ):
                return row.accuracy
        raise KeyError(f"no {measure!r} of {model!r} at epsilon={epsilon!r} was measured.")

    def to_frame(self):
        """Return the rows as a pandas data frame."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_frame needs pandas: pip install 'convexrobust[data]'.") from error
        return pandas.DataFrame(self.rows, columns=Measurement._fields)

    def __str__(self):
        measures = list(dict.fromkeys(row.measure for row in self.rows))
        table = [["model", "epsilon", *measures, "seconds"]]
        for model, epsilon in dict.fromkeys((row.model, row.epsilon) for row in self.rows):
            found = {r.measure: r for r in self.rows if (r.model, r.epsilon) == (model, epsilon)}
            seconds = sum(row.seconds for row in found.values())
            cells = [_cell(found[m]) if m in found else "" for m in measures]
            table.append([model, f"{epsilon:.3g}", *cells, f"{seconds:.2f}"])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in table
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def evaluate_robustness(
    estimators,
    X,
    y,
    epsilons,
    *,
    norm=np.inf,
    bounds=None,
    feature_scale=None,
    suite=None,
    exact=True,
    time_limit=10.0,
    confidence=0.95,
    random_state=0,
) -> RobustnessTable:
    r"""Measure the accuracies of classifiers when every sample may be perturbed.

    Parameters
    ----------
    estimators : dict of str to model, or a model
        Each of these kinds:

        * what `convexrobust.conversion.as_network` reads, also a ``Pipeline`` of scalers and one
          of these: attacked by its gradients, certified and verified exactly;
        * another ``torch.nn.Module``, or a fitted estimator with one in ``model_`` (as
          `convexrobust.deep.AdversarialClassifier`): attacked by its gradients, on the device of
          its parameters;
        * another fitted classifier with ``predict`` and ``decision_function`` or
          ``predict_proba``: attacked without gradients only, so that its "worst attack" says less.
    X : ndarray of shape (n, d) or, for torch modules, (n, c, h, w)
        Data in units of the models' input, in which perturbations are measured too.
    y : ndarray of shape (n,)
        Labels: of the classifiers' ``classes_``, else those of the modules' or networks' outputs
        (-1 / +1 for one output, 0 .. C-1 for several).
    epsilons : float or sequence of float
        Radii. A sample that is broken at one counts as broken at the larger ones too.
    norm : {1, 2, inf}
        Norm of the perturbations.
    bounds : tuple (lo, hi), optional
        Legal range of the features.
    feature_scale : ndarray of shape (d,), optional
        Radii of the features in units of epsilon; 0 = immutable. All 1 by default.
    suite : dict of str to dict, optional
        Options of the attacks, by the names "fgsm", "pgd", "apgd", "square" of
        `convexrobust.attacks` and "autoattack" of `convexrobust.deep.autoattack`; by default
        `SUITE`.
    exact : bool
        Decide what lies between "certified" and "worst attack" by exact verification.
    time_limit : float or None
        Its seconds for each sample.
    confidence : float
        Of the intervals.
    random_state : int
        Seed of every attack.

    Returns
    -------
    RobustnessTable

    Raises
    ------
    ValueError
        For input that does not fit, naming the model where it is one.
    RuntimeError
        If an attack breaks a sample that was proven robust, which would be an error of this
        library.
    """
    models = _named(estimators)
    suite = SUITE if suite is None else suite
    unknown = set(suite) - {*SUITE, "autoattack"}
    if unknown:
        raise ValueError(
            f"suite names attacks that are not known: {sorted(unknown)}; there are {list(SUITE)} "
            "and 'autoattack'."
        )
    X, y = np.asarray(X), np.asarray(y)
    if not np.isfinite(X).all():
        raise ValueError("X must be finite: it holds NaN or infinite values.")
    radii = sorted(float(radius) for radius in np.atleast_1d(epsilons))
    if not models or not radii:
        raise ValueError(f"give a model and a radius: got {len(models)} and {len(radii)}.")
    if len(X) != len(y) or len(X) == 0:
        raise ValueError(f"X and y must be of one length > 0, got {len(X)} and {len(y)}.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence!r}.")
    scale = 1.0 if feature_scale is None else np.asarray(feature_scale, dtype=np.float64).ravel()
    rows: list[Measurement] = []
    for name, model in models.items():
        subject = _subject(name, model, X, y)
        start = time.perf_counter()
        clean = subject.is_right(subject.X)
        seconds = time.perf_counter() - start
        standing = clean.copy()  # what no attack has broken, at this radius or a smaller one
        for radius in radii:
            add = _Adder(rows, name, radius, confidence)
            add("clean", clean, seconds)
            ball = LpBall(norm, radius * scale, bounds)
            standing = _attacked(subject, ball, suite, random_state, clean, standing, add)
            _verified(subject, ball, exact, time_limit, clean, standing, add)
    return RobustnessTable(rows)


def _attacked(subject, ball, suite, random_state, clean, standing, add):
    """Run the attacks, and return which samples stand."""
    standing, any_run = standing.copy(), False
    for attack, options in suite.items():
        begin, stands = time.perf_counter(), None
        if subject.takes(attack):
            stands = clean.copy()
            k = np.flatnonzero(clean)
            if len(k):
                stands[k] = subject.stands(attack, options, ball, k, random_state)
        add(attack, stands, time.perf_counter() - begin)
        if stands is not None:
            standing, any_run = standing & stands, True
    add("worst attack", standing if any_run else None, 0.0)
    return standing


def _verified(subject, ball, exact, time_limit, clean, standing, add):
    """Certify, decide what is open, and check that nothing proven was broken."""
    if subject.network is None:
        add("certified", None, 0.0)
        return add("exact", None, 0.0) if exact else None
    start, certified = time.perf_counter(), np.zeros(len(clean), dtype=bool)
    k = np.flatnonzero(clean)
    certified[k] = subject.status(k, ball, "interval", None) == "robust"
    add("certified", certified, time.perf_counter() - start)
    if exact:
        start, status = time.perf_counter(), np.where(certified, "robust", "broken").astype("<U7")
        k = np.flatnonzero(standing & ~certified)
        status[k] = subject.status(k, ball, "exact", time_limit)
        undecided = int(np.sum(status == "unknown"))
        certified = status == "robust"
        add("exact", certified, time.perf_counter() - start, undecided)
    if (certified & ~standing).any():
        k = np.flatnonzero(certified & ~standing)[0]
        raise RuntimeError(
            f"sample {k} was proven robust at {ball!r} and broken by an attack: please report this."
        )
    return None


# ------------------------------------------------------------------ kinds of models


class _Network:
    """A model that is a two-layer network."""

    def __init__(self, network, labels, X):
        self.network, self.labels = network, labels
        self.X = np.asarray(X, dtype=np.float64).reshape(len(X), -1)

    def is_right(self, X, rows=slice(None)):
        labels = self.labels[rows]
        return smallest(self.network, X, margin_directions(self.network, labels, len(X))) > 0.0

    def takes(self, attack):
        return attack in SUITE

    def stands(self, attack, options, ball, k, random_state):
        objective = attacks.worst_margin_objective(self.network, self.labels[k])
        first = (lambda X: objective(X)[0]) if attack in _GRADIENT_FREE else objective
        options = _options(attack, options, random_state)
        return self.is_right(getattr(attacks, attack)(first, self.X[k], ball, **options), k)

    def status(self, k, ball, method, time_limit):
        options = {} if method == "interval" else {"time_limit": time_limit}
        return certify(self.network, self.X[k], self.labels[k], ball, method, **options).status


class _Module:
    """Another torch module."""

    network = None

    def __init__(self, module, labels, X):
        import torch

        parameter = next(iter(module.parameters()), torch.zeros(0))
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
        self.X = torch.as_tensor(np.ascontiguousarray(X)).to(parameter.device, dtype)
        self.module, self.labels = module, torch.as_tensor(labels, device=parameter.device)

    def is_right(self, X, rows=slice(None)):
        import torch

        from convexrobust.deep.model_loss import ModelLoss, left_as_found

        with torch.no_grad(), left_as_found(self.module, "eval"):
            loss = ModelLoss(self.module, self.labels[rows], X.shape[1:])
            return (loss(X.flatten(1)) < 0.0).cpu().numpy()

    def takes(self, attack):
        return True

    def stands(self, attack, options, ball, k, random_state):
        from convexrobust.deep import attacks as deep_attacks
        from convexrobust.deep.autoattack import autoattack

        method = autoattack if attack == "autoattack" else getattr(deep_attacks, attack)
        options = _options(attack, options, random_state)
        return self.is_right(method(self.module, self.X[k], self.labels[k], ball, **options), k)


class _BlackBox:
    """A classifier of which only predictions are known."""

    network = None

    def __init__(self, model, y, X):
        self.model, self.y = model, y
        self.X = np.asarray(X, dtype=np.float64).reshape(len(X), -1)
        self.position = np.searchsorted(model.classes_, y)
        self.is_pairwise = getattr(model, "decision_function_shape", "ovr") == "ovo"

    def is_right(self, X, rows=slice(None)):
        return self.model.predict(X) == self.y[rows]

    def takes(self, attack):
        return attack in _GRADIENT_FREE

    def stands(self, attack, options, ball, k, random_state):
        options = _options(attack, options, random_state)
        method = getattr(attacks, attack)
        return self.is_right(method(lambda X: self._loss(X, k), self.X[k], ball, **options), k)

    def _loss(self, X, k):
        """Return the largest rival's score less the label's; above 0 is misclassified."""
        has_scores = hasattr(self.model, "decision_function")
        scores = (self.model.decision_function if has_scores else self.model.predict_proba)(X)
        if scores.ndim == 1:
            return np.where(self.position[k] == 1, -scores, scores)
        if scores.shape[1] != len(self.model.classes_) or self.is_pairwise:
            raise ValueError(
                "decision_function must return one score a class: give "
                "decision_function_shape='ovr' to the model."
            )
        rivals, rows = np.array(scores, dtype=np.float64), np.arange(len(X))
        rivals[rows, self.position[k]] = -np.inf
        return rivals.max(axis=1) - scores[rows, self.position[k]]


def _subject(name, model, X, y):
    try:
        return _subject_of(model, X, y)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model {name!r}: {error}") from error


def _subject_of(model, X, y):
    try:
        network = as_network(model)
    except ValueError:
        if hasattr(model, "named_children"):
            return _Module(model, y, X)
        if hasattr(model, "model_"):  # an estimator around a module
            return _Module(model.model_, network_labels(model, y), np.reshape(X, (len(X), -1)))
        if not (hasattr(model, "predict") and hasattr(model, "classes_")):
            raise
        network_labels(model, y)
        return _BlackBox(model, y, X)
    return _Network(network, network_labels(model, y), X)


# ------------------------------------------------------------------ rows


class _Adder:
    """Appends rows about one model at one radius."""

    def __init__(self, rows, model, epsilon, confidence):
        self.rows, self.model, self.epsilon = rows, model, epsilon
        self.tail = (1.0 - confidence) / 2.0

    def __call__(self, measure, robust, seconds, undecided=0):
        n, (low, high) = 0, (np.nan, np.nan)
        accuracy = np.nan
        if robust is not None:
            n, k = len(robust), int(robust.sum())
            accuracy = k / n
            low = beta.ppf(self.tail, k, n - k + 1) if k > 0 else 0.0
            high = beta.ppf(1.0 - self.tail, k + 1, n - k) if k < n else 1.0
        row = (self.model, self.epsilon, measure, accuracy, float(low), float(high))
        self.rows.append(Measurement(*row, n, undecided, seconds))


def _cell(row):
    if np.isnan(row.accuracy):
        return "-"
    mark = "*" if row.undecided else ""
    return f"{row.accuracy:.1%} [{100 * row.low:.0f}, {100 * row.high:.0f}]{mark}"


def _named(estimators):
    if isinstance(estimators, Mapping):
        return dict(estimators)
    if isinstance(estimators, list | tuple):
        names = [type(model).__name__ for model in estimators]
        if len(set(names)) < len(names):
            raise ValueError(f"give a dict of names to models: {names} are not distinct.")
        return dict(zip(names, estimators, strict=True))
    return {type(estimators).__name__: estimators}


def _options(attack, options, random_state):
    return {"random_state": random_state, **options} if attack in _SEEDED else options
