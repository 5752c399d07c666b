"""`WorkingSet`: its options, and the steps of a run."""

from __future__ import annotations

import time
import warnings
from copy import copy
from dataclasses import replace

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from convexrobust.program import ConvexProgram, Scope, Solution, Status
from convexrobust.solvers.choice import default_solver, dense_solver
from convexrobust.solvers.contract import Solver, check_accepted, check_solver, refusal_of, solved
from convexrobust.solvers.monitor import warn_early
from convexrobust.solvers.working_set.constant import best_constant, simple_constant
from convexrobust.solvers.working_set.point import Point
from convexrobust.solvers.working_set.pricing import best_cone_multipliers, price
from convexrobust.solvers.working_set.rounds import (
    Accuracy,
    Criteria,
    Round,
    State,
    Step,
    what_follows,
)
from convexrobust.solvers.working_set.seeding import first_point
from convexrobust.threads import threads_for

# Of a round. On standardised data the gap is smaller than 0.2 after these iterations.
_ROUND = Accuracy(tol=1e-2, max_iter=150, stuck=0.2)
# Iterations of ADMM at the end; of several classes the bound rises later.
_FINAL_ITER, _FINAL_ITER_SEVERAL = 2000, 3000
_MANY_ENTRIES, _FINAL_ITER_MANY = 5e8, 400  # n d P from which these have to do at the end
_RESIDUAL_ACCURACY, _RESIDUAL_STEPS = 1e-2, 500  # of the multipliers that price
_BEATABLE = 0.5  # objective of a first network, over a simple constant one's, that these may beat
_CONSTANT_GAP = 1e-6  # as `WorkingSet.tol`, of a constant network with which solvers cannot help
_TINY, _ROUNDING = np.finfo(float).tiny, 1e-9


class WorkingSet:
    r"""Solve a `ConvexProgram` over patterns that it generates.

    Parameters
    ----------
    tol : float
        Gap between objective and lower bound to stop at, relative to the objective of the zero
        network. When a round whose gap is within it improves the objective by less than a quarter
        of it, no further round follows.
    solver : Solver, optional
        Solver of the programs with few patterns; by default that of `default_solver`, where it is
        `ADMM` with 150 iterations a round and more at the end. Where these leave the gap wide open,
        as they may on features of different scales, `InteriorPoint` takes over if it can.
    network : TwoLayerReLU, optional
        The network whose gates are the first patterns, beside those of the program. By default one
        is trained by `train_certified`.
    width : int
        Hidden neurons of that network; 0 starts from the patterns of the program alone.
    n_new : int
        Patterns that join in a round, at most.
    max_rounds : int
        Rounds at most.
    time_limit : float, optional
        Seconds after which to stop with the best point so far; a round ends then if its solver has
        a ``time_limit``.
    random_state : int
        For the first network and the pricing.

    Notes
    -----
    The returned `Solution` has patterns ``D`` of its own. Its lower bound is about those
    (``lower_bound_scope`` "patterns"). If pricing found no pattern that would improve on it, the
    scope is "all patterns, not refuted": pricing is a heuristic search, so that this is no proof.
    `convexrobust.solvers.working_set.pricing.global_lower_bound` is one, for small data.

    Where the first network is not far better than a constant one, the best constant network is a
    candidate, too: under large perturbations solvers are slow to find it and to prove it best.

    References
    ----------
    Bai, Gautam, Sojoudi, arXiv 2201.01965, for the dual constraints that fresh patterns violate.
    """

    def __init__(
        self,
        tol=1e-2,
        *,
        solver=None,
        network=None,
        width=64,
        n_new=40,
        max_rounds=3,
        time_limit=None,
        random_state=0,
    ):
        if solver is not None:
            check_solver(solver)
        self.tol = tol
        self.solver = solver
        self.network = network
        self.width = width
        self.n_new = n_new
        self.max_rounds = max_rounds
        self.time_limit = time_limit
        self.random_state = random_state

    def __repr__(self):
        return f"WorkingSet(tol={self.tol!r}, solver={self.solver!r}, width={self.width!r})"

    def refusal(self, program: ConvexProgram) -> str | None:
        """Return why the program is not for the solver of the rounds, None if it is."""
        return None if self.solver is None else refusal_of(self.solver, program)

    def solve(self, program: ConvexProgram, start: Solution | None = None) -> Solution:
        """Solve the program over its own patterns and generated ones.

        Parameters
        ----------
        program : ConvexProgram
            Its patterns are among the first; they leave if they are not used.
        start : Solution, optional
            A point of the program, or of one with other patterns ``start.D``.

        Returns
        -------
        Solution
            With patterns ``D`` of its own.

        Raises
        ------
        ProgramRefusedError
            If the solver of the rounds refuses the program.

        Warns
        -----
        ConvergenceWarning
            If the gap over the patterns used stays open; also after Ctrl-C, which keeps the best
            point so far.
        """
        check_accepted(self, program)
        with threads_for(program.D.size * program.X.shape[1]):
            steps = _Steps(self, program)
            state = steps.begin(program, start)
            try:
                state = steps.with_constant(state)
                while (step := steps.after(state)) is not Step.STOP:
                    state = steps.take(step, state)
            except KeyboardInterrupt:  # between two solves; inside, the solver answers it
                state = replace(state, interrupted=True)
            return steps.finish(state)


class _Steps:
    """The steps of one run: each takes a `State` and returns the next."""

    def __init__(self, options: WorkingSet, program: ConvexProgram):
        self.options, self.clock = options, time.perf_counter()
        self.time_limit = np.inf if options.time_limit is None else options.time_limit
        self.rng = np.random.default_rng(options.random_state)
        self.criteria = Criteria(options.tol, Point.zero(program).solution.objective)

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.perf_counter() - self.clock

    def begin(self, program, start) -> State:
        """Return the state at a start, or at a network."""
        network, width = self.options.network, self.options.width
        return State.at(first_point(program, start, network, width, self.rng))

    def with_constant(self, state: State) -> State:
        """Find the best constant network, and make sure that the program has its pattern.

        Not if the first network is far better than a simple one: it is hardly worth the time.
        """
        start, later = state.start, state.later
        if start.solution.objective < _BEATABLE * simple_constant(start.program):
            return state
        constant = best_constant(start.program)
        if constant.outputs.any():
            later = np.ones((len(start.program.X), 1), dtype=np.int8)
            start = start.joined(later)
        point = start.program.solution(*constant.weights(start.program))
        constant = replace(constant, objective=point.objective)
        return replace(state, start=start, later=later, constant=constant, provable=constant)

    def after(self, state: State) -> Step:
        """Return what follows."""
        return what_follows(state, self.criteria, self.options.max_rounds, self._ended(state))

    def _ended(self, state) -> bool:
        """Tell whether it was interrupted, or its time is over."""
        return state.interrupted or self.seconds >= self.time_limit

    def take(self, step: Step, state: State) -> State:
        """Return the state after a step."""
        if step is Step.EXTEND:
            return self._extend(state)
        if step is Step.SOLVE:
            return self._solve(step, state, _ROUND)
        if step is Step.CLOSE:
            return self._solve(step, state, self._final_accuracy(state))
        small = replace(state, start=state.small_start(), priced=None)  # those that left are not
        return self._solve(step, small, state.last.accuracy)

    def _final_accuracy(self, state) -> Accuracy:
        """Return what reaches the tolerance asked for, over the patterns found."""
        program, tol = state.start.program, self.options.tol
        relative = tol * self.criteria.scale / max(state.best.solution.objective, _TINY)
        max_iter = _FINAL_ITER if program.n_outputs == 1 else _FINAL_ITER_SEVERAL
        if program.D.size * program.X.shape[1] >= _MANY_ENTRIES:
            max_iter = _FINAL_ITER_MANY
        return Accuracy(relative, max_iter, stuck=tol)

    # ---------------------------------------------------------------- solving

    def _solve(self, step, state, accuracy) -> State:
        """Solve from the start, or take the constant network where that is proven best."""
        state, found = self._proven_constant(state)
        if found is None:
            state, found = self._by_solvers(state, accuracy)
        moved = self._or_constant(self._or_start(found, state.start), state.constant)
        last = Round.compared(found, moved, state.best, accuracy, self.criteria)
        return replace(
            state,
            step=step,
            start=found,  # goes on from here: its multipliers do not fit another point
            best=moved if last.is_best else state.best,
            last=last,
            n_rounds=state.n_rounds + 1,
            interrupted=found.solution.status == Status.INTERRUPTED,
        )

    def _proven_constant(self, state) -> tuple[State, Point | None]:
        """Return the constant network if the start is no better, and that is proven best.

        Solvers are slow to find it where perturbations are large.
        """
        constant, start, criteria = state.provable, state.start, self.criteria
        if constant is None or start.solution.objective < constant.objective * (1.0 - _ROUNDING):
            return state, None
        facts = {"solver": "best_constant", "status": Status.OPTIMAL}
        solution = start.program.solution(*constant.weights(start.program), **facts)
        found = Point(start.program, solution).bounded_by(constant, n_iter=_RESIDUAL_STEPS)
        if not criteria.is_open(found.solution, min(_CONSTANT_GAP, self.options.tol)):
            return replace(state, priced=None), found  # its own multipliers have not been priced
        if criteria.is_open(found.solution):
            state = replace(state, provable=None)
        return state, None

    def _by_solvers(self, state, accuracy) -> tuple[State, Point]:
        """Solve the program of the start, by another solver where the first one is stuck."""
        state, found = self._by(self._solver(state.start.program, accuracy), state)
        other = self._other_solver(found, accuracy)
        return (state, found) if other is None else self._by(other, state)

    def _solver(self, program, accuracy) -> Solver:
        """Return the solver of a program."""
        return self.options.solver or default_solver(program, accuracy.tol, accuracy.max_iter)

    def _other_solver(self, found, accuracy) -> Solver | None:
        """Return what takes over from the default solver if that is stuck; None if nothing can."""
        if self.options.solver is not None or found.solution.status != Status.ITERATION_LIMIT:
            return None
        stuck = self.criteria.is_open(found.solution, accuracy.stuck)
        return dense_solver(found.program, accuracy.tol) if stuck else None

    def _by(self, solver, state) -> tuple[State, Point]:
        """Let a solver solve the program of the start, within the time left."""
        begun, start = self.seconds, state.start
        if np.isfinite(self.time_limit) and hasattr(solver, "time_limit"):
            own = np.inf if solver.time_limit is None else solver.time_limit
            solver = copy(solver)  # that of the caller keeps its own limit
            solver.time_limit = max(min(own, self.time_limit - begun), 0.0)
        with warnings.catch_warnings():
            # Only the last round has to converge; `finish` tells how it ended.
            warnings.simplefilter("ignore", ConvergenceWarning)
            solution = solved(solver, start.program, start.solution)
        found = Point(start.program, solution)
        return replace(state, log=state.log.with_solve(begun, solution)), found

    def _or_start(self, found, start) -> Point:
        """Return the point found, at the weights of the start if these are better."""
        criteria = self.criteria
        worse = criteria.rank(found.solution) > criteria.rank(start.solution)
        return found.at(start.solution) if worse else found

    def _or_constant(self, point, constant) -> Point:
        """Return the point, at the weights of the constant network if that is better.

        If it is clearly better: of two points about as good, one that is constant says less.
        """
        if constant is None:
            return point
        clearly = constant.objective + self.criteria.worth
        if self.criteria.rank(point.solution) <= (False, clearly):
            return point
        return point.at(point.program.solution(*constant.weights(point.program)))

    # ---------------------------------------------------------------- between and after solves

    def _extend(self, state) -> State:
        """Let unused patterns leave and the most violated ones join."""
        found = state.last.found
        multipliers = best_cone_multipliers(
            found.program,
            found.solution.multipliers,
            n_iter=_RESIDUAL_STEPS,
            tol=_RESIDUAL_ACCURACY,
        )
        options = {"n_patterns": self.options.n_new, "random_state": self.rng}
        new = price(found.program, multipliers, **options)
        # A point worse than the best does not tell which patterns matter: all stay.
        used = state.used(found) | state.last.went_back
        start = found.priced_by(multipliers).kept(used).joined(new)
        later = np.hstack([state.later, new])
        return replace(state, step=Step.EXTEND, start=start, later=later, priced=new)

    def finish(self, state: State) -> Solution:
        """Return the best point, its bound that of the constant network where this closes a gap."""
        point = known = self._returned(state)
        try:
            known = self._with_constant_bound(point, state)
        except KeyboardInterrupt:
            state = replace(state, interrupted=True)
        settled = state.exhausted and state.last.is_best and known is point
        solution = replace(
            known.solution,
            D=known.program.D,
            lower_bound_scope=Scope.NOT_REFUTED if settled else Scope.PATTERNS,
            solver=f"WorkingSet({state.found.solution.solver})",
            n_iter=state.log.n_iter,
            seconds=self.seconds,
            solver_seconds=self.seconds,
            history=state.log.history,
        )
        if not self.criteria.is_open(solution):
            return replace(solution, status=Status.OPTIMAL)
        solution = replace(solution, status=self._open_status(solution, state))
        warn_early(solution)
        return solution

    def _returned(self, state) -> Point:
        """Return the best point; the last one if, about as good, only that has a close bound."""
        criteria, best, last = self.criteria, state.best, state.found
        nearly = best.solution.objective + self.options.tol * criteria.scale
        closes = criteria.is_open(best.solution) and not criteria.is_open(last.solution)
        return last if closes and last.solution.objective <= nearly else best

    def _with_constant_bound(self, point, state) -> Point:
        """Return the point, with the bound of the constant network if it may be as good as that."""
        constant, criteria = state.provable, self.criteria
        if constant is None or not criteria.is_open(point.solution) or self._ended(state):
            return point
        nearly = constant.objective - self.options.tol * criteria.scale
        return point.bounded_by(constant) if point.solution.objective >= nearly else point

    def _open_status(self, solution, state) -> Status:
        """Return why the gap is open."""
        if state.interrupted:
            return Status.INTERRUPTED
        if self.seconds >= self.time_limit:
            return Status.TIME_LIMIT
        if solution.status == Status.OPTIMAL:  # to the inner solver's tolerance, which is looser
            return Status.GAP_OPEN
        return solution.status
