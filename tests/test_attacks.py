"""Attacks against closed forms, convex optimisation, brute force and torch's autograd."""

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from convexrobust.attacks import apgd, fgsm, pgd, square, worst_margin_objective, worst_of
from convexrobust.attacks.region import Region
from convexrobust.network import TwoLayerReLU
from convexrobust.perturbations import DUAL_NORM, LpBall

NORMS = [1, 2, np.inf]
EPSILONS = [0.3, np.array([0.1, 0.0, 0.7, 0.3])]
TASKS = [("classification", 1), ("classification", 3), ("regression", 1)]  # and outputs
W = np.array([0.4, -1.0, 0.8, -0.9])


def linear(w):
    def loss_and_gradient(X):
        return X @ w, np.tile(w, (len(X), 1))

    return loss_and_gradient


def random_network(d, width, n_outputs=1, seed=0):
    rng = np.random.default_rng(seed)
    hidden, output = rng.normal(size=(d + 1, width)), rng.normal(size=(width, n_outputs))
    return TwoLayerReLU(hidden, output, offset=rng.normal(size=n_outputs))


def labels_for(network, n, task, rng):
    if task == "regression":
        return rng.normal(size=n)
    return (
        rng.choice([-1, 1], n)
        if network.n_outputs == 1
        else rng.integers(network.n_outputs, size=n)
    )


def grid_in_unit_ball(p):
    """Points of the two-dimensional unit ball: a grid and the boundary."""
    axis = np.linspace(-1.0, 1.0, 41)
    points = np.array(list(itertools.product(axis, axis)))
    angle = np.linspace(0.0, 2.0 * np.pi, 401)
    edge = np.column_stack([np.cos(angle), np.sin(angle)])
    edge /= np.linalg.norm(edge, p, axis=1, keepdims=True)
    return np.vstack([points[np.linalg.norm(points, p, axis=1) <= 1.0], edge])


# ------------------------------------------------------------------ linear losses: closed forms


@pytest.mark.parametrize("attack", [fgsm, pgd, apgd])
@pytest.mark.parametrize("epsilon", EPSILONS, ids=["scalar", "per feature"])
@pytest.mark.parametrize("p", NORMS)
def test_linear_loss_grows_by_the_dual_norm(p, epsilon, attack):
    X = np.random.default_rng(0).normal(size=(7, 4))
    X_adv = attack(linear(W), X, LpBall(p, epsilon))
    assert (X_adv - X) @ W == pytest.approx(np.linalg.norm(epsilon * W, DUAL_NORM[p]), rel=1e-9)


@pytest.mark.parametrize("n_restarts", [1, 4])
@pytest.mark.parametrize("epsilon", EPSILONS, ids=["scalar", "per feature"])
@pytest.mark.parametrize("p", NORMS)
def test_steps_that_cannot_jump_there_end_at_the_maximum_too(p, epsilon, n_restarts):
    """True only if steps and projection measure length alike when the radii differ."""
    X = np.random.default_rng(0).normal(size=(7, 4))
    options = {"n_steps": 100, "step": 0.2, "n_restarts": n_restarts, "random_state": 0}
    X_adv = pgd(linear(W), X, LpBall(p, epsilon), **options)
    assert (X_adv - X) @ W == pytest.approx(np.linalg.norm(epsilon * W, DUAL_NORM[p]), rel=1e-6)


@pytest.mark.parametrize("attack", [fgsm, pgd, apgd])
@pytest.mark.parametrize("p", NORMS)
def test_linear_network_grows_by_the_dual_norm(p, attack):
    # One neuron that is active everywhere nearby; the offset takes its bias away again.
    network = TwoLayerReLU(np.append(W, 100.0)[:, None], [[1.0]], offset=[-100.0])
    X, y = np.random.default_rng(0).normal(size=(6, 4)), np.array([1, -1, 1, 1, -1, -1])
    objective = worst_margin_objective(network, y)
    gained = objective(attack(objective, X, LpBall(p, 0.3)))[0] - objective(X)[0]
    assert gained == pytest.approx(0.3 * np.linalg.norm(W, DUAL_NORM[p]), rel=1e-9)


@pytest.mark.parametrize("attack", [fgsm, pgd, apgd])
@pytest.mark.parametrize("epsilon", EPSILONS, ids=["scalar", "per feature"])
def test_box_cut_by_bounds_is_solved_exactly(epsilon, attack):
    lo, hi = np.array([-0.1, -np.inf, -1.0, -0.2]), np.array([0.1, 0.5, np.inf, 0.2])
    X = np.clip(np.random.default_rng(1).normal(size=(20, 4)), lo, hi)
    X_adv = attack(linear(W), X, LpBall(np.inf, epsilon, (lo, hi)))
    corner = np.where(W > 0.0, np.minimum(X + epsilon, hi), np.maximum(X - epsilon, lo))
    assert X_adv @ W == pytest.approx(corner @ W, rel=1e-12)


@pytest.mark.parametrize("epsilon", EPSILONS, ids=["scalar", "per feature"])
@pytest.mark.parametrize("p", [1, 2])
def test_ball_cut_by_bounds_is_nearly_filled(p, epsilon):
    """The best feature cannot move at all, the next ones only a little: cvxpy knows the optimum."""
    cp = pytest.importorskip("cvxpy")
    X = np.array([[0.0, -0.4, 0.3, 0.1], [0.4, 0.0, 0.4, -0.4], [0.4, -0.4, 0.35, -0.3]])
    X_adv = pgd(linear(W), X, LpBall(p, epsilon, (-0.4, 0.4)), n_steps=100)
    reach = np.broadcast_to(epsilon, 4)
    for x, x_adv in zip(X, X_adv, strict=True):
        u = cp.Variable(4)  # delta in units of epsilon
        point = x + cp.multiply(reach, u)
        problem = cp.Problem(
            cp.Maximize(cp.multiply(reach, u) @ W),
            [cp.norm(u, p) <= 1.0, point <= 0.4, point >= -0.4],
        )
        problem.solve(solver=cp.CLARABEL)
        assert 0.97 * problem.value <= (x_adv - x) @ W <= problem.value + 1e-6


# ------------------------------------------------------------------ networks: brute force


@pytest.mark.parametrize(("task", "n_outputs"), TASKS)
@pytest.mark.parametrize("epsilon", [0.5, np.array([0.9, 0.3])], ids=["scalar", "per feature"])
@pytest.mark.parametrize("p", NORMS)
def test_pgd_reaches_the_maximum_on_a_grid(p, epsilon, task, n_outputs):
    network = random_network(2, 8, n_outputs, seed=3)
    rng = np.random.default_rng(4)
    X = rng.normal(size=(20, 2))
    y = labels_for(network, len(X), task, rng)
    objective = worst_margin_objective(network, y, task=task)
    options = {"n_steps": 20, "n_restarts": 40, "random_state": 0}
    found = objective(pgd(objective, X, LpBall(p, epsilon), **options))[0]
    best = np.max([objective(X + epsilon * u)[0] for u in grid_in_unit_ball(p)], axis=0)
    assert np.all(found >= best - 0.01 * (best - objective(X)[0]) - 1e-9)


@pytest.mark.parametrize("p", NORMS)
def test_pgd_never_loses_to_the_clean_point_nor_to_fgsm(p):
    network = random_network(5, 12)
    rng = np.random.default_rng(5)
    X, y = rng.normal(size=(40, 5)), rng.choice([-1, 1], 40)
    objective, ball = worst_margin_objective(network, y), LpBall(p, 0.8, (-2.5, 2.5))
    X = np.clip(X, -2.5, 2.5)
    clean, one_step = objective(X)[0], objective(fgsm(objective, X, ball))[0]
    before = np.maximum(clean, one_step)
    for n_restarts in (1, 2, 4):  # the first restarts are the same, so more cannot be worse
        X_adv = pgd(objective, X, ball, n_steps=5, n_restarts=n_restarts, random_state=0)
        found = objective(X_adv)[0]
        assert np.all(found >= before)
        before = found
    assert np.mean(before > np.maximum(clean, one_step)) > 0.2


def test_restarts_find_what_the_clean_point_hides():
    """Where no neuron is active there is no slope to follow; a random start may have one."""
    network = TwoLayerReLU(np.array([[1.0], [-0.5]]), [[1.0]])
    objective = worst_margin_objective(network, np.array([-1]))
    X, ball = np.zeros((1, 1)), LpBall(np.inf, 1.0)
    assert objective(pgd(objective, X, ball))[0] == 0.0
    assert objective(pgd(objective, X, ball, n_restarts=8, random_state=0))[0] == 0.5


# ------------------------------------------------------------------ apgd, square, worst of several


@pytest.mark.parametrize("epsilon", [0.8, np.array([0.9, 0.0, 1.2, 0.5, 0.7])])
@pytest.mark.parametrize("p", NORMS)
def test_apgd_never_loses_to_the_clean_point_nor_to_fgsm(p, epsilon):
    network = random_network(5, 12)
    rng = np.random.default_rng(5)
    X, y = np.clip(rng.normal(size=(40, 5)), -2.5, 2.5), rng.choice([-1, 1], 40)
    objective, ball = worst_margin_objective(network, y), LpBall(p, epsilon, (-2.5, 2.5))
    start = np.maximum(objective(X)[0], objective(fgsm(objective, X, ball))[0])
    before = start - 1e-12
    for n_restarts in (1, 2, 4):  # the first restarts are the same, so more cannot be worse
        X_adv = apgd(objective, X, ball, n_steps=20, n_restarts=n_restarts, random_state=0)
        found = objective(X_adv)[0]
        assert np.all(found >= before)
        before = found
    assert np.mean(before > start + 1e-9) > 0.2


@pytest.mark.parametrize("p", NORMS)
def test_apgd_spends_its_steps_on_a_narrow_ridge(p):
    """A concave loss whose maximum is inside the ball: long steps overshoot until they halve."""
    top = np.array([0.05, -0.12, 0.2, 0.03])

    def loss_and_gradient(X):
        return -np.sum((X - top) ** 2, axis=1), -2.0 * (X - top)

    X_adv = apgd(loss_and_gradient, np.zeros((1, 4)), LpBall(p, 1.0), n_steps=200)
    assert X_adv[0] == pytest.approx(top, abs=0.02)


@pytest.mark.parametrize("bounds", [None, (-1.0, 1.2)], ids=["unbounded", "bounds"])
@pytest.mark.parametrize("shape", [None, (1, 2, 2), (2, 1, 2)])
@pytest.mark.parametrize("p", NORMS)
def test_square_comes_near_the_linear_maximum_and_keeps_the_worst_query(p, shape, bounds):
    seen = []

    def loss(X):
        seen.append(X @ W)
        return seen[-1]

    X = np.random.default_rng(0).uniform(-0.5, 0.5, size=(6, 4))
    ball = LpBall(p, 0.3, bounds)
    X_adv = square(loss, X, ball, n_queries=500, shape=shape, random_state=0)
    assert np.array_equal(X_adv @ W, np.max(seen, axis=0))
    assert len(seen) == 501
    exact = np.linalg.norm(0.3 * W, DUAL_NORM[p])
    assert np.all((X_adv - X) @ W >= 0.95 * exact)
    assert np.array_equal(seen[-1], X @ W)  # the points given are among those asked for


def test_square_improves_with_its_budget():
    network = random_network(6, 12)
    rng = np.random.default_rng(5)
    X, y = rng.normal(size=(60, 6)), rng.choice([-1, 1], 60)
    objective, ball = worst_margin_objective(network, y), LpBall(np.inf, 0.5)
    means = [
        objective(square(objective, X, ball, n_queries=n, random_state=0))[0].mean()
        for n in (1, 10, 100)
    ]
    assert np.all(np.diff(means) > 0.0)
    strong = objective(pgd(objective, X, ball, n_restarts=5, random_state=0))[0].mean()
    assert means[-1] >= strong - 0.02 * (strong - objective(X)[0].mean())


def test_square_climbs_where_there_is_no_gradient():
    """A staircase: flat almost everywhere, so that gradient attacks cannot leave the start."""

    def loss(X):
        return np.floor(4.0 * X.sum(axis=1)) / 4.0

    X = np.zeros((3, 5)) + 0.01
    flat = pgd(lambda X: (loss(X), 0.0 * X), X, LpBall(np.inf, 0.2))
    assert np.array_equal(flat, X)
    X_adv = square(loss, X, LpBall(np.inf, 0.2), n_queries=200, random_state=0)
    assert np.array_equal(loss(X_adv), np.ones(3))  # of at most 5 * 0.21 = 1.05


def test_worst_of_takes_the_best_of_each_row():
    rng = np.random.default_rng(3)
    network, X = random_network(5, 10), rng.normal(size=(30, 5))
    objective = worst_margin_objective(network, rng.choice([-1, 1], 30))
    ball = LpBall(1, 1.0)
    attacks = [
        fgsm,
        partial(pgd, n_steps=3),
        partial(apgd, n_steps=3),
        partial(square, n_queries=9),
    ]
    attacks[-1] = partial(attacks[-1], random_state=0)
    losses = [objective(attack(objective, X, ball))[0] for attack in attacks]
    found = objective(worst_of(objective, X, ball, attacks))[0]
    assert np.array_equal(found, np.max(losses, axis=0))
    assert len(set(np.argmax(losses, axis=0))) > 1


def test_worst_of_refuses_an_attack_that_leaves_the_ball():
    def leaking(loss_and_gradient, X, ball, xp):
        return X + 1.001 * ball.epsilon

    with pytest.raises(RuntimeError, match="left the ball"):
        worst_of(linear(W), np.zeros((2, 4)), LpBall(np.inf, 0.1), [fgsm, leaking])


@pytest.mark.parametrize("epsilon", EPSILONS, ids=["scalar", "per feature"])
def test_fgsm_is_exact_in_l1_with_bounds(epsilon):
    """A linear loss over a cross-polytope cut by a box: a fractional knapsack, here as an LP."""
    rng = np.random.default_rng(2)
    X, d = rng.uniform(-0.4, 0.4, size=(10, 4)), 4
    X_adv = fgsm(linear(W), X, LpBall(1, epsilon, (-0.4, 0.4)))
    reach = np.broadcast_to(epsilon, d)
    both = np.hstack([reach * W, -reach * W])  # u = up - down, in units of epsilon
    for x, x_adv in zip(X, X_adv, strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(reach > 0.0, np.array([0.4 - x, x + 0.4]) / reach, 0.0)
        best = linprog(
            -both,
            A_ub=np.ones((1, 2 * d)),
            b_ub=[1.0],
            bounds=[*zip(np.zeros(2 * d), room.ravel(), strict=True)],
        )
        assert (x_adv - x) @ W == pytest.approx(-best.fun, rel=1e-9)


def test_momentum_carries_over_a_dip():
    """Past a ridge the gradient points back; with momentum the second step goes on."""

    def loss_and_gradient(X):
        slope = np.where((X > 0.25) & (X < 0.4), -1.0, 1.0)
        height = X - 2.0 * np.clip(X - 0.25, 0.0, 0.15)
        return height[:, 0], slope

    X, ball = np.zeros((1, 1)), LpBall(np.inf, 1.0)
    options = {"n_steps": 20, "step": 0.1}
    assert pgd(loss_and_gradient, X, ball, **options)[0, 0] < 0.4
    assert pgd(loss_and_gradient, X, ball, momentum=1.0, **options)[0, 0] > 0.7


# ------------------------------------------------------------------ the threat model is kept


@st.composite
def balls(draw):
    p, d = draw(st.sampled_from(NORMS)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-4, 3))
    epsilon = scale * rng.choice([0.0, 0.01, 1.0], d) * rng.uniform(size=d)
    epsilon = draw(st.sampled_from([epsilon, scale, 0.0]))
    bounds = draw(st.sampled_from([None, (-1.0, 1.0), (np.full(d, -np.inf), rng.uniform(size=d))]))
    return LpBall(p, epsilon, bounds), d, rng


ATTACKS = {
    "fgsm": fgsm,
    "pgd": partial(pgd, n_steps=4, n_restarts=3, random_state=0),
    "pgd with momentum": partial(pgd, n_steps=4, momentum=0.9),
    "apgd": partial(apgd, n_steps=9, n_restarts=2, random_state=0),
    "square": partial(square, n_queries=9, random_state=0),
}


@given(balls(), st.sampled_from(list(ATTACKS)))
@settings(max_examples=150)
def test_result_is_in_the_ball_and_the_bounds(drawn, attack):
    ball, d, rng = drawn
    lo, hi = ball.feature_range(d)
    X = np.clip(rng.normal(size=(5, d)), lo, hi)
    objective = worst_margin_objective(random_network(d, 6), rng.choice([-1, 1], 5))
    X_adv = ATTACKS[attack](objective, X, ball)
    epsilon = ball.epsilons(d)
    free = epsilon > 0.0
    assert np.array_equal(X_adv[:, ~free], X[:, ~free])
    assert np.all((lo <= X_adv) & (X_adv <= hi))
    scaled = (X_adv - X)[:, free] / epsilon[free]
    assert np.all(np.linalg.norm(scaled, ball.p, axis=1) <= 1.0 + 1e-6) or not free.any()


@pytest.mark.parametrize("attack", [fgsm, pgd, apgd])
@pytest.mark.parametrize("bounds", [None, (-3.0, 3.0)])
@pytest.mark.parametrize("epsilon", [0.0, np.zeros(4)], ids=["scalar", "per feature"])
def test_radius_zero_changes_nothing_and_returns_a_copy(epsilon, bounds, attack):
    X = np.random.default_rng(0).uniform(-3.0, 3.0, size=(5, 4))
    X_adv = attack(linear(W), X, LpBall(2, epsilon, bounds))
    assert np.array_equal(X_adv, X)
    assert X_adv is not X


def test_input_is_not_written_to():
    X = np.random.default_rng(0).normal(size=(5, 4))
    before = X.copy()
    pgd(linear(W), X, LpBall(1, 0.3), n_restarts=2, random_state=0)
    assert np.array_equal(X, before)


@pytest.mark.parametrize("attack", list(ATTACKS.values()), ids=list(ATTACKS))
@pytest.mark.parametrize("ball", [LpBall(2, 0.1, (-0.05, 0.05)), LpBall(np.inf, 0.1)], ids=repr)
def test_a_point_outside_the_ball_is_an_error(monkeypatch, ball, attack):
    monkeypatch.setattr(Region, "moved", lambda self, points: 1.2 * points)
    with pytest.raises(RuntimeError, match="left the ball"):
        attack(linear(W), np.zeros((2, 4)), ball)


# ------------------------------------------------------------------ misuse


@pytest.mark.parametrize("attack", [fgsm, pgd, apgd])
def test_what_would_pass_for_robustness_is_an_error(attack):
    X, ball = np.zeros((3, 4)), LpBall(np.inf, 0.1)
    with pytest.raises(FloatingPointError, match="not finite"):
        attack(lambda X: (np.full(3, np.nan), X), X, ball)
    with pytest.raises(FloatingPointError, match="not finite"):
        attack(lambda X: (np.zeros(3), np.nan * X), X, ball)
    with pytest.raises(ValueError, match="must return shapes"):
        attack(lambda X: (np.zeros((3, 1)), X), X, ball)
    with pytest.raises(ValueError, match="bounds exclude the data"):
        attack(linear(W), X, LpBall(np.inf, 0.1, (0.5, 1.0)))
    with pytest.raises(ValueError, match="shape"):
        attack(linear(W), X[0], ball)


@pytest.mark.parametrize(
    "wrong", [{"n_steps": 0}, {"n_restarts": 0}, {"step": 0.0}, {"momentum": 1.5}]
)
def test_pgd_refuses_to_do_nothing(wrong):
    with pytest.raises(ValueError, match="must be"):
        pgd(linear(W), np.zeros((1, 4)), LpBall(2, 0.1), **wrong)


@pytest.mark.parametrize(
    "wrong", [{"n_queries": 0}, {"share": 0.0}, {"share": 1.1}, {"shape": (1, 2, 3)}]
)
def test_square_refuses_options_that_mean_nothing(wrong):
    with pytest.raises(ValueError, match="must be"):
        square(linear(W), np.zeros((1, 4)), LpBall(2, 0.1), **wrong)


def test_square_refuses_losses_that_are_not_one_number_a_row():
    X, ball = np.zeros((3, 4)), LpBall(2, 0.1)
    with pytest.raises(ValueError, match="loss must return shape"):
        square(lambda X: X, X, ball)
    with pytest.raises(FloatingPointError, match="not finite"):
        square(lambda X: np.full(3, np.nan), X, ball)


@pytest.mark.parametrize(
    ("n_outputs", "y", "task"),
    [
        (1, [0, 1], "classification"),
        (3, [1, 3], "classification"),
        (3, [0.5, 1], "regression"),
        (1, [1, 1], "ranking"),
    ],
)
def test_objective_refuses_labels_that_do_not_fit(n_outputs, y, task):
    with pytest.raises(ValueError, match=r"y must|regression"):
        worst_margin_objective(random_network(2, 3, n_outputs), np.array(y), task=task)


# ------------------------------------------------------------------ gradients, and torch


@pytest.mark.parametrize(("task", "n_outputs"), TASKS)
def test_objective_is_the_worst_margin_with_its_gradient(task, n_outputs):
    network = random_network(4, 9, n_outputs)
    rng = np.random.default_rng(6)
    X = rng.normal(size=(25, 4))
    y = labels_for(network, 25, task, rng)
    objective = worst_margin_objective(network, y, task=task)
    loss, gradient = objective(X)
    outputs = network.predict(X)
    if task == "regression":
        expected = np.abs(outputs[:, 0] - y)
    elif n_outputs == 1:
        expected = -y * outputs[:, 0]
    else:
        expected = [max(np.delete(f, c)) - f[c] for f, c in zip(outputs, y, strict=True)]
    assert loss == pytest.approx(np.asarray(expected))
    for j, step in enumerate(1e-6 * np.eye(4)):
        slope = (objective(X + step)[0] - objective(X - step)[0]) / 2e-6
        assert gradient[:, j] == pytest.approx(slope, abs=1e-6)


def torch_objective(torch, network, y):
    """The objective on tensors by autograd, through the torch model of the network."""
    model, y = network.to_torch(), torch.as_tensor(y)

    def loss_and_gradient(X):
        X = X.detach().requires_grad_()
        outputs = model(X)
        if network.n_outputs == 1:
            loss = -y * outputs[:, 0]
        else:
            own = torch.nn.functional.one_hot(y, network.n_outputs).bool()
            loss = outputs.masked_fill(own, -torch.inf).amax(dim=1) - outputs[own]
        (gradient,) = torch.autograd.grad(loss.sum(), X)
        return loss.detach(), gradient

    return loss_and_gradient


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("bounds", [None, (-1.5, 1.5)], ids=["unbounded", "bounds"])
@pytest.mark.parametrize("epsilon", EPSILONS, ids=["scalar", "per feature"])
@pytest.mark.parametrize("p", NORMS)
def test_numpy_and_torch_find_the_same_points(p, epsilon, bounds, n_outputs):
    torch = pytest.importorskip("torch")
    from convexrobust.backends import torch as xp

    network = random_network(4, 9, n_outputs)
    rng = np.random.default_rng(7)
    X = np.clip(rng.normal(size=(20, 4)), -1.5, 1.5)
    y = labels_for(network, 20, "classification", rng)
    on_arrays = worst_margin_objective(network, y)
    on_tensors, X_torch = torch_objective(torch, network, y), torch.as_tensor(X)
    loss, gradient = on_tensors(X_torch)
    assert loss.numpy() == pytest.approx(on_arrays(X)[0], abs=1e-9)
    assert gradient.numpy() == pytest.approx(on_arrays(X)[1], abs=1e-9)
    ball = LpBall(p, epsilon, bounds)
    one_step = fgsm(on_tensors, X_torch, ball, xp=xp)
    assert one_step.numpy() == pytest.approx(fgsm(on_arrays, X, ball), abs=1e-9)
    options = {"n_steps": 6, "n_restarts": 2, "random_state": 0}
    found = pgd(on_tensors, X_torch, ball, **options, xp=xp)
    assert found.numpy() == pytest.approx(pgd(on_arrays, X, ball, **options), abs=1e-9)
    found = apgd(on_tensors, X_torch, ball, **options, xp=xp)
    assert found.numpy() == pytest.approx(apgd(on_arrays, X, ball, **options), abs=1e-9)
    options = {"n_queries": 50, "random_state": 0}
    found = square(on_tensors, X_torch, ball, **options, xp=xp)
    assert found.numpy() == pytest.approx(square(on_arrays, X, ball, **options), abs=1e-9)


@pytest.mark.parametrize("p", NORMS)
def test_single_precision_is_kept_and_passes_the_checks(p):
    torch = pytest.importorskip("torch")
    from convexrobust.backends import torch as xp

    network = random_network(4, 9)
    model = network.to_torch().float()

    def objective(X):
        X = X.detach().requires_grad_()
        loss = model(X)[:, 0]
        return loss.detach(), torch.autograd.grad(loss.sum(), X)[0]

    X = torch.as_tensor(10.0 * np.random.default_rng(8).normal(size=(20, 4)), dtype=torch.float32)
    X_adv = pgd(objective, X, LpBall(p, 1e-3), n_restarts=2, random_state=0, xp=xp)
    assert X_adv.dtype == torch.float32
    assert bool((objective(X_adv)[0] >= objective(X)[0]).all())
