import itertools
from fractions import Fraction
from types import SimpleNamespace

import cvxpy as cp
import numpy as np
import pytest

from convexrobust import attacks
from convexrobust.backends import numpy as xp
from convexrobust.certificates import (
    METHODS,
    branch_and_bound,
    certified_radius,
    certify,
    cone_program,
    exact_margins,
    exact_objective,
    exact_radius,
    interval,
    margin_bounds,
    output_interval,
)
from convexrobust.certificates.relaxation import Minima, Relaxation, implied_ranges, roots
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
def test_verdicts_are_those_of_the_full_search(p):
    network, (X, y) = random_network(4, 12, 3), random_data(4, 3, n=20)
    y = network.predict(X).argmax(axis=1)
    ball = LpBall(p, 0.3 if p == np.inf else 0.6)
    full = exact_margins(network, X, y, ball)
    quick = certify(network, X, y, ball, "exact")
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


def test_many_concave_neurons_in_l2():
    hidden = np.random.default_rng(0).normal(size=(3, 20))
    X, y, ball = np.zeros((1, 2)), np.array([1]), LpBall(2, 5.0)
    network = TwoLayerReLU(hidden, -np.ones((20, 1)))
    lowest = margins(network, dense(ball, X[0]), np.ones(101**2)).min()
    result = exact_margins(network, X, y, ball)
    assert_closed(result, network, X, y, ball)
    np.testing.assert_allclose(result.upper, lowest, rtol=1e-3)


# -------------------------------------------------------------------- its parts


def some_cases(p, shape, seed=0, radius=None):
    """Return the problems of three samples in cases of random signs, and points of their sets."""
    d, m, ball, rng = 3, 8, ball_of(p, shape, 3), np.random.default_rng(seed)
    network, (X, _) = random_network(d, m, 2, seed), random_data(d, n=3, seed=seed)
    sample = np.repeat(np.arange(3), 4)
    directions = rng.normal(size=(len(sample), 2))
    weight, offset = directions @ network.output.T, directions @ network.offset
    minima = Minima(network, ball.around(X, radius=radius), sample, weight, offset)
    cases = roots(minima)
    concave = (weight < 0.0) & (cases.least < 0.0) & (cases.most > 0.0)
    sign = np.where(concave, rng.choice([-1, 0, 1], weight.shape, p=[0.2, 0.6, 0.2]), 0)
    scale = 1.0 if radius is None else radius[:, None]
    steps = ball.sample(np.tile(X, (2000, 1)), rng).reshape(2000, 3, d)
    lo, hi = ball.feature_range(d)
    return minima, cases._replace(sign=sign.astype(np.int8)), np.clip(X + scale * steps, lo, hi)


def values_in_case(minima, cases, points, b):
    """Return the outputs of the problem of case b at those points that are in the case."""
    i = cases.problem[b]
    t = minima.network.design(points[:, minima.sample[i]]) @ minima.network.hidden
    inside = (t * cases.sign[b] >= 0.0).all(axis=1)
    return t[inside], minima.offset[i] + np.maximum(t[inside], 0.0) @ minima.weight[i]


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_choice_of_slopes_is_a_lower_bound(p, shape):
    minima, cases, points = some_cases(p, shape)
    relaxation, rng = Relaxation(minima, cases), np.random.default_rng(1)
    low = np.maximum(relaxation.low, -3.0 * np.abs(relaxation.weight))
    high = np.minimum(relaxation.high, 3.0 * np.abs(relaxation.weight))
    n_met = 0
    for share in (0.0, 1.0, rng.uniform(size=low.shape), rng.uniform(size=low.shape)):
        slope = np.minimum(low, high) + share * np.abs(high - low)
        bound = relaxation.bound(slope, slope @ minima.hidden.T)
        for b in range(len(bound)):
            _, values = values_in_case(minima, cases, points, b)
            n_met += len(values)
            assert (values >= bound[b]).all()
    assert n_met > 5_000


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ascent_comes_near_the_accurate_solution_from_below(p, shape):
    minima, cases, points = some_cases(p, shape)
    cases = cases._replace(sign=0 * cases.sign)
    relaxation = Relaxation(minima, cases)
    few, many = (relaxation.ascend(cases.slope, n).bound for n in (1, 300))
    no_bound = np.full(3, np.inf)
    for b in range(len(few)):
        solved = cone_program.solve(Relaxation(minima, cases.at([b])), -no_bound, no_bound)
        assert few[b] <= many[b] <= solved.bound + 1e-7
        span = np.abs(minima.weight[b]) @ minima.reach[minima.sample[b]]
        assert solved.bound - many[b] <= 0.02 * span
        assert solved.bound <= values_in_case(minima, cases, points, b)[1].min()


def test_the_relaxation_is_the_triangle_linear_program():
    minima, cases, _ = some_cases(np.inf, "equal", seed=3)
    cases = cases._replace(sign=0 * cases.sign)
    for b in range(len(cases.problem)):
        k, weight = minima.sample[b], minima.weight[b]
        delta, h = cp.Variable(3), cp.Variable(8)
        t, least, most = minima.at_center[k] + delta @ minima.hidden, cases.least[b], cases.most[b]
        rules = [cp.abs(delta) <= minima.sets.radius * minima.sets.weights[0], h >= 0.0, h >= t]
        for j in range(8):
            if least[j] >= 0.0 or most[j] <= 0.0:
                rules.append(h[j] == t[j] * (least[j] >= 0.0))
            else:
                rules.append(h[j] <= most[j] * (t[j] - least[j]) / (most[j] - least[j]))
        problem = cp.Problem(cp.Minimize(minima.offset[b] + weight @ h), rules)
        value = problem.solve(solver=cp.CLARABEL)
        no_bound = np.full(3, np.inf)
        solved = cone_program.solve(Relaxation(minima, cases.at([b])), -no_bound, no_bound)
        np.testing.assert_allclose(solved.bound, value, atol=1e-6)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("radius", [None, np.array([0.5, 1.0, 2.0])])
def test_the_sign_of_a_neuron_implies_ranges_of_the_others(p, radius):
    minima, cases, points = some_cases(p, "equal", seed=2, radius=radius)
    n_narrower = 0
    for i in range(len(minima.sample)):
        t = minima.network.design(points[:, minima.sample[i]]) @ minima.network.hidden
        for j in np.flatnonzero((cases.least[i] < 0.0) & (cases.most[i] > 0.0)):
            least, most = implied_ranges(minima, i, j)
            for inactive in (0, 1):
                met = t[(t[:, j] <= 0.0) if inactive else (t[:, j] >= 0.0)]
                assert (met >= least[inactive]).all()
                assert (met <= most[inactive]).all()
            n_narrower += np.sum(least > cases.least[i]) + np.sum(most < cases.most[i])
    assert n_narrower > 50


def test_parallel_neurons_are_searched_as_one():
    """Forty copies of a neuron have two sensible cases, not 2^40."""
    rng = np.random.default_rng(0)
    direction = np.array([[1.0], [0.5], [0.1]])
    hidden = np.hstack([direction * rng.uniform(0.5, 2.0, 40), rng.normal(size=(3, 4))])
    output = np.vstack([-np.ones((40, 1)), np.ones((4, 1))])
    network, X, ball = TwoLayerReLU(hidden, output), np.zeros((1, 2)), LpBall(np.inf, 1.0)
    result = exact_margins(network, X, np.array([1]), ball)
    assert_closed(result, network, X, np.array([1]), ball)
    lowest = margins(network, dense(ball, X[0]), np.ones(101**2)).min()
    np.testing.assert_allclose(result.upper, lowest, atol=1e-2)


def test_an_impossible_case_has_no_bound():
    network = TwoLayerReLU(np.eye(2), -np.ones((2, 1)), intercept=False)
    sets = LpBall(np.inf, 1.0).around(np.zeros((1, 2)))
    minima = Minima(network, sets, np.array([0]), np.array([[-1.0, -1.0]]), np.zeros(1))
    case = roots(minima)._replace(sign=np.array([[1, -1]], dtype=np.int8))
    above = np.array([np.inf, np.inf])
    solved = cone_program.solve(Relaxation(minima, case), np.array([-np.inf, 0.5]), above)
    assert solved.bound > 1e3  # x_2 >= 1/2 by its bound, and x_2 <= 0 in this case


# -------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("C", [1, 3])
def test_each_method_is_at_least_as_sharp_as_the_one_before(p, shape, C):
    d, ball = 5, ball_of(p, shape, 5, epsilon=0.3)
    network, (X, _) = random_network(d, 12, C, seed=6), random_data(d, C, n=20, seed=6)
    outputs = network.predict(X)
    y = np.where(outputs[:, 0] > 0, 1, -1) if C == 1 else outputs.argmax(axis=1)
    interval, lp, exact = (certify(network, X, y, ball, how) for how in METHODS)
    full = exact_margins(network, X, y, ball)
    np.testing.assert_array_equal(interval.lower, margin_bounds(network, X, y, ball))
    np.testing.assert_array_equal(interval.X_adv, X)
    assert (lp.lower >= interval.lower).all()
    for result in (interval, lp, exact):
        assert (result.lower <= full.upper).all()
        np.testing.assert_array_equal(result.upper, margins(network, result.X_adv, y))
        assert_inside(ball, X, result.X_adv)
        robust, broken = result.status == "robust", result.status == "broken"
        np.testing.assert_array_equal(full.status[robust], "robust")
        np.testing.assert_array_equal(full.status[broken], "broken")
        assert (result.seconds >= 0.0).all()
    assert (exact.status != "unknown").all()
    n_robust = [np.sum(result.status == "robust") for result in (interval, lp, exact)]
    assert n_robust == sorted(n_robust)


@pytest.mark.parametrize("C", [1, 3])
def test_output_intervals_of_all_methods(C):
    network, (X, _), ball = random_network(2, 8, C), random_data(2, n=4), LpBall(np.inf, 0.4)
    ends = [output_interval(network, X, ball, how) for how in METHODS]
    for (lo, hi), (sharper_lo, sharper_hi) in itertools.pairwise(ends):
        assert (lo <= sharper_lo + 1e-12).all()
        assert (sharper_hi <= hi + 1e-12).all()
    for k, x in enumerate(X):
        f = network.predict(dense(ball, x))
        assert (ends[-1][0][k] <= f.min(axis=0) + 1e-12).all()
        assert (ends[-1][1][k] >= f.max(axis=0) - 1e-12).all()
        np.testing.assert_allclose(ends[-1][0][k], f.min(axis=0), atol=0.05)
        np.testing.assert_allclose(ends[-1][1][k], f.max(axis=0), atol=0.05)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("C", [1, 3])
def test_exact_radius_is_between_proofs(p, shape, C):
    d, ball = 4, ball_of(p, shape, 4, epsilon=1.0)
    network, (X, y) = random_network(d, 8, C, seed=7), random_data(d, C, n=6, seed=7)
    found = exact_radius(network, X, y, ball, tol=1e-2)
    wrong = margins(network, X, y) <= 0.0
    np.testing.assert_array_equal(found.lower[wrong], 0.0)
    np.testing.assert_array_equal(found.upper[wrong], 0.0)
    assert (found.lower >= certified_radius(network, X, y, ball)).all()
    assert (found.upper - found.lower <= 1e-2 * found.upper)[np.isfinite(found.upper)].all()
    for k in np.flatnonzero(~wrong & np.isfinite(found.upper)):
        below, above = ball.scaled_to(found.lower[k]), ball.scaled_to(found.upper[k])
        assert certify(network, X[[k]], y[[k]], below, "exact").status == "robust"
        assert margins(network, found.X_adv[[k]], y[[k]]) <= 0.0
        assert_inside(above, X[[k]], found.X_adv[[k]])
    far = np.isinf(found.upper) & ~np.isinf(found.lower)
    assert not far.any()


@pytest.mark.parametrize("p", NORMS)
def test_exact_radius_of_a_linear_function(p):
    w, X = np.array([[1.0], [-2.0], [0.5]]), np.random.default_rng(0).normal(size=(5, 3))
    network = TwoLayerReLU(np.hstack([w, -w]), np.array([[1.0], [-1.0]]), intercept=False)
    y = np.where(X @ w[:, 0] > 0.0, 1, -1)
    found = exact_radius(network, X, y, LpBall(p, 0.1))
    expected = np.abs(X @ w[:, 0]) / np.linalg.norm(w, DUAL_NORM[p])
    assert (found.lower <= expected + 1e-12).all()
    assert (found.upper >= expected - 1e-12).all()
    np.testing.assert_allclose(found.lower, expected, rtol=2e-3)
    np.testing.assert_allclose(found.upper, expected, rtol=2e-3)


def test_exact_radius_without_any_adversary_or_time():
    constant = TwoLayerReLU(np.zeros((3, 1)), np.ones((1, 1)), offset=np.ones(1))
    found = exact_radius(constant, np.zeros((1, 2)), np.array([1]), LpBall(np.inf, 0.1))
    assert found.lower[0] == found.upper[0] == np.inf
    network, (X, _), bounds = random_network(2, 8), random_data(2), (-1.0, 1.1)
    y = np.where(network.predict(X)[:, 0] > 0, 1, -1)
    stopped = exact_radius(network, X, y, LpBall(2, 0.1, bounds), time_limit=0.0)
    np.testing.assert_array_equal(
        stopped.lower, certified_radius(network, X, y, LpBall(2, 0.1, bounds))
    )
    assert np.isinf(stopped.upper).all()
    offset = 1.0 + 100.0 * np.abs(network.hidden).sum() * np.abs(network.output).sum()
    safe = TwoLayerReLU(network.hidden, network.output, offset=np.array([offset]))
    found = exact_radius(safe, X, np.ones(len(X), int), LpBall(np.inf, 0.1, bounds))
    np.testing.assert_array_equal(found.lower, np.inf)


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
    monkeypatch.setattr(interval, "_ROWS_AT_ONCE", 3)
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
        np.testing.assert_allclose(end, 0.5, rtol=1e-15)
    np.testing.assert_allclose(margin_bounds(network, X, y, ball), 0.5 * y, rtol=1e-15)
    np.testing.assert_array_equal(
        certified_radius(network, X, y, ball), np.where(y > 0, np.inf, 0.0)
    )
    result = exact_margins(network, X, y, ball)
    np.testing.assert_allclose(result.lower, 0.5 * y, rtol=1e-15)
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


def test_rounding_is_taken_off():
    """Bounds are below the true minimum in rational arithmetic, where cancellation is total."""
    n_tight = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scale = 10.0 ** rng.integers(-6, 7, 6)
        hidden = rng.normal(size=(2, 6)) * [[1.0], [scale.max()]]
        hidden[1] = np.where(
            rng.random(6) < 0.5, np.abs(hidden[1]), -hidden[0]
        )  # stable, or a kink
        output = (rng.choice([-1.0, 1.0], 6) * scale)[:, None]
        offset = -np.maximum(hidden[0] + hidden[1], 0.0) @ output  # the output is near 0 at x = 1
        network, x, ball = TwoLayerReLU(hidden, output, offset=offset), 1.0, LpBall(np.inf, 1e-9)
        kinks = [-Fraction(b) / Fraction(w) for w, b in hidden.T]
        ends = [Fraction(x) - Fraction(1e-9), Fraction(x) + Fraction(1e-9)]
        points = [*ends, *(kink for kink in kinks if ends[0] < kink < ends[1])]
        for label in (-1, 1):
            lowest = min(label * exact_output(network, point) for point in points)
            arguments = np.array([[x]]), np.array([label]), ball
            for method in METHODS:
                lower = Fraction(certify(network, *arguments, method).lower[0])
                assert lower <= lowest
                n_tight += lowest - lower <= Fraction(1e-12) * Fraction(np.abs(hidden).max() * 1e6)
    assert n_tight > 100


def exact_output(network, x):
    """Return the output at a rational x of a network with one feature, in rational arithmetic."""
    total = Fraction(network.offset[0])
    for (w, b), a in zip(network.hidden.T, network.output[:, 0], strict=True):
        total += Fraction(a) * max(Fraction(w) * x + Fraction(b), Fraction(0))
    return total


def test_a_search_ends_when_its_time_does(monkeypatch):
    """With a clock that ticks at every look, so that no real time counts."""
    ticks = itertools.count(step=0.01)
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(branch_and_bound, "time", clock)
    rng = np.random.default_rng(0)
    network = TwoLayerReLU(rng.normal(size=(31, 100)), rng.normal(size=(100, 1)))
    X = rng.normal(size=(4, 30))
    y = np.where(network.predict(X)[:, 0] > 0.0, 1, -1)
    found = exact_margins(network, X, y, LpBall(np.inf, 0.2), time_limit=0.1)
    open_ = found.upper - found.lower > 1e-3
    assert open_.any()
    assert (found.seconds[open_] >= 0.1).all()
    assert (found.lower >= margin_bounds(network, X, y, LpBall(np.inf, 0.2))).all()


@pytest.mark.parametrize("limit", [-1.0, np.nan])
def test_wrong_time_limits_are_refused(limit):
    arguments = random_network(), *random_data(), LpBall(np.inf, 0.1)
    for function in (certify, exact_margins, exact_radius):
        with pytest.raises(ValueError, match="time_limit must be"):
            function(*arguments, time_limit=limit)
    with pytest.raises(ValueError, match="tol must be"):
        exact_radius(*arguments, tol=0.0)
    with pytest.raises(ValueError, match="method must be"):
        certify(*arguments, "guess")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_is_not_finite_is_refused(value):
    (X, y), network = random_data(), random_network()
    X[1, 0] = value
    for function in (certify, exact_margins, exact_radius, margin_bounds, certified_radius):
        with pytest.raises(ValueError, match="finite"):
            function(network, X, y, LpBall(np.inf, 0.1))
