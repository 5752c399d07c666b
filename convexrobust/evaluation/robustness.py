"""The evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from numbers import Real

import numpy as np

from convexrobust.certificates import Verdict
from convexrobust.evaluation.subjects import subject_of
from convexrobust.evaluation.suite import check_options, checked_suite, is_seed
from convexrobust.evaluation.table import Adder, Measurement, RobustnessTable
from convexrobust.perturbations import LpBall


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
    norm : {1, 2, inf} or {"l1", "l2", "linf"}
        Norm of the perturbations.
    bounds : tuple (lo, hi), optional
        Legal range of the features.
    feature_scale : ndarray of shape (d,), optional
        Radii of the features in units of epsilon; 0 = immutable. All 1 by default.
    suite : dict of str to dict or callable, optional
        The attacks, by the names of their measures; by default `SUITE`. Each is one of

        * the options of a known attack: of "fgsm", "pgd", "apgd", "square" of
          `convexrobust.attacks` (for torch modules `convexrobust.deep.attacks`) or "autoattack" of
          `convexrobust.deep.autoattack`, which is the name or stands in the options as "attack":
          ``{"square": {}, "pgd-100": {"attack": "pgd", "n_steps": 100}}``;
        * a function of your own, with options by ``functools.partial``, called as
          ``attack(loss_and_gradient, X, ball, xp=xp)`` as those of `convexrobust.attacks.worst_of`:
          from points (n, d) to the losses to increase (n,), above 0 where a point is misclassified,
          and their gradients (n, d); the right samples X (n, d); the `convexrobust.LpBall`; and
          the backend of X, `convexrobust.backends.numpy` or for torch modules
          `convexrobust.backends.torch`. It returns points (n, d) of the type of X, which are
          checked to lie in the ball and the bounds.

        What needs gradients is left out for models that have none; so are functions.
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
        For input that does not fit, naming the model or the entry of the suite where it is one.
    RuntimeError
        If a point of a function in the suite is outside the ball or the bounds; if an attack breaks
        a sample that was proven robust, which would be an error of this library.
    """
    models, X, y = _named(estimators), np.asarray(X), np.asarray(y)
    radii = _checked_radii(epsilons)
    if not models or not radii:
        raise ValueError(f"give a model and a radius: got {len(models)} and {len(radii)}.")
    _check_data(X, y)
    if not (isinstance(confidence, Real) and 0.0 < float(confidence) < 1.0):
        raise ValueError(f"confidence must be between 0 and 1, got {confidence!r}.")
    if not is_seed(random_state):
        raise ValueError(
            "random_state must be None, a whole number >= 0 or a numpy.random.Generator, got "
            f"{random_state!r}."
        )
    scale = 1.0 if feature_scale is None else np.asarray(feature_scale, dtype=np.float64).ravel()
    balls = [LpBall(norm, radius * scale, bounds) for radius in radii]
    attacks = checked_suite(suite)
    subjects = {name: subject_of(name, model, X, y) for name, model in models.items()}
    for name, subject in subjects.items():
        for attack in attacks:
            if subject.takes(attack) and not callable(attack.method):
                check_options(attack, subject.method(attack.method), name)
    rows: list[Measurement] = []
    for name, subject in subjects.items():
        start = time.perf_counter()
        clean = subject.is_right(subject.X)
        seconds = time.perf_counter() - start
        standing = clean.copy()  # what no attack has broken, at this radius or a smaller one
        for radius, ball in zip(radii, balls, strict=True):
            add = Adder(rows, name, radius, confidence)
            add("clean", clean, seconds)
            standing = _attacked(subject, ball, attacks, random_state, clean, standing, add)
            _verified(subject, ball, exact, time_limit, clean, standing, add)
    return RobustnessTable(rows)


def _checked_radii(epsilons) -> list[float]:
    try:
        return sorted(float(radius) for radius in np.atleast_1d(epsilons))
    except (TypeError, ValueError) as error:
        raise ValueError(f"epsilons must be numbers, got {epsilons!r}.") from error


def _check_data(X, y):
    if not (np.issubdtype(X.dtype, np.number) or X.dtype == bool) or not np.isfinite(X).all():
        raise ValueError("X must be finite: it holds NaN or infinite values, or no numbers.")
    if len(X) != len(y) or len(X) == 0:
        raise ValueError(f"X and y must be of one length > 0, got {len(X)} and {len(y)}.")


def _attacked(subject, ball, attacks, random_state, clean, standing, add):
    """Run the attacks, and return which samples stand."""
    standing, any_run = standing.copy(), False
    for attack in attacks:
        begin, stands = time.perf_counter(), None
        if subject.takes(attack):
            stands = clean.copy()
            k = np.flatnonzero(clean)
            if len(k):
                stands[k] = subject.stands(attack, ball, k, random_state)
        add(attack.name, stands, time.perf_counter() - begin)
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
    certified[k] = subject.status(k, ball, "interval", None) == Verdict.ROBUST
    add("certified", certified, time.perf_counter() - start)
    if exact:
        start, certified = time.perf_counter(), certified.copy()
        k = np.flatnonzero(standing & ~certified)
        verdicts = subject.status(k, ball, "exact", time_limit)
        certified[k] = verdicts == Verdict.ROBUST
        undecided = int(np.sum(verdicts == Verdict.UNKNOWN))
        add("exact", certified, time.perf_counter() - start, undecided)
    if (certified & ~standing).any():
        k = np.flatnonzero(certified & ~standing)[0]
        raise RuntimeError(
            f"sample {k} was proven robust at {ball!r} and broken by an attack: please report this."
        )
    return None


def _named(estimators):
    if isinstance(estimators, Mapping):
        return dict(estimators)
    if isinstance(estimators, list | tuple):
        names = [type(model).__name__ for model in estimators]
        if len(set(names)) < len(names):
            raise ValueError(f"give a dict of names to models: {names} are not distinct.")
        return dict(zip(names, estimators, strict=True))
    return {type(estimators).__name__: estimators}
