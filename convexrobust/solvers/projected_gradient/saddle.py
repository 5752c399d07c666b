"""The iterate of `ProjectedGradient`: its start, its steps and its step sizes."""

from __future__ import annotations

import numpy as np
import torch

from convexrobust.backends import numpy as numpy_backend
from convexrobust.backends import torch as torch_backend
from convexrobust.duality import Multipliers
from convexrobust.program import ConvexProgram, Solution
from convexrobust.solvers.projected_gradient.terms import Chunk, Terms

_INSIDE = 0.9  # of the range of multipliers, where curvatures are measured
_STALLED = 4  # records without progress after which the steps are shortened
_RELAXATION = 1.8  # of the steps, below 2
_POWER_ITERATIONS = 30
_ROWS_IN_CACHE = 2048  # in a chunk on a CPU, whose caches then hold what a step makes of them


class Saddle:
    """The saddle point of one program: its terms in chunks, the iterate, and the steps on it.

    Parameters
    ----------
    program : ConvexProgram
        What is minimised.
    like : torch.Tensor
        A tensor of the dtype and on the device of the iterates.
    batch_size, chunk_size, random_state
        As those of `ProjectedGradient`.

    Attributes
    ----------
    U : torch.Tensor of shape (2, C, d, P)
        The relaxed weights V and W.
    certifiable : torch.Tensor
        The weights after the last proximal step, in which neurons are exactly 0.
    balance : float
        mu, the ratio of the distances that weights and multipliers go in a step.
    coupling : float
        L times mu: the curvature of the terms that are smoothed with mu = 1.
    """

    def __init__(
        self, program: ConvexProgram, like, *, batch_size=None, chunk_size=None, random_state=0
    ):
        self.program, self.like = program, like
        self.in_batches = batch_size is not None
        home = torch.device("cpu") if chunk_size else like.device
        size = batch_size or chunk_size or (_ROWS_IN_CACHE if like.device.type == "cpu" else None)
        parts = _parts(program, size, random_state if batch_size else None)
        self.chunks = [Chunk.of(program, rows, like, home) for rows in parts]
        self.terms = Terms(program, like)
        self.terms.measure(self.chunks)
        self.U = torch_backend.constant(np.zeros((2, *program.shape)), like)

    # ---------------------------------------------------------------- start

    def begin(self, start: Solution | None):
        """Set the iterate, the step sizes and the multipliers to a start."""
        self._start_multipliers(interior=True)
        self.balance = self._starting_balance()
        if self.in_batches:
            largest = max(self._curvature([chunk]) for chunk in self.chunks)
            self.coupling = len(self.chunks) * largest * self.balance
        else:
            self.coupling = self._curvature(self.chunks) * self.balance
        self._start_multipliers()
        if start is not None:
            self.U = torch_backend.constant(np.stack([start.V, start.W]), self.like)
            # Far along U, the supports' multipliers are those of its columns' worst perturbations.
            ahead = self.terms.ball(1e6 * self.terms.reach * self.U)
            self.column_state = ahead * self.terms.robust
            if start.multipliers is not None:
                self._resume(start.multipliers)
        self.origin = self.certifiable = self.U
        self.stalled, self.shortest_step = 0, np.inf
        found = [self.terms.pull(chunk.to(self.like), chunk.state) for chunk in self.chunks]
        self.pulled = _added(found)
        self.gradient = self.terms.total(self.pulled, self.column_state)
        if self.in_batches:
            for chunk, pulled in zip(self.chunks, found, strict=True):
                chunk.pulled = pulled

    def _start_multipliers(self, interior=False):
        """Start from half the multipliers of the zero network, everything else in the middle.

        With ``interior`` no term is at an end of its range: all margins have nearly as large
        multipliers as those of the zero network are on average.
        """
        terms = self.terms
        self.column_state = 0.0 * self.U
        for chunk in self.chunks:
            part = chunk.to(self.like)
            state = {"a": 0.5 * terms.margin_factors(part.offsets, None, 1e-6)}
            if terms.robust:
                state |= dict.fromkeys(terms.slope_of, 0.0 * part.X)
            state |= dict.fromkeys(part.hurt, 0.5 * terms.soft + 0.0 * part.D)
            chunk.state = {key: value.to(chunk.X.device) for key, value in state.items()}
            chunk.origin = chunk.state["a"]
        if interior and not terms.logistic:
            n_margins = self.program.margin_map.offsets.shape[1]
            mean = sum((c.weight[:, None] * c.state["a"]).sum() for c in self.chunks) / n_margins
            for chunk in self.chunks:
                chunk.state["a"] = 2.0 * _INSIDE * (0.0 * chunk.state["a"] + mean)

    def _starting_balance(self):
        """Guess mu, the ratio of the distances that weights and multipliers will go.

        The weights' length is guessed from the penalty that the zero network's loss would pay for
        if all neurons were of one length; a quarter of it was met in practice.
        """
        program = self.program
        loss = float(program.mean_loss(numpy_backend, program.margin_map.offsets))
        n_neurons = 2 * program.n_outputs * program.D.shape[1]
        length = loss / max(program.regularizer.beta, 1e-4 * loss) / np.sqrt(n_neurons) / 4.0
        return max(10.0 * length, 1e-3)

    def _curvature(self, chunks):
        """Return the largest curvature of the terms of some chunks around the start, at this mu."""
        at_zero = self.gradient_of(chunks, 0.0 * self.U)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(self.U.shape, generator=generator).to(self.like)
        length = 1e-2 * self.balance**-0.5 if self.like.dtype == torch.float64 else 1e-2
        norm = 1.0
        for _ in range(_POWER_ITERATIONS):
            direction = direction * (length / torch.linalg.vector_norm(direction))
            direction = self.gradient_of(chunks, direction) - at_zero
            norm = float(torch.linalg.vector_norm(direction))
        return norm / length

    def gradient_of(self, chunks, U):
        """Return the gradient at U of the terms smoothed around the present multipliers."""
        columns = self._columns(U)
        parts = [chunk.to(self.like) for chunk in chunks]
        found = [self.terms.pull(part, self._targets(part, U, columns)) for part in parts]
        return self.terms.total(_added(found), columns[0])

    def _resume(self, multipliers: Multipliers):
        """Turn the multipliers of a solution back into the factors that the chunks store."""
        for chunk in self.chunks:
            found = {"a": self._margin_factors(multipliers.margins[chunk.rows], chunk.rows)}
            found |= self._slope_and_cone_factors(multipliers, chunk)
            chunk.state |= {
                key: torch.tensor(np.asarray(value, dtype=np.float64)).to(chunk.X)
                for key, value in found.items()
            }
            chunk.origin = chunk.state["a"]

    def _margin_factors(self, A, rows) -> np.ndarray:
        """Return the factors of the margins' multipliers A of some rows."""
        a = np.maximum(A / np.maximum(self.program.weight[rows, None], 1e-300), 0.0)
        if not self.terms.logistic:
            return a
        rest = np.maximum(1.0 - a.sum(axis=1, keepdims=True), 1e-6)
        return np.log(np.maximum(a, 1e-6) / rest)

    def _slope_and_cone_factors(self, multipliers, chunk) -> dict:
        """Return the shares of slopes and slacks in what they are worth, as far as they are any."""
        A, terms, found = multipliers.margins[chunk.rows], self.terms, {}
        for e, P in multipliers.slopes.items() if terms.robust else ():
            share = A[:, np.equal(terms.slope_of, e)].sum(axis=1, keepdims=True)
            found[e] = _divided(P[chunk.rows], share * chunk.reach.cpu().numpy())
        cones = multipliers.cones_v, multipliers.cones_w
        all_rows = self.program.rows_v, self.program.rows_w
        for (sign, c), hurt in chunk.hurt.items():
            b = cones[sign][c][np.searchsorted(all_rows[sign][c], chunk.rows)]
            worth = A @ hurt.cpu().numpy() if terms.soft else np.full(len(A), 1.0 / terms.n)
            found[sign, c] = _divided(b, worth[:, None])
        return found

    # ---------------------------------------------------------------- steps

    def step(self):
        """Take a relaxed step in all multipliers and in U."""
        columns = self._columns(self.U)
        found = []
        for chunk in self.chunks:
            part = chunk.to(self.like)
            targets = self._targets(part, self.U, columns)
            found.append(self.terms.pull(part, targets))
            for key, target in targets.items():
                chunk.state[key] = _relaxed(chunk.state[key], target.to(chunk.X.device))
        gradient = self.terms.total(_added(found), columns[0])
        self.certifiable = self._shrunk(2.0 * gradient - self.gradient)
        self.gradient = _relaxed(self.gradient, gradient)
        self.column_state = _relaxed(self.column_state, columns[0])
        self.last_step = float(torch.linalg.vector_norm(self.certifiable - self.U))
        self.U = _relaxed(self.U, self.certifiable)

    def batch_step(self, chunk):
        """Take a step in the multipliers of one chunk and in U, by the change it makes."""
        columns = self._columns(self.U)
        part = chunk.to(self.like)
        targets = self._targets(part, self.U, columns)
        pulled = self.terms.pull(part, targets)
        change = _added([pulled, _scaled(chunk.pulled, -1.0)])
        self.pulled = _added([self.pulled, change])
        chunk.pulled = pulled
        chunk.state = {key: value.to(chunk.X.device) for key, value in targets.items()}
        self.column_state = columns[0]
        # The other chunks did not move: the change stands for theirs too.
        ahead = _added([self.pulled, _scaled(change, len(self.chunks))])
        old, self.U = self.U, self._shrunk(self.terms.total(ahead, columns[0]))
        self.certifiable = self.U
        self.last_step = float(torch.linalg.vector_norm(self.U - old))

    def _columns(self, U):
        return self.terms.columns(U, self.column_state, self.balance)

    def _targets(self, part, U, columns):
        return self.terms.targets(part, U, columns, self.balance)

    @property
    def steepness(self):
        """L, the inverse of the step in U."""
        return self.coupling / self.balance

    def _shrunk(self, gradient):
        """Return the proximal point of the penalty after the step 1 / L along a gradient."""
        step, prox = 1.0 / self.steepness, self.program.regularizer.prox
        Z = self.U - step * gradient
        return torch.stack([torch.stack([prox(torch_backend, u, step) for u in z]) for z in Z])

    def rebalance(self):
        """Move mu towards the ratio of the distances that U and the multipliers have gone.

        Where the last step is not shorter than all before, again and again, the terms have more
        curvature than was measured at the start.
        """
        self.stalled = self.stalled + 1 if self.last_step > self.shortest_step else 0
        self.shortest_step = min(self.last_step, self.shortest_step)
        if self.stalled == _STALLED:
            self.coupling, self.stalled = 1.5 * self.coupling, 0
            self.shortest_step = self.last_step
        went = float(torch.linalg.vector_norm(self.U - self.origin))
        multipliers_went = self._distance_of_multipliers()
        if went > 0.0 and multipliers_went > 0.0:
            ideal = np.sqrt(self.coupling) * went / multipliers_went
            self.balance *= float(np.clip(np.sqrt(ideal / self.balance), 0.5, 2.0))

    def _distance_of_multipliers(self):
        """Return how far the margins' and the constraints' multipliers have come."""
        terms, squares = self.terms, 0.0
        for chunk in self.chunks:
            squares += float((chunk.weight[:, None] * (chunk.state["a"] - chunk.origin) ** 2).sum())
            for block in () if terms.soft else chunk.hurt:
                squares += terms.cone_scale * float(chunk.state[block].square().sum()) / terms.n
        return np.sqrt(squares)

    def multipliers(self) -> Multipliers:
        """Return the multipliers of the next step in all rows, for the certificate."""
        program, columns = self.program, self._columns(self.U)
        margins = np.zeros(program.margin_map.offsets.shape)
        slopes = {e: np.zeros(program.X.shape) for e in set(self.terms.slope_of)}
        cones = np.zeros((2, program.n_outputs, *program.D.shape))
        for chunk in self.chunks:
            part = chunk.to(self.like)
            a, P, b = self.terms.products(part, self._targets(part, self.U, columns))
            margins[chunk.rows] = a.cpu()
            for e in P:
                slopes[e][chunk.rows] = P[e].cpu()
            for (sign, c), of_rows in b.items():
                cones[sign, c, chunk.rows] = of_rows.cpu()
        cones_v = [cones[0, c, rows] for c, rows in enumerate(program.rows_v)]
        cones_w = [cones[1, c, rows] for c, rows in enumerate(program.rows_w)]
        return Multipliers(margins, slopes, cones_v, cones_w)


def _parts(program, size, seed) -> list[np.ndarray]:
    """Return the rows of each label in parts of about this size; random ones if there is a seed."""
    n = len(program.X)
    order = np.arange(n) if seed is None else np.random.default_rng(seed).permutation(n)
    labels = np.asarray(program.y) if program.loss.task == "classification" else np.zeros(n)
    parts = []
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        parts += np.array_split(rows, -(-len(rows) // (size or n)))
    return parts


def _added(pulled):
    """Return the sums of what several chunks pull."""
    return tuple(sum(parts[1:], start=parts[0]) for parts in zip(*pulled, strict=True))


def _scaled(pulled, factor):
    return tuple(factor * part for part in pulled)


def _relaxed(old, target):
    return old + _RELAXATION * (target - old)


def _divided(values, by):
    """Divide, with 0 for what is divided by 0."""
    return np.divide(values, by, out=np.zeros_like(values * by), where=by > 0.0)
