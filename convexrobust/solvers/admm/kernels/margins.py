"""The proximal step of the margins and their slopes; see `margin_prox` and `balance`."""

from __future__ import annotations

import numpy as np

from convexrobust.solvers.compiled import compiled


@compiled
def margin_prox(M, X, radii, offsets, directions, loss, slacks, scales, a, z, aim):
    """Take the proximal step of one margin and one output: slopes M to z, ``a`` in place.

    M and z have shape (1, n, d); ``aim`` (1, n, d) becomes what 2 z - M says of the output;
    offsets and a are (1, n), ``directions`` (n, 1, 1). ``radii`` are those of the boxes (1 or n,
    d), with no row where nothing is perturbed; ``loss`` is its threshold, and the weight, cap and
    fall of each sample, as `Balance` has them; ``slacks`` are the gaps, and which of their rows
    sample k pays for, charged[0, k] (empty for cone constraints), and what a slack costs each
    margin; ``scales`` are (rho, kappa, the smallest a, a change that is none).
    """
    (threshold, weight, cap, fall), (rho, kappa, smallest, settled) = loss, scales
    gaps, charged, _, prices = slacks
    price = prices[0]
    for k in range(len(X)):
        radius = radii[k if len(radii) > 1 else 0] if len(radii) else X[k, :0]
        paid = gaps[charged[0, k]] if len(charged) else gaps[0, :0]
        old = a[0, k]
        margin, slope = _margin(M[0, k], X[k], radius, paid, price, rho, kappa, smallest, old)
        constant = margin + offsets[0, k] - slope * old
        first = _balance(constant, slope, threshold, weight[k], cap[k], fall[k])
        found = first
        if abs(first - old) > settled:
            margin, slope = _margin(M[0, k], X[k], radius, paid, price, rho, kappa, smallest, first)
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
    those in row shared[k] (empty where there are none), at one price.
    """
    (threshold, weight, cap, fall), (rho, kappa, smallest, settled) = loss, scales
    gaps, charged, shared, prices = slacks
    n_margins = len(a)
    constant, slope, found = np.empty(n_margins), np.empty(n_margins), np.empty(n_margins)
    order = np.empty(n_margins, np.intp)
    for k in range(len(X)):
        radius = radii[k if len(radii) > 1 else 0] if len(radii) else X[k, :0]
        all_pay = gaps[shared[k]] if len(shared) else gaps[0, :0]
        for _ in range(2):
            for e in range(n_margins):
                old, paid = a[e, k], gaps[charged[e, k]] if len(charged) else gaps[0, :0]
                margin, slope[e] = _margin(
                    M[e, k], X[k], radius, paid, prices[e], rho, kappa, smallest, old
                )
                constant[e] = margin + offsets[e, k] - slope[e] * old
            total = np.sum(a[:, k])
            paid_by_all, n_slacks = _slacks(all_pay, prices[0], kappa * total)
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
def _margin(M, x, radius, paid, price, rho, kappa, smallest, a):
    """Return the margin at a multiplier, slacks paid, without its offset, and its slope there."""
    if len(radius):
        step = max(a, smallest) / rho  # at a = 0 the worst perturbation is that of the limit
        margin, slope = _worst_margin(M, x, radius, step)
    else:
        margin, slope = _nominal_margin(M, x, a / rho)
    slacks, n_slacks = _slacks(paid, price, kappa * a)
    return margin - slacks, max(slope / rho + kappa * n_slacks, 1e-30)


@compiled
def _slacks(gaps, price, allowed):
    """Return what the slacks that gaps leave cost a margin, and that price squared of each."""
    slacks = n_slacks = 0.0
    allowed *= price
    for i in range(len(gaps)):
        slacks += max(gaps[i] - allowed, 0.0)
        n_slacks += 1.0 if gaps[i] > allowed else 0.0
    return price * slacks, price * price * n_slacks


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
