"""One step of Mehrotra's predictor-corrector method."""

from __future__ import annotations

import numpy as np

from convexrobust.solvers.interior_point.iterate import Iterate
from convexrobust.solvers.interior_point.system import System

_SHORTEST_STEP = 1e-8
_TO_BOUNDARY = 0.99  # share of the longest step inside the cones that is taken


def newton_step(iterate: Iterate) -> bool:
    """Predict, correct, move; return whether that led anywhere."""
    try:
        iterate.measure()
        system = System(iterate)
        _aim(iterate, system, 0.0, correct=False)
        _aim(iterate, system, _centred(iterate), correct=True)
    except np.linalg.LinAlgError:  # rounding left nothing to factor
        return False
    length = min(1.0, _TO_BOUNDARY * _longest(iterate))
    if length <= _SHORTEST_STEP or not _finite(iterate):
        return False
    iterate.move(length)
    return True


def _centred(iterate) -> float:
    """Return the product s'z a degree to aim at: less, the farther the prediction gets."""
    length = min(1.0, _longest(iterate))
    mu = iterate.product() / iterate.degree
    after = sum(cone.product(length) for cone in iterate.cones) / iterate.degree
    return min(1.0, max(after / mu, 0.0)) ** 3 * mu


def _longest(iterate) -> float:
    """Return the longest step inside all cones."""
    return min(cone.longest() for cone in iterate.cones)


def _finite(iterate) -> bool:
    """Tell whether the direction is made of numbers: NaN has no longest step."""
    return all(np.isfinite(step).all() for cone in iterate.cones for step in (cone.ds, cone.dz))


def _aim(iterate, system, mu, correct):
    """Set the step of everything towards the central path's point mu."""
    for cone in iterate.cones:
        cone.aim(mu, correct)
    right = _RightSide(iterate, system)
    change, a, dzeta = system.solve(right.neurons, right.margins, iterate.loss.pull())
    _recover(iterate, system, right, change, a, dzeta)


class _RightSide:
    """What pulls at the neurons (J, size) and the margins (n, E), all else eliminated.

    ``norms``, ``slopes`` and ``slacks`` are what pulled at the variables that were eliminated.
    """

    def __init__(self, iterate, system):
        data, b = iterate.data, iterate.cone.target
        self.margins = iterate.margin.target / iterate.margin.weight
        if data.soft:
            self.slacks = iterate.spare.target + b
            b = b - system.ratio * self.slacks
            loose = self.slacks / system.pair_weight
            self.margins = self.margins + np.einsum("kej,kj->ke", data.hurts, loose)
        self.neurons = data.pulled_gaps(b)
        of_sigma, of_u = iterate.group.pull()
        self.norms = of_sigma - 1.0
        self.neurons[:, : data.X.shape[1]] += of_u + iterate.group.tilt * self.norms[:, None]
        if data.perturbed:
            self._add_slopes(data, iterate.slope)
            self._add_robust(data, iterate.robust)

    def _add_slopes(self, data, slope):
        self.slopes, of_q = slope.pull()
        self.margins = self.margins + (self.slopes / slope.alpha)[:, data.slope_of]
        of_q = of_q + slope.tilt * self.slopes[..., None]
        pulled = np.einsum("kej,kef->jf", data.F_slope, of_q, optimize=True)
        self.neurons[:, data.features] += pulled

    def _add_robust(self, data, robust):
        of_tau, of_members = robust.pull()
        self.neurons[:, data.X.shape[1] :] += of_tau
        for at, members in enumerate(data.members):
            self.neurons[:, members] += of_members[:, at]


def _recover(iterate, system, right, change, a, dzeta):
    """Set the steps of everything eliminated from those of the neurons and a."""
    data, d = iterate.data, iterate.data.X.shape[1]
    iterate.dU, dtau = change[:, :d], change[:, d:]
    along = np.sum(iterate.group.tilt * iterate.dU, axis=1)
    iterate.group.push(along + right.norms / iterate.group.alpha, iterate.dU)
    iterate.loss.push(dzeta)
    margins = dzeta @ iterate.loss.spread.T + data.margins(iterate.dU)
    gaps = data.gaps(iterate.dU, dtau)
    if data.perturbed:
        slope, dq = iterate.slope, data.slopes(iterate.dU)
        dsigma = (right.slopes - a @ data.shares.T) / slope.alpha
        dsigma = np.sum(slope.tilt * dq, axis=-1) + dsigma
        slope.push(dsigma, dq)
        iterate.robust.push(dtau, iterate.dU[:, data.members])
        margins = margins - dsigma[:, data.slope_of]
    if data.soft:
        iterate.dy = _slack_step(iterate, system, right, gaps, a)
        iterate.spare.direct(iterate.dy)
        gaps = gaps + iterate.dy
        margins = margins - np.einsum("kej,kj->ke", data.hurts, iterate.dy)
    iterate.margin.direct(margins, a)
    iterate.cone.direct(gaps)


def _slack_step(iterate, system, right, gaps, a):
    """Return the step of the slacks of soft cones, (N, J)."""
    harm = np.einsum("kej,ke->kj", iterate.data.hurts, a)
    pulled = right.slacks - iterate.cone.weight * gaps - harm
    return np.where(iterate.data.mask, pulled / system.pair_weight, 0.0)
