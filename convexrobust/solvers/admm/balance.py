r"""Multipliers in balance with the loss, where the margins depend on them linearly.

Solves :math:`a \in -\omega\, \partial \varphi(m)`, a >= 0, for all samples at once, with

.. math:: m_e = c_e + g_e a_e + (k_0 + k_1 A), \qquad A = \sum_e a_e,

g > 0 and :math:`k_1 \ge 0`. For a loss of the smallest margin only the smallest margins have
multipliers, so that all of these lie on one level, found by sorting. The margins of the copies of
one sample count as margins of that sample.
"""

from __future__ import annotations

import numpy as np
import torch

from convexrobust.backends import torch as xp
from convexrobust.losses import LossKind

_BISECTIONS, _NEWTON_STEPS = 40, 40  # at most


class Balance:
    """The solver of the balance for the samples of one program.

    Parameters
    ----------
    program : ConvexProgram
        Its loss, weights and copies.
    like : Tensor
        Dtype and device to compute in.

    Attributes
    ----------
    samples : Tensor of shape (n_samples, K), optional
        The rows of each sample's copies.
    """

    def __init__(self, program, like):
        self.loss = program.loss
        self.weight = xp.constant(program.weight, like)
        bound = program.loss.largest_multiplier
        self.cap = (bound if np.isfinite(bound) else 1e6) * self.weight
        self.logistic = program.loss.kind == LossKind.LOGISTIC
        steepness = 0.0 if self.logistic else program.loss.steepness
        # Samples of weight 0 have a cap of 0, whatever the fall; it only has to be a number.
        self.fall = steepness / torch.where(self.weight > 0.0, self.weight, 1.0)
        self.samples = self.repeated = None
        if program.copy_of is not None:
            self.samples, self.repeated = _groups(program, like)

    def __call__(self, constant, slope, shared=None):
        """Return a (E, n) for c and g of shape (E, n); shared is (k_0, k_1) of shape (n,)."""
        if self.samples is not None:
            return self._grouped(constant, slope)
        if shared is None:
            zero = torch.zeros_like(constant[0])
            shared = (zero, zero)
        return self._solve(constant, slope, *shared)

    def _grouped(self, constant, slope):
        n_margins, n = constant.shape
        repeated = self.repeated.T.expand(n_margins, *self.repeated.T.shape).flatten(0, 1)

        def gathered(values, filler):
            values = values[:, self.samples.T].flatten(0, 1)
            return torch.where(repeated, filler, values)

        zero = torch.zeros_like(self.weight)
        a = self._solve(gathered(constant, torch.inf), gathered(slope, 1.0), zero, zero)
        out = torch.zeros(n_margins, n, dtype=a.dtype, device=a.device)
        a = torch.where(repeated, 0.0, a).view(n_margins, *self.samples.T.shape)
        return out.index_add_(1, self.samples.T.flatten(), a.flatten(1))

    def _solve(self, constant, slope, k0, k1):
        if self.logistic:
            solve = self._logistic if len(constant) == 1 else self._softmax
            return solve(constant, slope, k0, k1)
        level = self.loss.threshold - k0
        fall = self.fall + k1
        if len(constant) == 1:
            a = (level - constant) / (slope + fall)
            return torch.minimum(a.clamp_min(0.0), self.cap)
        return self._water_filling(constant, slope, level, fall)

    def _water_filling(self, constant, slope, level, fall):
        """Solve c + g a = level - fall * A where a > 0, for every number of margins at once.

        A single multiplier is found without the level, from which rounding would tell nothing of
        it where the margin is flat.
        """
        order = torch.argsort(constant, dim=0)
        c, g = torch.gather(constant, 0, order), torch.gather(slope, 0, order)
        inverse = torch.where(torch.isinf(c), 0.0, 1.0 / g)
        c = torch.where(torch.isinf(c), torch.finfo(c.dtype).max, c)
        width = torch.cumsum(inverse, dim=0)
        area = torch.cumsum(torch.where(inverse > 0.0, c * inverse, 0.0), dim=0)

        def highest(levels):
            # The level with the j lowest margins active is right for the last j it exceeds c of.
            n_active = torch.sum(levels > c, dim=0).clamp_min(1)
            return torch.gather(levels, 0, n_active[None] - 1)[0]

        found = highest((level + fall * area) / (1.0 + fall * width))
        found = torch.minimum(found, highest((self.cap + area) / width))
        together = torch.minimum(((found - constant) / slope).clamp_min(0.0), self.cap)
        alone = torch.minimum(((level - c[0]) / (g[0] + fall)).clamp_min(0.0), self.cap)
        single = torch.zeros_like(constant).scatter(0, order[:1], alone[None])
        return torch.where(c[0] + g[0] * alone <= c[1], single, together)

    def _logistic(self, constant, slope, k0, k1):
        """One margin m = c + s * sigmoid(-m): convex on one side of 0 and concave on the other.

        Newton's steps from 0 therefore go to the root from one side, wherever it is.
        """
        constant, slope = constant[0] + k0, (slope[0] + k1) * self.weight
        m = torch.zeros_like(constant)
        for _ in range(_NEWTON_STEPS):
            share = torch.sigmoid(-m)
            step = (m - constant - slope * share) / (1.0 + slope * share * (1.0 - share))
            m = m - step
            if torch.abs(step).max() <= 1e-9 * (1.0 + torch.abs(m).max()):
                break
        return (self.weight * torch.sigmoid(-m))[None]

    def _softmax(self, constant, slope, k0, k1):
        r"""Several margins: a_e = weight * exp(t - c_e - g_e a_e), one unknown t a sample.

        It is bisected until 1 - A / weight is the probability of the true class,
        exp(t + k0 + k1 A).
        """
        high = -k0
        low = (
            -k0
            - k1 * self.weight
            - torch.nn.functional.softplus(torch.logsumexp(-constant - k0, dim=0))
        )
        offset = torch.log(slope * self.weight) - constant
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2.0
            total = (_wright(offset + middle) / slope).sum(dim=0)
            excess = total / self.weight + torch.exp(middle + k0 + k1 * total) - 1.0
            low, high = torch.where(excess < 0, middle, low), torch.where(excess < 0, high, middle)
        return _wright(offset + low) / slope


def _groups(program, like):
    """Return the rows of each sample's copies (n_samples, K), and which only repeat another."""
    copies = torch.as_tensor(program.copies, device=like.device)
    repeated = torch.zeros_like(copies, dtype=torch.bool)
    repeated[:, 1:] = copies[:, 1:] == copies[:, :-1]
    return copies, repeated


def _wright(c):
    """Return the y > 0 with y + log(y) = c (Newton's steps are monotone after the first)."""
    y = torch.where(c > 1.0, c - torch.log(c.clamp_min(1.0)), torch.exp(c.clamp_max(1.0)))
    y = y.clamp_min(torch.finfo(c.dtype).tiny)
    for _ in range(4):
        y = y * (1.0 + c - torch.log(y)) / (1.0 + y)
        y = y.clamp_min(torch.finfo(c.dtype).tiny)
    return y
