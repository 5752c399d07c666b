"""The training loop, and two-layer training against the convex optimum and autograd."""
# ruff: noqa: E402 - without torch the file is skipped before it imports what needs it

import csv
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sklearn.datasets import load_breast_cancer, make_blobs

from convexrobust.attacks import pgd, worst_margin_objective
from convexrobust.deep import attacks, methods, train_two_layer
from convexrobust.deep.attacks import pgd as deep_pgd
from convexrobust.deep.augmentation import Augmented
from convexrobust.deep.catalogue import METHODS, create_method
from convexrobust.deep.methods import Attacked, Free, GradAlign, Standard, Trades, WeightPerturbed
from convexrobust.deep.methods.gradalign import misalignment
from convexrobust.deep.model_loss import autograd_objective
from convexrobust.deep.networks import two_layer
from convexrobust.deep.training import collapsed, learning_rate_factor, train
from convexrobust.deep.two_layer import _margins_of
from convexrobust.losses import Absolute, Hinge, Logistic, Pinball, Squared, SquaredHinge
from convexrobust.network import TwoLayerReLU
from convexrobust.patterns import enumerate_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import ConicSolver


def separable(n=40, seed=0):
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(n, 2)), rng.choice([-1, 1], n)
    return X + 4.0 * y[:, None], y


def weights_of(network):
    return [network.hidden, network.output]


def penalised_hinge(network, X, y, beta):
    decay = sum(np.sum(weight**2) for weight in weights_of(network))
    return np.mean(np.maximum(0.0, 1.0 - y * network.predict(X)[:, 0])) + beta / 2.0 * decay


# ------------------------------------------------------------------ train_two_layer: its objective


@pytest.mark.parametrize("batch_size", [None, 16])
@pytest.mark.parametrize("attack", ["none", "fgsm", "pgd"])
def test_separable_data_is_learnt(attack, batch_size):
    X, y = separable()
    network = train_two_layer(
        X,
        y,
        width=16,
        ball=LpBall(np.inf, 0.5),
        attack=attack,
        beta=0.0,
        n_epochs=60,
        learning_rate=0.03,
        n_steps=4,
        batch_size=batch_size,
    )
    objective = worst_margin_objective(network, y)
    points = X if attack == "none" else pgd(objective, X, LpBall(np.inf, 0.5))
    assert np.mean(np.maximum(0.0, 1.0 + objective(points)[0])) < 0.01
    assert network.n_neurons == 16
    assert not network.offset.any()


@pytest.mark.theory
def test_no_network_beats_the_convex_optimum_and_training_comes_near_it():
    rng = np.random.default_rng(1)
    X, beta = rng.normal(size=(12, 2)), 0.05
    y = np.where(X[:, 0] * X[:, 1] > 0.0, 1, -1)
    design = np.column_stack([X, np.ones(12)])
    program = ConvexProgram(
        design, y, enumerate_patterns(design), Hinge(), GroupLasso(beta), LpBall(2, 0.0)
    )
    solution = ConicSolver().solve(program)
    network = train_two_layer(X, y, width=128, beta=beta, n_epochs=1000, learning_rate=0.03)
    reached = penalised_hinge(network, X, y, beta)
    assert solution.lower_bound - 1e-9 <= reached <= 1.005 * solution.objective


def test_attacked_training_costs_more_than_plain_training():
    X, y = separable(seed=3)
    X = X / 4.0  # classes of distance about 2, so that a radius of 0.7 hurts
    ball, common = LpBall(np.inf, 0.7), {"width": 16, "n_epochs": 150, "beta": 0.01}
    plain = train_two_layer(X, y, **common)
    robust = train_two_layer(X, y, ball=ball, attack="pgd", **common)
    clean, attacked = {}, {}
    for name, network in (("plain", plain), ("robust", robust)):
        objective = worst_margin_objective(network, y)
        clean[name] = penalised_hinge(network, X, y, 0.01)
        points = pgd(objective, X, ball, n_restarts=2, random_state=0)
        attacked[name] = penalised_hinge(network, points, y, 0.01)
    assert clean["plain"] < clean["robust"] < attacked["robust"] < attacked["plain"]


@pytest.mark.parametrize("loss", [Hinge(), SquaredHinge(), Logistic()])
def test_several_classes_are_learnt(loss):
    X, y = make_blobs(90, centers=[(-4, 0), (4, 0), (0, 6)], random_state=0)
    network = train_two_layer(
        X,
        y,
        width=24,
        ball=LpBall(2, 0.5),
        attack="pgd",
        n_outputs=3,
        loss=loss,
        n_epochs=100,
        learning_rate=0.03,
    )
    assert network.n_outputs == 3
    assert np.mean(network.predict(X).argmax(axis=1) == y) > 0.95


@pytest.mark.parametrize("loss", [Squared(), Absolute()])
def test_regression_learns_a_kink(loss):
    X = np.linspace(-2.0, 2.0, 41)[:, None]
    y = np.abs(X[:, 0])
    network = train_two_layer(
        X, y, width=20, loss=loss, beta=1e-4, n_epochs=400, learning_rate=0.03
    )
    assert np.abs(network.predict(X)[:, 0] - y).mean() < 0.05


@pytest.mark.parametrize("loss", [Squared(), Pinball(0.8), Hinge()])
def test_margins_are_those_of_the_convex_program(loss):
    task, n_outputs = loss.task, 1 if loss.task == "regression" else 3
    rng = np.random.default_rng(2)
    outputs, X = rng.normal(size=(7, n_outputs)), np.ones((7, 1))
    y = rng.normal(size=7) if task == "regression" else rng.integers(3, size=7)
    program = ConvexProgram(
        X, y, np.ones((7, 1)), loss, GroupLasso(0.0), LpBall(2, 0.0), n_outputs=n_outputs
    )
    directions, offsets, _ = program.margin_map
    expected = np.einsum("kec,kc->ke", directions, outputs) + offsets
    scales = loss.margin_scales
    margins = _margins_of(y, task, n_outputs, scales)(torch.as_tensor(outputs)).numpy()
    assert margins == pytest.approx(expected)


# ------------------------------------------------------------------ train_two_layer: robustness


def test_adversarial_training_makes_breast_cancer_robust():
    X, y = load_breast_cancer(return_X_y=True)
    X, y = (X - X.mean(axis=0)) / X.std(axis=0), 2 * y - 1
    rows = np.random.default_rng(0).permutation(len(y))
    train, test, ball = rows[:350], rows[350:], LpBall(np.inf, 0.2)
    clean, attacked = {}, {}
    for attack in ("none", "fgsm", "pgd"):
        network = train_two_layer(X[train], y[train], ball=ball, attack=attack, n_steps=5)
        objective = worst_margin_objective(network, y[test])
        points = pgd(objective, X[test], ball, n_restarts=2, random_state=0)
        clean[attack] = np.mean(objective(X[test])[0] < 0.0)
        attacked[attack] = np.mean(objective(points)[0] < 0.0)
    assert min(clean.values()) > 0.93
    assert attacked["pgd"] > attacked["none"] + 0.05
    assert attacked["fgsm"] > attacked["none"]


# ------------------------------------------------------------------ train_two_layer: promises


@pytest.mark.parametrize("batch_size", [None, 16])
def test_same_seed_same_network(batch_size):
    X, y = separable()
    common = {"width": 8, "n_epochs": 5, "batch_size": batch_size}
    common |= {"ball": LpBall(1, 0.5), "attack": "pgd"}
    first, second, other = (train_two_layer(X, y, **common, random_state=s) for s in (0, 0, 1))
    for a, b in zip(weights_of(first), weights_of(second), strict=True):
        assert np.array_equal(a, b)
    assert not np.allclose(first.hidden, other.hidden)


def test_training_leaves_the_global_random_state_alone():
    X, y = separable()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train_two_layer(X, y, width=4, n_epochs=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("n_outputs", [1, 3])
def test_autograd_objective_agrees_with_the_closed_form_and_touches_no_grad(n_outputs):
    rng = np.random.default_rng(4)
    X = rng.normal(size=(10, 3))
    y = rng.choice([-1, 1], 10) if n_outputs == 1 else rng.integers(3, size=10)
    network = TwoLayerReLU(rng.normal(size=(4, 6)), rng.normal(size=(6, n_outputs)))
    model = network.to_torch()
    first, *others = model.parameters()
    first.grad = torch.ones_like(first)
    margins = _margins_of(y, "classification", n_outputs)
    loss, gradient = autograd_objective(lambda points: -margins(model(points)).amin(dim=1))(
        torch.as_tensor(X)
    )
    expected_loss, expected_gradient = worst_margin_objective(network, y)(X)
    assert loss.numpy() == pytest.approx(expected_loss, abs=1e-12)
    assert gradient.numpy() == pytest.approx(expected_gradient, abs=1e-12)
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(weight.grad is None for weight in others)
    assert not loss.requires_grad
    assert not gradient.requires_grad


@pytest.mark.parametrize("attack", ["none", "pgd"])
def test_a_diverging_training_is_an_error(attack):
    X, y = separable()
    options = {"ball": LpBall(2, 0.1), "attack": attack, "learning_rate": 1e200}
    with pytest.raises(FloatingPointError, match=r"lower learning_rate|not finite"):
        train_two_layer(X, y, width=4, n_epochs=5, **options)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("needs a ball", {"attack": "pgd", "ball": None}),
        ("attack must be one of", {"attack": "square"}),
        ("y must hold only", {"n_outputs": 3}),
        ("n_outputs must be 1", {"loss": Squared(), "n_outputs": 2}),
        ("bounds exclude", {"attack": "pgd", "ball": LpBall(2, 0.1, (0.0, 1.0))}),
    ],
)
def test_misuse_is_an_error(message, change):
    X, y = separable()
    with pytest.raises(ValueError, match=message):
        train_two_layer(X, y, **({"width": 4, "n_epochs": 2} | change))


def test_without_torch_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("convexrobust.deep")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "convexrobust.backends.torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"convexrobust\[torch\]"):
        __import__("convexrobust.deep")


# ------------------------------------------------------------------ train: the loop

BALL = LpBall(np.inf, 0.2)


def blobs(n=48, seed=0):
    return make_blobs(n, centers=[(-1, 0), (1, 0), (0, 1.5)], cluster_std=0.4, random_state=seed)


def noisy_model(seed=0):
    """Return a model with parameters, statistics and noise, in single precision."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(2, 8),
        torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(8, 3),
    )


def run(model, method, **options):
    X, y = blobs()
    defaults = {"n_epochs": 4, "batch_size": 20, "learning_rate": 0.05}
    return train(model, method, X, y, **(defaults | options))


def states_equal(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def without_seconds(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.epochs]


class InterruptionError(Exception):
    """What ends a run between two checkpoints."""


def interrupting(n_calls):
    """Return a validation attack that changes nothing, and at the n-th call ends the run."""
    calls = iter(range(1, n_calls))

    def attack(model, x, y, ball):
        if next(calls, None) is None:
            raise InterruptionError
        return x

    return attack


RESUMED = {
    "standard": Standard,
    "fast": partial(Attacked.fast, BALL),
    "restarts": lambda: Attacked.pgd(BALL, n_steps=2, n_restarts=2),
    "free": lambda: Free(BALL, n_replays=2),
    "gradalign": lambda: GradAlign(LpBall(2, 0.2)),
    "awp": lambda: WeightPerturbed(Trades(BALL, n_steps=2)),
}


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam])
@pytest.mark.parametrize("method", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(method, optimizer, tmp_path):
    options = {"optimizer": optimizer, "warmup": 0.5, "keep": "best", "validation": blobs(seed=1)}
    whole, resumed = noisy_model(0), noisy_model(1)
    make = RESUMED[method]
    ball = make().ball or BALL
    with_ball = (lambda: Standard(ball)) if method == "standard" else make
    history = run(whole, with_ball(), attack=interrupting(99), **options)
    path = tmp_path / "run.pt"
    first = noisy_model(0)
    with pytest.raises(InterruptionError):
        run(first, with_ball(), attack=interrupting(3), checkpoint=path, **options)
    again = run(resumed, with_ball(), attack=interrupting(99), checkpoint=path, **options)
    assert states_equal(whole, resumed)
    assert without_seconds(again) == without_seconds(history)
    assert len(again.epochs) == 4
    finished = noisy_model(2)  # nothing is left to do but to take up the weights
    run(finished, with_ball(), attack=interrupting(1), checkpoint=path, **options)
    assert states_equal(whole, finished)


def test_a_run_without_a_seed_goes_on_with_the_one_it_drew(tmp_path):
    options = {"random_state": None, "validation": blobs(seed=1)}
    path, copy = tmp_path / "run.pt", tmp_path / "copy.pt"
    with pytest.raises(InterruptionError):
        run(noisy_model(0), Free(BALL), attack=interrupting(3), checkpoint=path, **options)
    copy.write_bytes(path.read_bytes())
    models = [noisy_model(1), noisy_model(2)]
    for model, file in zip(models, (path, copy), strict=True):
        run(model, Free(BALL), attack=interrupting(9), checkpoint=file, **options)
    assert states_equal(*models)


def test_seeds_decide_and_the_generators_are_given_back():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    torch_state = before.clone()
    models = [two_layer(2, 6, 3) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    torch.set_rng_state(torch_state)
    for model, seed in zip(models, (0, 0, 1), strict=True):
        run(model, Attacked.fast(BALL), random_state=seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert states_equal(models[0], models[1])
    assert not states_equal(models[0], models[2])


def several_starts(model, x, y, ball, mode="eval"):
    """Attack as a function of a user does, without a seed."""
    return attacks.pgd(model, x, y, ball, n_steps=1, n_restarts=2, mode=mode)


UNSEEDED = {
    "pgd": partial(attacks.pgd, n_steps=2, n_restarts=3),
    "apgd": partial(attacks.apgd, n_steps=3, n_restarts=2),
    "square": partial(attacks.square, n_queries=5),
    "several": lambda model, x, y, ball, mode="eval": attacks.worst_case(
        model, x, y, ball, attacks=[several_starts, UNSEEDED["square"]], mode=mode
    ),
}


def recording(attack, seen, n_calls=99):
    """Return an attack that notes its points, and ends the run at the n-th call."""
    end = interrupting(n_calls)

    def recorded(model, x, y, ball):
        seen.append(attack(model, x, y, ball))
        return end(model, seen[-1], y, ball)

    return recorded


@pytest.mark.parametrize("name", UNSEEDED)
def test_attacks_without_a_seed_are_those_of_the_training(name, tmp_path):
    models, points = [noisy_model(0) for _ in range(3)], [[], [], []]
    path, options = tmp_path / "run.pt", {"n_epochs": 3, "validation": blobs(seed=1)}

    def trained(k, n_calls=99, **more):
        attack = recording(UNSEEDED[name], points[k], n_calls)
        run(models[k], Attacked(BALL, UNSEEDED[name]), attack=attack, **options, **more)

    trained(0)
    trained(1)
    with pytest.raises(InterruptionError):
        trained(2, n_calls=2, checkpoint=path)
    del points[2][1:]  # what the interruption lost
    trained(2, checkpoint=path)
    for model, found in zip(models[1:], points[1:], strict=True):
        assert states_equal(models[0], model)
        assert all(torch.equal(*pair) for pair in zip(points[0], found, strict=True))


@pytest.mark.parametrize("method", [methods.Dale, methods.FastBat])
def test_noise_without_a_seed_is_that_of_the_training(method):
    models = [noisy_model(0) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        run(model, method(BALL, random_state=None), random_state=seed, n_epochs=1)
    assert states_equal(models[0], models[1])
    assert not states_equal(models[0], models[2])


def test_one_plain_epoch_is_gradient_descent_by_hand():
    X, y = separable()
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    w = model.weight[0].detach().numpy().copy()
    for _ in range(2):
        w += 0.3 * (y / (1.0 + np.exp(y * (X @ w)))) @ X / len(X)
    options = {"schedule": None, "optimizer": torch.optim.SGD, "batch_size": 99}
    history = train(model, Standard(), X, y, n_epochs=2, learning_rate=0.3, **options)
    assert model.weight[0].tolist() == pytest.approx(w.tolist())
    assert not model.training
    assert history["accuracy"][-1] == np.mean(y * (X @ w) > 0.0)


class Watching(Standard):
    """A method that notes what it is given."""

    def __init__(self):
        super().__init__(BALL)
        self.seen = []

    def step(self, model, optimizer, x, y, rows):
        self.seen.append((x, y, rows, optimizer.param_groups[0]["lr"], self.current_ball.radius))
        return super().step(model, optimizer, x, y, rows)


def test_batches_hold_every_row_once_and_pace_is_as_asked():
    X, y = blobs()
    method = Watching()
    run(two_layer(2, 4, 3), method, warmup=0.5, schedule="cosine")
    assert len(method.seen) == 4 * 3
    orders = []
    for epoch in range(4):
        steps = method.seen[3 * epoch : 3 * epoch + 3]
        orders.append(torch.cat([rows for _, _, rows, *_ in steps]).tolist())
        assert sorted(orders[-1]) == list(range(48))
        for x, labels, rows, *_ in steps:
            assert np.array_equal(x.numpy(), X[rows].astype(np.float32))
            assert np.array_equal(labels.numpy(), y[rows])
    assert orders[0] != orders[1]
    done = (np.arange(12) + 0.5) / 12
    assert [seen[3] for seen in method.seen] == pytest.approx(
        0.05 * (1.0 + np.cos(np.pi * done)) / 2.0
    )
    assert [seen[4] for seen in method.seen] == pytest.approx(0.2 * np.minimum(1.0, 2.0 * done))


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [(41, 20, [20, 21]), (42, 20, [20, 20, 2]), (21, 20, [21]), (3, 1, [1, 1, 1]), (1, 20, [1])],
)
def test_a_single_row_that_is_left_joins_the_batch_before(n, batch_size, sizes):
    method = Watching()
    X, y = blobs(n)
    model = noisy_model() if batch_size > 1 and n > 1 else two_layer(2, 4, 3)
    train(model, method, X, y, n_epochs=1, batch_size=batch_size)
    assert [len(rows) for _, _, rows, *_ in method.seen] == sizes
    assert sorted(torch.cat([rows for _, _, rows, *_ in method.seen]).tolist()) == list(range(n))


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("cyclic", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("multistep", [1.0, 1.0, 1.0, 0.1, 0.01]),
        ("cosine", [1.0, 0.5 + 0.5 * np.cos(0.2 * np.pi), 0.5 + 0.5 * np.cos(0.4 * np.pi)]),
        (None, [1.0] * 5),
    ],
)
def test_schedules(schedule, factors):
    for done, factor in zip((0.0, 0.2, 0.4, 0.7, 1.0), factors, strict=False):
        assert learning_rate_factor(schedule, done) == pytest.approx(factor)


def test_a_clipped_step_is_no_longer_than_asked():
    X, y = separable()
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    before = model.weight.detach().clone()
    options = {"schedule": None, "optimizer": torch.optim.SGD, "batch_size": 99}
    train(model, Standard(), X, -y, n_epochs=1, learning_rate=0.5, clip_gradient=0.01, **options)
    assert (model.weight - before).norm().item() == pytest.approx(0.005, rel=1e-3)


def test_half_precision_trains_and_is_not_single_precision():
    models = [two_layer(2, 16, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    histories = [
        run(model, method, precision=precision, n_epochs=15, validation=blobs(seed=1))
        for model, precision, method in zip(
            models, (None, "bfloat16"), (Free(BALL, 2), Free(BALL, 2)), strict=True
        )
    ]
    assert not states_equal(*models)
    assert all(weight.dtype == torch.float32 for weight in models[1].parameters())
    losses = [history["loss"][-1] for history in histories]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_training_on_a_gpu_comes_to_what_the_cpu_comes_to(precision, tmp_path):
    models = [two_layer(2, 16, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    losses = []
    for model, device in zip(models, ("cpu", "cuda"), strict=True):
        options = {"device": device, "n_epochs": 15, "validation": blobs(seed=1)}
        path = tmp_path / f"{device}.pt"
        history = run(model, Attacked.pgd(BALL), precision=precision, checkpoint=path, **options)
        losses.append(history["loss"][-1])
        again = run(model, Attacked.pgd(BALL), precision=precision, checkpoint=path, **options)
        assert again.epochs == history.epochs
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


# ------------------------------------------------------------------ train: weights of samples

NOISY = {"fast", "n-fgsm", "gradalign", "trades", "trades-awp", "dale", "fast-bat"}


def full_batch(name, X, y, **options):
    """Return a model that a method has trained on all rows at once, without noise."""
    torch.manual_seed(0)
    model, ball = two_layer(2, 4, 3).double(), LpBall(np.inf, 0.0 if name in NOISY else 0.1)
    options |= {"n_epochs": 1 if name == "free" else 2, "batch_size": 999, "schedule": None}
    method = create_method(name, ball, n_rows=len(X))
    train(model, method, X, y, optimizer=torch.optim.SGD, learning_rate=0.2, **options)
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.parametrize("name", METHODS)
def test_a_weight_is_a_repetition(name):
    X, y = blobs(12)
    times = np.arange(12) % 4
    weighted = full_batch(name, X, y, sample_weight=0.7 * times)
    repeated = full_batch(name, np.repeat(X, times, axis=0), np.repeat(y, times))
    torch.testing.assert_close(weighted, repeated, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(weighted, full_batch(name, X, y), rtol=1e-4)


def test_robust_terms_are_weighed():
    torch.manual_seed(0)
    model, x, y = two_layer(2, 4, 3).double(), torch.randn(3, 2).double(), torch.arange(3)
    rows, weights = torch.tensor([0, 1, 1, 1]), torch.tensor([0.75, 2.25, 0.0])
    points, method = x + 0.1, Trades(BALL)
    expected = method.loss(model, x[rows], points[rows], y[rows])
    method.sample_weights = weights
    loss, figures = method.loss(model, x, points, y)
    assert loss.item() == pytest.approx(expected[0].item())
    assert figures["divergence"] == pytest.approx(expected[1]["divergence"])
    gradients = torch.randn(2, 3, 2)
    expected = misalignment(*gradients[:, rows]).item()
    assert misalignment(*gradients, weights).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["free", "ssds", "trades", "dale"])
def test_equal_weights_are_none_and_rows_of_weight_0_are_not_there(name):
    X, y = blobs(30)
    kept, models = np.arange(30) % 3 > 0, [noisy_model(0) for _ in range(4)]
    data = [(X, y, None), (X, y, np.full(30, 0.1)), (X[kept], y[kept], None), (X, y, 0.1 * kept)]
    for model, (points, labels, weight) in zip(models, data, strict=True):
        n_rows = len(points) if weight is None else np.count_nonzero(weight)
        method = create_method(name, BALL, n_rows=n_rows)
        train(model, method, points, labels, sample_weight=weight, n_epochs=2, batch_size=8)
    assert states_equal(models[0], models[1])
    assert states_equal(models[2], models[3])
    assert not states_equal(models[0], models[2])


def test_a_method_is_given_back_without_weights_and_wrappers_pass_them_on():
    inner = Standard()
    for method in (inner, Augmented(inner), WeightPerturbed(inner)):
        method.sample_weights = torch.ones(3)
        assert torch.equal(inner.sample_weights, torch.ones(3))
        run(two_layer(2, 4, 3), inner, sample_weight=np.arange(1.0, 49.0), n_epochs=1)
        assert method.sample_weights is None


class Bare:
    """A method that knows no weights."""

    ball = None
    step = Standard().step

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("Bare cannot weigh samples", {"method": Bare()}),
        ("Bare cannot weigh samples", {"method": Augmented(Bare())}),
        ("48 finite numbers of at least 0", {"sample_weight": np.ones(3)}),
        ("48 finite numbers of at least 0", {"sample_weight": -np.ones(48)}),
        ("48 finite numbers of at least 0", {"sample_weight": np.full(48, np.nan)}),
        ("at least one row", {"sample_weight": np.zeros(48)}),
    ],
)
def test_weights_that_cannot_be_are_refused(message, options):
    with pytest.raises(ValueError, match=message):
        run(two_layer(2, 4, 3), **{"method": Standard(), "sample_weight": np.ones(48)} | options)


# ------------------------------------------------------------------ train: validation


def test_validation_is_the_accuracy_under_the_attack():
    X, y = blobs(seed=1)
    model = two_layer(2, 8, 3).double()
    history = run(model, Attacked.fgsm(BALL), validation=(X, y))
    points = deep_pgd(model, torch.as_tensor(X), torch.as_tensor(y), BALL, n_steps=10)
    for name, at in (("accuracy", torch.as_tensor(X)), ("robust_accuracy", points)):
        right = (model(at).argmax(dim=1).numpy() == y).mean()
        assert history[f"validation_{name}"][-1] == pytest.approx(right)


class Recording(Standard):
    """A method that keeps the weights after every step."""

    def __init__(self):
        super().__init__(BALL)
        self.weights = []

    def step(self, model, optimizer, x, y, rows):
        figures = super().step(model, optimizer, x, y, rows)
        self.weights.append([weight.detach().clone() for weight in model.parameters()])
        return figures | {"accuracy": 0.5 + 0.01 * len(self.weights)}


def trained_linear(*robust, **options):
    """Train a linear model on two classes with scripted robust accuracies."""
    X, y = separable()
    model, method = torch.nn.Linear(2, 1, bias=False).double(), Recording()
    with torch.no_grad():
        model.weight.fill_(1.0)
    history = train(
        model,
        method,
        X,
        y,
        n_epochs=len(robust),
        validation=(X, y),
        attack=scripted(*robust),
        **options,
    )
    return history, model, method


def scripted(*robust):
    """Return an attack that turns the sign of all points but a share of them."""
    script = iter(robust)

    def attack(model, x, y, ball):
        points = x.clone()
        points[round(next(script) * len(x)) :] *= -1.0
        return points

    return attack


def test_the_best_weights_are_kept():
    history, model, method = trained_linear(0.5, 0.8, 0.7, 0.8, keep="best")
    assert history.best_epoch == 1
    assert torch.equal(model.weight, method.weights[1][0])
    assert history["validation_robust_accuracy"].tolist() == [0.5, 0.8, 0.7, 0.8]
    assert history.stopped == ""


def test_patience_ends_a_run():
    history, _, _ = trained_linear(0.5, 0.8, 0.7, 0.8, 0.9, 1.0, patience=2)
    assert len(history.epochs) == 4
    assert "for 2 epochs" in history.stopped


@pytest.mark.parametrize("overfitting", [None, "stop", "roll back"])
def test_catastrophic_overfitting_is_met_as_asked(overfitting):
    script = (0.5, 0.8, 0.7, 0.2, 0.9)
    if overfitting is None:
        history, model, method = trained_linear(*script)
        assert len(history.epochs) == 5
        return
    with pytest.warns(RuntimeWarning, match="catastrophic overfitting in epoch 3"):
        history, model, method = trained_linear(*script, overfitting=overfitting)
    assert history.stopped == "catastrophic overfitting"
    assert len(history.epochs) == 4
    kept = 1 if overfitting == "roll back" else 3
    assert torch.equal(model.weight, method.weights[kept][0])


def test_the_detector_needs_a_fall_and_a_training_accuracy_that_does_not_fall():
    def epochs(*pairs):
        names = ("validation_robust_accuracy", "accuracy")
        return [dict(zip(names, pair, strict=True)) for pair in pairs]

    assert collapsed(epochs((0.4, 0.5), (0.1, 0.7)))
    assert collapsed(epochs((0.4, 0.5), (0.35, 0.6), (0.1, 0.9)))
    assert not collapsed(epochs((0.4, 0.5), (0.25, 0.7)))
    assert collapsed(epochs((0.4, 0.5), (0.25, 0.7)), drop=0.1)
    assert not collapsed(epochs((0.4, 0.5), (0.1, 0.2)))  # training fails as a whole
    assert not collapsed(epochs((0.1, 0.5)))
    assert not collapsed([{"accuracy": 0.5}, {"accuracy": 0.6}])


# ------------------------------------------------------------------ train: files


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_log_holds_the_history(suffix, tmp_path, capsys):
    log = tmp_path / f"log{suffix}"
    log.write_text("what another run has left")
    history = run(two_layer(2, 4, 3), Trades(BALL, n_steps=1), log=log, progress=True)
    text = log.read_text().splitlines()
    rows = list(csv.DictReader(text)) if suffix == ".csv" else [json.loads(line) for line in text]
    assert [{k: float(v) for k, v in row.items()} for row in rows] == history.epochs
    assert set(rows[0]) >= {"epoch", "loss", "accuracy", "divergence", "learning_rate", "scale"}
    assert len(capsys.readouterr().err.splitlines()) == 4


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("method was", {"method": Trades(BALL, weight=1.0, n_steps=1)}),
        ("method was", {"method": Trades(LpBall(np.inf, 0.3), n_steps=1)}),
        ("learning_rate was 0.05 and is 0.1", {"learning_rate": 0.1}),
        ("n_epochs was 4 and is 5", {"n_epochs": 5}),
        ("random_state was", {"random_state": 1}),
        ("sample_weight was", {"sample_weight": np.arange(1, 49)}),
        (r"optimizer was \['SGD'", {"optimizer": torch.optim.Adam}),
        ("validation was None", {"validation": blobs()}),
        ("another model", {"model": two_layer(2, 5, 3)}),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(message, change, tmp_path):
    path = tmp_path / "run.pt"
    common = {"model": two_layer(2, 4, 3), "method": Trades(BALL, n_steps=1), "checkpoint": path}
    run(**common, learning_rate=np.float64(0.05))  # as a grid search hands over
    before = {name: value.clone() for name, value in common["model"].state_dict().items()}
    with pytest.raises(ValueError, match=message):
        run(**(common | change))
    assert all(torch.equal(before[k], v) for k, v in common["model"].state_dict().items())


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(two_layer(2, 4, 3), Standard(), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"cannot be read.*Delete it"):
        run(two_layer(2, 4, 3), Standard(), checkpoint=path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="lacks"):
        run(two_layer(2, 4, 3), Standard(), checkpoint=path)


class Failing(Standard):
    """A method whose loss is not a number from the third epoch on."""

    n_calls = 0

    def loss(self, model, x, points, y):
        self.n_calls += 1
        loss, figures = super().loss(model, x, points, y)
        return loss * (np.nan if self.n_calls > 6 else 1.0), figures


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(FloatingPointError, match="epoch 2; there is no checkpoint"):
        run(two_layer(2, 4, 3), Failing())
    with pytest.raises(FloatingPointError, match=r"epoch 2; the checkpoint .*run\.pt"):
        run(two_layer(2, 4, 3), Failing(), checkpoint=path)
    assert len(torch.load(path, weights_only=True)["history"]["epochs"]) == 2
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        run(two_layer(2, 4, 3), Standard(), learning_rate=1e30)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("schedule must be one of", {"schedule": "linear"}),
        ("keep must be one of", {"keep": "first"}),
        ("overfitting must be one of", {"overfitting": "ignore"}),
        ("need validation", {"keep": "best", "validation": None}),
        ("need validation", {"patience": 2, "validation": None}),
        ("overfitting needs a method", {"overfitting": "stop", "method": Standard()}),
        ("patience must be at least 1", {"patience": 0}),
        ("must end in .csv or .jsonl", {"log": "log.txt"}),
        ("folder that does not exist", {"checkpoint": "nowhere/run.pt"}),
        ("precision must be None or 'bfloat16'", {"precision": "float16"}),
        ("not supported on meta", {"precision": "bfloat16", "device": "meta"}),
        ("batch_size must be a positive multiple", {"batch_size": 0}),
        ("batch_size must be a positive multiple", {"batch_size": "all"}),
        ("n_epochs must be at least 1", {"n_epochs": 0}),
        ("warmup must be", {"warmup": 2.0}),
        ("X must be", {"validation": (np.ones((3, 2)), np.ones(2))}),
    ],
)
def test_misuse_of_the_loop_is_an_error(message, change):
    with pytest.raises(ValueError, match=message):
        run(
            **(
                {"model": two_layer(2, 4, 3), "method": Standard(BALL), "validation": blobs()}
                | change
            )
        )


# ------------------------------------------------------------------ train: several processes

SCRIPT = """
import os
import sys
import numpy as np
import torch
from convexrobust.deep.methods import Attacked
from convexrobust.deep.networks import two_layer
from convexrobust.deep.training import train
from convexrobust.perturbations import LpBall

torch.set_num_threads(1)
rank, n_processes, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if n_processes > 1:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_processes
    )
rng = np.random.default_rng(0)
X, y = rng.normal(size=(50, 3)), rng.integers(3, size=50)
torch.manual_seed(rank)  # the processes start from different weights; those of the first count
model, ball = two_layer(3, 8, 3).double(), LpBall(np.inf, 0.1)
history = train(
    model, Attacked.fgsm(ball), X, y, n_epochs=3, batch_size=20, validation=(X, y),
    clip_gradient=0.5, checkpoint=f"{folder}/of{n_processes}.pt",
)
torch.save([history["loss"].tolist(), model.state_dict()], f"{folder}/{rank}of{n_processes}.pt")
if n_processes > 1:
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo may abort the interpreter's own way out
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, monkeypatch):
    def start(rank):
        arguments = [sys.executable, "-c", SCRIPT, str(rank), "2", str(tmp_path)]
        return subprocess.Popen(arguments, env=os.environ | {"OMP_NUM_THREADS": "1"})

    processes = [start(0), start(1)]
    monkeypatch.setattr(sys, "argv", ["", "0", "1", str(tmp_path)])
    exec(SCRIPT, {})
    assert [process.wait(timeout=150) for process in processes] == [0, 0]
    (losses, one), *both = (torch.load(tmp_path / f"{k}.pt") for k in ("0of1", "0of2", "1of2"))
    for other_losses, weights in both:
        assert other_losses == pytest.approx(losses, rel=1e-10)
        for name, weight in weights.items():
            assert torch.allclose(weight, one[name], rtol=1e-10)
            assert torch.equal(weight, both[0][1][name])


RESUMING = """
import os
import sys
import numpy as np
import torch
from convexrobust.deep.catalogue import create_method
from convexrobust.deep.networks import two_layer
from convexrobust.deep.training import train
from convexrobust.perturbations import LpBall

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
)
rng = np.random.default_rng(0)
X, y = rng.normal(size=(41, 3)), rng.integers(3, size=41)

class Interruption(Exception):
    pass

def interrupting(n_calls):
    def attack(model, x, y, ball):
        nonlocal n_calls
        n_calls -= 1
        if n_calls == 0:
            raise Interruption
        return x
    return attack

def trained(name, n_calls, checkpoint):
    torch.manual_seed(0)
    model = two_layer(3, 8, 3).double()
    method = create_method(name, LpBall(np.inf, 0.3), n_rows=len(X))
    options = {"batch_size": 20, "validation": (X, y), "sample_weight": 1.0 + (y == 1)}
    try:
        train(model, method, X, y, n_epochs=4, attack=interrupting(n_calls),
              checkpoint=checkpoint, **options)
    except Interruption:
        pass
    return model.state_dict()

for name in ("dale", "ssds", "free"):
    whole, path = trained(name, 9, None), f"{folder}/{name}.pt"
    trained(name, 3, path)
    torch.distributed.barrier()
    if rank == 0:
        torch.save(torch.load(path), f"{folder}/early_{name}.pt")
    resumed = trained(name, 9, path)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole), name
try:
    trained("dale", 9, f"{folder}/other.pt" if rank == 0 else None)
    raise AssertionError("another checkpoint in the other process was taken")
except ValueError as error:
    assert "checkpoint must be the same in all processes" in str(error)
torch.distributed.destroy_process_group()
os._exit(0)  # threads of gloo may abort the interpreter's own way out
"""


@pytest.mark.slow
def test_two_processes_resume_exactly_and_one_does_not(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RESUMING, str(rank), str(tmp_path)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    states = torch.load(tmp_path / "early_ssds.pt")["methods"]
    assert not torch.equal(states[0]["perturbations"], states[1]["perturbations"])


@pytest.mark.parametrize("name", ["standard", "dale"])
def test_what_each_process_remembers_needs_as_many_processes(name, tmp_path):
    path = tmp_path / "run.pt"
    method = create_method(name, BALL, n_rows=48)
    run(two_layer(2, 4, 3), method, checkpoint=path)
    state = torch.load(path)
    torch.save(state | {"methods": 2 * state["methods"]}, path)
    if name == "standard":
        assert len(run(two_layer(2, 4, 3), method, checkpoint=path).epochs) == 4
        return
    with pytest.raises(ValueError, match=r"written by 2 process.*Dale remembers.*Resume with 2"):
        run(two_layer(2, 4, 3), method, checkpoint=path)


def test_processes_that_do_not_know_each_other_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="init_process_group"):
        run(two_layer(2, 4, 3), Standard())


@pytest.mark.parametrize(
    ("n_outputs", "labels", "message"),
    [
        (1, [1, 2], "-1 / \\+1"),
        (2, [-1, 1], "0 .. 1"),
        (3, [0, -100], "0 .. 2"),
        (2, [0.3, 0.7], "whole"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_training(n_outputs, labels, message):
    model = torch.nn.Linear(2, n_outputs)
    before = model.weight.clone()
    y = np.resize(labels, 8)
    with pytest.raises(ValueError, match=message):
        train(model, methods.Standard(), torch.randn(8, 2), y, n_epochs=1)
    assert torch.equal(model.weight, before)


def test_half_precision_parameters_are_refused():
    with pytest.raises(ValueError, match="float32"):
        train(
            torch.nn.Linear(2, 2).half(),
            methods.Standard(),
            np.ones((4, 2)),
            [0, 1] * 2,
            n_epochs=1,
        )


def resumable(path, **options):
    torch.manual_seed(0)
    X = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    y, model = np.arange(8) % 2, torch.nn.Linear(2, 2)
    options = {"method": methods.Standard(), "random_state": 0, "learning_rate": 0.1} | options
    return train(model, X=X, y=y, n_epochs=2, checkpoint=path, **options)


def test_numbers_of_numpy_can_be_read_back(tmp_path):
    path = tmp_path / "run.pt"
    options = {
        "optimizer": partial(torch.optim.SGD, weight_decay=np.float64(5e-4)),
        "method": methods.Dale(LpBall(np.inf, 0.1), margin=np.float64(0.1)),
    }
    first, second = (resumable(path, **options) for _ in range(2))
    assert first.epochs == second.epochs


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": partial(torch.optim.SGD, momentum=0.5)},
        {"method": methods.Attacked.pgd(LpBall(np.inf, np.array([0.1, 0.2])))},
        {"method": methods.Attacked(LpBall(np.inf, 0.1), attack=attacks.fgsm)},
    ],
    ids=["optimizer", "radii", "attack"],
)
def test_a_checkpoint_of_other_options_is_refused(tmp_path, change):
    path = tmp_path / "run.pt"
    start = {"method": methods.Attacked.pgd(LpBall(np.inf, np.array([0.1, 0.3])))}
    if "optimizer" in change:
        start = {"optimizer": partial(torch.optim.SGD, momentum=0.9)}
    resumable(path, **start)
    with pytest.raises(ValueError, match="another training"):
        resumable(path, **change)


def test_a_lower_accuracy_in_training_is_no_catastrophic_overfitting():
    for method in (methods.Dale(LpBall(2, 0.1)), methods.FastBat(LpBall(2, 0.1))):
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        figures = method.step(
            model, optimizer, torch.randn(6, 2), torch.tensor([0, 1] * 3), range(6)
        )
        assert 0.0 <= figures["accuracy"] <= 1.0
