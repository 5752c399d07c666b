"""The linear system of one Newton step: elimination, the factor, and solves with refinement."""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve, null_space

from convexrobust.solvers.interior_point.iterate import Iterate
from convexrobust.solvers.interior_point.rows import DenseRows, ProductRows, inverse_factors

_REFINEMENTS = 3  # of the linear solves, at most
# Residuals that are good: small, or that share of the products s'z, far from the end.
_EXACT, _SHARE_OF_PRODUCT = 1e-11, 1e-3
_POOR_RESIDUAL = 1e-8  # residuals for which a slower factor is worth its time
_ACCURATE_UNKNOWNS = 600  # unknowns up to which the more accurate factor is taken
_LARGEST_SHIFT = 1e-3  # relative, of a diagonal that rounding left too small


class System:
    """The Newton equations at a measured iterate, everything but neurons and margins eliminated.

    Attributes
    ----------
    A : DenseRows or ProductRows, (n, E', J, size)
        The effective worst-case samples; ``data.fold`` times them is the matrix of the margins.
    C : ndarray of shape (n, E, E)
        What the margins give way for a multiplier.
    B : ndarray of shape (J, size, size)
        The blocks of K, the Hessian of the neurons without the slopes' norms.
    pair_weight, ratio : ndarray of shape (N, J)
        Only for soft cones: the weights of a slack's two bounds together, and the cone's share.
    """

    def __init__(self, iterate: Iterate):
        self.iterate, self.data = iterate, iterate.data
        self.good = max(_EXACT, _SHARE_OF_PRODUCT * iterate.product() / iterate.degree)
        self.C = self._clean_margins()
        self.A: DenseRows | ProductRows
        row_weight = iterate.cone.weight
        if self.data.nothing_but_centers:
            h = self.data.F[:, : self.data.fold.shape[1]]
            self.A = ProductRows(h, self.data.X, self.data.neurons.kinds())
        else:
            rows = self._rows_without_slacks()
            if self.data.soft:
                row_weight = self._eliminate_slacks(rows)
            self.A = DenseRows(rows)
        self._eliminate_loss()
        self.B = self._blocks(row_weight)
        self.slower = None  # makes a more accurate ``solve_neurons``, where there is one
        self.solve_neurons = self._factor_neurons()

    def solve(self, r, r_margin, r_loss):
        """Return the steps (J, size), the new multipliers (n, E) and the steps of the losses."""
        solution, error = self._refined(r, r_margin, r_loss)
        if not error < max(_POOR_RESIDUAL, self.good) and self.slower is not None:
            self.solve_neurons, self.slower = self.slower(), None
            solution, _ = self._refined(r, r_margin, r_loss)
        return solution

    def _refined(self, *right):
        """Return the best of a solution and its refinements, and the largest residual of that."""
        solution = best = self._solve_once(*right)
        smallest = np.inf
        for _ in range(_REFINEMENTS + 1):
            left = self._left(right, solution)
            error = max(np.abs(left[0]).max(), np.abs(left[1]).max())
            if not error < smallest:  # the factor is too poor to refine with
                break
            best, smallest = solution, error
            if error < self.good:
                break
            more = self._solve_once(*left)
            solution = tuple(part + step for part, step in zip(solution, more, strict=True))
        return best, smallest

    def _left(self, right, solution):
        """Return what a solution leaves of the right-hand sides."""
        (r, r_margin, r_loss), (change, a, dzeta) = right, solution
        loss = self.iterate.loss
        of_neurons = r - self._curved(change) + self._pulled_margins(a)
        of_margin = r_margin - dzeta @ loss.spread.T - np.einsum("kef,kf->ke", self.C, a)
        of_margin -= self._margins(change)
        of_loss = r_loss + a @ loss.spread - np.einsum("kzy,ky->kz", loss.hessian, dzeta)
        return of_neurons, of_margin, of_loss

    def _solve_once(self, r, r_margin, r_loss):
        a, _ = self._multipliers(r_margin, r_loss)
        change = self.solve_neurons(r + self._pulled_margins(a))
        return change, *self._multipliers(r_margin - self._margins(change), r_loss)

    def _pulled_margins(self, a):
        """Return the transpose of the margins' matrix times a (n, E)."""
        return self.A.pull(a @ self.data.fold)

    def _margins(self, change):
        """Return the margins' matrix times a step (J, size)."""
        return self.A.apply(change) @ self.data.fold.T

    def _multipliers(self, r_margin, r_loss):
        """Solve for the multipliers of the margins and the steps of the losses."""
        pulled = np.einsum("kez,ke->kz", self.raised, r_margin) + r_loss
        dzeta = np.einsum("kzy,ky->kz", self.rise, pulled)
        left = r_margin - dzeta @ self.iterate.loss.spread.T
        return np.einsum("kef,kf->ke", self.C_inverse, left), dzeta

    def _curved(self, change):
        """Return K times a step."""
        data, slope = self.data, self.iterate.slope
        product = np.matmul(self.B, change[..., None])[..., 0]
        if slope is not None:
            step = change[:, data.features]
            q = np.einsum("kej,jf->kef", data.F_slope, step, optimize=True)
            along = np.sum(slope.tilt * q, axis=-1) * slope.gamma
            q = slope.curvature * q - along[..., None] * slope.tilt
            pulled = np.einsum("kej,kef->jf", data.F_slope, q, optimize=True)
            product[:, data.features] += pulled
        return product

    # ---------------------------------------------------------------- elimination

    def _rows_without_slacks(self):
        """Return the rows of the margins at the worst point of each set."""
        data, slope = self.data, self.iterate.slope
        A = data.nominal_rows.copy()
        if slope is None:
            return A
        worst = data.F_slope[..., None] * slope.tilt[:, :, None, :]
        A[..., data.features] -= worst[:, data.slope_of]
        return A

    def _clean_margins(self):
        """Return C without slacks."""
        shares, slope = self.data.shares, self.iterate.slope
        C = np.eye(shares.shape[1]) / self.iterate.margin.weight[:, :, None]
        if slope is not None:
            C += np.einsum("se,ks,sf->kef", shares, 1.0 / slope.alpha, shares)
        return C

    def _eliminate_slacks(self, A):
        """Eliminate the slacks of soft cones from A and C; return the weights of the cone rows."""
        data, cone, spare = self.data, self.iterate.cone, self.iterate.spare
        self.pair_weight = cone.weight + np.where(data.mask, spare.weight, 1.0)
        self.ratio = cone.weight / self.pair_weight
        loose = np.where(data.mask, 1.0 / self.pair_weight, 0.0)
        self.C += np.einsum("kej,kj,kfj->kef", data.hurts, loose, data.hurts)
        harm = data.hurts * self.ratio[:, None]
        d = data.X.shape[1]
        A[..., :d] += (harm * data.S[:, None])[..., None] * data.X[:, None, None, :]
        A[..., d:] -= harm[..., None] * data.reach[:, None, None, :]
        return np.where(data.mask, cone.weight * spare.weight / self.pair_weight, 0.0)

    def _eliminate_loss(self):
        """Eliminate zeta after a: the Hessian of a linear loss vanishes where the loss is not 0.

        What zeta leaves of the inverse of C is no difference here. A kink's huge inverse less
        almost the same would lose the small Hessian, which is all that is left along ``spread``.
        """
        loss, inverse = self.iterate.loss, np.linalg.inv(self.C)
        self.C_inverse, self.raised = inverse, inverse @ loss.spread
        along = loss.spread.T @ self.raised
        self.rise = np.linalg.inv(loss.hessian + along)
        lift = self.raised @ np.linalg.inv(along)
        across = null_space(loss.spread.T)
        self.given = lift @ (loss.hessian @ self.rise @ along) @ lift.transpose(0, 2, 1)
        self.given += across @ np.linalg.inv(across.T @ self.C @ across) @ across.T

    # ---------------------------------------------------------------- the neurons

    def _blocks(self, row_weight):
        """Return the Hessian (J, size, size) of what belongs to one neuron."""
        data, group = self.data, self.iterate.group
        X, reach, d = data.X_cone, data.reach, data.X.shape[1]
        B = np.zeros((len(self.iterate.U), data.size, data.size))
        if data.squares is not None:
            values, place = data.squares
            B[:, :d, :d] = (row_weight.T @ values)[:, place]
        else:
            B[:, :d, :d] = np.matmul(X.T * row_weight.T[:, None, :], X)
        cross = np.einsum("kj,kf,kr->jfr", data.S * row_weight, X, reach, optimize=True)
        B[:, :d, d:], B[:, d:, :d] = -cross, -cross.transpose(0, 2, 1)
        B[:, d:, d:] = np.einsum("kj,kr,kq->jrq", row_weight, reach, reach, optimize=True)
        at = np.arange(d)
        B[:, at, at] += group.curvature
        tilt = group.tilt
        B[:, :d, :d] -= group.gamma[:, None, None] * tilt[:, :, None] * tilt[:, None, :]
        if self.iterate.robust is not None:
            for r, members in enumerate(data.members):
                _add_epigraph(B, self.iterate.robust, r, d + r, members)
        return B

    def _factor_neurons(self):
        """Return r -> the inverse of K + A' given A times r (J, size), by the smaller factor."""
        B, slope, M = self.B, self.iterate.slope, self._half()
        n_neurons, size, _ = B.shape
        unknowns, rows = n_neurons * size, len(self.given) * self.data.fold.shape[1]
        if slope is None and rows < unknowns and unknowns > _ACCURATE_UNKNOWNS:
            return self._factor_in_samples(B, M)
        half = M.dense()
        K = half.T @ half
        blocks = K.reshape(n_neurons, size, n_neurons, size)
        at = np.arange(n_neurons)
        blocks[at, :, at, :] += B
        if slope is not None:
            self._add_slopes(blocks, K)
        factor = _factored(K)
        return lambda r: cho_solve(factor, r.ravel(), check_finite=False).reshape(r.shape)

    def _factor_in_samples(self, B, M):
        self.slower = lambda: _by_singular_vectors(B, M)
        try:
            return _by_normal_equations(B, M)
        except np.linalg.LinAlgError:  # rounding of the squares left nothing to factor
            return self.slower()

    def _half(self):
        """Return rows M with M'M = A' given A."""
        values, vectors = np.linalg.eigh(self.given)  # no Cholesky: it may be singular
        root = np.sqrt(np.maximum(values, 0.0))[..., None] * vectors.transpose(0, 2, 1)
        root = root @ self.data.fold
        if root.shape[2] == 1:
            root = np.linalg.norm(root, axis=1, keepdims=True)
        return self.A.mixed(root)

    def _add_slopes(self, blocks, K):
        """Add the curvature of the slopes' norms to K, of which ``blocks`` is a view."""
        data, slope = self.data, self.iterate.slope
        F = data.F_slope.reshape(-1, data.F_slope.shape[2])
        for at, f in enumerate(data.features):
            blocks[:, f, :, f] += F.T @ (slope.curvature[:, :, at].reshape(-1, 1) * F)
        if slope.gamma.any():
            rows = np.zeros((*data.F_slope.shape, data.size))
            tilt = np.sqrt(slope.gamma)[..., None] * slope.tilt
            rows[..., data.features] = data.F_slope[..., None] * tilt[:, :, None, :]
            rows = rows.reshape(-1, len(K))
            K -= rows.T @ rows


def _add_epigraph(B, epigraph, r, tau, members):
    """Add the Hessian of a neuron's r-th epigraph to the blocks, its own variable at ``tau``."""
    alpha, gamma, tilt = epigraph.alpha[:, r], epigraph.gamma[:, r], epigraph.tilt[:, r]
    B[:, tau, tau] += alpha
    B[:, members, tau] -= alpha[:, None] * tilt
    B[:, tau, members] -= alpha[:, None] * tilt
    square = np.broadcast_to(members[:, None], (len(members),) * 2)
    B[:, square, square.T] += (alpha - gamma)[:, None, None] * tilt[:, :, None] * tilt[:, None]
    B[:, members, members] += epigraph.curvature[:, r]


def _factored(K):
    """Return the Cholesky factor of K, with as much added to the diagonal as that takes."""
    diagonal, shift = K.diagonal().copy(), 0.0
    while True:
        try:
            return cho_factor(K, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            shift = 10.0 * shift or 1e-15
            if shift > _LARGEST_SHIFT:
                raise
            K.flat[:: len(K) + 1] = diagonal * (1.0 + shift)


def _by_normal_equations(B, M):
    """Return r -> (B + M'M)^-1 r for blocks B (J, size, size) and M of fewer rows than that.

    By Woodbury's formula: fast, but its rounding grows with the square of M.
    """
    inverse = inverse_factors(B)
    G = M.gram(inverse)
    G.flat[:: len(G) + 1] += 1.0
    factor = cho_factor(G, lower=True, check_finite=False)
    transposed = inverse.transpose(0, 2, 1)

    def solve(r):
        alone = _times(transposed, _times(inverse, r))
        seen = M.apply(alone)
        c = cho_solve(factor, seen.ravel(), check_finite=False).reshape(seen.shape)
        return alone - _times(transposed, _times(inverse, M.pull(c)))

    return solve


def _by_singular_vectors(B, M):
    """Return the same, in the range of M and across it apart: slower, but accurate."""
    inverse = inverse_factors(B)
    U, values, _ = np.linalg.svd(M.scaled(inverse), full_matrices=False)

    def solve(r):
        y = _times(inverse, r).ravel()
        along = y @ U
        across = y - U @ along
        across -= U @ (across @ U)  # again: what rounding leaves in the range is far too large
        y = across + U @ (along / (1.0 + values**2))
        return _times(inverse.transpose(0, 2, 1), y.reshape(r.shape))

    return solve


def _times(blocks, r):
    """Return each block times its row of r."""
    return np.matmul(blocks, r[..., None])[..., 0]
