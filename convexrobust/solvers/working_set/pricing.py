r"""Pricing: which new patterns a dual point of a `ConvexProgram` says would improve it.

A pattern improves the program if the *residual* of its neuron, defined in
`convexrobust.solvers.residuals`, exceeds :math:`\beta`. The largest residual of *all* patterns is
the maximum of :math:`-h(u)` over unit vectors u where D, and with it S, follow u: the maximum of a
function that is not concave. `price` searches for it, `global_lower_bound` enumerates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from convexrobust.duality import Multipliers, repaired
from convexrobust.patterns import enumerate_patterns, patterns_of
from convexrobust.perturbations import Neighbourhoods
from convexrobust.program import ConvexProgram
from convexrobust.solvers.residuals import (
    best_cone_multipliers,
    fitted,
    sides_of,
    support,
)

__all__ = ["best_cone_multipliers", "global_lower_bound", "price"]

_EXCESS = 1e-4  # relative excess of a residual over beta from which a new pattern counts
_RANKED = 0.1  # relative accuracy of the residuals by which new patterns are ranked
_MORE_STARTS = 4  # times as many starts for a second search where the first finds nothing
_CANDIDATES = 3  # new patterns whose residual is computed, for each one asked for
_CLOSE, _SAME = 0.99, 0.999  # cosines from which neurons of two patterns, or best ones, are one
_ASCENT_STEPS = 40
_RANKING_STEPS = 400
_LONGEST, _SHORTEST, _STEP_RATIO = 0.7, 0.05, 0.9  # first steps of the ascents, in radian
_NEGLIGIBLE = 1e-6  # share of the largest row below which the search leaves a row out
_PATTERNS_AT_ONCE = 1000  # patterns that the exact bound looks at together


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
    sides = list(sides_of(program, point))
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
        _bound_without_cones(
            replace(program, D=D[:, start : start + _PATTERNS_AT_ONCE]), multipliers
        )
        for start in range(0, D.shape[1], _PATTERNS_AT_ONCE)
    )


def _bound_without_cones(program, multipliers) -> float:
    P = program.D.shape[1]
    zeros = [[np.zeros((len(r), P)) for r in rows] for rows in (program.rows_v, program.rows_w)]
    start = Multipliers(multipliers.margins, multipliers.slopes, *zeros)
    return program.lower_bound(best_cone_multipliers(program, start))


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
        if not program.sets.unperturbed:  # without perturbations no neuron leaves its own cone
            average = np.linalg.norm(side.pull, axis=1).sum()
            average /= max(np.linalg.norm(program.sets.center, axis=1).sum(), 1e-300)
            charge[side.rows] = np.where(np.isfinite(side.cap), side.cap, average)
        worth = np.linalg.norm(side.pull, axis=1) + charge
        live = np.flatnonzero(worth > _NEGLIGIBLE * worth.max())
        return cls(program.sets.rows(live), charge[live, None], side.pull[live])

    def at(self, U) -> tuple[np.ndarray, np.ndarray]:
        """Return the gains (m,) of gates U (d, m), and their gradients (d, m)."""
        outputs = self.sets.center @ U
        gradient = -(self.pull.T @ (outputs >= 0.0).astype(np.float64))
        if self.charge.any():
            gap = support(self.sets, U) - np.abs(outputs)
            charged = self.charge * (gap > 0.0)
            gradient += self.sets.center.T @ (np.sign(outputs) * charged)
            gradient -= _support_gradient(self.sets, U, charged)
        return np.sum(gradient * U, axis=0), gradient  # each part is linear along rays


def _support_gradient(sets, U, charged) -> np.ndarray:
    """Return gradients (d, P) of the supports in U (d, P), weighted by charged (m, P), summed."""
    if not sets.one_shape:
        return np.sign(U) * (sets.reach.T @ charged)
    axes = sets.reach.T
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
    limit = program.regularizer.beta * (1.0 + _EXCESS)

    def undecided(length, low):
        return (length > limit) & ((low <= limit) | (length > (1.0 + _RANKED) * low))

    found = []
    for side in sides:
        neurons = side.neurons(program, _matrix(candidates, len(program.X)))
        fit = fitted(neurons, np.zeros(neurons.S.shape), undecided, _RANKING_STEPS, len(candidates))
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
