"""The proximal steps of weights and of the bounds of their sizes; see `reach`."""

from __future__ import annotations

import numpy as np

from convexrobust.solvers.compiled import compiled


@compiled
def shrink(Z, threshold, out):
    """Shorten the columns of Z (d, P) by the threshold."""
    d, P = Z.shape
    factor = np.zeros(P, Z.dtype)
    for j in range(d):
        for i in range(P):
            factor[i] += Z[j, i] * Z[j, i]
    for i in range(P):
        factor[i] = max(1.0 - threshold / max(np.sqrt(factor[i]), 1e-30), 0.0)
    for j in range(d):
        for i in range(P):
            out[j, i] = factor[i] * Z[j, i]


@compiled
def shared_prox(Z, A, axes, weights, t, z, bound):
    """Take the joint step of weights Z (d, P) and bounds A (P,) of their weighted l1 norms.

    The multipliers t (P,) are moved by one Newton step, in place.
    """
    beta, rho_z, rho_a = weights
    d, P = Z.shape
    _clip_and_shrink(Z, axes, t, beta, rho_z, z)
    norm, fall = np.zeros(P, Z.dtype), np.zeros(P, Z.dtype)
    for j in range(d):
        for i in range(P):
            norm[i] += axes[j] * abs(z[j, i])
            fall[i] += axes[j] * axes[j] if z[j, i] != 0.0 else 0.0
    for i in range(P):
        excess = A[i] + t[i] / rho_a - norm[i]
        t[i] = max(t[i] - excess / (1.0 / rho_a + fall[i] / rho_z), 0.0)
    _clip_and_shrink(Z, axes, t, beta, rho_z, z)
    norm[:] = 0.0
    for j in range(d):
        for i in range(P):
            norm[i] += axes[j] * abs(z[j, i])
    for i in range(P):
        bound[i] = max(norm[i], A[i] + t[i] / rho_a)


@compiled
def _clip_and_shrink(Z, axes, t, beta, rho, out):
    d, P = Z.shape
    for j in range(d):
        for i in range(P):
            reach = axes[j] / rho * t[i]
            out[j, i] = Z[j, i] - min(max(Z[j, i], -reach), reach)
    shrink(out, beta / rho, out)


@compiled
def box_prox(Z, A, weights, n_steps, rounding, factor, z, bound):
    """Take the joint step of weights Z (d, P) and bounds A (d, P) of their sizes.

    The factors by which the norm shrinks the columns (P,) are moved by Newton steps, in place.
    """
    beta, rho_z, rho_a = weights
    d, P = Z.shape
    threshold, kappa = beta / rho_z, rho_z / rho_a
    low, high = np.full(P, -1.0), np.full(P, 2.0)  # not met yet
    square, bent, inverse = np.empty(P, Z.dtype), np.empty(P, Z.dtype), np.empty(P, Z.dtype)
    for _ in range(n_steps):
        square[:] = 0.0
        bent[:] = 0.0
        inverse[:] = 1.0 / (factor + kappa)
        for j in range(d):
            for i in range(P):
                size = abs(Z[j, i])
                cut = min(size, max(A[j, i] + kappa * size, 0.0) * inverse[i])
                square[i] += cut * cut
                bent[i] += cut * cut if cut < size else 0.0
        for i in range(P):
            length = max(np.sqrt(square[i]), 1e-30)
            slope = length + (1.0 - factor[i]) * bent[i] * inverse[i] / length
            value = (1.0 - factor[i]) * length - threshold
            low[i] = factor[i] if value > 0.0 else low[i]
            high[i] = factor[i] if value < 0.0 else high[i]
            found = min(max(factor[i] + value / slope, 0.0), 1.0)
            inside = low[i] < found < high[i] or abs(value) <= rounding * threshold
            bracketed = low[i] >= 0.0 and high[i] <= 1.0
            factor[i] = (low[i] + high[i]) / 2.0 if bracketed and not inside else found
    inverse[:] = 1.0 / (factor + kappa)
    for j in range(d):
        for i in range(P):
            size = abs(Z[j, i])
            cut = min(size, max(A[j, i] + kappa * size, 0.0) * inverse[i])
            z[j, i] = cut if Z[j, i] > 0.0 else -cut
            bound[j, i] = A[j, i] + kappa * (size - cut)
    shrink(z, threshold, z)
    for j in range(d):
        for i in range(P):
            bound[j, i] = max(bound[j, i], abs(z[j, i]))
