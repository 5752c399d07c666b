"""What all iterative solvers share: the best certified iterate, when to stop, and how to say so."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from convexrobust.program import ConvexProgram, Progress, Solution, Status
from convexrobust.threads import threads_for

Watcher = Callable[[Progress, Solution], bool]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched_by(watcher: Watcher):
    """Show every certified iterate of the solvers run inside to a function.

    Parameters
    ----------
    watcher : callable
        Takes the row of the history and the iterate as a `Solution`; where it returns True the
        solver stops, with `Status.INTERRUPTED`, as on Ctrl-C.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class Monitor:
    """Certify the iterates of a running solver in float64 and keep the best.

    Parameters
    ----------
    program : ConvexProgram
        What is minimised.
    solver : str
        Name of the solver, for the solution.
    tol : float
        Relative gap between the best objective and the best lower bound that is good enough; cone
        rows may then be violated by as much.
    time_limit : float, optional
        Seconds after which `record` tells the solver to stop.

    Examples
    --------
    A solver's loop reads::

        monitor = Monitor(program, "ADMM", tol=1e-3)
        with monitor.running():
            for n_iter in range(1, max_iter + 1):
                ...
                if monitor.record(n_iter, V, W, multipliers):
                    break
        return monitor.solution()
    """

    def __init__(self, program: ConvexProgram, solver: str, tol: float, time_limit=None):
        self.program = program
        self.solver = solver
        self.tol = tol
        self.time_limit = np.inf if time_limit is None else time_limit
        self.clock = time.perf_counter()
        self.status = Status.ITERATION_LIMIT
        self.history: list[Progress] = []
        self.best: Solution | None = None
        self.lower_bound = -np.inf
        self.multipliers = None

    @property
    def seconds(self) -> float:
        """Wall time since the monitor was made."""
        return time.perf_counter() - self.clock

    @contextmanager
    def running(self):
        """Run a solver's loop; Ctrl-C ends it and keeps what was found."""
        try:
            with threads_for(self.program.D.size * self.program.X.shape[1]):
                yield self
        except KeyboardInterrupt:
            self.status = Status.INTERRUPTED

    def record(self, n_iter, V, W, multipliers=None) -> bool:
        """Certify an iterate; return whether the solver should stop, with the status set.

        V, W and the multipliers are NumPy arrays of any accuracy; the multipliers may be None.
        """
        if not (np.isfinite(V).all() and np.isfinite(W).all()):
            self.status = Status.DIVERGED
            return True
        found = self.program.solution(V, W, n_iter=n_iter)
        bound = -np.inf if multipliers is None else self.program.lower_bound(multipliers)
        if bound > self.lower_bound:
            self.lower_bound, self.multipliers = bound, multipliers
        if self.best is None or self._rank(found) < self._rank(self.best):
            self.best = found
        row = Progress(n_iter, self.seconds, found.objective, bound, found.cone_violation)
        self.history.append(row)
        watcher = _watcher.get()
        stopped = watcher is not None and watcher(row, found)
        # The certified objective of an infeasible point may be below the optimum of the cones.
        if abs(self.gap) <= self.tol and self.best.cone_violation <= self.tol:
            self.status = Status.OPTIMAL
            return True
        if stopped or self.seconds > self.time_limit:
            self.status = Status.INTERRUPTED if stopped else Status.TIME_LIMIT
            return True
        return False

    def _rank(self, found):
        # Outside the cones an objective may be below their optimum, the farther the lower: any
        # point inside comes first, then the one that is least far outside.
        outside = found.cone_violation > self.tol
        return outside, found.cone_violation if outside else found.objective

    @property
    def gap(self) -> float:
        """Relative gap between the best objective and the best lower bound."""
        if self.best is None:
            return np.inf
        scale = max(abs(self.best.objective), np.finfo(float).tiny)
        return (self.best.objective - self.lower_bound) / scale

    def solution(self) -> Solution:
        """Return the best iterate with the best bound, warning unless the gap is closed.

        Without any iterate it is the zero network.
        """
        zero = np.zeros(self.program.shape)
        best = self.best or self.program.solution(zero, zero)
        facts = {name: getattr(best, name) for name in ("V", "W", "objective", "cone_violation")}
        solution = Solution(
            **facts,
            lower_bound=self.lower_bound,
            status=self.status,
            solver=self.solver,
            n_iter=self.history[-1].n_iter if self.history else 0,
            seconds=self.seconds,
            solver_seconds=self.seconds,
            multipliers=self.multipliers,
            history=tuple(self.history),
        )
        if self.status != Status.OPTIMAL:
            warn_early(solution)
        return solution


def warn_early(solution: Solution):
    """Warn that a solver stopped before its gap was closed, and say how far it got."""
    warnings.warn(
        f"{solution.solver} stopped with status '{solution.status}' after {solution.n_iter} "
        f"iterations: objective {solution.objective:.6g}, lower bound {solution.lower_bound:.6g}, "
        f"cone violation {solution.cone_violation:.1e}. Both bounds are valid; for a smaller gap "
        "allow more iterations, scale the features, or choose another solver.",
        ConvergenceWarning,
        stacklevel=4,
    )
