r"""The copies of the pre-activations and reaches, on which the cone rows or slacks act.

In ADMM every cone row, :math:`\rho_k(u_i) - S_{ki} x_k'u_i \le s_{ki}`, has a copy h of its
pre-activation and t of its reach. The proximal step sees the two only as the gap t - S h, and least
squares in U sees them only as X'H and R'T. So the copies themselves are never stored: the state is
the gap g of each row, with multiplier b, and the two products, which obey recursions of their own:

.. math::

    g \leftarrow (1 - \alpha) g + \alpha (\text{gap at } U) + \alpha \kappa b, \qquad
    X'H \leftarrow (1 - \alpha) X'H + \alpha X'X U - \alpha X'(S \circ b) / \rho_h,

with :math:`\kappa = 1 / \rho_h + 1 / \rho_t`. Rows that no margin can see have b = 0 and no gap;
they stay in X'X, as if held in place, so that least squares is the same for all neurons.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from convexrobust.backends import torch as xp

_LARGEST_RATIO = 100.0  # of the weights of reaches and pre-activations


class _Rows(NamedTuple):
    """The cone rows of the neurons of one side and output."""

    side: int
    output: int
    rows: torch.Tensor
    X: torch.Tensor
    opposite: torch.Tensor  # -S
    margin: torch.Tensor  # number of the margin that alone pays for the slack
    shared: bool  # all margins pay for it


class Charge(NamedTuple):
    """What slacks cost the margins, and minus the slope of that in the multipliers.

    ``own`` and ``own_slope`` are (E, n); ``shared`` and ``shared_slope`` (n,) are paid by all
    margins of a sample and depend on the sum of their multipliers; None with one output.
    """

    own: torch.Tensor
    own_slope: torch.Tensor
    shared: torch.Tensor | None = None
    shared_slope: torch.Tensor | None = None


class ConeCopies:
    """The cone rows of a program in ADMM.

    Parameters
    ----------
    program : ConvexProgram
        Data, patterns, formulation.
    X : Tensor of shape (n, d)
        Centres of the perturbation sets.
    reach : SharedReach or BoxReach, optional
        The reaches; None without perturbations.
    rho, rho_reach : float
        First weights of the pre-activations and of the reaches.
    """

    def __init__(self, program, X, reach, rho, rho_reach):
        self.reach, self.soft = reach, program.formulation == "soft"
        self.rho, self.rho_reach = rho, rho_reach
        self.X, self.gram = X, X.T @ X
        self.n_margins = program.margin_map.offsets.shape[1]
        self.blocks = _blocks(program, X)
        self.b = [torch.zeros_like(block.opposite) for block in self.blocks]
        self.buffers = [torch.empty_like(block.opposite) for block in self.blocks]

    @property
    def kappa(self) -> float:
        """Slack that is left for each unit by which a multiplier is capped."""
        return 1.0 / self.rho + (0.0 if self.reach is None else 1.0 / self.rho_reach)

    def start(self, U, A, b=None):
        """Set the state to that of weights U (2, C, d, P), bounds A and multipliers b."""
        if b is not None:
            self.b = b
        gaps = self._gaps(U, A)
        self.gaps = [gap + self.kappa * b for gap, b in zip(gaps, self.b, strict=True)]
        pulled, reached = self.products(self.b, U, A)
        self.XH = self.gram @ U - pulled / self.rho
        self.RT = None if A is None else self.reach.gram(A) + reached / self.rho_reach
        self.old_copies = None

    def _gaps(self, U, A, measure=False):
        """Return R A - S (X U) at the rows of each block, in the buffers."""
        self.sizes = [0.0, 0.0]
        for block, gap in zip(self.blocks, self.buffers, strict=True):
            torch.mm(block.X, U[block.side, block.output], out=gap).mul_(block.opposite)
            if A is not None:
                reach = self.reach.at(A[block.side, block.output], block.rows)
                if measure:
                    self.sizes[0] += _norm([gap])
                    self.sizes[1] += _norm([reach.expand_as(gap)])
                gap += reach
        return self.buffers

    def products(self, b, U, A):
        """Return X'(S b) and R'b, of the shapes of U (2, C, d, P) and A; None without reaches."""
        pulled, reached = torch.zeros_like(U), None if A is None else torch.zeros_like(A)
        for block, part, buffer in zip(self.blocks, b, self.buffers, strict=True):
            signed = torch.mul(block.opposite, part, out=buffer)
            pulled[block.side, block.output] = -(block.X.T @ signed)
            if reached is not None:
                reached[block.side, block.output] = self.reach.adjoint(part, block.rows)
        return pulled, reached

    # ---------------------------------------------------------------- one iteration

    def charge(self, a) -> Charge | None:
        """Return what the slacks cost at multipliers a (E, n); None for cone constraints."""
        if not self.soft:
            return None
        own, slope = torch.zeros_like(a), torch.zeros_like(a)
        shared, shared_slope = torch.zeros_like(a[0]), torch.zeros_like(a[0])
        for block, gap, buffer in zip(self.blocks, self.gaps, self.buffers, strict=True):
            excess = torch.sub(gap, self._cap(block, a), alpha=self.kappa, out=buffer)
            value = excess.clamp_min_(0.0).sum(dim=1)
            steepness = self.kappa * excess.sign_().sum(dim=1)
            if block.shared:
                shared[block.rows], shared_slope[block.rows] = value, steepness
            else:
                own[block.margin, block.rows] = value
                slope[block.margin, block.rows] = steepness
        if not any(block.shared for block in self.blocks):
            return Charge(own, slope)
        return Charge(own, slope, shared, shared_slope)

    def _cap(self, block, a):
        """Return the multipliers (len(rows), 1) that cap those of slacks."""
        cap = a.sum(dim=0)[block.rows] if block.shared else a[block.margin, block.rows]
        return cap[:, None]

    def settle(self, a):
        """Set the multipliers b for those of the margins, a (E, n)."""
        for block, gap, b in zip(self.blocks, self.gaps, self.b, strict=True):
            torch.mul(gap, 1.0 / self.kappa, out=b).clamp_min_(0.0)
            if self.soft:
                torch.minimum(b, self._cap(block, a), out=b)

    def targets(self, U, A):
        """Return X'(2 h - s) and R'(2 t - s), s the state of the copies h and t."""
        self.pulled, self.reached = self.products(self.b, U, A)
        XH = torch.add(self.XH, self.pulled, alpha=2.0 / self.rho)
        if self.reach is None:
            return XH, None
        return XH, torch.sub(self.RT, self.reached, alpha=2.0 / self.rho_reach)

    def move(self, U, A, relaxation, measure=False):
        """Move the state towards the new weights; with ``measure`` return the imbalance."""
        gaps = self._gaps(U, A, measure)
        imbalance = self._imbalance(gaps) if measure else None
        for state, gap, b in zip(self.gaps, gaps, self.b, strict=True):
            state.lerp_(gap.add_(b, alpha=self.kappa), relaxation)
        self.XH.lerp_(torch.sub(self.gram @ U, self.pulled, alpha=1.0 / self.rho), relaxation)
        if self.reach is not None:
            reached = torch.add(self.reach.gram(A), self.reached, alpha=1.0 / self.rho_reach)
            self.RT.lerp_(reached, relaxation)
        return imbalance

    def _imbalance(self, gaps):
        """Return relative primal and dual errors; the latter needs the copies of the last time."""
        copies = [g - self.kappa * b for g, b in zip(self.gaps, self.b, strict=True)]
        old, self.old_copies = self.old_copies, copies
        if old is None:
            return None
        apart = _norm([x - z for x, z in zip(gaps, copies, strict=True)])
        moved = _norm([z - o for z, o in zip(copies, old, strict=True)])
        primal = apart / max(_norm(gaps), _norm(copies), _TINY)
        return primal, moved / max(self.kappa * _norm(self.b), _TINY)

    def rescale(self, factor):
        """Multiply the weights by a factor, keeping copies and multipliers.

        The scaled multipliers of reaches and pre-activations, b divided by their weights, are to be
        in proportion to what they are multipliers of.
        """
        before = self.kappa, 1.0 / self.rho, 1.0 / self.rho_reach
        product = self.rho * self.rho_reach * factor**2
        ratio = 1.0
        if min(self.sizes) > 0.0:
            ratio = np.clip(self.sizes[0] / self.sizes[1], 1.0 / _LARGEST_RATIO, _LARGEST_RATIO)
        self.rho, self.rho_reach = float(np.sqrt(product / ratio)), float(np.sqrt(product * ratio))
        for gap, b in zip(self.gaps, self.b, strict=True):
            gap.add_(b, alpha=self.kappa - before[0])
        self.XH = self.XH - (1.0 / self.rho - before[1]) * self.pulled
        if self.reach is not None:
            self.RT = self.RT + (1.0 / self.rho_reach - before[2]) * self.reached
        self.old_copies = None

    def multipliers(self, side):
        """Return the multipliers of one side (0: V, 1: W) as NumPy arrays, one for each output."""
        found = {
            block.output: b.double().cpu().numpy().copy()  # b changes in place
            for block, b in zip(self.blocks, self.b, strict=True)
            if block.side == side
        }
        return [found[c] for c in sorted(found)]


_TINY = np.finfo(np.float32).tiny


def _norm(arrays) -> float:
    return float(sum(torch.sum(A * A) for A in arrays)) ** 0.5


def _blocks(program, X):
    """Return the cone rows of every side and output."""
    directions, n = program.margin_map.directions, len(program.X)
    opposite = 1.0 - 2.0 * xp.constant(program.D, X)
    blocks = []
    for side, all_rows in enumerate((program.rows_v, program.rows_w)):
        for c, r in enumerate(all_rows):
            pays = (directions[r, :, c] < 0) if side == 0 else (directions[r, :, c] > 0)
            margin = torch.as_tensor(pays.argmax(axis=1), device=X.device)
            rows, shared = torch.as_tensor(r, device=X.device), side == 1 and program.n_outputs > 1
            data = (X, opposite) if len(r) == n else (X[rows], opposite[rows])
            blocks.append(_Rows(side, c, rows, *data, margin, shared))
    return blocks
