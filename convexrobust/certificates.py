r"""What a network provably does on whole perturbation sets.

There are two answers. The *interval* of `convexrobust.program` at new points, with the network's
own gates at the centres of the sets as patterns, costs a few matrix products. The *exact* worst
case comes from branch and bound: milliseconds a sample for convexly trained networks.

The *margin* of a sample is :math:`y f(x)` with one output and labels -1 / +1, and the smallest
:math:`f_y(x) - f_c(x)` over the rivals c with several: the smallest output of some networks with
one output, whose neurons have output weights -1 and +1. Everything below works on those ("nets").
"""

from __future__ import annotations

import time
import warnings
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from convexrobust.backends import numpy as numpy_backend
from convexrobust.losses import Absolute, Hinge
from convexrobust.network import TwoLayerReLU
from convexrobust.perturbations import DUAL_NORM, LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso

_BATCH = 2048  # rows at a time, so that memory stays bounded
_DOUBLINGS, _HALVINGS = 38, 40  # of a radius: up to 1e11 times the first, then to 12 digits
_MOST_CONCAVE = 12  # neurons whose states are enumerated in l2: 4096 cases
_FLAT = 1e-9  # a neuron that changes sign by less than this part of the largest span is stable
_TOLERANCE = 1e-6  # HiGHS allows 1e-6 on gap, integers and mixed-integer rows, 1e-7 on prices


def output_interval(network, X, ball) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends lo, hi (n, C) of intervals that hold each output on the whole set.

    Parameters
    ----------
    network : TwoLayerReLU
        The network.
    X : ndarray of shape (n, d)
        Data, without an intercept column.
    ball : LpBall
        The threat model. Bounds count for l-inf; for l1 and l2 the interval is the uncut ball's.

    Raises
    ------
    ValueError
        If X does not fit the network, or lies outside the bounds.
    """
    rows = network.design(X)
    lo, hi = np.empty((2, len(rows), network.n_outputs))
    for c, direction in enumerate(np.eye(network.n_outputs)):
        net = _net(network, direction)
        for part in _batches(len(rows)):
            above, below = _interval(net, rows[part], ball, Absolute(), 0).T
            lo[part, c], hi[part, c] = net.offset + below, net.offset - above
    return lo, hi


def margin_bounds(network, X, y, ball) -> np.ndarray:
    """Return a lower bound of each sample's margin on its whole perturbation set, (n,).

    A difference of two outputs is bounded as one network, tighter than by two intervals.

    Parameters
    ----------
    network, X, ball
        As in `output_interval`.
    y : ndarray of shape (n,)
        Labels -1 / +1 with one output, class numbers 0 .. C-1 with several.
    """
    rows = network.design(X)
    bounds = np.empty(len(rows))
    for group, nets in _groups(network, y, len(rows)):
        bounds[group] = np.min([_lower(net, rows[group], ball) for net in nets], axis=0)
    return bounds


def certified_radius(network, X, y, ball) -> np.ndarray:
    """Return the largest radius at which `margin_bounds` proves each sample robust, (n,).

    The balls are ``ball.scaled_to(radius)``; for a ball of radius 0 all features have the same.

    Parameters
    ----------
    network, X, y, ball
        As in `margin_bounds`.

    Returns
    -------
    ndarray of shape (n,)
        0 where the clean margin is not positive; inf where the sample is still robust at 1e11 times
        ``ball.radius`` (or at 1e11, if that is 0): all its bounds, or a network that is constant.

    Notes
    -----
    The lower end of a bisection, which has itself been certified; every smaller radius is proven
    with it, because the sets are nested.
    """
    rows = network.design(X)
    ball.check_inside(rows[:, : network.n_features])
    radius = np.empty(len(rows))
    for group, nets in _groups(network, y, len(rows)):
        for part in _batches(len(group)):
            k = group[part]
            radius[k] = np.min([_radius(net, rows[k], ball) for net in nets], axis=0)
    return radius


class ExactResult(NamedTuple):
    """True worst-case margins, each within a bracket.

    Attributes
    ----------
    lower : ndarray of shape (n,)
        Lower bounds of the worst-case margins.
    upper : ndarray of shape (n,)
        Margins at ``X_adv``.
    X_adv : ndarray of shape (n, d)
        The worst points found, inside the sets.
    status : ndarray of shape (n,), of str
        "robust" where lower > 0, "broken" where upper <= 0, otherwise "unknown".
    seconds : ndarray of shape (n,)
        Time of the search of each sample.
    """

    lower: np.ndarray
    upper: np.ndarray
    X_adv: np.ndarray
    status: np.ndarray
    seconds: np.ndarray


def exact_margins(network, X, y, ball, *, verdict_only=False, time_limit=None) -> ExactResult:
    r"""Return the true worst-case margin of each sample over its perturbation set.

    Only neurons that change sign within a set are not linear there. Those with a positive output
    weight are convex. For the others :math:`-(t)_+ = \min_{a \in \{0, 1\}} -a t`, so the worst case
    is the smallest of finitely many convex problems. For l1 and l-inf they form one mixed-integer
    linear program (HiGHS); for l2 they are cone programs (Clarabel), visited best bound first.

    Parameters
    ----------
    network, X, y, ball
        As in `margin_bounds`. Bounds are exact in every norm.
    verdict_only : bool
        Stop as soon as a sample is known to be robust or broken; the brackets are then wide.
    time_limit : float, optional
        Seconds for each sample; when they are over, its bracket is what is known by then.

    Notes
    -----
    Brackets close to about 1e-5 of the span of the output, unless more than 12 neurons with a
    negative output weight change sign in l2: those samples are not searched.

    For l2 ``lower`` holds by weak duality, whatever the solver's accuracy. For l1 and l-inf it is
    the solver's bound, lowered by 1e-6 of the span of every neuron that changes sign, of their mean
    once more, and for l-inf 2e-7 of it for each feature: the most that the tolerances allow, though
    no proof against errors of the solver.
    """
    network.design(X)
    X = np.array(X, dtype=np.float64)
    lower, upper, seconds = np.empty((3, len(X)))
    for group, nets in _groups(network, y, len(X)):
        found = _worst_cases(nets, X[group], ball, verdict_only, time_limit)
        lower[group], upper[group], X[group], seconds[group] = found
    status = np.select([lower > 0.0, upper <= 0.0], ["robust", "broken"], "unknown")
    return ExactResult(lower, upper, X, status, seconds)


def exact_objective(program, network) -> tuple[float, float]:
    r"""Return a bracket of a network's true worst-case objective on the data of a program.

    .. math:: \sum_k \omega_k \max_\delta \varphi(m_k(x_k + \delta))
              + \beta \sum_j \|u_j\|_2 \|\alpha_j\|_1

    It is closed to the solver's tolerance, except for the logistic loss of several classes: its
    upper end takes the worst cases of the rivals separately, its lower end counts one rival only.

    Parameters
    ----------
    program : ConvexProgram
        Its data, loss, weights, penalty and threat model; patterns and formulation do not count.
    network : TwoLayerReLU
        The network, whoever trained it.
    """
    X = program.X[:, : network.n_features]
    directions, offsets, _ = program.margin_map
    low, high = np.empty((2, *offsets.shape))
    for e in range(offsets.shape[1]):
        for direction in np.unique(directions[:, e], axis=0):
            k = np.flatnonzero((directions[:, e] == direction).all(axis=1))
            nets = [_net(network, direction)]
            low[k, e], high[k, e], _, _ = _worst_cases(nets, X[k], program.perturbation)
    one_rival = np.min(high + offsets, axis=1, keepdims=True)
    length = np.linalg.norm(network.hidden, axis=0) * np.abs(network.output).sum(axis=1)
    lower, upper = (
        program.mean_loss(numpy_backend, margins) + program.regularizer.beta * length.sum()
        for margins in (one_rival, low + offsets)
    )
    return float(lower), float(upper)


# -------------------------------------------------------------------------------- the interval


def _batches(n):
    return [slice(start, start + _BATCH) for start in range(0, n, _BATCH)]


def _net(network, direction) -> TwoLayerReLU:
    """Return ``direction @ f`` as a network whose output weights are -1 and +1."""
    weight = network.output @ direction
    hidden, output = network.hidden * np.abs(weight), np.sign(weight)[:, None]
    offset, used = np.array([network.offset @ direction]), weight != 0.0
    return TwoLayerReLU(hidden[:, used], output[used], network.intercept, offset)


def _groups(network, y, n):
    """Return for each label its rows, and the nets of which the margin is the smallest output."""
    y, n_outputs = np.asarray(y), network.n_outputs
    legal = [-1, 1] if n_outputs == 1 else list(range(n_outputs))
    if y.shape != (n,) or not np.isin(y, legal).all():
        raise ValueError(
            f"y must have shape ({n},) and hold only {legal} for this network, got shape {y.shape} "
            f"with {np.unique(y)[:5]}."
        )
    groups, identity = [], np.eye(n_outputs)
    for label in np.unique(y).astype(int):
        rivals = identity[np.arange(n_outputs) != label]
        directions = label * identity if n_outputs == 1 else identity[label] - rivals
        groups.append((np.flatnonzero(y == label), [_net(network, row) for row in directions]))
    return groups


def _interval(net, rows, ball, loss, target):
    """Return the safe margins (n, E) of a soft program at a net, without the offset.

    Without perturbations they are those that the network computes, rounded as they are.
    """
    D = ball.around(rows, intercept=net.intercept).center @ net.hidden >= 0.0
    V, W = (np.where(sign * net.output[:, 0] > 0.0, net.hidden, 0.0)[None] for sign in (1, -1))
    y = np.full(len(rows), target)
    program = ConvexProgram(rows, y, D, loss, GroupLasso(0.0), ball, intercept=net.intercept)
    if ball.radius == 0.0:
        return program.margins(numpy_backend, V, W)
    return program.safe_margins(V, W)


def _lower(net, rows, ball):
    """Return the lower ends (n,) of the intervals of a net."""
    parts = [_interval(net, rows[part], ball, Hinge(), 1)[:, 0] for part in _batches(len(rows))]
    return net.offset + np.concatenate(parts)


class _RowBalls(LpBall):
    """An l-inf ball with bounds and a radius for every row: ``epsilon`` is (n, d)."""

    def __post_init__(self):
        """Trust the bounds, which another ball has checked."""

    def epsilons(self, n_features):
        """Return the radii of all rows, which broadcast as those of one would."""
        return self.epsilon


def _lower_at(net, rows, unit, t):
    """Return the lower ends (n,) where row k has the set ``unit.scaled_to(t[k])``."""
    t = t[:, None]
    if unit.p == np.inf and unit.bounds is not None:
        return _lower(net, rows, _RowBalls(unit.p, t * unit.epsilons(net.n_features), unit.bounds))
    # Without its offset a net is positively homogeneous in the row and the radius together.
    return t[:, 0] * (_lower(net, rows / t, LpBall(unit.p, unit.epsilon)) - net.offset) + net.offset


def _radius(net, rows, ball):
    """Return the largest radii (n,) at which the lower ends of a net are positive."""
    unit, low, high = ball.scaled_to(1.0), np.zeros(len(rows)), np.full(len(rows), np.inf)
    t, right = ball.radius or 1.0, net.predict(rows[:, : net.n_features])[:, 0] > 0.0
    k = np.flatnonzero(right)
    for _ in range(_DOUBLINGS):
        if len(k):
            proven = _lower_at(net, rows[k], unit, np.full(len(k), t)) > 0.0
            low[k[proven]], high[k[~proven]] = t, t
            k, t = k[proven], 2.0 * t
    low[k] = np.inf
    k = np.flatnonzero(right & np.isfinite(low))
    for _ in range(_HALVINGS if len(k) else 0):
        middle = (low[k] + high[k]) / 2.0
        proven = _lower_at(net, rows[k], unit, middle) > 0.0
        low[k], high[k] = np.where(proven, middle, low[k]), np.where(proven, high[k], middle)
    return low * (1.0 - 1e-9)  # the margin is then positive in spite of rounding


# -------------------------------------------------------------------------------- the worst case


def _worst_cases(nets, X, ball, verdict_only=False, time_limit=None):
    """Return brackets of the smallest output of the nets: lower, upper, points and seconds."""
    bounds = np.column_stack([_lower(net, net.design(X), ball) for net in nets])
    X_adv, upper = np.array(X), _smallest(nets, X)
    lower, seconds = np.empty((2, len(X)))
    for net in nets:
        points = _descent(net, X, ball)
        values = _smallest(nets, points)
        X_adv = np.where((values < upper)[:, None], points, X_adv)
        upper = np.minimum(values, upper)
    for k, x in enumerate(X):
        search = _Search(nets, x, ball, X_adv[k], upper[k], verdict_only, time_limit)
        found = search.run(bounds[k])
        # A bound above a point that was found is an error of the solver, and proves nothing.
        wrong = found > search.upper + _TOLERANCE * (1.0 + abs(search.upper))
        lower[k] = bounds[k].min() if wrong else min(found, search.upper)
        X_adv[k], upper[k], seconds[k] = search.point, search.upper, search.seconds()
    return lower, upper, X_adv, seconds


def _smallest(nets, X):
    return np.min([net.predict(X)[:, 0] for net in nets], axis=0)


def _descent(net, X, ball, n_steps=10):
    """Return perturbed points with a small output of a net, by conditional gradients.

    The first step is exact where no neuron changes sign, for l-inf or without bounds.
    """
    delta, best, lowest = np.zeros(X.shape), X, net.predict(X)[:, 0]
    for step in range(n_steps):
        downhill = -net.gradient(X + delta, np.ones((len(X), 1)))
        vertex = ball.project(numpy_backend, ball.steepest(numpy_backend, downhill), X)
        delta = delta + 2.0 / (step + 2.0) * (vertex - delta)
        value = net.predict(X + delta)[:, 0]
        best = np.where((value < lowest)[:, None], X + delta, best)
        lowest = np.minimum(value, lowest)
    return best


class _Search:
    """The search for the worst point of one sample: ``point`` with ``upper``, its margin."""

    def __init__(self, nets, x, ball, point, upper, verdict_only, time_limit):
        self.nets, self.x, self.ball, self.point, self.upper = nets, x, ball, point, upper
        self.verdict_only, self.clock = verdict_only, time.perf_counter()
        self.time_limit = np.inf if time_limit is None else time_limit

    def seconds(self):
        """Return the time since the start."""
        return time.perf_counter() - self.clock

    def seconds_left(self):
        """Return the time that a solver may take."""
        return max(self.time_limit - self.seconds(), 1e-3)

    def is_settled(self, bound):
        """Tell whether the search is over, given a lower bound on what is left to search."""
        if bound >= self.upper - 1e-12 * abs(self.upper) or self.seconds() >= self.time_limit:
            return True
        return self.verdict_only and (bound > 0.0 or self.upper <= 0.0)

    def run(self, bounds):
        """Return a lower bound of the margin, from lower bounds (E,) of the nets."""
        bounds = np.array(bounds)
        solve = _enumerated if self.ball.p == 2 else _mixed_integer
        for e in np.argsort(bounds):
            if self.is_settled(bounds[e]):
                break
            local = _Local.around(self.nets[e], self.x, self.ball)
            bounds[e] = max(bounds[e], solve(local, self))
        return bounds.min()

    def visit(self, local, v):
        """Move the point of v into the set and keep it if it is the worst so far."""
        delta = np.sum((local.axes * v).reshape(-1, len(self.x)), axis=0) + local.center - self.x
        X_adv = self.x + self.ball.project(numpy_backend, delta[None], self.x[None])
        value = _smallest(self.nets, X_adv)[0]
        if value < self.upper:
            self.point, self.upper = X_adv[0], value


class _Local(NamedTuple):
    r"""A net on one set, constant + slope'v + sum_j sign_j (start_j + G_j v)_+, low <= v <= high.

    The set also asks for :math:`\|v\|_p \le 1`. Here j counts the neurons that change sign, with
    values from least_j to most_j. For l1 there is an entry of v >= 0 for each direction of a
    feature; otherwise one for each feature, in units of ``axes`` from ``center``.
    """

    center: np.ndarray
    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray
    constant: float
    slope: np.ndarray
    start: np.ndarray
    G: np.ndarray
    sign: np.ndarray
    least: np.ndarray
    most: np.ndarray

    @classmethod
    def around(cls, net, x, ball):
        """Return a net on the set around x."""
        d, sets = len(x), ball.around(x[None])
        center, axes = sets.center[0], sets.radius * sets.weights[0]
        lo, hi = ((end - center) / np.where(axes > 0, axes, 1) for end in ball.feature_range(d))
        low, high = np.clip(lo, -1.0, 0.0), np.clip(hi, 0.0, 1.0)
        hidden, start = net.hidden[:d], (net.design(center[None]) @ net.hidden)[0]
        if ball.p == 1:
            hidden, axes = np.vstack([hidden, hidden]), np.concatenate([axes, -axes])
            low, high = np.zeros(2 * d), np.concatenate([high, -low])
        G = (hidden * axes[:, None]).T
        radius = np.linalg.norm(G, ord=DUAL_NORM[ball.p], axis=1)
        ends = np.stack([G * low, G * high])
        least = start + np.maximum(ends.min(axis=0).sum(axis=1), -radius)
        most = start + np.minimum(ends.max(axis=0).sum(axis=1), radius)

        flat = _FLAT * np.max(most - least, initial=0.0)
        on, off, sign = least >= -flat, most <= flat, net.output[:, 0]
        # A nearly stable concave neuron is charged the most by which it may differ from a line.
        charge = np.where(on, -least, most)[(on | off) & (sign < 0.0)].clip(0.0).sum()
        constant, moving = net.offset[0] + sign[on] @ start[on] - charge, ~(on | off)
        slope, spans = sign[on] @ G[on], (sign[moving], least[moving], most[moving])
        return cls(center, axes, low, high, constant, slope, start[moving], G[moving], *spans)


def _mixed_integer(local, search):
    """Return a lower bound by HiGHS, for l1 and l-inf; show the search its point.

    The variables are v, the states a of the concave neurons, and a rest r >= 0 for each neuron:
    (t)_+ = r >= t if it is convex, -(t)_+ = r - most a with r >= (most - least) a - (t - least)
    if not. Rows are in units of the neurons' spans, the objective in that of their mean.
    The usual big-M rows around (t)_+ say the same, but took HiGHS 2 to 30 times longer.
    """
    sign, concave, span = local.sign, local.sign < 0.0, local.most - local.least
    (m, v), n_states = local.G.shape, np.count_nonzero(concave)
    unit = np.mean(span) if m else np.abs(local.slope).max() or 1.0
    rows = np.hstack([local.G * (sign / span)[:, None], np.eye(m)[:, concave], -np.eye(m)])
    limits = -(sign * local.start + np.where(concave, local.least, 0.0)) / span
    if search.ball.p == 1:
        rows = np.vstack([rows, np.repeat([1.0, 0.0], [v, n_states + m])])
        limits = np.append(limits, 1.0)
    result = milp(
        np.concatenate([local.slope, -local.most[concave], span]) / unit,
        integrality=np.repeat([0, 1, 0], [v, n_states, m]),
        bounds=Bounds(
            np.concatenate([local.low, np.zeros(n_states + m)]),
            np.concatenate([local.high, np.ones(n_states), np.full(m, np.inf)]),
        ),
        constraints=LinearConstraint(rows, -np.inf, limits),
        options={"time_limit": search.seconds_left(), "mip_rel_gap": 0.0},
    )
    if result.x is not None:
        search.visit(local, result.x[:v])
    bound = result.mip_dual_bound if n_states else result.fun
    if bound is None or (n_states == 0 and result.status != 0):
        return -np.inf
    # A wrong price costs at most the way of its column: in l1 they have one way together.
    columns = 1 if search.ball.p == 1 else v
    return local.constant + unit * (bound - _TOLERANCE * (1.0 + m + 0.2 * columns))


def _enumerated(local, search):
    """Return a lower bound for l2 over all states of the concave neurons; show the search points.

    Multipliers g in [0, 1] of the convex neurons leave a linear function, with a minimum over the
    ball in closed form: a bound for each case. Cases are solved until no bound is left below the
    best point.
    """
    concave, convex = local.sign < 0.0, local.sign > 0.0
    n_concave = np.count_nonzero(concave)
    if n_concave > _MOST_CONCAVE:
        return -np.inf
    states = (np.arange(2**n_concave)[:, None] >> np.arange(n_concave)) & 1
    constants = local.constant - states @ local.start[concave]
    slopes = local.slope - states @ local.G[concave]
    start, G = local.start[convex], local.G[convex]
    chord = (local.most / (local.most - local.least))[convex]
    bounds, solve = np.full(len(states), -np.inf), None
    for g in (chord, np.zeros(len(start)), np.ones(len(start))):
        bound = constants + g @ start - np.linalg.norm(slopes + g @ G, axis=1)
        bounds = np.maximum(bounds, bound)
    for case in np.argsort(bounds):
        if search.is_settled(bounds[case]):
            break
        solve = solve or _cone_program(local, start, G)
        bound, v = solve(slopes[case])
        bounds[case] = max(bounds[case], constants[case] + bound)
        if v is not None:
            search.visit(local, v)
    return bounds.min()


def _cone_program(local, start, G):
    """Return a solver of min slope'v + sum_j (start_j + G_j v)_+ on a set, compiled once.

    It is a function from a slope to a lower bound, valid for inexact multipliers too, and v.
    """
    import cvxpy as cp

    v, h = cp.Variable(len(local.axes)), cp.Variable(len(start), nonneg=True)
    parameter, rows = cp.Parameter(len(local.axes)), [start + G @ v <= h]
    rows += [v <= local.high, local.low <= v]
    problem = cp.Problem(cp.Minimize(parameter @ v + cp.sum(h)), [*rows, cp.norm(v, 2) <= 1.0])

    def solve(slope):
        parameter.value = slope
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")
            try:
                problem.solve(solver=cp.CLARABEL)
            except cp.SolverError:
                return -np.inf, None
        g, above, below = (np.maximum(np.nan_to_num(row.dual_value), 0.0) for row in rows)
        g = np.minimum(g, 1.0)
        lowest = -np.linalg.norm(slope + g @ G + above - below)
        return g @ start - above @ local.high + below @ local.low + lowest, v.value

    return solve
