r"""The reaches :math:`\rho_k(u_i)` of the neurons in a splitting method.

The reach of every neuron over every perturbation set is :math:`T = R A`, linear in variables A that
bound what it is made of. Where all sets have one shape, A is one number for each neuron,
:math:`\rho(u_i) \le A_i`, and R a column of ones. Where each row has a box of its own (l-inf cut by
bounds) A bounds the sizes of the weights, :math:`|u_{ji}| \le A_{ji}`, and R holds the boxes.

Both have the same two parts: least squares in A, and the joint proximal step of the group norm and
of the bound,

.. math:: \min_{Z, A}\ \beta \|z_i\|_2 + \tfrac{\rho_z}{2} \|Z - \tilde Z\|^2
          + \tfrac{\rho_a}{2} \|A - \tilde A\|^2 .
"""

from __future__ import annotations

import numpy as np
import torch

from convexrobust.backends import torch as xp
from convexrobust.perturbations import DUAL_NORM
from convexrobust.projection import project_rows
from convexrobust.solvers.admm.gram import Gram

NEWTON_STEPS = 3
ROUNDING = 1e-6  # relative error of an equation that is solved: a step may then be 0


def shrunk(Z, threshold):
    """Shorten the columns of Z (..., d, P) by the threshold, the proximal step of their norm."""
    return Z * (1.0 - threshold / _length(Z)).clamp_min_(0.0)


def _length(Z):
    """Return the lengths of the columns (..., 1, P), never 0 (several times as fast as a norm)."""
    return (Z * Z).sum(dim=-2, keepdim=True).sqrt_().clamp_min_(1e-30)


class SharedReach:
    """One reach for each neuron; A has shape (2, C, P)."""

    def __init__(self, sets, like):
        self.n, self.p = len(sets.center), sets.p
        self.axes = xp.constant(sets.reach[0], like)
        self.squares = self.axes[:, None] ** 2

    def of(self, U):
        """Return the smallest A for U (2, C, d, P)."""
        if self.p == np.inf:
            return (self.axes[:, None] * U).abs_().sum(dim=-2)
        return torch.linalg.vector_norm(self.axes[:, None] * U, ord=DUAL_NORM[self.p], dim=-2)

    def of_rows(self, rows):
        """Return R at some rows: they are all alike."""
        return self

    def add_to(self, T, A):
        """Add R A to T (m, P), in place, for A (P,) of one side and output."""
        T += A

    def adjoint(self, T):
        """Return R'T for T (m, P)."""
        return T.sum(dim=0)

    def gram(self, A):
        """Return R'R A."""
        return self.n * A

    def solve(self, rho_t, RT, rho_a, A):
        """Return the A closest to the targets T, given as R'T, and A."""
        return (rho_t * RT + rho_a * A) / (rho_t * self.n + rho_a)

    def prox(self, Z, rho_z, A, rho_a, beta, last):
        r"""Return the joint proximal point of Z (2, C, d, P) and A (2, C, P).

        With a multiplier t >= 0 of the bound, z is the group shrinkage of the proximal point of
        :math:`t \rho`, and t the root of :math:`A + t / \rho_a - \rho(z(t))`, which increases. One
        Newton step from the multiplier of the last iteration, ``last`` (2, C, P), is taken, in
        place: the iteration converges to the same points as with the root itself, and no slower.
        The slope used is an upper bound that falls with t, so that steps do not pass the root from
        below.
        """
        t = last
        point = self._moved(Z, rho_z, t, beta)
        excess = torch.add(A, t, alpha=1.0 / rho_a).sub_(self.of(point))
        t.sub_(excess / (1.0 / rho_a + self._fall(point) / rho_z)).clamp_min_(0.0)
        point = self._moved(Z, rho_z, t, beta)
        return point, torch.maximum(self.of(point), torch.add(A, t, alpha=1.0 / rho_a))

    def _moved(self, Z, rho_z, t, beta):
        """Return z(t)."""
        return shrunk(Z - self._projection(Z, t / rho_z), beta / rho_z)

    def _fall(self, point):
        r"""Bound how fast :math:`\rho(z(t))` falls with :math:`t / \rho_z`."""
        if self.p == np.inf:
            return (self.squares * point.sign().abs_()).sum(dim=-2)
        return self.squares.max()

    def _projection(self, Z, scale):
        """Project the columns of Z on the perturbation set times ``scale`` (2, C, P)."""
        if self.p == np.inf:
            reach = self.axes[:, None] * scale[:, :, None]
            return torch.clamp(Z, -reach, reach)
        rows, scales = Z.transpose(-1, -2).flatten(0, 2), scale.flatten()[:, None]
        flat = project_rows(xp, rows, self.axes[None], self.p, scales)
        return flat.view(Z.shape[0], Z.shape[1], Z.shape[3], Z.shape[2]).transpose(-1, -2)


class BoxReach:
    """A box for each row; A has shape (2, C, d, P)."""

    def __init__(self, sets, like):
        self.R = xp.constant(sets.reach, like)
        self.boxes_gram = Gram.of(self.R)

    def of(self, U):
        """Return the smallest A for U (2, C, d, P)."""
        return torch.abs(U)

    def of_rows(self, rows):
        """Return R at some rows."""
        return _Boxes(self.R if len(rows) == len(self.R) else self.R[rows])

    def gram(self, A):
        """Return R'R A."""
        return self.boxes_gram.product(A)

    def solve(self, rho_t, RT, rho_a, A):
        """Return the A closest to the targets T, given as R'T, and A."""
        return self.boxes_gram.solve(self.boxes_gram.inverse(rho_t, rho_a), rho_t * RT + rho_a * A)

    def prox(self, Z, rho_z, A, rho_a, beta, last):
        r"""Return the joint proximal point of Z and A, both (2, C, d, P).

        Given the factor s by which the group norm shrinks a neuron, the bounds cut the sizes of its
        weights to :math:`w(s) = \min(|z|, (\kappa |z| + A)_+ / (\kappa + s))` with
        :math:`\kappa = \rho_z / \rho_a`, and s is the root of
        :math:`(1 - s) \|w(s)\|_2 = \beta / \rho_z`, whose left-hand side falls. As for
        `SharedReach`, a few Newton steps from the factor of the last iteration, ``last`` (2, C, P),
        do; it is set to the new one. Where a step leaves the interval in which earlier ones have
        the root, its middle is taken: Newton's own steps could go to and fro at a bend for ever.
        """
        size, threshold, kappa = torch.abs(Z), beta / rho_z, rho_z / rho_a
        bound = torch.add(A, size, alpha=kappa).clamp_min_(0.0)
        s = last[:, :, None]
        low, high = torch.full_like(s, -1.0), torch.full_like(s, 2.0)  # not met yet
        for _ in range(NEWTON_STEPS):
            cut = torch.minimum(size, bound / (s + kappa))
            length = _length(cut)
            bent = cut.mul_(cut < size).square_().sum(dim=-2, keepdim=True) / (s + kappa)
            slope = length + (1.0 - s) * bent / length
            value = (1.0 - s) * length - threshold
            low, high = torch.where(value > 0.0, s, low), torch.where(value < 0.0, s, high)
            s = (s + value / slope).clamp_(0.0, 1.0)
            outside = (low >= 0.0) & (high <= 1.0) & ((s <= low) | (s >= high))
            outside &= torch.abs(value) > ROUNDING * threshold
            s = torch.where(outside, (low + high) / 2.0, s)
        last.copy_(s[:, :, 0])
        cut = torch.minimum(size, bound / (s + kappa))
        point = shrunk(torch.sign(Z) * cut, threshold)
        return point, torch.maximum(torch.abs(point), torch.add(A, size - cut, alpha=kappa))


class _Boxes:
    """The boxes R (m, d) of some rows."""

    def __init__(self, R):
        self.R = R

    def add_to(self, T, A):
        """Add R A to T (m, P), in place, for A (d, P) of one side and output."""
        T.addmm_(self.R, A)

    def adjoint(self, T):
        """Return R'T for T (m, P)."""
        return self.R.T @ T
