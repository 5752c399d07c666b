"""The iteration of `ADMM` on a CPU, its element-wise passes fused and compiled.

On small programs nearly all of an iteration's time is the calling of some 400 operations on
tensors. Here the same iteration is a dozen matrix products and as many compiled kernels, several
times as fast, for l-inf perturbations or none. It acts on arrays in the memory of the `State`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from convexrobust.solvers.admm.fused_reach import fused_reach
from convexrobust.solvers.admm.gram import Gram
from convexrobust.solvers.admm.iteration import Parts
from convexrobust.solvers.admm.margin_prox import SETTLED, SMALLEST
from convexrobust.solvers.admm.state import RELAXATION, Blocks, Found, State, Weights
from convexrobust.solvers.compiled import compiles

_FEW_THREADS = 3  # kernels use one; from here on tensors, with three times the passes, catch up


def fused_iteration(parts: Parts, like: Blocks) -> FusedIteration | None:
    """Return the `FusedIteration` of a program, None where there is none or it does not pay."""
    on_cpu = parts.X.device.type == "cpu" and torch.get_num_threads() <= _FEW_THREADS
    if not (on_cpu and compiles(parts.program)):
        return None
    from convexrobust.solvers.admm import kernels  # imports numba

    return FusedIteration(parts, like, kernels)


class FusedIteration:
    """The iteration of `TensorIteration`, unperturbed or perturbed in boxes.

    The blocks of the state are to be contiguous. Methods take the state ``s`` as `_Arrays` and the
    weights ``w`` as `_Weighted`; what they find goes into the room that is made here, for good.

    Parameters
    ----------
    parts : Parts
        The program. Arrays share its memory where they can.
    like : Blocks
        The shapes to make room for.
    kernels : module
        `convexrobust.solvers.admm.kernels`.
    """

    def __init__(self, parts: Parts, like: Blocks, kernels):
        self.kernels = kernels
        self.problem = _problem_of(parts)
        self.payers = _Payers(parts)
        self.reach = fused_reach(parts, kernels)
        self.shifts = parts.least_squares.shifts
        self.kappa = parts.cones.kappa
        one_margin = len(self.problem.offsets) == self.problem.directions.shape[2] == 1
        self.prox_of_loss = kernels.margin_prox if one_margin else kernels.margins_prox
        reached = None if like.A is None else _empty_like(like.A)
        z, x = (like.each(_empty_like) for _ in range(2))
        self.found = Found(z, x, _empty_like(like.Z), reached)
        self.z, self.x = self._blocks(z), self._blocks(x)
        self.pulled, self.reached = self.found.pulled.numpy(), self._bounds(reached)
        self.room = _room_of(self.problem, parts.cones.buffer.numpy())

    def _blocks(self, blocks):
        """Return blocks as arrays."""
        return Blocks(blocks.M.numpy(), blocks.Z.numpy(), self._bounds(blocks.A))

    def _bounds(self, tensor):
        """Return bounds as an array (2, C, q, P), without rows where there are none."""
        n_outputs, P = self.problem.directions.shape[2], self.problem.D.shape[1]
        if tensor is None:
            return np.empty((2, n_outputs, 0, P), self.problem.X.dtype)
        return tensor.view(2, n_outputs, self.reach.size, P).numpy()

    def advance(self, state: State, rho: Weights, n_steps) -> Found:
        """Move the state by some steps, at weights ``rho``; return what the last found."""
        s, w = self._arrays(state), self._weighted(rho)
        for _ in range(n_steps):
            self._proximal_step(s, w)
            self._move(s, w, *self._linear_step(s, w))
        return self.found

    def _arrays(self, state):
        """Return the state as arrays, in its memory."""
        blocks, (a, gaps, b, XH, last) = (
            self._blocks(state.s),
            (tensor.numpy() for tensor in (state.a, state.gaps, state.b, state.XH, state.last)),
        )
        return _Arrays(*blocks, a, gaps, b, XH, self._bounds(state.RT), last)

    def _weighted(self, rho):
        """Return weights with what is computed from them once for many steps."""
        shifts = self.shifts(rho.slopes, rho.neurons).numpy()
        inverse = self.problem.gram.inverse(rho.preactivations, shifts)
        of_reaches = self.reach.inverse(rho.reaches, rho.bounds)
        return _Weighted(*rho, self.kappa(rho), shifts, inverse, of_reaches)

    # ---------------------------------------------------------------- one iteration

    def _proximal_step(self, s, w):
        """Set the copies z and the multipliers to the proximal point of the state."""
        p, z, payers, reach, scratch = self.problem, self.z, self.payers, self.reach, self.room.rows
        slacks = s.gaps, payers.charged, payers.shared, payers.of_margins
        scales = w.rho_m, w.kappa, SMALLEST * p.unit, SETTLED * p.unit
        self.prox_of_loss(
            s.M, p.X, p.radii, p.offsets, p.directions, p.loss, slacks, scales,
            s.a, z.M, self.room.aim,
        )  # fmt: skip
        self.kernels.settle(s.gaps, payers.cap(s.a), p.opposite, w.kappa, s.b, scratch)
        weights = p.beta, w.rho_z, w.rho_a
        for k, (at, part, X) in enumerate(p.blocks):
            np.matmul(X.T, scratch[part], out=self.pulled[at])
            reach.adjoint(k, s.b[part], self.reached[at])
            reach.prox(s.Z[at], s.A[at], weights, s.last[at], z.Z[at], z.A[at])

    def _linear_step(self, s, w):
        """Set the weights x, and what the outputs' slopes are, to those closest to 2 z - s.

        Returned are X'X and R'R times the new weights and bounds.
        """
        kernels, p, z, x, room = self.kernels, self.problem, self.z, self.x, self.room
        weights = w.rho_h, 2.0, w.rho_z
        kernels.right_side(s.XH, self.pulled, s.Z, z.Z, weights, room.right)
        np.matmul(room.aim.transpose(0, 2, 1), p.D, out=room.of_slopes)
        weight = 2.0 * w.rho_m
        kernels.separate(room.right, room.of_slopes, weight, room.total, room.difference)
        np.matmul(room.difference_2d, p.vectors, out=room.difference_rotated)
        both = p.gram.solve(w.inverse, room.both)
        difference = self._join(both, x.Z)
        np.matmul(p.D, difference.transpose(1, 2, 0), out=room.outputs)
        XH = self._product(both, w)
        weights = w.rho_t, -2.0, w.rho_a
        kernels.right_side(s.RT, self.reached, s.A, z.A, weights, x.A)
        return XH, self.reach.divide(w.inverse_of_reaches, x.A)

    def _join(self, both, out):
        """Set V and W from V + W and V - W rotated; return V - W (d, C, P)."""
        difference = (both[1] @ self.problem.vectors.T).reshape(self.room.difference.shape)
        self.kernels.join(both[0].reshape(difference.shape), difference, out)
        return difference

    def _product(self, both, w):
        """Return X'X times the new weights, from V + W and V - W rotated, which are spent."""
        p, room = self.problem, self.room
        if not p.rotation_is_cheap:
            return p.gram.product(self.x.Z)
        both *= w.shifts  # the equations that were solved say what X'X makes of them
        np.subtract(room.both, both, out=both)
        both /= w.rho_h
        self._join(both, room.XH)
        return room.XH

    def _move(self, s, w, XH, RT):
        """Move the state towards x, for which X'H and R'T are given."""
        kernels, p, z, x, scratch = self.kernels, self.problem, self.z, self.x, self.room.rows
        for k, (at, part, X) in enumerate(p.blocks):
            np.matmul(X, x.Z[at], out=scratch[part])
            rows = s.gaps[part], scratch[part], p.opposite[part]
            reaches = self.reach.at_rows(k, x.A[at])
            kernels.move_gaps(*rows, reaches, s.b[part], w.kappa, RELAXATION)
        kernels.move_product(s.XH, XH, self.pulled, -1.0 / w.rho_h, RELAXATION)
        kernels.move_product(s.RT, RT, self.reached, 1.0 / w.rho_t, RELAXATION)
        kernels.move_slopes(s.M, self.room.outputs, p.directions, z.M, x.M, RELAXATION)
        kernels.relax(s.Z, x.Z, z.Z, RELAXATION)
        kernels.relax(s.A, x.A, z.A, RELAXATION)


# Not NamedTuples, of which an attribute takes 28 ns against 9: 2 % of a small program's time.
@dataclass(frozen=True, slots=True)
class _Arrays:
    """The `State` as arrays; bounds, and R'T, have shape (2, C, q, P), q = 0 without."""

    M: np.ndarray
    Z: np.ndarray
    A: np.ndarray
    a: np.ndarray
    gaps: np.ndarray
    b: np.ndarray
    XH: np.ndarray
    RT: np.ndarray
    last: np.ndarray


@dataclass(frozen=True, slots=True)
class _Weighted:
    """The `Weights`, with what is computed from them."""

    rho_m: float
    rho_z: float
    rho_a: float
    rho_h: float
    rho_t: float
    kappa: float  # see `ConeRows.kappa`
    shifts: np.ndarray  # (2, 1, C P), see `KroneckerLeastSquares.shifts`
    inverse: tuple  # of the normal equations, see `Gram.inverse`
    inverse_of_reaches: Any


@dataclass(frozen=True, slots=True)
class _Problem:
    """What never changes, as arrays."""

    # Of the margins: radii of the boxes (0, 1 or n, d), and what their step takes of the loss.
    X: np.ndarray  # (n, d)
    radii: np.ndarray
    offsets: np.ndarray  # (E, n)
    directions: np.ndarray  # (n, E, C)
    loss: tuple  # threshold (nan: logistic); weight, cap and fall of each sample
    unit: float
    beta: float
    # Of the cone rows, those of V and then of W: minus their signs; and the side and output, the
    # part of all rows and the data of each block.
    opposite: np.ndarray  # (m, P)
    blocks: list
    # Of the least squares.
    D: np.ndarray  # (n, P)
    gram: Gram
    vectors: np.ndarray  # (C P, C P)
    rotation_is_cheap: bool


def _problem_of(parts):
    prox, squares, cones = parts.prox, parts.least_squares, parts.cones
    X, balance, gram = _array(parts.X), prox.balance, squares.gram.numpy()
    threshold = np.nan if balance.logistic else float(parts.program.loss.threshold)
    of_samples = (part.numpy() for part in (balance.weight, balance.cap, balance.fall))
    return _Problem(
        X=X,
        radii=X[:0] if prox.reach is None else _array(prox.reach),
        offsets=prox.offsets.numpy(),
        directions=_array(squares.directions),
        loss=(threshold, *of_samples),
        unit=prox.unit,
        beta=float(parts.program.regularizer.beta),
        opposite=cones.opposite.numpy(),
        blocks=[((b.side, b.output), b.part, b.X.numpy()) for b in cones.blocks],
        D=_array(squares.D),
        gram=gram,
        vectors=squares.columns_vectors.numpy(),
        rotation_is_cheap=len(squares.columns) < gram.cost / 2,
    )


@dataclass(frozen=True, slots=True)
class _Room:
    """Room for what a step finds on the way."""

    rows: np.ndarray  # (m, P): multipliers with signs, then pre-activations
    aim: np.ndarray  # (C, n, d): what 2 z - s says of the outputs' slopes
    outputs: np.ndarray  # the outputs' slopes, in the memory of ``aim``, which is spent then
    right: np.ndarray  # (2, C, d, P): right-hand sides of V and W
    of_slopes: np.ndarray  # (C, d, P)
    difference: np.ndarray  # (d, C, P): right-hand side of V - W
    difference_2d: np.ndarray  # the same as (d, C P)
    both: np.ndarray  # (2, d, C P): right-hand sides of V + W, and of V - W rotated
    total: np.ndarray  # the first of them as (d, C, P)
    difference_rotated: np.ndarray  # the second
    XH: np.ndarray  # (2, C, d, P): X'X times new weights


def _room_of(problem, rows):
    (n, d), n_outputs, P = problem.X.shape, problem.directions.shape[2], problem.D.shape[1]

    def empty(*shape):
        return np.empty(shape, problem.X.dtype)

    aim, of_weights = empty(n_outputs, n, d), (2, n_outputs, d, P)
    difference, both = empty(d, n_outputs, P), empty(2, d, n_outputs * P)
    return _Room(
        rows=rows,
        aim=aim,
        outputs=aim,
        right=empty(*of_weights),
        of_slopes=empty(n_outputs, d, P),
        difference=difference,
        difference_2d=difference.reshape(d, -1),
        both=both,
        total=both[0].reshape(difference.shape),
        difference_rotated=both[1],
        XH=empty(*of_weights),
    )


class _Payers:
    """Which margins cap the multipliers of a cone row, and which rows a margin pays for.

    Rows that all margins of a sample share are the last.

    Attributes
    ----------
    charged, shared : arrays of shapes (E, n, ...) and (n, ...)
        The rows that a margin, and that all margins of a sample, pay for; empty without slacks.
    of_margins : array of shape (E,)
        How far a slack lowers each margin that pays for it.
    """

    def __init__(self, parts):
        cones, E_n = parts.cones, parts.prox.offsets.shape
        self.soft, self.of_rows = cones.soft, cones.price.numpy()
        self.of_margins = _array(parts.least_squares.directions[0].abs().amax(dim=1))
        self.caps = np.full(len(cones.opposite), np.inf, _array(parts.X).dtype)
        self.payers, self.sharers = cones.payers.numpy(), cones.sharers.numpy()
        self.charged, self.shared = np.empty((0, 0), np.intp), np.empty(0, np.intp)
        if self.soft:
            self.charged = np.argsort(self.payers).reshape(E_n)
            self.shared = len(self.payers) + np.argsort(self.sharers)

    def cap(self, a):
        """Return the multipliers that cap those of the slacks, infinite for cone constraints."""
        if self.soft:
            n_own = len(self.payers)
            np.take(a, self.payers, out=self.caps[:n_own])
            np.take(a.sum(axis=0), self.sharers, out=self.caps[n_own:])
            self.caps *= self.of_rows
        return self.caps


def _empty_like(tensor):
    """Return a contiguous tensor, whatever the strides of the other one."""
    return tensor.new_empty(tensor.shape)


def _array(tensor):
    """Return a contiguous array, in the same memory if it can be."""
    return np.ascontiguousarray(tensor.numpy())
