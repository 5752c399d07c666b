r"""The splitting of `ADMM`: its state, from a start, the weights of its copies, and what it finds.

Each part of the program that couples variables gets a copy of what it sees, and is solved exactly:

* the slopes of the margins, :math:`M_e = \sum_c T_{ec} \circ D (V_c - W_c)'` (n x d), on which the
  loss and the perturbations of the slope act, sample by sample (`margin_prox`, with `balance`);
* the pre-activations :math:`H = X U` and the reaches :math:`T_{ki} = \rho_k(u_i)` (n x P), on which
  the cone rows or slacks act (`cones`);
* the weights U themselves, with the group norm and the epigraph of :math:`\rho` (`reach`).

What remains for U is least squares (`kronecker`, with `gram`).
"""

from __future__ import annotations

import numpy as np
import torch

from convexrobust.backends import torch as xp
from convexrobust.duality import Multipliers, repaired
from convexrobust.solvers.admm.cones import ConeRows
from convexrobust.solvers.admm.fused import fused_iteration
from convexrobust.solvers.admm.gram import Gram
from convexrobust.solvers.admm.iteration import Parts, TensorIteration
from convexrobust.solvers.admm.kronecker import KroneckerLeastSquares
from convexrobust.solvers.admm.margin_prox import MarginProx
from convexrobust.solvers.admm.reach import BoxReach, SharedReach
from convexrobust.solvers.admm.state import Blocks, Found, State, Weights, dual

_LARGEST_CHANGE = 3.0
# Balanced are the primal error and the dual one times the square of this: below 1, because the
# lower bound needs small dual errors. That of the slopes was chosen on seven programs.
_PRIMAL_SHARE, _PRIMAL_SHARE_OF_SLOPES = 0.5, 0.8

_FIRST_WEIGHTS = Weights(0.1, 3.0, 16.0, 0.12, 0.5)  # near where they settle on standardised data


class Splitting:
    """A program in parts, the state of its iteration, and the weights.

    Parameters
    ----------
    program : ConvexProgram
        The program.
    like : Tensor
        Dtype and device to compute in.
    start : Solution, optional
        Weights V and W, multipliers and `weights` to start at, as far as it has them.
    fused : bool
        Whether the iteration is compiled where that pays, see `fused`.

    Attributes
    ----------
    parts : Parts
        The parts of the program.
    rho : Weights
        Changed by `balance`.
    state : State
        Moved in place by the iteration.
    found : Found
        What the last iteration found; at first the start.
    iteration : FusedIteration or TensorIteration
        Takes the steps.
    """

    def __init__(self, program, like, start=None, *, fused=True):
        self.parts = _parts_of(program, like)
        weights = _FIRST_WEIGHTS
        if start is not None and isinstance(start.state, Weights):
            weights = start.state
        self.rho = Weights(*(weight / len(program.X) for weight in weights))
        state, self.found = _start(self.parts, self.rho, start)
        compiled = fused_iteration(self.parts, state.s) if fused else None
        self.iteration = compiled or TensorIteration(self.parts)
        self.state = state.contiguous() if compiled else state

    def advance(self, n_steps):
        """Take steps of the iteration."""
        self.found = self.iteration.advance(self.state, self.rho, n_steps)

    def balance(self):
        """Take two steps, then move each weight towards equal relative primal and dual errors."""
        state, cones, kappa = self.state, self.parts.cones, self.parts.cones.kappa(self.rho)
        old_gaps = self._gaps_of_step(kappa)
        old = self.found.z.each(torch.clone)
        gaps = self._gaps_of_step(kappa)
        found, before = self.found, self.rho
        shares = Blocks(_PRIMAL_SHARE_OF_SLOPES, _PRIMAL_SHARE, _PRIMAL_SHARE)
        factors = state.s.each(_factor_of_block, found.x, found.z, old, shares)
        of_cones = _factor(*cones.imbalance(found.x, state.b, kappa, gaps, old_gaps))
        of_blocks = (r if f is None else r * f for r, f in zip(before[:3], factors, strict=True))
        self.rho = cones.rebalanced(Weights(*of_blocks, *before[3:]), of_cones, found.x)
        # What is kept is the multiplier, so that its scaled form changes.
        state.s.each(
            lambda s, x, z, f: s.add_((1.0 / f - 1.0) * dual(s, x, z)), found.x, found.z, factors
        )
        cones.rescale(state, found, before, self.rho)

    def _gaps_of_step(self, kappa):
        """Take a step; return the copies of the gaps that its proximal step found."""
        gaps = self.state.gaps.clone()
        self.advance(1)
        return gaps - kappa * self.state.b

    def weights(self) -> Weights:
        """Return the weights, for a warm start."""
        return Weights(*(len(self.parts.X) * weight for weight in self.rho))

    def point(self):
        """Return V and W of the copy that the group norm acts on: it has exact zeros."""
        V, W = self.found.z.Z.double().cpu().numpy().copy()
        return V, W

    def multipliers(self) -> Multipliers:
        """Return the dual point that the proximal steps found."""
        parts, (s, a, _, b, *_), found = self.parts, self.state, self.found
        slopes: dict[int, np.ndarray] = {}
        if parts.reach is not None:
            # The multipliers of M are those of the perturbation less a times the data.
            u = dual(s.M, found.x.M, found.z.M)
            worst = torch.addcmul(self.rho.slopes * u, a[:, :, None], parts.X)
            perturbation = worst.double().cpu().numpy()
            for (shared, sign), P in zip(_shared_slopes(parts.program), perturbation, strict=True):
                slopes[shared] = slopes.get(shared, 0.0) + sign * P
        margins = a.double().cpu().numpy().T.copy()
        return Multipliers(
            margins, slopes, parts.cones.multipliers(b, 0), parts.cones.multipliers(b, 1)
        )


def _parts_of(program, like) -> Parts:
    X = xp.constant(program.sets.center, like)
    gram, reach = Gram.of(X), _reach_of(program.sets, like)
    D, directions = (xp.constant(A, like) for A in (program.D, program.margin_map.directions))
    least_squares = KroneckerLeastSquares(gram, D, directions)
    cones = ConeRows(program, X, gram, reach)
    return Parts(program, X, least_squares, MarginProx(program, like), cones, reach)


def _reach_of(sets, like):
    if sets.unperturbed:
        return None
    return SharedReach(sets, like) if sets.one_shape else BoxReach(sets, like)


def _start(parts, rho, start) -> tuple[State, Found]:
    """Return the state at the copies of a start, with its multipliers; z = x are the copies."""
    program, X, cones = parts.program, parts.X, parts.cones
    U = X.new_zeros(2, *program.shape)
    if start is not None and start.V.shape == program.shape:
        U = xp.constant(np.stack([start.V, start.W]), X)
    copies = parts.copies(U)
    point, a, b = None, X.new_zeros(len(copies.M), len(X)), torch.zeros_like(cones.opposite)
    if start is not None and start.multipliers is not None:
        point = repaired(program, start.multipliers)
        a = xp.constant(point.margins.T, X)
        b = torch.cat([xp.constant(part, X) for part in (*point.cones_v, *point.cones_w)])
    pulled, reached = cones.adjoint(b, copies.Z, copies.A)
    found = Found(copies, copies, pulled, reached)
    s = copies if point is None else copies.each(torch.add, _scaled(parts, rho, point, found))
    gaps, XH, RT = cones.start(U, copies.A, b, pulled, reached, rho)
    last = torch.zeros_like(copies.Z[:, :, 0])
    return State(s, a, gaps, b, XH, RT, last), found


def _scaled(parts, rho, point, found) -> Blocks:
    """Return the scaled multipliers u of a dual point.

    Those of the slopes are known, and stationarity in U and A tells the other two.
    """
    X, margin_map = parts.X, parts.program.margin_map
    pull = -xp.constant(point.margins.T, X)[:, :, None] * X
    for e, (shared, sign) in enumerate(_shared_slopes(parts.program)):
        if shared in point.slopes:
            share = sign / margin_map.slope_of.count(shared)
            pull[e] += share * xp.constant(point.slopes[shared], X)
    towards = parts.least_squares.slopes_adjoint(pull)
    of_weights = (found.pulled - torch.stack([towards, -towards])) / rho.neurons
    of_bounds = None if found.reached is None else -found.reached / rho.bounds
    return Blocks(pull / rho.slopes, of_weights, of_bounds)


def _shared_slopes(program):
    """Return for each margin the margin whose slope it shares, and with which sign."""
    T, shared = program.margin_map.directions, program.margin_map.slope_of
    return [(s, 1.0 if np.array_equal(T[:, e], T[:, s]) else -1.0) for e, s in enumerate(shared)]


def _factor_of_block(s, x, z, old, share):
    norm, tiny = torch.linalg.vector_norm, torch.finfo(z.dtype).tiny
    primal = norm(x - z) / torch.maximum(norm(x), norm(z)).clamp_min(tiny)
    dual_error = norm(z - old) / norm(dual(s, x, z)).clamp_min(tiny)
    return _factor(float(primal), float(dual_error), share)


def _factor(primal, dual, share=_PRIMAL_SHARE) -> float:
    """Return the factor for a weight: the root of primal by dual error, both relative."""
    tiny = float(np.finfo(np.float32).tiny)
    factor = share * np.sqrt(max(primal, tiny) / max(dual, tiny))
    return float(np.clip(factor, 1.0 / _LARGEST_CHANGE, _LARGEST_CHANGE))
