"""DALE, Fast-BAT and SSDS: against their formulas by hand, autograd, cvxpy and closed forms."""
# ruff: noqa: E402 - without torch the file is skipped before it imports what needs it

from copy import deepcopy

import cvxpy as cp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sklearn.linear_model import Lasso

from convexrobust.attacks.region import Region
from convexrobust.backends import numpy as numpy_backend
from convexrobust.backends import torch as torch_backend
from convexrobust.deep import attacks
from convexrobust.deep.losses import log_losses, sample_losses
from convexrobust.deep.methods.dale import Dale
from convexrobust.deep.methods.fast_bat import FastBat, project_differentiably
from convexrobust.deep.methods.ssds import Ssds
from convexrobust.dynamics import (
    is_local_maximum,
    projected_gradient_trace,
    saddle_point_dynamics,
)
from convexrobust.perturbations import DUAL_NORM, LpBall

NORMS = [1, 2, np.inf]
EVERY_NORM = pytest.mark.parametrize("p", NORMS)
METHODS = {
    "dale": lambda ball: Dale(ball, n_steps=3, temperature=0.1),
    "dale-train-mode": lambda ball: Dale(ball, n_steps=2, mode="train", multiplier=0.5),
    "fast-bat": FastBat,
    "fast-bat-train-mode": lambda ball: FastBat(ball, mode="train"),
    "ssds": lambda ball: Ssds(ball, 40, n_inner=2),
    "nolam": lambda ball: Ssds(ball, 40, variant="nolam", ascent="raw", step=3.0),
    "nolag": lambda ball: Ssds(ball, 40, variant="nolag", decay=0.5),
}
EVERY_METHOD = pytest.mark.parametrize("make", list(METHODS.values()), ids=list(METHODS))


def mlp(d, n_outputs, seed=0, activation=torch.nn.Tanh):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(d, 7), activation(), torch.nn.Linear(7, n_outputs)
    return torch.nn.Sequential(*layers).double()


def batch(n, d, n_classes=2, seed=0):
    rng = np.random.default_rng(seed)
    x, y = (
        torch.as_tensor(rng.normal(size=(n, d))),
        torch.as_tensor(rng.integers(n_classes, size=n)),
    )
    return x, y, torch.arange(n)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ------------------------------------------------------------------ what all three promise


class Watched(torch.nn.Module):
    """A model with batch normalisation and dropout that remembers its inputs while training."""

    def __init__(self, d, n_outputs):
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(d, 6),
            torch.nn.BatchNorm1d(6),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(6, n_outputs),
        )
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.layers(x)


@EVERY_METHOD
@pytest.mark.parametrize("n_outputs", [1, 4])
@EVERY_NORM
def test_points_stay_in_ball_and_bounds(p, n_outputs, make):
    """Also for images, radii per feature, an immutable feature, and during the warm-up."""
    epsilon = 0.2 + np.arange(12) / 10.0
    epsilon[3] = 0.0
    method, model = make(LpBall(p, epsilon, (-1.0, 1.5))), Watched(12, n_outputs)
    x = torch.rand(10, 3, 2, 2) * 2.5 - 1.0
    y, optimizer = torch.arange(10) % max(n_outputs, 2), sgd(model)
    for scale in (0.0, 0.5, 1.0, 1.0):
        method.scale = scale
        model.seen.clear()
        for _ in range(3):
            figures = method.step(model, optimizer, x, y, torch.arange(10) + 20)
        assert all(np.isfinite(value) for value in figures.values())
        moved = torch.stack([(seen - x).abs().amax() for seen in model.seen])
        assert (moved.max() > 0.05) == (scale > 0.0)
        for seen in model.seen:
            delta = (seen - x).flatten(1).numpy()
            assert (method.ball.length(delta) <= scale + 1e-4).all() if scale else not delta.any()
            assert torch.all((seen >= -1.0) & (seen <= 1.5))


@EVERY_METHOD
def test_a_resumed_run_goes_on_bit_for_bit(make):
    x, y, rows = batch(12, 5)
    method, model = make(LpBall(np.inf, 0.3)), mlp(5, 1)
    optimizer = sgd(model)

    def go_on(method, model, optimizer):
        return [method.step(model, optimizer, x, y, rows)["loss"] for _ in range(3)]

    go_on(method, model, optimizer)
    state, twin = deepcopy(method.state_dict()), deepcopy(model)
    expected = go_on(method, model, optimizer)
    resumed = make(LpBall(np.inf, 0.3))
    resumed.load_state_dict(state)
    assert go_on(resumed, twin, sgd(twin)) == expected
    for found, weight in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, weight)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_attacks_leave_the_model_as_it_was(mode, training):
    x, y = torch.randn(9, 5), torch.arange(9) % 2
    model = Watched(5, 1).train(training)
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 7.0)
    before = deepcopy(model.state_dict())
    Dale(LpBall(2, 0.3), mode=mode).sample(model, x, y)
    FastBat(LpBall(2, 0.3), mode=mode).attack(model, x, y)
    assert all(module.training == training for module in model.modules())
    assert all(torch.all(weight.grad == 7.0) for weight in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("make", "n_passes"),
    [
        (lambda ball: Dale(ball, n_steps=3, mode="train"), 2),  # the attacked points, the clean
        (lambda ball: FastBat(ball, mode="train"), 1),
        (lambda ball: Ssds(ball, 10, n_inner=3), 1),
    ],
)
def test_only_passes_that_train_move_the_statistics(make, n_passes):
    model = Watched(5, 1)
    make(LpBall(2, 0.3)).step(
        model, sgd(model), torch.randn(9, 5), torch.arange(9) % 2, torch.arange(9)
    )
    assert model.layers[2].num_batches_tracked.item() == n_passes


# ------------------------------------------------------------------ DALE


@pytest.mark.parametrize("n_outputs", [1, 3])
def test_dale_without_temperature_is_projected_gradient_ascent(n_outputs):
    """Bit for bit in l-inf: the logarithm of a loss has the gradient's signs."""
    model = mlp(6, n_outputs, activation=torch.nn.ReLU)
    x, y, _ = batch(30, 6, max(n_outputs, 2))
    points = x
    for _ in range(7):
        leaf = points.clone().requires_grad_()
        sample_losses(model(leaf), y).sum().backward()
        points = torch.minimum(
            torch.maximum(points + 0.3 * 0.2 * leaf.grad.sign(), x - 0.2), x + 0.2
        )
    method = Dale(LpBall(np.inf, 0.2), temperature=0.0, n_steps=7, step=0.3)
    assert torch.equal(method.sample(model, x, y), points)
    assert not torch.equal(points, x)


@EVERY_NORM
def test_one_step_of_dale_without_temperature_is_that_of_pgd(p):
    model, (x, y, _) = mlp(6, 3), batch(30, 6, 3)
    ball = LpBall(p, np.linspace(0.0, 0.4, 6))
    found = Dale(ball, temperature=0.0, n_steps=1, step=1.0).sample(model, x, y)
    # `pgd` keeps the start where the step lowers the loss.
    best = attacks.pgd(model, x, y, ball, loss="cross-entropy", n_steps=1)
    rose = sample_losses(model(found), y) > sample_losses(model(x), y)
    assert rose.sum() > 20
    assert torch.allclose(found[rose], best[rose], rtol=0.0, atol=1e-14)
    assert p != np.inf or torch.equal(found[rose], best[rose])


@EVERY_NORM
def test_the_noise_of_dale_turns_steps_as_often_as_its_law_says(p):
    """One feature: a step goes down if the noise exceeds the gradient, in units of the ball."""
    n, epsilon, temperature, eta = 20000, 0.4, 0.3, 0.5
    slope = 2.0
    model = torch.nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(-slope)
        model.bias.fill_(-2.0)
    x, y = torch.zeros(n, 1, dtype=torch.float64), torch.ones(n)
    method = Dale(LpBall(p, epsilon), temperature=temperature, n_steps=1, step=eta)
    delta = method.sample(model, x, y)[:, 0]
    assert torch.allclose(delta.abs(), torch.full_like(delta, eta * epsilon))
    chance = 1.0 / (1.0 + np.exp(-2.0))  # of the wrong class, at m = -2
    gradient = epsilon * slope * chance / np.log1p(np.exp(2.0))
    excess = torch.as_tensor(gradient / np.sqrt(2.0 * eta * temperature))
    tail = 0.5 * torch.exp(-excess) if p != 2 else torch.special.ndtr(-excess)
    assert 0.1 < tail < 0.45
    assert (delta < 0).double().mean().item() == pytest.approx(tail.item(), abs=4.0 * 0.5 / n**0.5)


@pytest.mark.parametrize("n_outputs", [1, 3])
def test_log_losses_are_logarithms_and_never_underflow(n_outputs):
    outputs, y = torch.randn(40, n_outputs, dtype=torch.float64), torch.arange(40) % 2
    assert torch.allclose(log_losses(outputs, y), sample_losses(outputs, y).log(), atol=1e-12)
    sure = torch.zeros(2, n_outputs)
    sure[:, 0] = torch.tensor([-300.0, 300.0] if n_outputs == 1 else [300.0, -300.0])
    sure.requires_grad_()
    values = log_losses(sure, torch.tensor([0, 0]))
    values.sum().backward()
    extra = np.log(2.0) if n_outputs == 3 else 0.0  # two rivals
    assert values[0].item() == pytest.approx(-300.0 + extra, abs=1e-3)
    assert values[1].item() == pytest.approx(np.log(300.0 + extra), abs=1e-3)
    assert sure.grad[0, 0].abs().item() == pytest.approx(1.0)
    assert sure.grad[1, 0].abs().item() == pytest.approx(1.0 / (300.0 + extra))


def test_the_multiplier_obeys_its_update():
    model, (x, y, rows) = mlp(4, 1), batch(20, 4)
    method, optimizer = Dale(LpBall(2, 0.1), margin=0.6, dual_step=3.0, n_steps=2), sgd(model)
    expected, met_zero = 1.0, False
    for _ in range(40):
        with torch.no_grad():
            clean = sample_losses(model(x), y).mean().item()
        figures = method.step(model, optimizer, x, y, rows)
        assert figures["clean_loss"] == pytest.approx(clean, rel=1e-12)
        assert figures["multiplier"] == pytest.approx(expected, rel=1e-12)
        total = figures["robust_loss"] + expected * clean
        assert figures["loss"] == pytest.approx(total, rel=1e-12)
        expected = max(expected + 3.0 * (clean - 0.6), 0.0)
        met_zero = met_zero or expected == 0.0
    assert met_zero
    fixed = Dale(LpBall(2, 0.1), multiplier=0.7)
    assert fixed.step(model, optimizer, x, y, rows)["multiplier"] == fixed.multiplier == 0.7


@pytest.mark.parametrize("p", [2, np.inf])
def test_dale_solves_the_constrained_problem_where_it_is_convex(p):
    """Linear logistic regression: multiplier, losses and complementary slackness against cvxpy."""
    rng = np.random.default_rng(3)
    X = rng.normal(size=(80, 3))
    y = np.where(X @ [2.0, -1.5, 1.0] + rng.normal(size=80) > 0.0, 1.0, -1.0)
    w, margins = cp.Variable(3), cp.Variable(80)
    clean = cp.sum(cp.logistic(-margins)) / 80
    robust = cp.sum(cp.logistic(0.5 * cp.norm(w, DUAL_NORM[p]) - margins)) / 80
    linear = margins == cp.multiply(y, X @ w)
    lowest = cp.Problem(cp.Minimize(clean), [linear]).solve(solver=cp.CLARABEL)
    cp.Problem(cp.Minimize(robust), [linear]).solve(solver=cp.CLARABEL)
    rho = (lowest + clean.value) / 2.0  # attainable, but not by the most robust weights
    limit = clean <= rho
    problem = cp.Problem(cp.Minimize(robust), [linear, limit])
    problem.solve(solver=cp.CLARABEL)
    assert limit.dual_value > 0.1
    model = torch.nn.Linear(3, 1, bias=False).double()
    ball = LpBall(p, 0.5)
    method = Dale(ball, margin=rho, dual_step=2.0, temperature=0.0, n_steps=1, step=1.0)
    data = torch.as_tensor(X), torch.as_tensor(y), torch.arange(80)
    optimizer = sgd(model, lr=2.0)
    for _ in range(400):
        figures = method.step(model, optimizer, *data)
    assert method.multiplier == pytest.approx(limit.dual_value, abs=1e-4)
    assert figures["robust_loss"] == pytest.approx(problem.value, abs=1e-4)
    assert method.multiplier * (figures["clean_loss"] - rho) == pytest.approx(0.0, abs=1e-4)


def test_dale_warns_if_the_margin_is_out_of_reach():
    model, (x, y, rows) = mlp(4, 1), batch(20, 4)
    method = Dale(LpBall(2, 0.1), margin=0.0, dual_step=1000.0)
    with pytest.warns(RuntimeWarning, match="multiplier has passed 100"):
        method.step(model, sgd(model), x, y, rows)
    method.step(model, sgd(model, lr=0.0), x, y, rows)  # once: a second warning would be an error


# ------------------------------------------------------------------ Fast-BAT


def start_of(method, x):
    """Return the random start that the method draws next."""
    generator = deepcopy(method.generator)
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    return Region(torch_backend, x, method.ball).random_points(rng)


@pytest.mark.parametrize("weight", [1.0, 0.1])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_the_implicit_gradient_is_that_of_the_formula(n_outputs, weight):
    """l-inf with bounds: the mixed second derivatives in full, masked by the KKT conditions."""
    model, (x, y, rows) = mlp(4, n_outputs), batch(8, 4, max(n_outputs, 2))
    x = x.clip(-1.0, 1.0)
    ball = LpBall(np.inf, 0.3, (-1.0, 1.0))
    method = FastBat(ball, n_steps=1, step=1.0, implicit_weight=weight)
    z, weights = start_of(method, x), list(model.parameters())

    def input_gradient(*values):
        leaf = z.clone().requires_grad_()
        named = dict(zip(dict(model.named_parameters()), values, strict=True))
        losses = sample_losses(torch.func.functional_call(model, named, (leaf,)), y)
        return torch.autograd.grad(losses.sum(), leaf, create_graph=True)[0]

    g = input_gradient(*weights).detach()
    inverse_lambda = 0.3 * 2.0 / g.norm(dim=1, keepdim=True)  # radius * sqrt(d) / |g|
    low, high = (x - 0.3).clip(-1.0, 1.0), (x + 0.3).clip(-1.0, 1.0)
    star = torch.minimum(torch.maximum(z + inverse_lambda * g, low), high)
    inside = (star > low) & (star < high)
    assert 0 < inside.sum() < inside.numel()
    star.requires_grad_()
    loss = sample_losses(model(star), y).mean()
    *direct, slope = torch.autograd.grad(loss, [*weights, star])
    mixed = torch.autograd.functional.jacobian(input_gradient, tuple(weights))
    row = (inverse_lambda * inside * slope).flatten()
    implicit = torch.cat([row @ J.flatten(0, 1).flatten(1) for J in mixed])
    expected = torch.cat([gradient.flatten() for gradient in direct]) + weight * implicit
    method.step(model, sgd(model, lr=0.0), x, y, rows)
    assert implicit.norm() > 1e-3 * expected.norm()
    assert torch.allclose(gradients(model), expected, rtol=0.0, atol=1e-12)


def projected_by_hand(delta, p):
    """The unit ball's projection of rows, each by itself, differentiable."""
    if p == np.inf:
        return delta.clamp(-1.0, 1.0)
    rows = []
    for row in delta:
        if torch.linalg.vector_norm(row, p) <= 1.0:
            rows.append(row)
        elif p == 2:
            rows.append(row / row.norm())
        else:  # the support is found by numpy, the shrinkage is the same for all of it
            exact = LpBall(1, 1.0).project(numpy_backend, row.detach().numpy()[None])[0]
            on = torch.as_tensor(exact != 0.0)
            shrinkage = (row[on].abs().sum() - 1.0) / on.sum()
            rows.append(torch.where(on, row - row.sign() * shrinkage, 0.0 * row))
    return torch.stack(rows)


@EVERY_NORM
def test_the_gradient_is_autograd_through_the_projection(p):
    """Two steps, any norm, radii per feature."""
    model, (x, y, rows) = mlp(5, 3), batch(12, 5, 3)
    epsilon = torch.linspace(0.2, 0.6, 5, dtype=torch.float64)
    method = FastBat(LpBall(p, epsilon.numpy()), step=0.8, implicit_weight=1.0)
    points = start_of(method, x)
    for last in (False, True):
        leaf = points.detach().requires_grad_()
        losses = sample_losses(model(leaf), y).sum()
        (g,) = torch.autograd.grad(losses, leaf, create_graph=last)
        long = (5.0**0.5 if p == np.inf else 1.0) * 0.8 / (epsilon * g.detach()).norm(dim=1)
        ahead = (leaf.detach() - x) / epsilon + long[:, None] * epsilon * g
        points = x + epsilon * projected_by_hand(ahead, p)
    expected = torch.autograd.grad(sample_losses(model(points), y).mean(), list(model.parameters()))
    method.step(model, sgd(model, lr=0.0), x, y, rows)
    expected = torch.cat([gradient.flatten() for gradient in expected])
    assert torch.allclose(gradients(model), expected, rtol=0.0, atol=1e-10)
    without = FastBat(method.ball, step=0.8, implicit_gradient=False)
    without.step(model, sgd(model, lr=0.0), x, y, rows)
    assert (gradients(model) - expected).norm() > 1e-4 * expected.norm()


@EVERY_NORM
def test_the_derivative_of_the_projection(p):
    """Against differences; and its values against `LpBall.project`."""
    x, _, _ = batch(6, 5)
    points = x + 0.3 * batch(6, 5, seed=1)[0]
    region = Region(torch_backend, x, LpBall(p, 0.4))
    assert torch.autograd.gradcheck(
        lambda A: project_differentiably(region, A), points.requires_grad_()
    )
    found = project_differentiably(region, points) - x
    expected = region.ball.project(numpy_backend, (points - x).detach().numpy())
    assert found.detach().numpy() == pytest.approx(expected, abs=1e-12)
    assert (found.detach() - (points - x)).abs().amax(dim=1).gt(0).any()


@EVERY_NORM
def test_the_attack_solves_the_lower_level(p):
    """The linearised loss with its quadratic term, over the ball, by cvxpy."""
    model, (x, y, _) = mlp(4, 1), batch(5, 4)
    method = FastBat(LpBall(p, 0.3), n_steps=1, step=1.5, implicit_weight=1.0)
    z = start_of(method, x)
    leaf = z.clone().requires_grad_()
    sample_losses(model(leaf), y).sum().backward()
    found = (method.attack(model, x, y) - x).detach().numpy()
    for i, g in enumerate(leaf.grad.numpy()):
        lam = np.linalg.norm(g) / (1.5 * 0.3 * (2.0 if p == np.inf else 1.0))
        delta = cp.Variable(4)
        away = delta - (z[i] - x[i]).numpy()
        cost = -(g / lam) @ away + cp.sum_squares(away) / 2.0
        cp.Problem(cp.Minimize(cost), [cp.norm(delta, p) <= 0.3]).solve(solver=cp.CLARABEL)
        assert found[i] == pytest.approx(delta.value, abs=1e-5)


def test_with_signs_the_implicit_gradient_is_zero_and_the_method_fast_at():
    x, y, rows = batch(10, 5)
    found = []
    for implicit in (True, False):
        model = mlp(5, 1)
        method = FastBat(
            LpBall(np.inf, 0.3), sign=True, n_steps=1, step=1.25, implicit_gradient=implicit
        )
        leaf = start_of(method, x).requires_grad_()
        method.step(model, sgd(model, lr=0.0), x, y, rows)
        found.append(gradients(model))
    sample_losses(model(leaf), y).sum().backward()
    step = leaf.detach() + 1.25 * 0.3 * leaf.grad.sign()
    by_hand = torch.minimum(torch.maximum(step, x - 0.3), x + 0.3)
    model.zero_grad()
    sample_losses(model(by_hand), y).mean().backward()
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], gradients(model), rtol=1e-12)


# ------------------------------------------------------------------ SSDS: the dynamics


def concave_problem():
    """Return value and gradients of 1/2n |A theta - b|^2 + u'theta - |u|^2 / 2, with A and b."""
    rng = np.random.default_rng(0)
    A = rng.normal(size=(40, 6))
    b = A @ rng.normal(size=6) + rng.normal(size=40)

    def value_and_gradients(theta, u):
        r = A @ theta - b
        value = r @ r / 80 + u[0] @ theta - u[0] @ u[0] / 2
        return value, A.T @ r / 40 + u[0], (theta - u[0])[None]

    return value_and_gradients, A, b


@pytest.mark.theory
@pytest.mark.parametrize(
    ("variant", "damped", "tolerance"),
    [("nolag", True, 1e-5), ("nolam", True, 1e-2), ("ssds", True, 1e-2), ("ssds", False, 2e-2)],
)
@pytest.mark.parametrize(("p", "epsilon"), [(1, 0.6), (2, 0.3), (np.inf, 0.1)])
def test_the_dynamics_reach_the_robust_optimum(p, epsilon, variant, damped, tolerance):
    """The maximum over u is an infimal convolution, which cvxpy minimises."""
    problem, A, b = concave_problem()
    theta, w = cp.Variable(6), cp.Variable(6)
    reach = epsilon * cp.norm(w, DUAL_NORM[p]) + cp.sum_squares(theta - w) / 2
    cost = cp.Minimize(cp.sum_squares(A @ theta - b) / 80 + reach)
    cp.Problem(cost).solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10)
    trace = saddle_point_dynamics(
        problem,
        np.zeros(6),
        np.zeros((1, 6)),
        LpBall(p, epsilon),
        variant=variant,
        damped=damped,
        n_steps=4000 if p == np.inf and variant != "nolag" else 2000,
    )
    error = np.linalg.norm(trace.theta[-1] - theta.value) / np.linalg.norm(theta.value)
    assert error < tolerance
    length = np.linalg.norm(trace.u[-1, 0], p)
    assert length == pytest.approx(epsilon, rel=1e-9 if variant == "nolag" else 0.1)
    if variant != "nolag":  # the price of the budget: what the gradient pulls with at the optimum
        assert trace.v[-1, 0] == pytest.approx(np.linalg.norm(w.value, DUAL_NORM[p]), rel=2e-2)


@pytest.mark.theory
def test_projected_dynamics_on_a_bilinear_problem_are_the_lasso():
    _, A, b = concave_problem()

    def value_and_gradients(theta, u):
        r = A @ theta - b
        return r @ r / 80 + u[0] @ theta, A.T @ r / 40 + u[0], theta[None]

    lasso = Lasso(alpha=0.4, fit_intercept=False, tol=1e-12).fit(A, b)
    trace = saddle_point_dynamics(
        value_and_gradients, np.zeros(6), np.zeros((1, 6)), LpBall(np.inf, 0.4), n_steps=3000
    )
    assert np.sum(lasso.coef_ == 0.0) >= 1
    assert trace.theta[-1] == pytest.approx(lasso.coef_, abs=1e-4)


def logistic_problem(p, epsilon):
    """Return data and the robust optimum of linear logistic regression."""
    rng = np.random.default_rng(5)
    X = rng.normal(size=(30, 3))
    y = np.where(X @ [2.0, -1.5, 1.0] + rng.normal(size=30) > 0.0, 1.0, -1.0)
    theta = cp.Variable(3)
    reach = epsilon * cp.norm(theta, DUAL_NORM[p])
    robust = cp.sum(cp.logistic(-cp.multiply(y, X @ theta) + reach)) / 30
    return X, y, cp.Problem(cp.Minimize(robust)).solve(solver=cp.CLARABEL)


def robust_loss(theta, X, y, p, epsilon):
    margin = y * (X @ theta) - epsilon * np.linalg.norm(theta, DUAL_NORM[p])
    return np.logaddexp(0.0, -margin).mean()


@EVERY_NORM
def test_projected_dynamics_on_robust_logistic_regression(p):
    """Not concave in u, so no theorem; with a perturbation for each row."""
    X, y, optimum = logistic_problem(p, 0.3)

    def value_and_gradients(theta, u):
        margin = y * ((X + u) @ theta)
        slope = -y / (1.0 + np.exp(margin))
        value = np.logaddexp(0.0, -margin).sum()
        return value, (X + u).T @ slope, slope[:, None] * theta

    trace = saddle_point_dynamics(
        value_and_gradients, np.zeros(3), np.zeros((30, 3)), LpBall(p, 0.3), n_steps=2000
    )
    assert robust_loss(trace.theta[-1], X, y, p, 0.3) == pytest.approx(optimum, abs=1e-3)


def test_dynamics_warn_when_multipliers_do_not_hold_perturbations():
    def convex_in_u(theta, u):
        return float(np.sum(u**2)), 0.0 * theta, 2.0 * u

    start = np.zeros(1), np.ones((1, 2)), LpBall(2, 0.1)
    with pytest.warns(RuntimeWarning, match="outside the ball"):
        saddle_point_dynamics(convex_in_u, *start, variant="nolam", n_steps=60)


def test_dynamics_stop_when_they_leave_the_finite_numbers():
    def steep(theta, u):
        return 50.0 * theta @ theta, 100.0 * theta, 0.0 * u

    start = np.ones(1), np.ones((1, 2)), LpBall(2, 0.1)
    with pytest.raises(FloatingPointError, match="smaller step"), np.errstate(all="ignore"):
        saddle_point_dynamics(steep, *start, n_steps=300, decay=0.0)


# ------------------------------------------------------------------ the adversary alone


class RandomTanh:
    """Half the squared error of a random two-layer network at target 0, with its derivatives."""

    def __init__(self, rng, d=20, width=100):
        self.W = rng.normal(size=(width, d)) / np.sqrt(d)
        self.a = rng.normal(size=width) / np.sqrt(width)

    def loss_and_gradient(self, X):
        t = np.tanh(X @ self.W.T)
        f = t @ self.a
        return f**2 / 2.0, f[:, None] * ((1.0 - t**2) * self.a @ self.W)

    def hessian(self, x):
        t = np.tanh(self.W @ x)
        slope = (1.0 - t**2) * self.a @ self.W
        bend = (self.W.T * (-2.0 * self.a * t * (1.0 - t**2))) @ self.W
        return np.outer(slope, slope) + (t @ self.a) * bend


def ascents(scale, n_steps=300):
    """Yield network, centre, radius and trace of ascents at inputs of a length, half as wide."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        net, x = RandomTanh(rng), rng.normal(size=20)
        x *= scale / np.linalg.norm(x)
        ball = LpBall(2, scale / 2.0)
        inside = x + ball.sample(np.tile(x, (20, 1)), rng)
        curvature = max(np.linalg.norm(net.hessian(point), 2) for point in inside)
        trace = projected_gradient_trace(
            net.loss_and_gradient, x[None], ball, step=1.0 / curvature, n_steps=n_steps, tol=1e-6
        )
        yield net, x, ball.radius, trace


@pytest.mark.theory
def test_ascent_finds_local_maxima_and_the_sooner_the_smaller_the_inputs():
    counts = {}
    for scale in (1.0, 4.0, 8.0):
        counts[scale] = []
        for net, x, epsilon, trace in ascents(scale):
            assert np.all(np.diff(trace.losses, axis=0) >= -1e-12)
            counts[scale].append(trace.n_iter[0] if trace.n_iter[0] >= 0 else np.inf)
            if trace.n_iter[0] < 0:
                continue
            point = trace.points[0]
            _, gradient = net.loss_and_gradient(point[None])
            hessian = net.hessian(point)
            assert trace.residuals[-1, 0] <= 1e-6
            assert is_local_maximum(gradient[0], hessian, point - x, epsilon)
            assert not is_local_maximum(-gradient[0], -hessian, point - x, epsilon)
            assert not is_local_maximum(gradient[0], hessian, 0.5 * (point - x), epsilon)
    medians = [np.median(counts[scale]) for scale in (1.0, 4.0, 8.0)]
    assert medians[0] < medians[1] < medians[2]


@EVERY_NORM
def test_ascent_on_a_concave_quadratic_reaches_its_maximum(p):
    rng = np.random.default_rng(1)
    root, g = rng.normal(size=(4, 4)), rng.normal(size=(3, 4))
    g[2] *= 1e-2  # a maximum inside the ball
    H = -root @ root.T - 0.1 * np.eye(4)

    def loss_and_gradient(X):
        return np.sum(g * X + 0.5 * X * (X @ H), axis=1), g + X @ H

    step = 1.0 / np.linalg.norm(H, 2)
    trace = projected_gradient_trace(
        loss_and_gradient, np.zeros((3, 4)), LpBall(p, 0.3), step=step, n_steps=2000, tol=1e-10
    )
    assert np.all(trace.n_iter > 0)
    for row, point in zip(g, trace.points, strict=True):
        u = cp.Variable(4)
        value = row @ u + 0.5 * cp.quad_form(u, H)
        cp.Problem(cp.Maximize(value), [cp.norm(u, p) <= 0.3]).solve(solver=cp.CLARABEL)
        assert point == pytest.approx(u.value, abs=1e-4)
        if p == 2:
            assert is_local_maximum(row + H @ point, H, point, 0.3)


# ------------------------------------------------------------------ SSDS: the method


@pytest.mark.parametrize("variant", ["ssds", "nolam", "nolag"])
@EVERY_NORM
def test_ssds_trains_a_linear_model_to_the_robust_optimum(p, variant):
    X, y, optimum = logistic_problem(p, 0.3)
    n_steps = 300
    model = torch.nn.Linear(3, 1, bias=False).double()
    method, optimizer = Ssds(LpBall(p, 0.3), 30, variant=variant), sgd(model, lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    data = torch.as_tensor(X), torch.as_tensor(y), torch.arange(30)
    for _ in range(n_steps):
        method.step(model, optimizer, *data)
        schedule.step()
    theta = model.weight.detach().numpy()[0]
    # For l1 the optimum is a kink, between two vertices of the ball that take turns.
    tolerance = 3e-3 if p == 1 else 1e-3
    assert robust_loss(theta, X, y, p, 0.3) == pytest.approx(optimum, abs=tolerance)


def test_ssds_moves_weights_and_perturbations_by_its_formulas():
    """Two batches of the full system in l2 with raw gradients, one with rows of another order."""
    model, (x, y, _) = mlp(3, 1), batch(6, 3)
    method, eps = Ssds(LpBall(2, 0.5), 6, ascent="raw", step=9.0, weight_step=0.4), 0.5
    twin = deepcopy(model)
    w, v, t, lam = torch.zeros_like(x), torch.zeros(6).double(), None, 1.0
    for rows in ([0, 1, 2, 3], [3, 0, 5], [3, 0, 5], [0, 1, 2, 3]):
        method.step(model, sgd(model), x[rows], y[rows], torch.tensor(rows))
        length = w[rows].norm(dim=1, keepdim=True)
        delta = (eps * w[rows] / length.clip(min=1.0)).requires_grad_()
        losses = sample_losses(twin(x[rows] + delta), y[rows])
        (g,) = torch.autograd.grad(losses.sum(), delta, retain_graph=True)
        optimizer = sgd(twin)
        (lam * losses.mean()).backward()
        optimizer.step()
        twin.zero_grad()
        excess = length[:, 0] - 1.0
        value = losses.mean().item()
        t = value if t is None else t
        ahead = max(lam + 0.4 * (value - t), 0.0)
        t, lam = t + 0.4 * (2.0 * ahead - lam - 1.0), ahead
        raised = (v[rows] + 9.0 * excess).clip(min=0.0)
        price = (2.0 * raised - v[rows]).clip(min=0.0)
        pulled = w[rows] + 9.0 * eps * g
        kept = (1.0 - 9.0 * price / pulled.norm(dim=1)).clip(min=0.0)
        w[rows], v[rows] = kept[:, None] * pulled, raised
    assert v.max() > 0.0
    assert lam != 1.0
    assert torch.allclose(method.perturbations, w, atol=1e-12)
    assert torch.allclose(method.prices, v, atol=1e-12)
    assert method.weight == pytest.approx(lam, rel=1e-12)
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ball: Dale(ball, temperature=-1.0), "temperature"),
        (lambda ball: Dale(ball, step=0.0), "step and dual_step"),
        (lambda ball: Dale(ball, n_steps=0), "n_steps must be at least 1"),
        (lambda ball: FastBat(ball, sign=True), "sign=True is for l-inf"),
        (lambda ball: FastBat(ball, step=-1.0), "step must be positive"),
        (lambda ball: FastBat(ball, implicit_weight=-1.0), "implicit_weight must be at least 0"),
        (lambda ball: Ssds(ball, 5, variant="nola"), "variant must be one of"),
        (lambda ball: Ssds(ball, 5, ascent="sign"), "ascent must be one of"),
        (lambda ball: Ssds(ball, 0), "n_rows must be at least 1"),
        (lambda ball: Ssds(ball, 5, step=0.0), "step and weight_step"),
    ],
)
def test_options_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(LpBall(2, 0.1))


def test_ssds_names_rows_and_states_that_do_not_fit():
    model, (x, y, rows) = mlp(3, 1), batch(6, 3)
    method = Ssds(LpBall(2, 0.1), 5)
    with pytest.raises(ValueError, match="n_rows"):
        method.step(model, sgd(model), x, y, rows)
    other = Ssds(LpBall(2, 0.1), 6)
    other.step(model, sgd(model), x, y, rows)
    with pytest.raises(ValueError, match="6 samples"):
        method.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="one radius"):
        saddle_point_dynamics(None, [0.0], [[0.0]], LpBall(2, 0.1, (0.0, 1.0)))
