"""The linear map from gated neurons to outputs, its adjoint, and both around a curvature."""

from __future__ import annotations

import torch


class Gates:
    """The map from U (d, C, P) to the outputs (n, C) and its adjoint, a chunk of rows at a time.

    ``D`` is (P, n): products of wide by tall matrices are a quarter faster than tall by narrow
    ones. The rows of a chunk are converted to ``dtype`` where X and D are of another one.
    """

    def __init__(self, X, D, dtype, chunk_size):
        self.X, self.D, self.dtype, self.chunk_size = X, D, dtype, chunk_size

    def _chunks(self):
        """Yield X and D of every chunk."""
        X, D = self.X.split(self.chunk_size), self.D.split(self.chunk_size, dim=1)
        for x, d in zip(X, D, strict=True):
            yield x.to(self.dtype), d.to(self.dtype)

    def outputs(self, U):
        """Return the outputs, (n, C)."""
        d, C, P = U.shape
        flat = U.reshape(d, C * P).T.contiguous()
        parts = [(flat @ X.T).view(C, P, len(X)).mul_(D).sum(dim=1) for X, D in self._chunks()]
        return torch.cat(parts, dim=1).T

    def adjoint(self, R):
        """Return the gradients (d, C, P) from those with respect to the outputs, R (n, C)."""
        G = self._no_gradient(R.shape[1])
        for (X, D), r in zip(self._chunks(), R.split(self.chunk_size), strict=True):
            G.addmm_((r.T[:, None] * D).reshape(len(G), len(X)), X)
        return self._as_weights(G)

    def curved(self, bend, U):
        """Return adjoint(bend outputs(U)) with bend (n, C, C), in one pass over the rows."""
        d, C, P = U.shape
        flat = U.reshape(d, C * P).T.contiguous()
        G = self._no_gradient(C)
        for (X, D), b in zip(self._chunks(), bend.split(self.chunk_size), strict=True):
            F = (flat @ X.T).view(C, P, len(X)).mul_(D).sum(dim=1)
            R = b[:, 0, 0] * F if C == 1 else torch.einsum("kcb,bk->ck", b, F)
            G.addmm_((R[:, None] * D).reshape(len(G), len(X)), X)
        return self._as_weights(G)

    def among(self, patterns):
        """Return the same map of some of the patterns only."""
        return Gates(self.X, self.D[patterns], self.dtype, self.chunk_size)

    def _no_gradient(self, C):
        """Return zeros (C P, d)."""
        shape = C * len(self.D), self.X.shape[1]
        return torch.zeros(shape, dtype=self.dtype, device=self.X.device)

    def _as_weights(self, G):
        """Return the gradients (C P, d) as (d, C, P)."""
        return G.T.reshape(self.X.shape[1], -1, len(self.D))
