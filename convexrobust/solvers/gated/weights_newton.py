"""Newton's method on the gated neurons that are not 0, by conjugate gradients."""

from __future__ import annotations

import torch

from convexrobust.solvers.gated.first_order import gradient_step
from convexrobust.solvers.gated.run import Point, Run

_FORCING = 0.1  # relative residual that is left: less costs more products in all, measured


def newton(run: Run, point: Point) -> tuple[Point, bool]:
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
    step[:, :, patterns] = _direction(run, point, patterns, active[:, patterns])
    run.n_iter += 1
    return _searched(run, point, step)


def _direction(run, point, patterns, active):
    """Return the Newton step (d, C, p) by preconditioned conjugate gradients."""
    gates, U = run.gates.among(patterns), point.U[:, :, patterns]
    lengths = torch.where(active, U.norm(dim=0), 1.0)
    unit, pull = U / lengths, run.beta / lengths
    bend = run.loss.curvature(point.F)

    def hessian(V):
        H = run.curved(gates, bend, V) + pull * (V - unit * (unit * V).sum(dim=0))
        return H * active

    precondition = _preconditioner(run, gates.D, bend, pull, active)
    gradient = (point.G[:, :, patterns] + run.beta * unit) * active
    return _conjugate_gradients(hessian, precondition, -gradient, _FORCING, 60)


def _preconditioner(run, D, bend, pull, active):
    """Return the inverse of mean curvature * X'X (x) D'D / n^2 + mean pull, by output."""
    s, Q = run.covariance
    e, B = torch.linalg.eigh((D.T @ D).to(torch.float64) / len(D))
    mean_bend = torch.diagonal(bend.sum(dim=0))
    mean_pull = (pull * active).sum(dim=1) / active.sum(dim=1).clamp_min(1)
    spectrum = mean_bend[:, None] * s[:, None, None].clamp_min(0.0) * e.clamp_min(0.0)
    spectrum = spectrum + mean_pull[:, None] + 1e-10 * spectrum.max() + 1e-300

    def apply(V):
        inner = torch.einsum("dj,dcp,pq->jcq", Q, V, B) / spectrum
        return torch.einsum("dj,jcq,pq->dcp", Q, inner, B) * active

    return apply


def _searched(run, point, step) -> tuple[Point, bool]:
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


def _conjugate_gradients(matrix, precondition, b, tol, max_iter):
    """Solve matrix(x) = b nearly, in the norm of the preconditioner."""
    x, r = torch.zeros_like(b), b
    p = z = precondition(r)
    first = rz = float((r * z).sum())
    for _ in range(max_iter):
        Ap = matrix(p)
        curvature = float((p * Ap).sum())
        if curvature <= 0.0 or rz <= tol**2 * first:
            break
        x, r = x + (rz / curvature) * p, r - (rz / curvature) * Ap
        z = precondition(r)
        rz, previous = float((r * z).sum()), rz
        p = z + (rz / previous) * p
    return x
