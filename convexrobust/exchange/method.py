"""The exchange method: solve, attack, price, extend the copies and patterns, and again."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace

import numpy as np

from convexrobust.backends import numpy as numpy_backend
from convexrobust.exchange.cells import Priced, price_cells
from convexrobust.exchange.conflicts import conflicts
from convexrobust.exchange.copies import Copies
from convexrobust.exchange.inner_maximum import (
    Attack,
    exact_attack,
    losses_at,
    neuron_columns,
    pgd_attack,
)
from convexrobust.exchange.networks import check_network, mixed, trained_network, zero_network
from convexrobust.exchange.solution import ExchangeSolution, Round
from convexrobust.network import TwoLayerReLU
from convexrobust.program import ConvexProgram, Progress, Scope, Solution, Status
from convexrobust.solvers import ConicSolver, Solver, default_solver
from convexrobust.solvers.contract import check_accepted, check_solver, solved
from convexrobust.solvers.monitor import ConvergenceWarning, warn_early

_INNER = ("exact", "attack")
_PATTERNS = ("all", "grow", "fixed")
# What ended early, and is warned about.
_EARLY = (Status.ROUND_LIMIT, Status.TIME_LIMIT, Status.INTERRUPTED)
_TINY = np.finfo(float).tiny
_WIDTH = 32  # of the network to start from
_SOLVER_SHARE = 0.1  # of the bracket, or of tol, that a solver chosen here may leave open
_ROUGHEST = 0.03  # but no more
_SMALLEST_TOL = 1e-4  # but no less: ADMM would take for ever
_SHARES = (0.5, 0.2, 0.05)  # of the new network in the mixtures with the best one
_WORSE = 0.1  # times tol: the relative rise of a loss from which a point becomes a copy


class Exchange:
    r"""Train against the worst perturbations of finitely many networks, until no worse is found.

    Parameters
    ----------
    network : TwoLayerReLU, optional
        A network, trained by any method: its gates are among the first patterns and its worst
        points among the first copies, and the result is at least as good.
    width : int, optional
        Hidden neurons of the network that is trained where none is given, on attacked points, or
        on the certified bound without torch or an intercept; 0 starts from the program's patterns.
        Default: 32 for ``patterns="grow"``, where the result depends on the start, else 0.
    solver : Solver, optional
        Solves the restricted programs, which have ``copy_of`` and epsilon 0. It has to be more
        accurate than ``tol``, to take copies (`ConicSolver` and `ADMM` do), and to return
        multipliers with ``patterns="all"``. By default it is
        `ConicSolver` for ``patterns="all"``, else what `default_solver` returns for each of them,
        with a tenth of ``tol`` but at least 1e-4.
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
    that the bracket need not close.

    With ``patterns="all"`` ``lower_bound`` holds for every two-layer network of any width (with
    hidden biases if ``intercept``, no output bias, and neurons of one output each), whatever the
    inner search: ``lower_bound_scope`` is "all patterns". It rests on enumerating the cells of the
    copies in floating point. Otherwise it is "patterns": ``lower_bound`` then holds for the network
    returned and for the networks whose neurons have, at the copies of the last round, the patterns
    of ``restricted``. Other networks may do better.

    Points in the sets of two samples with different targets are among the first copies (up to 1000
    samples). What they cost is a bound of scope "all patterns" too: where epsilon is so large that
    no network is better than the zero network, it proves that before anything is trained.

    The status is "optimal" where the bracket is proven to be closed, and "no worse point" where the
    inner search found nothing to add and the patterns brought nothing more: a local result.
    """

    def __init__(
        self,
        *,
        network: TwoLayerReLU | None = None,
        width=None,
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
        if solver is not None:
            check_solver(solver)
        if max_rounds < 1 or n_copies < 1:
            raise ValueError(f"max_rounds={max_rounds} and n_copies={n_copies} must be at least 1.")
        self.network = network
        self.width = (_WIDTH if patterns == "grow" else 0) if width is None else width
        self.solver = solver
        self.inner = inner
        self.patterns = patterns
        self.tol = tol
        self.max_rounds = max_rounds
        self.n_copies = n_copies
        self.most_cells = most_cells
        self.time_limit = time_limit
        self.random_state = random_state

    def __repr__(self):
        return (
            f"Exchange(inner={self.inner!r}, patterns={self.patterns!r}, tol={self.tol!r}, "
            f"max_rounds={self.max_rounds!r})"
        )

    def refusal(self, program: ConvexProgram) -> str | None:
        """Return why the program is not for exchange, None if it is; see `Solver.refusal`."""
        if program.copy_of is not None:
            return "program has copy_of already: give the samples, exchange copies them."
        return None

    def solve(self, program: ConvexProgram, start: Solution | None = None) -> ExchangeSolution:
        """Train against the perturbations of the program.

        Parameters
        ----------
        program : ConvexProgram
            Data, loss, beta and threat model, with patterns to begin with. Its formulation is that
            of the restricted programs, except that ``patterns="all"`` takes "one-sided": over all
            patterns they have one optimum, and that is the fastest.
        start : Solution, optional
            A point of the program, or one with patterns ``D`` of its own: taken for ``network``
            where that is None.

        Returns
        -------
        ExchangeSolution
            The best network with its bracket.

        Raises
        ------
        ValueError
            If the network does not fit, or the copies have more than ``most_cells`` cells.
        ProgramRefusedError
            If the program has copies already, or the solver refuses programs with copies.

        Warns
        -----
        ConvergenceWarning
            If it stops at ``max_rounds`` or ``time_limit``, or by Ctrl-C, with the best so far.
        """
        check_accepted(self, program)
        return _Run(self, program).solution(start)


class _Run:
    """One call of `Exchange.solve`."""

    def __init__(self, options: Exchange, program: ConvexProgram):
        self.options, self.program = options, program
        self.clock = time.perf_counter()
        self.rng = np.random.default_rng(options.random_state)
        self.copies = Copies(program)
        if options.inner == "attack":  # and inexact solutions, which have many neurons
            self.copies = Copies(program, memory=1, shortest=_SOLVER_SHARE * options.tol)
        self.solver = options.solver
        if self.solver is None and options.patterns == "all":
            self.solver = ConicSolver()  # pricing needs accurate multipliers
        self.rounds: list[Round] = []
        self.solver_seconds, self.lower_bound, self.value = 0.0, -np.inf, np.inf
        self.cost = -np.inf  # to any network, of the points that samples at odds have in common
        self.restricted = self.copies.program(program, program.formulation)  # the last
        self.solved: Solution  # of that
        self.network: TwoLayerReLU  # the best, of this value
        self.attack: Attack

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.perf_counter() - self.clock

    def solution(self, start) -> ExchangeSolution:
        """Run rounds until there is a reason to stop."""
        try:
            status = self._rounds(start)
        except KeyboardInterrupt:
            if not np.isfinite(self.value):  # nothing to return yet
                raise
            status = Status.INTERRUPTED
        found = self._found(status)
        if status in _EARLY:
            warn_early(found)
        return found

    def _rounds(self, start) -> Status:
        """Run rounds; return why they ended."""
        self._begin_with_zero()
        if self.options.solver is not None:
            check_accepted(self.options.solver, self.restricted)
        if self._closed():
            return Status.OPTIMAL
        network = self.options.network
        if network is None and start is not None:
            network = TwoLayerReLU.from_solution(start, intercept=self.program.intercept)
        elif network is None and self.options.width > 0:
            network = trained_network(self.program, self.options.width, self.rng)
        if network is not None and network.n_neurons:
            self._begin(network)
        if self._closed():
            return Status.OPTIMAL
        for _ in range(self.options.max_rounds):
            if reason := self._round():
                return reason
        return Status.ROUND_LIMIT

    def _begin_with_zero(self):
        """Take up the zero network, and the points that samples at odds have in common."""
        program = self.program
        loss = float(program.mean_loss(numpy_backend, program.margin_map.offsets))
        self._keep_best(zero_network(program), Attack(program.X, self.copies.samples, loss, loss))
        points, samples, self.cost = conflicts(program)
        self.lower_bound = self.cost
        self.copies.add_points(points, samples, both_sides=self.options.patterns != "fixed")

    def _closed(self) -> bool:
        """Tell whether the best network is proven to be as good as any, of whatever patterns."""
        bound = self.lower_bound if self.options.patterns == "all" else self.cost
        return self.attack.objective - bound <= self.options.tol * self.attack.objective

    def _begin(self, network):
        """Take up the neurons of a network and its worst points."""
        check_network(network, self.program)
        attack = self._attacked(network)
        self._keep_best(network, attack)
        self.copies.add_network(network)
        self._extend(network, attack)

    def _round(self) -> Status | None:
        """Solve, attack and price; return why to stop, or extend the copies and patterns."""
        every = self.options.patterns == "all"
        solved = self._solved("one-sided" if every else self.program.formulation)
        network = TwoLayerReLU.from_solution(solved, intercept=self.program.intercept)
        network = network.pruned(self.copies.shortest)
        attack = self._attacked(network)
        priced = self._priced(solved) if every else None
        bound = solved.lower_bound if priced is None else priced.lower_bound
        bound = max(bound, self.cost)
        self.lower_bound = max(bound, self.lower_bound) if every else bound
        centre = self.network
        self._keep_best(network, attack)
        self._record(solved, attack, bound)
        if reason := self._reason(attack, solved):
            return reason
        self.copies.refresh(solved, grow=self.options.patterns != "fixed")
        if priced is not None:
            self.copies.add_patterns(priced.D, priced.gates)
        self._extend(network, attack)
        if self.options.inner == "attack":
            self._search_between(centre, network)
        return None

    def _search_between(self, centre, network):
        """Attack mixtures of the best network so far and the new one, and take up their points."""
        for share in _SHARES:
            mixture = mixed(centre, network, share)
            attack = self._attacked(mixture)
            self._keep_best(mixture, attack)
            self._extend(mixture, attack)

    def _keep_best(self, network, attack):
        exact = self.options.inner == "exact"
        value = attack.objective if exact else attack.attacked_objective
        if value < self.value:
            self.value, self.network, self.attack = value, network, attack

    def _solved(self, formulation) -> Solution:
        """Solve the restricted program; what is left open counts in the end, not here."""
        restricted = self.copies.program(self.program, formulation)
        solver = self.solver or default_solver(restricted, self._tol_of_solver())
        start = self._start(restricted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.restricted, self.solved = restricted, solved(solver, restricted, start)
        self.solver_seconds += self.solved.solver_seconds
        return self.solved

    def _tol_of_solver(self) -> float:
        """Return the relative gap to ask of the next solve: a share of the bracket's, or of tol."""
        finest = max(_SOLVER_SHARE * self.options.tol, _SMALLEST_TOL)
        if not self.rounds:
            return max(finest, _ROUGHEST)
        width = (self.value - self.rounds[-1].lower_bound) / max(self.value, _TINY)
        return float(np.clip(_SOLVER_SHARE * width, finest, max(finest, _ROUGHEST)))

    def _start(self, restricted) -> Solution:
        """Return the last solution as a start; its multipliers fit the same rows and patterns."""
        start = Solution(self.copies.V, self.copies.W, np.inf)
        if not self.rounds:
            return start
        start, old, new = replace(start, state=self.solved.state), self.restricted, restricted
        if np.array_equal(old.X, new.X) and np.array_equal(old.D, new.D):
            return replace(start, multipliers=self.solved.multipliers)
        return start

    def _attacked(self, network) -> Attack:
        if self.options.inner == "exact":
            return exact_attack(self.program, network)
        return pgd_attack(self.program, network, self.rng)

    def _priced(self, solved) -> Priced:
        if solved.multipliers is None:
            raise ValueError(
                f'patterns="all" needs multipliers, and solver {solved.solver!r} returned none: '
                "use ConicSolver()."
            )
        return price_cells(self.restricted, solved.multipliers.margins, self.options.most_cells)

    def _extend(self, network, attack):
        options = self.options
        losses = losses_at(self.program, network, attack.points, attack.samples)
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

    def _reason(self, attack, solved) -> Status | None:
        """Return why to stop after this round, if there is a reason."""
        tol, every = self.options.tol, self.options.patterns == "all"
        found = min(attack.attacked_objective, self.attack.attacked_objective)
        if self._closed():
            return Status.OPTIMAL
        if solved.status == Status.INTERRUPTED:
            return Status.INTERRUPTED
        falling = self.options.patterns == "grow" and (
            len(self.rounds) == 1
            or self.rounds[-2].restricted_objective > (1.0 + tol) * solved.objective
        )
        # Where the exact inner search leaves a little open, a bracket of tol gets its chance first.
        floor, wide = (self.lower_bound, tol / 2.0) if every else (solved.objective, tol)
        if found - floor <= wide * found and not falling:
            return Status.NO_WORSE_POINT
        late = self.options.time_limit is not None and self.seconds > self.options.time_limit
        return Status.TIME_LIMIT if late else None

    def _found(self, status) -> ExchangeSolution:
        attack, bound = self.attack, self.lower_bound
        every = self.options.patterns == "all" or bound <= self.cost
        if not every:  # it is about the network returned as well
            bound = min(bound, attack.attacked_objective)
        V, W = neuron_columns(self.network)
        return ExchangeSolution(
            V,
            W,
            attack.objective,
            lower_bound=bound,
            status=status,
            solver=f"Exchange({self.solved.solver})" if self.rounds else "Exchange",
            n_iter=len(self.rounds),
            seconds=self.seconds,
            solver_seconds=self.solver_seconds,
            lower_bound_scope=Scope.ALL_PATTERNS if every else Scope.PATTERNS,
            history=tuple(Progress(*row[:4], 0.0) for row in self.rounds),
            network=self.network,
            attacked_objective=attack.attacked_objective,
            restricted=self.restricted,
            rounds=tuple(self.rounds),
        )


def _check_one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
