"""Accelerated proximal gradients for the gated program."""

from __future__ import annotations

import numpy as np
import torch

from convexrobust.solvers.gated.run import Point, Run


def accelerate(run: Run, point: Point, n_steps: int) -> Point:
    """Run FISTA, restarted where it turns back; two matrix products a step."""
    gates, dtype = run.gates, run.gates.dtype
    U, F = point.U.to(dtype), point.F
    Y, FY, t = U, F, 1.0
    for _ in range(n_steps):
        _, R = run.loss.derivative(FY)
        new, F_new = gradient_step(run, gates, Y, FY, R, gates.adjoint(R.to(dtype)))
        turned = float(((Y - new) * (new - U)).sum()) > 0.0
        t_new = 1.0 if turned else (1.0 + np.sqrt(1.0 + 4.0 * t * t)) / 2.0
        momentum = 0.0 if turned else (t - 1.0) / t_new
        # The outputs are linear: those of the extrapolated point cost no product.
        Y, FY = new + momentum * (new - U), F_new + momentum * (F_new - F)
        U, F, t = new, F_new, t_new
        run.n_iter += 1
    return run.certify(U)


def gradient_step(run: Run, gates, Y, FY, R, G):
    """Return the proximal gradient step from Y and its outputs, after checking its bound.

    Raises FloatingPointError where it overflows.
    """
    value = run.loss.value(FY)
    while True:
        new, _ = run.shrunk(Y - G / run.lipschitz, 1.0 / run.lipschitz)
        F = gates.outputs(new).to(torch.float64)
        # The linear term is taken in the outputs, where less is lost to rounding.
        above = run.loss.value(F) - value - float((R * (F - FY)).sum())
        if not np.isfinite(above):  # no constant would ever meet the bound
            raise FloatingPointError("a proximal gradient step overflowed")
        if 2.0 * above <= run.lipschitz * float(((new - Y) ** 2).sum()) + 1e-6 * abs(value):
            return new, F
        run.lipschitz *= 1.5
