"""What every solver promises: `Solver`, and the errors of those that cannot or fail."""

from __future__ import annotations

from typing import Protocol

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


def refusal_of(solver: Solver, program: ConvexProgram) -> str | None:
    """Return a solver's refusal of a program, None where it has none to give."""
    refusal = getattr(solver, "refusal", None)
    return None if refusal is None else refusal(program)


def check_accepted(solver: Solver, program: ConvexProgram) -> None:
    """Raise the refusal of a solver, if it refuses the program."""
    text = refusal_of(solver, program)
    if text is not None:
        raise ProgramRefusedError(text)


def refusal_of_loss(name: str, loss) -> str | None:
    """Return why a solver that needs the structure of a loss refuses it; None if it does not."""
    if loss.kind in (LossKind.SMALLEST_MARGIN, LossKind.LOGISTIC):
        return None
    return (
        f"{name} needs a loss of kind '{LossKind.SMALLEST_MARGIN}' or '{LossKind.LOGISTIC}', and "
        f"{type(loss).__name__} is '{loss.kind}': use ConicSolver()."
    )
