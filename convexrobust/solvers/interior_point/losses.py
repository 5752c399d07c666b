"""The losses as functions of the rise of each sample: Hessians, right-hand sides and steps."""

from __future__ import annotations

import numpy as np

from convexrobust.losses import LossKind
from convexrobust.solvers.interior_point.cones import Orthant


def loss_term(loss, weight, offsets) -> PiecewiseLoss:
    """Return the term of a loss for samples of those weights (n,) and margin offsets (n, E)."""
    if loss.kind == LossKind.LOGISTIC:
        return LogisticLoss(loss, weight, offsets)
    if loss.steepness == 0.0:
        return LinearLoss(loss, weight, offsets)
    if np.isfinite(loss.largest_multiplier):
        return BentLoss(loss, weight, offsets)
    return PiecewiseLoss(loss, weight, offsets)


class PiecewiseLoss:
    r"""A sample's largest rise zeta >= threshold - m_e, which costs weight zeta^2 / (2 steepness).

    It needs no floor: below 0 it only costs more.

    Attributes
    ----------
    zeta : ndarray of shape (n, Z)
        The rises: one a sample here, one a margin for the logistic loss.
    spread : ndarray of shape (E, Z)
        Which rise each margin bounds from below.
    rises : ndarray of shape (n, E)
        What zeta is at least at the zero network.
    start : ndarray of shape (n, E)
        Multipliers of the margins to start from.
    scale : float
        What the products s'z are at the start.
    cones : list of Orthant
        The floors of the rises.
    """

    cones: list[Orthant]

    def __init__(self, loss, weight, offsets):
        n, n_margins = offsets.shape
        self.weight, self.steepness = weight[:, None], loss.steepness
        self.most = self.weight * loss.largest_multiplier
        self.rises = loss.threshold - offsets
        self.spread = np.ones((n_margins, 1))
        self.zeta = np.full((n, 1), max(np.mean(np.maximum(self.rises.max(axis=1), 0.0)), 1e-3))
        total = self._first_total()
        self.start = np.repeat(total / n_margins, n_margins, axis=1)
        self.scale = float(np.mean(total * self.zeta))
        self.cones = []

    def _first_total(self):
        """Return the sums of the multipliers to start from (n, 1)."""
        return self.weight * (self.zeta / self.steepness)

    def measure(self):
        """Set the Hessian (n, 1, 1), the floor's part included."""
        self.hessian = (self.weight / self.steepness)[..., None]

    def pull(self):
        """Return the right-hand side of zeta."""
        return -self.weight * self.zeta / self.steepness

    def push(self, change):
        """Set the step."""
        self.change = change

    def move(self, step):
        """Take the step."""
        self.zeta = self.zeta + step * self.change


class LinearLoss(PiecewiseLoss):
    """The same with a cost of largest_multiplier * weight * zeta and a floor, zeta >= 0."""

    def __init__(self, loss, weight, offsets):
        super().__init__(loss, weight, offsets)
        self.floor = Orthant(self.most / 2.0, self.scale)
        self.cones = [self.floor]

    def _first_total(self):
        return 0.5 * self.most

    def measure(self):
        """Set the Hessian (n, 1, 1), which is that of the floor."""
        self.floor.measure(self.zeta)
        self.hessian = self.floor.weight[..., None]

    def pull(self):
        """Return the right-hand side of zeta."""
        return self.floor.target - self.most

    def push(self, change):
        """Set the step."""
        super().push(change)
        self.floor.direct(change)


class BentLoss(PiecewiseLoss):
    r"""The same with a cost that is quadratic first and then linear.

    A part :math:`\zeta_2 \ge 0` of the rise costs largest_multiplier * weight a unit, the rest is
    quadratic. Of two costs that share a rise only the sum of their inverse Hessians matters, so
    that :math:`\zeta_2` is eliminated.
    """

    def __init__(self, loss, weight, offsets):
        super().__init__(loss, weight, offsets)
        self.floor = Orthant(self.most / 2.0, self.scale)
        self.cones = [self.floor]
        self.linear = self.floor.s.copy()

    def _first_total(self):
        return np.minimum(super()._first_total(), 0.5 * self.most)

    def measure(self):
        """Set the Hessian (n, 1, 1), that of the two parts in series."""
        self.floor.measure(self.linear)
        self.bend = self.weight / self.steepness
        self.both = self.bend + self.floor.weight
        self.hessian = (self.bend * (self.floor.weight / self.both))[..., None]

    def _pulls(self):
        """Return the right-hand sides of both parts."""
        return -self.bend * (self.zeta - self.linear), self.floor.target - self.most

    def pull(self):
        """Return the right-hand side of zeta."""
        quadratic, linear = self._pulls()
        return (self.floor.weight * quadratic + self.bend * linear) / self.both

    def push(self, change):
        """Set the step, and that of the linear part."""
        super().push(change)
        quadratic, linear = self._pulls()
        self.linear_change = (self.bend * change + linear - quadratic) / self.both
        self.floor.direct(self.linear_change)

    def move(self, step):
        """Take the step."""
        super().move(step)
        self.linear = self.linear + step * self.linear_change


class LogisticLoss(PiecewiseLoss):
    """The logistic loss, with one rise zeta_e >= -m_e a margin."""

    def __init__(self, loss, weight, offsets):
        self.weight, self.rises, self.cones = weight[:, None], -offsets, []
        n_margins = offsets.shape[1]
        self.spread, self.zeta = np.eye(n_margins), np.zeros_like(offsets)
        self.start = self.weight * np.full(offsets.shape, 1.0 / (1.0 + n_margins))
        self.scale = float(np.mean(self.start))

    def _shares(self):
        """Return the derivative in zeta: the softmax over the rises and 0."""
        peak = np.maximum(self.zeta.max(axis=1, keepdims=True), 0.0)
        powers = np.exp(self.zeta - peak)
        return powers / (np.exp(-peak) + powers.sum(axis=1, keepdims=True))

    def measure(self):
        """Set the Hessian (n, E, E)."""
        shares = self._shares()
        diagonal = np.eye(shares.shape[1]) * shares[:, :, None]
        self.hessian = self.weight[..., None] * (diagonal - shares[:, :, None] * shares[:, None, :])

    def pull(self):
        """Return the right-hand side of zeta."""
        return -self.weight * self._shares()
