r"""Two-layer ReLU networks, and the map between them and the convex variables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from convexrobust.program import Solution


@dataclass(frozen=True, eq=False)
class TwoLayerReLU:
    r"""The network :math:`f(x) = \sum_j (u_j'x)_+ \alpha_j + b`.

    Parameters
    ----------
    hidden : ndarray of shape (d, m)
        Hidden weights, u_j as columns. With ``intercept`` the last row multiplies the constant 1.
    output : ndarray of shape (m, C)
        Output weights, alpha_j as rows.
    intercept : bool
        Whether the last row of ``hidden`` is a bias.
    offset : ndarray of shape (C,), optional
        Output bias b, 0 by default.

    Raises
    ------
    ValueError
        For arrays of other shapes, or with entries that are not finite.
    """

    hidden: np.ndarray
    output: np.ndarray
    intercept: bool = True
    offset: np.ndarray | None = None

    def __post_init__(self):
        for name in ("hidden", "output"):
            value = np.asarray(getattr(self, name), dtype=np.float64)
            if value.ndim != 2 or not np.isfinite(value).all():
                raise ValueError(f"{name} must be a finite matrix, got shape {value.shape}.")
            object.__setattr__(self, name, value)
        if self.hidden.shape[1] != self.output.shape[0]:
            raise ValueError(
                f"hidden {self.hidden.shape} is (d, m) and output {self.output.shape} must be "
                "(m, C): the number of neurons m differs."
            )
        offset = np.zeros(self.n_outputs) if self.offset is None else np.asarray(self.offset, float)
        if offset.shape != (self.n_outputs,) or not np.isfinite(offset).all():
            raise ValueError(f"offset must be finite of shape ({self.n_outputs},).")
        object.__setattr__(self, "offset", offset)

    @classmethod
    def from_solution(cls, solution: Solution, *, intercept=True, offset=None) -> TwoLayerReLU:
        r"""Return the network of a convex solution, balanced and without zero neurons.

        A column v of V_c becomes :math:`u = v / \sqrt{\|v\|}` with output weight
        :math:`+\sqrt{\|v\|}` on output c, a column of W_c the same with a minus sign, so that
        :math:`\tfrac12 (\|u\|^2 + \alpha^2) = \|v\|` (following Pilanci and Ergen).
        """
        n_outputs, d, _ = solution.V.shape
        hidden, output = [np.zeros((d, 0))], [np.zeros((0, n_outputs))]
        for c in range(n_outputs):
            for columns, sign in ((solution.V[c], 1.0), (solution.W[c], -1.0)):
                length = np.linalg.norm(columns, axis=0)
                root = np.sqrt(length[length > 0.0])
                hidden.append(columns[:, length > 0.0] / root)
                output.append(sign * root[:, None] * np.eye(n_outputs)[c])
        return cls(np.hstack(hidden), np.vstack(output), intercept, offset)

    @property
    def n_features(self) -> int:
        """The number of input features, the intercept not counted."""
        return self.hidden.shape[0] - self.intercept

    @property
    def n_neurons(self) -> int:
        """The number of hidden neurons m."""
        return self.hidden.shape[1]

    @property
    def n_outputs(self) -> int:
        """The number of outputs C."""
        return self.output.shape[1]

    def design(self, X) -> np.ndarray:
        """Return X (n, n_features) with the intercept column that ``hidden`` expects."""
        X = np.asarray(X, dtype=np.float64)
        if X.ndim != 2 or X.shape[1] != self.n_features:
            raise ValueError(
                f"X must have shape (n, {self.n_features}) for this network, got {X.shape}."
            )
        if not np.isfinite(X).all():
            raise ValueError("X must be finite: it holds NaN or infinite values.")
        return np.hstack([X, np.ones((len(X), 1))]) if self.intercept else X

    def predict(self, X) -> np.ndarray:
        """Return the outputs, shape (n, C)."""
        return np.maximum(self.design(X) @ self.hidden, 0.0) @ self.output + self.offset

    def gates(self, X) -> np.ndarray:
        """Return which neurons are active at X, the pattern matrix D (n, m) of 0/1."""
        return (self.design(X) @ self.hidden >= 0.0).astype(np.int8)

    def gradient(self, X, directions) -> np.ndarray:
        """Return the gradient of ``sum_c directions_kc f_c(x_k)`` in x_k, shape (n, n_features)."""
        weights = self.gates(X) * (np.asarray(directions) @ self.output.T)
        return weights @ self.hidden[: self.n_features].T

    def pruned(self, tolerance=1e-6) -> TwoLayerReLU:
        """Return the network without neurons that are shorter than ``tolerance`` of the longest.

        The length of a neuron is that of its hidden times that of its output weights.
        """
        length = np.linalg.norm(self.hidden, axis=0) * np.linalg.norm(self.output, axis=1)
        keep = length > tolerance * length.max(initial=0.0)
        return replace(self, hidden=self.hidden[:, keep], output=self.output[keep])

    def to_convex(self, X, D) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the network as a point of the convex programs on data X.

        Parameters
        ----------
        X : ndarray of shape (n, n_features)
            Data.
        D : ndarray of shape (n, P)
            Patterns of the program; those of the network that are missing are appended.

        Returns
        -------
        V, W : ndarray of shape (C, d, P')
            Neurons with the same pattern and output are merged, so the penalty does not grow.
        D : ndarray of shape (n, P')
            The patterns, the given ones first.

        Notes
        -----
        The offset is not part of the point. It is feasible for the nominal programs and for every
        soft one; the hard robust program asks in addition that no neuron changes sign.
        """
        gates = self.gates(X)
        known = {column.tobytes(): i for i, column in enumerate(np.asarray(D, dtype=np.int8).T)}
        new = [g for g in dict.fromkeys(g.tobytes() for g in gates.T) if g not in known]
        known.update({g: len(known) + i for i, g in enumerate(new)})
        place = [known[g.tobytes()] for g in gates.T]
        if new:
            D = np.hstack([D, np.array([np.frombuffer(g, dtype=np.int8) for g in new]).T])
        V = np.zeros((self.n_outputs, self.hidden.shape[0], D.shape[1]))
        W = np.zeros_like(V)
        for j, i in enumerate(place):
            V[:, :, i] += np.outer(np.maximum(self.output[j], 0.0), self.hidden[:, j])
            W[:, :, i] += np.outer(np.maximum(-self.output[j], 0.0), self.hidden[:, j])
        return V, W, D

    def to_torch(self):
        """Return the network as a float64 ``torch.nn.Sequential(Linear, ReLU, Linear)``."""
        try:
            import torch
        except ImportError as error:
            raise ImportError("to_torch needs torch: pip install 'convexrobust[torch]'.") from error

        d, m = self.n_features, self.n_neurons
        first = torch.nn.Linear(d, m, bias=self.intercept, dtype=torch.float64)
        last = torch.nn.Linear(m, self.n_outputs, dtype=torch.float64)
        with torch.no_grad():
            first.weight.copy_(torch.as_tensor(self.hidden[:d].T))
            if self.intercept:
                first.bias.copy_(torch.as_tensor(self.hidden[d]))
            last.weight.copy_(torch.as_tensor(self.output.T))
            last.bias.copy_(torch.as_tensor(self.offset))
        return torch.nn.Sequential(first, torch.nn.ReLU(), last)
