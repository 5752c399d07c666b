r"""Residuals: what a dual point of a `ConvexProgram` leaves for the neurons of given patterns.

At multipliers a of the margins and P of the slopes, a neuron u of V (sign +) or W (-) of output c
changes the Lagrangian by :math:`h(u) + \beta \|u\|_2`,

.. math:: h(u) = \sum_k D_k\, c_k'u + \sum_k B_k \left(\rho_k(u) - S_k x_k'u\right)_+, \qquad
          c_k = \pm \sum_e T_{kec} \left(P_{ek} - a_{ke} x_k\right),

where :math:`B_k` is the most that the slack of a cone row can cost: the multipliers of the margins
that see it, as far as it lowers them (soft), or infinity (a constraint). The neuron may stay 0 at
the optimum if its *residual*

.. math:: \max_{\|u\|_2 \le 1} -h(u) = \min_{0 \le b \le B}\ \text{distance of}\
          c'D - X'(S \circ b)\ \text{from}\ \sum_k b_k \{\text{perturbations of}\ x_k\}

is at most :math:`\beta`. The right-hand side is a small convex problem for each neuron. Both sides
are bounds: the residual is at least :math:`-h(u) / \|u\|_2` for any u, at most the distance for any
b, and the u that belongs to a b is minus the vector that is left over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from convexrobust.backends import numpy as numpy_backend
from convexrobust.duality import Multipliers, repaired
from convexrobust.perturbations import DUAL_NORM, Neighbourhoods
from convexrobust.program import ConvexProgram
from convexrobust.projection import project_rows

_BLOCK = 16  # accelerated steps before residuals are looked at again
_AT_ONCE = 16  # neurons, those of the largest residuals, that take the steps together
_POLISHED = 2  # of these, how many also take a Newton step


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

    for side in sides_of(program, point):
        neurons = side.neurons(program, program.D)
        b, at_once = cones[side.sign][side.output][side.used], max(_AT_ONCE, P // 8)
        fit = fitted(neurons, b, exceeds_all, n_iter, at_once)
        cones[side.sign][side.output] = side.on_all_rows(fit.b)
    return point._replace(cones_v=cones[+1], cones_w=cones[-1])


def multipliers_at_zero(program: ConvexProgram) -> Multipliers:
    """Return a dual point that proves the zero network optimal, if it is, or nearly so."""
    return multipliers_from_margins(program, margins_at_zero(program))


def margins_at_zero(program: ConvexProgram) -> np.ndarray:
    """Return the derivative of the loss at the zero network as multipliers of margins (n, E).

    Where it has one, nothing else can prove the zero network optimal.
    """
    copies = np.bincount(program.samples)[program.samples]
    weight = (program.weight[program.samples] / copies)[:, None]
    return weight * program.loss.multipliers(program.margin_map.offsets)


def multipliers_from_margins(program: ConvexProgram, a, **options) -> Multipliers:
    r"""Return a dual point with given multipliers a (n, E) of the margins.

    Each slope's perturbation moves its sample as near to 0 as its set allows, which is a good
    choice where perturbations are large, but not always the best; the cone rows follow from these,
    with the ``options`` of `best_cone_multipliers`.
    """
    T, sets, slopes = program.margin_map.directions, program.sets, {}
    for e in set(program.margin_map.slope_of):
        same = np.equal(program.margin_map.slope_of, e)  # margins that see it, or minus it
        square = np.maximum(np.sum(T[:, e] ** 2, axis=1), np.finfo(float).tiny)
        signs = np.einsum("kec,kc->ke", T[:, same], T[:, e]) / square[:, None]
        aim = np.sum(signs * a[:, same], axis=1)[:, None] * sets.center
        worth = a[:, same].sum(axis=1)[:, None]
        slopes[e] = project_rows(numpy_backend, aim, sets.reach, sets.p, worth)
    P = program.D.shape[1]
    zeros = [[np.zeros((len(r), P)) for r in rows] for rows in (program.rows_v, program.rows_w)]
    return best_cone_multipliers(program, Multipliers(a, slopes, *zeros), **options)


@dataclass(frozen=True, eq=False)
class Side:
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

    def neurons(self, program, D) -> Neurons:
        """Return the neurons of the patterns D (n, P)."""
        rows, D = self.rows[self.used], np.asarray(D, dtype=np.float64)
        sets = program.sets.rows(rows)
        scale, step = _step_sizes(sets)
        cap = self.cap[self.used][:, None]
        return Neurons(sets, cap, scale, step, 2.0 * D[rows] - 1.0, self.pull.T @ D)

    def on_all_rows(self, b) -> np.ndarray:
        """Return multipliers of the used rows with zeros for the other ones."""
        full = np.zeros((len(self.rows), b.shape[1]))
        full[self.used] = b
        return full


def sides_of(program, point) -> Iterator[Side]:
    """Yield the sides of a program at a dual point in its domain."""
    a, directions = point.margins, program.margin_map.directions
    for c in range(program.n_outputs):
        T = directions[:, :, c]
        pull = -np.sum(a * T, axis=1)[:, None] * program.sets.center
        pull = pull + sum(T[:, e, None] * P for e, P in point.slopes.items())
        for sign, rows in ((+1, program.rows_v[c]), (-1, program.rows_w[c])):
            cap = np.full(len(rows), np.inf)
            if program.formulation == "soft":
                cap = np.sum(np.maximum(-sign * T, 0.0) * a, axis=1)[rows]
            yield Side(c, sign, rows, cap, sign * pull)


def _regularised(M, r) -> np.ndarray:
    r"""Return :math:`M (M'M + \epsilon I)^{-1} r` for M (..., m, d), by the smaller Gram matrix."""
    few_rows, transposed = M.shape[1] < M.shape[2], np.swapaxes(M, 1, 2)
    normal = M @ transposed if few_rows else transposed @ M
    ridge = 1e-10 * np.trace(normal, axis1=1, axis2=2) + 1e-150
    normal += ridge[:, None, None] * np.eye(normal.shape[1])
    if few_rows:
        return np.linalg.solve(normal, M @ r)
    return M @ np.linalg.solve(normal, r)


def _step_sizes(sets) -> tuple[np.ndarray, np.ndarray]:
    r"""Return the sizes of the rows and the gradient steps that are safe; both (m, 1).

    Half the squared distance is a minimum over the perturbations :math:`r_k` of quadratics with
    matrix :math:`(X + R)(X + R)'`, up to signs. With multipliers in units of the rows' inverse
    sizes, :math:`\|X\| + \|R\|` bounds the root of its curvature.
    """
    reach = np.linalg.norm(sets.reach, 2 if sets.p == np.inf else np.inf, axis=1)
    size = np.sqrt(np.sum(sets.center**2, axis=1) + reach**2)
    size = np.where(size > 0.0, size, 1.0)
    unit = sets.center / size[:, None]
    gram = unit @ unit.T if len(unit) < unit.shape[1] else unit.T @ unit
    largest = np.linalg.eigvalsh(gram).max(initial=0.0)
    root = np.sqrt(largest) + np.linalg.norm(reach / size)
    return size[:, None], 1.0 / (max(root, 1e-150) * size[:, None]) ** 2


class Fit(NamedTuple):
    """Multipliers b, the distances (residuals from above), and residuals from below."""

    b: np.ndarray
    length: np.ndarray
    low: np.ndarray


@dataclass(frozen=True, eq=False)
class Neurons:
    """Neurons of one side: sets, caps B, sizes and steps of m cone rows; S (m, P), c'D (d, P)."""

    sets: Neighbourhoods
    cap: np.ndarray
    size: np.ndarray
    step: np.ndarray
    S: np.ndarray
    G: np.ndarray

    def __getitem__(self, columns) -> Neurons:
        return replace(self, S=self.S[:, columns], G=self.G[:, columns])

    def left_over(self, b) -> tuple[np.ndarray, np.ndarray]:
        """Return the vectors from the sets (d, P), and the cone gaps (m, P) at minus them."""
        X = self.sets.center
        R = self.sets.remainder(self.G - X.T @ (self.S * b), b)
        return R, support(self.sets, R) + self.S * (X @ R)

    def bounds(self, b) -> tuple[np.ndarray, np.ndarray]:
        """Return upper and lower bounds on the residuals.

        No multiplier is known to bound those of constraints: a guess makes that an estimate.
        """
        R, gap = self.left_over(b)
        length, cap = np.linalg.norm(R, axis=0), self.cap
        if not np.isfinite(cap).all():
            size = np.linalg.norm(self.sets.center, axis=1)[:, None]  # no help from perturbations
            size = np.where(size > 0.0, size, self.size)
            cap = 10.0 * (b.max(axis=0) + np.linalg.norm(self.G, axis=0) / size)
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
        if not sets.one_shape:
            rows = rows + sets.reach * np.sign(R).T[:, None, :]
        else:
            amount = b.sum(axis=0)
            held = self.G - X.T @ (self.S * b) - R
            rows = rows + (held / np.where(amount > 0.0, amount, np.inf)).T[:, None, :]
        rows *= (free / self.size).T[:, :, None] * (R != 0.0).T[:, None, :]
        return _regularised(rows, R.T[:, :, None])[:, :, 0].T / self.size


def fitted(neurons, b, matters: Callable, n_iter, at_once) -> Fit:
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
    return Fit(best, length, low)


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


def support(sets, U):
    """Return the supports of the sets in the directions U (d, P); (m, P), or (P,) if shared."""
    if not sets.one_shape:
        return sets.reach @ np.abs(U)
    return np.linalg.norm(sets.reach.T * U, DUAL_NORM[sets.p], axis=0)
