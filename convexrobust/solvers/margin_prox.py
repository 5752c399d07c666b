r"""The proximal step of the loss of the worst-case margins, sample by sample.

Given the slope M_e of every margin of a sample and the slacks s that its margins pay for,

.. math::

    \min_{M, s}\ \omega\, \varphi(m) + \tfrac{\rho}{2} \sum_e \|M_e - \tilde M_e\|^2
    + \tfrac{1}{2 \kappa} \sum_i (s_i - g_i)^2, \qquad
    m_e = x'M_e + o_e - \rho_k(M_e) - \sum_i (s_i)_+ .

Once the multipliers a of the margins are known everything else is closed form: with z the slope
moved by :math:`(a_e / \rho) x`, M_e is z minus its projection on :math:`a_e / \rho` times the
perturbation set, and a slack is :math:`(g_i - \kappa a)_+` (see `convexrobust.solvers.cones`). The
margins increase with a, and :math:`a \in -\omega \partial \varphi(m)` is solved by Newton steps:
the margins are piecewise linear in a (nearly so for l1 and l2), and with them linearised `Balance`
is exact. A few steps do, because the multipliers of the last iteration are close.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from convexrobust.backends import torch as xp
from convexrobust.perturbations import project_rows
from convexrobust.solvers.balance import Balance

_ROWS_IN_CACHE = 1024  # that a CPU works on at a time: large temporary arrays cost page faults


class Proximal(NamedTuple):
    """Result of the step: multipliers a (E, n), slopes M and their multipliers (E, n, d)."""

    a: torch.Tensor
    M: torch.Tensor
    perturbation: torch.Tensor


class MarginProx:
    """The proximal step for all samples of a program at once.

    Parameters
    ----------
    program : ConvexProgram
        Data, loss and margins.
    like : Tensor
        Dtype and device to compute in.
    n_steps : int
        Newton steps at most.
    """

    def __init__(self, program, like, n_steps=2):
        sets = program.sets
        self.n_steps, self.p = n_steps, sets.p
        self.X = xp.constant(sets.center, like)
        self.reach = xp.constant(sets.radius * sets.weights, like) if sets.radius > 0.0 else None
        self.offsets = xp.constant(program.margin_map.offsets.T, like)
        self.balance = Balance(program, like)
        self.square = torch.sum(self.X**2, dim=1)
        self.unit = float(np.max(program.weight))
        n = len(self.X)
        size = _ROWS_IN_CACHE if like.device.type == "cpu" else n
        self.blocks = [slice(start, start + size) for start in range(0, n, size)]

    def __call__(self, M, rho, a, charge) -> Proximal:
        """Return the proximal point of slopes M (E, n, d), started at the multipliers a (E, n).

        ``charge(a)`` is what the slacks cost, a `Charge` or None.
        """
        single = len(a) == 1 and self.balance.samples is None
        low, high = torch.zeros_like(a), self.balance.largest.expand_as(a)
        for _ in range(self.n_steps):
            new = self._newton(M, rho, a, charge(a))
            if single:
                # The root lies on the side to which the step points; one that leaves the bracket
                # is replaced by its middle.
                low, high = torch.where(new > a, a, low), torch.where(new < a, a, high)
                outside = (new < low) | (new > high)
                new = torch.where(outside, (low + high) / 2.0, new)
            change, a = torch.abs(new - a).max(), new
            if change <= 1e-6 * self.unit:
                break
        return self._moved(M, rho, a)

    def _moved(self, M, rho, a) -> Proximal:
        """Return the proximal point that belongs to the multipliers."""
        new, perturbation = torch.empty_like(M), torch.empty_like(M)
        for rows in self.blocks:
            scale = a[:, rows] / rho
            moved = M[:, rows] + scale[:, :, None] * self.X[rows]
            worst = self._perturbation(moved, scale, rows)
            new[:, rows], perturbation[:, rows] = moved - worst, rho * worst
        return Proximal(a, new, perturbation)

    def _newton(self, M, rho, a, charge):
        margin, slope = self._margins(M, rho, a)
        shared = None
        if charge is not None:
            margin, slope = margin - charge.own, slope + charge.own_slope
            if charge.shared is not None:
                at_zero = -charge.shared - charge.shared_slope * a.sum(dim=0)
                shared = (at_zero, charge.shared_slope)
        slope = slope.clamp_min(1e-30)
        return self.balance(margin - slope * a, slope, shared)

    def _margins(self, M, rho, a):
        """Return the margins without slacks and their slope in a, each (E, n)."""
        if self.reach is None:
            margin = torch.einsum("ekd,kd->ek", M, self.X) + a * self.square / rho
            return margin + self.offsets, (self.square / rho).expand_as(a)
        margin, slope = torch.empty_like(a), torch.empty_like(a)
        for rows in self.blocks:
            # At a = 0 the worst perturbation is that of the limit.
            scale = torch.clamp(a[:, rows], min=1e-7 * self.unit) / rho
            moved = M[:, rows] + scale[:, :, None] * self.X[rows]
            perturbation = self._perturbation(moved, scale, rows)
            moved -= perturbation
            worst = self.X[rows] - perturbation / scale[:, :, None]
            margin[:, rows] = torch.sum(worst * moved, dim=2)
            slope[:, rows] = torch.sum(worst.square_() * (moved != 0.0), dim=2) / rho
        return margin + self.offsets, slope

    def _perturbation(self, moved, scale, rows):
        """Project the moved slopes of some rows on their perturbation sets times ``scale``."""
        if self.reach is None:
            return torch.zeros_like(moved)
        reach = scale[:, :, None] * (self.reach if len(self.reach) == 1 else self.reach[rows])
        if self.p == np.inf:
            return torch.clamp(moved, -reach, reach)
        flat = (moved.flatten(0, 1), reach.expand_as(moved).flatten(0, 1))
        return project_rows(xp, *flat, self.p).view_as(moved)
