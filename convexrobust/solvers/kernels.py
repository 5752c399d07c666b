"""The element-wise passes of an iteration of `ADMM`, compiled by numba (an optional dependency).

Each does for one output, and arrays in memory, what the tensors of `ADMM` do in several passes; the
formulas are explained there: `margin_prox`, `balance`, `cones`, `reach`, `kronecker`. They are for
`FusedIteration`, which multiplies the matrices in between.
"""

from __future__ import annotations

import numpy as np
from numba import njit


def compiled(function):
    """Compile a function at its first call, and keep the result on disk where that is possible."""
    # Sums may be taken in any order, as in BLAS; infinities and NaN keep their meaning.
    options = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to write to
        return njit(**options)(function)


@compiled
def margin_prox(M, X, radii, offsets, loss, gaps, charged, scales, a, z, aim):
    """Take the proximal step of one margin a sample: slopes M to z, multipliers ``a`` in place.

    M, z and ``aim``, which becomes 2 z - M, have shape (1, n, d); offsets and a (1, n). ``radii``
    are those of the boxes (1 or n, d), with no row where nothing is perturbed; ``loss`` is its
    threshold, and the weight, cap and fall of each sample, as `Balance` has them; sample k pays for
    the slacks in row charged[0, k] of the gaps (empty for cone constraints); ``scales`` are (rho,
    kappa, the smallest a, a change that is none).
    """
    (threshold, weight, cap, fall), (rho, kappa, smallest, settled) = loss, scales
    for k in range(len(X)):
        radius = radii[k if len(radii) > 1 else 0] if len(radii) else X[k, :0]
        paid = gaps[charged[0, k]] if len(charged) else gaps[0, :0]
        old = a[0, k]
        margin, slope = _margin(M[0, k], X[k], radius, paid, rho, kappa, smallest, old)
        constant = margin + offsets[0, k] - slope * old
        first = _balance(constant, slope, threshold, weight[k], cap[k], fall[k])
        found = first
        if abs(first - old) > settled:
            margin, slope = _margin(M[0, k], X[k], radius, paid, rho, kappa, smallest, first)
            constant = margin + offsets[0, k] - slope * first
            found = _balance(constant, slope, threshold, weight[k], cap[k], fall[k])
            # The root is on the side to which the first step points.
            if (found - old) * (first - old) < 0.0:
                found = (first + old) / 2.0
        a[0, k] = found
        _move_slope(M[0, k], X[k], radius, found / rho, z[0, k], aim[0, k])


@compiled
def residual_prox(M, X, radii, offsets, loss, gaps, charged, scales, a, z, aim):
    """Take the proximal step of the two margins of a residual; arguments as in `margin_prox`."""
    (threshold, _, cap, fall), (rho, kappa, smallest, settled) = loss, scales
    for k in range(len(X)):
        radius = radii[k if len(radii) > 1 else 0] if len(radii) else X[k, :0]
        paid = gaps[charged[0, k]] if len(charged) else gaps[0, :0]
        paid_too = gaps[charged[1, k]] if len(charged) else gaps[0, :0]
        for _ in range(2):
            old, old_too = a[0, k], a[1, k]
            margin, slope = _margin(M[0, k], X[k], radius, paid, rho, kappa, smallest, old)
            constant = margin + offsets[0, k] - slope * old
            margin, other = _margin(M[1, k], X[k], radius, paid_too, rho, kappa, smallest, old_too)
            constant_too = margin + offsets[1, k] - other * old_too
            a[0, k], a[1, k] = _balance_two(
                constant, slope, constant_too, other, threshold, cap[k], fall[k]
            )
            if max(abs(a[0, k] - old), abs(a[1, k] - old_too)) <= settled:
                break
        for e in range(2):
            _move_slope(M[e, k], X[k], radius, a[e, k] / rho, z[e, k], aim[e, k])


@compiled
def _move_slope(M, x, radius, step, z, aim):
    """Move the slope of a margin by a step, less its projection on that times the box."""
    for j in range(len(x)):
        z[j] = M[j] + step * x[j]
    for j in range(len(radius)):
        reach = step * radius[j]
        z[j] -= min(max(z[j], -reach), reach)
    for j in range(len(x)):
        aim[j] = 2.0 * z[j] - M[j]


@compiled
def _margin(M, x, radius, paid, rho, kappa, smallest, a):
    """Return the margin at a multiplier, slacks paid, without its offset, and its slope there."""
    if len(radius):
        step = max(a, smallest) / rho  # at a = 0 the worst perturbation is that of the limit
        margin, slope = _worst_margin(M, x, radius, step)
    else:
        margin, slope = _nominal_margin(M, x, a / rho)
    slacks, n_slacks, allowed = 0.0, 0.0, kappa * a
    for i in range(len(paid)):
        slacks += max(paid[i] - allowed, 0.0)
        n_slacks += 1.0 if paid[i] > allowed else 0.0
    return margin - slacks, max(slope / rho + kappa * n_slacks, 1e-30)


@compiled
def _worst_margin(M, x, radius, step):
    margin, slope, inverse = 0.0, 0.0, 1.0 / step
    for j in range(len(x)):
        moved = M[j] + step * x[j]
        reach = step * radius[j]
        clipped = min(max(moved, -reach), reach)
        worst = x[j] - clipped * inverse
        margin += worst * (moved - clipped)
        slope += worst * worst if moved != clipped else 0.0
    return margin, slope


@compiled
def _nominal_margin(M, x, step):
    margin = slope = 0.0
    for j in range(len(x)):
        margin += x[j] * (M[j] + step * x[j])
        slope += x[j] * x[j]
    return margin, slope


@compiled
def _balance(constant, slope, threshold, weight, cap, fall):
    """Return the multiplier in balance with the loss of a margin constant + slope * a."""
    if not np.isnan(threshold):
        return min(max((threshold - constant) / (slope + fall), 0.0), cap)
    m, rise = 0.0, slope * weight  # the logistic loss: monotone from 0, see `Balance`
    for _ in range(40):
        share = 1.0 / (1.0 + np.exp(m))
        change = (m - constant - rise * share) / (1.0 + rise * share * (1.0 - share))
        m -= change
        if abs(change) <= 1e-9 * (1.0 + abs(m)):
            break
    return weight / (1.0 + np.exp(m))


@compiled
def _balance_two(constant, slope, constant_too, slope_too, threshold, cap, fall):
    """Return the two multipliers in balance with the loss of the smaller margin.

    Those that are not 0 lie on one level: that of the smaller margin, unless it passes the other.
    """
    first_is_lower = constant <= constant_too
    c, g = (constant, slope) if first_is_lower else (constant_too, slope_too)
    level = c + g * min(max((threshold - c) / (g + fall), 0.0), cap)
    if level > max(constant, constant_too):
        width = 1.0 / slope + 1.0 / slope_too
        area = constant / slope + constant_too / slope_too
        level = min((threshold + fall * area) / (1.0 + fall * width), (cap + area) / width)
    return max((level - constant) / slope, 0.0), max((level - constant_too) / slope_too, 0.0)


@compiled
def settle(gaps, caps, opposite, kappa, b, signed):
    """Set the multipliers b of cone rows or slacks (m, P), and their products with the signs.

    The signs S are minus ``opposite``.
    """
    m, P = gaps.shape
    inverse = 1.0 / kappa
    for r in range(m):
        for i in range(P):
            b[r, i] = min(max(gaps[r, i] * inverse, 0.0), caps[r])
            signed[r, i] = -opposite[r, i] * b[r, i]


@compiled
def move_gaps(gaps, products, opposite, reaches, b, kappa, relaxation):
    """Move the gaps (m, P) towards those at new weights: reaches (1 or m, P) less S (X U)."""
    m, P = gaps.shape
    for r in range(m):
        reach = reaches[r if len(reaches) > 1 else 0]
        for i in range(P):
            aim = reach[i] + opposite[r, i] * products[r, i] + kappa * b[r, i]
            gaps[r, i] += relaxation * (aim - gaps[r, i])


@compiled
def relax(state, x, z, relaxation):
    """Add the step of Douglas and Rachford to a state of any shape."""
    s, x, z = state.reshape(-1), x.reshape(-1), z.reshape(-1)
    for j in range(len(s)):
        s[j] += relaxation * (x[j] - z[j])


@compiled
def right_side(product, pulled, state, z, weights, out):
    """Set ``out`` to what a product X'H or R'T and a block of the state aim at, all (2, q, P)."""
    of_product, of_pulled, of_state = weights
    h, b, s, z = product.reshape(-1), pulled.reshape(-1), state.reshape(-1), z.reshape(-1)
    aim = out.reshape(-1)
    for j in range(len(s)):
        aim[j] = of_product * h[j] + of_pulled * b[j] + of_state * (2.0 * z[j] - s[j])


@compiled
def separate(right, of_slopes, total, difference):
    """Set the right-hand sides of V + W and of V - W (d, P), from those of V and W (2, d, P)."""
    d, P = total.shape
    for j in range(d):
        for i in range(P):
            v, w = right[0, j, i], right[1, j, i]
            total[j, i] = v + w
            difference[j, i] = v - w + of_slopes[j, i]


@compiled
def join(total, difference, out):
    """Set V and W (2, d, P) from their sum and difference."""
    d, P = total.shape
    for j in range(d):
        for i in range(P):
            out[0, j, i] = (total[j, i] + difference[j, i]) / 2.0
            out[1, j, i] = (total[j, i] - difference[j, i]) / 2.0


@compiled
def move_product(product, at_new, pulled, factor, relaxation):
    """Move a product X'H or R'T (2, q, P) towards that of the new weights."""
    h, new, b = product.reshape(-1), at_new.reshape(-1), pulled.reshape(-1)
    for j in range(len(h)):
        h[j] += relaxation * (new[j] + factor * b[j] - h[j])


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
