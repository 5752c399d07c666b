"""The matrix of the margins in the weights of J neurons: stored, or as products with X."""

from __future__ import annotations

import numpy as np
from scipy.linalg.lapack import dtrtri

_IN_CACHE = 1_000_000  # numbers
_MOVE = 30.0  # multiplications that take as long as to move a number to its place
_SHIFT = 1e-15  # of a diagonal, relative to the trace


def factors(blocks):
    """Return the Cholesky factors of blocks, with what rounding took of their diagonals."""
    shift = _SHIFT * np.trace(blocks, axis1=1, axis2=2)[:, None, None]
    return np.linalg.cholesky(blocks + shift * np.eye(blocks.shape[1]))


def inverse_factors(blocks):
    """Return the inverses of the Cholesky factors of blocks."""
    inverses = factors(blocks)
    for at, factor in enumerate(inverses):  # many times as fast as to solve for them all
        inverses[at] = dtrtri(factor.T)[0].T  # the transposes are what LAPACK takes as they are
    return inverses


class DenseRows:
    """A matrix of n E rows, stored as an array (n, E, J, size)."""

    def __init__(self, array):
        self.array = array

    def dense(self):
        """Return the matrix (n E, J size)."""
        n, n_margins, n_neurons, size = self.array.shape
        return self.array.reshape(n * n_margins, n_neurons * size)

    def apply(self, change):
        """Return the matrix times a change of the neurons (J, size), as (n, E)."""
        return (self.dense() @ change.ravel()).reshape(self.array.shape[:2])

    def pull(self, a):
        """Return the transpose times a (n, E), as (J, size)."""
        return (a.ravel() @ self.dense()).reshape(self.array.shape[2:])

    def mixed(self, roots):
        """Return the rows of each sample times its matrix of ``roots`` (n, E', E)."""
        n, _, n_neurons, size = self.array.shape
        mixed = roots @ self.array.reshape(n, -1, n_neurons * size)
        return DenseRows(mixed.reshape(n, -1, n_neurons, size))

    def scaled(self, blocks):
        """Return the transpose, each neuron's part times its block: (J size, n E)."""
        n_neurons, size, _ = blocks.shape
        return (blocks @ self.dense().T.reshape(n_neurons, size, -1)).reshape(n_neurons * size, -1)

    def gram(self, blocks):
        """Return N'N (n E, n E) for N = scaled(blocks)."""
        N = self.scaled(blocks)
        return N.T @ N


class ProductRows:
    """Rows h_kej x_k, where nothing but the centres x_k (n, d) belongs to a neuron; h (n, E, J).

    A product with the matrix is one with X, d times smaller. Neurons of the same ``kind`` (J,) have
    the same h but for its sign.
    """

    def __init__(self, h, X, kind):
        self.h, self.X, self.kind = h, X, kind

    def dense(self):
        """Return the matrix (n E, J d)."""
        rows = self.h[..., None] * self.X[:, None, None, :]
        return rows.reshape(rows.shape[0] * rows.shape[1], -1)

    def apply(self, change):
        """Return the matrix times a change of the neurons (J, d), as (n, E)."""
        return np.matmul(self.h, (self.X @ change.T)[..., None])[..., 0]

    def pull(self, a):
        """Return the transpose times a (n, E), as (J, d)."""
        return np.einsum("ke,kej->kj", a, self.h).T @ self.X

    def mixed(self, roots):
        """Return the rows of each sample times its matrix of ``roots`` (n, E', E)."""
        return ProductRows(roots @ self.h, self.X, self.kind)

    def scaled(self, blocks):
        """Return the transpose, each neuron's part times its block: (J d, n E)."""
        n_neurons, d, _ = blocks.shape
        products = (blocks.reshape(-1, d) @ self.X.T).reshape(n_neurons, d, -1, 1)
        return (products * self.h.transpose(2, 0, 1)[:, None]).reshape(n_neurons * d, -1)

    def gram(self, blocks):
        """Return N'N (n E, n E) for N = scaled(blocks), from one part for each kind of neuron."""
        _, first, kind = np.unique(self.kind, return_index=True, return_inverse=True)
        squares = blocks.transpose(0, 2, 1) @ blocks
        others = np.setdiff1d(np.arange(len(kind)), first)  # of a kind there are two at most
        squares[first[kind[others]]] += squares[others]
        roots = factors(squares[first])
        kinds = ProductRows(self.h[..., first], self.X, self.kind[first])
        return kinds._gram_active(roots) if kinds._mostly_zeros() else kinds._gram_dense(roots)

    def _mostly_zeros(self) -> bool:
        """Tell whether a gram is quicker without the rows of zeros, of which patterns make many."""
        (n, n_margins, _), d = self.h.shape, self.X.shape[1]
        n_rows, active = float(n * n_margins), np.count_nonzero(self.h, axis=(0, 1))
        saved = ((n_rows**2 - active**2) / 2.0 + (n_rows - active) * d) * d
        return np.sum(saved) > _MOVE * np.sum(n_rows * active)

    def _gram_active(self, roots):
        """Return a gram, a neuron at a time, without its rows of zeros."""
        n, n_margins, n_neurons = self.h.shape
        h = np.ascontiguousarray(self.h.reshape(-1, n_neurons).T)
        G = np.zeros((n * n_margins,) * 2)
        for values, root in zip(h, roots, strict=True):
            rows = np.flatnonzero(values)
            N = (values[rows, None] * self.X[rows // n_margins]) @ root
            wide = np.zeros((len(rows), len(G)))
            wide[:, rows] = N @ N.T  # two moves, each of whole rows, take half as long as one
            G[rows] += wide
        return G

    def _gram_dense(self, roots):
        """Return a gram, as many neurons at a time as stay in the caches."""
        n, n_margins, n_neurons = self.h.shape
        G = np.zeros((n * n_margins,) * 2)
        for part in np.array_split(np.arange(n_neurons), self._n_parts(n_neurons)):
            some = ProductRows(self.h[..., part], self.X, self.kind[part])
            N = some.scaled(roots[part].transpose(0, 2, 1))
            G += N.T @ N
        return G

    def _n_parts(self, n_neurons) -> int:
        """Return into how many parts to take neurons, so that a part stays in the caches."""
        n, n_margins, _ = self.h.shape
        return min(n_neurons, 1 + n_neurons * self.X.shape[1] * n * n_margins // _IN_CACHE)
