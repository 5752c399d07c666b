"""The mean loss, its kinks rounded by a softmax that can be made sharper."""

from __future__ import annotations

from typing import NamedTuple

import torch

from convexrobust.backends import torch as torch_backend
from convexrobust.losses import LossKind
from convexrobust.program import ConvexProgram

_SHARPER = 2.0  # the factor by which kinks become sharper at a time


class _Pieces(NamedTuple):
    """A loss of the largest t of the pieces shift - m_e, and 0 if ``zero``.

    Its slope is t / steepness, ``largest`` at most; ``largest`` everywhere if steepness is 0.
    """

    shift: float
    zero: bool
    steepness: float
    largest: float

    def slope(self, t):
        """Return the derivative at t >= 0."""
        if self.steepness == 0.0:
            return torch.full_like(t, self.largest)
        return (t / self.steepness).clamp_max(self.largest)

    def value(self, t):
        """Return the loss at t >= 0."""
        slope = self.slope(t)
        return slope * (t - slope * self.steepness / 2.0)

    def bend(self, t):
        """Return the second derivative at t >= 0."""
        if self.steepness == 0.0:
            return torch.zeros_like(t)
        inside = (t > 0.0) & (t < self.steepness * self.largest)
        return inside.to(t.dtype) / self.steepness


def _pieces(loss) -> _Pieces:
    """Return how a loss is made of its margins."""
    if loss.kind == LossKind.LOGISTIC:
        return _Pieces(0.0, True, 0.0, 1.0)  # whose largest t is a soft one
    # One of two opposite residuals is at least 0, so that no third piece is needed to be so.
    zero = loss.task == "classification" or loss.threshold < 0.0
    return _Pieces(loss.threshold, zero, loss.steepness, loss.largest_multiplier)


class SmoothLoss:
    """The mean loss of the outputs (n, C) in float64, its kinks rounded by a softmax where needed.

    The largest t of the pieces becomes softness * log(sum_e exp(t_e / softness)). The shares of the
    pieces in it are multipliers that the dual allows, at every softness: all bounds stay valid.
    """

    def __init__(self, program: ConvexProgram, device):
        self.program = program
        self.pieces = _pieces(program.loss)
        self.directions = torch.tensor(program.margin_map.directions, device=device)
        self.offsets = torch.tensor(program.margin_map.offsets, device=device)
        self.weight = torch.tensor(program.weight, device=device)
        logistic = program.loss.kind == LossKind.LOGISTIC
        smooth = self.pieces.steepness > 0.0 and program.n_outputs == 1
        self.exact = logistic or smooth  # so that nothing is rounded
        self.softness = 1.0 if logistic else (0.0 if smooth else 0.3)

    def value(self, F):
        """Return the rounded mean loss."""
        top, _ = self._top(F)
        return float(self.weight @ self.pieces.value(top))

    def true_value(self, F):
        """Return the mean loss itself."""
        return float(self.weight @ self.program.loss.value(torch_backend, self._margins(F)))

    def derivative(self, F):
        """Return the multipliers of the margins (n, E) and the derivative in F (n, C)."""
        top, share = self._top(F)
        multipliers = (self.weight * self.pieces.slope(top))[:, None] * share[
            :, : self.offsets.shape[1]
        ]
        return multipliers, -torch.einsum("ke,kec->kc", multipliers, self.directions)

    def curvature(self, F):
        """Return the second derivative in the outputs of each sample, (n, C, C)."""
        top, share = self._top(F)
        T, share = self.directions, share[:, : self.offsets.shape[1]]
        mean = torch.einsum("ke,kec->kc", share, T)
        square = mean[:, :, None] * mean[:, None, :]
        bend = self.pieces.bend(top)[:, None, None] * square
        if self.softness > 0.0:
            spread = torch.einsum("ke,kec,keb->kcb", share, T, T) - square
            bend = bend + (self.pieces.slope(top) / self.softness)[:, None, None] * spread
        return self.weight[:, None, None] * bend

    def rounding(self, F):
        """Return how far the rounding raises the loss, and how far its bound is below its own.

        The latter is softness * slope times the entropy of the shares: the conjugate of the rounded
        loss has it, which the valid bound does without.
        """
        top, share = self._top(F)
        entropy = -(share * share.clamp_min(1e-300).log()).sum(dim=1)
        lowered = self.softness * float((self.weight * self.pieces.slope(top)) @ entropy)
        return self.value(F) - self.true_value(F), lowered

    def sharpen(self):
        """Make the kinks of a loss that has kinks sharper."""
        if not self.exact:
            self.softness /= _SHARPER

    def carried(self, F):
        """Return outputs whose derivative is that of F before the kinks became sharper.

        Where the pieces are so much closer, the sharper softmax takes the same shares of them.
        """
        if self.exact:
            return F
        pieces = self.pieces.shift - self._margins(F)
        if self.program.loss.task == "regression":  # one output, two pieces: the upper one counts
            square = torch.square(self.directions[:, :, 0])
            pieces = pieces * (pieces == pieces.amax(dim=1, keepdim=True))
            pieces = pieces * (square.sum(dim=1, keepdim=True) / square)
        inverse = torch.linalg.pinv(self.directions)  # from margins to outputs
        return F + (1.0 - 1.0 / _SHARPER) * torch.einsum("kce,ke->kc", inverse, pieces)

    def moved(self, f, step):
        """Return outputs from f towards f + step, where no share grows exponentially.

        A full step across a sharp kink would: the share saturates, the curvature is lost, and
        Newton's method with it. So the largest growth g of a sample is taken down to log(1 + g).
        """
        if self.exact:
            return f + step
        _, share = self._top(f)
        climb = -torch.einsum("kec,kc->ke", self.directions, step)
        if self.pieces.zero:
            climb = torch.nn.functional.pad(climb, (0, 1))
        growth = (climb - (share * climb).sum(dim=1, keepdim=True)) / self.softness
        largest = growth.amax(dim=1, keepdim=True).clamp_min(1e-12)
        return f + step * largest.log1p() / largest

    def _margins(self, F):
        return torch.einsum("kec,kc->ke", self.directions, F) + self.offsets

    def _top(self, F):
        """Return the (soft) largest piece (n,) and the share of each piece in it."""
        pieces = self.pieces.shift - self._margins(F)
        if self.pieces.zero:
            pieces = torch.nn.functional.pad(pieces, (0, 1))
        if self.softness == 0.0:
            top, index = pieces.max(dim=1)
            return top, torch.nn.functional.one_hot(index, pieces.shape[1]).to(pieces.dtype)
        scaled = pieces / self.softness
        top = self.softness * torch.logsumexp(scaled, dim=1)
        return top, torch.softmax(scaled, dim=1)
