r"""The convex program of (adversarial) training.

With data X (n x d, the last column the constant 1 if ``intercept``), patterns D (n x P, 0/1),
S = 2D - 1 and one weight matrix pair V_c, W_c (d x P) for each output c, the network's output is

.. math:: f_c(x_k) = \sum_i D_{ki}\, x_k'(v_{ci} - w_{ci})

and the slope of sample k is :math:`q_{kc} = \sum_i D_{ki} (v_{ci} - w_{ci})`. Let :math:`\rho_k`
be the support function of the perturbation set around x_k. A neuron v on pattern i leaves its
robust cone at sample k by :math:`s_k(v) = (\rho_k(v) - S_{ki} x_k'v)_+`. Then over the whole set

.. math::

    z_k - \rho_k(q_k) - \sum_i s_k(w_i) \;\le\; f(x_k + \delta) \;\le\;
    z_k + \rho_k(q_k) + \sum_i s_k(v_i)

for *any* V, W and D. Training minimises the worst loss over this interval plus the group norm:

.. math:: \min_{V, W}\ \sum_k \omega_k \varphi(m_k)
          + \beta \sum_{c,i} (\|v_{ci}\|_2 + \|w_{ci}\|_2),

where the margins m_k are lower ends of such intervals. The *formulation* says how s is treated:
"hard" is the published program (all s = 0 as constraints; Bai, Gautam, Gai and Sojoudi,
arXiv 2105.12237), "one-sided" keeps only the cone rows that the margins can see, "soft" has no
constraints and charges s to the margins. With epsilon = 0 they are the nominal programs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from convexrobust.backends import numpy as numpy_backend
from convexrobust.duality import Multipliers, lower_bound
from convexrobust.losses import Loss
from convexrobust.margins import MarginMap, check_loss, margin_map
from convexrobust.perturbations import LpBall, Neighbourhoods
from convexrobust.regularizers import GroupLasso
from convexrobust.solution import Progress as Progress
from convexrobust.solution import Scope as Scope
from convexrobust.solution import Solution
from convexrobust.solution import Status as Status

FORMULATIONS = ("hard", "one-sided", "soft")


@dataclass(frozen=True, eq=False)
class ConvexProgram:
    """Convex training of a two-layer ReLU network on given activation patterns.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Data; with ``intercept`` the last column is the constant 1.
    y : ndarray of shape (n,)
        Targets; -1 / +1 for classification with one output, class numbers 0 .. C-1 with several.
    D : ndarray of shape (n, P)
        Activation patterns, 0/1, one a column.
    loss : Loss
        Its task says which margins are meant.
    regularizer : GroupLasso
        Weight decay.
    perturbation : LpBall
        The threat model on the features; epsilon = 0 is nominal training.
    formulation : {"soft", "one-sided", "hard"}
        Treatment of the robust cones; see the module's text. For a regression loss both ends of
        the interval count, so that "one-sided" has the same rows as "hard".
    sample_weight : ndarray of shape (n_samples,), optional
        Weights, used in proportion to their sum: the loss is a weighted mean. One a row, or with
        ``copy_of`` one a sample.
    intercept : bool
        The last column of X is the intercept, which no perturbation changes.
    n_outputs : int
        C.
    copy_of : ndarray of shape (n,) of int, optional
        Row k is a perturbed copy of sample ``copy_of[k]``, one of 0 .. n_samples - 1, each of which
        has a copy. The loss of a sample is the largest over its copies. By default every row is a
        sample of its own.

    Notes
    -----
    Variables are passed as ``V, W``, indexable by output: arrays of shape (C, d, P), or lists of C
    cvxpy variables (d, P). Every method that takes a backend ``xp`` is one formula for all three.
    """

    X: np.ndarray
    y: np.ndarray
    D: np.ndarray
    loss: Loss
    regularizer: GroupLasso
    perturbation: LpBall
    formulation: str = "soft"
    sample_weight: np.ndarray | None = None
    intercept: bool = True
    n_outputs: int = 1
    copy_of: np.ndarray | None = None

    def __post_init__(self):
        if self.formulation not in FORMULATIONS:
            raise ValueError(
                f"formulation must be one of {FORMULATIONS}, got {self.formulation!r}."
            )
        check_loss(self.loss, self.n_outputs)
        n = len(self.X)
        if np.ndim(self.D) != 2 or len(self.D) != n:
            raise ValueError(
                f"patterns have shape {np.shape(self.D)} but X has {n} rows: D must be (n, P) and "
                "belong to this X. Sample it from the same data, or pass gates to `patterns_of`."
            )
        if not np.isin(self.D, (0, 1)).all():
            raise ValueError("patterns D must hold only 0 and 1.")
        if len(self.y) != n:
            raise ValueError(f"y has {len(self.y)} entries but X has {n} rows.")
        self._check_copies(n)
        self._check_labels()

    def _check_copies(self, n):
        if self.copy_of is None:
            return
        samples = np.asarray(self.copy_of)
        if samples.shape != (n,) or not np.issubdtype(samples.dtype, np.integer):
            raise ValueError(f"copy_of must hold one integer for each of the {n} rows of X.")
        if not np.array_equal(np.unique(samples), np.arange(samples.max(initial=-1) + 1)):
            raise ValueError(
                "copy_of must name the samples 0 .. n_samples - 1, each at least once; got "
                f"{np.unique(samples)[:5]}. Number them by np.unique(..., return_inverse=True)."
            )

    def _check_labels(self):
        if self.loss.task != "classification":
            if self.n_outputs != 1:
                raise ValueError("n_outputs must be 1 for a regression loss.")
            return
        legal = (-1, 1) if self.n_outputs == 1 else range(self.n_outputs)
        if not np.isin(self.y, list(legal)).all():
            raise ValueError(
                f"y must hold only {list(legal)} for a classification loss with "
                f"n_outputs={self.n_outputs}; got {np.unique(self.y)[:5]}."
            )

    # ---------------------------------------------------------------- data, once per program

    @cached_property
    def sets(self) -> Neighbourhoods:
        """The perturbation sets around the rows of X."""
        return self.perturbation.around(self.X, intercept=self.intercept)

    @cached_property
    def weight(self) -> np.ndarray:
        """Weights of the samples, summing to 1; shape (n_samples,)."""
        weight = np.ones(self.n_samples) if self.sample_weight is None else self.sample_weight
        weight = np.asarray(weight, dtype=np.float64)
        if weight.shape != (self.n_samples,) or np.any(weight < 0) or not np.sum(weight) > 0:
            raise ValueError(
                f"sample_weight must have shape (n_samples,) = ({self.n_samples},), at least 0, "
                "with a positive sum."
            )
        return weight / np.sum(weight)

    @cached_property
    def samples(self) -> np.ndarray:
        """The sample of each row: ``copy_of``, or the row itself; shape (n,)."""
        return np.arange(len(self.X)) if self.copy_of is None else np.asarray(self.copy_of)

    @property
    def n_samples(self) -> int:
        """The number of samples: of rows, copies of one sample not counted."""
        return int(self.samples.max()) + 1

    @cached_property
    def copies(self) -> np.ndarray:
        """The rows of each sample's copies, the last one repeated; shape (n_samples, most)."""
        order, counts = np.argsort(self.samples, kind="stable"), np.bincount(self.samples)
        place = np.minimum(np.arange(counts.max()), counts[:, None] - 1)
        return order[(np.cumsum(counts) - counts)[:, None] + place]

    @cached_property
    def signs(self) -> np.ndarray:
        """S = 2D - 1, float; shape (n, P)."""
        return 2.0 * np.asarray(self.D, dtype=np.float64) - 1.0

    @cached_property
    def margin_map(self) -> MarginMap:
        """How the margins depend on the outputs."""
        return margin_map(self.loss, np.asarray(self.y), self.n_outputs)

    @cached_property
    def rows_v(self) -> list[np.ndarray]:
        """For each output the rows at which a neuron of V has a cone row or a slack."""
        return self._cone_rows(-1)

    @cached_property
    def rows_w(self) -> list[np.ndarray]:
        """For each output the rows at which a neuron of W has a cone row or a slack."""
        return self._cone_rows(+1)

    def _cone_rows(self, sign):
        if self.formulation == "hard":
            return [np.arange(len(self.X))] * self.n_outputs
        used = (sign * self.margin_map.directions > 0).any(axis=1)
        return [np.flatnonzero(used[:, c]) for c in range(self.n_outputs)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, d, P) of V and of W."""
        return self.n_outputs, self.X.shape[1], self.D.shape[1]

    def certified(self) -> ConvexProgram:
        """Return the soft program of the same data: valid for every V and W, feasible or not."""
        return self if self.formulation == "soft" else replace(self, formulation="soft")

    # ---------------------------------------------------------------- the one formula

    def slopes(self, xp, V, W):
        """Return the slopes of the outputs, a list of C matrices (n, d): q_kc as row k."""
        D = xp.constant(self.D, V[0])
        return [D @ (V[c] - W[c]).T for c in range(self.n_outputs)]

    def outputs(self, xp, slopes):
        """Return the outputs at the centres of the sets, a list of C vectors (n,)."""
        X = xp.constant(self.sets.center, slopes[0])
        return [xp.row_sum(xp.multiply(X, Q)) for Q in slopes]

    def margin_slopes(self, xp, slopes):
        """Return the slopes of the margins, a dict from each distinct margin to (n, d)."""
        return {e: self._combined(xp, e, slopes) for e in sorted(set(self.margin_map.slope_of))}

    def cone_gap(self, xp, U, rows, radius=None):
        r"""Return :math:`\rho_k(u_i) - S_{ki} x_k'u_i`, positive outside the robust cone.

        U is (d, P); shape (len(rows), P).
        """
        X, S = xp.constant(self.sets.center[rows], U), xp.constant(self.signs[rows], U)
        return self.sets.support_pairs(xp, U, rows, radius) - xp.multiply(S, X @ U)

    def margins_from(self, xp, outputs, supports, slacks_v, slacks_w):
        """Return the worst-case margins (n, E) from their parts.

        ``outputs`` as from `outputs`; ``supports`` the support of each slope; ``slacks_v`` and
        ``slacks_w`` for each output the sums of slacks at its cone rows, or None without any.
        """
        n, margins = len(self.X), []
        v = [self._on_all_rows(xp, s, r, n) for s, r in zip(slacks_v, self.rows_v, strict=True)]
        w = [self._on_all_rows(xp, s, r, n) for s, r in zip(slacks_w, self.rows_w, strict=True)]
        for e, slope in enumerate(self.margin_map.slope_of):
            margin = self._combined(xp, e, outputs) - supports[slope]
            margin = margin + xp.constant(self.margin_map.offsets[:, e], outputs[0])
            for c in range(self.n_outputs):
                direction = self.margin_map.directions[:, e, c]
                for slack, paid in ((v[c], -direction), (w[c], direction)):
                    if slack is not None and (paid > 0.0).any():
                        paid = xp.constant(np.maximum(paid, 0.0), outputs[0])
                        margin = margin - xp.multiply(paid, slack)
            margins.append(margin)
        return xp.columns(margins)

    def margins(self, xp, V, W, radius=None):
        """Return the worst-case margins, concave in V and W; shape (n, E)."""
        slopes = self.slopes(xp, V, W)
        supports = {
            e: self.sets.support(xp, Q, radius) for e, Q in self.margin_slopes(xp, slopes).items()
        }
        slacks = [[None] * self.n_outputs] * 2
        if self.formulation == "soft":
            slacks = [
                [
                    xp.row_sum(xp.pos(self.cone_gap(xp, U[c], rows[c], radius)))
                    for c in range(len(U))
                ]
                for U, rows in ((V, self.rows_v), (W, self.rows_w))
            ]
        return self.margins_from(xp, self.outputs(xp, slopes), supports, *slacks)

    def safe_margins(self, V, W) -> np.ndarray:
        """Return the margins (n, E) in float64, less the most that rounding may have added.

        A sum of N products is off by N units of rounding of the sum of their sizes at most. The
        sizes are those of all weights times the largest point of each set.
        """
        weights = np.abs(V).sum(axis=(0, 2)) + np.abs(W).sum(axis=(0, 2))
        largest = np.abs(self.sets.center) + self.sets.reach
        largest = largest * max(1.0, np.max(self.loss.margin_scales))
        size = largest @ weights + np.abs(self.margin_map.offsets).max(axis=1, initial=0.0)
        n_terms = sum(self.shape) + 8
        rounding = 2.0 * n_terms * np.finfo(float).eps * size
        return self.margins(numpy_backend, V, W) - rounding[:, None]

    def mean_loss(self, xp, margins):
        """Return the weighted mean loss of given margins, of each sample at its worst copy."""
        losses = self.loss.value(xp, margins)
        if tuple(losses.shape) != (len(self.X),):  # else broadcasting would sum over pairs of rows
            raise ValueError(
                f"loss.value must return one number a row, shape ({len(self.X)},); "
                f"{type(self.loss).__name__} returned shape {tuple(losses.shape)}."
            )
        if self.copy_of is not None:
            losses = xp.row_max(xp.take(losses, self.copies))
        return xp.sum(xp.multiply(xp.constant(self.weight, losses), losses))

    def penalty(self, xp, V, W, beta=None):
        """Return the regulariser of all outputs; ``beta`` overrides its strength."""
        return sum(self.regularizer.value(xp, u, beta) for U in (V, W) for u in U)

    def objective(self, xp, V, W):
        """Return the weighted mean loss plus the penalty; cones are not looked at."""
        return self.mean_loss(xp, self.margins(xp, V, W)) + self.penalty(xp, V, W)

    def cone_violation(self, V, W) -> float:
        """Return the largest violation of a cone row that this formulation demands (0 if soft)."""
        if self.formulation == "soft":
            return 0.0
        gaps = [
            self.cone_gap(numpy_backend, U[c], rows[c])
            for U, rows in ((V, self.rows_v), (W, self.rows_w))
            for c in range(self.n_outputs)
        ]
        return float(max((gap.max(initial=0.0) for gap in gaps), default=0.0))

    def _combined(self, xp, e, of_output):
        """Return sum_c T_kec * of_output[c], whose entries are (n,) or (n, d)."""
        parts = []
        for c, values in enumerate(of_output):
            direction = self.margin_map.directions[:, e, c]
            if np.all(direction == 1.0):
                parts.append(values)
            elif direction.any():
                if len(values.shape) == 2:
                    direction = np.repeat(direction[:, None], values.shape[1], axis=1)
                parts.append(xp.multiply(xp.constant(direction, values), values))
        return sum(parts[1:], start=parts[0])

    @staticmethod
    def _on_all_rows(xp, slack, rows, n):
        if slack is None or len(rows) == 0:
            return None
        return slack if len(rows) == n else xp.scatter(slack, rows, n)

    # ---------------------------------------------------------------- what solvers hand in

    def lower_bound(self, multipliers: Multipliers) -> float:
        """Return a valid lower bound on the optimal value from any dual point."""
        return lower_bound(self, multipliers)

    def solution(self, V, W, **facts) -> Solution:
        """Return the `Solution` at V, W, its objective valid whatever the solver left undone.

        Columns shorter than 1e-6 of the longest are set to 0 first, so that the objective is that
        of the pruned network, and all of them where the zero network is as good to 1e-9.
        """
        V, W = np.array(V, dtype=np.float64), np.array(W, dtype=np.float64)
        if V.shape != self.shape or W.shape != self.shape:
            raise ValueError(f"V and W must have shape {self.shape}, got {V.shape} and {W.shape}.")
        lengths = np.linalg.norm(np.stack([V, W]), axis=2, keepdims=True)
        keep = lengths > 1e-6 * lengths.max(initial=0.0)
        V, W = V * keep[0], W * keep[1]
        objective = self._certified_objective(V, W)
        if self._zero_objective <= objective * (1.0 + 1e-9):
            V, W, objective = 0.0 * V, 0.0 * W, self._zero_objective
        return Solution(V, W, objective, cone_violation=self.cone_violation(V, W), **facts)

    @cached_property
    def _zero_objective(self) -> float:
        return self._certified_objective(np.zeros(self.shape), np.zeros(self.shape))

    def _certified_objective(self, V, W) -> float:
        margins = self.certified().safe_margins(V, W)
        return float(self.mean_loss(numpy_backend, margins) + self.penalty(numpy_backend, V, W))
