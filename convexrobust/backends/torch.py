"""Atoms on torch tensors of any dtype and device, differentiable."""

from __future__ import annotations

import numpy as np
import torch

abs = torch.abs  # an atom is named for what it is, as in torch itself
sign = torch.sign
square = torch.square
multiply = torch.multiply
sum = torch.sum
outer = torch.outer
where = torch.where


def constant(array, like):
    """Return data as a tensor of the dtype and on the device of ``like``."""
    if not torch.is_tensor(array):
        # A read-only view (from broadcasting) is copied: torch would warn about sharing it.
        array = torch.as_tensor(np.require(array, requirements="W"))
    return array.to(dtype=like.dtype, device=like.device)


def maximum(A, B):
    """Elementwise maximum; B may be a number."""
    return torch.maximum(A, torch.as_tensor(B, dtype=A.dtype, device=A.device))


def minimum(A, B):
    """Elementwise minimum; B may be a number."""
    return torch.minimum(A, torch.as_tensor(B, dtype=A.dtype, device=A.device))


def limits(A):
    """The limits of the floating-point numbers of A, such as ``eps`` and ``tiny``."""
    return torch.finfo(A.dtype)


def pos(A):
    """Positive part, max(A, 0)."""
    return torch.relu(A)


def huber(A, delta):
    """A^2 / 2 where |A| <= delta, and delta (|A| - delta / 2) beyond."""
    size = torch.abs(A)
    inner = size.clamp_max(delta)
    return inner * (size - inner / 2.0)


def softplus(A):
    """log(1 + sum_j exp(A_kj)) for each row k of A (n, E); shape (n,)."""
    return torch.logsumexp(torch.nn.functional.pad(A, (1, 0)), dim=1)


def norm(A, q, axis):
    """The q-norm (q = 1, 2 or inf) along one axis."""
    return torch.linalg.vector_norm(A, ord=q, dim=axis)


def row_sum(A):
    """Sum of each row; shape (n,)."""
    return torch.sum(A, dim=1)


def row_max(A):
    """Largest entry of each row; shape (n,)."""
    return torch.amax(A, dim=1)


def falling(A):
    """The entries of each row in falling order."""
    return torch.sort(A, dim=1, descending=True).values


def columns(vectors):
    """Stack vectors of length n as the columns of one (n, E) tensor."""
    return torch.stack(list(vectors), dim=1)


def scatter(values, rows, n):
    """A vector of length n that holds ``values`` at ``rows`` and 0 elsewhere."""
    index = torch.as_tensor(rows, device=values.device)
    return torch.zeros(n, dtype=values.dtype, device=values.device).index_copy(0, index, values)


def take(values, index):
    """The entries of a vector at an integer matrix (m, q) of positions; shape (m, q)."""
    return values[torch.as_tensor(index, device=values.device)]
