r"""The cone rows or slacks, which act on copies of the pre-activations and reaches.

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
    """The cone rows of the neurons of one side and output, and where they are stacked."""

    side: int
    output: int
    part: slice
    rows: torch.Tensor
    X: torch.Tensor


class Charge(NamedTuple):
    """What slacks cost the margins, and minus the slope of that in the multipliers.

    ``own`` and ``own_slope`` are (E, n); ``shared`` and ``shared_slope`` (n,) are paid by all
    margins of a sample and depend on the sum of their multipliers; None with one output.
    """

    own: torch.Tensor
    own_slope: torch.Tensor
    shared: torch.Tensor | None = None
    shared_slope: torch.Tensor | None = None


class ConeRows:
    """The cone rows of a program, those of all sides and outputs stacked into (m, P).

    Their data never change; the methods take the state, gaps and multipliers b, as `State` has it.

    Parameters
    ----------
    program : ConvexProgram
        Data, patterns, formulation.
    X : Tensor of shape (n, d)
        Centres of the perturbation sets.
    gram : Gram
        X'X.
    reach : SharedReach or BoxReach, optional
        The reaches; None without perturbations.

    Attributes
    ----------
    buffer : Tensor of shape (m, P)
        Room for one array of the rows; every method may overwrite it.
    """

    def __init__(self, program, X, gram, reach=None):
        self.gram, self.reach, self.soft = gram, reach, program.formulation == "soft"
        self.blocks = _blocks(program, X)
        rows = [block.rows for block in self.blocks]
        self.reaches = [] if reach is None else [reach.of_rows(r) for r in rows]
        opposite = 1.0 - 2.0 * xp.constant(program.D, X)
        self.opposite = torch.cat([opposite[r] for r in rows])  # -S
        self.buffer = torch.empty_like(self.opposite)
        of_slacks = self._find_payers(program, X)
        self.own, self.shared, self.payers, self.sharers, self.price = of_slacks

    def _find_payers(self, program, X):
        """Find which multipliers cap those of each slack: of one margin, or all of a sample.

        Slacks of W are shared by all margins where there are several outputs. Returned are the
        slices of own and of shared slacks, the margin of each own one, as its place in a (E, n),
        the sample of each shared one, and how far each (m,) lowers the margins that pay for it.
        """
        n, last = len(X), self.blocks[-1].part.stop
        rows = torch.cat([block.rows for block in self.blocks])
        n_own = last
        if program.n_outputs > 1:
            n_own = next(block.part.start for block in self.blocks if block.side == 1)
        margins, prices = [], []
        for block in self.blocks:
            sign = -1.0 if block.side == 0 else 1.0
            pays = sign * program.margin_map.directions[block.rows.cpu().numpy(), :, block.output]
            margins.append(torch.as_tensor(pays.argmax(axis=1), device=X.device))
            prices.append(xp.constant(pays.max(axis=1), X))
        own, shared = slice(0, n_own), slice(n_own, last)
        payers = (torch.cat(margins) * n + rows)[own]
        return own, shared, payers, rows[shared], torch.cat(prices)

    def kappa(self, rho) -> float:
        """Return the slack that is left for each unit by which a multiplier is capped."""
        return 1.0 / rho.preactivations + (0.0 if self.reach is None else 1.0 / rho.reaches)

    def start(self, U, A, b, pulled, reached, rho):
        """Return gaps, X'H and R'T at weights U (2, C, d, P), bounds A and multipliers b.

        ``pulled`` and ``reached`` are the `adjoint` of b.
        """
        gaps = self._gaps(U, A) + self.kappa(rho) * b
        XH = self.gram.product(U) - pulled / rho.preactivations
        return gaps, XH, None if A is None else self.reach.gram(A) + reached / rho.reaches

    def _gaps(self, U, A):
        """Return R A - S (X U) at all rows, in the buffer."""
        gaps = self.buffer
        for block in self.blocks:
            torch.mm(block.X, U[block.side, block.output], out=gaps[block.part])
        gaps *= self.opposite
        return gaps if A is None else self._with_reaches(gaps, A)

    def _with_reaches(self, gaps, A):
        """Add R A at all rows, in place."""
        for block, reach in zip(self.blocks, self.reaches, strict=True):
            reach.add_to(gaps[block.part], A[block.side, block.output])
        return gaps

    def adjoint(self, b, U, A):
        """Return X'(S b) and R'b, of the shapes of U (2, C, d, P) and A; None without reaches."""
        signed = torch.mul(self.opposite, b, out=self.buffer)
        pulled, reached = torch.empty_like(U), None if A is None else torch.empty_like(A)
        for k, (side, output, part, _, X) in enumerate(self.blocks):
            torch.mm(X.T, signed[part], out=pulled[side, output])
            if reached is not None:
                reached[side, output] = self.reaches[k].adjoint(b[part])
        return pulled.neg_(), reached

    # ---------------------------------------------------------------- one iteration

    def charge(self, a, gaps, kappa) -> Charge | None:
        """Return what the slacks cost at multipliers a (E, n); None for cone constraints."""
        if not self.soft:
            return None
        excess = torch.sub(gaps, self._caps(a), alpha=kappa, out=self.buffer)
        value = self.price * excess.clamp_min_(0.0).sum(dim=1)
        slope = kappa * self.price**2 * excess.sign_().sum(dim=1)
        own = [
            a.new_zeros(a.numel()).index_copy_(0, self.payers, paid[self.own]).view(a.shape)
            for paid in (value, slope)
        ]
        if len(self.sharers) == 0:
            return Charge(*own)
        shared = [
            a.new_zeros(a.shape[1]).index_copy_(0, self.sharers, paid[self.shared])
            for paid in (value, slope)
        ]
        return Charge(*own, *shared)

    def _caps(self, a):
        """Return the multipliers (m, 1) that cap those of the slacks."""
        caps = a.reshape(-1)[self.payers]
        if len(self.sharers) > 0:
            caps = torch.cat([caps, a.sum(dim=0)[self.sharers]])
        return (self.price * caps)[:, None]

    def settle(self, a, gaps, kappa, b):
        """Set the multipliers b for those of the margins, a (E, n)."""
        torch.mul(gaps, 1.0 / kappa, out=b).clamp_min_(0.0)
        if self.soft:
            torch.minimum(b, self._caps(a), out=b)

    def targets(self, state, pulled, reached, rho):
        """Return X'(2 h - s) and R'(2 t - s), s the state of the copies h and t."""
        XH = torch.add(state.XH, pulled, alpha=2.0 / rho.preactivations)
        if self.reach is None:
            return XH, None
        return XH, torch.sub(state.RT, reached, alpha=2.0 / rho.reaches)

    def move(self, state, found, rho, relaxation):
        """Move the state towards the new weights x."""
        U, A = found.x.Z, found.x.A
        gaps = self._gaps(U, A)
        state.gaps.lerp_(gaps.add_(state.b, alpha=self.kappa(rho)), relaxation)
        XH = torch.sub(self.gram.product(U), found.pulled, alpha=1.0 / rho.preactivations)
        state.XH.lerp_(XH, relaxation)
        if self.reach is not None:
            RT = torch.add(self.reach.gram(A), found.reached, alpha=1.0 / rho.reaches)
            state.RT.lerp_(RT, relaxation)

    # ---------------------------------------------------------------- changes of the weights

    def imbalance(self, x, b, kappa, copies, old):
        """Return relative primal and dual errors of a step, given copies of the gaps and old ones.

        The step found weights and bounds in ``x`` and multipliers b.
        """
        gaps = self._gaps(x.Z, x.A)
        primal = _norm(gaps - copies) / max(_norm(gaps), _norm(copies), _TINY)
        return primal, _norm(copies - old) / max(kappa * _norm(b), _TINY)

    def _ratio(self, U, A):
        """Return how large the pre-activations of the cone rows are, relative to the reaches."""
        if A is None:
            return 1.0
        both = self._gaps(U, None).clone(), self._with_reaches(self.buffer.zero_(), A)
        sizes = [sum(_norm(part[block.part]) for block in self.blocks) for part in both]
        if min(sizes) == 0.0:
            return 1.0
        return float(np.clip(sizes[0] / sizes[1], 1.0 / _LARGEST_RATIO, _LARGEST_RATIO))

    def rebalanced(self, rho, factor, x):
        """Return the weights with those of pre-activations and reaches multiplied by a factor.

        Their scaled multipliers, b divided by their weights, are to be in proportion to what they
        are multipliers of: its sizes at weights and bounds ``x``.
        """
        product, ratio = rho.preactivations * rho.reaches * factor**2, self._ratio(x.Z, x.A)
        preactivations, reaches = float(np.sqrt(product / ratio)), float(np.sqrt(product * ratio))
        return rho._replace(preactivations=preactivations, reaches=reaches)

    def rescale(self, state, found, old, new):
        """Move the state from old to new weights, in place, keeping copies and multipliers."""
        state.gaps.add_(state.b, alpha=self.kappa(new) - self.kappa(old))
        of_h = 1.0 / new.preactivations - 1.0 / old.preactivations
        state.XH.sub_(of_h * found.pulled)
        if self.reach is not None:
            state.RT.add_((1.0 / new.reaches - 1.0 / old.reaches) * found.reached)

    def multipliers(self, b, side):
        """Return multipliers b of one side (0: V, 1: W) as NumPy arrays, one for each output."""
        b = b.double().cpu().numpy()
        return [b[block.part].copy() for block in self.blocks if block.side == side]


_TINY = float(np.finfo(np.float32).tiny)


def _norm(A) -> float:
    return float(torch.sum(A * A)) ** 0.5


def _blocks(program, X):
    """Return the cone rows of every side and output: V first, each in the order of the outputs."""
    blocks, start = [], 0
    for side, all_rows in enumerate((program.rows_v, program.rows_w)):
        for output, r in enumerate(all_rows):
            rows = torch.as_tensor(r, device=X.device)
            part, start = slice(start, start + len(r)), start + len(r)
            blocks.append(_Rows(side, output, part, rows, X if len(r) == len(X) else X[rows]))
    return blocks
