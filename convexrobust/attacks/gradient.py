r"""One gradient step, and projected gradient ascent: the attacks that everything else builds on."""

from __future__ import annotations

import numpy as np

from convexrobust.attacks.region import Best, Region, check_counts, evaluated, losses_at
from convexrobust.backends import numpy as numpy_backend


def fgsm(loss_and_gradient, X, ball, *, xp=numpy_backend):
    r"""Take one step of full length (fast gradient sign method, in any norm).

    .. math:: x' = \Pi(x + \arg\max_{\delta \in \text{ball}} \delta' \nabla \ell(x))

    where :math:`\Pi` puts the point back into the bounds. This is the exact worst case of a linear
    loss in every norm without bounds, and in l-inf also with bounds.

    Parameters
    ----------
    loss_and_gradient : callable
        From points (n, d) to the losses to increase (n,) and their gradients (n, d).
    X : array of shape (n, d)
        The points to attack.
    ball : LpBall
        The threat model.
    xp : module
        The backend of X: `convexrobust.backends.numpy` or `convexrobust.backends.torch`.

    Returns
    -------
    array of shape (n, d)
        The attacked points. Features of radius 0 are those of X, bit for bit.

    Raises
    ------
    ValueError
        If X is outside the bounds, or the loss or its gradient is of another shape.
    FloatingPointError
        If the loss or its gradient is not finite at a point that the attack meets.
    RuntimeError
        If the result is outside the ball or the bounds.

    References
    ----------
    Goodfellow, Shlens and Szegedy, arXiv 1412.6572.
    """
    region = Region(xp, X, ball)
    _, gradient = evaluated(loss_and_gradient, region.X)
    points = region.moved(region.X + region.steepest(region.X, gradient, 1.0))
    return region.checked(points)


def pgd(
    loss_and_gradient,
    X,
    ball,
    *,
    n_steps=40,
    step=1.0,
    momentum=0.0,
    n_restarts=1,
    random_state=None,
    xp=numpy_backend,
):
    r"""Climb by projected gradient ascent and return the best point met, for each row its own.

    .. math:: \delta_{t+1} = \Pi(\delta_t + \eta_t\, s(g_t)), \qquad
              g_t = \mu g_{t-1} + \nabla \ell(x + \delta_t) / \|\nabla \ell(x + \delta_t)\|, \qquad
              \eta_t = \text{step} \cdot (1 - t / T)

    where s is the steepest step in the norm (signs for l-inf, one coordinate for l1), of the
    radius of the ball; in every second restart it is the gradient itself, of the diameter of the
    ellipsoid around the ball. From the third restart on steps are a quarter as long.

    Parameters
    ----------
    loss_and_gradient : callable
        From points (n, d) to the losses to increase (n,) and their gradients (n, d).
    X : array of shape (n, d)
        The points to attack.
    ball : LpBall
        The threat model.
    n_steps : int
        The number of steps T of each restart, at least 1. Costs T gradients, and the losses
        of one point more.
    step : float
        Length of the first step, as a fraction of the ball. 1 makes the first point that of `fgsm`.
    momentum : float
        The share :math:`\mu` of the last direction that is kept, in [0, 1]. Without it, scaling
        the gradient changes no step.
    n_restarts : int
        The number of starts, at least 1: the first at X itself, the others at random in the ball.
    random_state : None, int or numpy.random.Generator
        For the random starts.
    xp : module
        The backend of X: `convexrobust.backends.numpy` or `convexrobust.backends.torch`.

    Returns
    -------
    array of shape (n, d)
        The attacked points. No loss is smaller than at X; with ``step=1`` none is smaller than at
        the point of `fgsm`. Features of radius 0 are those of X, bit for bit.

    Raises
    ------
    ValueError
        If X is outside the bounds, or the loss or its gradient is of another shape.
    FloatingPointError
        If the loss or its gradient is not finite at a point that the attack meets.
    RuntimeError
        If the result is outside the ball or the bounds.

    Notes
    -----
    These choices were measured against exact worst cases of trained and random two-layer networks
    (`convexrobust.certificates.exact_margins`). Long first steps that shrink to nothing lose less
    of the reachable increase than constant ones. A sparse l1 step moves on from vertex to vertex;
    the gradient step moves along faces, and the projection keeps it sparse. Each finds points that
    the other misses, in l-inf too, so that the second restart brings more than any later one: use
    ``n_restarts=2`` or more to judge a network. Short steps then find the maxima that long ones
    jump over.

    With bounds and l1 or l2 a point is put back into the ball first, then into the bounds, which
    need not be the nearest point of both; linear losses came within 3 % of their maximum.

    References
    ----------
    Madry, Makelov, Schmidt, Tsipras and Vladu, arXiv 1706.06083. Momentum: Dong, Liao, Pang, Su,
    Zhu, Hu and Li, arXiv 1710.06081.
    """
    _check_options(n_steps, step, momentum, n_restarts)
    region, best = Region(xp, X, ball), None
    rng = np.random.default_rng(random_state)
    for restart in range(n_restarts):
        start = region.X if restart == 0 else region.random_points(rng)
        direction = region.steepest if restart % 2 == 0 else region.along_gradient
        first_step = step if restart < 2 else step / 4.0
        lengths = first_step * (1.0 - np.arange(n_steps) / n_steps)
        best = _climb(loss_and_gradient, region, start, direction, lengths, momentum, best)
    return region.checked(best.points)


def _climb(loss_and_gradient, region, points, direction, lengths, momentum, best):
    """Return the best of ``best`` and the points met on the way up."""
    ascent = None
    for length in lengths:
        loss, gradient = evaluated(loss_and_gradient, points)
        if best is None:
            best = Best(region.xp, points, loss)
        else:
            best.meet(points, loss)
        ascent = _with_momentum(region.xp, gradient, ascent, momentum)
        step = direction(points, ascent, float(length))
        step += points
        points = region.moved(step)
    best.meet(points, losses_at(loss_and_gradient, points))
    return best


def _with_momentum(xp, gradient, ascent, momentum):
    if momentum == 0.0:
        return gradient
    length = xp.norm(gradient, 1, axis=1)[:, None]
    gradient = gradient / xp.where(length > 0.0, length, 1.0 + length)
    return gradient if ascent is None else momentum * ascent + gradient


def _check_options(n_steps, step, momentum, n_restarts):
    check_counts(n_steps=n_steps, n_restarts=n_restarts)
    if not 0.0 < step < np.inf:
        raise ValueError(f"step must be a positive number, got {step!r}.")
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be in [0, 1], got {momentum!r}.")
