"""The reaches of the compiled iteration: `SharedReach` in l-inf and `BoxReach` on arrays.

All take bounds A of shape (q, P) for a side and output, (2, C, q, P) for all, with q = ``size``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from convexrobust.solvers.admm.reach import NEWTON_STEPS, ROUNDING, BoxReach


def fused_reach(parts, kernels) -> NoReach | SharedArrays | BoxArrays:
    """Return the reaches of the parts of a program."""
    if parts.reach is None:
        return NoReach(parts.cones, kernels)
    return (BoxArrays if isinstance(parts.reach, BoxReach) else SharedArrays)(parts, kernels)


class NoReach:
    """Nothing is perturbed."""

    size = 0

    def __init__(self, cones, kernels):
        self.kernels, self.zero = kernels, np.zeros_like(cones.opposite[:1].numpy())

    def prox(self, Z, A, weights, last, z_Z, z_A):
        """Take the joint step of weights Z and bounds A."""
        beta, rho_z, _ = weights
        self.kernels.shrink(Z, beta / rho_z, z_Z)

    def at_rows(self, k, A):
        """Return R A (m, P) of block k, or one row of it where all are alike."""
        return self.zero

    def adjoint(self, k, b, out):
        """Set ``out`` to R'b of block k."""

    def inverse(self, rho_t, rho_a):
        """Return what `divide` needs for the inverse of rho_t R'R + rho_a."""

    def divide(self, inverse, A):
        """Multiply A by an `inverse`, in place; return R'R times that."""
        return A


class SharedArrays:
    """As `SharedReach` in l-inf: A has one row."""

    size = 1

    def __init__(self, parts, kernels):
        self.n, self.axes, self.kernels = parts.reach.n, parts.reach.axes.numpy(), kernels
        self.ones = np.ones((1, self.n), self.axes.dtype)

    def prox(self, Z, A, weights, last, z_Z, z_A):
        """Take the joint step of weights Z and bounds A."""
        self.kernels.shared_prox(Z, A[0], self.axes, weights, last, z_Z, z_A[0])

    def at_rows(self, k, A):
        """Return R A (m, P) of block k, or one row of it where all are alike."""
        return A

    def adjoint(self, k, b, out):
        """Set ``out`` to R'b of block k."""
        np.matmul(self.ones[:, : len(b)], b, out=out)

    def inverse(self, rho_t, rho_a):
        """Return what `divide` needs for the inverse of rho_t R'R + rho_a: that itself."""
        return rho_t * self.n + rho_a

    def divide(self, inverse, A):
        """Multiply A by an `inverse`, in place; return R'R times that."""
        A /= inverse
        return self.n * A


class BoxArrays:
    """As `BoxReach`: A has a row for each feature."""

    def __init__(self, parts, kernels):
        self.kernels, self.size = kernels, parts.reach.R.shape[1]
        self.boxes_gram = parts.reach.boxes_gram.numpy()
        self.rows = [boxes.R.numpy() for boxes in parts.cones.reaches]

    def prox(self, Z, A, weights, last, z_Z, z_A):
        """Take the joint step of weights Z and bounds A."""
        self.kernels.box_prox(Z, A, weights, NEWTON_STEPS, ROUNDING, last, z_Z, z_A)

    def at_rows(self, k, A):
        """Return R A (m, P) of block k, or one row of it where all are alike."""
        return self.rows[k] @ A

    def adjoint(self, k, b, out):
        """Set ``out`` to R'b of block k."""
        np.matmul(self.rows[k].T, b, out=out)

    def inverse(self, rho_t, rho_a):
        """Return what `divide` needs for the inverse of rho_t R'R + rho_a."""
        return _BoxInverse(rho_t, rho_a, self.boxes_gram.inverse(rho_t, rho_a))

    def divide(self, inverse, A):
        """Multiply A by an `inverse`, in place; return R'R times that."""
        quotient = self.boxes_gram.solve(inverse.of_gram, A)
        product = (A - inverse.rho_a * quotient) / inverse.rho_t
        A[:] = quotient
        return product


class _BoxInverse(NamedTuple):
    rho_t: float
    rho_a: float
    of_gram: Any
