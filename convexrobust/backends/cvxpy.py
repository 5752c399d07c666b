"""Atoms that build cvxpy expressions; two-dimensional and without broadcasting.

Broadcasting and n-dimensional expressions send cvxpy 1.9 to a slower canonicaliser, hence the
explicit ``outer`` and ``reshape``.
"""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

abs = cp.abs  # an atom is named for what it is, as in cvxpy itself
square = cp.square
multiply = cp.multiply
sum = cp.sum
pos = cp.pos


def constant(array, like=None):
    """Return data in the form in which it meets variables of this backend."""
    return np.asarray(array, dtype=np.float64)


def huber(A, delta):
    """A^2 / 2 where |A| <= delta, and delta (|A| - delta / 2) beyond."""
    return 0.5 * cp.huber(A, delta)


def softplus(A):
    """log(1 + sum_j exp(A_kj)) for each row k of A (n, E); shape (n,)."""
    n, n_columns = A.shape
    if n_columns == 1:
        return cp.logistic(A[:, 0])
    return cp.log_sum_exp(cp.hstack([np.zeros((n, 1)), A]), axis=1)


def norm(A, q, axis):
    """The q-norm (q = 1, 2 or inf) along one axis."""
    return cp.norm(A, q, axis=axis)


def row_sum(A):
    """Sum of each row; shape (n,)."""
    return cp.sum(A, axis=1)


def row_max(A):
    """Largest entry of each row; shape (n,)."""
    return A[:, 0] if A.shape[1] == 1 else cp.max(A, axis=1)


def outer(a, b):
    """The matrix a b' of a constant vector a and an expression b."""
    return np.reshape(a, (-1, 1)) @ cp.reshape(b, (1, b.size), order="F")


def columns(vectors):
    """Stack vectors of length n as the columns of one (n, E) expression."""
    return cp.vstack(list(vectors)).T


def scatter(values, rows, n):
    """A vector of length n that holds ``values`` at ``rows`` and 0 elsewhere."""
    place = sp.csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(n, len(rows)))
    return place @ values


def take(values, index):
    """The entries of a vector at an integer matrix (m, q) of positions; shape (m, q)."""
    return cp.reshape(values[index.ravel()], index.shape, order="C")
