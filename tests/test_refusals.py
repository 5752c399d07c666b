"""What a solver cannot treat it refuses by name; who was not named is passed over."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest

from convexrobust import (
    ConvexRobustClassifier,
    Solution,
    default_solver,
    regularization_path,
)
from convexrobust.exchange import Exchange
from convexrobust.losses import Hinge, Logistic, LossKind, MarginLoss, Squared
from convexrobust.perturbations import LpBall
from convexrobust.solvers import (
    ADMM,
    ConicSolver,
    GatedRelaxation,
    InteriorPoint,
    ProgramRefusedError,
    ProjectedGradient,
    SolverError,
    WorkingSet,
)
from convexrobust.solvers.choice import dense_solver
from convexrobust.solvers.working_set.constant import best_constant
from tests.cases import small_data, small_program

LINF = LpBall(np.inf, 0.1)
OWN_SOLVERS = [ADMM(), InteriorPoint(), ProjectedGradient(), GatedRelaxation()]


@dataclass(frozen=True)
class CubedHinge(MarginLoss):
    """A loss that no solver knows: max(0, 1 - the smallest margin), cubed."""

    smoothness = np.inf
    largest_multiplier = np.inf

    def value(self, xp, margins):
        return xp.pos(1.0 + xp.row_max(-margins)) ** 3

    def conjugate(self, multipliers):
        total = multipliers.sum(axis=1)
        return 2.0 * (total / 3.0) ** 1.5 - total

    def multipliers(self, margins):
        found = np.zeros_like(margins)
        rows = np.arange(len(margins)), margins.argmin(axis=1)
        found[rows] = 3.0 * np.maximum(1.0 - margins.min(axis=1), 0.0) ** 2
        return found


def with_copies(program):
    """Return the program with two copies of each sample."""
    index = np.repeat(np.arange(len(program.X)), 2)
    X = program.X[index] + 0.1 * np.arange(2 * len(program.X))[:, None] % 0.2
    return replace(program, X=X, y=program.y[index], D=program.D[index], copy_of=index)


@pytest.mark.parametrize("solver", OWN_SOLVERS, ids=repr)
class TestEachSolver:
    def test_refuses_a_loss_of_no_known_kind(self, solver):
        program = small_program(CubedHinge(), LINF)
        text = solver.refusal(program)
        assert "CubedHinge is 'other': use ConicSolver()" in text
        with pytest.raises(ProgramRefusedError, match="CubedHinge is 'other'"):
            solver.solve(program)

    def test_refuses_copies_that_it_cannot_group(self, solver):
        program = with_copies(small_program(Logistic(), LINF))
        assert "ConicSolver()" in solver.refusal(program)
        with pytest.raises(SolverError, match="cop"):
            solver.solve(program)

    def test_refuses_nothing_that_it_solves(self, solver):
        assert solver.refusal(small_program(Hinge(), LINF)) is None

    def test_is_asked_by_whom_it_works_for(self, solver):
        program = small_program(CubedHinge(), LINF)
        around = WorkingSet(solver=solver, width=0)
        assert around.refusal(program) == solver.refusal(program)
        with pytest.raises(ProgramRefusedError, match="CubedHinge"):
            around.solve(program)
        X, y = small_data()
        model = ConvexRobustClassifier(loss=CubedHinge(), solver=solver)
        with pytest.raises(SolverError, match="CubedHinge"):
            model.fit(X[:, :-1], y)


def test_copies_of_one_output_are_for_admm():
    assert ADMM().refusal(with_copies(small_program(Hinge(), LINF))) is None
    assert ADMM().refusal(with_copies(small_program(Hinge(), LINF, n_classes=3))) is not None


def test_gated_needs_a_penalty():
    with pytest.raises(ProgramRefusedError, match="beta must be > 0"):
        GatedRelaxation().solve(small_program(Hinge(), LINF, beta=0.0))


def test_conic_solvers_without_exponential_cones_refuse_the_logistic_loss():
    program = small_program(Logistic(), LINF)
    assert "QOCO takes no exponential cones" in ConicSolver("qoco").refusal(program)
    assert ConicSolver().refusal(program) is None


def test_exchange_asks_its_solver_about_copies():
    program = small_program(Hinge(), LINF)
    with pytest.raises(ProgramRefusedError, match="copy_of already"):
        Exchange().solve(with_copies(program))
    with pytest.raises(ProgramRefusedError, match="InteriorPoint takes no program with copy_of"):
        Exchange(solver=InteriorPoint()).solve(program)


def test_the_choice_passes_over_who_refuses():
    program = small_program(CubedHinge(), LINF)
    for tol in (None, 1e-2):
        assert isinstance(default_solver(program, tol), ConicSolver)
    assert dense_solver(program, 1e-3) is None
    large = replace(program, D=np.tile(program.D, 200))
    assert isinstance(default_solver(large), ConicSolver)


def test_a_loss_of_no_known_kind_is_solved_by_default():
    X, y = small_data(n=20)
    program = small_program(CubedHinge(), LINF, n=20)
    optimum = ConicSolver().solve(program)
    assert optimum.relative_gap < 1e-5
    model = ConvexRobustClassifier(0.1, beta=0.02, loss=CubedHinge(), random_state=0).fit(
        X[:, :-1], y
    )
    assert model.solution_.status == "optimal"
    assert model.gap_ < 1e-2
    assert best_constant(program).objective >= optimum.objective


def test_a_value_that_cvxpy_cannot_express_is_refused():
    class ByNumPy(CubedHinge):
        def value(self, xp, margins):
            return np.maximum(1.0 - margins.min(axis=1), 0.0) ** 3

    class Concave(CubedHinge):
        def value(self, xp, margins):
            return -xp.square(margins[:, 0])

    with pytest.raises(ProgramRefusedError, match=r"cannot express ByNumPy.value by cvxpy"):
        ConicSolver().solve(small_program(ByNumPy(), LINF))
    with pytest.raises(ProgramRefusedError, match="Concave: cvxpy does not see that"):
        ConicSolver().solve(small_program(Concave(), LINF))


def test_a_solver_without_a_refusal_refuses_nothing():
    class Silent:
        def solve(self, program, start=None):
            return ConicSolver().solve(program, start)

    program = small_program(Hinge(), LINF)
    assert WorkingSet(solver=Silent()).refusal(program) is None


def test_working_sets_take_copies():
    """With a first network trained on them, whose samples count by their worst copy."""
    program = with_copies(small_program(Hinge(), LINF))
    found = WorkingSet(1e-4, width=8, max_rounds=10).solve(program)
    optimum = ConicSolver().solve(program).objective
    assert found.objective <= optimum * (1.0 + 1e-3)
    assert found.gap <= 1e-4


class TestBadLosses:
    @pytest.mark.parametrize("loss", ["hinge", Hinge, None, 1.0])
    def test_what_is_no_loss(self, loss):
        program = small_program(Hinge(), LINF)
        with pytest.raises(ValueError, match=r"loss must be an object derived from .*\.Loss"):
            replace(program, loss=loss)

    def test_an_unknown_kind(self):
        class Odd(Squared):
            kind = "quadratic"

        with pytest.raises(
            ValueError, match=r"loss.kind must be one of .*'other'.*Odd says 'quadratic'"
        ):
            small_program(Odd(), LINF)

    @pytest.mark.parametrize(
        ("attribute", "value"),
        [
            ("task", None),
            ("task", "ranking"),
            ("largest_multiplier", None),
            ("largest_multiplier", "1"),
            ("largest_multiplier", -1.0),
            ("threshold", np.nan),
            ("steepness", None),
            ("steepness", -1.0),
        ],
    )
    def test_attributes_that_cannot_be(self, attribute, value):
        class Odd(Squared):
            kind = LossKind.SMALLEST_MARGIN

        setattr(Odd, attribute, value)
        with pytest.raises(ValueError, match=rf"loss\.{attribute} must be .*; Odd (says|has none)"):
            replace(small_program(Squared(), LINF), loss=Odd())

    def test_a_value_of_another_shape(self):
        """One a margin instead of one a row would be summed over pairs of rows, by broadcasting."""

        class Odd(CubedHinge):
            def value(self, xp, margins):
                return xp.pos(1.0 - margins)

        X, y = small_data()
        for n_patterns in (None, 2):
            model = ConvexRobustClassifier(loss=Odd(), n_patterns=n_patterns)
            with pytest.raises(ValueError, match=r"loss\.value must return .* Odd returned"):
                model.fit(X[:, :-1], y)

    def test_kinds_are_written_as_strings_too(self):
        class Plain(Squared):
            kind = "smallest margin"

        assert Plain.kind == LossKind.SMALLEST_MARGIN
        assert InteriorPoint().refusal(small_program(Plain(), LINF)) is None


class TestBadSolvers:
    @pytest.mark.parametrize("solver", ["admm", InteriorPoint, 3, object()], ids=str)
    @pytest.mark.parametrize("around", [WorkingSet, Exchange])
    def test_what_is_no_solver(self, around, solver):
        with pytest.raises(ValueError, match=r"solver must be an object with solve\(program"):
            around(solver=solver)

    @pytest.mark.parametrize("answer", [True, "", 0, b"no"], ids=repr)
    def test_a_refusal_that_is_no_text(self, answer):
        class Odd(ConicSolver):
            def refusal(self, program):
                return answer

        program = small_program(Hinge(), LINF)
        for solve in (Odd().solve, WorkingSet(solver=Odd()).solve):
            with pytest.raises(SolverError, match=r"Odd\.refusal must return None, or a text"):
                solve(program)

    @pytest.mark.parametrize("answer", [None, (1, 2), {"V": 0}], ids=repr)
    def test_an_answer_that_is_no_solution(self, answer):
        class Odd:
            def solve(self, program, start=None):
                return answer

        X, y = small_data()
        for solver in (Odd(), WorkingSet(solver=Odd())):
            with pytest.raises(SolverError, match=r"Odd\.solve must return a Solution"):
                ConvexRobustClassifier(solver=solver).fit(X[:, :-1], y)
        with pytest.raises(SolverError, match=r"Odd\.solve must return a Solution"):
            Exchange(solver=Odd()).solve(small_program(Hinge(), LINF))

    @pytest.mark.parametrize(
        ("V", "got"),
        [
            (np.zeros((1, 2, 5)), r"V and W of shapes \(1, 2, 5\)"),
            (np.full((1, 3, 2), np.nan), "weights whose objective is nan"),
        ],
        ids=["shape", "nan"],
    )
    def test_a_solution_of_something_else(self, V, got):
        class Odd:
            def solve(self, program, start=None):
                return Solution(V, V, 1.0 + V.sum())

        X, y = small_data()
        model = ConvexRobustClassifier(solver=Odd(), n_patterns=2)
        for fit in (model.fit, partial(regularization_path, model, betas=[0.1])):
            with pytest.raises(SolverError, match=rf"Odd\.solve must return a Solution.*{got}"):
                fit(X[:, :-1], y)

    def test_patterns_are_generated_once(self):
        class Other(ConicSolver):
            def solve(self, program, start=None):
                return replace(super().solve(program, start), D=1 - program.D)

        program = small_program(Hinge(), LINF)
        few = replace(program, D=program.D[:, :2])
        inner = WorkingSet(width=4, max_rounds=1)
        with pytest.raises(SolverError, match="WorkingSet returned a solution with other patterns"):
            WorkingSet(solver=inner, width=0).solve(few)
        for around in (WorkingSet(solver=Other(), width=0), Exchange(solver=Other())):
            with pytest.raises(SolverError, match=r"Other returned .*\bConicSolver\(\)"):
                around.solve(program)
