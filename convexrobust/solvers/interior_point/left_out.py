"""The neurons left out of the iterate: whether they may stay 0, and multipliers that prove it."""

from __future__ import annotations

import numpy as np

from convexrobust.backends import numpy as numpy_backend
from convexrobust.duality import Multipliers, repaired
from convexrobust.solvers.interior_point.data import Neurons

_CHECKED_EVERY = 10  # iterations


class LeftOut:
    """Neurons left out: how much of their dual residual some multipliers b can take away.

    Accelerated projected gradient on half the squared distance, all neurons at once.

    Parameters
    ----------
    program : ConvexProgram
        Whose neurons they are.
    neurons : Neurons
        Which they are, J of them.
    cone_rows : ndarray of shape (N,)
        The samples that have a cone.
    b : ndarray of shape (N, J), optional
        Where to start.
    """

    def __init__(self, program, neurons: Neurons, cone_rows, b=None):
        self.program, self.neurons, self.rows = program, neurons, cone_rows
        self.sets = program.sets.rows(cone_rows)
        self.X = self.sets.center
        directions = program.margin_map.directions[cone_rows][:, :, neurons.outputs]
        self.hurts = np.maximum(-neurons.signs * directions, 0.0)
        self.D = np.asarray(program.D, dtype=np.float64)[:, neurons.patterns]
        self.S = program.signs[np.ix_(cone_rows, neurons.patterns)]
        self.b = np.zeros(self.S.shape) if b is None else b
        self.step = self._step_lengths()

    def _step_lengths(self):
        """Return the step of each row of b, (N, 1), in units in which every row has length 1.

        So no large row sets the step of all.
        """
        axes = np.linalg.norm(self.sets.reach, axis=1)
        axes = np.broadcast_to(axes, len(self.X))[:, None]
        size = np.maximum(np.linalg.norm(self.X, axis=1)[:, None] + axes, 1e-300)
        curvature = np.linalg.norm(np.hstack([self.X, axes]) / size, 2) ** 2
        return 1.0 / (curvature if self.sets.unperturbed else 2.0 * curvature) / size**2

    def keep(self, index):
        """Forget the neurons outside ``index``."""
        self.neurons = self.neurons.at(index)
        for name in ("hurts", "D", "S", "b"):
            setattr(self, name, getattr(self, name)[..., index])

    def joined_by(self, neurons: Neurons, b) -> LeftOut:
        """Return these neurons and others, which start from b."""
        both = self.neurons.joined_by(neurons)
        return LeftOut(self.program, both, self.rows, np.hstack([self.b, b]))

    def solve(self, multipliers: Multipliers, n_iter: int = 200):
        """Improve b for a dual point; return the distances over beta (1 or less is feasible)."""
        beta, point = self.program.regularizer.beta, repaired(self.program, multipliers)
        G, cap = self._pull(point), self._cap(point)
        b = np.clip(self.b, 0.0, cap)
        ahead, t = b.copy(), 1.0
        distances, todo = np.empty(G.shape[1]), np.arange(G.shape[1])
        for k in range(n_iter + 1):
            if k % _CHECKED_EVERY == 0:
                left = self._residual(G[:, todo], b[:, todo], todo)
                distances[todo] = np.linalg.norm(left, axis=0)
                todo = todo[distances[todo] > beta]
                if len(todo) == 0:
                    break
            new = self._descended(G, ahead, cap, todo)
            t, last = (1.0 + np.sqrt(1.0 + 4.0 * t * t)) / 2.0, t
            ahead[:, todo] = np.maximum(new + (last - 1.0) / t * (new - b[:, todo]), 0.0)
            b[:, todo] = new
        self.b = b
        return distances / beta

    def _descended(self, G, b, cap, todo):
        """Return the projected gradient step from b for the neurons ``todo``."""
        v = self._residual(G[:, todo], b[:, todo], todo)
        support = self.program.sets.support_pairs(numpy_backend, v, self.rows)
        down = self.step * (self.S[:, todo] * (self.X @ v) + support)
        return np.clip(b[:, todo] + down, 0.0, cap[:, todo])

    def _pull(self, point):
        """Return the part of the dual residuals (d, J) that b has no say in."""
        program, neurons = self.program, self.neurons
        G = np.empty((self.X.shape[1], len(neurons.signs)))
        for c in range(program.n_outputs):
            direction = program.margin_map.directions[:, :, c]
            pull = -np.sum(point.margins * direction, axis=1)[:, None] * program.sets.center
            pull += sum(direction[:, e, None] * P for e, P in point.slopes.items())
            own = neurons.outputs == c
            G[:, own] = neurons.signs[own] * (pull.T @ self.D[:, own])
        return G

    def _cap(self, point):
        """Return the largest b that is worth anything to the bound."""
        if self.program.formulation == "soft":
            return np.einsum("kej,ke->kj", self.hurts, point.margins[self.rows])
        if self.program.formulation == "one-sided":
            return np.where(self.hurts.any(axis=1), np.inf, 0.0)
        return np.full(self.S.shape, np.inf)

    def _residual(self, G, b, todo):
        """Return what is left of the dual residuals after b and the best perturbations."""
        H = G - self.X.T @ (self.S[:, todo] * b)
        return self.sets.remainder(H, b)

    def fill(self, multipliers: Multipliers):
        """Put b into the multipliers."""
        neurons = self.neurons
        for sign, cones, all_rows in (
            (1.0, multipliers.cones_v, self.program.rows_v),
            (-1.0, multipliers.cones_w, self.program.rows_w),
        ):
            for c, rows in enumerate(all_rows):
                chosen = np.flatnonzero((neurons.signs == sign) & (neurons.outputs == c))
                full = np.zeros((len(self.program.X), len(chosen)))
                full[self.rows] = self.b[:, chosen]
                cones[c][:, neurons.patterns[chosen]] = full[rows]
