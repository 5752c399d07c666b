"""The record of a run, and `what_follows` from it: no solver is met here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

import numpy as np

from convexrobust.program import Progress, Solution
from convexrobust.solvers.working_set.constant import ConstantNetwork
from convexrobust.solvers.working_set.point import Point

_WORTH = 0.25  # improvement, in units of the tolerance, for which another round is worth it


class Step(Enum):
    """What a run does next."""

    SOLVE = auto()
    """Solve the program of the start roughly."""

    EXTEND = auto()
    """Price at the point found: the most violated patterns join, unused ones leave."""

    CLOSE = auto()
    """Solve to the tolerance asked for, over the patterns found."""

    START_SMALL = auto()
    """The same from the best point, with its patterns and those that joined the first ones."""

    STOP = auto()
    """Return the best point."""


class Accuracy(NamedTuple):
    """How far a program is solved.

    Attributes
    ----------
    tol : float
        Relative gap.
    max_iter : int
        Iterations of `ADMM` at most.
    stuck : float
        Gap, in units of `Criteria.scale`, from which another solver takes over where these end.
    """

    tol: float
    max_iter: int
    stuck: float


@dataclass(frozen=True)
class Criteria:
    """How solutions are judged and compared.

    Attributes
    ----------
    tol : float
        That of `WorkingSet`.
    scale : float
        The objective of the zero network, in which gaps are measured.
    """

    tol: float
    scale: float

    @property
    def worth(self) -> float:
        """The difference of two objectives from which it matters."""
        return _WORTH * self.tol * self.scale

    def rank(self, solution: Solution) -> tuple[bool, float]:
        """Points inside the cones come first: outside, an objective may be below the optimum."""
        return solution.cone_violation > self.tol, solution.objective

    def merit(self, solution: Solution) -> tuple[bool, float, float]:
        """Of equal points, as a round leaves that is cut off, one with a close bound is first."""
        return *self.rank(solution), solution.gap if self.is_open(solution) else 0.0

    def is_open(self, solution: Solution, tol: float | None = None) -> bool:
        """Tell whether the gap is, or the point is outside the cones, where no gap says much."""
        outside, _ = self.rank(solution)
        tol = self.tol if tol is None else tol
        return outside or not solution.gap <= tol * self.scale


@dataclass(frozen=True, eq=False)
class Round:
    """One solve, and how it compares.

    Attributes
    ----------
    found : Point
        What the solver returned.
    accuracy : Accuracy
        What was asked of it.
    is_best : bool
        Whether the point found, moved to better weights where these are known, is at least as good
        as the best one before.
    went_back : bool
        Whether what the solver returned is worse than that: it does not tell which patterns matter.
    improved : bool
        Whether it is better by as much as matters.
    """

    found: Point
    accuracy: Accuracy
    is_best: bool
    went_back: bool
    improved: bool

    @classmethod
    def compared(cls, found: Point, moved: Point, best: Point, accuracy, criteria) -> Round:
        """Return the round that found a point, moved it, and follows others with a best one."""
        new, before = found.solution, best.solution
        return cls(
            found,
            accuracy,
            is_best=criteria.merit(moved.solution) <= criteria.merit(before),
            went_back=criteria.rank(new) > criteria.rank(before),
            improved=before.objective - new.objective > criteria.worth,
        )


class Log(NamedTuple):
    """The iterations of all solves, one after the other."""

    n_iter: int = 0
    history: tuple[Progress, ...] = ()

    def with_solve(self, begun: float, solution: Solution) -> Log:
        """Return the log with those of a solve that began after so many seconds."""
        rows = (
            row._replace(n_iter=self.n_iter + row.n_iter, seconds=begun + row.seconds)
            for row in solution.history
        )
        return Log(self.n_iter + solution.n_iter, (*self.history, *rows))


@dataclass(frozen=True, eq=False)
class State:
    """What is known after a step.

    Attributes
    ----------
    start : Point
        What the next solve starts from: its program is the working set.
    best : Point
        The best point of all solves, or the first.
    later : ndarray of shape (n, K)
        Patterns that joined those of the first point.
    last : Round
        The last solve; before the first one what it starts from, of which nothing is known.
    log : Log
        The iterations of all solves.
    step : Step, optional
        The last step.
    n_rounds : int
        Solves so far.
    priced : ndarray of shape (n, K), optional
        The patterns that the last pricing found; None if it says nothing about the last solve.
    constant : ConstantNetwork, optional
        The best constant network, where it is a candidate.
    provable : ConstantNetwork, optional
        The same, as long as it may be proven best.
    interrupted : bool
        Ctrl-C came in the last solve, or after it.
    """

    start: Point
    best: Point
    later: np.ndarray
    last: Round
    log: Log
    step: Step | None = None
    n_rounds: int = 0
    priced: np.ndarray | None = None
    constant: ConstantNetwork | None = None
    provable: ConstantNetwork | None = None
    interrupted: bool = False

    @classmethod
    def at(cls, point: Point) -> State:
        """Return the state before the first step."""
        none = np.zeros((len(point.program.X), 0), dtype=np.int8)
        unsolved = Round(point, Accuracy(np.inf, 0, np.inf), False, False, False)
        return cls(point, point, none, unsolved, Log())

    @property
    def found(self) -> Point:
        """What the last solve returned."""
        return self.last.found

    @property
    def exhausted(self) -> bool:
        """Whether pricing found no pattern that would improve on the working set."""
        return self.priced is not None and self.priced.shape[1] == 0

    def used(self, point: Point) -> np.ndarray:
        """Tell which patterns of a point are to stay: of its neurons, and of constant networks."""
        used = point.used
        if self.constant is not None and self.constant.outputs.any():
            used |= np.all(point.program.D, axis=0)
        return used

    def small_start(self) -> Point:
        """Return the best point with its patterns and those that joined the first."""
        return self.best.kept(self.used(self.best)).joined(self.later)


def what_follows(state: State, criteria: Criteria, max_rounds: int, ended: bool) -> Step:
    """Return the step after the last one.

    Parameters
    ----------
    state : State
        What is known.
    criteria : Criteria
        How it is judged.
    max_rounds : int
        Rounds of `Step.SOLVE` at most.
    ended : bool
        Whether the run was interrupted or its time is over: only the first round is solved then.
    """
    if state.step is None and max_rounds > 0:
        return Step.SOLVE
    if ended:
        return Step.STOP
    if state.step is Step.SOLVE and _worth_another(state, criteria):
        return Step.EXTEND
    if state.step is Step.EXTEND and not state.exhausted and state.n_rounds < max_rounds:
        return Step.SOLVE
    if state.step is Step.START_SMALL:
        return Step.STOP
    if state.step is Step.CLOSE:
        lost = criteria.is_open(state.found.solution) and state.last.went_back
        return Step.START_SMALL if lost and _can_start_small(state) else Step.STOP
    return Step.STOP if _is_closed(state, criteria) else Step.CLOSE


def _worth_another(state, criteria) -> bool:
    """Tell whether pricing at the last point can pay: it improved, or its gap is open."""
    if state.found.solution.multipliers is None:  # nothing that prices
        return False
    unsettled = criteria.is_open(state.found.solution) or state.n_rounds == 1
    return unsettled or state.last.improved


def _is_closed(state, criteria) -> bool:
    """Tell whether the gap of the last point is, or that of the best one if it is as good."""
    if not criteria.is_open(state.found.solution):
        return True
    return state.last.is_best and not criteria.is_open(state.best.solution)


def _can_start_small(state) -> bool:
    """Tell whether there are other patterns than those, among which the solver was lost.

    They came with the first network. If that is the best point, no solver has improved it.
    """
    if state.best.solution.multipliers is None:
        return False
    return state.small_start().n_patterns < state.start.n_patterns
