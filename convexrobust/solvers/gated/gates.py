"""The linear map from gated neurons to outputs, its adjoint, and both around a curvature."""

from __future__ import annotations

import torch

_ROWS_IN_CACHE = 512  # at a time on a CPU, measured
_ROWS_ON_GPU = 65536


class Gates:
    """The map from U (d, C, P) to the outputs (n, C) and its adjoint, a chunk of rows at a time.

    ``D`` is (P, n): products of wide by tall matrices are a quarter faster than tall by narrow
    ones. The rows of a chunk are converted to ``dtype`` where X and D are of another one.
    """

    def __init__(self, X, D, dtype, chunk_size=None):
        default = _ROWS_IN_CACHE if X.device.type == "cpu" else _ROWS_ON_GPU
        self.X, self.D, self.dtype = X, D, dtype
        self.chunk_size = chunk_size or default

    def _chunks(self, rows):
        """Yield X, D, and the part of ``rows`` (n, ...) of every chunk."""
        X, D = self.X.split(self.chunk_size), self.D.split(self.chunk_size, dim=1)
        for x, d, part in zip(X, D, rows.split(self.chunk_size), strict=True):
            yield x.to(self.dtype), d.to(self.dtype), part

    def outputs(self, U):
        """Return the outputs, (n, C)."""
        d, C, P = U.shape
        flat = U.reshape(d, C * P).T.contiguous()
        parts = [
            (flat @ X.T).view(C, P, len(X)).mul_(D).sum(dim=1) for X, D, _ in self._chunks(self.X)
        ]
        return torch.cat(parts, dim=1).T

    def adjoint(self, R):
        """Return the gradients (d, C, P) from those with respect to the outputs, R (n, C)."""
        G = self._no_gradient(R)
        for X, D, r in self._chunks(R):
            G.addmm_((r.T[:, None] * D).reshape(len(G), len(X)), X)
        return self._as_weights(G)

    def curved(self, bend, U):
        """Return adjoint(bend outputs(U)) with bend (n, C, C), in one pass over the rows."""
        d, C, P = U.shape
        flat = U.reshape(d, C * P).T.contiguous()
        G = self._no_gradient(U.new_empty(0, C))
        for X, D, b in self._chunks(bend):
            F = (flat @ X.T).view(C, P, len(X)).mul_(D).sum(dim=1)
            R = b[:, 0, 0] * F if C == 1 else torch.einsum("kcb,bk->ck", b, F)
            G.addmm_((R[:, None] * D).reshape(len(G), len(X)), X)
        return self._as_weights(G)

    def among(self, patterns):
        """Return the same map of some of the patterns only."""
        return Gates(self.X, self.D[patterns], self.dtype, self.chunk_size)

    def _no_gradient(self, R):
        """Return zeros (C P, d), for outputs like R (n, C)."""
        return torch.zeros(
            R.shape[1] * len(self.D), self.X.shape[1], dtype=self.dtype, device=R.device
        )

    def _as_weights(self, G):
        """Return the gradients (C P, d) as (d, C, P)."""
        return G.T.reshape(self.X.shape[1], -1, len(self.D))
