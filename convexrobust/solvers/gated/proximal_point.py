"""The proximal point method for the gated program, each point by Newton's method in the outputs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from convexrobust.solvers.gated.run import Point, Run

MAX_STEPS = 29  # of Newton's method for one proximal point


class _Trial(NamedTuple):
    """What `_trial` makes of outputs f: see `proximal_point`."""

    f: torch.Tensor
    U: torch.Tensor
    F: torch.Tensor
    G: torch.Tensor
    kept: torch.Tensor  # the share of its length that each neuron kept
    merit: float  # the negative dual function
    inner_gap: float  # between the values of the two
    moved: float  # what the distance from the last point costs


def proximal_point(run: Run, point: Point, sigma: float) -> tuple[Point, int]:
    r"""Return nearly the minimiser of the objective plus ||U - point.U||^2 / (2 sigma).

    With f the outputs at the solution and F the linear map of the gates, it is
    :math:`U = \mathrm{shrunk}(U_0 - \sigma F'\nabla(f))`, so that :math:`f = F U` are
    n C semi-smooth equations, solved by Newton's method. The primal value at U exceeds the
    dual one at f by a Bregman distance of the loss, which says when to stop. Raises
    FloatingPointError where a step overflows.
    """
    trial = _trial(run, point, point.f, sigma)
    for n_steps in range(MAX_STEPS + 1):
        solved = trial.inner_gap <= max(0.3 * trial.moved, 1e-10 * abs(run.objective))
        if solved or n_steps == MAX_STEPS:
            break
        step, slope = _direction(run, trial, sigma)
        t, new = 1.0, _trial(run, point, run.loss.moved(trial.f, step), sigma)
        highest = trial.merit + 1e-13 * abs(trial.merit)
        while not new.merit <= highest + 1e-4 * t * slope and t > 1e-4:  # NaN is too high as well
            t /= 2.0
            new = _trial(run, point, run.loss.moved(trial.f, t * step), sigma)
        if not np.isfinite(new.merit):
            raise FloatingPointError("a Newton step overflowed at every length")
        trial = new
        run.n_iter += 1
    return run.certify(trial.U, trial.F, trial.f, trial.G), n_steps


def _trial(run, point, f, sigma) -> _Trial:
    """Return the weights that outputs f ask for, and how far f is from the outputs of these."""
    _, R = run.loss.derivative(f)
    G = run.exact.adjoint(R)
    U, kept = run.shrunk(point.U - sigma * G, sigma)
    active = torch.nonzero(kept.amax(dim=0) > 0.0)[:, 0]
    F = run.exact.among(active).outputs(U[:, :, active])
    value = run.loss.value(f)
    merit = float((R * f).sum()) - value
    merit += (float((U**2).sum()) - float((point.U**2).sum())) / (2.0 * sigma)
    inner_gap = run.loss.value(F) - value - float((R * (F - f)).sum())
    moved = float(((U - point.U) ** 2).sum()) / (2.0 * sigma)
    return _Trial(f, U, F, G, kept, merit, inner_gap, moved)


def _direction(run, trial, sigma):
    """Return the Newton step in f and the slope of the merit along it.

    With H the curvature of the loss and A = sigma F (derivative of the shrinkage) F' it is
    -(I + A H)^{-1} (f - F U), which one Cholesky factor of I + H^{1/2} A H^{1/2} gives.
    """
    n, C = trial.f.shape
    # Single precision is enough for a direction while the system is not too badly scaled.
    dtype = torch.float32 if sigma * run.lipschitz < 1e7 else torch.float64
    r = trial.f - trial.F
    values, basis = torch.linalg.eigh(run.loss.curvature(trial.f))
    root = (basis * values.clamp_min(0.0).sqrt()[:, None, :]) @ basis.transpose(1, 2)
    A = torch.stack([_block(run, trial, c, sigma, dtype) for c in range(C)])
    low = root.to(dtype)
    if C == 1:
        M = low[:, 0] * A[0] * low[:, 0, 0]
    else:
        M = torch.einsum("kac,ckl,lcb->kalb", low, A, low).reshape(n * C, n * C)
    M.diagonal().add_(1.0)
    rooted = torch.einsum("kab,kb->ka", root, r)
    x = torch.cholesky_solve(rooted.reshape(-1, 1).to(dtype), _cholesky(M)).view(n, C)
    pulled = torch.einsum("kab,kb->ka", low, x)
    step = torch.einsum("ckl,lc->kc", A, pulled).to(torch.float64) - r
    return step, -float((rooted * x).sum())


def _block(run, trial, c, sigma, dtype):
    """Return the block (n, n) of A for output c: X X' o D J D' with J of rank one a neuron."""
    active = torch.nonzero(trial.kept[c] > 0.0)[:, 0]
    kept, D = trial.kept[c, active].to(dtype), run.exact.D[active].to(dtype)
    U = trial.U[:, c, active]
    along = D * ((U / U.norm(dim=0)).T @ run.exact.X.T).to(dtype)
    block = run.kernel.to(dtype) * ((D * kept[:, None]).T @ D)
    return sigma * block.addmm_((along * (1.0 - kept[:, None])).T, along)


def _cholesky(M):
    """Return the Cholesky factor of M, a little more of the identity added while it has none."""
    factor, failed = torch.linalg.cholesky_ex(M)
    extra = 1e-6 * float(M.diagonal().max())
    while failed:
        if not M.isfinite().all():
            raise FloatingPointError("the system of a Newton step is not finite")
        M.diagonal().add_(extra)
        extra *= 10.0
        factor, failed = torch.linalg.cholesky_ex(M)
    return factor
