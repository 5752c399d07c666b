"""Sums of small symmetric matrices at places of a large one; see `interior_point.rows`."""

from __future__ import annotations

from convexrobust.solvers.kernels.compiling import compiled


@compiled
def add_at(G, rows, P):
    """Add the lower triangle of P (m, m) to G at the ``rows`` (m,), which ascend."""
    for i in range(rows.size):
        for j in range(i + 1):
            G[rows[i], rows[j]] += P[i, j]
