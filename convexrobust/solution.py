"""What every solver returns, and the values by which it says how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from convexrobust.duality import Multipliers


class Status(StrEnum):
    """Why a solver stopped.

    Members are strings: ``solution.status == "optimal"`` and ``Status("optimal")`` both work. Only
    `OPTIMAL` says that the solution is as good as was asked for; whatever the status, both bounds
    of a `Solution` are valid.
    """

    OPTIMAL = "optimal"
    """The gap between objective and lower bound is within the tolerance, and so are the cones."""

    ITERATION_LIMIT = "iteration limit"
    """``max_iter`` iterations were made."""

    TIME_LIMIT = "time limit"
    """``time_limit`` seconds were over."""

    ROUND_LIMIT = "round limit"
    """``max_rounds`` rounds of `Exchange` were made."""

    INTERRUPTED = "interrupted"
    """Ctrl-C, or a callback that asked for the end."""

    NO_MORE_PROGRESS = "no more progress"
    """A step of `InteriorPoint` failed: rounding leaves no better point within reach."""

    DIVERGED = "diverged"
    """An iterate was no longer finite; the best one before it is returned."""

    GAP_OPEN = "gap open"
    """The solver's own criterion was met, the valid gap is wider than that."""

    RELAXATION = "relaxation"
    """`GatedRelaxation` is done: what is open is the gap of the relaxation itself."""

    NO_WORSE_POINT = "no worse point"
    """`Exchange` found no perturbation worse than those trained against; the bracket is open."""

    USER_LIMIT = "user_limit"
    """A conic solver met a limit among its own options, in cvxpy's words."""

    OPTIMAL_INACCURATE = "optimal_inaccurate"
    """A conic solver met reduced tolerances only, in cvxpy's words."""

    UNKNOWN = "unknown"
    """Nobody said: a point made by hand or by `ConvexProgram.solution`, not by a solver."""


class Scope(StrEnum):
    """Which patterns a lower bound is about; members are strings, as those of `Status`."""

    PATTERNS = "patterns"
    """Those used: other patterns may give a smaller objective."""

    NOT_REFUTED = "all patterns, not refuted"
    """Those used, and a heuristic search found no other one that would improve on it."""

    ALL_PATTERNS = "all patterns"
    """Whatever patterns there are: no network has a smaller objective."""


class Progress(NamedTuple):
    """One row of a solver's history; the bounds are valid ones, in float64.

    Attributes
    ----------
    n_iter : int
        Iterations so far.
    seconds : float
        Wall time since the start, the time for the bounds included.
    objective : float
        Certified objective of the iterate (not of the best so far).
    lower_bound : float
        Lower bound of the dual iterate, -inf where the solver has none.
    cone_violation : float
        Largest violation of a cone row that the formulation demands.
    """

    n_iter: int
    seconds: float
    objective: float
    lower_bound: float
    cone_violation: float


@dataclass(frozen=True, eq=False)
class Solution:
    """What every solver returns.

    Attributes
    ----------
    V, W : ndarray of shape (C, d, P)
        Weights of the neurons with output weight +1 and -1.
    objective : float
        The soft objective at V, W in float64: a valid upper bound of the network's worst-case
        objective, and (up to ``cone_violation`` for cone formulations) the program's value.
    lower_bound : float
        A valid lower bound on the program's optimum over the patterns used.
    cone_violation : float
        Largest violation of a cone row that the formulation demands.
    status : Status
        Why the solver stopped; a string of the same value is turned into one.
    solver : str
        Its name.
    n_iter : int
        Iterations.
    seconds : float
        Wall time of the solver call, set-up and bounds included.
    solver_seconds : float
        Of these the time inside the numerical solver.
    lower_bound_scope : Scope
        Which patterns the lower bound is about; a string of the same value is turned into one.
    multipliers : Multipliers, optional
        The dual point of the lower bound.
    history : tuple of Progress
        What an iterative solver recorded on its way, for plots.
    D : ndarray of shape (n, P), optional
        The patterns of V and W, where they are not those of the program that was to be solved.
    state : object
        What the solver keeps for a warm start, of no meaning to others.

    Raises
    ------
    ValueError
        For a status or a scope that is none of the legal ones, which the message lists.
    """

    V: np.ndarray
    W: np.ndarray
    objective: float
    lower_bound: float = -np.inf
    cone_violation: float = 0.0
    status: Status = Status.UNKNOWN
    solver: str = ""
    n_iter: int = 0
    seconds: float = 0.0
    solver_seconds: float = 0.0
    lower_bound_scope: Scope = Scope.PATTERNS
    multipliers: Multipliers | None = None
    history: tuple[Progress, ...] = ()
    D: np.ndarray | None = None
    state: object = None

    def __post_init__(self):
        for argument, kind in (("status", Status), ("lower_bound_scope", Scope)):
            object.__setattr__(self, argument, _member(kind, argument, getattr(self, argument)))

    @property
    def gap(self) -> float:
        """The duality gap, ``objective - lower_bound``."""
        return self.objective - self.lower_bound

    @property
    def relative_gap(self) -> float:
        """The duality gap relative to the objective."""
        return self.gap / max(abs(self.objective), np.finfo(float).tiny)


def _member(kind, argument, value):
    """Return the member of an enumeration that a value names."""
    if not (isinstance(value, str) and value in list(kind)):
        legal = ", ".join(repr(str(member)) for member in kind)
        raise ValueError(f"{argument} must be one of {legal}; got {value!r}.")
    return kind(value)
