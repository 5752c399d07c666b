"""Which solver a program gets when none is named."""

from __future__ import annotations

import importlib.util
from typing import Protocol

import numpy as np

from convexrobust.losses import Logistic
from convexrobust.program import ConvexProgram, Solution
from convexrobust.solvers.compiled import compiles
from convexrobust.solvers.conic import ConicSolver
from convexrobust.solvers.interior_point import InteriorPoint

_DENSE = 2000  # unknowns, or outputs of all rows, up to which dense factorisations take seconds
# Relative gaps from which on ADMM is quicker even there: of soft programs, with perturbations or
# without (beyond some unknowns where its iteration is not compiled), and of constrained ones with
# wide boxes, whose sides fill the systems of Newton's method.
_ROUGH, _DENSE_ROUGH = 1e-2, 600
_ROUGH_NOMINAL, _DENSE_NOMINAL = 1e-3, 10_000
_ROUGH_WIDE, _WIDE = 1e-4, 90
_SINGLE = 1e-3  # relative gap that single precision reaches
_LARGE = 2_000_000  # rows times unknowns from which its speed, twice that of double, matters


class Solver(Protocol):
    """Anything that solves a `ConvexProgram`."""

    def solve(self, program: ConvexProgram, start: Solution | None = None) -> Solution:
        """Return a solution, starting from another of the same shape where the solver can."""
        ...


def default_solver(
    program: ConvexProgram, tol: float | None = None, max_iter: int = 3000
) -> Solver:
    r"""Return the solver for the patterns of a program that its size asks for.

    `InteriorPoint` up to 2000 unknowns (2 C d P), and up to n C = 2000 where cones are constraints
    (few neurons remain, see there) or nothing is perturbed (the factorisations fall into blocks);
    beyond that `ADMM`, or `ConicSolver` where torch is not installed. `ADMM` solves these too if

    - the program is soft, its gap may be 1e-2, and it has over 600 unknowns or numba compiles the
      iteration, which it does for l-inf perturbations;
    - the program is soft, nothing is perturbed, its gap may be 1e-3, and it has over 10 000
      unknowns or is compiled;
    - cones are constraints for boxes of 90 features or more (45 with bounds), as in pictures, and
      the gap may be 1e-4.

    Programs with copies go to `ConicSolver`, and large ones to `ADMM` if they have one output and
    no logistic loss. `ADMM` runs in single precision on large programs, if ``tol`` is at least
    1e-3; its bounds are in double precision all the same.

    Parameters
    ----------
    program : ConvexProgram
        What is to be solved.
    tol : float, optional
        Relative gap; by default 1e-4 for `InteriorPoint`, 1e-2 for `ADMM`.
    max_iter : int
        Iterations of `ADMM` at most.
    """
    size = len(program.X) * _unknowns(program)
    if program.copy_of is None:
        newton = _unknowns(program) <= _DENSE or _falls_into_blocks(program)
        if newton and not _suits_splitting(program, tol):
            return InteriorPoint(1e-4 if tol is None else tol)
    elif size <= 20 * _DENSE or not _splits_copies(program):
        return ConicSolver()
    if not _has("torch"):
        return ConicSolver()
    from convexrobust.solvers.admm import ADMM  # imports torch

    tol = 1e-2 if tol is None else tol
    single = tol >= _SINGLE and size > _LARGE
    return ADMM(tol, max_iter, dtype="float32" if single else "float64")


def dense_solver(program: ConvexProgram, tol: float) -> InteriorPoint | None:
    """Return the solver for a program on which `ADMM` got stuck; None if it is too large."""
    if program.copy_of is not None:
        return None
    small = _unknowns(program) <= _DENSE_ROUGH
    return InteriorPoint(tol) if small or _falls_into_blocks(program) else None


def _has(module) -> bool:
    return importlib.util.find_spec(module) is not None


def _unknowns(program) -> int:
    return 2 * program.D.shape[1] * program.X.shape[1] * program.n_outputs


def _constrained(program) -> bool:
    """Tell whether cones are constraints for perturbed rows."""
    return program.formulation != "soft" and program.sets.radius > 0.0


def _falls_into_blocks(program) -> bool:
    """Tell whether the systems of `InteriorPoint` fall into blocks, or are those of few neurons."""
    blocks = program.sets.radius == 0.0 or _constrained(program)
    return blocks and len(program.X) * program.n_outputs <= _DENSE


def _suits_splitting(program, tol) -> bool:
    """Tell whether `ADMM` reaches a gap earlier than `InteriorPoint`, where both are possible."""
    if not _has("torch"):
        return False
    sets = program.sets
    if _constrained(program):
        sides = program.X.shape[1] * (1 if program.perturbation.bounds is None else 2)
        wide = sets.p == np.inf and sides >= _WIDE
        return wide and (tol is None or tol >= _ROUGH_WIDE)
    nominal = sets.radius == 0.0
    rough = tol is not None and tol >= (_ROUGH_NOMINAL if nominal else _ROUGH)
    if not rough or program.formulation != "soft":
        return False
    dense = _DENSE_NOMINAL if nominal else _DENSE_ROUGH
    return _unknowns(program) > dense or compiles(program)


def _splits_copies(program) -> bool:
    """Tell whether `ADMM` has a proximal step for the copies of this program."""
    return program.n_outputs == 1 and not isinstance(program.loss, Logistic)
