"""`WorkingSet`: the rounds of column generation."""

from __future__ import annotations

import time
import warnings
from copy import copy
from dataclasses import replace

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from convexrobust.program import ConvexProgram, Progress, Scope, Solution, Status
from convexrobust.solvers.choice import default_solver, dense_solver
from convexrobust.solvers.contract import check_accepted, refusal_of
from convexrobust.solvers.monitor import warn_early
from convexrobust.solvers.residuals import multipliers_from_margins
from convexrobust.solvers.working_set.columns import joined, kept
from convexrobust.solvers.working_set.constant import (
    ConstantNetwork,
    best_constant,
    simple_constant,
)
from convexrobust.solvers.working_set.pricing import best_cone_multipliers, price
from convexrobust.solvers.working_set.seeding import some_rows, train_certified
from convexrobust.threads import threads_for

_ROUGH_TOL = 1e-2  # relative gap at which a round ends
# Iterations of ADMM in a round, and at the end; of several classes the bound rises later.
_ROUGH, _FINAL, _FINAL_SEVERAL = 150, 2000, 3000
_STUCK = 0.2  # gap after those of a round, as `WorkingSet.tol`: on standardised data it is smaller
_LARGE, _FINAL_LARGE = 5e8, 400  # entries n d P from which these have to do at the end
_RESIDUAL_ACCURACY, _RESIDUAL_STEPS = 1e-2, 500  # of the multipliers that price
_POOR = 0.5  # objective of a first network, over a simple constant one's, that these may beat
_PROVEN = 1e-6  # gap, as `WorkingSet.tol`, of a constant network with which solvers cannot help
_WORTH = 0.25  # improvement, in units of the tolerance, for which another round is worth it
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
            run = _Run(self, program, start)
            try:
                run.look_at_constant()
                for _ in range(self.max_rounds):
                    if not (run.solve() and run.extend()) or run.ended():
                        break
                run.close_gap()
            except KeyboardInterrupt:  # between two solves; inside, the solver answers it
                run.interrupted = True
            return run.finished()


class _Run:
    """The working set and what is known about it."""

    def __init__(self, options: WorkingSet, program, start):
        self.options, self.clock = options, time.perf_counter()
        self.time_limit = np.inf if options.time_limit is None else options.time_limit
        self.rng = np.random.default_rng(options.random_state)
        zero = np.zeros(program.shape)
        self.scale = program.solution(zero, zero).objective
        self.n_rounds, self.n_iter = 0, 0
        self.history: list[Progress] = []
        self.nothing_new = self.interrupted = self.last_is_best = self.went_back = False
        self.later = np.zeros((len(program.X), 0), dtype=np.int8)  # patterns that joined the first
        self.program, self.start = self._first(program, start)
        # The constant network to beat, and the same as long as it may be proven best.
        self.constant: ConstantNetwork | None = None
        self.to_prove: ConstantNetwork | None = None
        self.found = self.start or program.solution(zero, zero)
        self.solved = self.program if self.start else program  # what `found` is a point of
        self.best = self.found, self.solved

    def _first(self, program, start):
        """Return the first program and a point of it: from the start, or from a network."""
        options, network = self.options, self.options.network
        if start is not None and start.D is not None:
            program, start = joined(replace(program, D=start.D), start, program.D)
        if start is not None and start.V.shape == program.shape:
            known = {"multipliers": start.multipliers, "state": start.state}
            start = program.solution(start.V, start.W, **known)
        else:
            start = None
        if network is None and start is None and options.width > 0:
            some = some_rows(program, self.rng)
            network = train_certified(some, width=options.width, random_state=self.rng)
        if network is None:
            return program, start
        features = program.sets.center[:, : network.n_features]
        V, W, D = network.to_convex(features, program.D)
        program = replace(program, D=D)
        return program, program.solution(V, W)

    def look_at_constant(self):
        """Find the best constant network, and make sure that the program has its pattern.

        Not if the first network is far better than a simple one: it is hardly worth the time.
        """
        objective = self.scale if self.start is None else self.start.objective
        if objective < _POOR * simple_constant(self.program):
            return
        constant = best_constant(self.program)
        start = self.start or self.program.solution(*np.zeros((2, *self.program.shape)))
        if constant.outputs.any():
            everywhere = np.ones((len(self.program.X), 1), dtype=np.int8)
            self.program, start = joined(self.program, start, everywhere)
            self.later = everywhere
        self.start = start
        point = self.program.solution(*constant.weights(self.program))
        self.constant = self.to_prove = replace(constant, objective=point.objective)

    @property
    def seconds(self):
        """Wall time so far."""
        return time.perf_counter() - self.clock

    def solve(self, tol=_ROUGH_TOL, max_iter=_ROUGH, stuck=_STUCK) -> bool:
        """Solve the restricted program from ``start``; return whether there is time for another."""
        before = self.best[0].objective
        if not self._constant_is_best():
            self._solve_by(self.options.solver or default_solver(self.program, tol, max_iter))
            if self.options.solver is None and self.found.status == Status.ITERATION_LIMIT:
                solver = dense_solver(self.program, tol) if self._open(self.found, stuck) else None
                if solver is not None:
                    self._solve_by(solver)
        self.n_rounds += 1
        point = self._or_constant(self._with_better_point(self.found))
        self.last_is_best = self._merit(point) <= self._merit(self.best[0])
        self.went_back = self._rank(self.found) > self._rank(self.best[0])
        if self.last_is_best:
            self.best = point, self.program
        self.start = self.found  # goes on from here: its multipliers do not fit another point
        self.interrupted = self.found.status == Status.INTERRUPTED
        improved = before - self.found.objective > _WORTH * self.options.tol * self.scale
        unsettled = self._open(self.found) or self.n_rounds == 1
        return not self.ended() and (improved or unsettled)

    def _constant_is_best(self) -> bool:
        """Tell whether the start is no better than a constant network, and that is proven best.

        Take it then: solvers are slow to find it where perturbations are large.
        """
        constant = self.to_prove
        if constant is None or self.start.objective < constant.objective * (1.0 - _ROUNDING):
            return False
        facts = {"solver": "best_constant", "status": Status.OPTIMAL}
        found = self.program.solution(*constant.weights(self.program), **facts)
        found = _with_bound_of(constant, found, self.program, n_iter=_RESIDUAL_STEPS)
        if self._open(found, min(_PROVEN, self.options.tol)):
            self.to_prove = None if self._open(found) else constant
            return False
        self.found, self.solved = found, self.program
        self.nothing_new = False  # until its own multipliers have been priced
        return True

    def ended(self) -> bool:
        """Tell whether it was interrupted, or its time is over."""
        return self.interrupted or self.seconds >= self.time_limit

    def _solve_by(self, solver):
        begun = self.seconds
        if np.isfinite(self.time_limit) and hasattr(solver, "time_limit"):
            own = np.inf if solver.time_limit is None else solver.time_limit
            solver = copy(solver)  # that of the caller keeps its own limit
            solver.time_limit = max(min(own, self.time_limit - begun), 0.0)
        with warnings.catch_warnings():
            # Only the last round has to converge; `finished` tells how it ended.
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = solver.solve(self.program, self.start)
        self.found, self.solved = found, self.program  # together, whatever interrupts the solver
        self.history += [
            row._replace(n_iter=self.n_iter + row.n_iter, seconds=begun + row.seconds)
            for row in self.found.history
        ]
        self.n_iter += self.found.n_iter

    def _rank(self, solution):
        """Points inside the cones come first: outside, an objective may be below the optimum."""
        return solution.cone_violation > self.options.tol, solution.objective

    def _merit(self, solution):
        """Of equal points, as a round leaves that is cut off, one with a close bound is first."""
        return *self._rank(solution), solution.gap if self._open(solution) else 0.0

    def _with_better_point(self, found) -> Solution:
        """Return the solution, at the weights of the start if these are better."""
        start = self.start
        if start is None or self._rank(found) <= self._rank(start):
            return found
        return _moved(found, start)

    def extend(self) -> bool:
        """Let unused patterns leave and the most violated ones join; return False without any."""
        if self.found.multipliers is None:  # nothing that prices
            return False
        multipliers = best_cone_multipliers(
            self.program, self.found.multipliers, n_iter=_RESIDUAL_STEPS, tol=_RESIDUAL_ACCURACY
        )
        solution = replace(self.found, multipliers=multipliers)
        options = {"n_patterns": self.options.n_new, "random_state": self.rng}
        new = price(self.program, multipliers, **options)
        used = self._used(solution, self.program)
        used |= self.went_back  # such a point does not tell which patterns matter
        program, start = kept(self.program, solution, used)
        self.program, self.start = joined(program, start, new)
        self.later = np.hstack([self.later, new])
        self.nothing_new = new.shape[1] == 0
        return not self.nothing_new

    def close_gap(self):
        """Solve to the tolerance asked for, over the patterns found."""
        closed = self.last_is_best and not self._open(self.best[0])
        if self._open(self.found) and not closed and not self.ended():
            tol = self.options.tol * self.scale / max(self.best[0].objective, _TINY)
            entries = self.program.D.size * self.program.X.shape[1]
            max_iter = _FINAL if self.program.n_outputs == 1 else _FINAL_SEVERAL
            max_iter = max_iter if entries < _LARGE else _FINAL_LARGE
            self.solve(tol, max_iter, stuck=self.options.tol)
            lost = self._open(self.found) and self.went_back and not self.ended()
            if lost and self._start_small():
                self.solve(tol, max_iter, stuck=self.options.tol)

    def _start_small(self) -> bool:
        """Start again from the best point, with its patterns and those that joined the first.

        Among all the others, which came with the first network, the solver was lost. Return False
        if there are no others.
        """
        solution, program = self.best
        if solution.multipliers is None:  # of the first network, which no solver has improved
            return False
        program, solution = kept(program, solution, self._used(solution, program))
        program, solution = joined(program, solution, self.later)
        if program.D.shape[1] >= self.program.D.shape[1]:
            return False
        self.program, self.start = program, solution
        self.nothing_new = False  # those that left have not been priced
        return True

    def _used(self, solution, program):
        """Tell which patterns have a neuron, one at least, and that of constant networks, (P,)."""
        used = np.any(solution.V != 0.0, axis=(0, 1)) | np.any(solution.W != 0.0, axis=(0, 1))
        used[0] |= not used.any()
        if self.constant is not None and self.constant.outputs.any():
            used |= np.all(program.D, axis=0)
        return used

    def finished(self) -> Solution:
        """Return the best point; the last one if, about as good, only that has a close bound."""
        solution, program = self.best
        about_as_good = self.found.objective <= solution.objective + self.options.tol * self.scale
        if self._open(solution) and not self._open(self.found) and about_as_good:
            solution, program = self.found, self.solved
        priced = solution
        if self.to_prove is not None and self._open(solution) and not self.ended():
            nearly = self.to_prove.objective - self.options.tol * self.scale
            if solution.objective >= nearly:
                try:
                    solution = _with_bound_of(self.to_prove, solution, program)
                except KeyboardInterrupt:
                    self.interrupted = True
        settled = self.nothing_new and self.last_is_best and solution is priced
        solution = replace(
            solution,
            D=program.D,
            lower_bound_scope=Scope.NOT_REFUTED if settled else Scope.PATTERNS,
            solver=f"WorkingSet({self.found.solver})",
            n_iter=self.n_iter,
            seconds=self.seconds,
            solver_seconds=self.seconds,
            history=tuple(self.history),
        )
        if not self._open(solution):
            return replace(solution, status=Status.OPTIMAL)
        if self.interrupted:
            solution = replace(solution, status=Status.INTERRUPTED)
        elif self.seconds >= self.time_limit:
            solution = replace(solution, status=Status.TIME_LIMIT)
        elif solution.status == Status.OPTIMAL:  # to the inner solver's tolerance, which is looser
            solution = replace(solution, status=Status.GAP_OPEN)
        warn_early(solution)
        return solution

    def _or_constant(self, solution) -> Solution:
        """Return the solution, at the weights of the constant network if that is better.

        If it is clearly better: of two points about as good, one that is constant says less.
        """
        if self.constant is None:
            return solution
        clearly = self.constant.objective + _WORTH * self.options.tol * self.scale
        if self._rank(solution) <= (False, clearly):
            return solution
        return _moved(solution, self.program.solution(*self.constant.weights(self.program)))

    def _open(self, solution, tol=None) -> bool:
        """Tell whether the gap is, or the point is outside the cones, where no gap says much."""
        outside, _ = self._rank(solution)
        tol = self.options.tol if tol is None else tol
        return outside or not solution.gap <= tol * self.scale


def _with_bound_of(constant, solution, program, **options) -> Solution:
    """Return the solution, with the bound of a constant network if that is better."""
    multipliers = multipliers_from_margins(program, constant.margins, **options)
    bound = program.lower_bound(multipliers)
    if bound <= solution.lower_bound:
        return solution
    return replace(solution, multipliers=multipliers, lower_bound=bound)


def _moved(solution, point) -> Solution:
    """Return a solution at the weights of another point of the same program."""
    names = ("V", "W", "objective", "cone_violation")
    return replace(solution, **{name: getattr(point, name) for name in names})
