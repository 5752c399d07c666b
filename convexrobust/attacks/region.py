"""The points an attack may move to, the steps it takes among them, and the checks of both."""

from __future__ import annotations

import numpy as np

from convexrobust.perturbations import LpBall
from convexrobust.projection import project_rows

_SLACK = 1e-6  # of the radius: what bisection and rescaling in a projection may leave


class Region:
    """The ball around each row of X, cut by the bounds; what depends on X only is computed once.

    Parameters
    ----------
    xp : module
        The backend of X.
    X : array of shape (n, d)
        The points to attack.
    ball : LpBall
        The threat model.

    Raises
    ------
    ValueError
        If X is not (n, d), is outside the bounds, or is not a number.
    """

    def __init__(self, xp, X, ball):
        X = xp.constant(X, X)
        if len(X.shape) != 2:
            raise ValueError(f"X must have shape (n, d), got {tuple(X.shape)}.")
        epsilons = ball.epsilons(X.shape[1])
        self.xp, self.X, self.ball = xp, X, ball
        self.n_free = int(np.count_nonzero(epsilons))
        self.all_free = self.n_free == len(epsilons)
        # One column if the radius is common, so that it costs no pass over the data.
        self.common = self.all_free and np.ndim(ball.epsilon) == 0
        self.epsilon = xp.constant(epsilons[None, : 1 if self.common else None], X)
        self.radius = ball.epsilon if self.common else self.epsilon  # to multiply by
        self.free = self.epsilon > 0.0
        self.unit = self.epsilon  # to divide by
        self.one = xp.constant(np.ones((1, 1)), X)
        if not self.all_free:
            self.unit = xp.where(self.free, self.epsilon, 1.0 + self.epsilon)
        self.lo, self.hi = (xp.constant(end[None, :], X) for end in ball.feature_range(X.shape[1]))
        if not self._within_bounds(X):
            raise ValueError(
                "bounds exclude the data: a row of X is outside them, or not a number."
            )
        if ball.p == np.inf:
            self.low, self.high = self._box()

    def _box(self):
        """Return the ends of the box that an l-inf ball is, cut by the bounds."""
        low, high = self.X - self.epsilon, self.X + self.epsilon
        if self.ball.bounds is not None:
            low, high = self.xp.maximum(low, self.lo), self.xp.minimum(high, self.hi)
        if self.all_free:
            return low, high
        return tuple(self.xp.where(self.free, end, self.X) for end in (low, high))

    def moved(self, points):
        """Return points (n, d) put back into the ball, then into the bounds.

        The ball is projected on in units of epsilon, as steps are taken. The nearest point in
        units of X would pull towards the wide axes of an ellipsoid, away from a large loss.
        """
        if self.ball.p == np.inf:
            return points.clip(self.low, self.high)
        delta = points - self.X
        if not self.all_free:
            delta = self.xp.where(self.free, delta, 0.0 * delta)
        if self.ball.p == 2:
            delta *= 1.0 / self.xp.maximum(self._length(delta, 1.0 / self.unit), 1.0)
        else:
            delta = self.unit * project_rows(self.xp, delta / self.unit, self.one, 1)
        delta += self.X
        moved = delta if self.ball.bounds is None else delta.clip(self.lo, self.hi)
        return moved if self.all_free else self.xp.where(self.free, moved, self.X)

    def _length(self, A, weights):
        """Return the Euclidean length (n, 1) of the rows of A, with weights for the features."""
        if self.common:
            return weights * self.xp.norm(A, 2, axis=1)[:, None]
        return self.xp.norm(weights * A, 2, axis=1)[:, None]

    def random_points(self, rng):
        """Return random points, uniform in the uncut ball and then moved into the bounds."""
        # Sampled without X, which may be on another device.
        noise = LpBall(self.ball.p, self.ball.epsilon).sample(np.zeros(tuple(self.X.shape)), rng)
        return self.moved(self.X + self.xp.constant(noise, self.X))

    def steepest(self, points, gradient, length):
        """Return the step that increases the linearised loss most.

        ``length`` is in units of the ball, a number or one for each row (n, 1).
        """
        if self.ball.p == np.inf:  # every feature moves on its own, and `moved` stops it
            step = self.xp.sign(gradient)
            step *= length * self.radius
            return step
        if self.ball.p == 2:
            return self._along(self._inward(points, gradient), length)
        if self.ball.bounds is None:
            return length * self.ball.steepest(self.xp, gradient)
        return self._filled(points, gradient, length)

    def _filled(self, points, gradient, length):
        """Return the steepest l1 step within the bounds: the best features go to theirs first."""
        xp, rows = self.xp, np.arange(len(points))[:, None]
        room = xp.where(gradient > 0.0, self.hi - points, points - self.lo) / self.unit
        room = xp.minimum(xp.pos(room), length + 0.0 * gradient)  # no more than all; finite
        order = (-self.epsilon * xp.abs(gradient)).argsort(1)
        sorted_room = room[rows, order]
        before = sorted_room.cumsum(1) - sorted_room
        step = 0.0 * gradient
        step[rows, order] = xp.minimum(xp.pos(length - before), sorted_room)
        return self.epsilon * xp.sign(gradient) * step

    def along_gradient(self, points, gradient, length):
        """Return the gradient, for length 1 as long as the ellipsoid around the ball is wide.

        Like the steepest step it is taken in units of epsilon, so that features have their scales.
        """
        widening = 2.0 * (np.sqrt(self.n_free) if self.ball.p == np.inf else 1.0)
        return self._along(self._inward(points, gradient), widening * length)

    def _along(self, gradient, length):
        """Return the steepest step in an ellipsoid."""
        slope = self._length(gradient, self.epsilon)
        slope = self.xp.where(slope > 0.0, slope, 1.0 + slope)
        return (length / slope * self.epsilon**2) * gradient

    def _inward(self, points, gradient):
        """Return the gradient without the features whose bound does not let them follow it.

        Otherwise the one coordinate of an l1 step would stay that of a feature which cannot move.
        """
        if self.ball.bounds is None:
            return gradient
        return gradient * self.xp.where(gradient > 0.0, points < self.hi, points > self.lo)

    def checked(self, points):
        """Return points (n, d) if all are in the ball and the bounds, else raise RuntimeError."""
        xp, X = self.xp, self.X
        distance = xp.abs(points - X)
        scaled = xp.pos(distance - _rounding(xp, points)) / self.unit
        inside = self.all_free or (self.free | (distance <= 0.0)).all()
        if not self.all_free:
            scaled = xp.where(self.free, scaled, 0.0 * scaled)
        # In l-inf the largest entry is the norm, so that each is compared on its own.
        lengths = scaled if self.ball.p == np.inf else xp.norm(scaled, self.ball.p, axis=1)
        inside = inside and (lengths <= 1.0 + _SLACK).all()
        if not (inside and self._within_bounds(points)):
            raise RuntimeError(
                f"an attacked point left the ball or the bounds of {self.ball!r}; "
                "its loss would say nothing about this threat model."
            )
        return points

    def _within_bounds(self, points):
        nearest = points.clip(self.lo, self.hi)
        if bool((points == nearest).all()):  # as nearly always, and not if one is no number
            return True
        slack = 1e-9 + _rounding(self.xp, points)  # as `LpBall.check_inside`
        return bool((self.xp.abs(points - nearest) <= slack).all())


def evaluated(loss_and_gradient, X):
    """Return loss and gradient, or say what is wrong: a NaN would pass for robustness."""
    loss, gradient = loss_and_gradient(X)
    if tuple(loss.shape) != (len(X),) or tuple(gradient.shape) != tuple(X.shape):
        raise ValueError(
            f"loss_and_gradient must return shapes ({len(X)},) and {tuple(X.shape)}, "
            f"got {tuple(loss.shape)} and {tuple(gradient.shape)}."
        )
    check_finite(loss.sum() + gradient.sum())
    return loss, gradient


def losses_at(loss, X):
    """Return the losses alone (n,), or say what is wrong.

    ``loss`` may return gradients too, which are ignored; if it has an attribute ``losses``, a
    function that spares them, that is called instead.
    """
    values = getattr(loss, "losses", loss)(X)
    values = values[0] if isinstance(values, tuple) else values
    if tuple(values.shape) != (len(X),):
        raise ValueError(f"loss must return shape ({len(X)},), got {tuple(values.shape)}.")
    check_finite(values.sum())
    return values


def check_finite(total):
    """Raise FloatingPointError unless a sum of losses and gradients is finite, as all then are."""
    if not np.isfinite(float(total)):
        raise FloatingPointError("the loss or its gradient is not finite at an attacked point.")


def check_counts(**counts):
    """Raise ValueError unless every count is at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count!r}.")


class Best:
    """The points with the largest loss met so far, each row its own."""

    def __init__(self, xp, points, loss):
        self.xp, self.points, self.loss = xp, points, loss

    def meet(self, points, loss):
        """Take the rows of points whose loss is larger, and return which they are (n,)."""
        better = loss > self.loss
        # No assignment to a mask: on a GPU that would wait for the mask to be counted.
        self.points = self.xp.where(better[:, None], points, self.points)
        self.loss = self.xp.where(better, loss, self.loss)
        return better


def _rounding(xp, X):
    """Return the rounding error of X +- delta, in units of X."""
    unit = {8: 2.0**-52, 4: 2.0**-23}.get(X.dtype.itemsize, 2.0**-7)
    return 4.0 * unit * xp.abs(X)
