r"""The interval certificate: the interval of `convexrobust.program` at new points.

The patterns are the network's own gates at the centres of the sets. It costs a few matrix products.
Margins and outputs are one thing here: the outputs of networks with one output, whose neurons have
the output weights -1 and +1 ("nets").
"""

from __future__ import annotations

import numpy as np

from convexrobust.backends import numpy as numpy_backend
from convexrobust.certificates.margins import directions_of_label, rows_by_label
from convexrobust.conversion import as_network, network_labels
from convexrobust.losses import Absolute, Hinge
from convexrobust.network import TwoLayerReLU
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso

_ROWS_AT_ONCE = 2048  # rows at a time, so that memory stays bounded
_DOUBLINGS, _HALVINGS = 38, 40  # of a radius: up to 1e11 times the first, then to 12 digits


def interval_of_outputs(network, X, ball) -> tuple[np.ndarray, np.ndarray]:
    """Return lower and upper ends (n, C) of the outputs on the sets."""
    rows = network.design(X)
    lo, hi = np.empty((2, len(rows), network.n_outputs))
    for c, direction in enumerate(np.eye(network.n_outputs)):
        net = _net(network, direction)
        offset = np.asarray(net.offset)
        for part in _batches(len(rows)):
            above, below = _interval(net, rows[part], ball, Absolute(), 0).T
            lo[part, c] = _with_offset(below, offset, ball)
            hi[part, c] = -_with_offset(above, -offset, ball)
    return lo, hi


def margin_bounds(network, X, y, ball) -> np.ndarray:
    """Return a lower bound of each sample's margin on its whole perturbation set, (n,).

    A difference of two outputs is bounded as one network, tighter than by two intervals.

    Parameters
    ----------
    network, X, y, ball
        As in `certify`, whose ``model`` is here the network. Bounds count for l-inf; in l1 and l2
        the sets are the uncut balls.

    Notes
    -----
    At radius 0 it is the margin that the network computes, rounded as it is.
    """
    network, y = as_network(network), network_labels(network, y)
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
    network, y = as_network(network), network_labels(network, y)
    rows = network.design(X)
    ball.check_inside(rows[:, : network.n_features])
    radius = np.empty(len(rows))
    for group, nets in _groups(network, y, len(rows)):
        for part in _batches(len(group)):
            k = group[part]
            radius[k] = np.min([_radius(net, rows[k], ball) for net in nets], axis=0)
    return radius


def _batches(n):
    return [slice(start, start + _ROWS_AT_ONCE) for start in range(0, n, _ROWS_AT_ONCE)]


def _net(network, direction) -> TwoLayerReLU:
    """Return ``direction @ f`` as a network whose output weights are -1 and +1."""
    weight = network.output @ direction
    hidden, output = network.hidden * np.abs(weight), np.sign(weight)[:, None]
    offset, used = np.array([network.offset @ direction]), weight != 0.0
    return TwoLayerReLU(hidden[:, used], output[used], network.intercept, offset)


def _groups(network, y, n):
    """Return for each label its rows, and the nets of which the margin is the smallest output."""
    return [
        (rows, [_net(network, direction) for direction in directions_of_label(network, label)])
        for label, rows in rows_by_label(network, y, n)
    ]


def _interval(net, rows, ball, loss, target):
    """Return the safe margins (n, E) of a soft program at a net, without the offset.

    Without perturbations they are those that the network computes, rounded as they are.
    """
    D = ball.around(rows, intercept=net.intercept).center @ net.hidden >= 0.0
    V, W = (np.where(sign * net.output[:, 0] > 0.0, net.hidden, 0.0)[None] for sign in (1, -1))
    y = np.full(len(rows), target)
    program = ConvexProgram(rows, y, D, loss, GroupLasso(0.0), ball, intercept=net.intercept)
    if ball.unperturbed:
        return program.margins(numpy_backend, V, W)
    return program.safe_margins(V, W)


def _lower(net, rows, ball):
    """Return the lower ends (n,) of the intervals of a net."""
    parts = [_interval(net, rows[part], ball, Hinge(), 1)[:, 0] for part in _batches(len(rows))]
    return _with_offset(np.concatenate(parts), net.offset, ball)


def _with_offset(lower, offset, ball):
    """Return offset + lower, rounded down; as the network rounds it, without perturbations."""
    value = offset + lower
    return value if ball.unperturbed else np.nextafter(value, -np.inf)


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
