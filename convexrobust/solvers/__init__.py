"""Solvers: ``solve(program, start=None) -> Solution`` for a `ConvexProgram`."""

from __future__ import annotations

from typing import Protocol

from convexrobust.program import ConvexProgram, Solution
from convexrobust.solvers.conic import ConicSolver, SolverError

__all__ = ["ConicSolver", "Solver", "SolverError", "default_solver"]


class Solver(Protocol):
    """Anything that solves a `ConvexProgram`."""

    def solve(self, program: ConvexProgram, start: Solution | None = None) -> Solution:
        """Return a solution, starting from another of the same shape where the solver can."""
        ...


def default_solver(program: ConvexProgram) -> Solver:
    """Return the solver that ``solver=None`` stands for: Clarabel through cvxpy."""
    return ConicSolver()
