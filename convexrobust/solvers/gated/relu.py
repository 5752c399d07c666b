"""From gated neurons to a ReLU network: `to_relu` and the solver made of it."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from convexrobust.backends import numpy as numpy_backend
from convexrobust.backends import torch as torch_backend
from convexrobust.program import ConvexProgram, Solution, Status
from convexrobust.solvers.gated.solver import refusal_of_gated, solve_gated


def to_relu(program: ConvexProgram, U, *, n_steps: int = 60, **facts) -> Solution:
    r"""Return a ReLU network near the gated one, with its certified objective.

    A gated neuron u on pattern i becomes a ReLU neuron of weight +1, v = u, or of weight -1,
    w = -u: whichever leaves its cone less (by the sum of the slacks at the rows that the margins
    see). All are scaled by the number in [0, 1] that gives the best objective, and `n_steps`
    proximal subgradient steps on the soft program follow; the best point counts.

    Parameters
    ----------
    program : ConvexProgram
        The program to give a point of. Under "hard" and "one-sided" the point may violate cones:
        its objective is valid all the same, and ``cone_violation`` says by how much.
    U : ndarray of shape (C, d, P)
        Weights of the gated neurons.
    n_steps : int
        Subgradient steps; each costs a few evaluations of the objective.
    **facts
        Passed on to the `Solution`.
    """
    if np.shape(U) != program.shape:
        raise ValueError(f"U must have shape {program.shape}, got {np.shape(U)}.")
    soft = program.certified()
    V, W = _sided(soft, np.asarray(U, dtype=np.float64))

    def scaled(t):
        return soft.objective(numpy_backend, t * V, t * W)

    t = minimize_scalar(scaled, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-3}).x
    return program.solution(*_descended(soft, t * V, t * W, n_steps), **facts)


def _sided(soft, U):
    """Return V, W: each gated neuron on the side on which the sum of its slacks is smaller."""
    V, W = np.zeros_like(U), np.zeros_like(U)
    for c in range(len(U)):
        plus, minus = (
            np.maximum(soft.cone_gap(numpy_backend, sign * U[c], rows[c]), 0.0).sum(axis=0)
            for sign, rows in ((1.0, soft.rows_v), (-1.0, soft.rows_w))
        )
        V[c], W[c] = U[c] * (plus <= minus), -U[c] * (plus > minus)
    return V, W


def _descended(soft, V, W, n_steps):
    """Return the best point of proximal subgradient steps by Polyak's rule.

    The optimum in the rule is unknown: it is taken to be a little below the best value so far, by
    a distance that is halved whenever it has not been reached for a while.
    """
    both = best = torch.tensor(np.stack([V, W]))
    lowest, distance, failures = np.inf, None, 0
    for _ in range(n_steps + 1):
        both = both.detach().requires_grad_()
        mean_loss = soft.mean_loss(torch_backend, soft.margins(torch_backend, *both))
        value = float(mean_loss.detach()) + float(soft.penalty(torch_backend, *both.detach()))
        distance = 0.1 * value if distance is None else distance
        failures = 0 if value < lowest else failures + 1
        if value < lowest:
            lowest, best = value, both.detach()
        (G,) = torch.autograd.grad(mean_loss, both)
        size = float((G**2).sum())
        if size == 0.0:
            break
        if failures >= 5:
            both, distance, failures = best, distance / 2.0, 0
            continue
        step = (value - lowest + distance) / size
        moved = both.detach() - step * G
        both = torch.stack(
            [torch.stack([soft.regularizer.prox(torch_backend, u, step) for u in A]) for A in moved]
        )
    return best.numpy()


class GatedRelaxation:
    """The cheap first answer for large problems: the gated program and a network made of it.

    Parameters
    ----------
    tol : float
        Relative gap to which the gated program is solved, and below which the network counts as
        optimal.
    n_steps : int
        Subgradient steps of `to_relu` on the network.
    **options
        Passed on to `solve_gated`.

    Notes
    -----
    Both bounds are valid, but the gap between them is that of the relaxation, which no further
    iteration closes: `Status.RELAXATION` comes without a warning.
    """

    def __init__(self, tol: float = 1e-3, *, n_steps: int = 60, **options):
        self.tol, self.n_steps, self.options = tol, n_steps, options

    def __repr__(self):
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"GatedRelaxation(tol={self.tol!r}, n_steps={self.n_steps!r}{options})"

    def refusal(self, program: ConvexProgram) -> str | None:
        """Return why the program is not for this solver, None if it is; see `Solver.refusal`."""
        return refusal_of_gated(program)

    def solve(self, program: ConvexProgram, start: Solution | None = None) -> Solution:
        """Return a network with a certified objective and the gated lower bound.

        The gated program starts from V - W of another solution of the same shape.
        """
        clock = time.perf_counter()
        U = None if start is None or start.V.shape != program.shape else start.V - start.W
        gated = solve_gated(program, tol=self.tol, start=U, **self.options)
        found = to_relu(program, gated.U, n_steps=self.n_steps, lower_bound=gated.lower_bound)
        closed = found.relative_gap <= self.tol and found.cone_violation <= self.tol
        return replace(
            found,
            status=Status.OPTIMAL if closed else Status.RELAXATION,
            solver="gated relaxation",
            n_iter=gated.n_iter,
            seconds=time.perf_counter() - clock,
            solver_seconds=gated.seconds,
        )
