r"""Pricing: what a dual point of a `ConvexProgram` says about its neurons, and about new ones.

At multipliers a of the margins and P of the slopes, a neuron u of V (sign +) or W (-) of output c
changes the Lagrangian by :math:`h(u) + \beta \|u\|_2`,

.. math:: h(u) = \sum_k D_k\, c_k'u + \sum_k B_k \left(\rho_k(u) - S_k x_k'u\right)_+, \qquad
          c_k = \pm \sum_e T_{kec} \left(P_{ek} - a_{ke} x_k\right),

where :math:`B_k` is the most that the slack of a cone row can cost: the multipliers of the margins
that see it (soft), or infinity (a constraint). The neuron may stay 0 at the optimum if its
*residual*

.. math:: \max_{\|u\|_2 \le 1} -h(u) = \min_{0 \le b \le B}\ \text{distance of}\
          c'D - X'(S \circ b)\ \text{from}\ \sum_k b_k \{\text{perturbations of}\ x_k\}

is at most :math:`\beta`. The right-hand side is a small convex problem for each neuron. Both sides
are bounds: the residual is at least :math:`-h(u) / \|u\|_2` for any u, at most the distance for any
b, and the u that belongs to a b is minus the vector that is left over. The largest residual of
*all* patterns is the maximum of the left-hand side where D, and with it S, follow u: the maximum
of a function that is not concave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from convexrobust.duality import Multipliers, repaired
from convexrobust.patterns import enumerate_patterns, patterns_of
from convexrobust.perturbations import DUAL_NORM, Neighbourhoods
from convexrobust.program import ConvexProgram

_VIOLATED = 1e-4  # relative excess of a residual over beta from which a new pattern counts
_RANKED = 0.1  # relative accuracy of the residuals by which new patterns are ranked
_MORE_STARTS = 4  # times as many starts for a second search where the first finds nothing
_CANDIDATES = 3  # new patterns whose residual is computed, for each one asked for
_CLOSE, _SAME = 0.99, 0.999  # cosines from which neurons of two patterns, or best ones, are one
_ASCENT_STEPS = 40
_RANKING_STEPS = 400
_LONGEST, _SHORTEST, _STEP_RATIO = 0.7, 0.05, 0.9  # first steps of the ascents, in radian
_NEGLIGIBLE = 1e-6  # share of the largest row below which the search leaves a row out
_BATCH = 1000  # patterns that the exact bound looks at together

_BLOCK = 16  # accelerated steps before residuals are looked at again
_AT_ONCE = 16  # neurons, those of the largest residuals, that take the steps together
_POLISHED = 2  # of these, how many also take a Newton step
_ROOT_STEPS = 60  # of Newton's method for one scalar equation a neuron; a few suffice


def best_cone_multipliers(
    program: ConvexProgram, multipliers: Multipliers, *, n_iter: int = 10_000, tol: float = 1e-6
) -> Multipliers:
    r"""Return the dual point with those multipliers of the cone rows that give the best bound.

    The multipliers of the margins and slopes stay. Those of the cone rows are moved towards

    .. math:: \min_{0 \le b \le B}\ \tfrac12\,
              \text{dist}\Big(c'D - X'(S \circ b),\ \sum_k b_k R_k\Big)^2

    for each neuron, :math:`R_k` being the perturbations of row k: accelerated projected gradient
    steps, and Newton steps on the free multipliers. Only the largest residual decides the bound,
    so that steps are spent on the largest until none exceeds what is proven of another one (with
    cone constraints: estimated).

    Parameters
    ----------
    program : ConvexProgram
        The program whose patterns are meant.
    multipliers : Multipliers
        Any dual point. Zeros for the cone rows will do; good ones save steps.
    n_iter : int
        Largest number of steps for the neurons of one output and sign.
    tol : float
        Relative accuracy of the largest residual.

    Returns
    -------
    Multipliers
        In their domain. No neuron's residual is larger than it was, hence ``program.lower_bound``
        of them is as good or better.

    Notes
    -----
    Acceleration with restarts follows Beck and Teboulle (SIAM J. Imaging Sciences, 2009) and
    O'Donoghue and Candes (Foundations of Computational Mathematics, 2015).
    """
    point = repaired(program, multipliers)
    floor, P, cones = 0.0, program.D.shape[1], {+1: list(point.cones_v), -1: list(point.cones_w)}

    def exceeds_all(length, low):
        nonlocal floor
        floor = max(floor, (1.0 + tol) * low.max(initial=0.0))
        return length > floor

    for side in _sides(program, point):
        neurons = side.neurons(program, program.D)
        b, at_once = cones[side.sign][side.output][side.used], max(_AT_ONCE, P // 8)
        fit = _fitted(neurons, b, exceeds_all, n_iter, at_once)
        cones[side.sign][side.output] = side.on_all_rows(fit.b)
    return point._replace(cones_v=cones[+1], cones_w=cones[-1])


def price(
    program: ConvexProgram,
    multipliers: Multipliers,
    *,
    n_patterns: int = 10,
    n_starts: int = 300,
    random_state=0,
) -> np.ndarray:
    r"""Look for patterns of X, not among those of the program, whose residual exceeds beta.

    With the pattern that belongs to u, :math:`D_k = 1[x_k'u \ge 0]`, a new neuron gains

    .. math:: -h(u) = \mp \sum_k \Big( \sum_e T_{kec} (P_{ek} - a_{ke} x_k)'u \Big) D_k
              - \sum_k B_k \left(\rho_k(u) - |x_k'u|\right)_+ .

    For one margin y f(x) the first sum is :math:`\pm \sum_k (a_k y_k x_k - y_k P_k)'u\, D_k`. The
    gain is maximised over the unit sphere by projected subgradient steps from many starts: the
    program's neurons at this dual point, Gaussian ones, random combinations of data, and the
    gradients at random patterns. The residuals of the best patterns met are then computed. Of
    patterns with the same best neuron, one that lies in the face between them, one is kept.

    Parameters
    ----------
    program : ConvexProgram
        The program that the new patterns are to improve.
    multipliers : Multipliers
        A dual point of it, good only if it is near the optimum.
    n_patterns : int
        Largest number of patterns to return.
    n_starts : int
        Random starts, shared by outputs and signs; four times as many where these find nothing.
    random_state : int, numpy Generator or None
        Source of randomness.

    Returns
    -------
    ndarray of shape (n, K), int8
        K <= n_patterns new patterns with a residual above beta, the largest first. K = 0 does not
        prove that there is none: the search is a heuristic. `global_lower_bound` proves.

    Raises
    ------
    ValueError
        If n_patterns or n_starts is not a positive integer.

    Notes
    -----
    Where the cone rows are constraints, with epsilon > 0, the search charges for leaving a cone
    what the average margin is worth; residuals are those of the constraints.
    """
    for argument, value in (("n_patterns", n_patterns), ("n_starts", n_starts)):
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{argument} must be a positive integer, got {value!r}.")
    point, rng = repaired(program, multipliers), np.random.default_rng(random_state)
    sides = list(_sides(program, point))
    for again in (1, _MORE_STARTS):  # the more nothing is left to find, the harder to tell
        starts = -(-again * n_starts // len(sides))
        found = _searched(program, point, sides, starts, rng)
        candidates = _different(found, _CANDIDATES * n_patterns, _CLOSE)
        new = _violated(program, sides, candidates, n_patterns)
        if new:
            break
    return _matrix(new, len(program.X))


def global_lower_bound(
    program: ConvexProgram, multipliers: Multipliers, *, limit: int = 20_000
) -> float:
    """Return a lower bound on the optimum over the program's and all patterns of X.

    All patterns are enumerated, and the best cone multipliers computed for each.

    Parameters
    ----------
    program : ConvexProgram
        Its own patterns are included, realisable or not.
    multipliers : Multipliers
        Any dual point; its multipliers of cone rows are not used.
    limit : int
        Largest number of patterns to enumerate.

    Returns
    -------
    float
        A bound for the program of the same formulation. What else it bounds:

        - epsilon = 0: the objective of every two-layer ReLU network of any width, with its weight
          decay, because it is a feasible point; robust objectives are larger still.
        - "hard", epsilon > 0, no bounds: the program on any 0/1 matrix D, because a pattern that is
          no cell of X allows the zero neuron only, or one that some cell allows as well.
        - otherwise: the program with patterns of X and its own, no more. Other 0/1
          columns may be legal there, and the exact robust objective of a network may be lower.

    Raises
    ------
    ValueError
        If X may have more patterns than the limit; the message says how many.
    """
    try:
        cells = enumerate_patterns(program.X, limit=limit)
    except ValueError as error:
        raise ValueError(
            f"{error} Beyond enumeration use `price`, which looks for violated patterns but "
            "proves nothing, and `program.lower_bound` for the patterns at hand."
        ) from error
    D = np.hstack([np.asarray(program.D, dtype=np.int8), cells])
    # Each batch limits how far the multipliers may be scaled; a concave dual function that starts
    # at t = 0 makes the smallest of the bounds valid for all batches.
    return min(
        _bound_without_cones(replace(program, D=D[:, start : start + _BATCH]), multipliers)
        for start in range(0, D.shape[1], _BATCH)
    )


def _bound_without_cones(program, multipliers) -> float:
    P = program.D.shape[1]
    zeros = [[np.zeros((len(r), P)) for r in rows] for rows in (program.rows_v, program.rows_w)]
    start = Multipliers(multipliers.margins, multipliers.slopes, *zeros)
    return program.lower_bound(best_cone_multipliers(program, start))


# ------------------------------------------------------------------ residuals of given patterns


@dataclass(frozen=True, eq=False)
class _Side:
    """V or W of one output: what its neurons gain from the margins, what their slacks cost.

    ``sign`` is +1 for V; ``cap`` (len(rows),) is B at the cone rows; ``pull`` (n, d) is c.
    """

    output: int
    sign: int
    rows: np.ndarray
    cap: np.ndarray
    pull: np.ndarray

    @property
    def index(self) -> tuple[int, int]:
        """Output and sign."""
        return self.output, self.sign

    @property
    def used(self) -> np.ndarray:
        """Which of the cone rows can have a multiplier at all."""
        return self.cap > 0.0

    def neurons(self, program, D) -> _Neurons:
        """Return the neurons of the patterns D (n, P)."""
        rows, D = self.rows[self.used], np.asarray(D, dtype=np.float64)
        sets = _of_rows(program.sets, rows)
        scale, step = _step_sizes(sets)
        cap = self.cap[self.used][:, None]
        return _Neurons(sets, cap, scale, step, 2.0 * D[rows] - 1.0, self.pull.T @ D)

    def on_all_rows(self, b) -> np.ndarray:
        """Return multipliers of the used rows with zeros for the other ones."""
        full = np.zeros((len(self.rows), b.shape[1]))
        full[self.used] = b
        return full


def _sides(program, point) -> Iterator[_Side]:
    """Yield the sides of a program at a dual point in its domain."""
    a, directions = point.margins, program.margin_map.directions
    for c in range(program.n_outputs):
        T = directions[:, :, c]
        pull = -np.sum(a * T, axis=1)[:, None] * program.sets.center
        pull = pull + sum(T[:, e, None] * P for e, P in point.slopes.items())
        for sign, rows in ((+1, program.rows_v[c]), (-1, program.rows_w[c])):
            cap = np.full(len(rows), np.inf)
            if program.formulation == "soft":
                cap = np.sum((sign * T < 0) * a, axis=1)[rows]
            yield _Side(c, sign, rows, cap, sign * pull)


def _of_rows(sets, rows) -> Neighbourhoods:
    weights = sets.weights if len(sets.weights) == 1 else sets.weights[rows]
    return Neighbourhoods(sets.center[rows], weights, sets.radius, sets.p)


def _step_sizes(sets) -> tuple[np.ndarray, np.ndarray]:
    r"""Return the sizes of the rows and the gradient steps that are safe; both (m, 1).

    Half the squared distance is a minimum over the perturbations :math:`r_k` of quadratics with
    matrix :math:`(X + R)(X + R)'`, up to signs. With multipliers in units of the rows' inverse
    sizes, :math:`\|X\| + \|R\|` bounds the root of its curvature.
    """
    reach = sets.radius * np.linalg.norm(sets.weights, 2 if sets.p == np.inf else np.inf, axis=1)
    size = np.sqrt(np.sum(sets.center**2, axis=1) + reach**2)
    size = np.where(size > 0.0, size, 1.0)
    unit = sets.center / size[:, None]
    root = np.sqrt(np.linalg.eigvalsh(unit.T @ unit)[-1]) + np.linalg.norm(reach / size)
    return size[:, None], 1.0 / (max(root, 1e-150) * size[:, None]) ** 2


class _Fit(NamedTuple):
    """Multipliers b, the distances (residuals from above), and residuals from below."""

    b: np.ndarray
    length: np.ndarray
    low: np.ndarray


@dataclass(frozen=True, eq=False)
class _Neurons:
    """Neurons of one side: sets, caps B, sizes and steps of m cone rows; S (m, P), c'D (d, P)."""

    sets: Neighbourhoods
    cap: np.ndarray
    size: np.ndarray
    step: np.ndarray
    S: np.ndarray
    G: np.ndarray

    def __getitem__(self, columns) -> _Neurons:
        return replace(self, S=self.S[:, columns], G=self.G[:, columns])

    def left_over(self, b) -> tuple[np.ndarray, np.ndarray]:
        """Return the vectors from the sets (d, P), and the cone gaps (m, P) at minus them."""
        X = self.sets.center
        R = _remainder(self.sets, self.G - X.T @ (self.S * b), b)
        return R, _support(self.sets, R) + self.S * (X @ R)

    def bounds(self, b) -> tuple[np.ndarray, np.ndarray]:
        """Return upper and lower bounds on the residuals.

        No multiplier is known to bound those of constraints: a guess makes that an estimate.
        """
        R, gap = self.left_over(b)
        length, cap = np.linalg.norm(R, axis=0), self.cap
        if not np.isfinite(cap).all():
            cap = 10.0 * (b.max(axis=0) + np.linalg.norm(self.G, axis=0) / self.size)
        missing = np.sum(np.where(gap > 0.0, cap - b, -b) * gap, axis=0)
        return length, length - missing / np.where(length > 0.0, length, 1.0)

    def accelerated(self, b, old, momentum):
        """Take one step from b with the momentum of the last; return what the next one needs."""
        following = (1.0 + np.sqrt(1.0 + 4.0 * momentum**2)) / 2.0
        ahead = b + ((momentum - 1.0) / following) * (b - old)
        new = np.clip(ahead + self.step * self.left_over(ahead)[1], 0.0, self.cap)
        uphill = np.sum((ahead - new) * (new - b) / self.step, axis=0) > 0.0
        return new, b, np.where(uphill, 1.0, following)

    def newton_direction(self, b) -> np.ndarray:
        """Return the least-squares step of the free multipliers, worst perturbations held."""
        sets, X = self.sets, self.sets.center
        R, gap = self.left_over(b)
        free = np.where(gap > 0.0, b < self.cap, b > 0.0)
        rows = self.S.T[:, :, None] * X
        if len(sets.weights) != 1:
            rows = rows + sets.radius * sets.weights * np.sign(R).T[:, None, :]
        else:
            amount = b.sum(axis=0)
            held = self.G - X.T @ (self.S * b) - R
            rows = rows + (held / np.where(amount > 0.0, amount, np.inf)).T[:, None, :]
        rows *= (free / self.size).T[:, :, None] * (R != 0.0).T[:, None, :]
        normal = np.swapaxes(rows, 1, 2) @ rows
        ridge = 1e-10 * np.trace(normal, axis1=1, axis2=2) + 1e-150
        normal += ridge[:, None, None] * np.eye(len(R))
        return (rows @ np.linalg.solve(normal, R.T[:, :, None]))[:, :, 0].T / self.size


def _fitted(neurons, b, matters: Callable, n_iter, at_once) -> _Fit:
    """Shorten the residuals of the neurons for which ``matters(length, low)``, the longest first.

    b (m, P) is where to start, or 0 where that is better. The best multipliers met are kept.
    """
    best = b.copy()
    length, low = neurons.bounds(b)
    from_zero = neurons.bounds(0.0 * b)
    better = from_zero[0] < length
    best[:, better], length[better], low[better] = 0.0, from_zero[0][better], from_zero[1][better]
    state = best.copy(), best.copy(), np.ones(len(length))
    for _ in range(0, n_iter, _BLOCK):
        open_ = np.flatnonzero(matters(length, low))
        if len(open_) == 0:
            break
        chosen = open_[np.argsort(-length[open_])[:at_once]]
        part, steps = neurons[chosen], tuple(array[..., chosen] for array in state)
        for _ in range(_BLOCK):
            steps = part.accelerated(*steps)
        steps, new_length, low[chosen] = _polished(part, steps)
        for array, values in zip(state, steps, strict=True):
            array[..., chosen] = values
        better = new_length < length[chosen]
        best[:, chosen[better]], length[chosen[better]] = steps[0][:, better], new_length[better]
    return _Fit(best, length, low)


def _polished(neurons, steps):
    """Try a Newton step on the longest residuals; return the steps with their bounds."""
    length, low = neurons.bounds(steps[0])
    few = np.argsort(-length)[:_POLISHED]
    b, part = steps[0][:, few], neurons[few]
    direction = part.newton_direction(b)
    for share in (1.0, 0.5, 0.1):
        trial = np.clip(b + share * direction, 0.0, part.cap)
        trial_length, trial_low = part.bounds(trial)
        better = trial_length < length[few]
        hit = few[better]
        length[hit], low[hit] = trial_length[better], trial_low[better]
        steps[0][:, hit] = steps[1][:, hit] = trial[:, better]
        steps[2][hit] = 1.0
    return steps, length, low


def _support(sets, U):
    """Return the supports of the sets in the directions U (d, P); (m, P), or (P,) if shared."""
    if len(sets.weights) != 1:
        return sets.radius * (sets.weights @ np.abs(U))
    return sets.radius * np.linalg.norm(sets.weights.T * U, DUAL_NORM[sets.p], axis=0)


def _remainder(sets, G, b) -> np.ndarray:
    """Return the vectors to G (d, P) from the nearest points of the sums of b (m, P) sets."""
    if sets.radius == 0.0:
        return G
    if len(sets.weights) != 1:
        reach = sets.radius * (sets.weights.T @ b)
        return G - np.clip(G, -reach, reach)
    axes, amount = sets.radius * sets.weights.T, b.sum(axis=0)
    if sets.p == np.inf:
        return G - np.clip(G, -axes * amount, axes * amount)
    outside = _outside_cross_polytope if sets.p == 1 else _outside_ellipsoid
    moved = axes > 0.0
    return np.where(moved, outside(G * moved, amount, np.where(moved, axes, 1.0)), G)


def _outside_cross_polytope(G, amount, axes) -> np.ndarray:
    r"""Return G less its projection on :math:`\sum_j |z_j| / r_j \le \text{amount}`.

    It is G cut at :math:`\pm t / r_j`. Newton's method finds t from below: the excess is convex.
    """
    t, size = np.zeros(G.shape[1]), np.abs(G)
    for _ in range(_ROOT_STEPS):
        over = size > t / axes
        excess = np.sum(over * (size - t / axes) / axes, axis=0) - amount
        step = np.maximum(excess, 0.0) / np.maximum(np.sum(over / axes**2, axis=0), 1e-300)
        if np.all(step <= 1e-15 * t):
            break
        t = t + step
    return np.clip(G, -t / axes, t / axes)


def _outside_ellipsoid(G, amount, axes) -> np.ndarray:
    r"""Return G less its projection on :math:`\|z / r\|_2 \le \text{amount}`.

    It is :math:`g_j\, t / (r_j^2 + t)`. Newton's method finds t on the inverse of the length, which
    is concave in t, and linear if all r_j are equal.
    """
    t, some = np.zeros(G.shape[1]), amount > 0.0
    amount = np.where(some, amount, 1.0)
    for _ in range(_ROOT_STEPS):
        Z = axes * G / (axes**2 + t)
        length = np.linalg.norm(Z, axis=0)
        slope = np.maximum(np.sum(Z**2 / (axes**2 + t), axis=0), 1e-300)
        step = np.maximum(length / amount - 1.0, 0.0) * length**2 / slope
        if np.all(step <= 1e-15 * t):
            break
        t = t + step
    return np.where(some, G * t / (axes**2 + t), G)


# ------------------------------------------------------------------ the search for new patterns


@dataclass(frozen=True, eq=False)
class _Gain:
    """The gain of a new neuron, at the rows that matter for it: ``charge`` (m, 1) is B."""

    sets: Neighbourhoods
    charge: np.ndarray
    pull: np.ndarray

    @classmethod
    def of(cls, program, side) -> _Gain:
        """Return the gain of the neurons of a side."""
        charge = np.zeros(len(program.X))
        if program.sets.radius > 0.0:  # without perturbations no neuron leaves its own cone
            average = np.linalg.norm(side.pull, axis=1).sum()
            average /= max(np.linalg.norm(program.sets.center, axis=1).sum(), 1e-300)
            charge[side.rows] = np.where(np.isfinite(side.cap), side.cap, average)
        worth = np.linalg.norm(side.pull, axis=1) + charge
        live = np.flatnonzero(worth > _NEGLIGIBLE * worth.max())
        return cls(_of_rows(program.sets, live), charge[live, None], side.pull[live])

    def at(self, U) -> tuple[np.ndarray, np.ndarray]:
        """Return the gains (m,) of gates U (d, m), and their gradients (d, m)."""
        outputs = self.sets.center @ U
        gradient = -(self.pull.T @ (outputs >= 0.0).astype(np.float64))
        if self.charge.any():
            gap = _support(self.sets, U) - np.abs(outputs)
            charged = self.charge * (gap > 0.0)
            gradient += self.sets.center.T @ (np.sign(outputs) * charged)
            gradient -= _support_gradient(self.sets, U, charged)
        return np.sum(gradient * U, axis=0), gradient  # each part is linear along rays


def _support_gradient(sets, U, charged) -> np.ndarray:
    """Return gradients (d, P) of the supports in U (d, P), weighted by charged (m, P), summed."""
    if len(sets.weights) != 1:
        return sets.radius * np.sign(U) * (sets.weights.T @ charged)
    axes = sets.radius * sets.weights.T
    if sets.p == np.inf:
        worst = np.sign(U)
    elif sets.p == 2:
        worst = axes * U / np.maximum(np.linalg.norm(axes * U, axis=0), 1e-300)
    else:
        peak = np.abs(axes * U) >= np.abs(axes * U).max(axis=0)
        worst = np.sign(U) * peak / peak.sum(axis=0)
    return axes * worst * charged.sum(axis=0)


def _searched(program, point, sides, n_starts, rng) -> list[_New]:
    """Return the patterns not in the program at the ends of the ascents on all sides."""
    known, found = set(_columns(program.D)), []
    for side in sides:
        starts = _starts(program, point, side, n_starts, rng)
        U, gain = _ascended(_Gain.of(program, side), starts, rng)
        patterns = _columns(patterns_of(program.X, U))
        entries = zip(gain, patterns, U.T, strict=True)
        found += [_New(g, D, side.index, u) for g, D, u in entries if D not in known]
    return found


def _starts(program, point, side, m, rng) -> np.ndarray:
    """Return gates (d, P + m) to start from: the program's neurons and random ones."""
    neurons = side.neurons(program, program.D)
    b = (point.cones_v if side.sign > 0 else point.cones_w)[side.output]
    random = rng.standard_normal((program.X.shape[1], m - 2 * (m // 3)))
    data = program.X.T @ rng.standard_normal((len(program.X), m // 3))
    gradients = -side.pull.T @ rng.integers(0, 2, (len(program.X), m // 3))
    return np.hstack([-neurons.left_over(b[side.used])[0], random, data, gradients])


def _ascended(gain: _Gain, U, rng) -> tuple[np.ndarray, np.ndarray]:
    """Return the best gates on the paths of ever shorter steps along the gradient, and gains.

    Long first steps lead most starts to the same wide maxima, short ones find the narrow ones too.
    """
    U = _unit(U)
    steps = rng.permutation(np.geomspace(_LONGEST, _SHORTEST, U.shape[1]))
    best_U, best = U, np.full(U.shape[1], -np.inf)
    for k in range(_ASCENT_STEPS):
        value, gradient = gain.at(U)
        better = value > best
        best_U, best = np.where(better, U, best_U), np.where(better, value, best)
        U = _unit(U + steps * _STEP_RATIO**k * _unit(gradient - value * U))
    return best_U, best


class _New(NamedTuple):
    """A new pattern, what its best neuron gains, and that neuron."""

    gain: float
    pattern: bytes
    side: tuple[int, int]
    neuron: np.ndarray


def _different(found: list[_New], most, cosine) -> list[_New]:
    """Return the entries of largest gain, no pattern twice and no two of nearly one neuron."""
    kept: list[_New] = []
    for new in sorted(found, key=lambda entry: -entry.gain):
        if len(kept) == most:
            break
        if all(
            new.pattern != old.pattern
            and (new.side != old.side or new.neuron @ old.neuron < cosine)
            for old in kept
        ):
            kept.append(new)
    return kept


def _violated(program, sides, candidates, n_patterns) -> list[_New]:
    """Return the candidates of the largest residuals beyond beta."""
    limit = program.regularizer.beta * (1.0 + _VIOLATED)

    def undecided(length, low):
        return (length > limit) & ((low <= limit) | (length > (1.0 + _RANKED) * low))

    found = []
    for side in sides:
        neurons = side.neurons(program, _matrix(candidates, len(program.X)))
        fit = _fitted(
            neurons, np.zeros(neurons.S.shape), undecided, _RANKING_STEPS, len(candidates)
        )
        U = _unit(-neurons.left_over(fit.b)[0])
        found += [
            _New(fit.length[i], candidates[i].pattern, side.index, U[:, i])
            for i in np.flatnonzero(fit.low > limit)
        ]
    return _different(found, n_patterns, _SAME)


def _unit(U) -> np.ndarray:
    return U / np.maximum(np.linalg.norm(U, axis=0), 1e-300)


def _columns(D) -> list[bytes]:
    return [bytes(column) for column in np.ascontiguousarray(np.transpose(D), dtype=np.int8)]


def _matrix(entries: list[_New], n) -> np.ndarray:
    """Return the patterns of the entries as columns (n, K)."""
    columns = b"".join(new.pattern for new in entries)
    return np.frombuffer(columns, dtype=np.int8).reshape(-1, n).T.copy()
