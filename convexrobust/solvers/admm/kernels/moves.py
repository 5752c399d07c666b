"""Multipliers of cone rows, right-hand sides, and steps of the state."""

from __future__ import annotations

from convexrobust.solvers.compiled import compiled


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
def move_product(product, at_new, pulled, factor, relaxation):
    """Move a product X'H or R'T towards that of the new weights, all of one shape."""
    h, new, b = product.reshape(-1), at_new.reshape(-1), pulled.reshape(-1)
    for j in range(len(h)):
        h[j] += relaxation * (new[j] + factor * b[j] - h[j])
