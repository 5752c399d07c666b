r"""What a trained network provably does on whole perturbation sets.

Two answers for every sample, one cheap and one exact:

* the *interval* of `convexrobust.program` at new points, with the network's own gates at the
  centres of the sets as patterns: a few matrix products (`output_interval`, `margin_bounds`,
  `certified_radius`);
* the true worst case by branch and bound (`exact_margins`, `exact_objective`), in seconds up to
  about a hundred neurons that change sign within a set.

The *margin* of a sample is :math:`y f(x)` with one output and labels -1 / +1, and the smallest
:math:`f_y(x) - f_c(x)` over the rivals c with several. It is a minimum of outputs of networks with
one output, of which each neuron has output weight -1 or +1; everything below works on those.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from convexrobust.backends import numpy as numpy_backend
from convexrobust.losses import Absolute, Hinge
from convexrobust.network import TwoLayerReLU
from convexrobust.perturbations import DUAL_NORM, LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso

_BATCH = 2048  # rows at a time, so that memory stays bounded
_DOUBLINGS, _HALVINGS = 40, 40  # of a radius: up to 1e12 times the first, then to 12 digits
_MOST_CONCAVE = 12  # neurons whose on/off states are enumerated in l2: 4096 cases
_FLAT = 1e-9  # a neuron that changes sign by less than this part of the others counts as stable
_TOLERANCE = 1e-6  # of HiGHS: 1e-6 on gaps and integrality, 1e-7 on rows and columns


class ExactResult(NamedTuple):
    """True worst-case margins, each within a bracket.

    Attributes
    ----------
    lower : ndarray of shape (n,)
        Proven lower bounds of the worst-case margins.
    upper : ndarray of shape (n,)
        Margins of the network at ``X_adv``.
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


# -------------------------------------------------------------------------------- the interval


def output_interval(network, X, ball) -> tuple[np.ndarray, np.ndarray]:
    """Return an interval that contains each output on the whole perturbation set.

    It is the interval of `convexrobust.program` with the gates at the centres as patterns, so at
    the training points it is the one that training minimised, if no neuron changed its pattern.

    Parameters
    ----------
    network : TwoLayerReLU
        The network.
    X : ndarray of shape (n, d)
        Data, without an intercept column.
    ball : LpBall
        The threat model. Bounds count for l-inf; for l1 and l2 the interval is the uncut ball's.

    Returns
    -------
    lo, hi : ndarray of shape (n, C)

    Raises
    ------
    ValueError
        If X does not fit the network, or lies outside the bounds.
    """
    rows = network.design(X)
    lo, hi = np.empty((2, len(rows), network.n_outputs))
    for c, direction in enumerate(np.eye(network.n_outputs)):
        net = _scalar(network, direction)
        for part in _chunks(len(rows)):
            below, above = _interval(net, rows[part], ball, Absolute(), 0).T
            hi[part, c], lo[part, c] = net.offset - below, net.offset + above
    return lo, hi


def margin_bounds(network, X, y, ball) -> np.ndarray:
    """Return a lower bound of each sample's margin on its whole perturbation set, (n,).

    Parameters
    ----------
    network, X, ball
        As in `output_interval`.
    y : ndarray of shape (n,)
        Labels -1 / +1 with one output, class numbers 0 .. C-1 with several.

    Notes
    -----
    A difference of two outputs is bounded as one network, which is tighter than the difference of
    their intervals.
    """
    rows = network.design(X)
    bounds = np.empty(len(rows))
    for group, nets in _grouped(network, y, len(rows)):
        bounds[group] = np.min([_lower(net, rows[group], ball) for net in nets], axis=0)
    return bounds


def certified_radius(network, X, y, ball) -> np.ndarray:
    """Return the largest radius at which `margin_bounds` proves each sample robust, (n,).

    The balls are ``ball.scaled_to(radius)``, so with one epsilon per feature the radius is that of
    the feature with the largest; a ball of radius 0 stands for equal ones.

    Parameters
    ----------
    network, X, y, ball
        As in `margin_bounds`.

    Returns
    -------
    ndarray of shape (n,)
        0 where the clean margin is not positive. inf where the sample is proven robust and larger
        sets do not exist: the network does not look at any perturbed feature, or the bounds end.
        Radii are not looked for beyond 1e12 times ``ball.radius`` (or 1e12, if that is 0).

    Notes
    -----
    By bisection, of which the lower end is returned: it has itself been certified. Every smaller
    radius is then proven too, because the sets are nested.
    """
    rows = network.design(X)
    radius = np.empty(len(rows))
    for group, nets in _grouped(network, y, len(rows)):
        for part in _chunks(len(group)):
            k = group[part]
            radius[k] = np.min([_radius(net, rows[k], ball) for net in nets], axis=0)
    return radius


def _chunks(n):
    return [slice(start, start + _BATCH) for start in range(0, n, _BATCH)]


def _scalar(network, direction) -> TwoLayerReLU:
    """Return ``direction @ f`` as a network whose output weights are -1 and +1."""
    weight = network.output @ direction
    hidden = (network.hidden * np.abs(weight))[:, weight != 0.0]
    output = np.sign(weight)[weight != 0.0, None]
    return TwoLayerReLU(hidden, output, network.intercept, np.array([network.offset @ direction]))


def _grouped(network, y, n):
    """Return for each label its rows and the scalar networks whose minimum is the margin."""
    y, n_outputs = np.asarray(y), network.n_outputs
    legal = [-1, 1] if n_outputs == 1 else list(range(n_outputs))
    if y.shape != (n,) or not np.isin(y, legal).all():
        raise ValueError(
            f"y must have shape ({n},) and hold only {legal} for this network, "
            f"got shape {y.shape} with {np.unique(y)[:5]}."
        )
    groups, identity = [], np.eye(n_outputs)
    for label in np.unique(y):
        if n_outputs == 1:
            directions = [np.array([float(label)])]
        else:
            own = identity[int(label)]
            directions = [own - rival for c, rival in enumerate(identity) if c != label]
        nets = [_scalar(network, direction) for direction in directions]
        groups.append((np.flatnonzero(y == label), nets))
    return groups


def _interval(net, rows, ball, loss, target):
    """Return the margins (n, E) of a scalar network without its offset, as a soft program."""
    D = ball.around(rows, intercept=net.intercept).center @ net.hidden >= 0.0
    positive = net.output[:, 0] > 0.0
    V, W = np.where(positive, net.hidden, 0.0)[None], np.where(positive, 0.0, net.hidden)[None]
    y = np.full(len(rows), target)
    program = ConvexProgram(rows, y, D, loss, GroupLasso(0.0), ball, intercept=net.intercept)
    return program.margins(numpy_backend, V, W)


def _lower(net, rows, ball):
    """Return the lower ends (n,) of the intervals of a scalar network."""
    parts = [_interval(net, rows[part], ball, Hinge(), 1)[:, 0] for part in _chunks(len(rows))]
    return net.offset + np.concatenate(parts)


class _RowBalls(LpBall):
    """An l-inf ball with bounds and a radius for every row: ``epsilon`` is (n, d)."""

    def __post_init__(self):
        """Do not check again what another ball has checked."""

    def epsilons(self, n_features):
        """Return the radii of all rows, which broadcast as those of one."""
        return self.epsilon


def _lower_at(net, rows, unit, t):
    """Return the lower ends (n,) where row k has the set ``unit.scaled_to(t[k])``."""
    t = t[:, None]
    if unit.p == np.inf and unit.bounds is not None:
        boxes = _RowBalls(unit.p, t * unit.epsilons(net.n_features), unit.bounds)
        return _lower(net, rows, boxes)
    # Without its offset a network is positively homogeneous in the row and the radius together.
    return t[:, 0] * (_lower(net, rows / t, LpBall(unit.p, unit.epsilon)) - net.offset) + net.offset


def _radius(net, rows, ball):
    """Return the largest radii (n,) at which the lower ends of a scalar network are positive."""
    unit, reach = ball.scaled_to(1.0), _reach(net, ball)
    low, high = np.zeros(len(rows)), np.full(len(rows), ball.radius or 1.0)
    right = net.predict(rows[:, : net.n_features])[:, 0] > 0.0
    k = np.flatnonzero(right)
    for _ in range(_DOUBLINGS):
        if not k.size:
            break
        k = k[_lower_at(net, rows[k], unit, high[k]) > 0.0]
        low[k], high[k] = high[k], 2.0 * high[k]
        k = k[low[k] < reach]
    low[low >= reach] = np.inf
    k = np.flatnonzero(right & np.isfinite(low))
    for _ in range(_HALVINGS if k.size else 0):
        middle = (low[k] + high[k]) / 2.0
        proven = _lower_at(net, rows[k], unit, middle) > 0.0
        low[k], high[k] = np.where(proven, middle, low[k]), np.where(proven, high[k], middle)
    return low * (1.0 - 1e-9)  # a positive margin that rounding cannot take


def _reach(net, ball):
    """Return the radius from which on the sets that the network sees do not grow."""
    d, unit = net.n_features, ball.scaled_to(1.0)
    lo, hi = unit.feature_range(d)
    span = hi - lo if ball.p == np.inf else np.full(d, np.inf)
    seen = (unit.epsilons(d) > 0.0) & net.hidden[:d].any(axis=1)
    return np.max(span[seen] / unit.epsilons(d)[seen], initial=np.finfo(float).tiny)


# ----------------------------------------------------------------------- the exact worst case


def exact_margins(network, X, y, ball, *, verdict_only=False, time_limit=None) -> ExactResult:
    r"""Return the true worst-case margin of each sample over its perturbation set.

    Within a set only the neurons that change sign there are not linear. Those with a positive
    output weight are convex: their epigraph will do. For the others
    :math:`-(t)_+ = \min_{a \in \{0, 1\}} -a t`, so that the worst case is the smallest of finitely
    many convex problems. For l1 and l-inf they form one mixed-integer linear program (HiGHS); for
    l2 they are visited in the order of a bound, each a second-order cone program (Clarabel).

    Parameters
    ----------
    network, X, y, ball
        As in `margin_bounds`. Bounds are exact in every norm.
    verdict_only : bool
        Stop as soon as a sample is known to be robust or broken; the brackets are then wide.
    time_limit : float, optional
        Seconds for each sample. When they are over, its bracket is what is known until then.

    Returns
    -------
    ExactResult
        With brackets that are closed to about 1e-5 of the variation of the output, unless the
        search was stopped, or more than 12 neurons of negative output weight change sign in l2.

    Notes
    -----
    For l2 lower bounds hold by weak duality whatever the solver's accuracy. For l1 and l-inf the
    solver's bound is lowered by 1e-6 for each neuron that changes sign, in units of their mean
    variation, which is more than its tolerances allow. That is not a proof against errors in it.
    """
    network.design(X)
    X = np.asarray(X, dtype=np.float64)
    lower, X_adv, seconds = np.empty(len(X)), np.array(X), np.empty(len(X))
    for group, nets in _grouped(network, y, len(X)):
        lower[group], X_adv[group], seconds[group] = _worst_cases(
            nets, X[group], ball, verdict_only, time_limit
        )
    upper = _margins(network, X_adv, y)
    lower = np.minimum(lower, upper)
    status = np.select([lower > 0.0, upper <= 0.0], ["robust", "broken"], "unknown")
    return ExactResult(lower, upper, X_adv, status, seconds)


def exact_objective(program, network) -> tuple[float, float]:
    r"""Return a bracket of a network's true worst-case objective on the data of a program.

    .. math:: \sum_k \omega_k \max_\delta \varphi(m_k(x_k + \delta))
              + \beta \sum_j \|u_j\|_2 \|\alpha_j\|_1

    Parameters
    ----------
    program : ConvexProgram
        Its data, loss, weights, penalty and threat model; patterns and formulation do not count.
    network : TwoLayerReLU
        The network, whoever trained it.

    Returns
    -------
    lower, upper : float
        Closed to the solver's tolerance, except for the logistic loss of several classes: there
        ``upper`` takes the worst case of each rival separately, and ``lower`` counts one rival.
    """
    X = program.X[:, : network.n_features]
    directions, offsets, _ = program.margin_map
    low, high = np.empty((2, *offsets.shape))
    for e in range(offsets.shape[1]):
        kinds, kind_of = np.unique(directions[:, e], axis=0, return_inverse=True)
        for kind, direction in enumerate(kinds):
            k, net = np.flatnonzero(kind_of.ravel() == kind), _scalar(network, direction)
            low[k, e], X_adv, _ = _worst_cases([net], X[k], program.perturbation, False, None)
            high[k, e] = net.predict(X_adv)[:, 0]
    worst = np.min(high + offsets, axis=1, keepdims=True)
    length = np.linalg.norm(network.hidden, axis=0) * np.abs(network.output).sum(axis=1)
    penalty = program.regularizer.beta * length.sum()
    upper = program.mean_loss(numpy_backend, np.minimum(low, high) + offsets)
    return float(program.mean_loss(numpy_backend, worst) + penalty), float(upper + penalty)


def _margins(network, X, y):
    """Return the margins (n,) of a network at points."""
    outputs, y = network.predict(X), np.asarray(y)
    if network.n_outputs == 1:
        return y * outputs[:, 0]
    own = np.arange(network.n_outputs) == y[:, None]
    return outputs[own] - np.max(np.where(own, -np.inf, outputs), axis=1)


def _smallest(nets, X):
    return np.min([net.predict(X)[:, 0] for net in nets], axis=0)


def _worst_cases(nets, X, ball, verdict_only, time_limit):
    """Return lower bounds (n,) of the smallest output of the nets, points (n, d), seconds (n,)."""
    bounds = np.column_stack([_lower(net, net.design(X), ball) for net in nets])
    X_adv, upper = X, _smallest(nets, X)
    for net in nets:
        points = _descent(net, X, ball)
        values = _smallest(nets, points)
        X_adv = np.where((values < upper)[:, None], points, X_adv)
        upper = np.minimum(values, upper)
    lower, seconds, X_adv = np.empty(len(X)), np.empty(len(X)), np.array(X_adv)
    for k in range(len(X)):
        search = _Search(nets, X[k], ball, verdict_only, time_limit, X_adv[k], upper[k])
        lower[k] = search.run(bounds[k])
        X_adv[k], seconds[k] = search.point, time.perf_counter() - search.clock
    return lower, X_adv, seconds


def _descent(net, X, ball, n_steps=10):
    """Return perturbed points with a small output of a scalar network, by conditional gradients.

    Exact where no neuron changes sign, for l-inf or without bounds.
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
    """The search for the worst point of one sample; holds the best so far."""

    def __init__(self, nets, x, ball, verdict_only, time_limit, point, upper):
        self.nets, self.x, self.ball, self.verdict_only = nets, x, ball, verdict_only
        self.point, self.upper = point, upper
        self.clock = time.perf_counter()
        self.deadline = np.inf if time_limit is None else self.clock + time_limit

    def run(self, bounds):
        """Return a lower bound; ``bounds`` (E,) are those of the networks known before."""
        bounds = np.array(bounds)
        for e in np.argsort(bounds):
            if self.is_settled(bounds[e]):
                break  # the others' bounds are not smaller
            local = _Local.around(self.nets[e], self.x, self.ball)
            solve = _enumerated if self.ball.p == 2 else _mixed_integer
            bounds[e] = max(bounds[e], solve(local, self))
        return bounds.min()

    def is_settled(self, bound):
        """Tell whether nothing is left to learn where this is a lower bound."""
        if bound >= self.upper - 1e-12 * abs(self.upper) or self.time_left() <= 0.0:
            return True
        return self.verdict_only and (bound > 0.0 or self.upper <= 0.0)

    def time_left(self):
        """Return the seconds until the deadline."""
        return self.deadline - time.perf_counter()

    def visit(self, local, v):
        """Look at the point of v, after moving it into the set."""
        delta = self.ball.project(numpy_backend, (local.point(v) - self.x)[None], self.x[None])
        value = _smallest(self.nets, self.x + delta)[0]
        if value < self.upper:
            self.point, self.upper = self.x + delta[0], value


@dataclass(frozen=True, eq=False)
class _Local:
    r"""A scalar network on one set: constant + slope'v + sum_j sign_j (start_j + G_j v)_+.

    The set is the image of :math:`\{\text{low} \le v \le \text{high}, \|v\|_p \le 1\}`; the neurons
    are those that change sign, between ``least`` and ``most``. For l1 v >= 0 is doubled: an entry
    for each direction of a feature.
    """

    p: float
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
        """Return the network on the set around x."""
        d, sets = len(x), ball.around(x[None])
        center, axes = sets.center[0], sets.radius * sets.weights[0]
        safe = np.where(axes > 0.0, axes, 1.0)
        lo, hi = ball.feature_range(d)
        low, high = (
            np.clip((lo - center) / safe, -1.0, 0.0),
            np.clip((hi - center) / safe, 0.0, 1.0),
        )
        G, start = (net.hidden[:d] * axes[:, None]).T, (net.design(center[None]) @ net.hidden)[0]
        if ball.p == 1:
            G, high, low = np.hstack([G, -G]), np.concatenate([high, -low]), np.zeros(2 * d)
        ends = np.stack([G * low, G * high])
        radius = np.linalg.norm(G, ord=DUAL_NORM[ball.p], axis=1)
        least = start - np.minimum(radius, -ends.min(axis=0).sum(axis=1))
        most = start + np.minimum(radius, ends.max(axis=0).sum(axis=1))

        flat = _FLAT * np.max(most - least, initial=0.0)
        on, off = least >= -flat, most <= flat
        sign, moving = net.output[:, 0], ~(on | off)
        # A nearly stable concave neuron is charged the most by which it differs from a linear one.
        lost = np.where(on, np.maximum(-least, 0.0), np.maximum(most, 0.0))
        constant = net.offset[0] + sign[on] @ start[on] - lost[~moving & (sign < 0.0)].sum()
        return cls(
            ball.p, center, axes, low, high, constant, sign[on] @ G[on], start[moving], G[moving],
            sign[moving], least[moving], most[moving],
        )  # fmt: skip

    def point(self, v):
        """Return the input that v stands for."""
        d = len(self.center)
        return self.center + self.axes * (v[:d] - v[d:] if self.p == 1 else v)


def _mixed_integer(local, search):
    """Return a lower bound by HiGHS, for l1 and l-inf; show the search its point.

    Variables are v, the neurons' values h, and the states a of those with a negative sign.
    """
    unit = np.mean(local.most - local.least) if len(local.sign) else 1.0
    G, start, least, most = (A / unit for A in (local.G, local.start, local.least, local.most))
    convex, concave = np.flatnonzero(local.sign > 0.0), np.flatnonzero(local.sign < 0.0)
    (m, v), n_states = G.shape, len(concave)
    h = sparse.eye_array(m, format="csr")
    rows = [
        [G[convex], -h[convex], np.zeros((len(convex), n_states))],  # h >= t
        [np.zeros((n_states, v)), h[concave], -np.diag(most[concave])],  # h <= most a
        [-G[concave], h[concave], -np.diag(least[concave])],  # h <= t - least (1 - a)
    ]
    limits = [-start[convex], np.zeros(n_states), (start - least)[concave]]
    if local.p == 1:
        rows.append([np.ones((1, v)), None, None])
        limits.append(np.ones(1))
    rows = sparse.block_array(
        [[None if A is None else sparse.csr_array(A) for A in row] for row in rows]
    )
    result = milp(
        np.concatenate([local.slope / unit, local.sign, np.zeros(n_states)]),
        integrality=np.repeat([0, 0, 1], [v, m, n_states]),
        bounds=Bounds(
            np.concatenate([local.low, np.zeros(m + n_states)]),
            np.concatenate([local.high, most, np.ones(n_states)]),
        ),
        constraints=LinearConstraint(rows, -np.inf, np.concatenate(limits)),
        options={"time_limit": search.time_left(), "mip_rel_gap": 0.0},
    )
    if result.x is not None:
        search.visit(local, result.x[:v])
    bound = result.fun if n_states == 0 else result.mip_dual_bound
    if bound is None or (n_states == 0 and result.status != 0):
        return -np.inf
    return local.constant + unit * (bound - _TOLERANCE * (1 + m))


def _enumerated(local, search):
    """Return a lower bound for l2 over all states of the concave neurons; show the search points.

    With multipliers g in [0, 1] for the convex neurons, and others for the bounds, what is left is
    linear, so that its minimum over the ball is a bound in closed form.
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
    bounds = np.max(
        [
            constants + g @ start - np.linalg.norm(slopes + g @ G, axis=1)
            for g in (0.0 * chord, start > 0.0, chord, 1.0 + 0.0 * chord)
        ],
        axis=0,
    )
    cone_program = None
    for case in np.argsort(bounds):
        if search.is_settled(bounds[case]):
            break
        if cone_program is None:
            cone_program = _ConeProgram(local, start, G)
        bound, v = cone_program.solve(slopes[case])
        bounds[case] = max(bounds[case], constants[case] + bound)
        if v is not None:
            search.visit(local, v)
    return bounds.min()


class _ConeProgram:
    """min slope'v + sum_j (start_j + G_j v)_+ over the set of a `_Local`, compiled once."""

    def __init__(self, local, start, G):
        import cvxpy as cp

        self.local, self.start, self.G = local, start, G
        v, h = cp.Variable(len(local.slope)), cp.Variable(len(start), nonneg=True)
        self.v, self.slope = v, cp.Parameter(len(local.slope))
        self.epigraph, self.above, self.below = start + G @ v <= h, v <= local.high, local.low <= v
        self.cut = bool(np.any(local.high < 1.0) or np.any(local.low > -1.0))
        bounds = [self.above, self.below] if self.cut else []
        constraints = [cp.norm(v, 2) <= 1.0, self.epigraph, *bounds]
        self.problem = cp.Problem(cp.Minimize(self.slope @ v + cp.sum(h)), constraints)

    def solve(self, slope):
        """Return a valid lower bound, and the minimiser or None."""
        import cvxpy as cp

        self.slope.value = slope
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")
            try:
                self.problem.solve(solver=cp.CLARABEL)
            except cp.SolverError:
                return -np.inf, None
        g, above, below = (
            np.maximum(np.nan_to_num(constraint.dual_value), 0.0) if used else 0.0
            for constraint, used in (
                (self.epigraph, True),
                (self.above, self.cut),
                (self.below, self.cut),
            )
        )
        g = np.minimum(g, 1.0)
        rest = np.linalg.norm(slope + g @ self.G + above - below)
        reached = np.sum(below * self.local.low - above * self.local.high)
        return float(g @ self.start + reached - rest), self.v.value
