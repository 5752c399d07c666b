"""Adversarial training in torch: against the convex optimum, autograd, and what it promises."""
# ruff: noqa: E402 - without torch the file is skipped before it imports what needs it

import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sklearn.datasets import load_breast_cancer, make_blobs

from convexrobust.attacks import pgd, worst_margin_objective
from convexrobust.deep import train_two_layer
from convexrobust.deep.training import _margins_of, autograd_objective
from convexrobust.losses import Absolute, Hinge, Logistic, Squared, SquaredHinge
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


# ------------------------------------------------------------------ what is minimised


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


@pytest.mark.parametrize(("task", "n_outputs"), [("classification", 3), ("regression", 1)])
def test_margins_are_those_of_the_convex_program(task, n_outputs):
    rng = np.random.default_rng(2)
    outputs, X = rng.normal(size=(7, n_outputs)), np.ones((7, 1))
    y = rng.normal(size=7) if task == "regression" else rng.integers(3, size=7)
    loss = Squared() if task == "regression" else Hinge()
    program = ConvexProgram(
        X, y, np.ones((7, 1)), loss, GroupLasso(0.0), LpBall(2, 0.0), n_outputs=n_outputs
    )
    directions, offsets, _ = program.margin_map
    expected = np.einsum("kec,kc->ke", directions, outputs) + offsets
    margins = _margins_of(y, task, n_outputs)(torch.as_tensor(outputs)).numpy()
    assert margins == pytest.approx(expected)


# ------------------------------------------------------------------ robustness


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


# ------------------------------------------------------------------ determinism, gradients, errors


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
