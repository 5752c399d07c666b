import copy
import pickle
import sys
import types

import cvxpy as cp
import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from convexrobust.losses import Hinge, Logistic, Squared
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram
from convexrobust.solvers import ConicSolver, SolverError
from tests.cases import BALLS, small_program


@pytest.mark.parametrize("solver", ["SCS", "QOCO"])
def test_other_solvers_agree_with_clarabel(solver):
    if solver not in cp.installed_solvers():
        pytest.skip(f"{solver} is not installed")
    program = small_program(Hinge(), BALLS[2])
    reference = ConicSolver().solve(program)
    other = ConicSolver(solver).solve(program)
    assert other.objective == pytest.approx(reference.objective, rel=1e-3)
    assert other.lower_bound <= reference.objective * (1 + 1e-7)
    assert other.solver == solver


def test_path_compiles_once_and_gives_the_same_values():
    solver, compiled = ConicSolver(), set()
    for epsilon in (0.05, 0.2):
        for beta in (0.01, 0.1):
            program = small_program(Logistic(), LpBall(np.inf, epsilon), beta=beta)
            value = solver.solve(program).objective
            compiled.add(id(solver._compiled))
            assert value == pytest.approx(ConicSolver().solve(program).objective, rel=1e-6)
    assert len(compiled) == 1
    solver.solve(small_program(Logistic(), LpBall(2, 0.05)))
    assert id(solver._compiled) not in compiled


def test_stopping_early_warns_and_stays_valid():
    program = small_program(Hinge(), BALLS[2])
    optimum = ConicSolver().solve(program).objective
    with pytest.warns(
        ConvergenceWarning, match=r"CLARABEL stopped .* after 3 iterations.*lower bound"
    ):
        solution = ConicSolver(max_iter=3).solve(program)
    assert solution.status == "user_limit"
    assert solution.lower_bound <= optimum <= solution.objective * (1 + 1e-9)


def test_an_open_gap_is_not_called_optimal(monkeypatch):
    """The gap is opened by taking the lower bound away, whatever the solver says."""
    monkeypatch.setattr(ConvexProgram, "lower_bound", lambda program, multipliers: 0.0)
    with pytest.warns(ConvergenceWarning, match="stopped with status 'gap open'"):
        solution = ConicSolver().solve(small_program(Hinge(), BALLS[2]))
    assert solution.status == "gap open"
    assert solution.relative_gap == 1.0


def test_without_beta_there_is_no_gap_to_close():
    solution = ConicSolver().solve(small_program(Squared(), LpBall(2, 0.0), beta=0.0))
    assert solution.status == "optimal"
    assert solution.lower_bound == pytest.approx(0.0, abs=1e-12)


def test_unknown_and_unfit_solvers_are_refused_by_name():
    with pytest.raises(
        SolverError, match=r"solver 'NOPE' is not installed \(available: .*CLARABEL"
    ):
        ConicSolver("NOPE").solve(small_program(Hinge(), BALLS[2]))
    with pytest.raises(SolverError, match="OSQP failed"):
        ConicSolver("OSQP").solve(small_program(Hinge(), BALLS[2]))


def test_mosek_without_a_licence_says_so(monkeypatch):
    """The one thing that cannot exist here is a licence: mosek itself is faked."""

    class Error(Exception):
        pass

    class Env:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return False

        def checkoutlicense(self, feature):
            raise Error("rescode.err_missing_license_file(1008): License cannot be located.")

    fake = types.SimpleNamespace(Env=Env, Error=Error, feature=types.SimpleNamespace(pts=0))
    monkeypatch.setitem(sys.modules, "mosek", fake)
    installed = cp.installed_solvers()
    monkeypatch.setattr(cp, "installed_solvers", lambda: ["MOSEK", *installed])
    program = small_program(Hinge(), BALLS[2])
    with pytest.raises(
        SolverError, match=r"MOSEK is installed but has no licence.*MOSEKLM_LICENSE"
    ):
        ConicSolver("MOSEK").solve(program)
    assert ConicSolver().solve(program).solver == "CLARABEL"


def test_missing_extra_is_named():
    if "MOSEK" in cp.installed_solvers():
        pytest.skip("MOSEK is installed")
    with pytest.raises(SolverError, match=r"convexrobust\[mosek\]"):
        ConicSolver("MOSEK").solve(small_program(Hinge(), BALLS[2]))


def test_solver_copies_and_pickles_without_its_cache():
    solver = ConicSolver("SCS", max_iters=10)
    solver._compiled = object()
    for twin in (copy.deepcopy(solver), pickle.loads(pickle.dumps(solver))):
        assert repr(twin) == "ConicSolver('SCS', max_iters=10)"
        assert twin._compiled is None
