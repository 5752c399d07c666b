from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from convexrobust.backends import cvxpy as cvxpy_backend
from convexrobust.backends import numpy as xp
from convexrobust.losses import Absolute, Hinge, Logistic, Loss, Squared, SquaredHinge
from convexrobust.patterns import sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import FORMULATIONS, ConvexProgram
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import ConicSolver, SolverError
from convexrobust.solvers.gated import GatedRelaxation, proximal_point, solve_gated, solver, to_relu
from convexrobust.solvers.gated.weights_newton import Searched, _conjugate_gradients
from tests.cases import BALLS, LOSSES, MARGIN_LOSSES, name, small_data, small_program

CASES = [(loss, 2) for loss in LOSSES] + [(loss, 3) for loss in MARGIN_LOSSES]
IDS = [f"{name(loss)}-{classes}" for loss, classes in CASES]
CASES_WITH_BALLS = [(*case, BALLS[(1, 2, 5)[i % 3]]) for i, case in enumerate(CASES)]
SMOOTH = [(Squared(), 2), (SquaredHinge(), 2), (Logistic(), 2), (Logistic(), 3)]


def nominal(loss, n_classes=2, **settings):
    X, _ = small_data(loss.task, n_classes, 30)
    D = sample_patterns(X, 8, random_state=0)
    return small_program(loss, LpBall(2, 0.0), "hard", n_classes=n_classes, D=D, n=30, **settings)


def clarabel(program):
    """Return the optimal value of the gated program, written down anew."""
    n_outputs, d, P = program.shape
    U = [cp.Variable((d, P)) for _ in range(n_outputs)]
    outputs = [cp.sum(cp.multiply(program.D, program.sets.center @ u), axis=1) for u in U]
    directions, offsets, _ = program.margin_map
    margins = [
        sum(cp.multiply(directions[:, e, c], outputs[c]) for c in range(n_outputs)) + offsets[:, e]
        for e in range(offsets.shape[1])
    ]
    mean_loss = program.mean_loss(cvxpy_backend, cvxpy_backend.columns(margins))
    penalty = program.regularizer.beta * sum(cp.sum(cp.norm(u, 2, axis=0)) for u in U)
    problem = cp.Problem(cp.Minimize(mean_loss + penalty))
    return problem.solve(solver="CLARABEL", tol_gap_rel=1e-9, tol_gap_abs=1e-10)


def gated_objective(program, U):
    hidden = np.einsum("kp,kd,cdp->kc", program.D.astype(float), program.sets.center, U)
    margins = np.einsum("kec,kc->ke", program.margin_map.directions, hidden)
    mean_loss = program.mean_loss(xp, margins + program.margin_map.offsets)
    return mean_loss + program.regularizer.beta * np.linalg.norm(U, axis=1).sum()


def lowest_zero_beta(program):
    """Return the beta from which U = 0 is optimal for the squared loss."""
    correlation = program.X.T @ (program.D * program.y[:, None]) / len(program.y)
    return np.linalg.norm(correlation, axis=0).max()


@pytest.fixture(params=["outputs", "weights"])
def method(request, monkeypatch):
    """Solve in either of the two ways that the size of the data chooses between."""
    if request.param == "weights":
        monkeypatch.setattr(solver, "_CHOLESKY_EQUATIONS", 0)


@pytest.mark.parametrize(("loss", "n_classes"), CASES, ids=IDS)
def test_clarabel_agrees(loss, n_classes):
    program = nominal(loss, n_classes)
    optimum = clarabel(program)
    tol = 1e-6 if (loss, n_classes) in SMOOTH else 1e-2
    found = solve_gated(program, tol=tol)
    assert found.status == "optimal"
    assert found.lower_bound <= optimum * (1 + 1e-7)
    assert optimum * (1 - 1e-7) <= found.objective <= optimum * (1 + 1.1 * tol)
    assert found.objective == pytest.approx(gated_objective(program, found.U), rel=1e-12)


@pytest.mark.parametrize(("loss", "n_classes"), SMOOTH, ids=name)
@pytest.mark.usefixtures("method")
def test_smooth_losses_to_high_accuracy_both_ways(loss, n_classes):
    program = nominal(loss, n_classes)
    found = solve_gated(program, tol=1e-9)
    assert found.relative_gap <= 1e-9
    assert found.objective == pytest.approx(clarabel(program), rel=1e-7)


def test_searched_directions_precondition_exactly_where_the_matrix_is_the_same():
    rng = np.random.default_rng(0)
    A = rng.normal(size=(12, 12))
    A = torch.tensor(A @ A.T + np.eye(12))
    active = torch.ones(1, 6, dtype=torch.bool)

    def matrix(R):
        return (A @ R.flatten()).view_as(R)

    b = torch.tensor(rng.normal(size=(2, 1, 6)))
    _, pairs = _conjugate_gradients(matrix, lambda R: R, b, n_kept=3)
    searched = Searched(most=3)
    searched.keep(pairs, active)
    precondition = searched.improve(lambda R: R, active)
    for direction, image in pairs:
        torch.testing.assert_close(precondition(image), direction)
    inverse = torch.stack([precondition(e.view(2, 1, 6)).flatten() for e in torch.eye(12).double()])
    torch.testing.assert_close(inverse, inverse.T)
    assert torch.linalg.eigvalsh(inverse).min() > 0.0
    other = torch.zeros_like(active)
    assert searched.improve(matrix, other) is matrix  # other neurons


@pytest.mark.parametrize("loss", [Hinge(), Absolute()], ids=name)
def test_kinks_become_sharper_only_as_fast_as_they_are_solved(loss, monkeypatch):
    """By Newton's method in the weights; otherwise the bound falls back and never closes."""
    monkeypatch.setattr(solver, "_CHOLESKY_EQUATIONS", 0)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 10))
    y = np.maximum(X @ rng.normal(size=(10, 5)), 0.0) @ rng.normal(size=5)
    y = np.where(y > np.median(y), 1, -1) if loss.task == "classification" else y
    D = sample_patterns(X, 10, random_state=0)
    program = ConvexProgram(X, y, D, loss, GroupLasso(1e-3), LpBall(2, 0.0), intercept=False)
    assert solve_gated(program, tol=1e-3).status == "optimal"


@pytest.mark.parametrize(("loss", "n_classes"), CASES, ids=IDS)
@pytest.mark.usefixtures("method")
def test_every_recorded_bound_holds(loss, n_classes):
    program = nominal(loss, n_classes)
    optimum = clarabel(program)
    with pytest.warns(ConvergenceWarning, match="iteration limit"):
        found = solve_gated(program, tol=0.0, max_iter=80)
    for _, _, objective, lower_bound in found.history:
        assert lower_bound <= optimum * (1 + 1e-8)
        assert objective >= optimum * (1 - 1e-8)
    assert found.objective == min(row[2] for row in found.history)
    assert found.lower_bound == max(row[3] for row in found.history)


@pytest.mark.parametrize("beta", [1e4, 1e6])
def test_the_zero_network_is_proven_optimal_at_once(beta):
    """The scales of the multipliers that the dual allows reach far beyond those of use."""
    found = solve_gated(nominal(Squared(), beta=beta))
    assert found.status == "optimal"
    assert not found.U.any()


@pytest.mark.parametrize(
    ("loss", "ball"), list(zip([Hinge(), Squared()] * 3, BALLS, strict=True)), ids=name
)
def test_below_every_formulation(loss, ball):
    D = sample_patterns(small_data(loss.task)[0], 6, random_state=0)
    for formulation in FORMULATIONS:
        program = small_program(loss, ball, formulation, D=D)
        bound = solve_gated(program, tol=1e-2).lower_bound
        assert 0.0 < bound <= ConicSolver().solve(program).objective * (1 + 1e-6)


@pytest.mark.parametrize("settings", [{"dtype": "float64"}, {"chunk_size": 7}], ids=str)
@pytest.mark.usefixtures("method")
def test_settings_do_not_change_the_solution(settings):
    program = nominal(Squared())
    plain = solve_gated(program, tol=1e-8)
    other = solve_gated(program, tol=1e-8, **settings)
    assert other.objective == pytest.approx(plain.objective, rel=1e-7)
    np.testing.assert_allclose(other.U, plain.U, atol=1e-4)


@pytest.mark.gpu
def test_cuda_agrees():
    program = nominal(Logistic(), 3)
    on_gpu = solve_gated(program, device="cuda")
    assert on_gpu.objective == pytest.approx(solve_gated(program).objective, rel=2e-6)


@pytest.mark.usefixtures("method")
def test_zero_from_the_largest_beta_on():
    largest = lowest_zero_beta(nominal(Squared()))
    above = solve_gated(nominal(Squared(), beta=1.001 * largest))
    below = solve_gated(nominal(Squared(), beta=0.99 * largest))
    assert not above.U.any()
    assert below.U.any()


@pytest.mark.usefixtures("method")
def test_weights_are_repetitions():
    X, y = small_data(n=20)
    D, weight = sample_patterns(X, 5, random_state=0), np.arange(20) % 3
    arguments = (Logistic(), GroupLasso(0.02), LpBall(2, 0.0))
    repeated = ConvexProgram(*(np.repeat(a, weight, axis=0) for a in (X, y, D)), *arguments)
    weighted = ConvexProgram(X, y, D, *arguments, sample_weight=weight)
    values = [solve_gated(program, tol=1e-8).objective for program in (repeated, weighted)]
    assert values[0] == pytest.approx(values[1], rel=1e-7)


def test_start_at_the_solution_is_the_end():
    program = nominal(Squared())
    found = solve_gated(program, tol=1e-9)
    assert solve_gated(program, tol=1e-4, start=found.U).n_iter == 0


def test_time_limit():
    with pytest.warns(ConvergenceWarning, match="time limit"):
        found = solve_gated(nominal(Squared()), tol=0.0, time_limit=0.0)
    assert found.status == "time limit"


class TestOverflow:
    """Whatever overflows ends the run; the last certified point counts."""

    @pytest.mark.usefixtures("method")
    def test_of_single_precision(self):
        program = nominal(Squared())
        large = replace(program, X=1e25 * program.X)
        with pytest.warns(ConvergenceWarning, match="'diverged'"):
            found = solve_gated(large)
        assert found.status == "diverged"
        assert found.objective == pytest.approx(0.5 * np.mean(program.y**2))
        assert not found.U.any()

    @pytest.mark.usefixtures("method")
    @pytest.mark.parametrize("value", [1e300, np.nan])
    def test_of_the_start(self, value):
        program = nominal(Squared())
        with pytest.warns(ConvergenceWarning, match="'diverged'"):
            found = solve_gated(program, start=np.full(program.shape, value))
        assert found.lower_bound <= found.objective == pytest.approx(0.5 * np.mean(program.y**2))

    def test_of_a_newton_step(self, monkeypatch):
        program = nominal(Squared())
        nothing = (np.nan * torch.ones(30, 1), -1.0)
        monkeypatch.setattr(proximal_point, "_direction", lambda *args: nothing)
        with pytest.warns(ConvergenceWarning, match="'diverged'"):
            found = solve_gated(program, tol=0.0)
        assert found.objective == pytest.approx(gated_objective(program, found.U), rel=1e-12)
        assert found.objective < 0.5 * np.mean(program.y**2)

    def test_of_the_system_of_a_newton_step(self):
        with pytest.raises(FloatingPointError, match="not finite"):
            proximal_point._cholesky(torch.tensor([[1.0, 3.0], [3.0, np.nan]]))


class TestRelu:
    @pytest.mark.parametrize(("loss", "n_classes", "ball"), CASES_WITH_BALLS, ids=name)
    def test_better_than_the_trivial_network(self, loss, n_classes, ball):
        X, _ = small_data(loss.task, n_classes, 30)
        D = sample_patterns(X, 8, random_state=0)
        program = small_program(loss, ball, n_classes=n_classes, D=D, n=30)
        U = solve_gated(program, tol=1e-2).U
        found = to_relu(program, U)
        zero = np.zeros_like(U)
        trivial = min(program.solution(*pair).objective for pair in ((U, zero), (zero, zero)))
        assert found.objective <= trivial
        assert found.objective == program.solution(found.V, found.W).objective

    def test_optimal_where_no_cone_is_left(self):
        """One pattern that is active everywhere, data far from 0: the gates are the ReLUs."""
        rng = np.random.default_rng(0)
        X = np.hstack([1.0 + rng.uniform(size=(30, 2)), np.ones((30, 1))])
        y, D = X @ np.array([1.0, 2.0, 0.5]), np.ones((30, 1))
        program = ConvexProgram(X, y, D, Squared(), GroupLasso(0.01), LpBall(2, 0.0))
        found = GatedRelaxation(tol=1e-4).solve(program)
        assert found.status == "optimal"
        assert found.objective == pytest.approx(ConicSolver().solve(program).objective, rel=1e-4)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize(("loss", "n_classes"), [CASES[0], CASES[3], CASES[8]], ids=name)
def test_relaxation_brackets_the_optimum(loss, n_classes, formulation):
    D = sample_patterns(small_data(loss.task, n_classes)[0], 6, random_state=0)
    program = small_program(loss, BALLS[2], formulation, n_classes=n_classes, D=D)
    found = GatedRelaxation(1e-2).solve(program)
    optimum = ConicSolver().solve(program).objective
    soft = ConicSolver().solve(program.certified()).objective
    assert found.status == "relaxation"
    assert found.lower_bound <= optimum * (1 + 1e-6)
    assert found.objective >= soft * (1 - 1e-6)
    again = GatedRelaxation(1e-2).solve(program, start=found)
    assert again.lower_bound == pytest.approx(found.lower_bound, rel=2e-2)


class TestBadInput:
    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("tol", -1.0),
            ("tol", np.nan),
            ("dtype", "int8"),
            ("chunk_size", 0),
            ("start", np.eye(2)),
        ],
        ids=str,
    )
    def test_arguments(self, argument, value):
        with pytest.raises(ValueError, match=f"{argument} must"):
            solve_gated(nominal(Squared()), **{argument: value})

    def test_no_penalty(self):
        with pytest.raises(ValueError, match="beta must be > 0"):
            solve_gated(nominal(Squared(), beta=0.0))

    def test_weights_of_another_shape(self):
        with pytest.raises(ValueError, match="U must have shape"):
            to_relu(nominal(Squared()), np.zeros((1, 2, 3)))

    def test_a_loss_of_unknown_pieces(self):
        class Cubic(Squared):
            kind = "other"

        assert issubclass(Cubic, Loss)
        with pytest.raises(SolverError, match=r"Cubic is 'other': use ConicSolver\(\)"):
            solve_gated(nominal(Cubic()))
