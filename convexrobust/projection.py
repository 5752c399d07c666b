"""Projections on the balls of perturbations, row by row, on the atoms of any backend."""

from __future__ import annotations

import numpy as np

_NEWTON_STEPS = 100  # at most; two to ten are usual
_SORTED = 64  # features up to which sorting a row is as fast as Newton's method, on one CPU thread


def project_rows(xp, A, reach, p, scale=None):
    r"""Project each row a of A (n, d) on :math:`\{\delta : \|\delta / (s\, r)\|_p \le 1\}`.

    Parameters
    ----------
    xp : module
        The backend of the arrays, numpy or torch.
    A : array of shape (n, d)
        The points.
    reach : array of shape (1, d) or (n, d), or (1, 1) or (n, 1)
        The radii r >= 0, in the last two shapes the same for all features. Where they are 0, or
        nothing beside the largest of the row, the result is 0; for balls of p = 2 also where they
        are too small to be squared.
    p : {1, 2, inf}
        The norm.
    scale : array of shape (n, 1), optional
        A factor s >= 0 of the radii of each row. Where rows differ in nothing else, this is faster
        than a reach for each.

    Returns
    -------
    array of shape (n, d)
        The nearest points. Their norms exceed 1 by rounding errors at most.
    """
    if p == np.inf:
        reach = reach if scale is None else scale * reach
        return xp.minimum(xp.maximum(A, -reach), reach)
    if reach.shape[1] == 1:  # known without a look at the values, for which a GPU would wait
        return _into_ball(xp, A, reach if scale is None else scale * reach, p)
    largest = xp.row_max(reach)[:, None]
    size = largest if scale is None else scale * largest
    axes = reach / xp.where(largest > 0.0, largest, 1.0)
    moves = axes >= np.sqrt(A.shape[1] * xp.limits(A).tiny)  # sums of 1 / axes^2 are finite
    if not bool(moves.all()):
        A, axes = xp.where(moves, A, 0.0), xp.where(moves, axes, 1.0)
    if bool((axes == 1.0).all()):
        return _into_ball(xp, A, size, p)
    into = _into_ellipsoid if p == 2 else _into_cross_polytope
    return into(xp, A, axes, size)


def _into_ball(xp, A, size, p):
    """Project rows on the balls of radius ``size`` (1 or n, 1), p = 1 or 2."""
    if p == 2:
        squarable = size >= np.sqrt(xp.limits(A).tiny)
        size = xp.where(squarable, size, 0.0)
        return A * _shrinkage(xp, xp.norm(A, 2, axis=1)[:, None], size)
    absolute = xp.abs(A)
    if A.shape[1] <= _SORTED:
        left = xp.pos(absolute - _level(xp, absolute, size))
        length = xp.row_sum(left)[:, None]
    else:
        left, length = _above_level(xp, absolute, size)
    return xp.sign(A) * left * _shrinkage(xp, length, size)


def _level(xp, A, size):
    """Return t (n, 1) with sum (a_j - t)_+ = size for rows a >= 0, or 0 if that is negative.

    It is the largest that any number of the largest entries alone would give.
    """
    count = xp.constant(np.arange(1.0, A.shape[1] + 1.0), A)
    levels = (xp.falling(A).cumsum(1) - size) / count
    return xp.pos(xp.row_max(levels))[:, None]


def _into_cross_polytope(xp, A, axes, size):
    r"""Project rows on :math:`\sum_j |z_j| / r_j \le s`; r (1 or n, d) is ``axes``.

    The result is :math:`\pm (|a_j| - t / r_j)_+`.
    """
    squares = xp.square(axes)
    left, length = _above_level(xp, xp.abs(A) * axes, size, squares)
    return xp.sign(A) * left * (_shrinkage(xp, length, size) / axes)


def _above_level(xp, A, size, squares=1.0):
    r"""Return :math:`(a_j - t)_+` for rows a >= 0, with :math:`\sum_j (a_j - t)_+ / r_j^2 \le s`.

    Also return these sums (n, 1). Newton's method finds t from below, where the sum is convex and
    piecewise linear, in finitely many steps (Michelot's algorithm). It starts where each entry
    alone is low enough, and all together would be, could they become negative.
    """
    worth = 1.0 / squares
    t = xp.row_max(A - size * squares)[:, None]

    def total(B):
        return xp.row_sum(B if isinstance(squares, float) else B * worth)[:, None]

    t = xp.pos(xp.maximum(t, (total(A) - size) / total(1.0 + 0.0 * A)))
    enough = size * (1.0 + _rounding(xp, A))
    for _ in range(_NEWTON_STEPS):
        left = xp.pos(A - t)
        length = total(left)
        if bool((length <= enough).all()):
            break
        slope = total(0.0 * left + (left > 0.0))
        before, t = t, t + xp.pos(length - size) / xp.where(slope > 0.0, slope, 1.0)
        if bool((t == before).all()):  # rounding of t can keep the sum above s for ever
            break
    return left, length


def _into_ellipsoid(xp, A, axes, size):
    r"""Project rows on :math:`\|z / r\|_2 \le s`, where r (1 or n, d) is ``axes``.

    The result is :math:`a_j r_j^2 / (r_j^2 + t)`. Newton's method finds t on the inverse of the
    norm, which is concave, from below, where each entry alone is inside.
    """
    scaled = A * axes / xp.where(size > 0.0, size, 1.0)
    squares = xp.square(axes) + 0.0 * scaled  # laid out in memory as A is: mixed, sums are slow
    t = xp.pos(xp.row_max(xp.abs(scaled) - squares))[:, None]
    for _ in range(_NEWTON_STEPS):
        shifted = squares + t
        Z = scaled / shifted
        energy = xp.square(Z)
        length = xp.row_sum(energy)[:, None] ** 0.5
        if bool((length <= 1.0 + _rounding(xp, A)).all()):
            break
        slope = xp.row_sum(energy / shifted)[:, None]
        step = xp.pos(length - 1.0) * xp.square(length) / xp.where(slope > 0.0, slope, 1.0)
        before, t = t, t + step
        if bool((t == before).all()):
            break
    return Z * axes * (size / xp.maximum(length, 1.0))


def _shrinkage(xp, length, size):
    """Return the factors (n, 1) that make lengths at most ``size``: 1 where they are, or 0."""
    return size / xp.maximum(length, xp.where(size > 0.0, size, 1.0))


def _rounding(xp, A):
    """Return the relative rounding error to expect in the norm of a row of A."""
    return 4.0 * xp.limits(A).eps * np.sqrt(A.shape[1])
