"""The iteration of `ADMM` on tensors, for any program, device and precision."""

from __future__ import annotations

from typing import NamedTuple

import torch

from convexrobust.program import ConvexProgram
from convexrobust.solvers.admm.cones import ConeRows
from convexrobust.solvers.admm.kronecker import KroneckerLeastSquares
from convexrobust.solvers.admm.margin_prox import MarginProx
from convexrobust.solvers.admm.reach import BoxReach, SharedReach, shrunk
from convexrobust.solvers.admm.state import RELAXATION, Blocks, Found, State, Weights


class Parts(NamedTuple):
    """A program in the parts that are solved exactly, each with its data, which never change.

    Attributes
    ----------
    program : ConvexProgram
        The program.
    X : Tensor of shape (n, d)
        Centres of the perturbation sets.
    least_squares : KroneckerLeastSquares
        All copies, as functions of the weights U.
    prox : MarginProx
        The loss of the worst-case margins.
    cones : ConeRows
        The cone rows or slacks.
    reach : SharedReach or BoxReach, optional
        The reaches with the group norm; None without perturbations.
    """

    program: ConvexProgram
    X: torch.Tensor
    least_squares: KroneckerLeastSquares
    prox: MarginProx
    cones: ConeRows
    reach: SharedReach | BoxReach | None

    def copies(self, U, A=None) -> Blocks:
        """Return what the blocks are copies of, at weights U (2, C, d, P) and bounds A."""
        M = self.least_squares.slopes(U[0] - U[1])
        if self.reach is None:
            return Blocks(M, U)
        return Blocks(M, U, self.reach.of(U) if A is None else A)


class TensorIteration:
    """The iteration on tensors: z = prox(s); x = least squares at 2 z - s; s += 1.6 (x - z).

    Parameters
    ----------
    parts : Parts
        The program.
    """

    def __init__(self, parts: Parts):
        self.parts = parts

    def advance(self, state: State, rho: Weights, n_steps) -> Found:
        """Move the state by at least one step, at weights ``rho``; return what the last found."""
        kappa = self.parts.cones.kappa(rho)
        for _ in range(n_steps - 1):
            self._step(state, rho, kappa)
        return self._step(state, rho, kappa)

    def _step(self, state, rho, kappa):
        s, cones = state.s, self.parts.cones
        a, M = self.parts.prox(
            s.M, rho.slopes, state.a, lambda a: cones.charge(a, state.gaps, kappa)
        )
        state.a.copy_(a)
        cones.settle(a, state.gaps, kappa, state.b)
        z = Blocks(M, *self._proximal_weights(state, rho))
        pulled, reached = cones.adjoint(state.b, z.Z, z.A)
        XH, RT = cones.targets(state, pulled, reached, rho)
        x = self.parts.copies(*self._closest(s.each(_reflected, z), XH, RT, rho))
        s.each(lambda s, x, z: s.add_(x, alpha=RELAXATION).sub_(z, alpha=RELAXATION), x, z)
        found = Found(z, x, pulled, reached)
        cones.move(state, found, rho, RELAXATION)
        return found

    def _proximal_weights(self, state, rho):
        """Return the proximal weights and, with perturbations, bounds."""
        s, beta = state.s, self.parts.program.regularizer.beta
        if self.parts.reach is None:
            return (shrunk(s.Z, beta / rho.neurons),)
        return self.parts.reach.prox(s.Z, rho.neurons, s.A, rho.bounds, beta, state.last)

    def _closest(self, target, XH, RT, rho):
        """Return the weights and bounds (None without perturbations) closest to the targets."""
        weights, reach = (rho.slopes, rho.preactivations, rho.neurons), self.parts.reach
        U = self.parts.least_squares.solve(weights, target.M, XH, target.Z)
        A = None if reach is None else reach.solve(rho.reaches, RT, rho.bounds, target.A)
        return U, A


def _reflected(s, z):
    """Return 2 z - s."""
    return torch.lerp(s, z, 2.0)
