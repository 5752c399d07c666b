"""The iteration of `ADMM` on tensors: its copies, their proximal steps and the weights of both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from convexrobust.backends import torch as xp
from convexrobust.duality import Multipliers, repaired
from convexrobust.solvers.admm.cones import ConeCopies
from convexrobust.solvers.admm.fused import fused_iteration
from convexrobust.solvers.admm.gram import Gram
from convexrobust.solvers.admm.kronecker import KroneckerLeastSquares
from convexrobust.solvers.admm.margin_prox import MarginProx
from convexrobust.solvers.admm.reach import BoxReach, SharedReach, shrunk

_RELAXATION = 1.6  # 1.9 takes fewer iterations on some programs, and more on others
_LARGEST_CHANGE = 3.0
# Balanced are the primal error and the dual one times the square of this: below 1, because the
# lower bound needs small dual errors. That of the slopes was chosen on seven programs.
_PRIMAL_SHARE, _PRIMAL_SHARE_OF_SLOPES = 0.5, 0.8


class Blocks(NamedTuple):
    """One array for each copy that is stored: slopes, weights and bounds of the reaches."""

    M: torch.Tensor
    Z: torch.Tensor
    A: torch.Tensor | None = None

    def each(self, function, *others) -> Blocks:
        """Apply a function to each block that is there, and to those of the others."""
        parts = zip(self, *others, strict=True)
        return Blocks._make(None if part[0] is None else function(*part) for part in parts)


class Weights(NamedTuple):
    """The weights of the copies, times the number of rows."""

    slopes: float
    neurons: float
    bounds: float
    preactivations: float
    reaches: float


_FIRST_WEIGHTS = Weights(0.1, 3.0, 16.0, 0.12, 0.5)  # near where they settle on standardised data


class Splitting:
    """The state of the iteration.

    Each block of ``state`` is s = z + u, copy plus scaled multiplier, so that an iteration reads:
    z = prox(s); x = least squares at 2 z - s; s += relaxation * (x - z). The copies of the cone
    rows do the same in `ConeCopies`.
    """

    def __init__(self, program, like, start):
        self.program, n = program, len(program.X)
        self.X = xp.constant(program.sets.center, like)
        directions = xp.constant(program.margin_map.directions, like)
        D = xp.constant(program.D, like)
        gram = Gram.of(self.X)
        self.least_squares = KroneckerLeastSquares(gram, D, directions)
        self.prox = MarginProx(program, like)
        self.reach = _reach_of(program.sets, like)
        weights = _FIRST_WEIGHTS
        if start is not None and isinstance(start.state, Weights):
            weights = start.state
        m, z, a, *of_cones = (weight / n for weight in weights)
        self.rho = Blocks(m, z, a)
        self.cones = ConeCopies(program, self.X, gram, self.reach, *of_cones)
        U = torch.zeros(2, *program.shape, dtype=like.dtype, device=like.device)
        if start is not None and start.V.shape == program.shape:
            U = xp.constant(np.stack([start.V, start.W]), like)
        self.a = torch.zeros(directions.shape[1], n, dtype=like.dtype, device=like.device)
        self.state = self._copies(U)
        bounds, b = self.state.A, None
        if start is not None and start.multipliers is not None:
            b = self._take_up(repaired(program, start.multipliers))
        self.cones.start(U, bounds, b)
        self.fused = fused_iteration(self)

    def _copies(self, U, A=None) -> Blocks:
        """Return what the blocks are copies of, at weights U (2, C, d, P) and bounds A."""
        M = self.least_squares.slopes(U[0] - U[1])
        if self.reach is None:
            return Blocks(M, U)
        return Blocks(M, U, self.reach.of(U) if A is None else A)

    def _take_up(self, point: Multipliers):
        """Add the scaled multipliers of a dual point to the state; return those of the cone rows.

        Those of the slopes are known, and stationarity in U and A tells the other two.
        """
        program, rho, s = self.program, self.rho, self.state
        self.a = xp.constant(point.margins.T, s.M)
        b = [xp.constant(b, s.M) for b in (*point.cones_v, *point.cones_w)]
        pull = -self.a[:, :, None] * self.X
        for e, (shared, sign) in enumerate(_shared_slopes(program)):
            if shared in point.slopes:
                share = sign / program.margin_map.slope_of.count(shared)
                pull[e] += share * xp.constant(point.slopes[shared], s.M)
        pulled, reached = self.cones.pull(b, s.Z, s.A)
        towards = self.least_squares.slopes_adjoint(pull)
        M, Z = s.M + pull / rho.M, s.Z - (torch.stack([towards, -towards]) - pulled) / rho.Z
        self.state = Blocks(M, Z, None if reached is None else s.A - reached / rho.A)
        return b

    def advance(self, n_steps):
        """Take steps of the iteration."""
        if self.fused is not None:
            self.fused.advance(self, n_steps, _RELAXATION)
            return
        for _ in range(n_steps):
            self.iterate()

    def iterate(self):
        """Take one step, on tensors."""
        s, rho = self.state, self.rho
        self.a, M = self.prox(s.M, rho.M, self.a, self.cones.charge)
        self.cones.settle(self.a)
        self.z = Blocks(M, *self._shrunk(s))
        self.x = self._linear(s.each(lambda s, z: torch.lerp(s, z, 2.0), self.z))
        s.each(
            lambda s, x, z: s.add_(x, alpha=_RELAXATION).sub_(z, alpha=_RELAXATION), self.x, self.z
        )
        self.cones.move(self.x.Z, self.x.A, _RELAXATION)

    def _shrunk(self, s):
        beta, rho = self.program.regularizer.beta, self.rho
        if self.reach is None:
            return (shrunk(s.Z, beta / rho.Z),)
        return self.reach.prox(s.Z, rho.Z, s.A, rho.A, beta)

    def _linear(self, target):
        rho, (XH, RT) = self.rho, self.cones.targets(self.z.Z, self.z.A)
        weights = (rho.M, self.cones.rho, rho.Z)
        U = self.least_squares.solve(weights, target.M, XH, target.Z)
        if self.reach is None:
            return self._copies(U)
        return self._copies(U, self.reach.solve(self.cones.rho_reach, RT, rho.A, target.A))

    def balance(self):
        """Take two steps, then move each weight towards equal relative primal and dual errors."""
        old_copies = self._copies_of_step()
        old = self.z.each(torch.clone)
        copies = self._copies_of_step()
        shares = Blocks(_PRIMAL_SHARE_OF_SLOPES, _PRIMAL_SHARE, _PRIMAL_SHARE)
        factors = self.state.each(_factor_of_block, self.x, self.z, old, shares)
        of_cones = _factor(*self.cones.imbalance(self.x.Z, self.x.A, copies, old_copies))
        self.rho = Blocks(
            *(r if f is None else r * f for r, f in zip(self.rho, factors, strict=True))
        )
        # What is kept is the multiplier, so that its scaled form changes.
        self.state = self.state.each(
            lambda s, x, z, f: s + (1.0 / f - 1.0) * _dual(s, x, z), self.x, self.z, factors
        )
        self.cones.rescale(of_cones, self.x.Z, self.x.A)

    def _copies_of_step(self):
        """Take a step; return the copies of the cone rows that its proximal step found."""
        gaps = self.cones.gaps.clone()
        self.advance(1)
        return self.cones.copies(gaps)

    def weights(self) -> Weights:
        """Return the weights, for a warm start."""
        n = len(self.X)
        return Weights(*(n * w for w in (*self.rho, self.cones.rho, self.cones.rho_reach)))

    def point(self):
        """Return V and W of the copy that the group norm acts on: it has exact zeros."""
        V, W = self.z.Z.double().cpu().numpy().copy()
        return V, W

    def multipliers(self) -> Multipliers:
        """Return the dual point that the proximal steps found."""
        slopes: dict[int, np.ndarray] = {}
        if self.reach is not None:
            # The multipliers of M are those of the perturbation less a times the data.
            u = _dual(self.state.M, self.x.M, self.z.M)
            worst = torch.addcmul(self.rho.M * u, self.a[:, :, None], self.X)
            perturbation = worst.double().cpu().numpy()
            for (shared, sign), P in zip(_shared_slopes(self.program), perturbation, strict=True):
                slopes[shared] = slopes.get(shared, 0.0) + sign * P
        margins = self.a.double().cpu().numpy().T.copy()
        return Multipliers(margins, slopes, self.cones.multipliers(0), self.cones.multipliers(1))


def _shared_slopes(program):
    """Return for each margin the margin whose slope it shares, and with which sign."""
    T, shared = program.margin_map.directions, program.margin_map.slope_of
    return [(s, 1.0 if np.array_equal(T[:, e], T[:, s]) else -1.0) for e, s in enumerate(shared)]


def _reach_of(sets, like):
    if sets.unperturbed:
        return None
    return SharedReach(sets, like) if sets.one_shape else BoxReach(sets, like)


def _dual(s, x, z):
    """Return the scaled multiplier u of the last step from the state after it."""
    return s - _RELAXATION * (x - z) - z


def _factor_of_block(s, x, z, old, share):
    norm, tiny = torch.linalg.vector_norm, torch.finfo(z.dtype).tiny
    primal = norm(x - z) / torch.maximum(norm(x), norm(z)).clamp_min(tiny)
    dual = norm(z - old) / norm(_dual(s, x, z)).clamp_min(tiny)
    return _factor(float(primal), float(dual), share)


def _factor(primal, dual, share=_PRIMAL_SHARE) -> float:
    """Return the factor for a weight: the root of primal by dual error, both relative."""
    tiny = float(np.finfo(np.float32).tiny)
    factor = share * np.sqrt(max(primal, tiny) / max(dual, tiny))
    return float(np.clip(factor, 1.0 / _LARGEST_CHANGE, _LARGEST_CHANGE))
