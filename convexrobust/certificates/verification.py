r"""Exact verification: the true worst case of a network on sets, and verdicts about samples."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from convexrobust.backends import numpy as numpy_backend
from convexrobust.certificates.branch_and_bound import Search
from convexrobust.certificates.interval import certified_radius, interval_of_outputs, margin_bounds
from convexrobust.certificates.margins import margin_directions, nearer, smallest
from convexrobust.certificates.relaxation import Minima
from convexrobust.conversion import as_network, network_labels

METHODS = ("interval", "lp", "exact")
_ROWS_AT_ONCE = 1024  # searched together
_DOUBLINGS = 38  # of a radius, up to 1e11 times the first
_NARROW = 0.2  # relative width of a bracket from which its upper end is tried


class Verdict(StrEnum):
    """What a `Certificate` says about a sample; members are strings, as the arrays hold them."""

    ROBUST = "robust"
    """The lower bound of its worst-case margin is positive: no perturbation changes its class."""

    BROKEN = "broken"
    """The margin at a point found in its set is at most 0."""

    UNKNOWN = "unknown"
    """Neither: the method is too coarse, or its time was over."""


class Certificate(NamedTuple):
    """What is known about each sample on its perturbation set.

    Attributes
    ----------
    status : ndarray of shape (n,), of str
        The `Verdict` on each sample.
    lower : ndarray of shape (n,)
        Lower bounds of the worst-case margins.
    upper : ndarray of shape (n,)
        Margins at ``X_adv``.
    X_adv : ndarray of shape (n, d)
        The worst points found, inside the sets.
    seconds : ndarray of shape (n,)
        Time spent on each sample, its share where samples were treated together.
    """

    status: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    X_adv: np.ndarray
    seconds: np.ndarray


def certify(model, X, y, ball, method="interval", *, time_limit=None) -> Certificate:
    r"""Decide for each sample whether a perturbation can change its class.

    Parameters
    ----------
    model : TwoLayerReLU or model
        A network, or what `convexrobust.conversion.as_network` makes one of: a fitted estimator of
        this package, a torch ``Sequential(Linear, ReLU, Linear)``, scikit-learn's
        ``MLPClassifier`` with one hidden layer, or a ``Pipeline`` of scalers and one of these,
        whose perturbations are then those of its inputs.
    X : ndarray of shape (n, d)
        Data, without an intercept column.
    y : ndarray of shape (n,)
        Labels: of ``model.classes_`` if the model has them; otherwise -1 / +1 with one output,
        class numbers 0 .. C-1 with several.
    ball : LpBall
        The threat model. Bounds count in every norm for "lp" and "exact", otherwise for l-inf.
    method : {"interval", "lp", "exact"}
        "interval": `margin_bounds`, a few matrix products. "lp": the triangle relaxation, in which
        concave neurons that change sign on a set are replaced by their chords. "exact": branch and
        bound on the signs of those neurons, which decides every sample in the end.
    time_limit : float, optional
        Seconds for each sample with "lp" and "exact"; a sample then stays "unknown", with the
        bracket found. What has begun is finished: for wide networks that can take a second.

    Returns
    -------
    Certificate
        Brackets are only as narrow as the verdict needs; see `exact_margins` for closed ones.

    Raises
    ------
    ValueError
        If the model is no two-layer ReLU network, X, y or the ball do not fit it, X is outside the
        bounds, or for an unknown method.

    Notes
    -----
    Every lower bound holds by weak duality, less the most that rounding can have added; solvers
    propose multipliers and are not trusted. A margin of exactly 0 counts as broken; one that is 0
    up to 1e-9 of the span of the output on the set may stay "unknown" without a time limit.

    At radius 0 margins are those that the network computes, rounded as they are.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")
    check_time_limit(time_limit)
    network, y = as_network(model), network_labels(model, y)
    start = time.perf_counter()
    known = margin_bounds(network, X, y, ball)
    X = np.array(X, dtype=np.float64)
    directions = margin_directions(network, y, len(X))
    if method == "interval":
        share = (time.perf_counter() - start) / max(len(X), 1)
        return _certificate(network, directions, known, X, np.full(len(X), share))
    options = {"verdict_only": True, "split": method == "exact", "time_limit": time_limit}
    lower, X_adv, seconds = _searched(network, X, directions, ball, known, **options)
    share = (time.perf_counter() - start - seconds.sum()) / max(len(X), 1)
    return _certificate(network, directions, lower, X_adv, seconds + max(share, 0.0))


def exact_margins(model, X, y, ball, *, time_limit=None) -> Certificate:
    """Return the true worst-case margin of each sample over its perturbation set.

    As `certify` with ``method="exact"``, but every bracket [lower, upper] is closed to 1e-6 of the
    span of the output on the set (the solver's accuracy permitting), not only its sign decided.

    Parameters
    ----------
    model, X, y, ball, time_limit
        As in `certify`.
    """
    check_time_limit(time_limit)
    network, y = as_network(model), network_labels(model, y)
    known = margin_bounds(network, X, y, ball)
    X = np.array(X, dtype=np.float64)
    directions = margin_directions(network, y, len(X))
    found = _searched(network, X, directions, ball, known, time_limit=time_limit)
    return _certificate(network, directions, *found)


def output_interval(model, X, ball, method="interval", *, time_limit=None):
    """Return the ends lo, hi (n, C) of intervals that hold each output on the whole set.

    Parameters
    ----------
    model, X, ball, method, time_limit
        As in `certify`. With "exact" the intervals are the smallest, up to 1e-6 of their length.

    Raises
    ------
    ValueError
        As `certify`.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")
    check_time_limit(time_limit)
    network = as_network(model)
    lo, hi = interval_of_outputs(network, X, ball)
    if method == "interval":
        return lo, hi
    X = np.asarray(X, dtype=np.float64)
    options = {"split": method == "exact", "time_limit": time_limit}
    for c, direction in enumerate(np.eye(network.n_outputs)):
        for sign, ends in ((1.0, lo), (-1.0, hi)):
            directions = np.broadcast_to(sign * direction, (len(X), 1, network.n_outputs))
            known = sign * ends[:, c]
            lower, *_ = _searched(network, X, directions, ball, known, **options)
            ends[:, c] = sign * lower
    return lo, hi


class RadiusBracket(NamedTuple):
    """What is known about the distance to the nearest adversarial point.

    Attributes
    ----------
    lower : ndarray of shape (n,)
        Radii at which the samples are proven robust.
    upper : ndarray of shape (n,)
        Radii that reach ``X_adv``, inf where no adversarial point was found.
    X_adv : ndarray of shape (n, d)
        Adversarial points; where there is none, the samples.
    seconds : ndarray of shape (n,)
        Time spent on each sample.
    """

    lower: np.ndarray
    upper: np.ndarray
    X_adv: np.ndarray
    seconds: np.ndarray


def exact_radius(model, X, y, ball, *, tol=1e-3, time_limit=None) -> RadiusBracket:
    """Return for each sample a bracket of the largest radius at which it is robust.

    Both ends are proven: the lower by exact verification, the upper by a misclassified point.

    Parameters
    ----------
    model, X, y
        As in `certify`.
    ball : LpBall
        Norm, bounds and shape; the sets are ``ball.scaled_to(radius)``.
    tol : float
        Relative width of the bracket that is good enough.
    time_limit : float, optional
        Seconds for each sample, after which its bracket is returned as it is.

    Returns
    -------
    RadiusBracket
        0 and 0 for samples that are misclassified; inf and inf where nothing within the bounds is
        adversarial, or up to 1e11 times ``ball.radius`` without bounds. The upper end is inf where
        none was found: in time, or before rounding hid the margin.
    """
    check_time_limit(time_limit)
    if not 0.0 < tol < 1.0:
        raise ValueError(f"tol must be between 0 and 1, got {tol!r}.")
    network, y = as_network(model), network_labels(model, y)
    low, X = certified_radius(network, X, y, ball), np.asarray(X, dtype=np.float64)
    directions, X_adv, seconds = margin_directions(network, y, len(X)), X.copy(), np.zeros(len(X))
    wrong = smallest(network, X, directions) <= 0.0
    high, unit, first = np.where(wrong, 0.0, np.inf), ball.scaled_to(1.0), ball.radius or 1.0
    k, n_tries = np.flatnonzero(~wrong & np.isfinite(low)), np.zeros(len(X), dtype=int)
    while len(k):
        t = _next_radius(low[k], high[k], n_tries[k], tol, first)
        lower, points, taken = _searched(
            network,
            X[k],
            directions[k],
            unit,
            np.full(len(k), -np.inf),
            verdict_only=True,
            time_limit=None if time_limit is None else time_limit - seconds[k],
            radius=t,
        )
        n_tries[k] += 1
        seconds[k] += taken
        broken, robust = smallest(network, points, directions[k]) <= 0.0, lower > 0.0
        low[k[robust]] = t[robust]
        hit = k[broken]
        X_adv[hit] = nearer(network, X[hit], points[broken], directions[hit], unit)
        high[hit] = np.minimum(unit.length(X_adv[hit] - X[hit]), t[broken])
        boundless = k[robust & (t > first * 2.0**_DOUBLINGS)]
        low[boundless] = high[boundless] = np.inf
        k = k[(broken | robust) & ~np.isin(k, boundless)]
        k = k[np.isinf(high[k]) | (high[k] - low[k] > tol * high[k])]
    return RadiusBracket(low, high, X_adv, seconds)


def _next_radius(low, high, n_tries, tol, first):
    """Return the radii to verify next: doubled, in the middle, or last just below the upper ends.

    The upper end is often the true radius, because adversarial points are pulled in; one proof just
    below it then closes the bracket. Every third time it is the middle, should that not be so.
    """
    doubled = np.maximum(2.0 * low, 1e-3 * first)
    is_last = (high - low <= _NARROW * high) & (n_tries % 3 > 0)
    with np.errstate(invalid="ignore"):
        inside = np.where(is_last, (1.0 - 0.9 * tol) * high, (low + high) / 2.0)
    return np.where(np.isinf(high), doubled, np.maximum(inside, low))


def exact_objective(program, network) -> tuple[float, float]:
    r"""Return a bracket of a network's true worst-case objective on the data of a program.

    .. math:: \sum_k \omega_k \max_\delta \varphi(m_k(x_k + \delta))
              + \beta \sum_j \|u_j\|_2 \|\alpha_j\|_1

    It is closed to the accuracy of `exact_margins`, except for losses of several margins that are
    not of the smallest alone, as the logistic one of several classes: the upper end takes the worst
    cases of the margins separately, the lower end the loss at the worst of these points.

    Parameters
    ----------
    program : ConvexProgram
        Its data, loss, weights, penalty and threat model; patterns and formulation do not count.
    network : TwoLayerReLU
        The network, whoever trained it.
    """
    X = program.X[:, : network.n_features]
    directions, offsets, _ = program.margin_map
    low, known, met = np.empty(offsets.shape), np.full(len(X), -np.inf), []
    for e in range(offsets.shape[1]):
        direction = directions[:, e : e + 1]
        low[:, e], X_adv, _ = _searched(network, X, direction, program.perturbation, known)
        met.append(np.einsum("nec,nc->ne", directions, network.predict(X_adv)) + offsets)
    losses = [program.loss.value(numpy_backend, margins) for margins in met]
    reached = np.array(met)[np.argmax(losses, axis=0), np.arange(len(X))]
    length = np.linalg.norm(network.hidden, axis=0) * np.abs(network.output).sum(axis=1)
    lower, upper = (
        program.mean_loss(numpy_backend, margins) + program.regularizer.beta * length.sum()
        for margins in (reached, low + offsets)
    )
    return float(lower), float(upper)


def check_time_limit(time_limit):
    """Raise ValueError for a time limit that is no number of seconds."""
    if time_limit is not None and not time_limit >= 0.0:
        raise ValueError(f"time_limit must be None or seconds >= 0, got {time_limit!r}.")


def _searched(network, X, directions, ball, known, *, radius=None, time_limit=None, **options):
    """Return lower bounds of the smallest outputs, the points found, and seconds, all (n, ...)."""
    limit = np.broadcast_to(np.inf if time_limit is None else time_limit, len(X))
    parts = []
    for start in range(0, len(X), _ROWS_AT_ONCE):
        k = slice(start, start + _ROWS_AT_ONCE)
        around = ball.around(X[k], radius=None if radius is None else radius[k])
        n_rows, n_each = directions[k].shape[:2]
        flat = directions[k].reshape(n_rows * n_each, -1)
        minima = Minima(
            network,
            around,
            np.repeat(np.arange(n_rows), n_each),
            flat @ network.output.T,
            flat @ network.offset,
        )
        bounds = np.repeat(known[k], n_each)
        search = Search(minima, X[k], ball, bounds, time_limit=limit[k], **options)
        parts.append(search.run())
    if not parts:
        return known, X, np.zeros(0)
    return tuple(map(np.concatenate, zip(*parts, strict=True)))


def _certificate(network, directions, lower, X_adv, seconds) -> Certificate:
    upper = smallest(network, X_adv, directions)
    lower = np.minimum(lower, upper)
    decided = [lower > 0.0, upper <= 0.0]
    status = np.select(decided, [Verdict.ROBUST, Verdict.BROKEN], Verdict.UNKNOWN)
    return Certificate(status, lower, upper, X_adv, seconds)
