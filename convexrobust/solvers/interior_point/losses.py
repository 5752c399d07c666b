"""The losses as functions of the rise of each sample: Hessians, right-hand sides and steps."""

from __future__ import annotations

import numpy as np

from convexrobust.losses import LossKind
from convexrobust.solvers.interior_point.cones import Orthant


def loss_term(loss, weight, offsets) -> PiecewiseLoss:
    """Return the term of a loss for samples of those weights (n,) and margin offsets (n, E)."""
    kind = LogisticLoss if loss.kind == LossKind.LOGISTIC else PiecewiseLoss
    return kind(loss, weight, offsets)


class PiecewiseLoss:
    """A sample's largest rise zeta >= threshold - m_e, which costs linearly or quadratically.

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
    """

    def __init__(self, loss, weight, offsets):
        n, n_margins = offsets.shape
        self.weight, self.steepness = weight[:, None], loss.steepness
        self.rises = loss.threshold - offsets
        self.spread = np.ones((n_margins, 1))
        self.zeta = np.full((n, 1), max(np.mean(np.maximum(self.rises.max(axis=1), 0.0)), 1e-3))
        total = self.weight * (self.zeta / self.steepness if self.steepness else 0.5)
        self.start = np.repeat(total / n_margins, n_margins, axis=1)
        self.scale = float(np.mean(total * self.zeta))
        # The quadratic losses need no floor: below 0 they only cost more.
        self.cones = [] if self.steepness else [Orthant(self.weight / 2.0, self.scale)]

    def measure(self):
        """Set the Hessian (n, 1, 1), the floor's part included."""
        for floor in self.cones:
            floor.measure(self.zeta)
            self.hessian = floor.weight[..., None]
        if self.steepness:
            self.hessian = (self.weight / self.steepness)[..., None]

    def pull(self):
        """Return the right-hand side of zeta."""
        if self.steepness:
            return -self.weight * self.zeta / self.steepness
        return self.cones[0].target - self.weight

    def push(self, change):
        """Set the step."""
        self.change = change
        for floor in self.cones:
            floor.direct(change)

    def move(self, step):
        """Take the step."""
        self.zeta = self.zeta + step * self.change


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
