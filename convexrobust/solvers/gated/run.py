"""What all steps of the gated solver share: the data, the best bounds, and points between them."""

from __future__ import annotations

import time
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from convexrobust.solvers.gated.bound import lower_bound
from convexrobust.solvers.gated.gates import Gates
from convexrobust.solvers.gated.smoothing import SmoothLoss

_COVARIANCE = 8  # products with all neurons that X'X may cost
# Outputs of all neurons at a time: on a CPU they stay in its caches, with 256 rows at least.
_ON_CPU, _ON_GPU, _FEWEST_ROWS = 2**16, 2**26, 256


class Point(NamedTuple):
    """An iterate in float64.

    ``F`` are the outputs at U; ``R`` and ``G`` the derivatives of the rounded loss in the outputs
    and in the weights, at U or at the nearby outputs ``f`` that a dual method found.
    """

    U: torch.Tensor
    F: torch.Tensor
    f: torch.Tensor
    R: torch.Tensor
    G: torch.Tensor


class Run:
    """One run of `solve_gated`: the data, the best certified point and bound.

    Attributes
    ----------
    gates, exact : Gates
        The map to the outputs in the precision of the steps, and in float64.
    loss : SmoothLoss
        The mean loss.
    best, objective
        The best weights (d, C, P) so far, and their objective.
    multipliers, lower_bound
        The best dual point so far, and its bound.
    lipschitz : float
        An estimate of the largest curvature of the loss.
    """

    def __init__(self, program, dtype, device, chunk_size):
        self.clock = time.perf_counter()
        self.program, self.beta = program, program.regularizer.beta
        X = torch.as_tensor(np.require(program.sets.center, requirements="CW"), device=device)
        D = torch.as_tensor(np.array(program.D, dtype=np.int8), device=device)
        D = D.T.contiguous()
        if chunk_size is None:
            room = _ON_CPU if X.device.type == "cpu" else _ON_GPU
            chunk_size = max(room // (program.n_outputs * len(D)), _FEWEST_ROWS)
        self.exact = Gates(X, D, torch.float64, chunk_size)
        self.gates = Gates(X.to(dtype), D.to(dtype), dtype, chunk_size)
        self.loss = SmoothLoss(program, device)
        self.n_iter, self.history = 0, []
        self.best, self.objective = None, np.inf
        self.multipliers, self.lower_bound = None, -np.inf
        self.lipschitz = self._first_lipschitz()

    @property
    def seconds(self) -> float:
        """Wall time since the run was made."""
        return time.perf_counter() - self.clock

    @property
    def gap(self) -> float:
        """Relative gap between the best objective and the best bound."""
        return (self.objective - self.lower_bound) / max(self.objective, np.finfo(float).tiny)

    @cached_property
    def kernel(self):
        """The matrix X X', (n, n)."""
        return self.exact.X @ self.exact.X.T

    @cached_property
    def lengths(self):
        """The lengths of the rows of X, (n,)."""
        return self.exact.X.norm(dim=1)

    @cached_property
    def covariance(self):
        """Eigenvalues and eigenvectors of X'X / n, of as many rows as cost a few products."""
        _, d, P = self.program.shape
        step = -(-d // (_COVARIANCE * P))
        X = self.gates.X[:: max(min(step, len(self.gates.X) // (8 * d)), 1)]
        return torch.linalg.eigh((X.T @ X).to(torch.float64) / len(X))

    def _first_lipschitz(self):
        """Return an estimate from below of the largest curvature of the loss at U = 0.

        A start only: every step checks its bound and raises the constant where it fails.
        """
        C, d, P = self.program.shape
        device = self.exact.X.device
        V = torch.randn(d, C, P, generator=torch.Generator().manual_seed(0)).to(device)
        bend = self.loss.curvature(torch.zeros(len(self.program.X), C, device=device).double())
        length = 0.0
        for _ in range(3):
            V = self.curved(self.gates, bend, V / V.norm())
            length = float(V.norm())
            if length == 0.0:
                break
        return 1.05 * length or 1.0

    @staticmethod
    def curved(gates, bend, V):
        """Return the second derivative of the loss times V, in the precision of the gates."""
        return gates.curved(bend.to(gates.dtype), V.to(gates.dtype)).to(bend.dtype)

    def penalty(self, U) -> float:
        """Return the penalty of the weights."""
        return self.beta * float(U.norm(dim=0).sum())

    def certify(self, U, F=None, f=None, G=None) -> Point:
        """Return the point at U after recording its objective, and the bound of its derivative.

        Raises FloatingPointError, with nothing recorded, if the objective is not finite.
        """
        U = U.to(torch.float64)
        F = self.exact.outputs(U) if F is None else F
        f = F if f is None else f
        multipliers, R = self.loss.derivative(f)
        G = self.exact.adjoint(R) if G is None else G
        objective = self.loss.true_value(F) + self.penalty(U)
        if not np.isfinite(objective):
            raise FloatingPointError("the objective is not finite")
        size = float(self.lengths @ multipliers.sum(dim=1))
        a = multipliers.cpu().numpy()
        bound = lower_bound(self.program, a, float(G.norm(dim=0).max()), size)
        if objective < self.objective:
            self.best, self.objective = U, objective
        if bound > self.lower_bound:
            self.multipliers, self.lower_bound = a, bound
        self.history.append((self.n_iter, self.seconds, objective, bound))
        return Point(U, F, f, R, G)

    def shrunk(self, Z, step):
        """Return the proximal point of the penalty and the share of its length each keeps."""
        kept = torch.relu(1.0 - step * self.beta / Z.norm(dim=0).clamp_min(1e-300))
        return Z * kept, kept
