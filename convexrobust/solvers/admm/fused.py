"""The iteration of `ADMM` on a CPU, its element-wise passes fused and compiled.

On small programs nearly all of an iteration's time is the calling of some 400 operations on
tensors. Here the same iteration is a dozen matrix products and as many compiled kernels, several
times as fast. The state is that of `ADMM`, which remains in charge of all that is not done in every
iteration.
"""

from __future__ import annotations

import numpy as np
import torch

from convexrobust.solvers.admm.margin_prox import SETTLED, SMALLEST
from convexrobust.solvers.admm.reach import NEWTON_STEPS, ROUNDING, BoxReach
from convexrobust.solvers.compiled import compiles

_FEW_THREADS = 3  # kernels use one; from here on tensors, with three times the passes, catch up


def fused_iteration(splitting) -> FusedIteration | None:
    """Return the `FusedIteration` of a splitting, None where there is none or it does not pay."""
    on_cpu = splitting.X.device.type == "cpu" and torch.get_num_threads() <= _FEW_THREADS
    if not (on_cpu and compiles(splitting.program)):
        return None
    from convexrobust.solvers.admm import kernels  # imports numba

    return FusedIteration(splitting, kernels)


class FusedIteration:
    """The iteration of a splitting, unperturbed or perturbed in boxes.

    Arrays of weights have shape (2, C, d, P), V and W, and those of bounds (2, C, q, P).

    The state has the names of `ADMM`: s in M, Z, A and ``gaps``, multipliers in a and b, products
    X'H and R'T in XH and RT, their adjoints of b in ``pulled`` and ``reached``, and proximal and
    least-squares points with prefixes z and x; ``last`` is what the step of the reaches starts at.

    Parameters
    ----------
    splitting : Splitting
        The state of `ADMM`. Arrays share its memory where they can.
    kernels : module
        `convexrobust.solvers.admm.kernels`.
    """

    def __init__(self, splitting, kernels):
        self.kernels = kernels
        program, prox, cones = splitting.program, splitting.prox, splitting.cones
        squares = splitting.least_squares
        self.beta = float(program.regularizer.beta)
        self.X, self.D = _array(splitting.X), _array(squares.D)
        self.directions = _array(squares.directions)
        self.gram, self.columns_vectors = squares.gram.numpy(), squares.columns_vectors.numpy()
        # Of the margins: radii of the boxes, and what their step takes of the loss.
        self.radii = self.X[:0] if prox.reach is None else _array(prox.reach)
        self.offsets, self.unit = prox.offsets.numpy(), prox.unit
        one_margin = len(self.offsets) == program.n_outputs == 1
        self.prox_of_loss = kernels.margin_prox if one_margin else kernels.margins_prox
        of_samples = prox.balance.weight, prox.balance.cap, prox.balance.fall
        threshold = np.nan if prox.balance.logistic else float(program.loss.threshold)
        self.loss = threshold, *(part.numpy() for part in of_samples)
        # Of the cone rows, those of V and then of W.
        self.opposite = cones.opposite.numpy()
        self.blocks = [((b.side, b.output), b.part, b.X.numpy()) for b in cones.blocks]
        self._find_payers(cones)
        self.reach = _reach_of(splitting, kernels)
        self._allocate(splitting)

    def _find_payers(self, cones):
        """Find which margins cap the multipliers of a cone row, and which rows a margin pays for.

        Rows that all margins of a sample share are the last.
        """
        self.soft, self.payers, self.sharers = cones.soft, None, None
        self.charged, self.shared = np.empty((0, 0), np.intp), np.empty(0, np.intp)
        self.prices = np.ones(len(self.offsets), self.X.dtype)  # what slacks cost each margin
        self.caps = np.full(len(self.opposite), np.inf, self.X.dtype)
        if not cones.soft:
            return
        self.payers, self.sharers = cones.payers.numpy(), cones.sharers.numpy()
        self.price_of_row = cones.price.numpy()
        self.prices = np.ascontiguousarray(np.abs(self.directions[0]).max(axis=1))
        self.charged = np.argsort(self.payers).reshape(self.offsets.shape)
        self.shared = len(self.payers) + np.argsort(self.sharers)

    def _allocate(self, splitting):
        """Make room for what an iteration finds anew: tensors, and the same memory as arrays."""
        self.scratch = splitting.cones.buffer.numpy()
        state = splitting.state
        self.z, self.x = (state.each(_empty_like) for _ in range(2))
        self.pulled_adjoint = _empty_like(state.Z)
        self.reached_adjoint = None if state.A is None else _empty_like(state.A)
        self.z_M, self.z_Z, self.z_A = self._arrays(self.z)
        self.x_M, self.x_Z, self.x_A = self._arrays(self.x)
        self.pulled = self.pulled_adjoint.numpy()
        self.reached = self._bounds(self.reached_adjoint)
        self.right, self.x_XH = np.empty_like(self.z_Z), np.empty_like(self.z_Z)
        _, n_outputs, d, P = self.right.shape
        self.of_slopes = np.empty((n_outputs, d, P), self.X.dtype)
        self.both = np.empty((2, d, n_outputs * P), self.X.dtype)  # V + W, and V - W rotated
        self.total = self.both[0].reshape(d, n_outputs, P)
        self.difference = np.empty((d, n_outputs, P), self.X.dtype)
        self.rotation_is_cheap = n_outputs * P < self.gram.cost / 2
        self.aim = np.empty((n_outputs, *self.X.shape), self.X.dtype)
        self.outputs = self.aim  # which is spent when the outputs' slopes are found

    def _arrays(self, blocks):
        """Return the arrays of a block."""
        return blocks.M.numpy(), blocks.Z.numpy(), self._bounds(blocks.A)

    def _bounds(self, tensor):
        """Return bounds as an array (2, C, q, P), without rows where there are none."""
        n_outputs, P = self.directions.shape[2], self.D.shape[1]
        if tensor is None:
            return np.empty((2, n_outputs, 0, P), self.X.dtype)
        return tensor.view(2, n_outputs, self.reach.size, P).numpy()

    def advance(self, splitting, n_steps, relaxation):
        """Take steps of the iteration, leaving the splitting as its own would."""
        self._take_over(splitting)
        for _ in range(n_steps):
            self._proximal_step()
            self._linear_step()
            self._move(relaxation)
        self._hand_back(splitting)

    # ---------------------------------------------------------------- state

    def _take_over(self, splitting):
        """Look at the state as arrays, to be changed in place."""
        cones, reach = splitting.cones, splitting.reach
        splitting.state = state = splitting.state.each(torch.Tensor.contiguous)
        self.rho_m, self.rho_z, self.rho_a = splitting.rho
        self.rho_h, self.rho_t, self.kappa = cones.rho, cones.rho_reach, cones.kappa
        self.M, self.Z, self.A = self._arrays(state)
        self.a, self.gaps, self.b = splitting.a.numpy(), cones.gaps.numpy(), cones.b.numpy()
        self.XH, self.RT = cones.XH.numpy(), self._bounds(cones.RT)
        if reach is not None and reach.last is None:
            reach.last = torch.zeros_like(state.Z[:, :, 0])
        self.last = self.Z[:, :, 0] if reach is None else reach.last.numpy()
        self.shifts = splitting.least_squares.shifts(self.rho_m, self.rho_z).numpy()
        self.inverse = self.gram.inverse(self.rho_h, self.shifts)
        self.reach.take_over(self.rho_t, self.rho_a)

    def _hand_back(self, splitting):
        """Show what the last iteration found; the state is where it was."""
        splitting.z, splitting.x = self.z, self.x
        splitting.cones.pulled = self.pulled_adjoint
        splitting.cones.reached = self.reached_adjoint

    # ---------------------------------------------------------------- one iteration

    def _proximal_step(self):
        """Set the copies z and the multipliers to the proximal point of the state."""
        slacks = self.gaps, self.charged, self.shared, self.prices
        scales = self.rho_m, self.kappa, SMALLEST * self.unit, SETTLED * self.unit
        self.prox_of_loss(
            self.M, self.X, self.radii, self.offsets, self.directions, self.loss, slacks, scales,
            self.a, self.z_M, self.aim,
        )  # fmt: skip
        self._cap()
        self.kernels.settle(self.gaps, self.caps, self.opposite, self.kappa, self.b, self.scratch)
        weights = self.beta, self.rho_z, self.rho_a
        for k, (at, part, X) in enumerate(self.blocks):
            np.matmul(X.T, self.scratch[part], out=self.pulled[at])
            self.reach.adjoint(k, self.b[part], self.reached[at])
            found = self.last[at], self.z_Z[at], self.z_A[at]
            self.reach.prox(self.Z[at], self.A[at], weights, *found)

    def _cap(self):
        """Set the multipliers that cap those of the slacks."""
        if self.soft:
            n_own = len(self.payers)
            np.take(self.a, self.payers, out=self.caps[:n_own])
            np.take(self.a.sum(axis=0), self.sharers, out=self.caps[n_own:])
            self.caps *= self.price_of_row

    def _linear_step(self):
        """Set the weights x, and what the outputs' slopes are, to those closest to 2 z - s."""
        kernels, d = self.kernels, self.X.shape[1]
        weights = self.rho_h, 2.0, self.rho_z
        kernels.right_side(self.XH, self.pulled, self.Z, self.z_Z, weights, self.right)
        np.matmul(self.aim.transpose(0, 2, 1), self.D, out=self.of_slopes)
        kernels.separate(self.right, self.of_slopes, 2.0 * self.rho_m, self.total, self.difference)
        np.matmul(self.difference.reshape(d, -1), self.columns_vectors, out=self.both[1])
        both = self.gram.solve(self.inverse, self.both)
        difference = self._join(both, self.x_Z)
        np.matmul(self.D, difference.transpose(1, 2, 0), out=self.outputs)
        self._multiply(both)
        weights = self.rho_t, -2.0, self.rho_a
        kernels.right_side(self.RT, self.reached, self.A, self.z_A, weights, self.x_A)
        self.x_RT = self.reach.divide(self.x_A)

    def _join(self, both, out):
        """Set V and W from V + W and V - W rotated; return V - W (d, C, P)."""
        difference = (both[1] @ self.columns_vectors.T).reshape(self.difference.shape)
        self.kernels.join(both[0].reshape(difference.shape), difference, out)
        return difference

    def _multiply(self, both):
        """Set X'H to X'X times the new weights, from V + W and V - W rotated."""
        if self.rotation_is_cheap:  # the equations that were solved say what X'X makes of them
            both *= self.shifts
            np.subtract(self.both, both, out=both)
            both /= self.rho_h
            self._join(both, self.x_XH)
        else:
            self.x_XH = self.gram.product(self.x_Z)

    def _move(self, relaxation):
        """Move the state towards x."""
        kernels = self.kernels
        for k, (at, part, X) in enumerate(self.blocks):
            np.matmul(X, self.x_Z[at], out=self.scratch[part])
            rows = self.gaps[part], self.scratch[part], self.opposite[part]
            reaches = self.reach.at_rows(k, self.x_A[at])
            kernels.move_gaps(*rows, reaches, self.b[part], self.kappa, relaxation)
        kernels.move_product(self.XH, self.x_XH, self.pulled, -1.0 / self.rho_h, relaxation)
        kernels.move_product(self.RT, self.x_RT, self.reached, 1.0 / self.rho_t, relaxation)
        kernels.move_slopes(self.M, self.outputs, self.directions, self.z_M, self.x_M, relaxation)
        kernels.relax(self.Z, self.x_Z, self.z_Z, relaxation)
        kernels.relax(self.A, self.x_A, self.z_A, relaxation)


class _NoReach:
    """Nothing is perturbed."""

    size = 0

    def __init__(self, kernels, row):
        self.kernels, self.zero = kernels, np.zeros_like(row)

    def prox(self, Z, A, weights, last, z_Z, z_A):
        """Take the joint step of weights Z and bounds A."""
        beta, rho_z, _ = weights
        self.kernels.shrink(Z, beta / rho_z, z_Z)

    def at_rows(self, k, A):
        """Return R A (m, P) of block k, or one row of it where all are alike."""
        return self.zero

    def adjoint(self, k, b, out):
        """Set ``out`` to R'b of block k."""

    def take_over(self, rho_t, rho_a):
        """Take in the weights."""

    def divide(self, A):
        """Divide by rho_t R'R + rho_a, in place; return R'R times the quotient."""
        return A


class _SharedReach:
    """As `SharedReach` in l-inf: A has one row."""

    size = 1

    def __init__(self, reach, kernels):
        self.n, self.axes, self.kernels = reach.n, reach.axes.numpy(), kernels
        self.ones = np.ones((1, reach.n), self.axes.dtype)

    def prox(self, Z, A, weights, last, z_Z, z_A):
        """Take the joint step of weights Z and bounds A."""
        self.kernels.shared_prox(Z, A[0], self.axes, weights, last, z_Z, z_A[0])

    def at_rows(self, k, A):
        """Return R A (m, P) of block k, or one row of it where all are alike."""
        return A

    def adjoint(self, k, b, out):
        """Set ``out`` to R'b of block k."""
        np.matmul(self.ones[:, : len(b)], b, out=out)

    def take_over(self, rho_t, rho_a):
        """Take in the weights."""
        self.divisor = rho_t * self.n + rho_a

    def divide(self, A):
        """Divide by rho_t R'R + rho_a, in place; return R'R times the quotient."""
        A /= self.divisor
        return self.n * A


class _BoxReach:
    """As `BoxReach`: A has a row for each feature."""

    def __init__(self, reach, cones, kernels):
        self.kernels, self.size = kernels, reach.R.shape[1]
        self.boxes_gram = reach.boxes_gram.numpy()
        self.rows = [boxes.R.numpy() for boxes in cones.reaches]

    def prox(self, Z, A, weights, last, z_Z, z_A):
        """Take the joint step of weights Z and bounds A."""
        self.kernels.box_prox(Z, A, weights, NEWTON_STEPS, ROUNDING, last, z_Z, z_A)

    def at_rows(self, k, A):
        """Return R A (m, P) of block k, or one row of it where all are alike."""
        return self.rows[k] @ A

    def adjoint(self, k, b, out):
        """Set ``out`` to R'b of block k."""
        np.matmul(self.rows[k].T, b, out=out)

    def take_over(self, rho_t, rho_a):
        """Take in the weights."""
        self.rho_t, self.rho_a = rho_t, rho_a
        self.inverse = self.boxes_gram.inverse(rho_t, rho_a)

    def divide(self, A):
        """Divide by rho_t R'R + rho_a, in place; return R'R times the quotient."""
        quotient = self.boxes_gram.solve(self.inverse, A)
        product = (A - self.rho_a * quotient) / self.rho_t
        A[:] = quotient
        return product


def _reach_of(splitting, kernels):
    reach = splitting.reach
    if reach is None:
        return _NoReach(kernels, splitting.cones.opposite[:1].numpy())
    if isinstance(reach, BoxReach):
        return _BoxReach(reach, splitting.cones, kernels)
    return _SharedReach(reach, kernels)


def _empty_like(tensor):
    """Return a contiguous tensor, whatever the strides of the other one."""
    return tensor.new_empty(tensor.shape)


def _array(tensor):
    """Return a contiguous array, in the same memory if it can be."""
    return np.ascontiguousarray(tensor.numpy())
