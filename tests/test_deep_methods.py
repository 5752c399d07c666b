"""Methods of adversarial training: their losses by hand, their attacks, and what they promise."""
# ruff: noqa: E402 - without torch the file is skipped before it imports what needs it

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from convexrobust.backends import numpy as numpy_backend
from convexrobust.certificates import margin_bounds
from convexrobust.deep import attacks
from convexrobust.deep.methods import (
    Attacked,
    Certified,
    Free,
    GradAlign,
    Mart,
    Pairing,
    Standard,
    Trades,
    WeightPerturbed,
)
from convexrobust.deep.methods.attacked import noisy_step, random_step
from convexrobust.deep.methods.base import uniform_noise
from convexrobust.deep.methods.certified import ibp_margins, slope_margins
from convexrobust.deep.networks import MLP, Normalized, two_layer
from convexrobust.deep.training import train
from convexrobust.losses import Hinge, Logistic
from convexrobust.network import TwoLayerReLU
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso

from .cases import BALLS, name

BALL = LpBall(np.inf, 0.15)


def random_network(n_outputs=1, n_neurons=2, n_features=2, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n_features + 1, n_neurons))
    return TwoLayerReLU(hidden, rng.normal(size=(n_neurons, n_outputs)))


def batch(n_outputs=1, n=8, n_features=2, seed=1):
    """Return points within the bounds of all balls, labels, and row numbers."""
    rng = np.random.default_rng(seed)
    X = np.clip(rng.normal(size=(n, n_features)), -1.2, 1.1)
    y = rng.choice([-1, 1], n) if n_outputs == 1 else rng.integers(n_outputs, size=n)
    return torch.as_tensor(X), torch.as_tensor(y), torch.arange(n)


def probabilities(network, X, y):
    """Return the probabilities of the classes (n, C) and class numbers, by plain NumPy."""
    outputs, y = network.predict(X.numpy()), y.numpy()
    if outputs.shape[1] == 1:
        outputs, y = np.hstack([0.0 * outputs, outputs]), (y > 0).astype(int)
    weights = np.exp(outputs)
    return weights / weights.sum(axis=1, keepdims=True), y


def gradients(network, X, y):
    """Return the gradients (n, d) of the logistic loss of a network with one output."""
    X, y = X.numpy(), y.numpy()
    slopes = -y / (1.0 + np.exp(y * network.predict(X)[:, 0]))
    return slopes[:, None] * network.gradient(X, np.ones((len(X), 1)))


METHODS = {
    "standard": lambda ball: Standard(ball),
    "fgsm": Attacked.fgsm,
    "fast": Attacked.fast,
    "n-fgsm": Attacked.n_fgsm,
    "pgd": lambda ball: Attacked.pgd(ball, n_steps=3),
    "pgd-restarts": lambda ball: Attacked.pgd(ball, n_steps=3, n_restarts=2, mode="train"),
    "free": lambda ball: Free(ball, n_replays=3),
    "gradalign": GradAlign,
    "trades": lambda ball: Trades(ball, n_steps=3),
    "mart": lambda ball: Mart(ball, attack=attacks.fgsm),
    "alp": lambda ball: Pairing(ball, attack=attacks.fgsm),
    "clp": lambda ball: Pairing(ball, labels_at="clean", attack=attacks.fgsm),
    "awp": lambda ball: WeightPerturbed(Attacked.fgsm(ball)),
    "slope": Certified,
}
BOXES = METHODS | {"ibp": lambda ball: Certified(ball, "ibp")}
WITH_POINTS = ["fgsm", "fast", "pgd", "pgd-restarts", "gradalign", "trades", "mart", "alp"]


# ------------------------------------------------------------------ losses by hand


@pytest.mark.parametrize("n_outputs", [1, 3])
def test_trades_and_mart_by_hand(n_outputs):
    network = random_network(n_outputs)
    x, y, _ = batch(n_outputs)
    points = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    p, label = probabilities(network, x, y)
    q, _ = probabilities(network, points, y)
    rows = np.arange(len(x))
    divergence = np.sum(p * np.log(p / q), axis=1)
    rival = np.where(np.arange(p.shape[1]) == label[:, None], 0.0, q).max(axis=1)

    trades = -np.log(p[rows, label]) + 6.0 * divergence
    loss, figures = Trades(BALL).loss(network.to_torch(), x, points, y)
    assert loss.item() == pytest.approx(trades.mean(), rel=1e-12)
    assert figures["divergence"] == pytest.approx(divergence.mean(), rel=1e-10)

    boosted = -np.log(q[rows, label]) - np.log(1.0 - rival)
    mart = boosted + 5.0 * divergence * (1.0 - p[rows, label])
    loss, figures = Mart(BALL).loss(network.to_torch(), x, points, y)
    assert loss.item() == pytest.approx(mart.mean(), rel=1e-12)
    assert figures["accuracy"] == np.mean(q.argmax(axis=1) == label)


@pytest.mark.parametrize("labels_at", ["attacked", "clean"])
def test_pairing_by_hand(labels_at):
    network = random_network(3)
    x, y, rows = batch(3)
    points = x + 0.1
    labelled, label = probabilities(network, points if labels_at == "attacked" else x, y)
    apart = network.predict(points.numpy()) - network.predict(x.numpy())
    expected = np.mean(
        -np.log(labelled[rows, label]) + 0.7 * np.linalg.norm(apart, axis=1),
    )
    loss, _ = Pairing(BALL, 0.7, labels_at).loss(network.to_torch(), x, points, y)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize(
    "method",
    [
        Trades(LpBall(np.inf, 0.1)),
        Mart(LpBall(np.inf, 0.1)),
        Pairing(LpBall(np.inf, 0.1)),
        Pairing(LpBall(np.inf, 0.1), labels_at="clean"),
    ],
    ids=["trades", "mart", "alp", "clp"],
)
def test_gradients_are_those_of_the_loss(method, n_outputs):
    """No part of a loss is cut off from the weights: against central differences."""
    torch.manual_seed(0)
    model = two_layer(2, 6, n_outputs).double()
    x = torch.randn(10, 2, dtype=torch.float64)
    points = x + 0.3 * torch.randn_like(x)
    y = torch.arange(10) % max(n_outputs, 2)
    weight = model[0].weight

    def value():
        return method.loss(model, x, points, y)[0]

    (gradient,) = torch.autograd.grad(value(), weight)
    step = 1e-6
    for i, j in np.ndindex(*weight.shape):
        ends = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                weight[i, j] += sign * step
            ends.append(value().item())
            with torch.no_grad():
                weight[i, j] -= sign * step
        assert gradient[i, j].item() == pytest.approx((ends[0] - ends[1]) / 2 / step, abs=1e-6)


def gradalign_by_hand(network, x, y, points, noise, first):
    """Return cross-entropy plus misalignment of the gradient at x + noise with a fixed one."""
    p, label = probabilities(network, points, y)
    second = gradients(network, x + noise, y)
    cos = np.sum(first * second, axis=1) / (
        np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    )
    return np.mean(-np.log(p[np.arange(len(x)), label])) + 0.3 * np.mean(1.0 - cos)


def test_gradalign_and_its_gradient_by_hand():
    network = random_network(seed=3)
    x, y, _ = batch(seed=5)
    # Only points where a neuron is active have a gradient.
    used = np.abs(gradients(network, x, y)).max(axis=1) > 0.0
    x, y = x[used], y[used]
    ball, points = LpBall(np.inf, 0.05), x + 0.05
    torch.manual_seed(0)
    noise = uniform_noise(x, ball)
    first = gradients(network, x, y)

    torch.manual_seed(0)
    model = network.to_torch()
    loss, _ = GradAlign(ball, 0.3).loss(model, x, points, y)
    loss.backward()

    def at(network):
        return gradalign_by_hand(network, x, y, points, noise, first)

    assert loss.item() == pytest.approx(at(network), rel=1e-12)

    hidden, step = network.hidden, 1e-6
    for i, j in np.ndindex(2, 2):  # the hidden weights without the biases
        moved = [hidden.copy(), hidden.copy()]
        moved[0][i, j] += step
        moved[1][i, j] -= step
        up, down = (at(TwoLayerReLU(h, network.output)) for h in moved)
        assert model[0].weight.grad[j, i].item() == pytest.approx((up - down) / 2 / step, abs=1e-6)


def test_samples_without_a_gradient_leave_gradalign_finite():
    network = TwoLayerReLU(np.array([[1.0], [0.0], [-10.0]]), np.ones((1, 1)))  # nowhere active
    x, y, _ = batch()
    loss, figures = GradAlign(BALL).loss(network.to_torch(), x, x, y)
    assert loss.item() == pytest.approx(np.log(2.0))
    assert figures["misalignment"] == 0.0


# ------------------------------------------------------------------ attacks


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("ball", BALLS, ids=name)
def test_pgd_and_fgsm_are_those_of_deep_attacks(ball, n_outputs):
    model = random_network(n_outputs, n_neurons=6).to_torch()
    x, y, _ = batch(n_outputs)
    expected = attacks.pgd(model, x, y, ball, loss="cross-entropy", n_steps=7)
    assert torch.equal(Attacked.pgd(ball, n_steps=7).points(model, x, y), expected)
    expected = attacks.fgsm(model, x, y, ball, loss="cross-entropy")
    assert torch.equal(Attacked.fgsm(ball).points(model, x, y), expected)


@pytest.mark.parametrize("kind", [Mart, Pairing, GradAlign])
def test_other_methods_take_the_named_attacks(kind):
    model = random_network(3, n_neurons=6).to_torch()
    x, y, _ = batch(3)
    for attack in ("fgsm", "pgd"):
        own, plain = (getattr(method, attack)(BALL, mode="eval") for method in (kind, Attacked))
        assert torch.equal(own.points(model, x, y), plain.points(model, x, y))
        assert own.weight == kind(BALL).weight
        assert own.loss(model, x, x + 0.1, y)[0] > 0.0


@pytest.mark.parametrize("method", WITH_POINTS)
@pytest.mark.parametrize("ball", BALLS, ids=name)
def test_points_are_in_the_ball(ball, method):
    model = random_network(3, n_neurons=6).to_torch()
    x, y, _ = batch(3)
    method = METHODS[method](ball)
    for scale in (1.0, 0.5):
        method.scale = scale
        delta = (method.points(model, x, y) - x).numpy()
        lengths = ball.length(delta)
        assert lengths.max() <= scale * (1.0 + 1e-6)
        assert lengths.max() > 0.5 * scale  # and they do move
        ball.check_inside(x.numpy() + delta)


@pytest.mark.parametrize("ball", BALLS, ids=name)
def test_fast_reaches_the_worst_point_of_a_linear_model(ball):
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    x, y, _ = batch()
    torch.manual_seed(0)
    # Two radii lead from anywhere in a box to its corner. In other norms they come near it only.
    points = random_step(lambda x: x @ weights, x, y, ball, step=2.0)
    worst = attacks.fgsm(lambda x: x @ weights, x, y, ball)
    if ball.p == np.inf:
        assert torch.allclose(points, worst, atol=1e-12)
    reached, best = ((p - x) @ weights * -y for p in (points, worst))
    assert (reached > 0.3 * best).all()
    assert (reached <= best + 1e-9).all()


def test_n_fgsm_is_noise_and_one_step_and_keeps_only_the_bounds():
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    x, y, _ = batch()
    torch.manual_seed(0)
    noise = 2.0 * uniform_noise(x, BALL)
    torch.manual_seed(0)
    points = noisy_step(lambda x: x @ weights, x, y, BALL)
    expected = x + noise - 0.15 * y[:, None] * torch.sign(weights)
    assert torch.allclose(points, expected)
    assert (points - x).abs().max() > 0.15
    inside = LpBall(np.inf, np.array([0.15, 0.0]), bounds=(-1.2, 1.1))
    points = noisy_step(lambda x: x @ weights, x, y, inside)
    inside.check_inside(points.numpy())
    assert torch.equal(points[:, 1], x[:, 1])


@pytest.mark.parametrize("p", [1, 2, np.inf])
def test_noise_is_uniform_in_the_ball(p):
    ball = LpBall(p, np.array([0.5, 2.0]))
    torch.manual_seed(0)
    noise = uniform_noise(torch.zeros(20000, 2, dtype=torch.float64), ball).numpy()
    share = np.mean(ball.length(noise) <= 0.5)  # of the area: a quarter
    assert share == pytest.approx(0.25, abs=0.015)
    assert ball.length(noise).max() <= 1.0 + 1e-12


# ------------------------------------------------------------------ steps


def logistic_gradient(w, X, y):
    return -(y / (1.0 + np.exp(y * (X @ w)))) @ X / len(X)


def linear_model(w):
    model = torch.nn.Linear(len(w), 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(w)[None])
    return model


def test_free_by_hand():
    x, y, rows = batch()
    X, labels = x.numpy(), y.numpy()
    w, delta = np.array([0.5, 1.0]), np.zeros_like(X)
    model = linear_model(w)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    method = Free(LpBall(np.inf, 0.1), n_replays=3, step=0.4)
    for _ in range(2):  # the perturbation of the first batch is where the second one starts
        method.step(model, optimizer, x, y, rows)
        for _ in range(3):
            signs = -labels[:, None] * np.sign(w)  # of the gradients in the points
            gradient = logistic_gradient(w, X + delta, labels)
            delta = np.clip(delta + 0.04 * signs, -0.1, 0.1)
            w = w - 0.3 * gradient
    assert model.weight[0].tolist() == pytest.approx(w.tolist(), rel=1e-12)
    assert method.state_dict()["delta"].numpy() == pytest.approx(delta, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.2])
def test_awp_steps_by_the_gradient_at_the_perturbed_weights(gamma):
    x, y, rows = batch()
    w = np.array([0.5, 1.0])
    model = linear_model(w)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    WeightPerturbed(Standard(), gamma).step(model, optimizer, x, y, rows)
    ascent = logistic_gradient(w, x.numpy(), y.numpy())
    worst = w + gamma * np.linalg.norm(w) * ascent / np.linalg.norm(ascent)
    expected = w - 0.3 * logistic_gradient(worst, x.numpy(), y.numpy())
    assert model.weight[0].tolist() == pytest.approx(expected.tolist(), rel=1e-12)


class Broken(Standard):
    """A method whose loss stops being a number at the second look."""

    n_calls = 0

    def loss(self, model, x, points, y):
        self.n_calls += 1
        loss, figures = super().loss(model, x, points, y)
        return loss * (np.nan if self.n_calls > 1 else 1.0), figures


@pytest.mark.parametrize("inner", [Trades(BALL, n_steps=2), Broken()])
def test_awp_restores_weights_exactly(inner):
    x, y, rows = batch()
    model = two_layer(2, 5).double()
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if isinstance(inner, Broken):
        with pytest.raises(FloatingPointError, match="lower the learning rate"):
            WeightPerturbed(inner, 0.5).step(model, optimizer, x, y, rows)
    else:
        WeightPerturbed(inner, 0.5).step(model, optimizer, x, y, rows)
    for weight, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, old)


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize(
    ("method", "p"), [(key, p) for key in METHODS for p in (1, 2, np.inf)] + [("ibp", np.inf)]
)
def test_a_step_changes_every_weight_and_lowers_the_loss(method, p, n_outputs):
    x, y, rows = batch(n_outputs, n=32)
    torch.manual_seed(0)
    model = two_layer(2, 8, n_outputs).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = BOXES[method](LpBall(p, 0.1))
    before = [weight.detach().clone() for weight in model.parameters()]
    losses = [method.step(model, optimizer, x, y, rows)["loss"] for _ in range(15)]
    assert losses[-1] < losses[0]
    for weight, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(weight, old)


@pytest.mark.parametrize("method", [key for key in BOXES if key != "slope"])
def test_images_are_trained_on_in_half_precision_too(method):
    torch.manual_seed(0)
    model, x, y = convolutional(3), torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    method = BOXES[method](LpBall(np.inf, 0.05, bounds=(0.0, 1.0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    single = method.step(model, optimizer, x, y, torch.arange(6))["loss"]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        half = method.step(model, optimizer, x, y, torch.arange(6))["loss"]
    assert half == pytest.approx(single, rel=0.1)
    assert half != single
    if isinstance(method, Attacked):
        points = method.points(model, x, y)
        assert points.shape == x.shape
        assert points.dtype == x.dtype


# ------------------------------------------------------------------ the model is left alone


class WithNorm(torch.nn.Sequential):
    """A small model with everything that has a mode."""

    def __init__(self):
        super().__init__(
            torch.nn.Linear(2, 6),
            torch.nn.BatchNorm1d(6),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(6, 3),
        )
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, x.requires_grad))
        return super().forward(x)


@pytest.mark.parametrize("method", WITH_POINTS)
def test_looking_for_points_leaves_no_trace(method):
    x, y, _ = batch(3)
    model, method = WithNorm().double(), METHODS[method](BALL)
    model[1].eval()  # frozen by the caller
    buffers = [buffer.clone() for buffer in model.buffers()]
    points = method.points(model, x, y)
    assert not points.requires_grad
    assert model.training
    assert not model[1].training
    assert all(weight.grad is None for weight in model.parameters())
    assert all(map(torch.equal, model.buffers(), buffers))
    assert {training for training, _ in model.modes} == {method.mode == "train"}


@pytest.mark.parametrize("method", [key for key in METHODS if key != "slope"])
def test_the_loss_is_taken_in_the_mode_of_the_loop(method):
    x, y, rows = batch(3)
    model = WithNorm().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    method = METHODS[method](BALL)
    for _ in range(2):
        figures = method.step(model, optimizer, x, y, rows)
    assert np.isfinite(figures["loss"])
    assert 0.0 <= figures["accuracy"] <= 1.0
    assert model.training
    assert model.modes[-1][0]
    assert model[1].num_batches_tracked > 0


# ------------------------------------------------------------------ certified training


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("ball", BALLS, ids=name)
def test_slope_margins_are_those_of_the_interval_certificate(ball, n_outputs):
    network = random_network(n_outputs, n_neurons=12)
    x, y, _ = batch(n_outputs, n=20)
    bounds = slope_margins(network.to_torch(), x, y, ball).detach().amin(dim=1).numpy()
    assert bounds == pytest.approx(margin_bounds(network, x.numpy(), y.numpy(), ball), abs=1e-9)


@pytest.mark.parametrize("loss", [Hinge(), Logistic()], ids=name)
@pytest.mark.parametrize("ball", BALLS, ids=name)
def test_slope_loss_is_the_objective_of_the_soft_program(ball, loss):
    network = random_network(n_neurons=5)
    x, y, _ = batch(n=20)
    X = network.design(x.numpy())
    gates = (ball.around(X, intercept=True).center @ network.hidden >= 0.0).astype(int)
    # One neuron a pattern and sign: none are merged.
    V, W = (
        np.where(sign * network.output.T > 0.0, network.hidden * np.abs(network.output.T), 0.0)
        for sign in (1, -1)
    )
    program = ConvexProgram(X, y.numpy(), gates, loss, GroupLasso(0.0), ball)
    expected = program.objective(numpy_backend, [V], [W])
    value, _ = Certified(ball, loss=loss).loss(network.to_torch(), x, x, y)
    assert value.item() == pytest.approx(expected, rel=1e-10)


def convolutional(n_outputs):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1, stride=2),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(4, 6, 2, bias=False),
        torch.nn.AvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(6, 5),
        torch.nn.ReLU(),
        torch.nn.Linear(5, n_outputs),
    )


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "convolutional", "normalized"])
def test_boxes_hold_all_sampled_margins(kind, n_outputs, bounds):
    torch.manual_seed(1)
    rng = np.random.default_rng(0)
    model = MLP(64, [9, 7], n_outputs) if kind == "mlp" else convolutional(n_outputs)
    for weight in model.parameters():  # no dead neurons
        torch.nn.init.normal_(weight, std=0.4)
    if kind == "normalized":
        model = Normalized(model, [0.4], [0.2])
    model = model.double()
    shape = (10, 64) if kind == "mlp" else (10, 1, 8, 8)
    x = torch.as_tensor(rng.uniform(size=shape))
    y = torch.as_tensor(rng.choice([-1, 1], 10) if n_outputs == 1 else rng.integers(3, size=10))
    ball = LpBall(np.inf, 0.05, bounds)
    bound = ibp_margins(model, x, y, ball)
    exact = LpBall(np.inf, 0.0)
    noisy = (x + uniform_noise(x, ball)).clip(*(bounds or (-1.0, 2.0)))
    for points in (noisy, attacks.fgsm(model, x, y, ball)):
        assert (ibp_margins(model, points, y, exact) >= bound - 1e-12).all()
    clean = ibp_margins(model, x, y, exact)
    assert (clean - bound).mean() > 0.01
    outputs = model(x)
    if n_outputs == 1:
        assert torch.allclose(clean, y[:, None] * outputs)
    else:
        smallest = outputs.gather(1, y[:, None])[:, 0] - outputs.scatter(
            1, y[:, None], -torch.inf
        ).amax(dim=1)
        assert torch.allclose(clean.amin(dim=1), smallest)


def test_boxes_are_exact_for_a_linear_model():
    x, y, _ = batch(3)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3)).double()
    weights, outputs = model[0].weight.detach(), model(x).detach()
    bounds = ibp_margins(model, x, y, BALL).detach()
    for k, label in enumerate(y.tolist()):
        rivals = [c for c in range(3) if c != label]
        expected = [
            outputs[k, label] - outputs[k, c] - 0.15 * (weights[label] - weights[c]).abs().sum()
            for c in rivals
        ]
        assert bounds[k].tolist() == pytest.approx([float(value) for value in expected])


@pytest.mark.parametrize("bound", ["slope", "ibp"])
def test_certified_share_is_a_share_of_robust_points(bound):
    x, y, _ = batch(3, n=40)
    model = random_network(3, n_neurons=6).to_torch()
    method = Certified(LpBall(np.inf, 0.02), bound, clean_share=0.5)
    loss, figures = method.loss(model, x, x, y)
    points = attacks.pgd(model, x, y, method.ball, n_restarts=3, random_state=0)
    robust = (model(points).argmax(dim=1) == y).double().mean().item()
    assert 0.0 < figures["certified"] <= robust <= figures["accuracy"]
    worst, clean = (
        Certified(method.ball, bound, share).loss(model, x, x, y)[0] for share in (0, 1)
    )
    assert loss.item() == pytest.approx((worst.item() + clean.item()) / 2.0)
    assert worst.item() > clean.item()


# ------------------------------------------------------------------ what they are for


def fragile_data(n=300, seed=0):
    """Return one feature that is robust and often wrong, and many that are fragile and right."""
    rng = np.random.default_rng(seed)
    y = rng.choice([-1, 1], n)
    robust = y * np.where(rng.uniform(size=n) < 0.1, -1.0, 1.0)
    fragile = 0.15 * y[:, None] + 0.2 * rng.normal(size=(n, 12))
    return np.column_stack([robust, fragile]), y


def robust_accuracy(method):
    X, y = fragile_data()
    torch.manual_seed(0)
    history = train(
        two_layer(13, 16),
        BOXES[method](LpBall(np.inf, 0.25)),
        X,
        y,
        n_epochs=10,
        batch_size=30,
        warmup=0.3,
        validation=fragile_data(seed=1),
    )
    return history["validation_robust_accuracy"][-1]


@pytest.fixture(scope="module")
def standard_accuracy():
    return robust_accuracy("standard")


@pytest.mark.parametrize("method", [key for key in BOXES if key != "standard"])
def test_every_method_is_more_robust_than_standard_training(method, standard_accuracy):
    assert robust_accuracy(method) > standard_accuracy + 0.2


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "mode must be", lambda: Attacked(BALL, mode="both")),
        (ValueError, "n_replays must be at least 1", lambda: Free(BALL, 0)),
        (ValueError, "labels_at must be", lambda: Pairing(BALL, labels_at="both")),
        (TypeError, "Free updates the weights", lambda: WeightPerturbed(Free(BALL))),
        (ValueError, "gamma must be", lambda: WeightPerturbed(Standard(), -1.0)),
        (ValueError, "bound must be one of", lambda: Certified(BALL, "lp")),
        (ValueError, "the norm must be inf", lambda: Certified(LpBall(2, 0.1), "ibp")),
        (ValueError, "clean_share must be", lambda: Certified(BALL, clean_share=2.0)),
    ],
)
def test_misuse_is_an_error(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("message", "bound", "model"),
    [
        ("needs Sequential", "slope", MLP(2, [3, 3])),
        ("got BatchNorm1d", "ibp", torch.nn.Sequential(torch.nn.BatchNorm1d(2))),
        ("must end in Linear", "ibp", torch.nn.Sequential(torch.nn.ReLU())),
    ],
)
def test_a_model_without_a_bound_is_refused(message, bound, model):
    x, y, _ = batch()
    with pytest.raises(ValueError, match=message):
        Certified(BALL, bound).loss(model.double(), x, x, y)
