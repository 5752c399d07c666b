"""Which solver a program gets when none is named."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from convexrobust.program import ConvexProgram
from convexrobust.solvers.compiled import compiles
from convexrobust.solvers.conic import ConicSolver
from convexrobust.solvers.contract import Solver, refusal_of
from convexrobust.solvers.interior_point import InteriorPoint


@dataclass(frozen=True)
class Thresholds:
    """The sizes and gaps at which one solver becomes quicker than another.

    Measured by ``benchmarks/solvers/choice.py``, which times both solvers on either side of each.
    An unknown is a weight of a neuron (2 C d P of them), a gap is relative to the objective.

    Attributes
    ----------
    dense : int
        Unknowns, or outputs of all rows, up to which the dense factorisations of `InteriorPoint`
        take seconds.
    copies : int
        Rows times unknowns up to which programs with copies go to `ConicSolver`.
    soft_gap, soft_unknowns : float, int
        Gap from which on `ADMM` is quicker even below ``dense`` on perturbed soft programs, and
        unknowns beyond which it is so without being compiled.
    nominal_gap, nominal_unknowns : float, int
        The same of soft programs without perturbation.
    wide_gap, wide_sides : float, int
        Gap from which on it is quicker on constrained programs whose boxes have so many sides that
        move alone (features, twice as many with bounds): these fill the systems of Newton's method.
    single_gap, single_entries : float, int
        Gap that single precision reaches, and rows times unknowns from which its speed, twice that
        of double, matters.
    """

    dense: int = 2000
    copies: int = 40_000
    soft_gap: float = 1e-2
    soft_unknowns: int = 600
    nominal_gap: float = 1e-3
    nominal_unknowns: int = 10_000
    wide_gap: float = 1e-4
    wide_sides: int = 90
    single_gap: float = 1e-3
    single_entries: int = 2_000_000


THRESHOLDS = Thresholds()
_TOL_NEWTON, _TOL_SPLITTING = 1e-4, 1e-2  # relative gaps where none is asked for


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

    A solver that refuses the program (`Solver.refusal`) is passed over; `ConicSolver` takes any.
    Programs with copies go to it, and large ones to `ADMM` if they have one output and no logistic
    loss. `ADMM` runs in single precision on large programs, if ``tol`` is at least 1e-3; its bounds
    are in double precision all the same.

    Parameters
    ----------
    program : ConvexProgram
        What is to be solved.
    tol : float, optional
        Relative gap; by default 1e-4 for `InteriorPoint`, 1e-2 for `ADMM`.
    max_iter : int
        Iterations of `ADMM` at most.
    """
    suitable = (s for s in _by_size(program, tol, max_iter) if refusal_of(s, program) is None)
    return next(suitable, ConicSolver())


def dense_solver(program: ConvexProgram, tol: float) -> InteriorPoint | None:
    """Return the solver for a program on which `ADMM` got stuck; None if it is not for it."""
    solver = InteriorPoint(tol)
    small = _unknowns(program) <= THRESHOLDS.soft_unknowns
    if (small or _falls_into_blocks(program)) and solver.refusal(program) is None:
        return solver
    return None


def _by_size(program, tol, max_iter) -> Iterator[Solver]:
    """Yield solvers for a program of this size, the quickest first, whatever its loss."""
    size = len(program.X) * _unknowns(program)
    dense = _unknowns(program) <= THRESHOLDS.dense or _falls_into_blocks(program)
    if dense and not _suits_splitting(program, tol):
        yield InteriorPoint(_TOL_NEWTON if tol is None else tol)
    if program.copy_of is not None and size <= THRESHOLDS.copies:
        return
    if _has("torch"):
        from convexrobust.solvers.admm import ADMM  # imports torch

        tol = _TOL_SPLITTING if tol is None else tol
        single = tol >= THRESHOLDS.single_gap and size > THRESHOLDS.single_entries
        yield ADMM(tol, max_iter, dtype="float32" if single else "float64")


def _has(module) -> bool:
    return importlib.util.find_spec(module) is not None


def _unknowns(program) -> int:
    return 2 * program.D.shape[1] * program.X.shape[1] * program.n_outputs


def _constrained(program) -> bool:
    """Tell whether cones are constraints for perturbed rows."""
    return program.formulation != "soft" and not program.sets.unperturbed


def _falls_into_blocks(program) -> bool:
    """Tell whether the systems of `InteriorPoint` fall into blocks, or are those of few neurons."""
    blocks = program.sets.unperturbed or _constrained(program)
    return blocks and len(program.X) * program.n_outputs <= THRESHOLDS.dense


def _suits_splitting(program, tol) -> bool:
    """Tell whether `ADMM` reaches a gap earlier than `InteriorPoint`, where both are possible."""
    if not _has("torch"):
        return False
    sets = program.sets
    if _constrained(program):
        sides = program.X.shape[1] * (1 if program.perturbation.bounds is None else 2)
        wide = sets.p == np.inf and sides >= THRESHOLDS.wide_sides
        return wide and (tol is None or tol >= THRESHOLDS.wide_gap)
    gap, unknowns = THRESHOLDS.soft_gap, THRESHOLDS.soft_unknowns
    if sets.unperturbed:
        gap, unknowns = THRESHOLDS.nominal_gap, THRESHOLDS.nominal_unknowns
    if tol is None or tol < gap or program.formulation != "soft":
        return False
    return _unknowns(program) > unknowns or compiles(program)
