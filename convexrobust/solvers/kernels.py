"""The element-wise passes of an iteration of `ADMM`, compiled by numba (an optional dependency).

Each does for arrays in memory what the tensors of `ADMM` do in several passes; the formulas are
explained there: `margin_prox`, `balance`, `cones`, `reach`, `kronecker`. They are for
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
def margin_prox(M, X, radii, offsets, directions, loss, slacks, scales, a, z, aim):
    """Take the proximal step of one margin and one output: slopes M to z, ``a`` in place.

    M and z have shape (1, n, d); ``aim`` (1, n, d) becomes what 2 z - M says of the output;
    offsets and a are (1, n), ``directions`` (n, 1, 1). ``radii`` are those of the boxes (1 or n,
    d), with no row where nothing is perturbed; ``loss`` is its threshold, and the weight, cap and
    fall of each sample, as `Balance` has them; ``slacks`` are the gaps, and which of their rows
    sample k pays for, charged[0, k] (empty for cone constraints); ``scales`` are (rho, kappa, the
    smallest a, a change that is none).
    """
    (threshold, weight, cap, fall), (rho, kappa, smallest, settled) = loss, scales
    gaps, charged, _ = slacks
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
        aim[0, k] = 0.0
        _move_slope(M[0, k], X[k], radius, found / rho, directions[k, 0], z[0, k], aim[:, k])


@compiled
def margins_prox(M, X, radii, offsets, directions, loss, slacks, scales, a, z, aim):
    """Take the proximal step of E margins a sample; arguments as in `margin_prox`.

    But M and z have shape (E, n, d), offsets and a (E, n), directions (n, E, C), and ``aim``
    (C, n, d). A margin pays for the slacks in row charged[e, k], and all margins of a sample for
    those in row shared[k] (empty where there are none).
    """
    (threshold, weight, cap, fall), (rho, kappa, smallest, settled) = loss, scales
    gaps, charged, shared = slacks
    n_margins = len(a)
    constant, slope, found = np.empty(n_margins), np.empty(n_margins), np.empty(n_margins)
    order = np.empty(n_margins, np.intp)
    for k in range(len(X)):
        radius = radii[k if len(radii) > 1 else 0] if len(radii) else X[k, :0]
        all_pay = gaps[shared[k]] if len(shared) else gaps[0, :0]
        for _ in range(2):
            for e in range(n_margins):
                old, paid = a[e, k], gaps[charged[e, k]] if len(charged) else gaps[0, :0]
                margin, slope[e] = _margin(M[e, k], X[k], radius, paid, rho, kappa, smallest, old)
                constant[e] = margin + offsets[e, k] - slope[e] * old
            total = np.sum(a[:, k])
            paid_by_all, n_slacks = _slacks(all_pay, kappa * total)
            rise = kappa * n_slacks
            drop = paid_by_all + rise * total  # the margins are less by drop - rise * their sum
            if np.isnan(threshold):
                _balance_softmax(constant, slope, drop, rise, weight[k], found)
            else:
                _balance_smallest(
                    constant, slope, threshold + drop, cap[k], fall[k] + rise, order, found
                )
            change = 0.0
            for e in range(n_margins):
                change = max(change, abs(found[e] - a[e, k]))
                a[e, k] = found[e]
            if change <= settled:
                break
        aim[:, k] = 0.0
        for e in range(n_margins):
            step = a[e, k] / rho
            _move_slope(M[e, k], X[k], radius, step, directions[k, e], z[e, k], aim[:, k])


@compiled
def _move_slope(M, x, radius, step, direction, z, aim):
    """Move the slope of a margin by a step, less its projection on that times the box.

    What 2 z - M says of the outputs is added to ``aim`` (C, d).
    """
    for j in range(len(x)):
        z[j] = M[j] + step * x[j]
    for j in range(len(radius)):
        reach = step * radius[j]
        z[j] -= min(max(z[j], -reach), reach)
    for c in range(len(direction)):
        if direction[c] != 0.0:
            for j in range(len(x)):
                aim[c, j] += direction[c] * (2.0 * z[j] - M[j])


@compiled
def _margin(M, x, radius, paid, rho, kappa, smallest, a):
    """Return the margin at a multiplier, slacks paid, without its offset, and its slope there."""
    if len(radius):
        step = max(a, smallest) / rho  # at a = 0 the worst perturbation is that of the limit
        margin, slope = _worst_margin(M, x, radius, step)
    else:
        margin, slope = _nominal_margin(M, x, a / rho)
    slacks, n_slacks = _slacks(paid, kappa * a)
    return margin - slacks, max(slope / rho + kappa * n_slacks, 1e-30)


@compiled
def _slacks(gaps, allowed):
    """Return the sum of the slacks that gaps leave, and how many there are."""
    slacks = n_slacks = 0.0
    for i in range(len(gaps)):
        slacks += max(gaps[i] - allowed, 0.0)
        n_slacks += 1.0 if gaps[i] > allowed else 0.0
    return slacks, n_slacks


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
def _balance_smallest(constant, slope, level, cap, fall, order, found):
    """Set ``found`` to the multipliers in balance with the loss of the smallest margin.

    Those that are not 0 lie on one level, that of the lowest margins that it passes; ``order`` is
    room for the margins in rising order. A single one is found without its level, from which
    rounding would tell nothing of the multiplier where the margin is flat.
    """
    for e in range(len(constant)):
        at = e
        while at > 0 and constant[order[at - 1]] > constant[e]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = e
    found[:] = 0.0
    first = order[0]
    alone = min(max((level - constant[first]) / (slope[first] + fall), 0.0), cap)
    if len(order) == 1 or constant[first] + slope[first] * alone <= constant[order[1]]:
        found[first] = alone
        return
    width = area = of_loss = of_cap = 0.0
    for at in range(len(constant)):
        c, inverse = constant[order[at]], 1.0 / slope[order[at]]
        width += inverse
        area += c * inverse
        with_all = (level + fall * area) / (1.0 + fall * width), (cap + area) / width
        of_loss = with_all[0] if at == 0 or with_all[0] > c else of_loss
        of_cap = with_all[1] if at == 0 or with_all[1] > c else of_cap
    lowest = min(of_loss, of_cap)
    for e in range(len(constant)):
        found[e] = min(max((lowest - constant[e]) / slope[e], 0.0), cap)


@compiled
def _balance_softmax(constant, slope, drop, rise, weight, found):
    """Set ``found`` to the multipliers in balance with the cross-entropy; see `Balance`.

    The unknown t is where 1 - A / weight is the probability of the true class. Newton's steps
    stay inside an interval that shrinks.
    """
    if weight == 0.0:
        found[:] = 0.0
        return
    largest = np.max(drop - constant)
    total = 0.0
    for e in range(len(constant)):
        total += np.exp(drop - constant[e] - largest)
    total = largest + np.log(total)
    low = drop - rise * weight - (max(total, 0.0) + np.log1p(np.exp(-abs(total))))
    # No multiplier is larger than the weight.
    t = high = min(drop, np.min(constant + slope * weight))
    for _ in range(60):
        total = change = 0.0
        for e in range(len(constant)):
            y = _wright(np.log(slope[e] * weight) - constant[e] + t)
            total += y / slope[e]
            change += y / ((1.0 + y) * slope[e])
        exponent = t - drop + rise * total
        other = np.exp(exponent)
        excess = total / weight + other - 1.0
        if excess < 0.0:
            low = t
        else:
            high = t
        step = excess / (change / weight + other * (1.0 + rise * change))
        if exponent > 1.0:  # far to the right: to where the true class has all
            step = exponent / (1.0 + rise * change)
        new = t - step
        if not low <= new <= high:
            new = (low + high) / 2.0
        if abs(new - t) <= 1e-12 * (1.0 + abs(t)):
            break
        t = new
    for e in range(len(constant)):
        found[e] = _wright(np.log(slope[e] * weight) - constant[e] + t) / slope[e]


@compiled
def _wright(c):
    """Return the y > 0 with y + log(y) = c (Newton's steps are monotone after the first)."""
    y = c - np.log(c) if c > 1.0 else np.exp(c)
    y = max(y, 1e-300)
    for _ in range(4):
        y = max(y * (1.0 + c - np.log(y)) / (1.0 + y), 1e-300)
    return y


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
    """Set ``out`` to what a product X'H or R'T and the state aim at, all of one shape."""
    of_product, of_pulled, of_state = weights
    h, b, s, z = product.reshape(-1), pulled.reshape(-1), state.reshape(-1), z.reshape(-1)
    aim = out.reshape(-1)
    for j in range(len(s)):
        aim[j] = of_product * h[j] + of_pulled * b[j] + of_state * (2.0 * z[j] - s[j])


@compiled
def separate(right, of_slopes, weight, total, difference):
    """Set the right-hand sides of V + W and of V - W (d, C, P), from those of V and W (2, C, d, P).

    ``of_slopes`` (C, d, P) is what the slopes say of V - W, with a weight.
    """
    d, n_outputs, P = total.shape
    for j in range(d):
        for c in range(n_outputs):
            for i in range(P):
                v, w = right[0, c, j, i], right[1, c, j, i]
                total[j, c, i] = v + w
                difference[j, c, i] = v - w + weight * of_slopes[c, j, i]


@compiled
def join(total, difference, out):
    """Set V and W (2, C, d, P) from their sum and difference (d, C, P)."""
    d, n_outputs, P = total.shape
    for c in range(n_outputs):
        for j in range(d):
            for i in range(P):
                out[0, c, j, i] = (total[j, c, i] + difference[j, c, i]) / 2.0
                out[1, c, j, i] = (total[j, c, i] - difference[j, c, i]) / 2.0


@compiled
def move_slopes(M, outputs, directions, z, x, relaxation):
    """Set the slopes x (E, n, d) from those of the outputs (C, n, d), and move the state M."""
    n_margins, n, _ = M.shape
    for e in range(n_margins):
        for k in range(n):
            new, first = x[e, k], True
            for c in range(len(outputs)):
                direction, of_output = directions[k, e, c], outputs[c, k]
                if direction != 0.0 and first:
                    for j in range(len(new)):
                        new[j] = direction * of_output[j]
                    first = False
                elif direction != 0.0:
                    for j in range(len(new)):
                        new[j] += direction * of_output[j]
            old, copy = M[e, k], z[e, k]
            for j in range(len(new)):
                old[j] += relaxation * (new[j] - copy[j])


@compiled
def move_product(product, at_new, pulled, factor, relaxation):
    """Move a product X'H or R'T towards that of the new weights, all of one shape."""
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
