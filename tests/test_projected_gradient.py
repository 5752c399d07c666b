import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from convexrobust.backends import torch as torch_backend
from convexrobust.losses import (
    Absolute,
    EpsilonInsensitive,
    Hinge,
    Logistic,
    Squared,
    SquaredHinge,
)
from convexrobust.patterns import sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import ConicSolver
from convexrobust.solvers.projected_gradient import ProjectedGradient
from convexrobust.solvers.projected_gradient.saddle import Saddle
from convexrobust.solvers.tensors import scalar_like
from tests.cases import BALLS, LOSSES, name, small_data, small_program

# Every loss and every ball, each formulation, one and several outputs; not their product.
CASES = [
    (Logistic(), BALLS[4], "soft", 2),
    (Squared(), BALLS[5], "soft", 2),
    (EpsilonInsensitive(0.05), BALLS[1], "soft", 2),
    (SquaredHinge(), BALLS[2], "soft", 3),
    (Hinge(), BALLS[1], "hard", 2),
    (Logistic(), BALLS[3], "hard", 2),
    (Absolute(), BALLS[5], "hard", 2),
    (EpsilonInsensitive(0.05), BALLS[0], "hard", 2),
    (Logistic(), BALLS[5], "one-sided", 2),
    (Logistic(), LpBall(2, 0.0), "hard", 2),
]
CASE_IDS = ["-".join(map(name, case)) for case in CASES]


def few_patterns(loss, n_classes=2):
    return sample_patterns(small_data(loss.task, n_classes)[0], 5, random_state=0)


def program_of(loss, ball, formulation="soft", n_classes=2, **changes):
    D = few_patterns(loss, n_classes)
    program = small_program(loss, ball, formulation, n_classes=n_classes, D=D)
    return replace(program, **changes)


def solved(program, start=None, **options):
    """Return the solution, however early the solver stops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return ProjectedGradient(**options).solve(program, start)


def larger_program(n=300, d=6, P=12, **changes):
    rng = np.random.default_rng(0)
    X = np.hstack([rng.normal(size=(n, d)), np.ones((n, 1))])
    y = np.where(X[:, 0] * X[:, 1] + 0.5 * X[:, 2] > 0, 1, -1)
    D = sample_patterns(X, P, random_state=0)
    program = ConvexProgram(X, y, D, Hinge(), GroupLasso(0.01), LpBall(np.inf, 0.05))
    return replace(program, **changes)


@pytest.mark.parametrize(("loss", "ball", "formulation", "n_classes"), CASES, ids=CASE_IDS)
def test_agrees_with_clarabel(loss, ball, formulation, n_classes):
    program = program_of(loss, ball, formulation, n_classes)
    optimum = ConicSolver().solve(program).objective
    solution = solved(program, tol=1e-3, max_iter=2000, dtype="float64")
    assert solution.objective == pytest.approx(optimum, rel=1e-3)
    assert solution.cone_violation <= 1e-3
    # Every bound of the run, not only the last, is below the optimum.
    assert max(row.lower_bound for row in solution.history) <= optimum * (1 + 1e-6)
    assert solution.lower_bound >= 0.9 * optimum


def test_sample_weights_agree_with_clarabel():
    program = program_of(Hinge(), BALLS[2], sample_weight=np.arange(9.0))
    optimum = ConicSolver().solve(program).objective
    assert solved(program, dtype="float64").objective == pytest.approx(optimum, rel=1e-3)


@pytest.mark.parametrize(
    ("loss", "ball"), [(loss, BALLS[(0, 4, 5)[k % 3]]) for k, loss in enumerate(LOSSES)], ids=name
)
def test_gradient_is_that_of_the_program(loss, ball):
    """With hardly any smoothing the steps see the derivative of the program's own objective."""
    n_classes = 3 if loss.task == "classification" else 2
    program = program_of(loss, ball, n_classes=n_classes, sample_weight=np.arange(1.0, 10.0))
    saddle = Saddle(program, scalar_like("float64", "cpu"))
    saddle.begin(None)
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(2, *program.shape, generator=generator, dtype=torch.float64) / 10.0
    U.requires_grad_()
    value = program.mean_loss(torch_backend, program.margins(torch_backend, U[0], U[1]))
    (expected,) = torch.autograd.grad(value, U)
    saddle.balance = 1e-7
    found = saddle.gradient_of(saddle.chunks, U.detach())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_float32_certifies_the_same_optimum():
    program = program_of(SquaredHinge(), BALLS[2])
    optimum = ConicSolver().solve(program).objective
    solution = ProjectedGradient().solve(program)
    assert solution.status == "optimal"
    assert solution.solver == "ProjectedGradient"
    assert solution.lower_bound <= optimum * (1 + 1e-6)
    assert optimum * (1 - 1e-6) <= solution.objective <= optimum * (1 + 1e-3)


@pytest.mark.parametrize("formulation", ["soft", "hard"])
def test_chunks_give_the_same_iterates(formulation):
    program = larger_program(n=100, formulation=formulation)
    whole, chunked = (
        solved(program, tol=0.0, max_iter=60, dtype="float64", chunk_size=size)
        for size in (None, 37)
    )
    np.testing.assert_allclose(chunked.V, whole.V, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(chunked.W, whole.W, rtol=1e-6, atol=1e-8)
    assert chunked.lower_bound == pytest.approx(whole.lower_bound, rel=1e-6)


def test_batches_reach_the_optimum():
    program = larger_program()
    optimum = ConicSolver().solve(program).objective
    solution = solved(program, batch_size=100, max_iter=1500, tol=5e-2)
    assert solution.lower_bound <= optimum * (1 + 1e-6)
    assert solution.objective <= 1.05 * optimum
    first, second = (solved(program, batch_size=100, max_iter=20) for _ in range(2))
    np.testing.assert_array_equal(first.V, second.V)


@pytest.mark.parametrize("loss", [Hinge(), Logistic()], ids=name)
def test_starts_where_it_is_told(loss):
    program = program_of(loss, BALLS[2])
    optimum = ConicSolver().solve(program)
    unchanged = ProjectedGradient().solve(program, optimum)
    assert unchanged.n_iter == 0
    np.testing.assert_allclose(unchanged.V, optimum.V)
    # Told to go on, it stays near the optimum, where a cold start is far above it.
    stayed = solved(program, optimum, tol=0.0, max_iter=50, dtype="float64")
    assert max(row.objective for row in stayed.history) <= optimum.objective * (1 + 1e-2)
    cold = solved(program, tol=0.0, max_iter=25, dtype="float64")
    assert cold.history[-1].objective > optimum.objective * (1 + 1e-2)


def test_stopping_early_warns_and_stays_valid():
    program = program_of(Hinge(), BALLS[2])
    optimum = ConicSolver().solve(program).objective
    with pytest.warns(ConvergenceWarning, match="ProjectedGradient stopped .* after 5 iterations"):
        solution = ProjectedGradient(max_iter=5).solve(program)
    assert solution.status == "iteration limit"
    assert solution.lower_bound <= optimum <= solution.objective * (1 + 1e-9)
    with pytest.warns(ConvergenceWarning, match="time limit"):
        ProjectedGradient(time_limit=0.0, tol=0.0).solve(program)


def test_a_run_that_diverges_returns_the_last_certified_iterate(monkeypatch):
    program = program_of(SquaredHinge(), BALLS[2])
    monkeypatch.setattr(Saddle, "_curvature", lambda *arguments: 1e-9)
    with pytest.warns(ConvergenceWarning, match="diverged"):
        solution = ProjectedGradient(dtype="float32").solve(program)
    zero = np.zeros(program.shape)
    assert np.isfinite(solution.V).all()
    assert solution.objective <= program.solution(zero, zero).objective


class TestBadInput:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_cuda_without_a_device(self):
        with pytest.raises(ValueError, match=r"device='cuda'.*use device='cpu'"):
            ProjectedGradient(device="cuda").solve(program_of(Hinge(), BALLS[2]))

    @pytest.mark.parametrize("name", ["batch_size", "chunk_size", "max_iter"])
    def test_sizes(self, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            ProjectedGradient(**{name: 0})

    def test_dtype(self):
        with pytest.raises(ValueError, match="dtype must be"):
            ProjectedGradient(dtype="float16")

    def test_copies(self):
        program = program_of(Hinge(), BALLS[2], copy_of=np.arange(9) // 2)
        with pytest.raises(ValueError, match="no copies"):
            ProjectedGradient().solve(program)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_size", [None, 64])
def test_cuda_agrees_with_the_cpu(chunk_size):
    program = larger_program()
    cpu, cuda = (
        solved(program, tol=0.0, max_iter=60, dtype="float64", device=device, chunk_size=chunk_size)
        for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(cuda.V, cpu.V, rtol=1e-5, atol=1e-7)
