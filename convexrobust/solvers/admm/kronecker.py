r"""Least squares in the neurons with the copies of a splitting method, solved exactly.

Minimises over V_c, W_c (d x P), with :math:`\Delta = V - W` and u over all of them,

.. math::

    \tfrac{\rho_m}{2} \sum_e \Big\| \sum_c T_{ec} \circ D \Delta_c' - \tilde M_e \Big\|^2
    + \tfrac{\rho_h}{2} \sum_u \|X u - \tilde h_u\|^2
    + \tfrac{\rho_z}{2} \sum_u \|u - \tilde z_u\|^2.

The normal operator of V + W is :math:`\rho_h X'X + \rho_z I`, that of :math:`\Delta` has
:math:`2 \rho_m G` on the other side, G (CP x CP) the Gram matrix of the patterns weighted by the
margins. With the eigenvectors of X'X and of G both are diagonal, whatever the weights; with few
rows `Gram` keeps to their span.
"""

from __future__ import annotations

import torch

from convexrobust.solvers.admm.gram import Gram


class KroneckerLeastSquares:
    """The normal equations of a program's copies.

    Parameters
    ----------
    gram : Gram
        X'X of the data.
    D : Tensor of shape (n, P)
        Patterns, 0/1.
    directions : Tensor of shape (n, E, C)
        How the margins depend on the outputs, T.
    """

    def __init__(self, gram: Gram, D, directions):
        self.gram, self.D, self.directions = gram, D, directions
        self.n_outputs, self.P = directions.shape[2], D.shape[1]
        self.trivial = self.n_outputs == 1
        columns, vectors = torch.linalg.eigh(self._pattern_gram().double())
        self.columns, self.columns_vectors = columns.clamp_min(0.0).to(D.dtype), vectors.to(D.dtype)

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
        rotated = self._flat(own[0] - own[1] + 2.0 * shared) @ self.columns_vectors
        both = torch.stack([self._flat(own[0] + own[1]), rotated])
        both = self.gram.solve(self.gram.inverse(rho_h, self.shifts(rho_m, rho_z)), both)
        total, difference = self._outputs(both[0]), self._outputs(both[1] @ self.columns_vectors.T)
        return torch.stack([total + difference, total - difference]) / 2.0

    def shifts(self, rho_m, rho_z):
        """Return what is added to rho_h X'X (2, 1, C P): of V + W, and of V - W rotated."""
        of_difference = rho_z + 2.0 * rho_m * self.columns
        return torch.stack([torch.full_like(of_difference, rho_z), of_difference])[:, None]

    def _flat(self, A):
        """Bring (C, d, P) into (d, C P)."""
        return A[0] if self.trivial else A.permute(1, 0, 2).reshape(A.shape[1], -1)

    def _outputs(self, A):
        """Bring (d, C P) into (C, d, P)."""
        if self.trivial:
            return A[None]
        return A.reshape(A.shape[0], self.n_outputs, self.P).permute(1, 0, 2)
