"""The solver that a program gets follows from its size and form, and from what is installed."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from convexrobust import (
    ConicSolver,
    ConvexProgram,
    GroupLasso,
    Hinge,
    Logistic,
    LpBall,
    default_solver,
)
from convexrobust.solvers import ADMM, InteriorPoint, choice, compiled


def program_of(n, d, P, epsilon=0.1, formulation="soft"):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(n, d)), np.where(rng.normal(size=n) > 0, 1, -1)
    D = (X @ rng.normal(size=(d, P)) >= 0).astype(np.int8)
    ball = LpBall(np.inf, epsilon)
    return ConvexProgram(X, y, D, Hinge(), GroupLasso(1e-2), ball, formulation)


@pytest.mark.parametrize(
    "program",
    [program_of(50, 10, 20), program_of(500, 30, 40, 0.0), program_of(500, 30, 40, 0.1, "hard")],
    ids=["small", "nominal", "hard"],
)
def test_interior_point(program):
    solver = default_solver(program)
    assert isinstance(solver, InteriorPoint)
    assert solver.tol == 1e-4
    assert default_solver(program, tol=1e-6).tol == 1e-6


def test_admm_for_rough_solutions_of_soft_programs():
    program = program_of(50, 10, 50)  # 1000 unknowns
    assert isinstance(default_solver(program, tol=1e-3), InteriorPoint)
    assert isinstance(default_solver(program, tol=1e-2), ADMM)
    hard = program_of(50, 10, 50, 0.1, "hard")
    assert isinstance(default_solver(hard, tol=1e-2), InteriorPoint)


def test_admm_for_nominal_programs_where_it_is_compiled(monkeypatch):
    pytest.importorskip("numba")
    program = program_of(50, 10, 20, 0.0)
    assert isinstance(default_solver(program, tol=1e-3), ADMM)
    assert isinstance(default_solver(program, tol=1e-4), InteriorPoint)
    several = replace(program, y=np.arange(50) % 3, n_outputs=3)  # 1200 unknowns
    many = replace(program_of(50, 10, 200, 0.0), y=np.arange(50) % 3, n_outputs=3)
    for of_classes in (several, many):
        assert isinstance(default_solver(of_classes, tol=1e-2), ADMM)
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "numba" else there(name)
    )
    for small in (program, several):
        assert isinstance(default_solver(small, tol=1e-2), InteriorPoint)
    assert isinstance(default_solver(many, tol=1e-2), ADMM)


def test_admm_for_small_ones_too_where_it_is_compiled(monkeypatch):
    program = program_of(50, 10, 20)  # 400 unknowns
    pytest.importorskip("numba")
    assert isinstance(default_solver(program, tol=1e-2), ADMM)
    ball = LpBall(2, 0.1)
    assert isinstance(default_solver(replace(program, perturbation=ball), tol=1e-2), InteriorPoint)
    there = importlib.util.find_spec
    for missing in ("numba", "torch"):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.util,
                "find_spec",
                lambda name, m=missing: None if name == m else there(name),
            )
            assert isinstance(default_solver(program, tol=1e-2), InteriorPoint)


def test_interior_point_for_nominal_cones():
    """There only soft programs are quicker by splitting: few neurons are inside their cones."""
    for formulation in ("hard", "one-sided"):
        program = program_of(50, 10, 20, 0.0, formulation)
        assert isinstance(default_solver(program, tol=1e-2), InteriorPoint)


def test_the_choice_loads_numba_only_where_it_may_matter(monkeypatch):
    monkeypatch.setattr(compiled, "_numba_works", lambda: pytest.fail("numba is asked for"))
    default_solver(program_of(50, 10, 20), tol=1e-6)


def test_interior_point_takes_over_where_its_systems_are_small():
    picture = program_of(50, 95, 5, 0.1, "hard")
    for program in (picture, program_of(50, 10, 50, 0.0), program_of(50, 10, 20)):
        assert isinstance(choice.dense_solver(program, 1e-3), InteriorPoint)
    assert choice.dense_solver(program_of(50, 95, 5), 1e-3) is None  # soft, 950 unknowns


def test_admm_for_hard_programs_of_pictures():
    picture = program_of(50, 95, 5, 0.1, "hard")
    assert isinstance(default_solver(picture), ADMM)
    assert isinstance(default_solver(picture, tol=1e-6), InteriorPoint)
    for other in (program_of(50, 95, 5, 0.0), program_of(50, 60, 5, 0.1, "hard")):
        assert isinstance(default_solver(other), InteriorPoint)
    for p in (1, 2):
        ball = replace(picture, perturbation=LpBall(p, 0.1))
        assert isinstance(default_solver(ball), InteriorPoint)
    # Bounds are sides of their own.
    bounded = program_of(50, 60, 5, 0.1, "hard")
    bounded = replace(bounded, perturbation=LpBall(np.inf, 0.1, bounds=(-9.0, 9.0)))
    assert isinstance(default_solver(bounded), ADMM)


def test_admm_for_large_ones():
    program = program_of(2500, 30, 80)
    solver = default_solver(program, max_iter=7)
    assert isinstance(solver, ADMM)
    assert (solver.tol, solver.max_iter, solver.dtype) == (1e-2, 7, "float32")
    assert default_solver(program, tol=1e-4).dtype == "float64"
    assert default_solver(program_of(100, 30, 80)).dtype == "float64"


def test_programs_with_copies_have_two_solvers():
    program = program_of(50, 4, 5, 0.0)
    copies = replace(program, copy_of=np.arange(50) // 2)
    assert isinstance(default_solver(copies), ConicSolver)
    program = program_of(500, 10, 20, 0.0)
    copies = replace(program, copy_of=np.arange(500) // 2)
    assert isinstance(default_solver(copies), ADMM)
    # ADMM has no proximal step for these, and says so.
    logistic = replace(copies, loss=Logistic())
    several = replace(copies, y=np.arange(500) // 2 % 3, n_outputs=3)
    for program in (logistic, several):
        assert isinstance(default_solver(program), ConicSolver)
        with pytest.raises(ValueError, match=r"copies of samples .* use ConicSolver"):
            ADMM().solve(program)


def test_without_torch_large_programs_go_to_the_conic_solver(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert isinstance(default_solver(program_of(2500, 30, 80)), ConicSolver)
    assert isinstance(default_solver(program_of(50, 10, 20)), InteriorPoint)
