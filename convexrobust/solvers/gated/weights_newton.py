"""Newton's method on the gated neurons that are not 0, by conjugate gradients."""

from __future__ import annotations

from collections import deque

import torch

from convexrobust.solvers.gated.first_order import gradient_step
from convexrobust.solvers.gated.run import Point, Run

_MOST_STEPS = 60  # of conjugate gradients
_FORCING = 0.1  # relative residual that is left: less costs more products in all, measured


class Searched:
    """Directions of the last conjugate gradients, which precondition the next.

    With directions s of length 1 in the norm of the matrix A in the columns of S, Y = A S, and the
    preconditioner H it is (I - S Y') H (I - Y S') + S S': exact on these directions if A did not
    change (Gratton, Sartenaer and Tshimanga, SIAM J. Optim. 21, 2011). A Newton matrix hardly does.

    Parameters
    ----------
    most : int
        How many to keep.
    """

    def __init__(self, most):
        self.most, self.active = most, None
        self.S = self.Y = None  # transposed: a direction a row

    def keep(self, pairs, active):
        """Keep pairs (direction, its image) alone; ``active`` is where they are not 0."""
        self.active = self.S = self.Y = None
        if pairs:
            self.active = active
            self.S, self.Y = (torch.stack(each).flatten(1) for each in zip(*pairs, strict=True))

    def improve(self, precondition, active):
        """Return the preconditioner with what these say, if they are of the same neurons."""
        if self.active is None or not torch.equal(self.active, active):
            return precondition
        S, Y = self.S, self.Y

        def improved(R):
            along = S @ R.flatten()
            Z = precondition(R - (along @ Y).view_as(R))
            return Z + ((along - Y @ Z.flatten()) @ S).view_as(R)

        return improved


def newton(run: Run, point: Point, searched: Searched) -> tuple[Point, bool]:
    """Take a Newton step on the neurons that are not 0; tell whether it was a success.

    Before it a proximal gradient step decides which neurons these are, if it changes them.
    """
    _, kept = run.shrunk(point.U - point.G / run.lipschitz, 1.0 / run.lipschitz)
    if not torch.equal(kept > 0.0, point.U.norm(dim=0) > 0.0):
        point = run.certify(*gradient_step(run, run.exact, point.U, point.F, point.R, point.G))
    active = point.U.norm(dim=0) > 0.0
    patterns = torch.nonzero(active.any(dim=0))[:, 0]
    if len(patterns) == 0:
        return point, False
    step = torch.zeros_like(point.U)
    step[:, :, patterns] = _direction(run, point, patterns, active, searched)
    run.n_iter += 1
    return _line_search(run, point, step)


def _direction(run, point, patterns, active, searched):
    """Return the Newton step (d, C, p) by preconditioned conjugate gradients."""
    whole, active = active, active[:, patterns]
    gates, U = run.gates.among(patterns), point.U[:, :, patterns]
    lengths = torch.where(active, U.norm(dim=0), 1.0)
    unit, pull = U / lengths, run.beta / lengths
    bend = run.loss.curvature(point.F)

    def hessian(V):
        H = run.curved(gates, bend, V) + pull * (V - unit * (unit * V).sum(dim=0))
        return H * active

    precondition = _preconditioner(run, gates.D, bend, pull, active)
    precondition = searched.improve(precondition, whole)
    gradient = (point.G[:, :, patterns] + run.beta * unit) * active
    step, pairs = _conjugate_gradients(hessian, precondition, -gradient, searched.most)
    searched.keep(pairs, whole)
    return step


def _preconditioner(run, D, bend, pull, active):
    """Return the inverse of mean curvature * X'X (x) D'D / n^2 + pull, by output.

    Scaled by the roots of the pulls, its second term is the identity and one basis diagonalises it.
    """
    s, Q = run.covariance
    scale = active / pull.sqrt()
    e, B = torch.linalg.eigh(scale[:, :, None] * (D @ D.T / D.shape[1]) * scale[:, None])
    mean_bend = torch.diagonal(bend.sum(dim=0))
    spectrum = 1.0 + mean_bend[:, None] * s[:, None, None].clamp_min(0.0) * e.clamp_min(0.0)

    def apply(V):
        inner = torch.einsum("dj,dcp,cpq->jcq", Q, V * scale, B) / spectrum
        return torch.einsum("dj,jcq,cpq->dcp", Q, inner, B) * scale

    return apply


def _line_search(run, point, step) -> tuple[Point, bool]:
    """Return the first point along the halved step that lowers the rounded objective."""
    along, t = run.exact.outputs(step), 1.0
    pull = (point.U * step).sum(dim=0) / point.U.norm(dim=0).clamp_min(1e-300)
    slope = float((point.G * step).sum() + run.beta * pull.sum())
    value = run.loss.value(point.F) + run.penalty(point.U)
    while t > 1e-3:
        U, F = point.U + t * step, point.F + t * along
        if run.loss.value(F) + run.penalty(U) <= value + 1e-4 * t * slope:
            return run.certify(U, F), t == 1.0
        t /= 2.0
    return point, False


def _conjugate_gradients(matrix, precondition, b, n_kept):
    """Solve matrix(x) = b nearly, in the norm of the preconditioner.

    Return x, and the last directions searched with what the matrix makes of them.
    """
    x, r, pairs = torch.zeros_like(b), b, deque(maxlen=n_kept)
    p = z = precondition(r)
    first = rz = float((r * z).sum())
    for _ in range(_MOST_STEPS):
        if rz <= _FORCING**2 * first:
            break
        Ap = matrix(p)
        curvature = float((p * Ap).sum())
        if not curvature > 0.0:  # true of a NaN, too
            break
        pairs.append((p / curvature**0.5, Ap / curvature**0.5))
        x, r = x + (rz / curvature) * p, r - (rz / curvature) * Ap
        z = precondition(r)
        rz, previous = float((r * z).sum()), rz
        p = z + (rz / previous) * p
    return x, pairs
