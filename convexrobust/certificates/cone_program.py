r"""The relaxation of one case as a linear or cone program, solved to full accuracy by Clarabel.

.. math:: \min_{\delta, h} \; c + s'\delta + \sum_j \omega_j h_j \quad \text{s.t.} \quad
          h_j \ge t_j(\delta), \; h_j \ge 0, \; \pm t_i(\delta) \ge 0

over the convex neurons j and the split neurons i, on the set and within its bounds. The lower bound
follows from the multipliers by weak duality: it is valid whatever the accuracy of the solver.
"""

from __future__ import annotations

from typing import NamedTuple

import clarabel
import numpy as np
from scipy import sparse

_ENDLESS = 1e6  # how far to follow a direction in which the bound grows for ever


class Solved(NamedTuple):
    """A lower bound with its slopes (m,), and a lowest point: its neurons (m,), its step (d,)."""

    bound: float
    slope: np.ndarray
    neurons: np.ndarray
    step: np.ndarray


def solve(relaxation, low, high) -> Solved:
    """Solve the relaxation of a single case.

    Parameters
    ----------
    relaxation : Relaxation
        Of one case.
    low, high : ndarray of shape (d,)
        The steps from the centre that the bounds allow; infinite where they do not matter.
    """
    sets, sign, weight = relaxation.sets, relaxation.sign[0], relaxation.weight[0]
    slope = np.where(relaxation.low == relaxation.high, relaxation.low, 0.0)[0]
    slope = np.where(sign > 0, weight, slope)
    # The unknowns are in units of the set and of the most that neurons can change on it.
    axes = sets.reach[0]
    G = (relaxation.hidden * axes[:, None]).T
    unit = np.maximum(np.abs(G).sum(axis=1), np.finfo(float).tiny)
    convex, split = np.flatnonzero(relaxation.convex[0]), np.flatnonzero(relaxation.split[0])
    up, down = (np.flatnonzero(np.isfinite(end) & (axes > 0.0)) for end in (high, low))
    # Neurons that do not depend on the step are not among the rows.
    rows, start = np.zeros_like(G), np.zeros_like(unit)
    for part in (convex, split):
        rows[part] = G[part] / unit[part, None]
        start[part] = relaxation.at_center[0, part] / unit[part]
    side, nothing, identity = sign[split][:, None], np.zeros_like(rows[convex]), np.eye(len(axes))
    on_step = [rows[convex], nothing, -side * rows[split], identity[up], -identity[down]]
    limits = [-start[convex], nothing.sum(axis=1), side[:, 0] * start[split]]
    limits += [high[up] / axes[up], -low[down] / axes[down]]
    on_h = np.zeros((sum(map(len, limits)), len(convex)))
    on_h[: 2 * len(convex)] = np.tile(-np.eye(len(convex)), (2, 1))

    cost = np.concatenate([slope @ G, (weight * unit)[convex]])
    scale = np.abs(cost).max(initial=0.0) or 1.0
    A, b = np.hstack([np.vstack(on_step), on_h]), np.concatenate(limits)
    v, multipliers = _solution(cost / scale, A, b, sets.p, len(axes))
    multipliers = scale * np.maximum(np.nan_to_num(multipliers), 0.0)
    above_line, _, of_sign, of_high, of_low = np.split(
        multipliers, np.cumsum([len(limit) for limit in limits])[:-1]
    )
    slope[convex] = above_line / unit[convex]
    slope[split] -= side[:, 0] * of_sign / unit[split]
    slope = np.clip(slope, relaxation.low[0], relaxation.high[0])
    direction = relaxation.hidden @ slope
    direction[up] += of_high / axes[up]
    direction[down] -= of_low / axes[down]
    kept = of_low / axes[down] @ low[down] - of_high / axes[up] @ high[up]
    kept -= 4.0 * len(A) * np.finfo(float).eps * (of_low.sum() + of_high.sum() + abs(kept))
    bound = relaxation.bound(slope[None], direction[None], kept)[0]
    step = np.clip(axes * v / max(np.linalg.norm(v, sets.p), 1.0), low, high)
    return Solved(float(bound), slope, relaxation.at_center[0] + step @ relaxation.hidden, step)


def _solution(cost, A, b, p, d):
    """Return v (d,) and the multipliers of A (v, h) <= b, least cost with v in the unit ball."""
    if p == 1:  # v = plus - minus, both >= 0, with a sum of 1 at most
        A, cost = np.insert(A, [d] * d, -A[:, :d], axis=1), np.insert(cost, [d] * d, -cost[:d])
        ball = np.vstack([-np.eye(2 * d), np.ones(2 * d)])
        limits = np.repeat([0.0, 1.0], [2 * d, 1])
    elif p == 2:  # (1, v) lies in the second-order cone
        ball, limits = np.vstack([np.zeros(d), -np.eye(d)]), np.repeat([1.0, 0.0], [1, d])
    else:
        ball, limits = np.vstack([np.eye(d), -np.eye(d)]), np.ones(2 * d)
    ball = np.hstack([ball, np.zeros((len(ball), len(cost) - ball.shape[1]))])
    cone = clarabel.SecondOrderConeT if p == 2 else clarabel.NonnegativeConeT
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    solution = clarabel.DefaultSolver(
        sparse.csc_matrix((len(cost), len(cost))),
        cost,
        sparse.csc_matrix(np.vstack([A, ball])),
        np.concatenate([b, limits]),
        [clarabel.NonnegativeConeT(len(b)), cone(len(ball))],
        settings,
    ).solve()
    x, multipliers = np.nan_to_num(solution.x), np.array(solution.z)[: len(b)]
    if solution.status == clarabel.SolverStatus.PrimalInfeasible:
        multipliers *= _ENDLESS  # no point is in this case, and they are such a direction
    return x[:d] - x[d : 2 * d] if p == 1 else x[:d], multipliers
