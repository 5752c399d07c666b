import numpy as np
import pytest
import torch

from convexrobust.backends import numpy as xp
from convexrobust.losses import Hinge
from convexrobust.network import TwoLayerReLU
from convexrobust.patterns import enumerate_patterns, sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.solvers import ConicSolver
from tests.cases import LOSSES, name, small_data, small_program


def random_network(d=2, m=7, C=1, seed=0, intercept=True):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(d + intercept, m))
    return TwoLayerReLU(hidden, rng.normal(size=(m, C)), intercept, rng.normal(size=C))


def balanced_penalty(network):
    return 0.5 * (np.sum(network.hidden**2) + np.sum(network.output**2))


@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("formulation", ["hard", "one-sided", "soft"])
def test_recovered_network_has_the_program_s_objective(loss, formulation):
    """Without perturbations the network's own objective is recomputed from scratch."""
    program = small_program(loss, LpBall(2, 0.0), formulation)
    solution = ConicSolver().solve(program)
    network = TwoLayerReLU.from_solution(solution)
    z = network.predict(program.X[:, :2])[:, 0]
    losses = loss.worst_case(xp, z, z, program.y)
    value = losses.mean() + program.regularizer.beta * balanced_penalty(network)
    # All patterns are there, so even the soft and one-sided optima are attained by the network.
    assert value == pytest.approx(solution.objective, rel=2e-5)


def test_recovery_of_several_outputs():
    program = small_program(Hinge(), LpBall(2, 0.0), "hard", n_classes=3)
    solution = ConicSolver().solve(program)
    network = TwoLayerReLU.from_solution(solution)
    expected = program.outputs(xp, program.slopes(xp, solution.V, solution.W))
    np.testing.assert_allclose(
        network.predict(program.X[:, :2]), np.column_stack(expected), atol=1e-5
    )


@pytest.mark.parametrize("n_classes", [2, 3])
def test_any_network_is_a_point_of_the_program(n_classes):
    X, _ = small_data(n_classes=n_classes)
    network = random_network(C=1 if n_classes == 2 else 3)
    D = sample_patterns(X, 3, random_state=0)
    V, W, grown = network.to_convex(X[:, :2], D)
    np.testing.assert_array_equal(grown[:, :3], D)
    assert len(np.unique(grown, axis=1).T) == grown.shape[1]
    program = small_program(Hinge(), LpBall(2, 0.0), "hard", n_classes=n_classes, D=grown)
    outputs = np.column_stack(program.outputs(xp, program.slopes(xp, V, W)))
    np.testing.assert_allclose(outputs + network.offset, network.predict(X[:, :2]))
    assert program.cone_violation(V, W) <= 1e-12
    lengths = np.linalg.norm(network.hidden, axis=0) * np.abs(network.output).sum(axis=1)
    assert program.penalty(xp, V, W, beta=1.0) <= lengths.sum() + 1e-12


def test_convex_training_improves_on_any_network():
    X, _ = small_data()
    network = random_network(m=12)
    V, W, D = network.to_convex(X[:, :2], enumerate_patterns(X)[:, :2])
    program = small_program(Hinge(), LpBall(np.inf, 0.1), D=D)
    assert ConicSolver().solve(program).objective <= program.objective(xp, V, W) + 1e-6


def test_round_trip_keeps_the_function():
    X, _ = small_data()
    program = small_program(Hinge(), LpBall(np.inf, 0.1), "hard")
    network = TwoLayerReLU.from_solution(ConicSolver().solve(program))
    V, W, D = network.to_convex(X[:, :2], program.D)
    assert D.shape == program.D.shape
    objective = program.objective(xp, V, W)
    assert objective == pytest.approx(ConicSolver().solve(program).objective, rel=1e-5)


def test_pruning_removes_what_does_not_matter():
    network = random_network(m=5)
    hidden = np.hstack([network.hidden, 1e-9 * np.ones((3, 2))])
    padded = TwoLayerReLU(
        hidden, np.vstack([network.output, np.zeros((2, 1))]), True, network.offset
    )
    pruned = padded.pruned()
    assert pruned.n_neurons == 5
    X = np.random.default_rng(0).normal(size=(20, 2))
    np.testing.assert_allclose(pruned.predict(X), padded.predict(X), atol=1e-12)


@pytest.mark.parametrize("intercept", [True, False])
def test_torch_twin_and_gradient(intercept):
    network = random_network(d=3, C=2, intercept=intercept)
    X = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    directions = np.random.default_rng(0).normal(size=(11, 2))
    outputs = network.to_torch()(X)
    np.testing.assert_allclose(outputs.detach(), network.predict(X.detach().numpy()), atol=1e-12)
    (outputs * torch.as_tensor(directions)).sum().backward()
    np.testing.assert_allclose(X.grad, network.gradient(X.detach().numpy(), directions), atol=1e-12)


def test_zero_solution_gives_an_empty_network():
    program = small_program(Hinge(), LpBall(2, 0.0))
    solution = program.solution(np.zeros(program.shape), np.zeros(program.shape))
    network = TwoLayerReLU.from_solution(solution)
    assert network.n_neurons == 0
    np.testing.assert_array_equal(network.predict(np.ones((4, 2))), np.zeros((4, 1)))


@pytest.mark.parametrize(
    ("hidden", "output", "message"),
    [
        (np.ones((3, 2)), np.ones((4, 1)), "number of neurons"),
        (np.ones(3), np.ones((3, 1)), "hidden must be"),
        (np.full((3, 2), np.nan), np.ones((2, 1)), "hidden must be a finite"),
    ],
)
def test_bad_arrays(hidden, output, message):
    with pytest.raises(ValueError, match=message):
        TwoLayerReLU(hidden, output)


def test_bad_inputs():
    with pytest.raises(ValueError, match=r"X must have shape \(n, 2\)"):
        random_network().predict(np.ones((3, 5)))
    with pytest.raises(ValueError, match="offset"):
        TwoLayerReLU(np.ones((3, 2)), np.ones((2, 1)), offset=np.ones(2))
