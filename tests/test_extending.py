"""What docs/extending.rst shows works as it says, in the estimators' default path."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.preprocessing import scale

from convexrobust import (
    ConvexRobustClassifier,
    InteriorPoint,
    LpBall,
    WorkingSet,
)
from convexrobust.attacks import worst_margin_objective
from convexrobust.backends import numpy as xp
from convexrobust.deep import AdversarialClassifier, AdversarialRegressor
from convexrobust.evaluation import evaluate_robustness
from convexrobust.losses import Hinge, Logistic
from convexrobust.network import TwoLayerReLU
from convexrobust.patterns import enumerate_patterns
from convexrobust.solvers import ADMM, ConicSolver, ProgramRefusedError
from tests.cases import small_data, small_program

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "extending"
LINF = LpBall(np.inf, 0.1)


def example(name):
    """Return a module of the examples."""
    spec = importlib.util.spec_from_file_location(f"extending_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def iris():
    X, y = load_iris(return_X_y=True)
    return scale(X)[::5], y[::5]


def test_the_page_shows_every_example():
    page = (ROOT / "docs" / "extending.rst").read_text()
    shown = re.findall(r"literalinclude:: \.\./examples/extending/(\w+\.py)", page)
    assert sorted(shown) == sorted(path.name for path in FOLDER.glob("*.py"))


class TestLoss:
    loss = example("loss").SumOfHinges()

    def test_conjugate(self):
        rng = np.random.default_rng(0)
        a = rng.uniform(size=(5, 3))
        margins = rng.normal(scale=3.0, size=(20_000, 3))
        losses = self.loss.value(xp, margins)
        reached = [np.max(-margins @ row - losses) for row in a]
        assert np.all(reached <= self.loss.conjugate(a) + 1e-12)
        at_kinks = -a.sum(axis=1) - self.loss.value(xp, np.ones((5, 3)))
        np.testing.assert_allclose(at_kinks, self.loss.conjugate(a))

    def test_bound_is_no_more_than_the_optimum_whatever_the_multipliers(self):
        program = small_program(self.loss, LINF, n_classes=3)
        found = ConicSolver().solve(program)
        assert found.relative_gap < 1e-5
        many = found.multipliers._replace(margins=50.0 * found.multipliers.margins)
        assert program.lower_bound(many) <= found.objective

    def test_default_path(self):
        X, y = iris()
        model = ConvexRobustClassifier(0.1, beta=1e-2, loss=self.loss, random_state=0).fit(X, y)
        assert isinstance(model.solver_, WorkingSet)
        assert model.solution_.status == "optimal"
        assert model.robust_score(X, y) > 0.8

    def test_a_solver_that_cannot_says_so(self):
        X, y = iris()
        with pytest.raises(ProgramRefusedError, match="SumOfHinges is 'other': use ConicSolver"):
            ConvexRobustClassifier(loss=self.loss, solver=ADMM()).fit(X, y)


class TestSolver:
    solver = example("solver").ActiveRows(first=8)

    @pytest.mark.parametrize("ball", [LINF, LpBall(2, 0.1), LpBall(1, 0.1)], ids=["inf", "2", "1"])
    @pytest.mark.parametrize("n_classes", [2, 3])
    def test_optimum(self, ball, n_classes):
        D = enumerate_patterns(small_data(n=40)[0])[:, ::60]
        program = small_program(Hinge(), ball, n_classes=n_classes, n=40, D=D)
        found, optimum = self.solver.solve(program), InteriorPoint().solve(program).objective
        assert found.status == "optimal"
        assert found.lower_bound <= optimum * (1.0 + 1e-6)
        assert optimum * (1.0 - 1e-6) <= found.objective <= optimum * (1.0 + 1e-4)

    def test_in_the_estimators_and_around_it(self):
        X, y = small_data(n=60)
        model = ConvexRobustClassifier(0.1, beta=0.02, solver=self.solver, random_state=0)
        sampled = model.fit(X[:, :-1], y)
        assert len(sampled.solution_.history) > 1  # not all rows were needed at once
        assert sampled.gap_ <= 1e-4 * sampled.objective_
        around = WorkingSet(solver=self.solver, width=4, n_new=4, max_rounds=2)
        generated = model.set_params(solver=around).fit(X[:, :-1], y)
        assert generated.solution_.solver == "WorkingSet(ActiveRows)"
        assert generated.solution_.status == "optimal"

    def test_refusals_reach_the_user(self):
        X, y = small_data()
        for options, text in (
            ({"formulation": "hard"}, "no cones as constraints"),
            ({"loss": Logistic()}, "Logistic is 'logistic': use ConicSolver"),
        ):
            model = ConvexRobustClassifier(solver=self.solver, **options)
            with pytest.raises(ProgramRefusedError, match=text):
                model.fit(X[:, :-1], y)


class TestNorm:
    def test_others_are_refused(self):
        with pytest.raises(ValueError, match=r"norm must be 1, 2 or numpy\.inf.*got 3"):
            LpBall(3, 0.1)

    @pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 10.0, np.inf])
    def test_balls_that_cover(self, p):
        directions = np.random.default_rng(0).normal(size=(500, 4))
        directions = np.vstack([directions, np.sign(directions), np.eye(4)])
        points = 0.2 * directions / np.linalg.norm(directions, p, axis=1)[:, None]
        for ball in example("norm").covering_balls(p, 0.2, 4):
            lengths = ball.length(points)
            assert lengths.max() <= 1.0 + 1e-12
            assert lengths.max() >= 1.0 - 1e-12  # none could be smaller


class TestMethod:
    method = example("method").GradientPenalty

    def test_loss_grows_by_the_dual_norm_of_its_gradient(self):
        torch = pytest.importorskip("torch")
        model = torch.nn.Linear(3, 1).double()
        x, y = torch.randn(6, 3).double(), torch.randn(6).double()
        method = self.method(LINF)
        loss, _ = method.loss(model, x, x, (y > 0).double())
        losses = method.losses(model(x), (y > 0).double())
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(method.losses(model(x), (y > 0).double()).sum(), x)
        expected = losses.mean() + 0.1 * gradient.abs().sum(dim=1).mean()
        torch.testing.assert_close(loss, expected)

    def test_makes_networks_robust(self):
        X, y = load_breast_cancer(return_X_y=True)
        X, y = scale(X)[:200, :10], y[:200]
        options = {"epsilon": 0.3, "random_state": 0, "training": {"n_epochs": 150}}
        scores = [
            AdversarialClassifier(method=method, **options).fit(X, y).robust_score(X, y)
            for method in ("standard", self.method)
        ]
        assert scores[1] > scores[0]

    def test_regression(self):
        X, y = small_data("regression", n=30)
        model = AdversarialRegressor(
            0.05, method=self.method, random_state=0, training={"n_epochs": 60}
        )
        assert model.fit(X[:, :-1], y).score(X[:, :-1], y) > 0.3


class TestAttack:
    attack = staticmethod(example("attack").frank_wolfe)

    @pytest.mark.parametrize("ball", [LINF, LpBall(2, 0.3), LpBall(1, 0.3)], ids=["inf", "2", "1"])
    def test_linear_losses_are_attacked_exactly(self, ball):
        rng = np.random.default_rng(0)
        X, slopes = rng.normal(size=(20, 4)), rng.normal(size=(20, 4))
        points = self.attack(lambda Z: (np.sum(slopes * Z, axis=1), slopes), X, ball)
        rise = np.sum(slopes * (points - X), axis=1)
        best = np.sum(slopes * ball.steepest(xp, slopes), axis=1)
        assert np.all(rise <= best * (1.0 + 1e-12))
        assert np.all(rise >= 0.99 * best)

    def test_beside_the_others(self):
        X, y = iris()
        model = ConvexRobustClassifier(0.1, beta=1e-2, n_patterns=10, random_state=0).fit(X, y)
        suite = {"frank-wolfe": self.attack, "pgd-100": {"attack": "pgd", "n_steps": 100}}
        table = evaluate_robustness(model, X, y, [0.5], suite=suite)
        found = {row.measure: row.accuracy for row in table.rows}
        assert {"frank-wolfe", "pgd-100"} <= set(found)
        assert found["exact"] <= found["frank-wolfe"] <= found["clean"]

    def test_points_stay_in_the_set_with_bounds(self):
        network = TwoLayerReLU(np.eye(3, 4), np.ones((4, 1)), intercept=True)
        X = np.random.default_rng(0).uniform(size=(10, 2))
        ball = LpBall(2, 0.4, bounds=(0.0, 1.0))
        objective = worst_margin_objective(network, np.ones(10))
        points = self.attack(objective, X, ball)
        assert np.all((points >= 0.0) & (points <= 1.0))
        assert np.all(ball.length(points - X) <= 1.0 + 1e-9)
