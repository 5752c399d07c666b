r"""Random search on square-shaped changes: an attack that sees losses only, no gradient.

It finds what gradients hide: losses that are flat, noisy or not differentiable at the data.
"""

from __future__ import annotations

import numpy as np

from convexrobust.attacks.region import Best, Region, check_counts, losses_at
from convexrobust.backends import numpy as numpy_backend

# The share of the features that change at once is halved after these shares of the queries.
_HALVED_AT = np.array([0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8])


def square(
    loss,
    X,
    ball,
    *,
    n_queries=1000,
    share=0.8,
    shape=None,
    random_state=None,
    xp=numpy_backend,
):
    r"""Change a random part of each row, keep what raises its loss, and repeat (Square Attack).

    .. math:: \delta_{t+1} = \delta_t + \nu \quad\text{if}\quad
              \ell(x + \delta_t + \nu) > \ell(x + \delta_t), \quad\text{else}\quad \delta_t

    In l-inf the changed part gets new corners of the box. In l1 and l2 one part receives the
    length that another part gives up (all of it in l1, a random share in l2), so that the point
    stays on the sphere. A part is a random subset of the features, or with ``shape`` a square of
    an image.

    Parameters
    ----------
    loss : callable
        From points (n, d) to the losses to increase (n,), each of its own row only. It may return
        a pair (losses, gradients) like that of other attacks; the gradients are ignored.
    X : array of shape (n, d)
        The points to attack.
    ball : LpBall
        The threat model.
    n_queries : int
        How often the loss of each row is asked for besides at X, at least 1.
    share : float
        Share of the features that change at first, in (0, 1]; halved nine times on the way.
    shape : tuple (c, h, w), optional
        Channels, height and width of the images that the rows are. Without it, features have no
        neighbours.
    random_state : None, int or numpy.random.Generator
        For the search.
    xp : module
        The backend of X: `convexrobust.backends.numpy` or `convexrobust.backends.torch`.

    Returns
    -------
    array of shape (n, d)
        The points with the largest loss that was met, X among them. Features of radius 0 are
        those of X, bit for bit.

    Raises
    ------
    ValueError
        If X is outside the bounds, the loss is of another shape, or ``shape`` does not fit X.
    FloatingPointError
        If a loss is not finite.
    RuntimeError
        If the result is outside the ball or the bounds.

    References
    ----------
    Andriushchenko, Croce, Flammarion and Hein, arXiv 1912.00049.
    """
    check_counts(n_queries=n_queries)
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share!r}.")
    region, rng = Region(xp, X, ball), np.random.default_rng(random_state)
    if region.n_free == 0:
        return region.checked(region.moved(region.X))
    parts = _Subsets(region, rng) if shape is None else _Squares(region, rng, shape)
    points = region.moved(region.X + region.epsilon * _long(region, parts.everywhere()))
    best = Best(xp, points, losses_at(loss, points))
    for t in range(1, n_queries):
        now = share / 2.0 ** np.count_nonzero(t >= _HALVED_AT * n_queries)
        change = _corners if ball.p == np.inf else _moved_length
        scaled = change(region, (best.points - region.X) / region.unit, *parts.draw(now))
        points = region.moved(region.X + region.epsilon * scaled)
        best.meet(points, losses_at(loss, points))
    best.meet(region.X, losses_at(loss, region.X))
    return region.checked(best.points)


# ------------------------------------------------------------------ what is proposed


def _corners(region, scaled, here, there, values):
    """Return the perturbation with other corners of the box ``here``."""
    xp = region.xp
    new = xp.where(here > 0.0, values, scaled)
    same = (new == scaled).all(1)[:, None]  # would be a wasted query
    return xp.where(same & (here > 0.0), -new, new)


def _moved_length(region, scaled, here, there, values):
    """Return the perturbation with length moved from ``there``, and any not yet used, ``here``."""
    xp, p = region.xp, region.ball.p
    rest = xp.where(here > 0.0, 0.0 * scaled, (1.0 - there) * scaled)
    unused = xp.pos(1.0 - xp.row_sum(xp.abs(rest) ** p)) ** (1.0 / p)
    kept = xp.where(here > 0.0, scaled, 0.0 * scaled)
    return rest + unused[:, None] * _long(region, _long(region, kept) + _long(region, values))


def _given_up(region, rng):
    """Return how much of its length a part gives up; in l2 all of it would be too coarse a move."""
    return rng.random((len(region.X), 1)) if region.ball.p == 2 else 1.0


def _long(region, A):
    """Return the rows of A with norm 1, or 0."""
    norm = region.xp.norm(A, region.ball.p, axis=1)[:, None]
    return A / region.xp.where(norm > 0.0, norm, 1.0 + norm)


def _signs(rng, shape):
    return np.where(rng.random(shape) < 0.5, -1.0, 1.0)


class _Subsets:
    """Parts of rows without geometry: every feature is in with the same probability."""

    def __init__(self, region, rng):
        self.region, self.rng = region, rng
        self.free = region.ball.epsilons(region.X.shape[1]) > 0.0

    def everywhere(self):
        return self._constant(self._free_signs())

    def draw(self, share):
        """Return a part as 0/1, the share that others give up, and new values of the part."""
        lottery = self.rng.random((len(self.region.X), self.region.n_free))
        here = lottery <= np.maximum(share, lottery.min(axis=1, keepdims=True))
        there = lottery >= np.minimum(1.0 - share, lottery.max(axis=1, keepdims=True))
        there = (there & ~here) * _given_up(self.region, self.rng)
        here, there = self._placed(here), self._placed(there)
        return here, there, here * self._constant(self._free_signs())

    def _free_signs(self):
        return _signs(self.rng, tuple(self.region.X.shape)) * self.free

    def _placed(self, part):
        placed = np.zeros(tuple(self.region.X.shape))
        placed[:, self.free] = part
        return self._constant(placed)

    def _constant(self, array):
        return self.region.xp.constant(array, self.region.X)


class _Squares:
    """Square windows of images (c, h, w), with one sign in each channel."""

    def __init__(self, region, rng, shape):
        n, d = region.X.shape
        if len(shape) != 3 or np.prod(shape) != d:
            raise ValueError(f"shape must be (c, h, w) with {d} pixels in all, got {shape!r}.")
        self.region, self.rng, self.n, self.shape = region, rng, n, tuple(shape)

    def everywhere(self):
        """Return stripes: to networks with convolutions they are the strongest simple pattern."""
        c, _, w = self.shape
        return self._constant(_signs(self.rng, (self.n, c, 1, w)))

    def draw(self, share):
        """Return a square as 0/1, the share that another gives up, and new values of the first."""
        _, h, w = self.shape
        side = min(max(1, round((share * h * w) ** 0.5)), h, w)
        (here, bump), (there, _) = self._window(side), self._window(side)
        values = _signs(self.rng, (self.n, self.shape[0], 1, 1))
        if self.region.ball.p != np.inf:
            values = values * bump
        here, values, there = (self._constant(image) for image in (here, here * values, there))
        return (
            here,
            there * self.region.xp.constant(_given_up(self.region, self.rng), there),
            values,
        )

    def _window(self, side):
        """Return a random square (n, 1, h, w) as 0/1, and values that fall off from its centre."""
        _, h, w = self.shape
        middle = (side - 1) / 2.0
        down, right = (
            np.abs(np.arange(size) - middle - self.rng.integers(size - side + 1, size=(self.n, 1)))
            for size in (h, w)
        )
        distance = np.maximum(down[:, None, :, None], right[:, None, None, :])
        return 1.0 * (distance <= middle), 1.0 / (1.0 + distance)

    def _constant(self, images):
        rows = np.broadcast_to(images, (self.n, *self.shape)).reshape(self.n, -1)
        rows = rows * (self.region.ball.epsilons(rows.shape[1]) > 0.0)
        return self.region.xp.constant(rows, self.region.X)
