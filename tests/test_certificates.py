import itertools

import cvxpy as cp
import numpy as np
import pytest

from convexrobust import attacks, certificates
from convexrobust.backends import numpy as xp
from convexrobust.certificates import (
    certified_radius,
    exact_margins,
    exact_objective,
    margin_bounds,
    output_interval,
)
from convexrobust.losses import Hinge, Logistic, SquaredHinge
from convexrobust.network import TwoLayerReLU
from convexrobust.perturbations import DUAL_NORM, LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import ConicSolver
from tests.cases import BALLS, LOSSES, name, small_program

NORMS = [1, 2, np.inf]
SHAPES = ["equal", "per-feature", "bounds", "both"]
CLOSED = 1e-4  # brackets of these networks close to this


def ball_of(p, shape, d, epsilon=0.5):
    epsilons = epsilon * np.linspace(0.0, 1.5, d) if shape in ("per-feature", "both") else epsilon
    bounds = (-1.0, np.linspace(0.9, 1.1, d)) if shape in ("bounds", "both") else None
    return LpBall(p, epsilons, bounds)


def random_network(d=2, m=8, C=1, seed=0, intercept=True):
    rng = np.random.default_rng(seed)
    hidden, output = rng.normal(size=(d + intercept, m)), rng.normal(size=(m, C))
    return TwoLayerReLU(hidden, output, intercept, rng.normal(size=C))


def random_data(d=2, C=1, n=5, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.choice([-1, 1], n) if C == 1 else rng.integers(0, C, n)
    return np.clip(rng.normal(size=(n, d)), -1.0, 0.9), y


def margins(network, X, y):
    f = network.predict(X)
    if network.n_outputs == 1:
        return y * f[:, 0]
    rivals = [[f[k, y[k]] - f[k, c] for c in range(f.shape[1]) if c != y[k]] for k in range(len(f))]
    return np.min(rivals, axis=1)


def dense(ball, x, n=101):
    """Return points of the set around x (2,), its boundary and its corners among them."""
    axis = np.linspace(-1.0, 1.0, n)
    square = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    norms = np.linalg.norm(square, ball.p, axis=1)
    stretch = np.max(np.abs(square), axis=1) / np.where(norms > 0.0, norms, 1.0)
    lo, hi = ball.feature_range(2)
    return np.clip(x + square * stretch[:, None] * ball.epsilons(2), lo, hi)


def assert_inside(ball, X, X_adv):
    epsilon, delta = ball.epsilons(X.shape[1]), X_adv - X
    lo, hi = ball.feature_range(X.shape[1])
    assert (X_adv >= lo - 1e-12).all()
    assert (X_adv <= hi + 1e-12).all()
    np.testing.assert_allclose(delta[:, epsilon == 0.0], 0.0, atol=1e-15)
    free = epsilon > 0.0
    assert np.linalg.norm(delta[:, free] / epsilon[free], ball.p, axis=1).max() <= 1.0 + 1e-9


def assert_closed(result, network, X, y, ball):
    assert (result.lower <= result.upper).all()
    np.testing.assert_allclose(result.lower, result.upper, atol=CLOSED)
    np.testing.assert_allclose(result.upper, margins(network, result.X_adv, y), atol=1e-12)
    assert_inside(ball, X, result.X_adv)
    expected = np.where(
        result.lower > 0, "robust", np.where(result.upper <= 0, "broken", "unknown")
    )
    np.testing.assert_array_equal(result.status, expected)


# -------------------------------------------------------------------- the exact worst case


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("C", "intercept"), [(1, True), (1, False), (3, True)])
def test_exact_lies_between_the_certificate_and_every_point_of_the_set(p, shape, C, intercept):
    ball = ball_of(p, shape, 2)
    network, (X, y) = random_network(C=C, seed=C, intercept=intercept), random_data(C=C)
    result = exact_margins(network, X, y, ball)
    assert_closed(result, network, X, y, ball)
    assert (margin_bounds(network, X, y, ball) <= result.lower + 1e-12).all()
    steepness = np.linalg.norm(network.hidden[:2], axis=0) @ np.ptp(network.output, axis=1)
    steepness += np.linalg.norm(network.hidden[:2], axis=0) @ np.abs(network.output[:, 0])
    for k, x in enumerate(X):
        points = dense(ball, x)
        lowest = margins(network, points, np.full(len(points), y[k])).min()
        assert result.lower[k] <= lowest + 1e-12
        assert lowest <= result.upper[k] + steepness * ball.radius * 0.03


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_is_the_best_of_all_activation_patterns(p, shape):
    """Each pattern on its own is a convex problem, here solved with its sign constraints."""
    d, m, ball = 3, 5, ball_of(p, shape, 3)
    network, (X, y) = random_network(d, m, seed=4), random_data(d, n=2, seed=1)
    result = exact_margins(network, X, y, ball)
    epsilon, (lo, hi) = ball.epsilons(d), ball.feature_range(d)
    for k, x in enumerate(X):
        z, values = cp.Variable(d), []
        t = network.hidden[:d].T @ z + network.hidden[d]
        delta = cp.multiply(1.0 / np.where(epsilon > 0.0, epsilon, 1.0), z - x)
        rules = [cp.norm(delta, p) <= 1.0, cp.multiply(epsilon == 0.0, z - x) == 0.0]
        if ball.bounds is not None:
            rules += [lo <= z, z <= hi]
        for gates in itertools.product([0.0, 1.0], repeat=m):
            gates = np.array(gates)
            signs = 2.0 * gates - 1.0
            cost = y[k] * ((network.output[:, 0] * gates) @ t + network.offset[0])
            problem = cp.Problem(cp.Minimize(cost), [*rules, cp.multiply(signs, t) >= 0.0])
            problem.solve(solver=cp.CLARABEL)
            if problem.status == "optimal":
                values.append(problem.value)
        assert result.lower[k] <= min(values) + 1e-7
        assert result.upper[k] >= min(values) - 1e-7


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("C", [1, 3])
def test_no_attack_goes_below_the_exact_margin(p, shape, C):
    d, ball = 5, ball_of(p, shape, 5)
    network, (X, y) = random_network(d, 12, C, seed=2), random_data(d, C, n=6, seed=2)
    result = exact_margins(network, X, y, ball)
    assert_closed(result, network, X, y, ball)
    assert (margin_bounds(network, X, y, ball) <= result.lower + 1e-12).all()
    objective = attacks.worst_margin_objective(network, y)
    X_adv = attacks.pgd(objective, X, ball, n_restarts=4, random_state=0)
    assert (result.lower <= -objective(X_adv)[0] + 1e-12).all()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_calling_a_neuron_stable_only_lowers_the_bound(p, shape, monkeypatch):
    d, ball = 3, ball_of(p, shape, 3)
    net = random_network(d, 12, seed=1)
    net = TwoLayerReLU(net.hidden, np.sign(net.output), True, net.offset)
    (x, *_), rng, n_moving = random_data(d)[0], np.random.default_rng(0), []
    points = x + ball.sample(np.repeat(x[None], 100, axis=0), rng)
    f = net.predict(points)[:, 0]
    for flat in (0.0, 0.4):
        monkeypatch.setattr(certificates, "_FLAT", flat)
        local = certificates._Local.around(net, x, ball)
        n_moving.append(len(local.sign))
        v = (points - local.center) / np.where(local.axes[:d] > 0.0, local.axes[:d], 1.0)
        v = np.hstack([np.maximum(v, 0.0), np.maximum(-v, 0.0)]) if p == 1 else v
        value = local.constant + v @ local.slope
        value = value + np.maximum(v @ local.G.T + local.start, 0.0) @ local.sign
        if flat == 0.0:
            np.testing.assert_allclose(value, f, rtol=1e-9)
        assert (value <= f + 1e-9).all()
    assert n_moving[1] < n_moving[0]


def test_a_bound_that_a_point_refutes_is_not_believed(monkeypatch):
    network, (X, y), ball = random_network(), random_data(), LpBall(np.inf, 0.5)
    interval = margin_bounds(network, X, y, ball)
    monkeypatch.setattr(certificates, "_mixed_integer", lambda local, search: search.upper + 0.1)
    np.testing.assert_allclose(exact_margins(network, X, y, ball).lower, interval)


@pytest.mark.parametrize("p", NORMS)
def test_verdicts_are_those_of_the_full_search(p):
    network, (X, y) = random_network(4, 12, 3), random_data(4, 3, n=20)
    y = network.predict(X).argmax(axis=1)
    ball = LpBall(p, 0.3 if p == np.inf else 0.6)
    full = exact_margins(network, X, y, ball)
    quick = exact_margins(network, X, y, ball, verdict_only=True)
    np.testing.assert_array_equal(quick.status, full.status)
    assert {"robust", "broken"} == set(full.status)
    assert (quick.lower <= full.upper).all()
    assert (quick.upper >= full.lower).all()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("C", [1, 3])
def test_the_interval_is_exact_where_no_neuron_changes_sign(p, C):
    network, (X, y) = random_network(3, 6, C, seed=5), random_data(3, C, n=12, seed=5)
    slack = np.abs(network.design(X) @ network.hidden).min()
    ball = LpBall(p, 0.99 * slack / np.linalg.norm(network.hidden[:3], 1, axis=0).max())
    result = exact_margins(network, X, y, ball)
    np.testing.assert_allclose(result.lower, margin_bounds(network, X, y, ball), rtol=1e-9)
    np.testing.assert_allclose(result.upper, result.lower, rtol=1e-9)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("bounds", [None, (-1.0, 1.0)])
def test_without_perturbation_everything_is_the_clean_margin(p, bounds):
    network, (X, y) = random_network(3, C=3), random_data(3, C=3)
    for epsilon in (0.0, np.zeros(3)):
        ball = LpBall(p, epsilon, bounds)
        result, clean = exact_margins(network, X, y, ball), margins(network, X, y)
        for value in (result.lower, result.upper, margin_bounds(network, X, y, ball)):
            np.testing.assert_allclose(value, clean, rtol=1e-12)
        np.testing.assert_array_equal(result.X_adv, X)
        for end in output_interval(network, X, ball):
            np.testing.assert_allclose(end, network.predict(X), rtol=1e-12)


@pytest.mark.parametrize("p", NORMS)
def test_a_search_without_time_keeps_a_valid_bracket(p):
    network, (X, _) = random_network(4, 20), random_data(4, n=20)
    y, ball = np.where(network.predict(X)[:, 0] > 0.0, 1, -1), LpBall(p, 0.4)
    stopped = exact_margins(network, X, y, ball, time_limit=0.0)
    full = exact_margins(network, X, y, ball)
    assert (stopped.status == "unknown").any()
    assert (stopped.lower <= full.upper).all()
    assert (stopped.upper >= full.lower).all()
    np.testing.assert_allclose(stopped.lower, margin_bounds(network, X, y, ball), rtol=1e-12)
    np.testing.assert_allclose(stopped.upper, margins(network, stopped.X_adv, y), rtol=1e-9)
    assert_inside(ball, X, stopped.X_adv)


def test_too_many_concave_neurons_in_l2_leave_a_bracket():
    hidden = np.random.default_rng(0).normal(size=(3, 20))
    X, y, ball = np.zeros((1, 2)), np.array([1]), LpBall(2, 5.0)
    network = TwoLayerReLU(hidden, -np.ones((20, 1)))
    lowest = margins(network, dense(ball, X[0]), np.ones(101**2)).min()
    network = TwoLayerReLU(hidden, -np.ones((20, 1)), offset=np.array([1.0 - lowest]))
    result = exact_margins(network, X, y, ball)
    assert result.status[0] == "unknown"
    assert result.lower[0] < 0.0 < 1.0 <= result.upper[0] + 0.1
    np.testing.assert_allclose(result.lower, margin_bounds(network, X, y, ball))


# -------------------------------------------------------------------- the interval


@pytest.mark.parametrize("ball", BALLS, ids=name)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_at_the_training_points_it_is_the_interval_of_training(ball, n_classes):
    program = small_program(Hinge(), ball, "hard", n_classes=n_classes)
    solution = ConicSolver().solve(program)
    network = TwoLayerReLU.from_solution(solution)
    # In the hard program neurons keep their pattern on the sets, so the patterns are the gates.
    trained = program.certified().margins(xp, solution.V, solution.W).min(axis=1)
    certified = margin_bounds(network, program.X[:, :2], program.y, ball)
    np.testing.assert_allclose(certified, trained, atol=1e-6)


@pytest.mark.parametrize("p", NORMS)
def test_any_network_has_the_interval_of_its_convex_point(p):
    network, (X, y) = random_network(3, 6), random_data(3, n=12)
    network = TwoLayerReLU(network.hidden, network.output)
    V, W, D = network.to_convex(X, np.zeros((12, 0), dtype=np.int8))
    assert D.shape[1] == 6  # merged neurons would have a tighter interval
    ball = LpBall(p, 0.3)
    program = ConvexProgram(network.design(X), y, D, Hinge(), GroupLasso(0.1), ball)
    expected = program.margins(xp, V, W)[:, 0]
    np.testing.assert_allclose(margin_bounds(network, X, y, ball), expected)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_interval_holds_every_output(p, shape):
    network, (X, _), ball = random_network(3, 9, C=2), random_data(3, n=8), ball_of(p, shape, 3)
    lo, hi = output_interval(network, X, ball)
    assert lo.shape == hi.shape == (8, 2)
    rng = np.random.default_rng(0)
    for _ in range(50):
        outputs = network.predict(X + ball.sample(X, rng))
        assert (lo <= outputs + 1e-12).all()
        assert (outputs <= hi + 1e-12).all()


def test_batches_change_nothing(monkeypatch):
    network, (X, y), ball = random_network(C=3), random_data(C=3, n=11), LpBall(np.inf, 0.2)
    whole = [f(network, X, y, ball) for f in (margin_bounds, certified_radius)]
    whole += output_interval(network, X, ball)
    monkeypatch.setattr(certificates, "_BATCH", 3)
    parts = [f(network, X, y, ball) for f in (margin_bounds, certified_radius)]
    parts += output_interval(network, X, ball)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_differences_of_classes_are_bounded_as_one_network():
    network, (X, y), ball = random_network(3, 9, C=3), random_data(3, 3, n=10), LpBall(2, 0.3)
    lo, hi = output_interval(network, X, ball)
    own = np.eye(3)[y] > 0
    separate = lo[own] - np.where(own, -np.inf, hi).max(axis=1)
    joint = margin_bounds(network, X, y, ball)
    assert (joint >= separate - 1e-12).all()
    assert (joint > separate + 0.1).any()
    order = np.array([2, 0, 1])  # the old class of each new one
    shuffled = TwoLayerReLU(network.hidden, network.output[:, order], True, network.offset[order])
    np.testing.assert_allclose(margin_bounds(shuffled, X, np.argsort(order)[y], ball), joint)


def test_two_outputs_of_opposite_sign_are_one_output():
    one, (X, y), ball = random_network(3, 9), random_data(3, n=10), LpBall(np.inf, 0.2)
    two = TwoLayerReLU(one.hidden, one.output * [-1.0, 1.0], True, one.offset * [-1.0, 1.0])
    for function in (margin_bounds, lambda *args: exact_margins(*args).lower):
        np.testing.assert_allclose(
            function(two, X, (y + 1) // 2, ball), 2.0 * function(one, X, y, ball), atol=CLOSED
        )


# -------------------------------------------------------------------- radii


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("epsilon", [0.0, 0.3, np.array([0.1, 0.0, 0.4])])
def test_radius_of_a_linear_function(p, epsilon):
    w, (X, _) = np.array([1.0, -2.0, 0.5, 0.3]), random_data(3, n=20)
    network = TwoLayerReLU(np.column_stack([w, -w]), np.array([[1.0], [-1.0]]))
    f = network.predict(X)[:, 0]
    y, ball = np.where(f > 0, 1, -1), LpBall(p, epsilon)
    shape = np.ones(3) if ball.radius == 0.0 else ball.epsilons(3) / ball.radius
    expected = np.abs(f) / np.linalg.norm(shape * w[:3], DUAL_NORM[p])
    np.testing.assert_allclose(certified_radius(network, X, y, ball), expected, rtol=1e-8)
    np.testing.assert_array_equal(certified_radius(network, X, -y, ball), 0.0)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("C", [1, 3])
def test_radius_is_certified_and_no_larger_one_is(p, shape, C):
    network, (X, y), ball = random_network(3, C=C), random_data(3, C, n=12), ball_of(p, shape, 3)
    radius, clean = certified_radius(network, X, y, ball), margins(network, X, y)
    np.testing.assert_array_equal(radius > 0.0, clean > 0.0)
    assert (radius > 0.0).any()
    for k in np.flatnonzero(np.isfinite(radius) & (radius > 0.0)):
        bounds = [
            margin_bounds(network, X[[k]], y[[k]], ball.scaled_to(t * radius[k]))[0]
            for t in (0.5, 0.999, 1.0, 1.001)
        ]
        assert min(bounds[:3]) > 0.0
        assert bounds[3] <= 0.0
        if p != np.inf or ball.bounds is None:
            assert bounds == sorted(bounds, reverse=True)
    for k in np.flatnonzero(np.isinf(radius)):
        assert margin_bounds(network, X[[k]], y[[k]], ball.scaled_to(1e6))[0] > 0.0


def test_radius_is_infinite_where_no_set_is_left_to_fear():
    network = TwoLayerReLU(np.array([[0.1], [1.0], [2.0]]), np.array([[1.0]]))
    X, y = np.array([[0.0, 0.5]]), np.array([1])
    assert np.isinf(certified_radius(network, X, y, LpBall(np.inf, 0.1, bounds=(-1.0, 1.0))))
    assert np.isfinite(certified_radius(network, X, y, LpBall(np.inf, 0.1)))
    blind = TwoLayerReLU(np.array([[0.0], [1.0], [2.0]]), np.array([[1.0]]))
    for p in NORMS:
        assert np.isinf(certified_radius(blind, X, y, LpBall(p, np.array([0.1, 0.0]))))


@pytest.mark.parametrize("p", NORMS)
def test_network_without_neurons(p):
    network = TwoLayerReLU(np.zeros((3, 0)), np.zeros((0, 1)), offset=np.array([0.5]))
    X, y = random_data(n=6)
    ball = LpBall(p, 0.3)
    for end in output_interval(network, X, ball):
        np.testing.assert_array_equal(end, 0.5)
    np.testing.assert_array_equal(margin_bounds(network, X, y, ball), 0.5 * y)
    np.testing.assert_array_equal(
        certified_radius(network, X, y, ball), np.where(y > 0, np.inf, 0.0)
    )
    result = exact_margins(network, X, y, ball)
    np.testing.assert_array_equal(result.lower, 0.5 * y)
    np.testing.assert_array_equal(result.status, np.where(y > 0, "robust", "broken"))


# -------------------------------------------------------------------- objectives


def sampled_objective(program, network, n=40):
    """Return the loss at the worst of some points of each set, plus the penalty."""
    rng, X = np.random.default_rng(0), program.X[:, :2]
    directions, offsets, _ = program.margin_map
    losses = []
    for _ in range(n):
        outputs = network.predict(X + program.perturbation.sample(X, rng))
        losses.append(
            program.loss.value(xp, np.einsum("kec,kc->ke", directions, outputs) + offsets)
        )
    length = np.linalg.norm(network.hidden, axis=0) * np.abs(network.output).sum(axis=1)
    return program.weight @ np.max(losses, axis=0) + program.regularizer.beta * length.sum()


@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("p", NORMS)
def test_objective_of_hard_and_soft_programs(loss, p):
    for formulation in ("hard", "soft"):
        program = small_program(loss, LpBall(p, 0.15), formulation)
        solution = ConicSolver().solve(program)
        network = TwoLayerReLU.from_solution(solution)
        lower, upper = exact_objective(program, network)
        assert upper - lower <= 1e-5
        assert sampled_objective(program, network) <= upper
        assert lower <= solution.objective + 1e-9
        if formulation == "hard":
            assert upper == pytest.approx(solution.objective, rel=1e-4)


@pytest.mark.parametrize("loss", [Hinge(), SquaredHinge(), Logistic()], ids=name)
def test_objective_of_several_classes(loss):
    program = small_program(loss, LpBall(np.inf, 0.15), n_classes=3, seed=1)
    solution = ConicSolver().solve(program)
    network = TwoLayerReLU.from_solution(solution)
    lower, upper = exact_objective(program, network)
    sampled = sampled_objective(program, network)
    assert sampled <= upper
    assert lower <= upper <= solution.objective + 1e-5
    if not isinstance(loss, Logistic):
        assert upper - lower <= 1e-5


# -------------------------------------------------------------------- what is refused


def test_no_rows():
    network, X, ball = random_network(), np.zeros((0, 2)), LpBall(np.inf, 0.1, bounds=(-1, 1))
    y = np.zeros(0, dtype=int)
    assert output_interval(network, X, ball)[0].shape == (0, 1)
    assert margin_bounds(network, X, y, ball).shape == (0,)
    assert certified_radius(network, X, y, ball).shape == (0,)
    result = exact_margins(network, X, y, ball)
    assert result.X_adv.shape == (0, 2)
    assert result.status.shape == (0,)


@pytest.mark.parametrize("function", [margin_bounds, certified_radius, exact_margins])
def test_wrong_input_is_refused(function):
    (X, y), ball = random_data(), LpBall(np.inf, 0.1)
    with pytest.raises(ValueError, match=r"hold only \[-1, 1\]"):
        function(random_network(), X, (y + 1) // 2, ball)
    with pytest.raises(ValueError, match=r"hold only \[0, 1, 2\]"):
        function(random_network(C=3), X, y, ball)
    with pytest.raises(ValueError, match=r"y must have shape \(5,\)"):
        function(random_network(), X, y[:3], ball)
    with pytest.raises(ValueError, match="X must have shape"):
        function(random_network(3), X, y, ball)
    with pytest.raises(ValueError, match="bounds exclude the data"):
        function(random_network(), X + 5.0, y, LpBall(np.inf, 0.1, bounds=(-1.0, 1.0)))
