r"""The dual of a `ConvexProgram`: a valid lower bound from any multipliers.

Give each margin a multiplier :math:`a_{ke} \ge 0`, each slope a perturbation of its sample times
that multiplier (:math:`P`), and each cone row or slack a multiplier :math:`b_{ki} \ge 0`. The
Lagrangian then separates over neurons into :math:`g_i'u_i + \beta \|u_i\|_2`, with

.. math::

    g = \pm\Big(\sum_e T_e \circ (P_e - a_e \circ X)\Big)' D - X'(S \circ b)
        + \text{the worst perturbations of the cone rows},

so that with the offsets :math:`o` of the margins

.. math:: -\sum_k \left( a_k'o_k + \omega_k \varphi^*(-a_k / \omega_k) \right)

is a lower bound as soon as all :math:`\|g_i\|_2 \le \beta`. Everything is linear in the
multipliers, which can therefore always be scaled until that holds.

The largest loss over the copies k of a sample is at least any average of them with weights
:math:`\theta_k`, so that :math:`\omega \theta_k` takes the place of :math:`\omega_k`. Here
:math:`\theta_k` is in proportion to :math:`\sum_e a_{ke}`, which loses nothing at an optimum: the
copies with a multiplier then have equal losses, and equal losses have equal sums
:math:`\sum_e a_{ke} / (\omega \theta_k)` (for a loss of the smallest margin and the logistic one).
"""

from __future__ import annotations

from bisect import bisect
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from convexrobust.program import ConvexProgram

_LARGEST_SCALE = 1e6  # of the multipliers, where nothing else limits it
_EPS = np.finfo(float).eps
# Of the search for the scale: points closer than that, relatively, have values that rounding cannot
# tell apart at a smooth maximum; and how many there may be.
_NEAREST, _MOST_POINTS = 3e-8, 100


class Multipliers(NamedTuple):
    """A dual point of a `ConvexProgram`; every entry is repaired before use, so any will do.

    Attributes
    ----------
    margins : ndarray of shape (n, E)
        a >= 0, of the margins.
    slopes : dict of int to ndarray of shape (n, d)
        P, of the slopes of the margins: a perturbation of each sample times the multipliers a.
    cones_v, cones_w : list of ndarray, one (len(rows), P) for each output
        b >= 0, of the cone rows ``program.rows_v[c]`` and ``program.rows_w[c]``.
    """

    margins: np.ndarray
    slopes: dict[int, np.ndarray]
    cones_v: list[np.ndarray]
    cones_w: list[np.ndarray]


def lower_bound(program: ConvexProgram, multipliers: Multipliers) -> float:
    """Return a valid lower bound on the optimal value of the program.

    The multipliers are moved into their domain and then scaled by the t that gives the best bound
    among those that keep all residuals within beta. t = 0 always does, so that the bound is never
    below that of zero multipliers.
    """
    point = repaired(program, multipliers)
    a, row_weight = point.margins, _row_weights(program, point.margins)
    used = row_weight > 0.0
    weight, offsets = row_weight[used], program.margin_map.offsets[used]
    residual = largest_residual(program, point)
    limit = _LARGEST_SCALE
    if not residual <= program.regularizer.beta / limit:  # true for a residual that is no number
        limit = program.regularizer.beta / residual if np.isfinite(residual) else 0.0
    limit = min(limit, program.loss.largest_scale(a[used] / weight[:, None]))

    def dual(t):
        conjugate = weight * program.loss.conjugate(t * a[used] / weight[:, None])
        linear = t * np.sum(a[used] * offsets, axis=1)
        size = np.sum(np.abs(conjugate) + t * np.sum(a[used] * (1.0 + np.abs(offsets)), axis=1))
        return float(-np.sum(linear + conjugate) - (len(weight) + 16) * _EPS * size)

    return _concave_maximum(dual, limit * (1.0 - 1e-12))


def repaired(program: ConvexProgram, multipliers: Multipliers) -> Multipliers:
    """Return the multipliers moved into the domain in which the Lagrangian bound holds."""
    directions, sets = program.margin_map.directions, program.sets
    a = np.maximum(_finite(multipliers.margins), 0.0)
    a = np.where(_row_weights(program, a)[:, None] > 0.0, a, 0.0)
    slopes = {}
    for e, P in multipliers.slopes.items():
        share = a[:, np.equal(program.margin_map.slope_of, e)].sum(axis=1)
        reach = share[:, None] * sets.reach
        slopes[e] = _scaled_into(_finite(P), reach, sets.p)
    cones = []
    for sign, given, rows in (
        (-1, multipliers.cones_v, program.rows_v),
        (+1, multipliers.cones_w, program.rows_w),
    ):
        # A slack is worth what the margins are worth that it lowers, as far as it lowers them; a
        # constraint has no such limit.
        cap = np.einsum("kec,ke->kc", np.maximum(sign * directions, 0.0), a)
        if program.formulation != "soft":
            cap[:] = np.inf
        cones.append(
            [
                np.clip(_finite(b), 0.0, cap[r, c][:, None])
                for c, (b, r) in enumerate(zip(given, rows, strict=True))
            ]
        )
    return Multipliers(a, slopes, *cones)


def largest_residual(program: ConvexProgram, multipliers: Multipliers) -> float:
    r"""Return the largest dual residual of a neuron, which a bound needs to be within beta.

    .. math:: \max_{c, i, \pm}\ \min_{\rho_k}\ \Big\| \pm\Big(\sum_e T_e \circ
              (P_e - a_e \circ X)\Big)' D_i - \sum_k b_{ki} (S_{ki} x_k - \rho_k) \Big\|_2,

    with :math:`\rho_k` in the perturbation set about 0 of each cone row, chosen best; for the
    symbols see the module's text.

    Parameters
    ----------
    program : ConvexProgram
        The program; its beta does not matter.
    multipliers : Multipliers
        A dual point in its domain, as from `repaired`.

    Returns
    -------
    float
        In units of beta. Large terms may cancel in a sum: what rounding may have taken from its
        norm is added, the number of terms times the unit of rounding times the sum of their sizes.
    """
    X, D = program.sets.center, np.asarray(program.D, dtype=np.float64)
    n_terms, largest = len(X) + multipliers.margins.shape[1] + 8, 0.0
    for c in range(program.n_outputs):
        direction = program.margin_map.directions[:, :, c]
        terms = [-np.sum(multipliers.margins * direction, axis=1)[:, None] * X]
        terms += [direction[:, e, None] * P for e, P in multipliers.slopes.items()]
        sizes = np.abs(direction * multipliers.margins).sum(axis=1)[:, None] * np.abs(X)
        sizes = (sizes + sum(np.abs(term) for term in terms[1:])).T @ D
        shared = sum(terms).T @ D
        for sign, b, rows in (
            (+1, multipliers.cones_v[c], program.rows_v[c]),
            (-1, multipliers.cones_w[c], program.rows_w[c]),
        ):
            G = sign * shared - X[rows].T @ (program.signs[rows] * b)
            size = np.linalg.norm(sizes + np.abs(X[rows]).T @ b, axis=0)
            length = program.sets.distance(G, b, rows) + n_terms * _EPS * size
            largest = np.maximum(largest, length.max(initial=0.0))  # not max: it would lose a NaN
    return float(largest)


def _row_weights(program, a) -> np.ndarray:
    """Return the weights of the rows (n,): a sample's is shared by its copies as its multipliers.

    Copies without any share it equally.
    """
    if program.copy_of is None:
        return program.weight
    samples, parts = program.samples, a.sum(axis=1)
    idle = np.bincount(samples, weights=parts) == 0.0
    parts = np.where(idle[samples], 1.0, parts)
    return program.weight[samples] * (parts / np.bincount(samples, weights=parts)[samples])


def _finite(multipliers):
    """Return the multipliers with 0 for what is not a number."""
    return np.nan_to_num(multipliers, nan=0.0, posinf=0.0, neginf=0.0)


def _scaled_into(P, reach, p):
    """Scale each row of P (n, d) into the p-ball of axes ``reach`` (n, d)."""
    P = np.where(reach > 0.0, P, 0.0)
    norms = np.linalg.norm(P / np.where(reach > 0.0, reach, 1.0), ord=p, axis=1, keepdims=True)
    return P / np.maximum(norms, 1.0)


def _concave_maximum(function, high) -> float:
    """Return the largest value met while narrowing [0, high] around a concave maximum.

    Brent's way: to the vertex of the parabola through the best point and its neighbours, or into
    the wider side where that narrows too little. Most losses are parabolas, so a few points do.
    """
    t = [0.0, 0.5 * high, high]  # in ascending order
    values = [function(x) for x in t]
    widths = [np.inf, np.inf]
    for _ in range(_MOST_POINTS):
        best = int(np.argmax(values))
        low, high = t[max(best - 1, 0)], t[min(best + 1, len(t) - 1)]
        nearest = _NEAREST * t[best] + _NEAREST**2 * t[-1]
        if high - low <= 4.0 * nearest:
            break
        x = _vertex(t, values, best)
        if high - low >= 0.5 * widths[-2]:  # the last two points have not halved it
            x = 0.5 * (t[best] + (low if t[best] - low > high - t[best] else high))
        widths.append(high - low)
        x = _kept_apart(x, low, t[best], high, nearest)
        at = bisect(t, x)
        t.insert(at, x)
        values.insert(at, function(x))
    return max(values)


def _vertex(t, values, best) -> float:
    """Return where the parabola through the best point and its neighbours is largest."""
    middle = min(max(best, 1), len(t) - 2)
    (a, b, c), (fa, fb, fc) = t[middle - 1 : middle + 2], values[middle - 1 : middle + 2]
    left, right = (fb - fa) / (b - a), (fc - fb) / (c - b)
    bend = (left - right) / (c - a)
    return (a + b) / 2.0 + left / (2.0 * bend) if bend > 0.0 else t[best]


def _kept_apart(x, low, best, high, nearest) -> float:
    """Return x moved away from the points between which it is, where a value tells nothing new."""
    x = min(max(x, low + nearest), high - nearest)
    if abs(x - best) >= nearest:
        return x
    return best - nearest if best - low > high - best else best + nearest
