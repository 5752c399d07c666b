r"""Least squares in the neurons with the copies of a splitting method, solved exactly.

Minimises over V_c, W_c (d x P), with :math:`\Delta = V - W` and u over all of them,

.. math::

    \tfrac{\rho_m}{2} \sum_e \Big\| \sum_c T_{ec} \circ D \Delta_c' - \tilde M_e \Big\|^2
    + \tfrac{\rho_h}{2} \sum_u \|X u - \tilde h_u\|^2
    + \tfrac{\rho_z}{2} \sum_u \|u - \tilde z_u\|^2.

The normal operator of V + W is :math:`\rho_h X'X + \rho_z I`, that of :math:`\Delta` has
:math:`2 \rho_m G` on the other side, G (CP x CP) the Gram matrix of the patterns weighted by the
margins. With the eigenvectors of X'X and of G both are diagonal, whatever the weights.
"""

from __future__ import annotations

import torch


class KroneckerLeastSquares:
    """The normal equations of a program's copies.

    Parameters
    ----------
    X : Tensor of shape (n, d)
        Data.
    D : Tensor of shape (n, P)
        Patterns, 0/1.
    directions : Tensor of shape (n, E, C)
        How the margins depend on the outputs, T.
    """

    def __init__(self, X, D, directions):
        self.D, self.directions = D, directions
        self.n_outputs, self.P = directions.shape[2], D.shape[1]
        self.trivial = self.n_outputs == 1
        self.rows, self.rows_vectors = _eigen(X.T @ X)
        self.columns, self.columns_vectors = _eigen(self._pattern_gram())

    def _pattern_gram(self):
        """Return G, block (c, c') being D' diag_k(sum_e T_kec T_kec') D."""
        weights = torch.einsum("kec,kef->kcf", self.directions, self.directions)
        blocks = [
            torch.cat([self.D.T @ (weights[:, c, f, None] * self.D) for f in range(self.n_outputs)])
            for c in range(self.n_outputs)
        ]
        return torch.cat(blocks, dim=1)

    def slopes(self, difference):
        """Return the slopes of the margins (E, n, d) for V - W of shape (C, d, P)."""
        slopes = self.D @ difference.transpose(1, 2)
        if self.trivial:
            return self.directions.permute(1, 0, 2) * slopes
        return torch.einsum("kec,ckd->ekd", self.directions, slopes)

    def slopes_adjoint(self, M):
        """Return the adjoint of `slopes`: (E, n, d) gives (C, d, P)."""
        if self.trivial:
            weighted = torch.sum(self.directions.permute(1, 0, 2) * M, dim=0, keepdim=True)
        else:
            weighted = torch.einsum("kec,ekd->ckd", self.directions, M)
        return weighted.transpose(1, 2) @ self.D

    def solve(self, rho, M, XH, Z):
        """Return U of shape (2, C, d, P), V and W, for the weights (m, h, z) and the targets.

        M is (E, n, d), Z (2, C, d, P), and XH = X'H of that shape stands for the targets H.
        """
        rho_m, rho_h, rho_z = rho
        shared = rho_m * self.slopes_adjoint(M)
        own = rho_h * XH + rho_z * Z
        diagonal = rho_h * self.rows[:, None] + rho_z
        total = self.rows_vectors @ ((self.rows_vectors.T @ (own[0] + own[1])) / diagonal)
        right = self._flat(own[0] - own[1] + 2.0 * shared)
        rotated = self.rows_vectors.T @ right @ self.columns_vectors
        rotated = rotated / (diagonal + 2.0 * rho_m * self.columns)
        difference = self._outputs(self.rows_vectors @ rotated @ self.columns_vectors.T)
        return torch.stack([total + difference, total - difference]) / 2.0

    def _flat(self, A):
        """Bring (C, d, P) into (d, C P)."""
        return A[0] if self.trivial else A.permute(1, 0, 2).reshape(A.shape[1], -1)

    def _outputs(self, A):
        """Bring (d, C P) into (C, d, P)."""
        if self.trivial:
            return A[None]
        return A.reshape(A.shape[0], self.n_outputs, self.P).permute(1, 0, 2)


def _eigen(gram):
    """Return eigenvalues (at least 0) and eigenvectors of a Gram matrix, computed in float64."""
    values, vectors = torch.linalg.eigh(gram.double())
    return values.clamp_min(0.0).to(gram.dtype), vectors.to(gram.dtype)
