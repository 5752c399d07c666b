"""The linear map from gated neurons to outputs, and its adjoint."""

from __future__ import annotations

import torch


class Gates:
    """The map from U (d, C, P) to the outputs (n, C) and its adjoint, a chunk of rows at a time.

    The rows of a chunk are converted to ``dtype`` on the fly where X and D are of another one.
    """

    def __init__(self, X, D, dtype, chunk_size):
        self.X, self.D, self.dtype, self.chunk_size = X, D, dtype, chunk_size

    def _chunks(self):
        for X, D in zip(self.X.split(self.chunk_size), self.D.split(self.chunk_size), strict=True):
            yield X.to(self.dtype), D.to(self.dtype)

    def outputs(self, U):
        """Return the outputs, (n, C)."""
        d, C, P = U.shape
        flat = U.reshape(d, C * P)
        return torch.cat(
            [((X @ flat).view(len(X), C, P) * D[:, None, :]).sum(2) for X, D in self._chunks()]
        )

    def adjoint(self, R):
        """Return the gradients (d, C, P) from those with respect to the outputs, R (n, C)."""
        C, P = R.shape[1], self.D.shape[1]
        G = torch.zeros(self.X.shape[1], C * P, dtype=self.dtype, device=R.device)
        for r, (X, D) in zip(R.split(self.chunk_size), self._chunks(), strict=True):
            G.addmm_(X.T, (r[:, :, None] * D[:, None, :]).view(len(X), C * P))
        return G.view(-1, C, P)

    def sizes(self, r):
        """Return the sum of the sizes of the rows of X times r >= 0, (d,)."""
        chunks = zip(self.X.split(self.chunk_size), r.split(self.chunk_size), strict=True)
        return sum(X.abs().T @ part for X, part in chunks)

    def among(self, patterns):
        """Return the same map of some of the patterns only."""
        return Gates(self.X, self.D[:, patterns], self.dtype, self.chunk_size)
