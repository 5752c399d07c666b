r"""The proximal step of the loss of the worst-case margins, sample by sample.

Given the slope M_e of every margin of a sample and the slacks s that its margins pay for,

.. math::

    \min_{M, s}\ \omega\, \varphi(m) + \tfrac{\rho}{2} \sum_e \|M_e - \tilde M_e\|^2
    + \tfrac{1}{2 \kappa} \sum_i (s_i - g_i)^2, \qquad
    m_e = x'M_e + o_e - \rho_k(M_e) - t_e \sum_i (s_i)_+ ,

where t is the scale that the loss gives the margin. Once the multipliers a of the margins are known
everything else is closed form: with z the slope moved by :math:`(a_e / \rho) x`, M_e is z minus its
projection on :math:`a_e / \rho` times the perturbation set, and a slack is
:math:`(g_i - \kappa t a)_+` (see `cones`). The margins increase with
a, and :math:`a \in -\omega \partial \varphi(m)` is solved by Newton's method:
the margins are piecewise linear in a (nearly so for l1 and l2), and with them linearised `Balance`
is exact. Two steps do, because the multipliers of the last iteration are close; after one alone
they may go to and fro at a kink of the margins for ever.
"""

from __future__ import annotations

import numpy as np
import torch

from convexrobust.backends import torch as xp
from convexrobust.projection import project_rows
from convexrobust.solvers.admm.balance import Balance

# In units of the largest multiplier: the change after which one step will do, and the size that
# stands for 0, where the worst perturbation is that of the limit.
SETTLED, SMALLEST = 1e-6, 1e-7
_ROWS_IN_CACHE = 1024  # that a CPU works on at a time: large temporary arrays cost page faults


class MarginProx:
    """The proximal step for all samples of a program at once.

    Parameters
    ----------
    program : ConvexProgram
        Data, loss and margins.
    like : Tensor
        Dtype and device to compute in.
    """

    def __init__(self, program, like):
        sets = program.sets
        self.p = sets.p
        self.X = xp.constant(sets.center, like)
        self.reach = None if sets.unperturbed else xp.constant(sets.reach, like)
        self.offsets = xp.constant(program.margin_map.offsets.T, like)
        self.balance = Balance(program, like)
        self.square = torch.sum(self.X**2, dim=1)
        self.unit = float(np.max(program.weight))
        n = len(self.X)
        size = _ROWS_IN_CACHE if like.device.type == "cpu" else n
        self.blocks = [slice(start, start + size) for start in range(0, n, size)]

    def __call__(self, M, rho, a, charge):
        """Return multipliers a (E, n) and the proximal point of slopes M (E, n, d).

        ``a`` are the multipliers to start at, ``charge(a)`` is what the slacks cost, a `Charge` or
        None.
        """
        first = self._newton(M, rho, a, charge(a))
        settled = torch.all(torch.abs(first - a) <= SETTLED * self.unit, dim=0)
        if settled.all():
            return first, self._moved(M, rho, first)
        second = self._newton(M, rho, first, charge(first))
        if self.balance.samples is None:
            if len(a) == 1:  # the root is on the side to which the first step points
                back = (second - a) * (first - a) < 0.0
                second = torch.where(back, (first + a) / 2.0, second)
            second = torch.where(settled, first, second)
        return second, self._moved(M, rho, second)

    def _moved(self, M, rho, a):
        """Return the proximal point that belongs to the multipliers."""
        new = torch.empty_like(M)
        for rows in self.blocks:
            scale = (a[:, rows] / rho)[:, :, None]
            moved = torch.addcmul(M[:, rows], scale, self.X[rows], out=new[:, rows])
            if self.reach is not None:
                moved -= self._perturbation(moved, scale, rows)
        return new

    def _newton(self, M, rho, a, charge):
        margin, slope = self._margins(M, rho, a)
        shared = None
        if charge is not None:
            margin, slope = margin - charge.own, slope + charge.own_slope
            if charge.shared is not None:
                at_zero = -charge.shared - charge.shared_slope * a.sum(dim=0)
                shared = (at_zero, charge.shared_slope)
        slope = slope.clamp_min(1e-30)
        return self.balance(torch.addcmul(margin, slope, a, value=-1.0), slope, shared)

    def _margins(self, M, rho, a):
        """Return the margins without slacks and their slope in a, each (E, n)."""
        if self.reach is None:
            margin = torch.linalg.vecdot(M, self.X[None]) + a * self.square / rho
            return margin + self.offsets, (self.square / rho).expand_as(a)
        margin, slope = self.offsets.clone(), torch.empty_like(a)
        for rows in self.blocks:
            scale = torch.clamp(a[:, rows], min=SMALLEST * self.unit)[:, :, None] / rho
            moved = torch.addcmul(M[:, rows], scale, self.X[rows])
            worst = self._perturbation(moved, scale, rows)
            moved -= worst
            worst = torch.sub(self.X[rows], worst.div_(scale), out=worst)
            margin[:, rows] += torch.linalg.vecdot(worst, moved)
            slope[:, rows] = torch.linalg.vecdot(worst.square_(), moved.sign_().abs_()) / rho
        return margin, slope

    def _perturbation(self, moved, scale, rows):
        """Project moved slopes (E, n, d) on their perturbation sets times ``scale`` (E, n, 1)."""
        if self.p == np.inf:
            reach = scale * (self.reach if len(self.reach) == 1 else self.reach[rows])
            return torch.clamp(moved, -reach, reach)
        flat, scales = moved.flatten(0, 1), scale.flatten(0, 1)  # sets of one shape
        return project_rows(xp, flat, self.reach, self.p, scales).view_as(moved)
