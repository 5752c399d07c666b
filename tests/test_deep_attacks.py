"""Attacks on torch models: against closed forms, brute force, foolbox, and what they promise."""
# ruff: noqa: E402 - without torch the file is skipped before it imports what needs it

import itertools
import warnings
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from convexrobust.attacks import worst_margin_objective
from convexrobust.deep import as_two_logit, attacks
from convexrobust.deep.model_loss import ModelLoss
from convexrobust.network import TwoLayerReLU
from convexrobust.perturbations import DUAL_NORM, LpBall

NORMS = [1, 2, np.inf]
ATTACKS = {
    "fgsm": attacks.fgsm,
    "pgd": partial(attacks.pgd, n_steps=5, n_restarts=2, momentum=0.5, random_state=0),
    "apgd": partial(attacks.apgd, n_steps=8, n_restarts=2, random_state=0),
    "square": partial(attacks.square, n_queries=20, random_state=0),
}
EVERY = pytest.mark.parametrize("attack", list(ATTACKS.values()), ids=list(ATTACKS))


def mlp(d, n_outputs, width=16, seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(d, width), torch.nn.ReLU(), torch.nn.Linear(width, n_outputs)
    return torch.nn.Sequential(*layers)


def data(model, n, d, seed=0):
    """Return points and the labels that the model gives them."""
    x = torch.as_tensor(np.random.default_rng(seed).normal(size=(n, d)), dtype=torch.float32)
    with torch.no_grad():
        outputs = model(x)
    return x, (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(dim=1)


def margin_losses(model, x, y):
    with torch.no_grad():
        return ModelLoss(model, y, x.shape[1:])(x.flatten(1))


def share_right(model, x, y):
    return (margin_losses(model, x, y) < 0.0).double().mean().item()


# ------------------------------------------------------------------ truths


@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
@pytest.mark.parametrize("epsilon", [0.3, np.array([0.1, 0.0, 0.7, 0.3])])
@pytest.mark.parametrize("p", NORMS)
def test_linear_models_are_attacked_exactly(p, epsilon, loss):
    """One output: the margin falls by the dual norm of epsilon * w."""
    model = torch.nn.Linear(4, 1).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.tensor([1, -1, 1, -1, 1, 1, 1, -1, -1])
    w = model.weight.detach().numpy()[0]
    for name in ("fgsm", "pgd", "apgd"):
        x_adv = ATTACKS[name](model, x, y, LpBall(p, epsilon), loss=loss)
        lost = y * (model(x) - model(x_adv))[:, 0]
        expected = np.linalg.norm(epsilon * w, DUAL_NORM[p])
        assert lost.detach().numpy() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
def test_linear_models_of_many_classes(targeted):
    """The class whose logit gains most on the label's over the ball is known: l-inf, 3 classes."""
    model = torch.nn.Linear(4, 3).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    W, f = model.weight.detach().numpy(), model(x).detach().numpy()
    rows = np.arange(20)
    gaps = f - f[rows, y][:, None] + 0.4 * np.abs(W[None] - W[y][:, None]).sum(axis=2)
    gaps[rows, y] = -np.inf
    targets = (y + 1) % 3
    if targeted:
        x_adv = attacks.pgd(model, x, y, LpBall(np.inf, 0.4), targets=targets)
        f_adv = model(x_adv).detach().numpy()
        found, expected = f_adv[rows, targets] - f_adv[rows, y], gaps[rows, targets]
    else:
        x_adv = attacks.apgd(model, x, y, LpBall(np.inf, 0.4), targets=2)
        found, expected = margin_losses(model, x_adv, y).numpy(), gaps.max(axis=1)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("p", NORMS)
def test_attacks_reach_the_maximum_on_a_grid(p, n_outputs):
    model = mlp(2, n_outputs).double()
    x, y = data(model.float(), 15, 2)
    model, x = model.double(), x.double()
    axis = np.linspace(-1.0, 1.0, 21)
    grid = np.array(list(itertools.product(axis, axis)))
    grid = 0.8 * grid[np.linalg.norm(grid, p, axis=1) <= 1.0]
    best = np.max([margin_losses(model, x + torch.as_tensor(u), y) for u in grid], axis=0)
    clean = margin_losses(model, x, y).numpy()
    for attack in (attacks.pgd, attacks.apgd):
        x_adv = attack(model, x, y, LpBall(p, 0.8), n_restarts=10, random_state=0)
        found = margin_losses(model, x_adv, y).numpy()
        assert np.all(found >= best - 0.02 * (best - clean))


@EVERY
@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
@pytest.mark.parametrize("p", NORMS)
def test_one_output_and_its_two_logits_have_the_same_worst_points(p, loss, attack):
    model = mlp(5, 1).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.arange(20) % 2
    ball = LpBall(p, 0.5, (-2.0, 2.0))
    x = x.clip(-2.0, 2.0)
    one = attack(model, x, y, ball, loss=loss)
    assert torch.allclose(one, attack(as_two_logit(model), x, y, ball, loss=loss), atol=1e-9)
    assert torch.equal(one, attack(model, x, 2 * y - 1, ball, loss=loss))
    assert torch.equal(one, attack(model, x, y.bool(), ball, loss=loss))
    assert torch.equal(one, attack(lambda x: model(x)[:, 0], x, y, ball, loss=loss))


@pytest.mark.parametrize("n_outputs", [1, 3])
def test_margin_loss_is_that_of_the_closed_form(n_outputs):
    rng = np.random.default_rng(4)
    network = TwoLayerReLU(rng.normal(size=(4, 6)), rng.normal(size=(6, n_outputs)))
    X = rng.normal(size=(10, 3))
    y = rng.choice([-1, 1], 10) if n_outputs == 1 else rng.integers(3, size=10)
    loss = ModelLoss(network.to_torch(), torch.as_tensor(y), (3,))
    found, gradient = attacks.autograd_objective(loss)(torch.as_tensor(X))
    expected, expected_gradient = worst_margin_objective(network, y)(X)
    assert found.numpy() == pytest.approx(expected, abs=1e-12)
    assert gradient.numpy() == pytest.approx(expected_gradient, abs=1e-12)


def test_worst_case_is_right_where_every_attack_fails():
    model = mlp(6, 4, width=32)
    x, y = data(model, 80, 6)
    ball = LpBall(2, 0.3)
    each = list(ATTACKS.values())
    x_adv = attacks.worst_case(model, x, y, ball, attacks=each)
    losses = torch.stack([margin_losses(model, attack(model, x, y, ball), y) for attack in each])
    found = margin_losses(model, x_adv, y)
    robust = (losses < 0.0).all(dim=0)
    assert torch.equal(found < 0.0, robust)
    assert 0.0 < robust.double().mean() < 1.0


def test_standard_attacks_are_no_weaker_than_one_of_them():
    model = mlp(6, 4, width=32)
    x, y = data(model, 30, 6)
    ball = LpBall(np.inf, 0.2)
    standard = share_right(model, attacks.worst_case(model, x, y, ball), y)
    assert 0.0 < standard <= share_right(model, attacks.pgd(model, x, y, ball), y)


def test_more_targets_find_more():
    model = mlp(6, 10, width=32)
    x, y = data(model, 60, 6)
    ball, options = LpBall(np.inf, 0.2), {"loss": "cross-entropy", "n_steps": 10}
    one, all_ = (
        margin_losses(model, attacks.pgd(model, x, y, ball, targets=k, **options), y)
        for k in (1, 20)
    )
    assert (one < 0.0).sum() >= (all_ < 0.0).sum()
    cross_entropy = ModelLoss(model, y, (6,), "cross-entropy")
    clean = cross_entropy(x)
    found = cross_entropy(attacks.pgd(model, x, y, ball, targets=20, **options))
    assert bool((found >= clean).all())


# ------------------------------------------------------------------ images


def small_cnn(n_outputs=3):
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(4 * 5 * 6, n_outputs),
    )


@EVERY
@pytest.mark.parametrize("targets", [None, 2])
@pytest.mark.parametrize("p", NORMS)
def test_images_stay_inside_a_ball_with_radii_and_bounds_per_pixel(p, targets, attack):
    model, rng = small_cnn().eval(), np.random.default_rng(0)
    x = torch.as_tensor(rng.uniform(size=(7, 2, 5, 6)), dtype=torch.float32)
    epsilon = rng.uniform(0.1, 0.5, size=60) * (rng.uniform(size=60) > 0.2)
    y = torch.arange(7) % 3
    ball = LpBall(p, epsilon, (np.zeros(60), np.linspace(0.999, 1.0, 60)))
    x = x.clip(0.0, 0.999)
    x_adv = attack(model, x, y, ball, targets=targets)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == torch.float32
    delta = (x_adv - x).flatten(1).double().numpy()
    assert np.all(delta[:, epsilon == 0.0] == 0.0)
    free = epsilon > 0.0
    assert np.all(np.linalg.norm(delta[:, free] / epsilon[free], p, axis=1) <= 1.0 + 1e-5)
    assert x_adv.min() >= 0.0
    assert x_adv.max() <= 1.0
    if attack is not ATTACKS["square"]:
        assert (margin_losses(model, x_adv, y) > margin_losses(model, x, y)).all()


# ------------------------------------------------------------------ the caller's things


@EVERY
@pytest.mark.parametrize("mode", ["eval", "train", None])
def test_the_model_and_the_data_are_left_as_found(mode, attack):
    model = small_cnn().train()
    model[1].eval()  # one frozen module among others
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(8, 2, 5, 6, requires_grad=True)
    y = torch.arange(8) % 3
    before = x.detach().clone()
    if mode == "train":
        model[1].train()  # its statistics would move
        modes[2] = True
    x_adv = attack(model, x, y, LpBall(np.inf, 0.1, (0.0, 1.0)), mode=mode)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all((parameter.grad == 7.0).all() for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(x, before)
    assert x.grad is None
    assert not x_adv.requires_grad


def test_the_mode_is_what_was_asked_for_and_comes_back_after_an_error():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            seen.append(self.training)
            return torch.full((len(x), 1), torch.nan) * x.sum()

    spy = Spy().train()
    for mode, expected in (("eval", False), ("train", True), (None, True)):
        with pytest.raises(FloatingPointError, match="not finite"):
            attacks.pgd(spy, torch.rand(3, 2), torch.ones(3), LpBall(2, 0.1), mode=mode)
        assert seen.pop() is expected
        assert spy.training
    with pytest.raises(ValueError, match="mode must be"):
        attacks.pgd(spy, torch.rand(3, 2), torch.ones(3), LpBall(2, 0.1), mode="test")


@EVERY
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_attacks_work_where_gradients_are_switched_off(context, attack):
    model = mlp(4, 3)
    x, y = data(model, 10, 4)
    expected = attack(model, x, y, LpBall(2, 0.5))
    with context():
        x, y = x + 0.0, y + 0
        assert torch.equal(attack(model, x, y, LpBall(2, 0.5)), expected)


def test_batches_do_not_change_a_deterministic_attack():
    model = mlp(4, 3).double()
    x, y = data(mlp(4, 3), 11, 4)
    x = x.double()
    ball, targets = LpBall(1, 0.5), (y + 1) % 3
    for options in ({}, {"targets": targets}, {"targets": 2}):
        whole = attacks.apgd(model, x, y, ball, n_steps=10, **options)
        parts = attacks.apgd(model, x, y, ball, n_steps=10, batch_size=4, **options)
        assert torch.allclose(whole, parts, atol=1e-9)
    whole, parts = (
        attacks.worst_case(model, x, y, ball, attacks=[attacks.fgsm], batch_size=size)
        for size in (None, 3)
    )
    assert torch.allclose(whole, parts, atol=1e-9)


@EVERY
def test_no_rows_are_no_error(attack):
    model = mlp(4, 3)
    x, y = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert attack(model, x, y, LpBall(2, 0.5)).shape == (0, 4)
    assert attacks.worst_case(model, x, y, LpBall(2, 0.5)).shape == (0, 4)


# ------------------------------------------------------------------ misuse


def test_worst_case_refuses_an_attack_that_leaves_the_ball():
    model = mlp(4, 3)
    x, y = data(model, 10, 4)

    def leaking(model, x, y, ball):
        return x + 0.11

    with pytest.raises(RuntimeError, match="left the ball"):
        attacks.worst_case(model, x, y, LpBall(np.inf, 0.1), attacks=[leaking])


@pytest.mark.parametrize(
    ("n_outputs", "message", "change"),
    [
        (3, "y must hold 0 .. 2", {"y": torch.tensor([0, 1, 3])}),
        (3, "y must hold 0 .. 2", {"y": torch.tensor([-1, 1, 1])}),
        (1, "y must hold -1", {"y": torch.tensor([-1, 0, 1])}),
        (1, "whole numbers", {"y": torch.tensor([0.5, 1.0, 1.0])}),
        (3, "float32 or float64", {"x": torch.zeros(3, 4).half()}),
        (3, "float32 or float64", {"x": np.zeros((3, 4))}),
        (3, "at least two axes", {"x": torch.zeros(3)}),
        (3, "at least two axes", {"y": torch.zeros(4)}),
        (3, "loss must be", {"loss": "hinge"}),
        (3, "targets must differ", {"targets": torch.tensor([0, 1, 1])}),
        (3, "targets must be", {"targets": torch.tensor([0, 1])}),
        (3, "targets must be", {"targets": 0}),
        (3, "targets must hold 0 .. 2", {"targets": torch.tensor([1, 2, 3])}),
        (3, "batch_size", {"batch_size": 0}),
        (3, "bounds exclude", {"ball": LpBall(2, 0.1, (1.0, 2.0))}),
    ],
)
def test_wrong_arguments_are_named(n_outputs, message, change):
    arguments = {"x": torch.zeros(3, 4), "y": torch.tensor([0, 1, 0]), "ball": LpBall(2, 0.1)}
    arguments |= change
    with pytest.raises(ValueError, match=message):
        attacks.pgd(mlp(4, n_outputs), **arguments)


def test_outputs_that_are_no_class_scores_are_an_error():
    x, y = torch.rand(3, 4), torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match="the model must return"):
        attacks.fgsm(lambda x: x[:, :, None], x, y, LpBall(2, 0.1))
    with pytest.raises(ValueError, match="no gradient"):
        attacks.fgsm(lambda x: x.detach(), x, y, LpBall(2, 0.1))


# ------------------------------------------------------------------ a second opinion


def foolbox_points(model, x, y, ball, n_steps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports names that SciPy is about to drop
        foolbox = pytest.importorskip("foolbox")
        kind = {
            1: foolbox.attacks.L1PGD,
            2: foolbox.attacks.L2PGD,
            np.inf: foolbox.attacks.LinfPGD,
        }[ball.p]
        wrapped = foolbox.PyTorchModel(model.eval(), bounds=(-3.0, 3.0), device="cpu")
        attack = kind(steps=n_steps, rel_stepsize=2.5 / n_steps)
        return attack(wrapped, x, y, epsilons=ball.epsilon)[1]


@pytest.mark.parametrize("n_outputs", [1, 3, 10])
@pytest.mark.parametrize(("p", "epsilon"), [(1, 0.8), (2, 0.3), (np.inf, 0.1)])
def test_no_weaker_than_foolbox_at_equal_steps(p, epsilon, n_outputs):
    model = mlp(12, n_outputs, width=32)
    x, y = data(model, 200, 12)
    x, ball = x.clip(-3.0, 3.0), LpBall(p, epsilon, (-3.0, 3.0))
    theirs = foolbox_points(as_two_logit(model) if n_outputs == 1 else model, x, y, ball, 20)
    other = share_right(model, theirs, y)
    for attack in (attacks.pgd, attacks.apgd):
        ours = share_right(model, attack(model, x, y, ball, n_steps=20), y)
        assert ours <= other + 0.005
        assert ours > 0.0
    assert other < 1.0  # it attacks the same model, data and ball


@pytest.mark.gpu
def test_attacks_stay_on_the_device():
    model = mlp(6, 4)
    x, y = data(model, 40, 6)
    ball = LpBall(2, 0.3, (-4.0, 4.0))
    for attack in ATTACKS.values():
        x_adv = attack(model.cuda(), x.cuda(), y, ball)
        assert x_adv.device.type == "cuda"
        here = attack(model.cpu(), x, y, ball)
        losses = margin_losses(model, x_adv.cpu(), y), margin_losses(model, here, y)
        assert losses[0].mean() == pytest.approx(losses[1].mean(), abs=1e-2)
