r"""Adversarial training to proven global optimality, by the exchange method.

Adversarial training of a two-layer ReLU network,

.. math:: \min_{\text{net}} \sum_k \omega_k \max_{\delta \in \Delta_k}
          \varphi\bigl(m_k(x_k + \delta)\bigr) + \beta \sum_j \|u_j\|_2 \|\alpha_j\|_1,

has infinitely many perturbations. Keep finitely many *copies* of each sample, perturbed ones, and
let the loss of a sample be the largest over its copies: that is a nominal `ConvexProgram` with
``copy_of`` on the activation patterns of the copies, in which no neuron has to be stable. Its
optimum over all patterns is a lower bound of adversarial training, whatever the copies; the worst
case of the network that it trains is an upper bound. `Exchange` solves, attacks, adds the worst
points as copies, and goes on until the bounds meet. (It is the exchange method of semi-infinite
programming on the convex reformulation of Pilanci and Ergen, arXiv 2002.10553.)

Patterns are found the same way. With the multipliers a of the margins of a restricted program, a
neuron of cell i, pattern :math:`D_i` and cone :math:`K_i`, gains at most

.. math:: \|\Pi_{K_i}(-g_i)\|_2 = \min_{b \ge 0} \|g_i - X'(S_i \circ b)\|_2, \qquad
          g_i = \mp \Big(\sum_e T_e \circ a_e \circ X\Big)' D_i

a unit of length, and costs :math:`\beta`. Cells that gain more become patterns. Scaled until none
does, the multipliers are a dual point of the program with all patterns. Rows without a multiplier
do not enter g, so that only the cells of the others have to be enumerated.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog, nnls

from convexrobust.attacks import pgd, worst_margin_objective
from convexrobust.backends import numpy as numpy_backend
from convexrobust.certificates import exact_margins
from convexrobust.duality import Multipliers
from convexrobust.network import TwoLayerReLU
from convexrobust.patterns import enumerate_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram, Progress, Solution
from convexrobust.solvers import Solver, default_solver
from convexrobust.solvers.monitor import ConvergenceWarning, warn_early

_INNER = ("exact", "attack")
_PATTERNS = ("all", "grow", "fixed")
_IDLE = 1e-7  # part of the largest multiplier below which one is left out of the pricing
_WORSE = 0.1  # times tol: the relative rise of a loss from which a point becomes a copy
_TOUCHING = 1e-6  # distance from a neuron's hyperplane below which a point is put on both sides
_PAYS = 1.0 + 1e-6  # times beta: the gain from which a cell becomes a pattern
_ALIKE = 0.97  # cosine from which two new gates count as one
_MOST_NEW = 10  # patterns an output and sign priced in a round
_MEMORY = 10  # rounds that a pattern without a neuron is kept
_SCREENING = 30  # steps of the cheap bound on a cell's gain


class Round(NamedTuple):
    """One round of `Exchange`.

    Attributes
    ----------
    n_iter : int
        Rounds so far.
    seconds : float
        Wall time since the start.
    objective : float
        Upper bound on the worst-case objective of this round's network.
    lower_bound : float
        This round's lower bound, of the scope of the solution.
    attacked_objective : float
        The network's objective at the worst points found.
    restricted_objective : float
        The optimum on the copies that the round began with.
    n_copies, n_patterns : int
        Size of the restricted program.
    """

    n_iter: int
    seconds: float
    objective: float
    lower_bound: float
    attacked_objective: float
    restricted_objective: float
    n_copies: int
    n_patterns: int


@dataclass(frozen=True, eq=False)
class ExchangeSolution(Solution):
    """What `Exchange` returns: a `Solution`, and what is special to exchange.

    ``objective`` is an upper bound on the worst-case objective of ``network``. V and W have a
    column for each of its neurons.

    Attributes
    ----------
    network : TwoLayerReLU
        The best network.
    attacked_objective : float
        Its objective at the worst points found: at most ``objective``, and equal to it (up to the
        tolerance of the search) with ``inner="exact"``.
    restricted : ConvexProgram
        The last nominal program, with the copies and their patterns.
    rounds : tuple of Round
        The history, with what is special to exchange.
    """

    network: TwoLayerReLU = field(kw_only=True)
    attacked_objective: float = field(kw_only=True)
    restricted: ConvexProgram = field(kw_only=True)
    rounds: tuple[Round, ...] = field(kw_only=True)


class Exchange:
    r"""Train against the worst perturbations of finitely many networks, until no worse is found.

    Parameters
    ----------
    solver : Solver, optional
        Solves the restricted programs, which have ``copy_of`` and epsilon 0. By default
        `default_solver`. With ``patterns="all"`` it has to return multipliers.
    inner : {"exact", "attack"}
        How worst perturbations are found: by `exact_margins` (small problems), or by `pgd`.
    patterns : {"all", "grow", "fixed"}
        "all" prices every cell of the copies, for a bound on all networks: a few features only.
        "grow" adds the patterns that the neurons have at the copies. "fixed" keeps the gates of
        the given patterns. Those of a pattern are found by a linear program.
    tol : float
        Relative width of the bracket that is good enough.
    max_rounds : int
        Most rounds.
    n_copies : int
        Most copies of a sample; those with the smallest loss go first.
    most_cells : int
        Largest number of cells to price in a round, for ``patterns="all"``.
    time_limit : float, optional
        Seconds after which no new round begins.
    random_state : None, int or numpy.random.Generator
        For the random starts of the attack.

    Notes
    -----
    ``objective`` is always an upper bound on the worst-case objective of the network returned: its
    exact worst case, or the interval of its own gates (as `margin_bounds`) with ``inner="attack"``.
    For the logistic loss of several classes it takes the worst cases of the rivals separately, so
    that the bracket need not close; nor where `exact_margins` leaves samples open, as in l2 with
    more than 12 neurons of one sign that change state.

    With ``patterns="all"`` ``lower_bound`` holds for every two-layer network of any width (with
    hidden biases if ``intercept``, no output bias, and neurons of one output each), whatever the
    inner search: ``lower_bound_scope`` is "all patterns". It rests on enumerating the cells of the
    copies in floating point. Otherwise it is "patterns": ``lower_bound`` then holds for the network
    returned and for the networks whose neurons have, at the copies of the last round, the patterns
    of ``restricted``. Other networks may do better.

    The status is "optimal" where the bracket is proven to be closed, and "no worse point" where the
    inner search found nothing to add and the patterns brought nothing more: a local result.
    """

    def __init__(
        self,
        *,
        solver: Solver | None = None,
        inner="exact",
        patterns="all",
        tol=1e-3,
        max_rounds=50,
        n_copies=10,
        most_cells=100_000,
        time_limit=None,
        random_state=0,
    ):
        _check_one_of("inner", inner, _INNER)
        _check_one_of("patterns", patterns, _PATTERNS)
        if max_rounds < 1 or n_copies < 1:
            raise ValueError(f"max_rounds={max_rounds} and n_copies={n_copies} must be at least 1.")
        self.solver = solver
        self.inner = inner
        self.patterns = patterns
        self.tol = tol
        self.max_rounds = max_rounds
        self.n_copies = n_copies
        self.most_cells = most_cells
        self.time_limit = time_limit
        self.random_state = random_state

    def solve(self, program: ConvexProgram, start: Solution | None = None) -> ExchangeSolution:
        """Train against the perturbations of the program.

        Parameters
        ----------
        program : ConvexProgram
            Data, loss, beta and threat model, with patterns to begin with. Its formulation is that
            of the restricted programs, except that ``patterns="all"`` takes "one-sided": over all
            patterns they have one optimum, and that is the fastest.
        start : Solution, optional
            A network whose worst points are the first copies.

        Returns
        -------
        ExchangeSolution
            The best network with its bracket.

        Raises
        ------
        ValueError
            If the program has copies already, or the copies have more than ``most_cells`` cells.

        Warns
        -----
        ConvergenceWarning
            If it stops at ``max_rounds`` or ``time_limit``.
        """
        if program.copy_of is not None:
            raise ValueError("program has copy_of already: give the samples, exchange copies them.")
        return _Run(self, program).solution(start)


class _Run:
    """One call of `Exchange.solve`."""

    def __init__(self, options: Exchange, program: ConvexProgram):
        self.options, self.program = options, program
        self.clock = time.perf_counter()
        self.rng = np.random.default_rng(options.random_state)
        self.copies = _Copies(program)
        self.solver = default_solver(program) if options.solver is None else options.solver
        self.rounds: list[Round] = []
        self.solver_seconds, self.lower_bound, self.value = 0.0, -np.inf, np.inf
        self.network: TwoLayerReLU  # the best, of this value
        self.attack: _Attack

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.perf_counter() - self.clock

    def solution(self, start) -> ExchangeSolution:
        """Run rounds until there is a reason to stop."""
        if start is not None:
            network = TwoLayerReLU.from_solution(start, intercept=self.program.intercept)
            self._extend(network, self._attacked(network))
        status = "round limit"
        for _ in range(self.options.max_rounds):
            if reason := self._round():
                status = reason
                break
        found = self._found(status)
        if status in ("round limit", "time limit"):
            warn_early(found)
        return found

    def _round(self) -> str | None:
        """Solve, attack and price; return why to stop, or extend the copies and patterns."""
        every, exact = self.options.patterns == "all", self.options.inner == "exact"
        solved = self._solved("one-sided" if every else self.program.formulation)
        network = TwoLayerReLU.from_solution(solved, intercept=self.program.intercept)
        attack = self._attacked(network)
        priced = self._priced(solved) if every else None
        bound = solved.lower_bound if priced is None else priced.lower_bound
        self.lower_bound = max(bound, self.lower_bound) if every else bound
        self._record(solved, attack, bound)
        value = attack.objective if exact else attack.attacked_objective
        if value < self.value:
            self.value, self.network, self.attack = value, network, attack
        if reason := self._reason(attack, solved):
            return reason
        self.copies.refresh(solved, grow=self.options.patterns != "fixed")
        if priced is not None:
            self.copies.add_patterns(priced.D, priced.gates)
        self._extend(network, attack)
        return None

    def _solved(self, formulation) -> Solution:
        """Solve the restricted program; what is left open counts in the end, not here."""
        self.restricted = self.copies.program(self.program, formulation)
        start = Solution(self.copies.V, self.copies.W, np.inf) if self.rounds else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            solved = self.solver.solve(self.restricted, start)
        self.solver_seconds += solved.solver_seconds
        return solved

    def _attacked(self, network) -> _Attack:
        if self.options.inner == "exact":
            return _exact_attack(self.program, network)
        return _pgd_attack(self.program, network, self.rng)

    def _priced(self, solved) -> _Priced:
        if solved.multipliers is None:
            raise ValueError(
                f'patterns="all" needs multipliers, and solver {solved.solver!r} returned none: '
                "use ConicSolver()."
            )
        return _price(self.restricted, solved.multipliers.margins, self.options.most_cells)

    def _extend(self, network, attack):
        options = self.options
        losses = _losses(self.program, network, attack.points, attack.samples)
        present = self.copies.worst_losses(self.program, network)[attack.samples]
        new = losses > present + _WORSE * options.tol * (1.0 + np.abs(losses))
        self.copies.add_points(
            attack.points[new], attack.samples[new], both_sides=options.patterns != "fixed"
        )
        self.copies.trim(self.program, network, options.n_copies)

    def _record(self, solved, attack, bound):
        n_copies, n_patterns = self.restricted.D.shape
        values = attack.objective, bound, attack.attacked_objective, solved.objective
        row = (len(self.rounds) + 1, self.seconds, *values, n_copies, n_patterns)
        self.rounds.append(Round(*row))

    def _reason(self, attack, solved) -> str | None:
        """Return why to stop after this round, if there is a reason."""
        tol, every = self.options.tol, self.options.patterns == "all"
        certified, found = self.attack.objective, attack.attacked_objective
        if every and certified - self.lower_bound <= tol * certified:
            return "optimal"
        falling = self.options.patterns == "grow" and (
            len(self.rounds) == 1
            or self.rounds[-2].restricted_objective > (1.0 + tol) * solved.objective
        )
        # Where the exact inner search leaves a little open, a bracket of tol gets its chance first.
        floor, wide = (self.lower_bound, tol / 2.0) if every else (solved.objective, tol)
        if found - floor <= wide * found and not falling:
            return "no worse point"
        late = self.options.time_limit is not None and self.seconds > self.options.time_limit
        return "time limit" if late else None

    def _found(self, status) -> ExchangeSolution:
        attack, every = self.attack, self.options.patterns == "all"
        V, W = _columns(self.network)
        return ExchangeSolution(
            V,
            W,
            attack.objective,
            lower_bound=self.lower_bound if every else min(self.lower_bound, attack.objective),
            status=status,
            solver=f"Exchange({type(self.solver).__name__})",
            n_iter=len(self.rounds),
            seconds=self.seconds,
            solver_seconds=self.solver_seconds,
            lower_bound_scope="all patterns" if every else "patterns",
            history=tuple(Progress(*row[:4], 0.0) for row in self.rounds),
            network=self.network,
            attacked_objective=attack.attacked_objective,
            restricted=self.restricted,
            rounds=tuple(self.rounds),
        )


# -------------------------------------------------------------------------------- the copies


class _Copies:
    """The copies (rows X of ``samples``) and patterns D of a restricted program.

    A pattern has a gate, which extends it to new rows, an age, the rounds since it had a neuron,
    and the weights V, W that the next solve may start from.
    """

    def __init__(self, program: ConvexProgram):
        self.X, self.samples = program.X, np.arange(len(program.X))
        self.D = np.asarray(program.D, dtype=np.int8)
        self.gates = _gates_of(program.X, self.D)
        self.age = np.zeros(self.D.shape[1], dtype=int)
        self.V, self.W = np.zeros((2, *program.shape))

    def program(self, program, formulation) -> ConvexProgram:
        """Return the nominal program on the copies."""
        nominal = LpBall(program.perturbation.p, 0.0, program.perturbation.bounds)
        return replace(
            program,
            X=self.X,
            y=np.asarray(program.y)[self.samples],
            D=self.D,
            perturbation=nominal,
            formulation=formulation,
            copy_of=self.samples,
        )

    def refresh(self, solved, *, grow):
        """Keep the weights; if patterns grow, give neurons patterns of their own and drop old ones.

        A neuron has its pattern at the old rows and chooses for itself at new ones.
        """
        if not grow:
            self.V, self.W = solved.V, solved.W
            return
        lengths = np.linalg.norm(np.stack([solved.V, solved.W]), axis=2)
        self.age = np.where(lengths.max(axis=(0, 1)) > 0.0, 0, self.age + 1)
        D, keep = self.D, self.age <= max(_MEMORY, self.age.min())
        self.D, self.gates, self.age = D[:, keep], self.gates[:, keep], self.age[keep]
        self.V = self.W = np.zeros((*solved.V.shape[:2], len(self.age)))
        which, c, i = np.nonzero(lengths)
        neurons = np.stack([solved.V, solved.W])[which, c, :, i].T
        self.add_patterns(D[:, i], neurons / lengths[which, c, i])
        own = len(self.age) - len(i) + np.arange(len(i))
        for sign, U in enumerate((self.V, self.W)):
            chosen = which == sign
            U[c[chosen], :, own[chosen]] = neurons[:, chosen].T

    def add_patterns(self, D, gates):
        """Append patterns at the present rows."""
        none = np.zeros((*self.V.shape[:2], D.shape[1]))
        self.D, self.gates = np.hstack([self.D, D]), np.hstack([self.gates, gates])
        self.age = np.append(self.age, np.zeros(D.shape[1], dtype=int))
        self.V, self.W = (np.concatenate([U, none], axis=2) for U in (self.V, self.W))

    def worst_losses(self, program, network) -> np.ndarray:
        """Return the largest loss of a network over the copies of each sample."""
        worst = np.full(len(program.X), -np.inf)
        np.maximum.at(worst, self.samples, _losses(program, network, self.X, self.samples))
        return worst

    def add_points(self, X, samples, *, both_sides):
        """Append rows, which gates take to be on one side or, where they touch, on both.

        Worst points often lie where a neuron is 0; its pattern is then needed on both sides.
        """
        values, old = X @ self.gates, self.D
        if both_sides:
            touching = np.abs(values) <= _TOUCHING * np.linalg.norm(X, axis=1)[:, None]
            twins = np.flatnonzero(touching.any(axis=0))
            self.add_patterns(old[:, twins], self.gates[:, twins])
            old = self.D
            values = np.hstack([np.where(touching, 1.0, values), values[:, twins]])
            values[:, len(touching.T) :][touching[:, twins]] = -1.0
        self.D = np.vstack([old, values >= 0.0]).astype(np.int8)
        self.X, self.samples = np.vstack([self.X, X]), np.append(self.samples, samples)

    def trim(self, program, network, n_copies):
        """Keep the copies of each sample with the largest losses, and each pattern once."""
        losses = _losses(program, network, self.X, self.samples)
        order = np.lexsort((-losses, self.samples))
        first = np.searchsorted(self.samples[order], self.samples[order])
        keep = np.sort(order[np.arange(len(order)) - first < n_copies])
        self.X, self.samples = self.X[keep], self.samples[keep]
        self.D, first, group = np.unique(
            self.D[keep], axis=1, return_index=True, return_inverse=True
        )
        V, W, age = self.V, self.W, np.full(len(first), _MEMORY + 1)
        self.V, self.W = np.zeros((2, *V.shape[:2], len(first)))
        for merged, U in ((self.V, V), (self.W, W)):
            np.add.at(merged, (slice(None), slice(None), group.ravel()), U)
        np.minimum.at(age, group.ravel(), self.age)
        self.gates, self.age = self.gates[:, first], age


def _gates_of(X, D) -> np.ndarray:
    """Return a gate for each pattern, (d, P): S Xu >= 1 wherever that is possible for all rows."""
    n, d = X.shape
    prices = np.repeat([0.0, 1.0], [d, n])
    free = [(None, None)] * d + [(0.0, None)] * n
    gates = []
    for signs in 2.0 * D.T - 1.0:
        rows = np.hstack([-signs[:, None] * X, -np.eye(n)])
        gates.append(linprog(prices, A_ub=rows, b_ub=-np.ones(n), bounds=free).x[:d])
    return np.array(gates).T / np.maximum(np.linalg.norm(gates, axis=1), 1e-300)


# -------------------------------------------------------------------------------- the inner search


class _Attack(NamedTuple):
    """Worst points found, with bounds on the worst-case objective from above and below."""

    points: np.ndarray
    samples: np.ndarray
    objective: float
    attacked_objective: float


def _exact_attack(program, network) -> _Attack:
    """Return the worst point of each margin, and the bracket of the worst-case objective."""
    X, n = program.X[:, : network.n_features], len(program.X)
    directions, offsets, _ = program.margin_map
    low, points = np.empty(offsets.shape), np.empty((offsets.shape[1], *X.shape))
    for e in range(offsets.shape[1]):
        for direction in np.unique(directions[:, e], axis=0):
            k = np.flatnonzero((directions[:, e] == direction).all(axis=1))
            net = replace(network, output=(network.output @ direction)[:, None], offset=None)
            found = exact_margins(net, X[k], np.ones(len(k)), program.perturbation)
            low[k, e], points[e, k] = found.lower, found.X_adv
    penalty = program.penalty(numpy_backend, *_columns(network))
    objective = program.mean_loss(numpy_backend, low + offsets) + penalty
    return _attack(program, network, points, np.tile(np.arange(n), len(points)), objective)


def _pgd_attack(program, network, rng) -> _Attack:
    """Return the points of `pgd`, and the interval of the network's own gates as upper bound."""
    X = program.X[:, : network.n_features]
    loss = worst_margin_objective(network, program.y, task=program.loss.task)
    points = pgd(loss, X, program.perturbation, n_restarts=2, random_state=rng)
    V, W = _columns(network)
    own = replace(program, D=program.sets.center @ network.hidden >= 0.0, formulation="soft")
    objective = own.mean_loss(numpy_backend, own.safe_margins(V, W))
    objective += own.penalty(numpy_backend, V, W)
    return _attack(program, network, points[None], np.arange(len(X)), objective)


def _attack(program, network, points, samples, objective) -> _Attack:
    """Return the attack with its points (E, n, n_features) as rows, and their objective."""
    rows = np.concatenate([np.hstack([A, program.X[:, network.n_features :]]) for A in points])
    losses = _losses(program, network, rows, samples).reshape(len(points), -1).max(axis=0)
    penalty = program.penalty(numpy_backend, *_columns(network))
    return _Attack(rows, samples, float(objective), float(program.weight @ losses + penalty))


def _losses(program, network, X, samples) -> np.ndarray:
    """Return the loss of the network at each row of X, as if it were the sample named."""
    directions, offsets, _ = program.margin_map
    outputs = network.predict(X[:, : network.n_features])
    margins = np.einsum("nec,nc->ne", directions[samples], outputs) + offsets[samples]
    return program.loss.value(numpy_backend, margins)


def _columns(network):
    """Return V and W (C, d, m) of a network, with a column for each neuron."""
    return tuple(np.maximum(s * network.output.T, 0.0)[:, None] * network.hidden for s in (1, -1))


# -------------------------------------------------------------------------------- pricing


class _Priced(NamedTuple):
    """A bound over all patterns, and patterns (n, m) that pay, with gates (d, m)."""

    lower_bound: float
    D: np.ndarray
    gates: np.ndarray


def _price(restricted, margins, most_cells) -> _Priced:
    """Price every cell of the rows that have multipliers."""
    a = np.maximum(margins, 0.0)
    used = a.sum(axis=1) > _IDLE * a.sum(axis=1).max(initial=0.0)
    a = np.where(used[:, None], a, 0.0)
    cells, n = _cells(restricted.X[used], most_cells), len(used)
    D = np.zeros((n, cells.shape[1]), dtype=np.int8)
    D[used] = cells
    cones: tuple[list, list] = ([], [])
    new, gates = [np.zeros((n, 0))], [np.zeros((restricted.X.shape[1], 0))]
    for c in range(restricted.n_outputs):
        weight = np.sum(a * restricted.margin_map.directions[:, :, c], axis=1)[used]
        G = -(weight[:, None] * restricted.X[used]).T @ cells
        for sign, found in zip((1.0, -1.0), cones, strict=True):
            b = np.zeros(D.shape)
            b[used], U = _dual_cones(sign * G, restricted.X[used], cells, restricted.regularizer)
            found.append(b)
            best = _distinct(U, restricted.regularizer.beta)
            u = U[:, best] / np.linalg.norm(U[:, best], axis=0)
            new.append(np.where(used[:, None], D[:, best], restricted.X @ u >= 0.0))
            gates.append(u)
    slopes = {e: np.zeros(restricted.X.shape) for e in restricted.margin_map.slope_of}
    whole = replace(restricted, D=D, formulation="hard")
    bound = whole.lower_bound(Multipliers(a, slopes, *cones))
    return _Priced(bound, np.hstack(new).astype(np.int8), np.hstack(gates))


def _cells(X, most_cells):
    if len(X) == 0:
        return np.zeros((0, 1), dtype=np.int8)
    try:
        return enumerate_patterns(X, limit=most_cells)
    except ValueError as error:
        raise ValueError(
            f"the copies have too many cells for patterns='all' ({error}) Use patterns='grow' "
            f"without a bound over all patterns, fewer samples or features, or raise "
            f"most_cells={most_cells}: time and memory grow with it."
        ) from error


def _dual_cones(G, X, cells, regularizer):
    """Return multipliers b >= 0 of cone rows (n, P), and what they leave of -G, (d, P).

    Cells that a cheap bound proves not to pay keep its b, the others have the best.
    """
    S, beta, squares = 2.0 * cells - 1.0, regularizer.beta, np.sum(X**2, axis=1)[:, None]
    B, R = np.zeros(S.shape), G.copy()
    left = np.flatnonzero(np.linalg.norm(R, axis=0) > beta)
    for _ in range(_SCREENING):
        if len(left) == 0:
            break
        # The row whose multiplier lowers ||G - X'(S b)|| most takes its best value.
        step = np.maximum(S[:, left] * (X @ R[:, left]) / squares, -B[:, left])
        row = np.argmax(np.abs(step) * np.sqrt(squares), axis=0)
        step = step[row, np.arange(len(left))]
        B[row, left] += step
        R[:, left] -= X[row].T * (S[row, left] * step)
        left = left[np.linalg.norm(R[:, left], axis=0) > beta]
    for i in left:
        A = X.T * S[:, i]
        B[:, i], _ = nnls(A, G[:, i])
        R[:, i] = G[:, i] - A @ B[:, i]
    return B, -R


def _distinct(U, beta) -> list[int]:
    """Return the columns of U longer than beta, longest first, none close to one before it."""
    lengths, chosen = np.linalg.norm(U, axis=0), []
    order = np.argsort(-lengths)
    taken = np.zeros((0, len(U)))
    for i in order[lengths[order] > _PAYS * beta]:
        u = U[:, i] / lengths[i]
        if np.all(taken @ u < _ALIKE):
            chosen.append(i)
            taken = np.vstack([taken, u])
        if len(chosen) == _MOST_NEW:
            break
    return chosen


def _check_one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
