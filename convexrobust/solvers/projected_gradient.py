r"""Projected gradient steps on weights and multipliers: the first-order workhorse for large data.

A `ConvexProgram` is the saddle point of a group norm in the weights U and of simple sets in the
multipliers: of a margin (:math:`a \ge 0`, its sum limited by the loss), of a slope (a point of the
unit ball), of a cone row (a number in [0, 1] for a slack, at least 0 for a constraint) and of a
neuron's support (a point of the unit ball). An iteration projects a step in the multipliers and
takes a proximal step in U:

.. math::

    \lambda^+ = \Pi(\lambda + K U / \mu), \qquad
    U^+ = \operatorname{prox}_{\beta / L}(U - K'(2 \lambda^+ - \lambda) / L), \qquad
    (\lambda, U) \mathrel{+}= \rho\,(\lambda^+ - \lambda, U^+ - U),

the over-relaxed primal-dual method (following Chambolle and Pock, J. Math. Imaging Vis. 2011).
It is smoothing by a proximal term :math:`\mu/2 \|\lambda - \lambda_k\|^2` whose centre moves on at
every step, so that :math:`\mu` need not go to 0. With the centre fixed at 0, as in Nesterov's
smoothing, accelerated steps at several fixed :math:`\mu` came less far in as many iterations.

Slopes, slacks and supports are worth to a margin what the margin is worth, so their multipliers
are stored as fractions of the margin's (or of the slack's) and multiplied out for K'. Whatever
the iterate, the products are in the domain of the dual and certify a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from convexrobust.backends import numpy as numpy_backend
from convexrobust.backends import torch as torch_backend
from convexrobust.duality import Multipliers
from convexrobust.losses import Logistic
from convexrobust.program import ConvexProgram, Solution
from convexrobust.solvers.monitor import Monitor

_INSIDE = 0.9  # of the range of multipliers, where curvatures are measured
_STALLED = 4  # records without progress after which the steps are shortened
_RECORD_AFTER = 25
_RELAXATION = 1.8  # of the steps, below 2
_POWER_ITERATIONS = 30
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class ProjectedGradient:
    """Solve a `ConvexProgram` by projected gradient steps in torch; see the module's text.

    Parameters
    ----------
    tol : float
        Relative gap between the certified objective and lower bound to stop at.
    max_iter : int
        Most iterations; with ``batch_size`` an iteration is one batch.
    dtype : {"float32", "float64"}
        Of the iterates. Bounds are always certified in float64.
    device : str
        A torch device, e.g. "cpu" or "cuda".
    batch_size : int, optional
        Update the multipliers of about this many random rows in an iteration, in place of all
        (following Chambolle, Ehrhardt, Richtarik and Schoenlieb, SIAM J. Optim. 2018).
    chunk_size : int, optional
        Work on so many rows at a time. Data and multipliers then stay in main memory and visit the
        device chunk by chunk; the iterates are the same up to rounding.
    time_limit : float, optional
        Seconds.
    random_state : int
        Of the batches.

    Raises
    ------
    ValueError
        For a parameter out of its range, or a device that is not there.
    """

    def __init__(
        self,
        tol=1e-3,
        max_iter=2000,
        *,
        dtype="float32",
        device="cpu",
        batch_size=None,
        chunk_size=None,
        time_limit=None,
        random_state=0,
    ):
        if str(dtype) not in _DTYPES:
            raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}.")
        for name, size in (("batch_size", batch_size), ("chunk_size", chunk_size)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {size!r}.")
        if max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {max_iter!r}.")
        self.tol = tol
        self.max_iter = max_iter
        self.dtype = dtype
        self.device = device
        self.batch_size = batch_size
        self.chunk_size = chunk_size
        self.time_limit = time_limit
        self.random_state = random_state

    def __repr__(self):
        names = ("tol", "max_iter", "dtype", "device", "batch_size", "chunk_size")
        return f"ProjectedGradient({', '.join(f'{k}={getattr(self, k)!r}' for k in names)})"

    def solve(self, program: ConvexProgram, start: Solution | None = None) -> Solution:
        """Solve the program, from the weights and multipliers of ``start`` where they fit.

        Parameters
        ----------
        program : ConvexProgram
            What to minimise, of any loss of `convexrobust.losses`, without copies of samples.
        start : Solution, optional
            Starting point.

        Returns
        -------
        Solution
            The best certified iterate with the best lower bound, and the history of both.

        Warns
        -----
        ConvergenceWarning
            If the gap did not reach ``tol``.

        Raises
        ------
        ValueError
            If the device is missing, or the program has copies or a loss of another kind.
        MemoryError
            If the device is too small for a chunk.
        """
        _check_device(self.device)
        _check_program(program)
        monitor = Monitor(program, "ProjectedGradient", self.tol, self.time_limit)
        if start is not None and start.V.shape != program.shape:
            start = None
        try:
            with monitor.running():
                if start is None or not monitor.record(
                    0, start.V, start.W, _fitting(program, start)
                ):
                    self._iterate(program, start, monitor)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"{self.device} is too small: lower chunk_size (now {self.chunk_size}), or the "
                "number of patterns."
            ) from error
        return monitor.solution()

    def _iterate(self, program, start, monitor):
        """Iterate until the monitor is content; certify at growing distances."""
        saddle = _Saddle(program, self)
        saddle.begin(start)
        generator = np.random.default_rng(self.random_state)
        distance = _RECORD_AFTER if self.batch_size is None else 2 * len(saddle.chunks)
        next_record = distance
        for n_iter in range(1, self.max_iter + 1):
            if self.batch_size is None:
                saddle.step()
            else:
                saddle.batch_step(saddle.chunks[generator.integers(len(saddle.chunks))])
            if n_iter < next_record and n_iter < self.max_iter:
                continue
            V, W = saddle.certifiable.double().cpu().numpy()
            if monitor.best is not None and monitor.best.cone_violation > self.tol:
                monitor.best = None  # its objective says little: it may be below the optimum
            if monitor.record(n_iter, V, W, saddle.multipliers()):
                return
            saddle.rebalance()
            distance = max(distance, n_iter // 10)
            next_record = n_iter + distance


@dataclass
class _Chunk:
    """Rows with one label, hence one direction of each margin, and their multipliers.

    ``hurt`` has for each block (sign, output) of U that has cone rows here which margins their
    slacks hurt. The state has the relaxed factors of the multipliers.
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

    def to(self, like):
        """Return the tensors of the data on the device of ``like`` in its dtype."""
        names = ("X", "D", "reach", "weight", "offsets", "directions")
        moved = {name: torch_backend.constant(getattr(self, name), like) for name in names}
        return _Chunk(self.rows, hurt=self.hurt, state=self.state, **moved)


class _Saddle:
    """The saddle point of one program: its chunks, the iterate, and the steps on it."""

    def __init__(self, program: ConvexProgram, solver: ProjectedGradient):
        self.program = program
        self.like = torch.zeros((), dtype=_DTYPES[str(solver.dtype)], device=solver.device)
        self.p = program.sets.p
        self.n = len(program.X)
        self.robust = program.sets.radius > 0.0
        self.soft = program.formulation == "soft"
        self.slope_of = program.margin_map.slope_of
        reach = program.sets.radius * program.sets.weights
        self.shared_shape = len(reach) == 1
        # Where the sets are boxes of their own the support is a sum over absolute weights.
        self.reach = self._tensor(reach.T if self.shared_shape else np.ones((reach.shape[1], 1)))
        self.largest_reach = float(reach.max(initial=0.0)) or 1.0
        self.in_batches = solver.batch_size is not None
        self.home = "cpu" if solver.chunk_size else solver.device
        self.chunks = self._chunks(solver)
        self._measure()
        self.U = self._tensor(np.zeros((2, *program.shape)))

    def _tensor(self, array):
        return torch.tensor(np.asarray(array, dtype=np.float64)).to(self.like)

    def _chunks(self, solver) -> list[_Chunk]:
        """Cut the rows of each label into chunks; random ones where they serve as batches."""
        program, n = self.program, len(self.program.X)
        size = solver.batch_size or solver.chunk_size or n
        classification = program.loss.task == "classification"
        labels = np.asarray(program.y) if classification else np.zeros(n)
        order = np.arange(n)
        if solver.batch_size:
            order = np.random.default_rng(solver.random_state).permutation(n)
        parts = []
        for label in np.unique(labels):
            rows = order[labels[order] == label]
            parts += np.array_split(rows, -(-len(rows) // size))
        return [self._chunk(rows) for rows in parts]

    def _chunk(self, rows) -> _Chunk:
        program, directions = self.program, self.program.margin_map.directions[rows[0]]
        hurt = {}
        for sign, harmful in ((0, directions < 0), (1, directions > 0)):
            for c in range(program.n_outputs):
                if harmful[:, c].any() or program.formulation == "hard":
                    hurt[sign, c] = self._tensor(harmful[:, c])
        sets = program.sets
        weights = sets.weights if self.shared_shape else sets.weights[rows]
        dtype = torch.int8 if self.home != str(self.like.device) else self.like.dtype
        home = self.like.to(self.home)
        data = (sets.center[rows], sets.radius * weights, program.weight[rows])
        X, reach, weight = (torch.tensor(array).to(home) for array in data)
        return _Chunk(
            rows,
            X,
            torch.tensor(np.asarray(program.D)[rows]).to(home.device, dtype),
            reach,
            weight,
            torch.tensor(program.margin_map.offsets[rows]).to(home),
            self._tensor(directions),
            hurt,
        )

    # ---------------------------------------------------------------- scales and start

    def _measure(self):
        """Set the curvature of each kind of term, relative to that of the margins."""
        gram_x, gram_d = 0.0, 0.0
        for chunk in self.chunks:
            part = chunk.to(self.like)
            gram_x = gram_x + part.X.T @ (part.weight[:, None] * part.X)
            gram_d = gram_d + part.D.T @ (part.weight[:, None] * part.D)
        data = float(torch.linalg.matrix_norm(gram_x, 2)) or 1.0
        patterns = 2.0 * float(torch.linalg.matrix_norm(gram_d, 2)) or 1.0
        self.slope_scale = self.largest_reach**2 / data
        self.cone_scale = 1.0 / patterns
        self.column_scale = self.largest_reach**2 / (data * patterns)

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
            self.U = self._tensor(np.stack([start.V, start.W]))
            self.column_state = self._ball(1e6 * self.reach * self.U) * self.robust
            if start.multipliers is not None:
                self._resume(start.multipliers)
        self.origin = self.certifiable = self.U
        self.stalled, self.shortest_step = 0, np.inf
        found = [self._pull(chunk.to(self.like), chunk.state) for chunk in self.chunks]
        self.pulled = _added(found)
        self.gradient = self._total(self.pulled, self.column_state)
        if self.in_batches:
            for chunk, pulled in zip(self.chunks, found, strict=True):
                chunk.pulled = pulled

    def _start_multipliers(self, interior=False):
        """Start from half the multipliers of the zero network, everything else in the middle.

        With ``interior`` no term is at an end of its range: all margins have nearly as large
        multipliers as those of the zero network are on average.
        """
        self.column_state = 0.0 * self.U
        for chunk in self.chunks:
            part = chunk.to(self.like)
            state: dict = {"a": 0.5 * self._loss_state(part.offsets, None, 1e-6)}
            if self.robust:
                state |= dict.fromkeys(self.slope_of, 0.0 * part.X)
            state |= dict.fromkeys(part.hurt, 0.5 * self.soft + 0.0 * part.D)
            chunk.state = {key: value.to(chunk.X.device) for key, value in state.items()}
            chunk.origin = chunk.state["a"]
        if interior and not isinstance(self.program.loss, Logistic):
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
        zero = np.zeros(program.shape)
        loss = float(program.objective(numpy_backend, zero, zero))
        n_neurons = 2 * program.n_outputs * program.D.shape[1]
        length = loss / max(program.regularizer.beta, 1e-4 * loss) / np.sqrt(n_neurons) / 4.0
        return max(10.0 * length, 1e-3)

    def _curvature(self, chunks):
        """Return the largest curvature of the terms of some chunks around the start, at this mu."""
        at_zero = self._gradient_of(chunks, 0.0 * self.U)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(self.U.shape, generator=generator).to(self.like)
        length = 1e-2 * self.balance**-0.5 if self.like.dtype == torch.float64 else 1e-2
        norm = 1.0
        for _ in range(_POWER_ITERATIONS):
            direction = direction * (length / torch.linalg.vector_norm(direction))
            direction = self._gradient_of(chunks, direction) - at_zero
            norm = float(torch.linalg.vector_norm(direction))
        return norm / length

    def _gradient_of(self, chunks, U):
        """Return the gradient at U of the terms smoothed around the present multipliers."""
        columns = self._columns(U)
        parts = [chunk.to(self.like) for chunk in chunks]
        pulled = _added([self._pull(part, self._targets(part, U, columns)) for part in parts])
        return self._total(pulled, columns[0])

    def _resume(self, multipliers: Multipliers):
        """Turn the multipliers of a solution back into the factors that the chunks store."""
        places = [[np.full(self.n, -1) for _ in rows] for rows in self._cone_rows()]
        for sign, all_rows in enumerate(self._cone_rows()):
            for c, rows in enumerate(all_rows):
                places[sign][c][rows] = np.arange(len(rows))
        cones = multipliers.cones_v, multipliers.cones_w
        for chunk in self.chunks:
            A, home = multipliers.margins[chunk.rows], chunk.X
            weight = np.maximum(self.program.weight[chunk.rows, None], 1e-300)
            a = np.maximum(A / weight, 0.0)
            found: dict = {"a": a}
            if isinstance(self.program.loss, Logistic):
                rest = np.maximum(1.0 - a.sum(axis=1, keepdims=True), 1e-6)
                found["a"] = np.log(np.maximum(a, 1e-6) / rest)
            for e, P in multipliers.slopes.items() if self.robust else ():
                share = A[:, np.equal(self.slope_of, e)].sum(axis=1, keepdims=True)
                found[e] = _divided(P[chunk.rows], share * chunk.reach.cpu().numpy())
            for (sign, c), hurt in chunk.hurt.items():
                b = cones[sign][c][places[sign][c][chunk.rows]]
                worth = A @ hurt.cpu().numpy() if self.soft else np.full(len(A), 1.0 / self.n)
                found[sign, c] = _divided(b, worth[:, None])
            chunk.state |= {
                key: torch.tensor(np.asarray(value, dtype=np.float64)).to(home)
                for key, value in found.items()
            }
            chunk.origin = chunk.state["a"]

    def _cone_rows(self):
        return self.program.rows_v, self.program.rows_w

    # ---------------------------------------------------------------- steps

    def step(self):
        """Take a relaxed step in all multipliers and in U."""
        columns = self._columns(self.U)
        found = []
        for chunk in self.chunks:
            part = chunk.to(self.like)
            targets = self._targets(part, self.U, columns)
            found.append(self._pull(part, targets))
            for key, target in targets.items():
                chunk.state[key] = _relaxed(chunk.state[key], target.to(chunk.X.device))
        gradient = self._total(_added(found), columns[0])
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
        pulled = self._pull(part, targets)
        change = _added([pulled, _scaled(chunk.pulled, -1.0)])
        self.pulled = _added([self.pulled, change])
        chunk.pulled = pulled
        chunk.state = {key: value.to(chunk.X.device) for key, value in targets.items()}
        self.column_state = columns[0]
        # The other chunks did not move: the change stands for theirs too.
        ahead = _added([self.pulled, _scaled(change, len(self.chunks))])
        old, self.U = self.U, self._shrunk(self._total(ahead, columns[0]))
        self.certifiable = self.U
        self.last_step = float(torch.linalg.vector_norm(self.U - old))

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
        squares = 0.0
        for chunk in self.chunks:
            squares += float((chunk.weight[:, None] * (chunk.state["a"] - chunk.origin) ** 2).sum())
            for block in () if self.soft else chunk.hurt:
                squares += self.cone_scale * float(chunk.state[block].square().sum()) / self.n
        return np.sqrt(squares)

    # ---------------------------------------------------------------- the multipliers

    def _ball(self, Z):
        """Project columns, or entries where the supports are sums over boxes, on unit balls."""
        if not self.shared_shape:
            return Z.clamp(-1.0, 1.0)
        return _in_unit_ball(Z.mT, self.p).mT

    def _columns(self, U):
        """Return the targets of the supports of the columns of U, and the supports themselves."""
        if not self.robust:
            return 0.0 * U, None
        center, mu, scaled = self.column_state, self.balance * self.column_scale, self.reach * U
        if not self.shared_shape:
            mu = mu / self.largest_reach**2
        target = self._ball(center + scaled / mu)
        support = target * scaled - mu / 2.0 * (target - center) ** 2
        return target, support.sum(2) if self.shared_shape else support

    def _targets(self, chunk, U, columns):
        """Return the next factors of a chunk's multipliers, before relaxation."""
        state, mu, targets = chunk.state, self.balance, {}
        Q = torch.stack([chunk.D @ (V - W).T for V, W in zip(U[0], U[1], strict=True)])
        margins = (chunk.X * Q).sum(2).T @ chunk.directions.T + chunk.offsets
        if self.robust:
            for e in sorted(set(self.slope_of)):
                center = state[e].to(self.like)
                slope = torch.einsum("c,ckj->kj", chunk.directions[e], Q) * chunk.reach
                mu_slope = mu * self.slope_scale
                targets[e] = _in_unit_ball(center + slope / mu_slope, self.p)
                excess = targets[e] * slope - mu_slope / 2.0 * (targets[e] - center) ** 2
                margins -= excess.sum(1)[:, None] * self._sharing(e)
        S, mu_cone = 2.0 * chunk.D - 1.0, mu * self.cone_scale
        for (sign, c), hurt in chunk.hurt.items():
            center = state[sign, c].to(self.like)
            gap = -S * (chunk.X @ U[sign, c])
            if self.robust:
                support = columns[1][sign, c]
                gap = gap + (support if self.shared_shape else chunk.reach @ support)
            target = (center + gap / mu_cone).clamp(0.0, 1.0 if self.soft else None)
            targets[sign, c] = target
            if self.soft:
                slack = (target * gap - mu_cone / 2.0 * (target - center) ** 2).sum(1)
                margins -= slack[:, None] * hurt
        targets["a"] = self._loss_state(margins, state["a"].to(self.like), mu)
        return targets

    def _sharing(self, e):
        """Return which margins share the slope of margin e, as 0 / 1."""
        return self._tensor(np.equal(self.slope_of, e))

    def _loss_state(self, margins, center, mu):
        """Return the proximal step of the margins' multipliers (logits of them for Logistic)."""
        loss = self.program.loss
        if isinstance(loss, Logistic):
            return -margins if center is None else (mu * center - margins) / (1.0 + mu)
        step = (loss.threshold - margins) / mu
        return _proximal_shares(
            step if center is None else center + step, loss.steepness / mu, loss.largest_multiplier
        )

    def _products(self, chunk, state):
        """Return the multipliers a, P and b that the factors stand for, weighted."""
        a = state["a"].to(self.like)
        if isinstance(self.program.loss, Logistic):
            a = torch.softmax(torch.nn.functional.pad(a, (1, 0)), dim=1)[:, 1:]
        a = chunk.weight[:, None] * a
        slopes, cones = {}, {}
        for e in sorted(set(self.slope_of)) if self.robust else ():
            slopes[e] = (a @ self._sharing(e))[:, None] * chunk.reach * state[e].to(self.like)
        for block, hurt in chunk.hurt.items():
            worth = (a @ hurt)[:, None] if self.soft else 1.0 / self.n
            cones[block] = worth * state[block].to(self.like)
        return a, slopes, cones

    def _pull(self, chunk, state):
        """Return K' of a chunk's multipliers: the gradient, and the weights of the supports."""
        a, slopes, cones = self._products(chunk, state)
        gradient, of_support = 0.0 * self.U, 0.0 * self.U[:, :, :1]
        if not self.shared_shape:
            of_support = 0.0 * self.U
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

    def _total(self, pulled, column_state):
        """Return the gradient, the supports of the columns weighted and in their state."""
        gradient, of_support = pulled
        return gradient + of_support * self.reach * column_state

    def multipliers(self) -> Multipliers:
        """Return the multipliers of the next step in all rows, for the certificate."""
        program = self.program
        columns = self._columns(self.U)
        n, n_margins = program.margin_map.offsets.shape
        margins = np.zeros((n, n_margins))
        slopes = {e: np.zeros(program.X.shape) for e in set(self.slope_of)}
        cones = np.zeros((2, program.n_outputs, n, program.D.shape[1]))
        for chunk in self.chunks:
            part = chunk.to(self.like)
            a, P, b = self._products(part, self._targets(part, self.U, columns))
            margins[chunk.rows] = a.cpu()
            for e in P:
                slopes[e][chunk.rows] = P[e].cpu()
            for (sign, c), of_rows in b.items():
                cones[sign, c, chunk.rows] = of_rows.cpu()
        cones_v = [cones[0, c, rows] for c, rows in enumerate(program.rows_v)]
        cones_w = [cones[1, c, rows] for c, rows in enumerate(program.rows_w)]
        return Multipliers(margins, slopes, cones_v, cones_w)


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


def _in_unit_ball(Z, p):
    """Project the rows (last axis) on the unit ball of the p-norm."""
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


def _check_device(device):
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r} was asked for but torch sees no CUDA device: install a CUDA build "
            "of torch and a driver, or use device='cpu'."
        )


def _check_program(program):
    if program.copy_of is not None:
        raise ValueError("ProjectedGradient takes no copies of samples: use ConicSolver().")
    loss = program.loss
    if not isinstance(loss, Logistic) and not np.isfinite(loss.steepness):
        raise ValueError(
            f"ProjectedGradient needs the threshold and steepness of a piecewise quadratic loss, "
            f"or Logistic; {type(loss).__name__} has none: use ConicSolver()."
        )


def _fitting(program, start):
    """Return the multipliers of a start if they are of this program's shapes."""
    found = start.multipliers
    if found is None or found.margins.shape != program.margin_map.offsets.shape:
        return None
    shapes = [(len(r), program.D.shape[1]) for r in program.rows_v + program.rows_w]
    return found if [b.shape for b in found.cones_v + found.cones_w] == shapes else None
