"""The norms of the program as epigraphs, their inner variables eliminated."""

from __future__ import annotations

import numpy as np

from convexrobust.solvers.interior_point.cones import Orthant, SecondOrder


class Epigraph:
    r"""The cones of :math:`\sigma \ge \|r \circ q\|` for a batch of q (..., m).

    After elimination of its inner variables its Hessian is, with v = r q,

    .. math:: \alpha (\sigma - \delta'v)^2 + v' \text{diag}(h) v - \gamma (\delta'v)^2 .

    Subclasses get the weights r (..., m), the multiplier of sigma to start from and the product
    s'z of their cones there. With v for r q they provide ``_measure``, ``_pull``, ``_push``
    and ``_dual``.

    Attributes
    ----------
    sigma : ndarray of shape (...)
        The epigraph variable.
    alpha, gamma : ndarray of shape (...)
    tilt, curvature : ndarray of shape (..., m)
        delta times r, and h times r squared: in units of q.
    cones : list of Orthant or SecondOrder
        Where the slacks and multipliers are.
    """

    sigma: np.ndarray
    cones: list

    def __init__(self, weights):
        self.weights = weights

    def measure(self, q):
        """Take in the value of q, and set the coefficients of the Hessian."""
        self._measure(self.weights * q)
        self.tilt, self.curvature = self.tilt * self.weights, self.curvature * self.weights**2

    def pull(self):
        """Return the right-hand sides of sigma and of q."""
        of_sigma, of_v = self._pull()
        return of_sigma, self.weights * of_v

    def push(self, change, dq):
        """Set the steps from those of sigma and q."""
        self.change = change
        self._push(change, self.weights * dq)

    def dual(self):
        """Return the multipliers of q."""
        return self.weights * self._dual()

    def move(self, step):
        """Take the step of the variables; the cones take their own."""
        self.sigma = self.sigma + step * self.change

    def take(self, other, index):
        """Take over the state of some entries of another batch."""
        self.sigma = other.sigma[index]
        for new, old in zip(self.cones, other.cones, strict=True):
            new.s, new.z = old.s[index], old.z[index]


class EuclideanEpigraph(Epigraph):
    """For the Euclidean norm: one second-order cone."""

    def __init__(self, weights, share, mu):
        super().__init__(weights)
        shape = np.broadcast_shapes(weights.shape, (*share.shape, 1))
        z = np.zeros((*shape[:-1], shape[-1] + 1))
        z[..., 0] = share
        self.cone = SecondOrder(z, mu)
        self.cones = [self.cone]
        self.sigma = self.cone.s[..., 0].copy()

    def _measure(self, v):
        self.cone.measure(np.concatenate([self.sigma[..., None], v], axis=-1))
        w0, w1 = self.cone.w[..., 0], self.cone.w[..., 1:]
        inverse = 1.0 / self.cone.scale**2
        head = w0**2 + np.sum(w1**2, axis=-1)
        self.alpha, self.tilt = inverse * head, (2.0 * w0 / head)[..., None] * w1
        self.curvature = np.broadcast_to(inverse[..., None], w1.shape)
        self.gamma = self.alpha / (2.0 * w0**2)

    def _pull(self):
        return self.cone.target[..., 0], self.cone.target[..., 1:]

    def _push(self, change, dv):
        self.cone.direct(np.concatenate([change[..., None], dv], axis=-1))

    def _dual(self):
        return self.cone.z[..., 1:]


class LargestEpigraph(Epigraph):
    """For the largest absolute value: two half-spaces an entry."""

    def __init__(self, weights, share, mu):
        super().__init__(weights)
        shape = np.broadcast_shapes(weights.shape, (*share.shape, 1))
        z = np.broadcast_to(share[..., None] / (2.0 * shape[-1]), shape)
        self.above, self.below = Orthant(z, mu), Orthant(z, mu)
        self.cones = [self.above, self.below]
        self.sigma = self.above.s.max(axis=-1)

    def _measure(self, v):
        self.above.measure(self.sigma[..., None] - v)
        self.below.measure(self.sigma[..., None] + v)
        both = self.above.weight + self.below.weight
        self.alpha = both.sum(axis=-1)
        self.tilt = (self.above.weight - self.below.weight) / self.alpha[..., None]
        self.curvature, self.gamma = both, self.alpha

    def _pull(self):
        above, below = self.above.target, self.below.target
        return (above + below).sum(axis=-1), below - above

    def _push(self, change, dv):
        self.above.direct(change[..., None] - dv)
        self.below.direct(change[..., None] + dv)

    def _dual(self):
        return self.below.z - self.above.z


class SumEpigraph(Epigraph):
    """For the sum of absolute values: t >= |v| entry by entry and sigma >= sum t."""

    def __init__(self, weights, share, mu):
        super().__init__(weights)
        shape = np.broadcast_shapes(weights.shape, (*share.shape, 1))
        z = np.broadcast_to(share[..., None] / 2.0, shape)
        self.above, self.below, self.total = Orthant(z, mu), Orthant(z, mu), Orthant(share, mu)
        self.cones = [self.above, self.below, self.total]
        self.t = self.above.s.copy()
        self.sigma = self.t.sum(axis=-1) + self.total.s

    def _measure(self, v):
        self.above.measure(self.t - v)
        self.below.measure(self.t + v)
        self.total.measure(self.sigma - self.t.sum(axis=-1))
        above, below = self.above.weight, self.below.weight
        self.both = above + below
        self.alpha = 1.0 / (1.0 / self.total.weight + np.sum(1.0 / self.both, axis=-1))
        self.slant = (above - below) / self.both
        self.tilt, self.curvature = self.slant, 4.0 * above * below / self.both
        self.gamma = np.zeros_like(self.alpha)

    def _inner(self, r):
        """Solve for t: the inverse of diag(both) + total.weight 11' times r (..., m)."""
        r = r / self.both
        return r - (self.alpha * r.sum(axis=-1))[..., None] / self.both

    def _pull(self):
        above, below, total = self.above.target, self.below.target, self.total.target
        self.rest = above + below - total[..., None]
        inner = self._inner(self.rest)
        of_sigma = total + self.total.weight * inner.sum(axis=-1)
        return of_sigma, below - above + self.both * self.slant * inner

    def _push(self, change, dv):
        r = self.rest + self.both * self.slant * dv + (self.total.weight * change)[..., None]
        self.dt = self._inner(r)
        self.above.direct(self.dt - dv)
        self.below.direct(self.dt + dv)
        self.total.direct(change - self.dt.sum(axis=-1))

    def move(self, step):
        """Take the step of the variables; the cones take their own."""
        super().move(step)
        self.t = self.t + step * self.dt

    def take(self, other, index):
        """Take over the state of some entries of another batch."""
        super().take(other, index)
        self.t = other.t[index]

    def _dual(self):
        return self.below.z - self.above.z


# By the norm p of the perturbation: the support function is the dual norm.
SUPPORT_EPIGRAPHS: dict[float, type[Epigraph]] = {
    1: LargestEpigraph,
    2: EuclideanEpigraph,
    np.inf: SumEpigraph,
}
