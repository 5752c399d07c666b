"""Margins that a loss scales or limits one by one, and the losses that live on them."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from sklearn.linear_model import QuantileRegressor

from convexrobust import ConvexRobustClassifier, ConvexRobustRegressor, largest_beta
from convexrobust.attacks import pgd, worst_margin_objective
from convexrobust.backends import numpy as xp
from convexrobust.losses import Absolute, Hinge, Huber, MarginLoss, Pinball, Squared
from convexrobust.network import TwoLayerReLU
from convexrobust.patterns import sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import FORMULATIONS, ConvexProgram
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import ADMM, ConicSolver, InteriorPoint, ProjectedGradient, WorkingSet
from convexrobust.solvers.residuals import multipliers_at_zero
from tests.cases import BALLS, name, small_data, small_program

LINF = LpBall(np.inf, 0.1)
NOMINAL = LpBall(np.inf, 0.0)


@dataclass(frozen=True)
class ScaledHinge(Hinge):
    """The hinge of margins that count several times."""

    margin_scales: float | tuple[float, ...] = 2.0


@dataclass(frozen=True)
class SumOfHinges(MarginLoss):
    """The loss of Weston and Watkins, each rival with a weight: sum_e c_e (1 - m_e)_+."""

    margin_limits: float | tuple[float, ...] = 1.0
    smoothness = np.inf
    largest_multiplier = np.inf

    def value(self, xp, margins):
        parts = xp.pos(1.0 - margins)
        return xp.row_sum(xp.multiply(np.broadcast_to(self.margin_limits, parts.shape), parts))

    def conjugate(self, multipliers):
        return -multipliers.sum(axis=1)

    def multipliers(self, margins):
        return np.where(margins < 1.0, self.margin_limits, 0.0)


def patterned(loss, ball=LINF, formulation="soft", n_classes=2, n=12, beta=0.02):
    """Return a small program on sampled patterns."""
    D = sample_patterns(small_data(loss.task, n_classes, n)[0], 6, random_state=0)
    return small_program(loss, ball, formulation, n_classes=n_classes, beta=beta, D=D, n=n)


SOLVERS = [
    (ConicSolver(), 1e-5),
    (InteriorPoint(1e-7), 1e-5),
    (ADMM(1e-3, 10_000), 2e-3),
]
ROUGH = ProjectedGradient(1e-2, 20_000), 2e-2  # slow on constraints, whatever the scales


class TestScales:
    @pytest.mark.parametrize(("solver", "rel"), SOLVERS, ids=repr)
    @pytest.mark.parametrize("n_classes", [2, 3])
    @pytest.mark.parametrize("formulation", FORMULATIONS)
    def test_a_scale_of_all_margins_is_one_of_the_penalty(
        self, solver, rel, n_classes, formulation
    ):
        """The hinge of 2 f with penalty beta is that of f with beta / 2."""
        scaled = patterned(ScaledHinge(2.0), formulation=formulation, n_classes=n_classes)
        plain = replace(scaled, loss=Hinge(), regularizer=GroupLasso(0.01))
        found, expected = solver.solve(scaled), InteriorPoint(1e-8).solve(plain)
        assert found.objective == pytest.approx(expected.objective, rel=rel)
        assert found.lower_bound == pytest.approx(expected.objective, rel=rel)

    def test_projected_gradient_takes_scales(self):
        solver, rel = ROUGH
        scaled = patterned(ScaledHinge(2.0))
        plain = replace(scaled, loss=Hinge(), regularizer=GroupLasso(0.01))
        found, expected = solver.solve(scaled), InteriorPoint(1e-8).solve(plain)
        assert found.objective == pytest.approx(expected.objective, rel=rel)
        assert found.lower_bound == pytest.approx(expected.objective, rel=rel)

    @pytest.mark.parametrize(
        ("solver", "rel", "formulation"),
        [
            *((*SOLVERS[1], formulation) for formulation in FORMULATIONS),
            pytest.param(*ROUGH, "soft", marks=pytest.mark.slow),
        ],
        ids=repr,
    )
    def test_scales_of_rivals(self, solver, rel, formulation):
        program = patterned(ScaledHinge((0.5, 2.0)), formulation=formulation, n_classes=3)
        found, expected = solver.solve(program), ConicSolver().solve(program)
        assert found.objective == pytest.approx(expected.objective, rel=rel)
        assert found.lower_bound == pytest.approx(expected.objective, rel=rel)

    def test_scales_of_rivals_that_share_slacks_are_not_for_admm(self):
        program = patterned(ScaledHinge((0.5, 2.0)), n_classes=3)
        assert "different scales" in ADMM().refusal(program)
        assert ADMM().refusal(patterned(ScaledHinge(2.0), n_classes=3)) is None
        assert ADMM().refusal(patterned(Pinball(0.9))) is None

    def test_slopes_are_shared_by_directions_of_one_length(self):
        assert patterned(Pinball(0.5)).margin_map.slope_of == (0, 0)
        program = patterned(Pinball(0.8))
        assert program.margin_map.slope_of == (0, 1)
        np.testing.assert_allclose(program.margin_map.directions[3], [[-0.2], [0.8]])
        np.testing.assert_allclose(program.margin_map.offsets, program.y[:, None] * [0.2, -0.8])

    @pytest.mark.parametrize("ball", [BALLS[1], BALLS[2], BALLS[5]], ids=name)
    def test_no_sampled_perturbation_lowers_a_margin_further(self, ball):
        program, rng, worst = patterned(Pinball(0.8), ball), np.random.default_rng(0), np.inf
        gates = program.X @ rng.normal(size=(3, 6)) >= 0.0
        program, U = replace(program, D=gates), rng.normal(size=(2, 1, 3, 6))
        margins = program.margins(xp, *U)
        hidden = np.hstack([U[0, 0], U[1, 0]])
        network = TwoLayerReLU(hidden, np.repeat([1.0, -1.0], 6)[:, None])
        directions, offsets, _ = program.margin_map
        for _ in range(300):
            outputs = network.predict(ball.sample(program.X[:, :2], rng) + program.X[:, :2])
            worst = np.minimum(worst, outputs * directions[:, :, 0] + offsets)
        assert np.all(worst >= margins - 1e-9)


class TestLimits:
    @pytest.mark.parametrize("limits", [1.0, (0.5, 2.0)])
    @pytest.mark.parametrize("formulation", FORMULATIONS)
    def test_the_bound_of_a_sum_of_hinges_closes_and_is_valid(self, limits, formulation):
        program = patterned(SumOfHinges(limits), formulation=formulation, n_classes=3)
        found = ConicSolver().solve(program)
        assert found.relative_gap < 1e-5
        for factor in (0.5, 1.0, 2.0, 100.0):
            margins = factor * found.multipliers.margins
            bound = program.lower_bound(found.multipliers._replace(margins=margins))
            assert bound <= found.objective * (1.0 + 1e-9)

    def test_without_limits_its_bound_would_be_wrong(self):
        program = patterned(SumOfHinges(1.0), n_classes=3, beta=100.0)
        point = multipliers_at_zero(program)
        heavy = point._replace(margins=10.0 * point.margins)
        zero = program.objective(xp, *np.zeros((2, *program.shape)))
        assert program.lower_bound(heavy) == pytest.approx(zero)
        assert replace(program, loss=SumOfHinges(np.inf)).lower_bound(heavy) > 2.0 * zero

    def test_the_largest_scale_is_that_of_the_tightest_limit(self):
        a = np.array([[0.1, 0.2], [0.0, 0.5]])
        assert SumOfHinges((1.0, 2.0)).largest_scale(a) == pytest.approx(4.0)
        assert SumOfHinges((1.0, np.inf)).largest_scale(a) == pytest.approx(10.0)
        assert SumOfHinges(np.inf).largest_scale(a) == np.inf
        assert Hinge().largest_scale(a) == pytest.approx(2.0)
        assert Hinge().largest_scale(0.0 * a) == np.inf

    def test_in_the_default_path(self):
        X, y = small_data(n_classes=3, n=24)
        y = (X[:, 0] > 0.0) + (X[:, 1] > 0.3)
        model = ConvexRobustClassifier(0.05, beta=0.01, loss=SumOfHinges(), random_state=0)
        model.fit(X[:, :-1], y)
        assert 0.0 <= model.gap_ <= 0.03 * 2.0
        assert model.score(X[:, :-1], y) > 0.8


class TestBadMargins:
    @pytest.mark.parametrize("scales", [0.0, -1.0, np.inf, (1.0, 2.0), "two", None, ()])
    def test_scales(self, scales):
        with pytest.raises(ValueError, match=r"loss\.margin_scales must be one positive number or"):
            small_program(ScaledHinge(scales), LINF)

    @pytest.mark.parametrize("limits", [0.0, (1.0, 2.0), "one", np.nan])
    def test_limits(self, limits):
        with pytest.raises(ValueError, match=r"loss\.margin_limits must be one positive number or"):
            small_program(SumOfHinges(limits), LINF)

    def test_limits_of_a_loss_of_the_smallest_margin(self):
        class Limited(Hinge):
            margin_limits = 0.5

        with pytest.raises(ValueError, match="margin_limits are for the kind 'other'"):
            small_program(Limited(), LINF)

    @pytest.mark.parametrize("quantile", [0.0, 1.0, -0.1, np.nan, "median", None])
    def test_quantile(self, quantile):
        with pytest.raises(ValueError, match="quantile must be a number strictly between 0 and 1"):
            Pinball(quantile)

    @pytest.mark.parametrize("delta", [0.0, -1.0, np.inf, np.nan, "1", None])
    def test_delta(self, delta):
        with pytest.raises(ValueError, match=r"delta must be a finite number > 0.*Squared\(\)"):
            Huber(delta)


class TestPinball:
    @pytest.mark.parametrize("ball", [NOMINAL, *BALLS[:3]], ids=name)
    def test_its_mirror_image_is_the_other_quantile(self, ball):
        program = patterned(Pinball(0.8), ball)
        mirrored = replace(program, y=-program.y, loss=Pinball(1.0 - 0.8))
        first, second = (InteriorPoint(1e-8).solve(p) for p in (program, mirrored))
        assert first.objective == pytest.approx(second.objective, rel=1e-6)

    def test_the_median_is_half_the_absolute_loss(self):
        program = patterned(Pinball(0.5), beta=0.01)
        absolute = replace(program, loss=Absolute(), regularizer=GroupLasso(0.02))
        first, second = (InteriorPoint(1e-8).solve(p) for p in (program, absolute))
        assert first.objective == pytest.approx(second.objective / 2.0, rel=1e-6)

    @pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
    def test_one_pattern_and_no_penalty_is_linear_quantile_regression(self, quantile):
        rng = np.random.default_rng(0)
        X = rng.normal(size=(60, 2))
        y = X @ [1.0, -0.5] + 0.3 + (1.0 + 0.5 * np.abs(X[:, 0])) * rng.normal(size=60)
        linear = QuantileRegressor(quantile=quantile, alpha=0.0).fit(X, y)
        residual = y - linear.predict(X)
        expected = np.mean(np.maximum(quantile * residual, (quantile - 1.0) * residual))
        design = np.hstack([X, np.ones((60, 1))])
        program = ConvexProgram(
            *(design, y, np.ones((60, 1)), Pinball(quantile), GroupLasso(1e-7), NOMINAL, "hard")
        )
        found = InteriorPoint(1e-7).solve(program)
        assert found.objective == pytest.approx(expected, rel=1e-4)

    def test_attacks_raise_the_loss_and_not_the_residual(self):
        rng = np.random.default_rng(0)
        network = TwoLayerReLU(rng.normal(size=(3, 5)), rng.normal(size=(5, 1)))
        X, y, ball = rng.normal(size=(40, 2)), rng.normal(size=40), LpBall(np.inf, 0.5)
        loss = Pinball(0.95)
        objective = worst_margin_objective(network, y, task="regression", scales=loss.margin_scales)

        def value(X):
            outputs = network.predict(X)[:, 0]
            return loss.worst_case(xp, outputs, outputs, y)

        np.testing.assert_allclose(objective(X)[0], value(X))
        h = 1e-6 * rng.normal(size=X.shape)
        change = np.sum(objective(X)[1] * h, axis=1)
        np.testing.assert_allclose(objective(X + h)[0] - objective(X)[0], change, atol=1e-9)
        residual = worst_margin_objective(network, y, task="regression")
        options = {"n_restarts": 5, "random_state": 0}
        for_loss, for_residual = (pgd(o, X, ball, **options) for o in (objective, residual))
        assert value(for_loss).mean() > value(for_residual).mean()


class TestLargestBeta:
    @pytest.mark.parametrize("loss", [Huber(0.3), Pinball(0.8)], ids=name)
    @pytest.mark.parametrize("ball", [NOMINAL, LINF], ids=name)
    @pytest.mark.parametrize("formulation", FORMULATIONS)
    def test_the_zero_network_is_optimal_from_there_on(self, loss, ball, formulation):
        program = patterned(loss, ball, formulation)
        beta = largest_beta(program)
        at, below = (
            ConicSolver().solve(replace(program, regularizer=GroupLasso(share * beta)))
            for share in (1.0, 0.9)
        )
        assert not at.V.any()
        assert not at.W.any()
        if ball is NOMINAL:  # differentiable there: no target is 0
            assert below.V.any() or below.W.any()


class TestLocation:
    @pytest.mark.parametrize("loss", [Huber(0.5), Huber(100.0), Pinball(0.9), Pinball(0.2)])
    def test_it_is_the_best_constant(self, loss):
        rng = np.random.default_rng(0)
        y, weight = rng.standard_t(2, size=30), rng.uniform(size=30)
        weight[:3] = 0.0
        constants = np.append(loss.location(y, weight), np.linspace(y.min(), y.max(), 5001))
        risks = [weight @ loss.worst_case(xp, c + 0.0 * y, c + 0.0 * y, y) for c in constants]
        assert risks[0] <= min(risks) * (1.0 + 1e-9)

    def test_of_other_losses_it_is_the_mean(self):
        y, weight = np.array([0.0, 1.0, 5.0]), np.array([1.0, 2.0, 1.0])
        for loss in (Squared(), Absolute()):
            assert loss.location(y, weight) == 1.75
        assert Huber(100.0).location(y, weight) == pytest.approx(1.75)


class TestEstimators:
    @pytest.fixture
    def data(self):
        rng = np.random.default_rng(0)
        X = rng.uniform(-1.0, 1.0, size=(150, 1))
        return X, np.abs(X[:, 0]) + 0.2 * rng.exponential(size=150)

    @pytest.mark.parametrize("epsilon", [0.0, 0.02])
    def test_quantiles_cover_their_share(self, data, epsilon):
        X, y = data
        models = [
            ConvexRobustRegressor(epsilon, beta=1e-3, loss=Pinball(q), random_state=0).fit(X, y)
            for q in (0.1, 0.9)
        ]
        low, high = (model.predict(X) for model in models)
        assert np.mean(y < low) < 0.2 < 0.8 < np.mean(y < high)
        if epsilon == 0.0:
            assert np.mean(y < low) == pytest.approx(0.1, abs=0.04)
            assert np.mean(y < high) == pytest.approx(0.9, abs=0.04)
        for model in models:
            assert -1e-9 <= model.gap_ <= 2e-2 * model.solution_.objective + 2e-3

    def test_the_output_bias_is_the_quantile(self, data):
        X, y = data
        model = ConvexRobustRegressor(0.02, loss=Pinball(0.9), beta=1e-2, random_state=0)
        offset = model.fit(X, y).network_.offset
        assert offset[0] == pytest.approx(np.quantile(y, 0.9, method="inverted_cdf"))

    def test_huber_withstands_outliers(self, data):
        X, y = data
        spoilt = y.copy()
        spoilt[::15] += 100.0
        robust, squared = (
            ConvexRobustRegressor(0.02, beta=1e-3, loss=loss, random_state=0).fit(X, spoilt)
            for loss in (Huber(0.3), Squared())
        )
        assert np.abs(robust.predict(X) - y).mean() < 0.3
        assert np.abs(squared.predict(X) - y).mean() > 3.0

    @pytest.mark.parametrize("loss", [Huber(0.3), Pinball(0.8)], ids=name)
    def test_working_sets_reach_the_optimum(self, loss):
        program = small_program(loss, LINF, n=10)
        found, expected = WorkingSet(1e-3, width=8).solve(program), ConicSolver().solve(program)
        assert found.objective == pytest.approx(expected.objective, rel=2e-3)
        assert found.lower_bound <= expected.objective * (1.0 + 1e-6)
