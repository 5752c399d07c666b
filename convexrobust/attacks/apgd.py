r"""Projected gradient ascent that sets its own steps: no length to choose, only a budget."""

from __future__ import annotations

import numpy as np

from convexrobust.attacks.region import Best, Region, check_counts, evaluated
from convexrobust.backends import numpy as numpy_backend

_INERTIA = 0.25  # weight of the last move in the next; 1 - alpha of the paper
_RISING_SHARE = 0.75  # share of the steps that must raise the loss for the length to be kept


def apgd(
    loss_and_gradient,
    X,
    ball,
    *,
    n_steps=100,
    n_restarts=1,
    random_state=None,
    xp=numpy_backend,
):
    r"""Climb with steps that halve where they stop helping; each row has its own length.

    .. math:: z_t = \Pi(x_t + \eta\, s(\nabla \ell(x_t))), \qquad
              x_{t+1} = \Pi(x_t + \tfrac34 (z_t - x_t) + \tfrac14 (x_t - x_{t-1}))

    The length :math:`\eta` is first the diameter of the ball. At checkpoints, which get closer
    to each other, it is halved for the rows of which fewer than 3/4 of the steps raised the loss,
    or whose best loss did not rise while the length was the same; they go on from their best point.
    Directions s are those of `pgd`: steepest steps, in every second restart the gradient itself.

    Parameters
    ----------
    loss_and_gradient : callable
        From points (n, d) to the losses to increase (n,) and their gradients (n, d).
    X : array of shape (n, d)
        The points to attack.
    ball : LpBall
        The threat model.
    n_steps : int
        The number of steps of each restart, at least 1. Costs n_steps + 1 gradients.
    n_restarts : int
        The number of starts, at least 1: the first at X itself, the others at random in the ball.
    random_state : None, int or numpy.random.Generator
        For the random starts.
    xp : module
        The backend of X: `convexrobust.backends.numpy` or `convexrobust.backends.torch`.

    Returns
    -------
    array of shape (n, d)
        The attacked points. No loss is smaller than at X, nor (but for rounding) than at the point
        of `fgsm`, which is the first met. Features of radius 0 are those of X, bit for bit.

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
    Croce and Hein, arXiv 2003.01690.
    """
    check_counts(n_steps=n_steps, n_restarts=n_restarts)
    region, best = Region(xp, X, ball), None
    rng = np.random.default_rng(random_state)
    for restart in range(n_restarts):
        start = region.X if restart == 0 else region.random_points(rng)
        climb = _Climb(loss_and_gradient, region, start, along_gradient=restart % 2 == 1)
        climb.run(n_steps)
        best = best or climb.best
        best.meet(climb.best.points, climb.best.loss)
    return region.checked(best.points)


class _Climb:
    """One restart: where each row is, how long its steps are, and the best it has met."""

    def __init__(self, loss_and_gradient, region, start, along_gradient):
        self.loss_and_gradient, self.region, self.xp = loss_and_gradient, region, region.xp
        self.direction = region.along_gradient if along_gradient else region.steepest
        self.points, self.previous = start, start
        self.loss, self.gradient = evaluated(loss_and_gradient, start)
        self.best = Best(self.xp, start, self.loss)
        self.best_gradient = self.gradient
        # The gradient is already as long as the diameter, the steepest step half as long.
        self.length = 0.0 * self.loss + (1.0 if along_gradient else 2.0)
        self.n_rises, self.loss_at_checkpoint = 0.0 * self.loss, self.loss
        self.just_halved = self.loss > self.loss

    def run(self, n_steps):
        last_checkpoint, checkpoints = 0, _checkpoints(n_steps)
        for t in range(1, n_steps + 1):
            self._step(_INERTIA if t > 1 else 0.0)
            if t in checkpoints:
                self._halve_where_stuck(t - last_checkpoint)
                last_checkpoint = t

    def _step(self, inertia):
        ascent = self.direction(self.points, self.gradient, self.length[:, None])
        ascent += self.points
        points = self.region.moved(ascent)
        if inertia:  # (1 - inertia) times this step and inertia times the last one
            points *= 1.0 - inertia
            points += (2.0 * inertia) * self.points
            points -= inertia * self.previous
            points = self.region.moved(points)
        loss, self.gradient = evaluated(self.loss_and_gradient, points)
        self.previous, self.points = self.points, points
        self.n_rises = self.n_rises + (loss > self.loss)
        self.loss = loss
        better = self.best.meet(points, loss)[:, None]
        self.best_gradient = self.xp.where(better, self.gradient, self.best_gradient)

    def _halve_where_stuck(self, n_steps):
        """Halve the steps of rows that gained little in the last n_steps, and go back to the best.

        A row whose steps were halved at the last checkpoint gets another one without a new best.
        """
        xp, best = self.xp, self.best
        idle = ~self.just_halved & (best.loss <= self.loss_at_checkpoint)
        stuck = idle | (self.n_rises < _RISING_SHARE * n_steps)
        self.length = xp.where(stuck, 0.5 * self.length, self.length)
        self.points = xp.where(stuck[:, None], best.points, self.points)
        self.gradient = xp.where(stuck[:, None], self.best_gradient, self.gradient)
        self.loss = xp.where(stuck, best.loss, self.loss)
        self.previous = xp.where(stuck[:, None], self.points, self.previous)
        self.just_halved, self.loss_at_checkpoint = stuck, best.loss
        self.n_rises = 0.0 * self.n_rises


def _checkpoints(n_steps):
    """Return the steps after which lengths are reviewed: at 22 %, then ever closer, to 6 %."""
    shares, gap = [0.22], 0.22
    while shares[-1] < 1.0:
        gap = max(gap - 0.03, 0.06)
        shares.append(shares[-1] + gap)
    return {int(np.ceil(share * n_steps)) for share in shares}
