r"""Attacks: perturbations within an `LpBall` that make a loss large, found by gradient ascent.

An attack knows nothing about models. It is given a function ``loss_and_gradient(X)`` of the
quantity to increase, which returns the loss of each row (n,) and its gradient in that row (n, d),
and it is written once for NumPy arrays and torch tensors (``xp``, a backend). For a two-layer
network `worst_margin_objective` is such a function in closed form; for a torch model
`convexrobust.deep.training.autograd_objective` makes one.

What an attack finds is a lower bound on the worst case. How much it misses is measured by
`convexrobust.certificates`, from above.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from convexrobust.backends import numpy as numpy_backend
from convexrobust.perturbations import LpBall, project_rows

_SLACK = 1e-6  # of the radius: what bisection and rescaling in a projection may leave


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
    X = _checked_start(xp, X, ball)
    _, gradient = _evaluated(loss_and_gradient, X)
    X_adv = _moved(xp, X, _steepest(xp, X, gradient, ball), ball)
    return _checked_result(xp, X_adv, X, ball)


def pgd(
    loss_and_gradient,
    X,
    ball,
    *,
    n_steps=40,
    step=1.0,
    n_restarts=1,
    random_state=None,
    xp=numpy_backend,
):
    r"""Climb by projected gradient ascent and return the best point met, for each row its own.

    .. math:: \delta_{t+1} = \Pi(\delta_t + \eta_t\, s(\nabla \ell(x + \delta_t))), \qquad
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
        The number of steps T of each restart, at least 1. Costs T + 1 gradients.
    step : float
        Length of the first step, as a fraction of the ball. 1 makes the first point that of `fgsm`.
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
    These choices were measured against exact worst cases (mixed-integer programs) of trained and
    random two-layer networks. Long first steps that shrink to nothing lose less of the reachable
    increase than constant ones. A sparse l1 step moves on from vertex to vertex; the gradient step
    moves along faces, and the projection keeps it sparse. Each finds points that the other misses,
    in l-inf too, so that the second restart brings more than any later one: use ``n_restarts=2``
    or more to judge a network. Short steps then find the maxima that long ones jump over.

    With bounds and l1 or l2 a point is put back into the ball first, then into the bounds, which
    need not be the nearest point of both; linear losses came within 3 % of their maximum.

    References
    ----------
    Madry, Makelov, Schmidt, Tsipras and Vladu, arXiv 1706.06083.
    """
    _check_positive(n_steps=n_steps, step=step, n_restarts=n_restarts)
    X = _checked_start(xp, X, ball)
    rng = np.random.default_rng(random_state)
    best_X, best_loss = X, None
    for restart in range(n_restarts):
        X_adv = X if restart == 0 else _random_start(xp, X, ball, rng)
        ascent = _steepest if restart % 2 == 0 else _along_gradient
        first_step = step if restart < 2 else step / 4.0
        for t in range(n_steps + 1):
            loss, gradient = _evaluated(loss_and_gradient, X_adv)
            best_loss = loss if best_loss is None else best_loss
            better = loss > best_loss
            best_X = xp.where(better[:, None], X_adv, best_X)
            best_loss = xp.maximum(best_loss, loss)
            if t < n_steps:
                length = first_step * (1.0 - t / n_steps)
                delta = X_adv - X + length * ascent(xp, X_adv, gradient, ball)
                X_adv = _moved(xp, X, delta, ball)
    return _checked_result(xp, best_X, X, ball)


def worst_margin_objective(network, y, *, task="classification"):
    r"""Return the loss and gradient that attacks on a two-layer network increase (NumPy).

    The loss is minus the smallest margin, a decreasing function of which every loss of
    `convexrobust.losses` is (cross-entropy of several classes nearly): :math:`-y f(x)` with one
    output, :math:`\max_{c \ne y} f_c(x) - f_y(x)` with several, so that a row is misclassified
    where it is above 0, and :math:`|f(x) - y|` for regression. Unlike a hinge, it has a slope
    also where the margin is large.

    Parameters
    ----------
    network : TwoLayerReLU
        The network.
    y : array of shape (n,)
        Labels -1 / +1 with one output, class numbers 0 .. C-1 with several; targets if regression.
    task : {"classification", "regression"}
        Which margins are meant.

    Returns
    -------
    callable
        From X (n, n_features) to the losses (n,) and their gradients (n, n_features).

    Raises
    ------
    ValueError
        If the labels do not fit the outputs.
    """
    y = np.asarray(y)
    if task not in ("classification", "regression"):
        raise ValueError(f"task must be 'classification' or 'regression', got {task!r}.")
    if task == "regression":
        if network.n_outputs != 1:
            raise ValueError("a network for regression must have one output.")
        return partial(_residual, network, y.astype(np.float64))
    legal = [-1, 1] if network.n_outputs == 1 else list(range(network.n_outputs))
    if not np.isin(y, legal).all():
        raise ValueError(f"y must hold only {legal} for this network, got {np.unique(y)[:5]}.")
    if network.n_outputs == 1:
        return partial(_signed_output, network, y.astype(np.float64))
    return partial(_largest_rival, network, y.astype(np.intp))


def _signed_output(network, y, X):
    return -y * network.predict(X)[:, 0], network.gradient(X, -y[:, None])


def _residual(network, y, X):
    residual = network.predict(X)[:, 0] - y
    return np.abs(residual), network.gradient(X, np.sign(residual)[:, None])


def _largest_rival(network, y, X):
    outputs, rows = network.predict(X), np.arange(len(y))
    rivals = outputs.copy()
    rivals[rows, y] = -np.inf
    rival = rivals.argmax(axis=1)
    identity = np.eye(network.n_outputs)
    loss = outputs[rows, rival] - outputs[rows, y]
    return loss, network.gradient(X, identity[rival] - identity[y])


# -------------------------------------------------------------------------------- one step


def _steepest(xp, X, gradient, ball):
    """Return the step of the ball's length that increases the linearised loss most."""
    return ball.steepest(xp, _inward(xp, X, gradient, ball))


def _along_gradient(xp, X, gradient, ball):
    """Return the gradient, as long as the ellipsoid around the ball is from end to end.

    Like the steepest step it is taken in units of epsilon, so that every feature has its scale.
    """
    ellipsoid = LpBall(2, ball.epsilon)
    n_free = np.count_nonzero(ball.epsilons(X.shape[1]))
    widening = np.sqrt(n_free) if ball.p == np.inf else 1.0
    return 2.0 * widening * ellipsoid.steepest(xp, _inward(xp, X, gradient, ball))


def _inward(xp, X, gradient, ball):
    """Return the gradient without the features whose bound does not let them follow it.

    Otherwise the one coordinate of an l1 step would stay that of a feature which cannot move.
    """
    if ball.bounds is None:
        return gradient
    lo, hi = _feature_range(xp, X, ball)
    stuck = ((X <= lo) & (gradient < 0.0)) | ((X >= hi) & (gradient > 0.0))
    return xp.where(stuck, 0.0 * gradient, gradient)


def _moved(xp, X, delta, ball):
    """Return the point X + delta, put back into the ball and the bounds.

    The ball is projected on in units of epsilon, as steps are taken. The nearest point in units of
    X would pull delta towards the wide axes of an ellipsoid, away from where the loss is largest.
    """
    epsilon = _epsilon(xp, X, ball)
    free = epsilon > 0.0
    scaled = xp.where(free, delta, 0.0 * delta) / xp.where(free, epsilon, 1.0 + epsilon)
    X_adv = X + epsilon * project_rows(xp, scaled, 1.0 + 0.0 * scaled[:1], ball.p)
    if ball.bounds is not None:
        lo, hi = _feature_range(xp, X, ball)
        X_adv = xp.minimum(xp.maximum(X_adv, lo), hi)
    return xp.where(free, X_adv, X)


def _random_start(xp, X, ball, rng):
    # Sampled without X, which may be on another device, then moved into the bounds.
    noise = LpBall(ball.p, ball.epsilon).sample(np.zeros(tuple(X.shape)), rng)
    return _moved(xp, X, xp.constant(noise, X), ball)


def _epsilon(xp, X, ball):
    return xp.constant(ball.epsilons(X.shape[1])[None, :], X)


def _feature_range(xp, X, ball):
    return (xp.constant(end[None, :], X) for end in ball.feature_range(X.shape[1]))


# -------------------------------------------------------------------------------- checks


def _check_positive(*, n_steps, step, n_restarts):
    if n_steps < 1 or n_restarts < 1:
        raise ValueError(f"n_steps={n_steps} and n_restarts={n_restarts} must be at least 1.")
    if not 0.0 < step < np.inf:
        raise ValueError(f"step must be a positive number, got {step!r}.")


def _evaluated(loss_and_gradient, X):
    """Return loss and gradient, or say what is wrong: a NaN would pass for robustness."""
    loss, gradient = loss_and_gradient(X)
    if tuple(loss.shape) != (len(X),) or tuple(gradient.shape) != tuple(X.shape):
        raise ValueError(
            f"loss_and_gradient must return shapes ({len(X)},) and {tuple(X.shape)}, "
            f"got {tuple(loss.shape)} and {tuple(gradient.shape)}."
        )
    if not np.isfinite(float(abs(loss).sum() + abs(gradient).sum())):
        raise FloatingPointError("the loss or its gradient is not finite at an attacked point.")
    return loss, gradient


def _checked_start(xp, X, ball):
    X = xp.constant(X, X)
    if len(X.shape) != 2:
        raise ValueError(f"X must have shape (n, d), got {tuple(X.shape)}.")
    if not _within_bounds(xp, X, ball):
        raise ValueError("bounds exclude the data: a row of X is outside them, or not a number.")
    return X


def _checked_result(xp, X_adv, X, ball):
    epsilon, distance = _epsilon(xp, X, ball), xp.abs(X_adv - X)
    free = epsilon > 0.0
    scaled = xp.pos(distance - _rounding(xp, X_adv)) / xp.where(free, epsilon, 1.0 + epsilon)
    norms = xp.norm(xp.where(free, scaled, 0.0 * scaled), ball.p, axis=1)
    in_ball = (norms <= 1.0 + _SLACK).all() and (free | (distance <= 0.0)).all()
    if not (in_ball and _within_bounds(xp, X_adv, ball)):
        raise RuntimeError(
            f"an attacked point left the ball or the bounds of {ball!r}; "
            "its loss would say nothing about this threat model."
        )
    return X_adv


def _within_bounds(xp, X, ball):
    lo, hi = _feature_range(xp, X, ball)
    slack = 1e-9 + _rounding(xp, X)  # as `LpBall.check_inside`
    return bool(((X >= lo - slack) & (X <= hi + slack)).all())


def _rounding(xp, X):
    """Return the rounding error of X +- delta, in units of X."""
    unit = {8: 2.0**-52, 4: 2.0**-23}.get(X.dtype.itemsize, 2.0**-7)
    return 4.0 * unit * xp.abs(X)
