r"""Gram matrices X'X as operators, by whichever of X and X'X is smaller."""

from __future__ import annotations

import torch

# Times the columns: with fewer rows, two products with X for one with X'X, and two smaller ones in
# `Gram.solve`, cost less together.
_FEW_ROWS = 0.6


class Gram:
    r"""The matrix X'X of data X (n, d), and the inverses of :math:`w X'X + s I`.

    With few rows the matrix itself is never made: it is 0 on all that is orthogonal to the rows.
    The arrays are tensors, or all of NumPy.

    Parameters
    ----------
    factor : array of shape (n, d)
        X with few rows, else X'X.
    values, vectors : arrays of shape (r,) and (d, r)
        Eigenvalues and eigenvectors; with few rows the null space is left out.
    few_rows : bool
        Which of the two ``factor`` is.
    """

    def __init__(self, factor, values, vectors, few_rows):
        self.factor, self.values, self.vectors = factor, values, vectors
        self.few_rows = few_rows

    @classmethod
    def of(cls, X) -> Gram:
        """Return the operator of a tensor; eigenvalues are computed in float64."""
        few_rows = len(X) < _FEW_ROWS * X.shape[1]
        if few_rows:
            _, sizes, vectors = torch.linalg.svd(X.double(), full_matrices=False)
            factor, values, vectors = X, sizes**2, vectors.T.contiguous()
        else:
            factor = X.T @ X
            values, vectors = torch.linalg.eigh(factor.double())
        return cls(factor, values.clamp_min(0.0).to(X.dtype), vectors.to(X.dtype), few_rows)

    def numpy(self) -> Gram:
        """Return the same operator on arrays."""
        factor, values, vectors = self.factor, self.values, self.vectors
        return Gram(factor.numpy(), values.numpy(), vectors.numpy(), self.few_rows)

    @property
    def cost(self) -> int:
        """Multiplications of `product` for each number that it returns."""
        return self.factor.shape[0] * (2 if self.few_rows else 1)

    def product(self, A):
        """Return X'X A for A (..., d, m)."""
        if self.few_rows:
            return self.factor.T @ (self.factor @ A)
        return self.factor @ A

    def inverse(self, weight, shift):
        """Return what `solve` needs for the inverse of ``weight`` X'X + ``shift``.

        The shift may differ by column: a number, or an array (..., 1, m).
        """
        inside = 1.0 / (weight * self.values[:, None] + shift)
        return (inside - 1.0 / shift, 1.0 / shift) if self.few_rows else (inside, None)

    def solve(self, inverse, A):
        """Return an `inverse` times A (..., d, m)."""
        inside, across = inverse
        found = self.vectors @ (inside * (self.vectors.T @ A))
        return found if across is None else found + across * A
