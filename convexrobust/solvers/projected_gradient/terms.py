r"""The terms of the saddle point that `ProjectedGradient` seeks, evaluated chunk by chunk.

At weights U each term has a multiplier that a proximal step moves towards its worst case (`Terms`:
`columns` for the supports of the neurons, `targets` for the rest), and the multipliers pull on U
(`pull`, `total`). Slopes, slacks and supports are worth to a margin what the margin is worth, so
that their multipliers are stored as fractions of the margin's (or of the slack's), the *factors* of
a chunk's state; `products` multiplies them out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from convexrobust.backends import torch as torch_backend
from convexrobust.losses import LossKind
from convexrobust.program import ConvexProgram


@dataclass
class Chunk:
    """Rows with one label, hence one direction of each margin, and their multipliers.

    ``hurt`` has for each block (sign, output) of U that has cone rows here how far their slacks
    lower each margin. The state has the relaxed factors of the multipliers. ``pulled`` is what they
    pull, kept where rows serve as batches, and ``origin`` the margins' factors at the start.
    """

    rows: np.ndarray
    X: torch.Tensor
    D: torch.Tensor
    reach: torch.Tensor
    weight: torch.Tensor
    offsets: torch.Tensor
    directions: torch.Tensor
    hurt: dict[tuple[int, int], torch.Tensor]
    state: dict = field(default_factory=dict)
    pulled: tuple | None = None
    origin: torch.Tensor | None = None

    @classmethod
    def of(cls, program, rows, like, home) -> Chunk:
        """Return some rows of a program, with data on the device ``home`` and the rest on like."""
        directions, sets = program.margin_map.directions[rows[0]], program.sets
        hurt = {}
        for sign, harm in ((0, np.maximum(-directions, 0.0)), (1, np.maximum(directions, 0.0))):
            for c in range(program.n_outputs):
                if harm[:, c].any() or program.formulation == "hard":
                    hurt[sign, c] = torch_backend.constant(harm[:, c], like)
        there = like.to(home)
        data = sets.center[rows], sets.rows(rows).reach, program.weight[rows]
        X, reach, weight = (torch.tensor(array).to(there) for array in data)
        # Patterns that visit the device are sent as bytes.
        dtype = like.dtype if home == like.device else torch.int8
        return cls(
            rows,
            X,
            torch.tensor(np.asarray(program.D)[rows]).to(home, dtype),
            reach,
            weight,
            torch.tensor(program.margin_map.offsets[rows]).to(there),
            torch_backend.constant(directions, like),
            hurt,
        )

    def to(self, like) -> Chunk:
        """Return the tensors of the data on the device of ``like`` in its dtype."""
        names = ("X", "D", "reach", "weight", "offsets", "directions")
        moved = {name: torch_backend.constant(getattr(self, name), like) for name in names}
        return Chunk(self.rows, hurt=self.hurt, state=self.state, **moved)


class Terms:
    """The terms of one program, in tensors like ``like``; mu is the smoothing of the margins."""

    def __init__(self, program: ConvexProgram, like: torch.Tensor):
        self.program, self.like = program, like
        self.n, self.p = len(program.X), program.sets.p
        self.robust = not program.sets.unperturbed
        self.soft = program.formulation == "soft"
        self.logistic = program.loss.kind == LossKind.LOGISTIC
        self.slope_of = program.margin_map.slope_of
        reach = program.sets.reach
        self.shared_shape = program.sets.one_shape
        # Where the sets are boxes of their own the support is a sum over absolute weights.
        columns = reach.T if self.shared_shape else np.ones((reach.shape[1], 1))
        self.reach = torch_backend.constant(columns, like)
        self.largest_reach = float(reach.max(initial=0.0)) or 1.0

    def measure(self, chunks):
        """Set the curvature of each kind of term, relative to that of the margins."""
        gram_x, gram_d = 0.0, 0.0
        for chunk in chunks:
            part = chunk.to(self.like)
            gram_x = gram_x + part.X.T @ (part.weight[:, None] * part.X)
            gram_d = gram_d + part.D.T @ (part.weight[:, None] * part.D)
        data = float(torch.linalg.matrix_norm(gram_x, 2)) or 1.0
        patterns = 2.0 * float(torch.linalg.matrix_norm(gram_d, 2)) or 1.0
        self.slope_scale = self.largest_reach**2 / data
        self.cone_scale = 1.0 / patterns
        self.column_scale = self.largest_reach**2 / (data * patterns)

    # ---------------------------------------------------------------- multipliers at weights

    def ball(self, Z):
        """Project columns, or entries where the supports are sums over boxes, on unit balls."""
        if not self.shared_shape:
            return Z.clamp(-1.0, 1.0)
        return _in_unit_ball(Z.mT, self.p).mT

    def columns(self, U, center, mu):
        """Return the targets of the supports of the columns of U, and the supports themselves."""
        if not self.robust:
            return 0.0 * U, None
        mu, scaled = mu * self.column_scale, self.reach * U
        if not self.shared_shape:
            mu = mu / self.largest_reach**2
        target = self.ball(center + scaled / mu)
        support = target * scaled - mu / 2.0 * (target - center) ** 2
        return target, support.sum(2) if self.shared_shape else support

    def targets(self, chunk, U, columns, mu):
        """Return the next factors of a chunk's multipliers, before relaxation."""
        Q = torch.stack([chunk.D @ (V - W).T for V, W in zip(U[0], U[1], strict=True)])
        margins = (chunk.X * Q).sum(2).T @ chunk.directions.T + chunk.offsets
        slopes, lost_to_slopes = self._slope_targets(chunk, Q, mu)
        cones, lost_to_slacks = self._cone_targets(chunk, U, columns[1], mu)
        margins = margins - lost_to_slopes - lost_to_slacks
        a = self.margin_factors(margins, chunk.state["a"].to(self.like), mu)
        return slopes | cones | {"a": a}

    def _slope_targets(self, chunk, Q, mu):
        """Return the targets of the slopes, from those of the outputs, and what margins lose."""
        targets, lost, mu = {}, 0.0, mu * self.slope_scale
        for e in sorted(set(self.slope_of)) if self.robust else ():
            center = chunk.state[e].to(self.like)
            slope = torch.einsum("c,ckj->kj", chunk.directions[e], Q) * chunk.reach
            target = targets[e] = _in_unit_ball(center + slope / mu, self.p)
            worth = target * slope - mu / 2.0 * (target - center) ** 2
            lost = lost + worth.sum(1)[:, None] * self._sharing(e)
        return targets, lost

    def _cone_targets(self, chunk, U, supports, mu):
        """Return the targets of the cone rows, and what the margins lose to slacks."""
        targets, lost, mu = {}, 0.0, mu * self.cone_scale
        S = 2.0 * chunk.D - 1.0
        for (sign, c), hurt in chunk.hurt.items():
            center = chunk.state[sign, c].to(self.like)
            gap = -S * (chunk.X @ U[sign, c])
            if self.robust:
                support = supports[sign, c]
                gap = gap + (support if self.shared_shape else chunk.reach @ support)
            target = (center + gap / mu).clamp(0.0, 1.0 if self.soft else None)
            targets[sign, c] = target
            if self.soft:
                slack = (target * gap - mu / 2.0 * (target - center) ** 2).sum(1)
                lost = lost + slack[:, None] * hurt
        return targets, lost

    def margin_factors(self, margins, center, mu):
        """Return the proximal step of the margins' multipliers, of their logits if logistic."""
        loss = self.program.loss
        if self.logistic:
            return -margins if center is None else (mu * center - margins) / (1.0 + mu)
        step = (loss.threshold - margins) / mu
        return _proximal_shares(
            step if center is None else center + step, loss.steepness / mu, loss.largest_multiplier
        )

    def _sharing(self, e):
        """Return which margins share the slope of margin e, as 0 / 1."""
        return torch_backend.constant(np.equal(self.slope_of, e), self.like)

    # ---------------------------------------------------------------- gradient at multipliers

    def products(self, chunk, state):
        """Return the multipliers a, P and b that the factors stand for, weighted."""
        a = state["a"].to(self.like)
        if self.logistic:
            a = torch.softmax(torch.nn.functional.pad(a, (1, 0)), dim=1)[:, 1:]
        a = chunk.weight[:, None] * a
        slopes, cones = {}, {}
        for e in sorted(set(self.slope_of)) if self.robust else ():
            slopes[e] = (a @ self._sharing(e))[:, None] * chunk.reach * state[e].to(self.like)
        for block, hurt in chunk.hurt.items():
            worth = (a @ hurt)[:, None] if self.soft else 1.0 / self.n
            cones[block] = worth * state[block].to(self.like)
        return a, slopes, cones

    def pull(self, chunk, state):
        """Return K' of a chunk's multipliers: the gradient, and the weights of the supports."""
        a, slopes, cones = self.products(chunk, state)
        gradient = torch.zeros(2, *self.program.shape, dtype=a.dtype, device=a.device)
        of_support = torch.zeros_like(gradient[:, :, :1] if self.shared_shape else gradient)
        for c in range(self.program.n_outputs):
            pulled = -(a @ chunk.directions[:, c])[:, None] * chunk.X
            for e, P in slopes.items():
                pulled += chunk.directions[e, c] * P
            pulled = pulled.T @ chunk.D
            gradient[0, c] += pulled
            gradient[1, c] -= pulled
        S = 2.0 * chunk.D - 1.0
        for block, b in cones.items():
            gradient[block] -= chunk.X.T @ (S * b)
            of_support[block] += b.sum(0) if self.shared_shape else chunk.reach.T @ b
        return gradient, of_support

    def total(self, pulled, column_state):
        """Return the gradient, the supports of the columns weighted and in their state."""
        gradient, of_support = pulled
        return gradient + of_support * self.reach * column_state


def _in_unit_ball(Z, p):
    """Project the rows (last axis) on the unit ball of the p-norm.

    Closed forms, for stacks of matrices. `project_rows`, which looks at the radii and makes results
    feasible after rounding, makes a whole solve with p = 1 a sixth slower (one CPU thread).
    """
    if p == np.inf:
        return Z.clamp(-1.0, 1.0)
    if p == 2:
        return Z / torch.linalg.vector_norm(Z, dim=-1, keepdim=True).clamp(min=1.0)
    sizes = Z.abs()
    ordered = sizes.sort(dim=-1, descending=True).values
    count = torch.arange(1, Z.shape[-1] + 1, device=Z.device)
    level = ((ordered.cumsum(-1) - 1.0) / count).amax(-1, keepdim=True)
    return Z.sign() * (sizes - level.clamp(min=0.0)).clamp(min=0.0)


def _proximal_shares(H, curvature, largest):
    r"""Return the largest of :math:`h'a - |a|^2/2 - c A^2/2`, a >= 0, A = sum a <= largest, by row.

    All entries of h are lowered by one level, the largest over the possible numbers of positive
    entries of the one that satisfies either condition.
    """
    total = H.sort(dim=1, descending=True).values.cumsum(1)
    count = torch.arange(1, H.shape[1] + 1, dtype=H.dtype, device=H.device)
    levels = curvature * total / (1.0 + count * curvature)
    levels = torch.maximum(levels, (total - largest) / count)
    return (H - levels.amax(1, keepdim=True).clamp(min=0.0)).clamp(min=0.0)
