"""Adversarial training to global optimality, against closed forms, brute force and its own net."""

from dataclasses import replace
from functools import cache

import cvxpy as cp
import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from convexrobust.attacks import pgd, worst_margin_objective
from convexrobust.backends import cvxpy as cvxpy_backend
from convexrobust.backends import numpy as xp
from convexrobust.certificates import exact_objective
from convexrobust.exchange import Exchange, ExchangeSolution, method
from convexrobust.exchange.cells import dual_cones, price_cells
from convexrobust.exchange.conflicts import conflicts
from convexrobust.exchange.copies import Copies
from convexrobust.exchange.inner_maximum import pgd_attack
from convexrobust.losses import (
    Absolute,
    EpsilonInsensitive,
    Hinge,
    Huber,
    Logistic,
    Pinball,
    Squared,
    SquaredHinge,
)
from convexrobust.network import TwoLayerReLU
from convexrobust.patterns import enumerate_patterns, patterns_of, sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import ConicSolver, InteriorPoint
from tests.cases import BALLS, name, small_data, small_program

LINF = LpBall(np.inf, 0.15)


def few(loss=None, ball=LINF, n_classes=2, n=7, **options):
    """Return a small program with a few patterns to begin with."""
    loss = Hinge() if loss is None else loss
    X, _ = small_data(loss.task, n_classes, n)
    D = sample_patterns(X, 6, random_state=0)
    return small_program(loss, ball, n_classes=n_classes, D=D, n=n, **options)


@cache
def optimum(loss=None):
    """Return the solution of `few`, shared by the tests that compare with it."""
    return Exchange().solve(few(loss))


def one_feature(epsilon=0.3):
    """Return a program with one feature and no intercept."""
    X, y = np.array([[-2.0], [-1.0], [0.5], [1.5]]), np.array([-1, -1, 1, 1])
    ball = LpBall(np.inf, epsilon)
    return ConvexProgram(X, y, np.ones((4, 1)), Hinge(), GroupLasso(0.05), ball, intercept=False)


def test_one_feature_without_intercept_by_brute_force():
    """Without intercept in one feature every network is a (x)_+ + b (-x)_+, penalty |a| + |b|."""
    program = one_feature()
    found = Exchange(tol=1e-5).solve(program)
    assert found.status == "optimal"
    a, b = np.meshgrid(np.linspace(-2, 6, 801), np.linspace(-6, 2, 801))
    losses = [
        np.max(
            [1 - y * (a * max(z, 0) + b * max(-z, 0)) for z in np.linspace(x - 0.3, x + 0.3, 13)],
            axis=0,
        )
        for x, y in zip(program.X[:, 0], program.y, strict=True)
    ]
    objective = np.mean(np.maximum(losses, 0), axis=0) + 0.05 * (abs(a) + abs(b))
    assert found.objective == pytest.approx(objective.min(), rel=3e-3)
    assert found.lower_bound <= objective.min() * (1 + 1e-9)


CASES = [
    (Hinge(), LINF, 2),
    (SquaredHinge(), BALLS[0], 2),
    (Logistic(), BALLS[1], 2),
    (Squared(), BALLS[5], 2),
    (Absolute(), LINF, 2),
    (EpsilonInsensitive(0.05), BALLS[3], 2),
    (Pinball(0.8), LINF, 2),
    (Huber(0.3), BALLS[1], 2),
    (Hinge(), LINF, 3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "ball", "n_classes"), CASES, ids=name)
def test_bracket_closes_around_the_exact_objective(loss, ball, n_classes):
    program = few(loss, ball, n_classes)
    found = Exchange().solve(program)
    assert isinstance(found, ExchangeSolution)
    assert (found.status, found.lower_bound_scope) == ("optimal", "all patterns")
    assert -1e-6 <= found.relative_gap <= 1e-3
    lower, upper = exact_objective(program, found.network)
    assert lower * (1 - 1e-6) <= found.attacked_objective <= found.objective * (1 + 1e-9)
    assert found.objective == pytest.approx(upper, rel=1e-5)
    V, W = TwoLayerReLU.from_solution(found).output.T, found.network.output.T
    np.testing.assert_allclose(V, W)


def test_bounds_of_all_rounds_lie_around_the_optimum():
    """Every lower bound is below every upper bound, the soft program's optimum among them."""
    program, found = few(), optimum()
    bounds = [r.lower_bound for r in found.rounds]
    values = [r.objective for r in found.rounds]
    soft = ConicSolver().solve(replace(program, D=enumerate_patterns(program.X)))
    assert max(bounds) <= min(*values, soft.objective) * (1 + 1e-6)
    assert found.lower_bound == max(bounds)
    assert found.objective == min(values)
    for r in found.rounds:
        assert r.attacked_objective <= r.objective * (1 + 1e-9)
        assert r.restricted_objective <= r.attacked_objective * (1 + 1e-5)
    assert [row.objective for row in found.history] == values


def test_no_network_is_below_the_lower_bound():
    program, found = few(), optimum()
    rng = np.random.default_rng(0)
    loss = worst_margin_objective(found.network, program.y)
    assert program.objective(xp, *np.zeros((2, *program.shape))) >= found.lower_bound
    for _ in range(20):
        moved = replace(
            found.network,
            hidden=found.network.hidden + 0.01 * rng.normal(size=found.network.hidden.shape),
        )
        assert exact_objective(program, moved)[1] >= found.lower_bound
    points = pgd(loss, program.X[:, :2], program.perturbation)
    losses = np.maximum(1 - program.y * found.network.predict(points)[:, 0], 0)
    length = np.linalg.norm(found.network.hidden, axis=0) * np.abs(found.network.output[:, 0])
    assert losses.mean() + 0.02 * length.sum() <= found.objective * (1 + 1e-9)


def test_without_perturbations_it_is_the_nominal_program():
    program = few(ball=LpBall(2, 0.0))
    found = Exchange().solve(program)
    nominal = ConicSolver().solve(replace(program, D=enumerate_patterns(program.X)))
    assert found.objective == pytest.approx(nominal.objective, rel=1e-3)
    assert found.lower_bound <= nominal.objective * (1 + 1e-6)
    assert len(found.restricted.X) == len(program.X)


def test_large_beta_gives_the_zero_network():
    found = Exchange().solve(few(beta=5.0))
    assert (found.status, found.network.n_neurons) == ("optimal", 0)
    assert found.objective == pytest.approx(1.0)
    assert found.V.shape == (1, 3, 0)


def test_weights_are_repetitions():
    program = few(n=6)
    weight = np.array([1.0, 3.0, 1.0, 2.0, 1.0, 1.0])
    repeated = np.repeat(np.arange(6), weight.astype(int))
    parts = {key: getattr(program, key)[repeated] for key in ("X", "y", "D")}
    values = [
        Exchange(tol=1e-4).solve(p)
        for p in (replace(program, sample_weight=weight), replace(program, **parts))
    ]
    assert values[0].objective == pytest.approx(values[1].objective, rel=3e-4)


def test_copies_lie_in_the_sets_and_cells():
    program = few(ball=BALLS[5])
    found = Exchange().solve(program)
    copies = found.restricted
    delta = copies.X - program.X[copies.copy_of]
    assert np.abs(delta[:, :2]).max() <= 0.15 * (1 + 1e-9)
    assert np.all(delta[:, 2] == 0)
    assert copies.X[:, :2].min() >= -1.3
    assert copies.X[:, :2].max() <= 1.2
    assert np.bincount(copies.copy_of).min() >= 1
    assert np.unique(copies.D, axis=1).shape == copies.D.shape


@pytest.mark.parametrize("loss", [Hinge(), Squared()], ids=name)
@pytest.mark.parametrize("patterns", ["fixed", "grow"])
@pytest.mark.parametrize("inner", ["exact", "attack"])
def test_given_patterns_end_where_no_worse_point_is_found(loss, patterns, inner):
    program = few(loss)
    found = Exchange(patterns=patterns, inner=inner).solve(program)
    assert (found.status, found.lower_bound_scope) == ("no worse point", "patterns")
    assert found.lower_bound <= found.objective
    last = found.rounds[-1]
    assert last.attacked_objective <= last.restricted_objective * (1 + 1.1e-3)
    lower, upper = exact_objective(program, found.network)
    assert found.attacked_objective <= upper * (1 + 1e-6)
    assert lower <= found.objective * (1 + 1e-6)
    best = optimum(loss)
    assert found.objective >= best.lower_bound


def test_growing_patterns_are_better_than_fixed_ones():
    program = few()
    fixed, grow = (Exchange(patterns=p).solve(program) for p in ("fixed", "grow"))
    every = optimum()
    assert every.objective <= grow.objective * (1 + 1e-3)
    assert grow.objective <= fixed.objective * (1 + 1e-3)


def test_fixed_patterns_are_those_of_fixed_gates():
    program = few()
    found = Exchange(patterns="fixed").solve(program)
    centres = np.array(
        [np.flatnonzero((found.restricted.X == x).all(axis=1))[0] for x in program.X]
    )
    kept = {column.tobytes() for column in found.restricted.D[centres].T}
    assert kept <= {column.tobytes() for column in program.D.T}


def test_attack_with_all_patterns_has_a_valid_bracket():
    program = few()
    found = Exchange(inner="attack").solve(program)
    exact = optimum()
    assert found.lower_bound_scope == "all patterns"
    assert found.lower_bound <= exact.objective
    assert found.attacked_objective == pytest.approx(exact.objective, rel=3e-3)
    assert exact_objective(program, found.network)[0] <= found.objective * (1 + 1e-6)


def test_start_brings_its_worst_points():
    program = few()
    first = optimum()
    again = Exchange().solve(program, start=first)
    assert again.status == "optimal"
    assert again.n_iter <= first.n_iter
    assert again.rounds[0].n_copies > len(program.X)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_network_is_improved_on():
    """Its neurons and worst points come first, and mixtures with it are tried."""
    program = few(n=12)
    rng = np.random.default_rng(0)
    network = TwoLayerReLU(rng.normal(size=(3, 5)), 0.2 * rng.normal(size=(5, 1)))
    given = pgd_attack(program, network, rng)
    options = {"inner": "attack", "patterns": "grow"}
    found = Exchange(network=network, max_rounds=1, **options).solve(program)
    assert found.attacked_objective <= given.attacked_objective
    assert found.rounds[0].n_copies > len(program.X)
    better = Exchange(network=network, max_rounds=4, **options).solve(program)
    assert better.attacked_objective < 0.9 * given.attacked_objective
    with pytest.raises(ValueError, match=r"network has .* \(1, 1, True\), but the program asks"):
        Exchange(network=TwoLayerReLU(np.ones((2, 1)), np.ones((1, 1)))).solve(program)


def test_the_round_limit_warns_and_keeps_valid_bounds():
    program = few()
    with pytest.warns(ConvergenceWarning, match="round limit"):
        early = Exchange(max_rounds=2).solve(program)
    best = optimum()
    assert early.lower_bound <= best.objective
    assert early.objective >= best.lower_bound
    with pytest.warns(ConvergenceWarning, match="time limit"):
        assert Exchange(time_limit=0.0).solve(program).n_iter == 1


class TestPricing:
    """The dual point of few patterns on all cells, against the program with all cells."""

    @pytest.mark.parametrize(("loss", "n_classes"), [(Hinge(), 2), (Squared(), 2), (Logistic(), 3)])
    def test_bound_is_that_of_the_program_with_all_patterns(self, loss, n_classes):
        program = few(loss, LpBall(2, 0.0), n_classes)
        whole = ConicSolver().solve(
            replace(program, D=enumerate_patterns(program.X), formulation="hard")
        )
        priced = price_cells(program, whole.multipliers.margins, 1000)
        assert priced.lower_bound == pytest.approx(whole.objective, rel=1e-4)
        assert priced.lower_bound <= whole.objective
        rng = np.random.default_rng(0)
        for _ in range(5):
            margins = whole.multipliers.margins * rng.uniform(0, 2, (len(program.X), 1))
            assert price_cells(program, margins, 1000).lower_bound <= whole.objective

    def test_column_generation_reaches_the_optimum_over_all_patterns(self):
        program = replace(few(Squared(), LpBall(2, 0.0)), formulation="hard")
        whole = ConicSolver().solve(replace(program, D=enumerate_patterns(program.X)))
        for _ in range(10):
            solved = ConicSolver().solve(program)
            priced = price_cells(program, solved.multipliers.margins, 1000)
            if priced.D.shape[1] == 0:
                break
            D = np.unique(np.hstack([program.D, priced.D]), axis=1)
            assert D.shape[1] > program.D.shape[1]
            program = replace(program, D=D)
        assert solved.objective == pytest.approx(whole.objective, rel=1e-5)

    def test_dual_cones_are_projections(self):
        """Multipliers that the cheap bound leaves give the exact projection of -G on the cones."""
        rng = np.random.default_rng(0)
        X = rng.normal(size=(8, 3))
        cells = enumerate_patterns(X)
        G = rng.normal(size=(3, cells.shape[1]))
        B, U = dual_cones(G, X, cells, GroupLasso(1e-6))
        S = 2.0 * cells - 1.0
        assert B.min() >= 0
        np.testing.assert_allclose(-U, G - X.T @ (S * B), atol=1e-10)
        open_cells = np.linalg.norm(U, axis=0) > 1e-6
        assert open_cells.any()
        assert (S * (X @ U))[:, open_cells].min() >= -1e-8
        np.testing.assert_allclose(np.sum(U * -G, axis=0), np.sum(U * U, axis=0), atol=1e-5)

    def test_too_many_cells(self):
        with pytest.raises(ValueError, match="patterns='grow'"):
            Exchange(most_cells=10).solve(few())


def test_gates_have_the_patterns_they_are_made_for():
    X, _ = small_data()
    program = small_program(Hinge(), LINF)
    np.testing.assert_array_equal(patterns_of(X, Copies(program).gates), program.D)


class TestBadInput:
    def test_options(self):
        with pytest.raises(ValueError, match="inner must be one of"):
            Exchange(inner="guess")
        with pytest.raises(ValueError, match="patterns must be one of"):
            Exchange(patterns="some")
        with pytest.raises(ValueError, match="n_copies=0"):
            Exchange(n_copies=0)

    def test_a_program_with_copies(self):
        program = few()
        with pytest.raises(ValueError, match="copy_of already"):
            Exchange().solve(replace(program, copy_of=np.arange(7)))

    def test_a_solver_without_multipliers(self):
        class Silent(ConicSolver):
            def solve(self, program, start=None):
                return replace(super().solve(program, start), multipliers=None)

        with pytest.raises(ValueError, match="needs multipliers"):
            Exchange(solver=Silent()).solve(few())

    def test_a_solver_without_copies_is_refused_before_anything_is_trained(self, monkeypatch):
        monkeypatch.setattr(method, "trained_network", lambda *_: pytest.fail("trained"))
        with pytest.raises(ValueError, match="InteriorPoint takes no program with copy_of"):
            Exchange(solver=InteriorPoint(), patterns="grow").solve(few())


def test_ctrl_c_keeps_the_best_network(monkeypatch):
    program, calls = few(), []

    def pgd_once(*args):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return pgd_attack(*args)

    monkeypatch.setattr(method, "pgd_attack", pgd_once)
    with pytest.warns(ConvergenceWarning, match="'interrupted'"):
        found = Exchange(inner="attack").solve(program)
    assert found.n_iter == 1
    assert found.lower_bound <= optimum().objective <= found.objective * (1 + 1e-9)


def test_ctrl_c_in_the_first_round_keeps_the_network_given(monkeypatch):
    program = few()
    network = optimum().network

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(method._Run, "_round", interrupt)
    with pytest.warns(ConvergenceWarning, match="'interrupted'"):
        found = Exchange(network=network).solve(program)
    assert found.objective == pytest.approx(optimum().objective)
    assert found.lower_bound <= optimum().lower_bound
    with pytest.warns(ConvergenceWarning, match="'interrupted'"):
        assert Exchange().solve(program).network.n_neurons == 0


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_bound_of_fixed_patterns_holds_for_the_network():
    program = few(n=12)
    found = Exchange(patterns="fixed", inner="attack", max_rounds=4).solve(program)
    assert found.lower_bound <= exact_objective(program, found.network)[1]


def test_a_network_with_an_offset_is_refused():
    network = replace(optimum().network, offset=np.ones(1))
    with pytest.raises(ValueError, match="network has an output offset"):
        Exchange(network=network).solve(few())


def test_a_row_of_zeros():
    X, y = np.array([[0.0, 0.0], [1.0, 0.5], [-1.0, 0.3], [0.2, -1.0]]), np.array([1, 1, -1, -1])
    D = enumerate_patterns(X[1:])
    D = np.vstack([np.ones(D.shape[1], dtype=np.int8), D])
    ball = LpBall(np.inf, 0.1)
    program = ConvexProgram(X, y, D, Hinge(), GroupLasso(0.01), ball, intercept=False)
    found = Exchange().solve(program)
    assert found.status == "optimal"
    assert found.relative_gap <= 1e-3


def all_at_odds(loss, ball, n_classes=2):
    """Return a program whose sets all meet, with two samples of each target."""
    X, _ = small_data(n=6)
    y = np.tile([-1.0, 0.5, 1.5] if loss.task == "regression" else np.arange(3), 2)
    if n_classes == 2 and loss.task == "classification":
        y = np.tile([-1, 1], 3)
    D = sample_patterns(X, 4, random_state=0)
    parts = (GroupLasso(1e-3), ball)
    return ConvexProgram(X, y, D, loss, *parts, n_outputs=n_classes if n_classes > 2 else 1)


@pytest.mark.parametrize("inner", ["exact", "attack"])
@pytest.mark.parametrize("patterns", ["all", "grow", "fixed"])
@pytest.mark.parametrize("p", [1, 2, np.inf])
def test_where_no_network_can_help_it_stops_before_training(monkeypatch, p, patterns, inner):
    """At the middle of two points of different class one is wrong: two losses of at least 2."""
    monkeypatch.setattr(method, "trained_network", lambda *_: pytest.fail("trained"))
    program = all_at_odds(Hinge(), LpBall(p, 5.0))
    found = Exchange(patterns=patterns, inner=inner).solve(program)
    assert (found.status, found.n_iter, found.network.n_neurons) == ("optimal", 0, 0)
    assert found.lower_bound_scope == "all patterns"
    assert (found.objective, found.lower_bound) == pytest.approx((1.0, 1.0))
    assert found.lower_bound <= found.objective


class TestConflicts:
    """Points of two samples with different targets, and what they cost."""

    @pytest.mark.parametrize(
        ("loss", "n_classes"),
        [(Hinge(), 2), (Squared(), 2), (Logistic(), 3), (Pinball(0.9), 2), (Huber(0.3), 2)],
    )
    @pytest.mark.parametrize("weight", [np.ones(6), np.array([1.0, 3.0, 2.0, 1.0, 1.0, 0.0])])
    def test_cost_is_below_the_least_loss_of_any_outputs(self, loss, n_classes, weight):
        """Outputs that are free at every point: no model has a smaller loss at these points."""
        ball = LpBall(np.inf, np.array([0.6, 0.5]), bounds=(-1.5, 1.5))
        program = replace(all_at_odds(loss, ball, n_classes), sample_weight=weight)
        points, samples, cost = conflicts(program)
        assert (np.abs(points - program.X[samples]) - [0.6, 0.5, 0.0]).max() <= 1e-12
        copies = Copies(program)
        copies.add_points(points, samples, both_sides=False)
        nominal = copies.program(program, "soft")
        at, same = np.unique(nominal.X, axis=0, return_inverse=True)
        outputs = cp.Variable((len(at), program.n_outputs))[same.ravel()]
        margins = cp.hstack(
            [
                cp.sum(cp.multiply(nominal.margin_map.directions[:, e], outputs), axis=1)[:, None]
                + nominal.margin_map.offsets[:, e : e + 1]
                for e in range(nominal.margin_map.offsets.shape[1])
            ]
        )
        least = cp.Problem(cp.Minimize(nominal.mean_loss(cvxpy_backend, margins))).solve()
        assert 0.0 < cost <= least * (1.0 + 1e-6)
        if isinstance(loss, Hinge) and len(np.unique(weight)) == 1:
            assert cost == pytest.approx(least, rel=1e-6)

    def test_cost_of_sets_that_meet_in_pairs(self):
        """Four points on a line, the inner two in conflict: they lose 2 of 4, others nothing."""
        X, y = np.array([[-3.0], [-0.5], [0.4], [3.0]]), np.array([-1, 1, -1, 1])
        D = np.ones((4, 1))
        for epsilon, cost in ((0.44, 0.0), (0.46, 0.5), (3.0, 1.0)):
            ball = LpBall(np.inf, epsilon)
            program = ConvexProgram(X, y, D, Hinge(), GroupLasso(0.1), ball, intercept=False)
            assert conflicts(program)[2] == pytest.approx(cost)

    def test_a_fixed_feature_that_differs_is_no_conflict(self):
        X, y = np.array([[0.0, 0.0, 1.0], [0.1, 1.0, 1.0]]), np.array([-1, 1])
        for epsilon, n_points in (([1.0, 0.0], 0), ([1.0, 0.51], 4)):
            ball = LpBall(2, np.array(epsilon))
            program = ConvexProgram(X, y, np.ones((2, 1)), Hinge(), GroupLasso(0.1), ball)
            assert len(conflicts(program)[0]) == n_points


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("inner", ["exact", "attack"])
def test_never_worse_than_the_zero_network(inner):
    """Stopped in the first round, whose network fits the centres and no large ball around them."""
    program = few(ball=LpBall(np.inf, 20.0))
    found = Exchange(inner=inner, patterns="fixed", max_rounds=1).solve(program)
    assert found.objective == pytest.approx(1.0)
    assert found.lower_bound <= found.objective
