"""The worst over several attacks, for each row its own: what robust accuracy is computed on."""

from __future__ import annotations

from convexrobust.attacks.region import Best, Region, losses_at
from convexrobust.backends import numpy as numpy_backend


def worst_of(loss_and_gradient, X, ball, attacks, *, xp=numpy_backend):
    r"""Return for each row the attacked point with the largest loss.

    .. math:: x' = \arg\max \{\ell(x), \ell(A_1(x)), \ldots, \ell(A_K(x))\}

    Parameters
    ----------
    loss_and_gradient : callable
        From points (n, d) to the losses to increase (n,) and their gradients (n, d).
    X : array of shape (n, d)
        The points to attack.
    ball : LpBall
        The threat model.
    attacks : iterable of callables
        Called as ``attack(loss_and_gradient, X, ball, xp=xp)``, returning points (n, d): the
        functions of this package, with options as ``functools.partial(pgd, n_restarts=5)``.
    xp : module
        The backend of X: `convexrobust.backends.numpy` or `convexrobust.backends.torch`.

    Returns
    -------
    array of shape (n, d)
        The attacked points, no loss smaller than at X or than an attack alone reaches.

    Raises
    ------
    RuntimeError
        If a point of any of the attacks is outside the ball or the bounds.
    ValueError, FloatingPointError
        As in the attacks.
    """
    region = Region(xp, X, ball)
    best = Best(xp, region.X, losses_at(loss_and_gradient, region.X))
    for attack in attacks:
        points = region.checked(attack(loss_and_gradient, region.X, ball, xp=xp))
        best.meet(points, losses_at(loss_and_gradient, points))
    return region.checked(best.points)
