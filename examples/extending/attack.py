"""An attack: conditional gradient steps, after Frank and Wolfe (1956).

Each step goes 2 / (t + 2) of the way towards the point of the set that the gradient points to the
most, so that no projection is needed: a mean of points of a convex set lies in it.
"""

from convexrobust.attacks.region import Best, Region, evaluated
from convexrobust.backends import numpy as numpy_backend


def frank_wolfe(loss_and_gradient, X, ball, *, n_steps=20, xp=numpy_backend):
    """Return the points of the largest loss met, one for each row of X.

    Parameters
    ----------
    loss_and_gradient : callable
        From points (n, d) to the losses to increase (n,) and their gradients (n, d).
    X : array of shape (n, d)
        The points to attack, of the backend ``xp``.
    ball : LpBall
        The threat model.
    n_steps : int
        Gradients to take.
    xp : module
        `convexrobust.backends.numpy` or `convexrobust.backends.torch`.
    """
    region = Region(xp, X, ball)
    points, best = region.X, None
    for t in range(n_steps):
        loss, gradient = evaluated(loss_and_gradient, points)
        if best is None:
            best = Best(xp, points, loss)
        best.meet(points, loss)
        vertex = region.X + ball.steepest(xp, gradient)
        points = region.moved(points + 2.0 / (t + 2.0) * (vertex - points))
    loss, _ = evaluated(loss_and_gradient, points)
    best.meet(points, loss)
    return region.checked(best.points)
