"""What every solver promises: `Solver`, and the errors of those that cannot or fail."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from convexrobust.losses import LossKind
from convexrobust.program import ConvexProgram, Solution


class SolverError(RuntimeError):
    """A solver failed or cannot treat a program; the message names it, the cause and a remedy."""


class ProgramRefusedError(SolverError, ValueError):
    """A solver cannot treat a program: the text is its `Solver.refusal`."""


class Solver(Protocol):
    """Anything that solves a `ConvexProgram`. Objects without a ``refusal`` refuse nothing."""

    def refusal(self, program: ConvexProgram) -> str | None:
        """Return what a program has that this solver cannot treat, and which can; else None.

        The answer costs nothing: it depends on the form of the program, not on its numbers.
        """
        return None

    def solve(self, program: ConvexProgram, start: Solution | None = None) -> Solution:
        """Return a solution, starting from another of the same shape where the solver can.

        Raises
        ------
        ProgramRefusedError
            With the text of `refusal`, where there is one.
        """
        ...


def check_solver(solver) -> None:
    """Raise ValueError for what is no solver: a name, a class, an object without ``solve``."""
    if isinstance(solver, type) or not callable(getattr(solver, "solve", None)):
        got = f"the class {solver.__name__}" if isinstance(solver, type) else repr(solver)
        raise ValueError(
            "solver must be an object with solve(program, start=None), e.g. "
            "convexrobust.InteriorPoint(), or None for the one of the program's size; "
            f"got {got}."
        )


def refusal_of(solver: Solver, program: ConvexProgram) -> str | None:
    """Return a solver's refusal of a program, None where it has none to give.

    Raises
    ------
    SolverError
        If what it says is neither None nor a text.
    """
    refusal = getattr(solver, "refusal", None)
    text = refusal(program) if callable(refusal) else refusal
    if text is None or (isinstance(text, str) and text):
        return text
    raise SolverError(
        f"{type(solver).__name__}.refusal must return None, or a text that says what is missing "
        f"and which solver can; got {text!r}."
    )


def check_accepted(solver: Solver, program: ConvexProgram) -> None:
    """Raise the refusal of a solver, if it refuses the program."""
    text = refusal_of(solver, program)
    if text is not None:
        raise ProgramRefusedError(text)


def solved(solver: Solver, program: ConvexProgram, start: Solution | None = None) -> Solution:
    """Return a solver's solution of a program on the patterns of that, or say what is wrong.

    Raises
    ------
    ProgramRefusedError
        If the solver refuses the program.
    SolverError
        If what it returns is no `Solution`, or one with other patterns.
    """
    check_accepted(solver, program)
    found = checked_solution(solver, program, solver.solve(program, start))
    same = found.D is None or np.array_equal(found.D, program.D)
    if same and found.V.shape == found.W.shape == program.shape:
        return found
    raise SolverError(
        f"{type(solver).__name__} returned a solution with other patterns: who generates patterns "
        "needs a solver that keeps those of the program, e.g. convexrobust.ConicSolver()."
    )


def checked_solution(solver: Solver, program: ConvexProgram, found) -> Solution:
    """Return what a solver returned, or raise SolverError if that is no `Solution` of a program."""
    if not isinstance(found, Solution):
        got = type(found).__name__
    elif found.V.shape != found.W.shape or found.V.shape[:2] != program.shape[:2]:
        got = f"V and W of shapes {found.V.shape} and {found.W.shape}, not {program.shape}"
    elif np.isnan(found.objective):
        got = "weights whose objective is nan"
    else:
        return found
    raise SolverError(
        f"{type(solver).__name__}.solve must return a Solution, as program.solution(V, W) makes "
        f"one; got {got}."
    )


def refusal_of_loss(name: str, loss) -> str | None:
    """Return why a solver that needs the structure of a loss refuses it; None if it does not."""
    if loss.kind in (LossKind.SMALLEST_MARGIN, LossKind.LOGISTIC):
        return None
    return (
        f"{name} needs a loss of kind '{LossKind.SMALLEST_MARGIN}' or '{LossKind.LOGISTIC}', and "
        f"{type(loss).__name__} is '{loss.kind}': use ConicSolver()."
    )
