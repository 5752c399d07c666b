"""Atoms on NumPy arrays: the reference, always in float64."""

from __future__ import annotations

import numpy as np

abs = np.abs  # an atom is named for what it is, as in numpy itself
sign = np.sign
square = np.square
multiply = np.multiply
sum = np.sum
outer = np.outer
where = np.where
maximum = np.maximum
minimum = np.minimum


def constant(array, like=None):
    """Return data in the form in which it meets variables of this backend."""
    return np.asarray(array, dtype=np.float64)


def limits(A):
    """The limits of the floating-point numbers of A, such as ``eps`` and ``tiny``."""
    return np.finfo(A.dtype)


def pos(A):
    """Positive part, max(A, 0)."""
    return np.maximum(A, 0.0)


def huber(A, delta):
    """A^2 / 2 where |A| <= delta, and delta (|A| - delta / 2) beyond."""
    size = np.abs(A)
    inner = np.minimum(size, delta)
    return inner * (size - inner / 2.0)


def softplus(A):
    """log(1 + sum_j exp(A_kj)) for each row k of A (n, E); shape (n,)."""
    return np.logaddexp.reduce(np.column_stack([np.zeros(len(A)), A]), axis=1)


def norm(A, q, axis):
    """The q-norm (q = 1, 2 or inf) along one axis."""
    return np.linalg.norm(A, ord=q, axis=axis)


def row_sum(A):
    """Sum of each row; shape (n,)."""
    return np.sum(A, axis=1)


def row_max(A):
    """Largest entry of each row; shape (n,)."""
    return np.max(A, axis=1)


def falling(A):
    """The entries of each row in falling order."""
    return np.sort(A, axis=1)[:, ::-1]


def columns(vectors):
    """Stack vectors of length n as the columns of one (n, E) array."""
    return np.column_stack(vectors)


def scatter(values, rows, n):
    """A vector of length n that holds ``values`` at ``rows`` and 0 elsewhere."""
    out = np.zeros(n)
    out[rows] = values
    return out


def take(values, index):
    """The entries of a vector at an integer matrix (m, q) of positions; shape (m, q)."""
    return values[index]
