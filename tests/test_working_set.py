from dataclasses import replace

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from convexrobust.backends import numpy as xp
from convexrobust.certificates import exact_objective
from convexrobust.losses import Hinge, Logistic, Squared, SquaredHinge
from convexrobust.network import TwoLayerReLU
from convexrobust.patterns import enumerate_patterns, sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import (
    ADMM,
    InteriorPoint,
    WorkingSet,
    monitor,
    train_certified,
)
from convexrobust.solvers.residuals import multipliers_at_zero, multipliers_from_margins
from convexrobust.solvers.working_set import solver as rounds
from convexrobust.solvers.working_set.constant import best_constant
from tests.cases import BALLS, LOSSES, MARGIN_LOSSES, name, small_data, small_program


def gaussian_program(loss, epsilon, n=14, d=4, seed=0, beta=0.02):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    y = rng.normal(size=n) if loss.task == "regression" else np.where(rng.normal(size=n) > 0, 1, -1)
    D = sample_patterns(X, 5, random_state=seed)
    return ConvexProgram(X, y, D, loss, GroupLasso(beta), LpBall(np.inf, epsilon), intercept=False)


@pytest.mark.parametrize("loss", [Hinge(), Squared()], ids=name)
@pytest.mark.parametrize("width", [0, 16])
def test_reaches_the_optimum_of_all_patterns(loss, width):
    program = gaussian_program(loss, 0.0)
    everything = replace(program, D=enumerate_patterns(program.X))
    optimum = InteriorPoint().solve(everything).objective
    solver = WorkingSet(1e-6, solver=InteriorPoint(), width=width, max_rounds=20)
    solution = solver.solve(program)
    assert solution.objective == pytest.approx(optimum, rel=1e-3)
    assert solution.D.shape[1] < everything.D.shape[1] / 3
    assert solution.lower_bound_scope == "all patterns, not refuted"


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_no_worse_than_the_network_that_seeds_it(epsilon):
    program = gaussian_program(SquaredHinge(), epsilon, n=40, d=5)
    network = train_certified(program, width=16, n_steps=150)
    V, W, D = network.to_convex(program.X, program.D)
    seed = replace(program, D=D).solution(V, W).objective
    solution = WorkingSet(solver=InteriorPoint(), network=network).solve(program)
    assert solution.objective < seed
    found = replace(program, D=solution.D)
    again = found.solution(solution.V, solution.W).objective
    assert again == pytest.approx(solution.objective, rel=1e-12)
    assert found.lower_bound(solution.multipliers) == pytest.approx(solution.lower_bound)


def test_a_round_cut_off_leaves_the_bound_of_the_one_before(monkeypatch):
    program = gaussian_program(Hinge(), 0.1, n=30, d=4)
    solver = InteriorPoint(1e-6)
    whole = WorkingSet(solver=solver, max_rounds=1).solve(program)
    rounds = []

    def cut_off(self, *arguments, **options):
        rounds.append(None)
        self.time_limit = 0.0 if len(rounds) > 1 else None
        return solve(self, *arguments, **options)

    solve = InteriorPoint.solve
    monkeypatch.setattr(InteriorPoint, "solve", cut_off)
    found = WorkingSet(solver=solver, max_rounds=2).solve(program)
    assert len(rounds) > 1
    assert found.objective <= whole.objective * (1 + 1e-12)
    assert found.gap <= whole.gap * (1 + 1e-9)


@pytest.mark.parametrize("loss", [Hinge(), Logistic(), Squared()], ids=name)
@pytest.mark.parametrize("p", [1, 2, np.inf])
def test_a_zero_network_is_proven_best_where_all_points_can_be_moved_to_zero(loss, p):
    program = gaussian_program(loss, 0.0, n=20, d=60)
    program = replace(program, perturbation=LpBall(p, 100.0))
    zero = program.solution(*np.zeros((2, *program.shape)))
    point = multipliers_at_zero(program)
    assert program.lower_bound(point) == pytest.approx(zero.objective, rel=1e-9)
    solution = WorkingSet(width=8).solve(program)
    assert solution.status == "optimal"
    assert solution.gap <= 1e-2 * zero.objective


def classes_out_of_balance(ball, loss, n_outputs=1, **options):
    n = 20
    y = np.where(np.arange(n) < 8, -1, 1) if n_outputs == 1 else np.arange(n) % 4 % 3  # 10, 5, 5
    X = np.hstack([np.random.default_rng(0).normal(size=(n, 100)), np.ones((n, 1))])
    D = sample_patterns(X, 8, random_state=0)
    regularizer = GroupLasso(1e-3)
    return ConvexProgram(X, y, D, loss, regularizer, ball, n_outputs=n_outputs, **options)


@pytest.mark.parametrize("loss", MARGIN_LOSSES, ids=name)
@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("formulation", ["soft", "one-sided", "hard"])
def test_a_constant_network_is_proven_best_under_large_perturbations(loss, n_outputs, formulation):
    program = classes_out_of_balance(
        LpBall(np.inf, 50.0), loss, n_outputs=n_outputs, formulation=formulation
    )
    solution = WorkingSet().solve(program)
    assert solution.status == "optimal"
    assert solution.gap <= 1e-6
    if formulation == "soft":  # else the search takes patterns for better whose residual is 0
        assert solution.lower_bound_scope == "all patterns, not refuted"
    constant = (solution.V - solution.W).sum(axis=2)
    assert np.all(constant[:, :-1] == 0.0)
    larger_class = constant[0, -1] > 0.0 if n_outputs == 1 else np.argmax(constant[:, -1]) == 0
    assert larger_class


def test_a_constant_network_of_a_much_larger_class():
    """Far better than the network of zeros, and still not what solvers find."""
    rng = np.random.default_rng(0)
    X, y = np.hstack([rng.normal(size=(100, 60)), np.ones((100, 1))]), np.full(100, 1)
    y[:5] = -1
    D = sample_patterns(X, 8, random_state=0)
    program = ConvexProgram(X, y, D, Hinge(), GroupLasso(1e-3), LpBall(np.inf, 4.0))
    solution = WorkingSet().solve(program)
    assert solution.status == "optimal"
    assert solution.objective == pytest.approx(0.101, rel=1e-6)


@pytest.mark.parametrize("width", [0, 16])
@pytest.mark.parametrize("tol", [1e-2, 1e-8])
def test_nothing_is_solved_where_a_constant_network_is_proven_best(width, tol, monkeypatch):
    monkeypatch.setattr(ADMM, "solve", lambda *_: pytest.fail("a solver is asked"))
    program = classes_out_of_balance(LpBall(2, 500.0), Hinge())
    solution = WorkingSet(tol, width=width).solve(program)
    assert solution.status == "optimal"
    assert solution.solver == "WorkingSet(best_constant)"
    assert solution.gap <= tol


def test_a_point_worse_than_the_best_drops_no_patterns(monkeypatch):
    """It does not tell which of them matter."""
    program = gaussian_program(Hinge(), 0.1, n=30, d=4)
    solve, seen = InteriorPoint.solve, []

    def first_well_then_not(self, program, start=None):
        seen.append(program.D.shape[1])
        found = solve(self, program, start)
        zero = program.solution(*np.zeros((2, *program.shape)))
        names = ("V", "W", "objective") if len(seen) > 1 else ()
        return replace(found, **{part: getattr(zero, part) for part in names})

    def one_more(program, multipliers, **options):
        new = enumerate_patterns(program.X).T
        return np.array([c for c in new if not (program.D.T == c).all(axis=1).any()])[:1].T

    monkeypatch.setattr(InteriorPoint, "solve", first_well_then_not)
    monkeypatch.setattr(rounds, "price", one_more)
    WorkingSet(solver=InteriorPoint(), width=8, max_rounds=3).solve(program)
    assert len(seen) > 2
    assert seen[2] > seen[1]


@pytest.mark.parametrize("n_new", [0, 3])
def test_starts_small_where_a_solver_is_lost_among_many_patterns(n_new, monkeypatch):
    """It keeps the patterns of the best point, a constant network, and those that pricing found."""
    program = classes_out_of_balance(LpBall(np.inf, 1.0), Hinge())
    constant, solve, sizes = best_constant(program), InteriorPoint.solve, []

    def lost_among_many(self, program, start=None):
        found = solve(self, program, start)
        sizes.append(program.D.shape[1])
        if len(sizes) > 2:
            return found
        zero = program.solution(*np.zeros((2, *program.shape)))
        return replace(found, V=zero.V, W=zero.W, objective=zero.objective, lower_bound=0.0)

    def some(program, multipliers, **options):
        return 1 - program.D[:, :n_new]

    monkeypatch.setattr(InteriorPoint, "solve", lost_among_many)
    monkeypatch.setattr(rounds, "price", some)
    monkeypatch.setattr(rounds, "best_constant", lambda program: constant)
    monkeypatch.setattr(rounds, "_CONSTANT_GAP", -1.0)
    half = program.solution(*constant.weights(program) / 2.0)  # between zeros and the constant
    solution = WorkingSet(solver=InteriorPoint(), max_rounds=1).solve(program, half)
    assert len(sizes) == 3
    assert solution.D.shape[1] == sizes[2] == 1 + n_new < sizes[1]
    assert solution.status == "optimal"
    assert solution.lower_bound_scope == "patterns"  # of those that left nothing is known
    found = replace(program, D=solution.D)
    assert found.lower_bound(solution.multipliers) == pytest.approx(solution.lower_bound)


@pytest.mark.parametrize("formulation", ["soft", "hard"])
def test_a_small_start_has_the_pattern_of_constant_networks(formulation, monkeypatch):
    """Whatever the patterns of the best point, here a given one that no solver improves."""
    program = classes_out_of_balance(LpBall(np.inf, 0.05), Hinge(), formulation=formulation)
    program = replace(program, X=program.X[:, -4:], D=program.D[:, 1:])
    first = InteriorPoint(1e-4).solve(replace(program, regularizer=GroupLasso(0.2)))
    start = replace(first, D=program.D)
    solve = InteriorPoint.solve

    def lost(self, program, start=None):
        found, zero = solve(self, program, start), np.zeros((2, *program.shape))
        objective = program.solution(*zero).objective
        return replace(found, V=zero[0], W=zero[1], objective=objective, lower_bound=0.0)

    monkeypatch.setattr(InteriorPoint, "solve", lost)
    with pytest.warns(ConvergenceWarning):
        solution = WorkingSet(solver=InteriorPoint()).solve(program, start)
    before = program.solution(first.V, first.W)
    assert solution.objective <= before.objective * (1 + 1e-9)


def test_copies_that_disagree_about_their_target():
    """The network is judged by the program, whatever was assumed about the copies."""
    program = classes_out_of_balance(LpBall(np.inf, 50.0), Hinge())
    copies = np.repeat(np.arange(20), 2)
    y = program.y[copies] * np.tile([1, -1], 20)
    doubled = replace(program, X=program.X[copies], y=y, D=program.D[copies], copy_of=copies)
    solution = WorkingSet(width=0).solve(doubled)
    again = replace(doubled, D=solution.D).solution(solution.V, solution.W)
    assert again.objective == pytest.approx(solution.objective, rel=1e-12)
    assert solution.objective <= 1.0 + 1e-9  # of the zero network


def test_no_solution_is_worse_than_a_constant_network():
    program = classes_out_of_balance(LpBall(np.inf, 3.0), Hinge())
    program = replace(program, D=1 - program.D[:, :4])  # none is active on all rows
    solver = InteriorPoint(max_iter=1)
    with pytest.warns(ConvergenceWarning):
        solution = WorkingSet(solver=solver, width=0, max_rounds=1).solve(program)
    larger = replace(program, D=solution.D)
    assert solution.objective <= 0.81  # of the constant network; of that of zeros: 1
    again = larger.solution(solution.V, solution.W).objective
    assert again == pytest.approx(solution.objective, rel=1e-12)
    assert solution.lower_bound == pytest.approx(larger.lower_bound(solution.multipliers))


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_best_constant_network(loss):
    """It is the best point of the program whose features are all 0, copies and weights included."""
    X, y = small_data(loss.task, n=12)
    X = np.hstack([np.zeros_like(X), np.ones((12, 1))])
    weight, D = np.linspace(0.0, 1.0, 12), np.ones((12, 1), dtype=np.int8)
    program = ConvexProgram(
        X, y, D, loss, GroupLasso(0.02), LpBall(2, 0.0), "hard", sample_weight=weight
    )
    optimum = InteriorPoint(1e-9).solve(program)
    constant = best_constant(program)
    assert constant.objective == pytest.approx(optimum.objective, rel=1e-6)
    point = program.solution(*constant.weights(program))
    assert point.objective == pytest.approx(optimum.objective, rel=1e-6)
    bound = program.lower_bound(multipliers_from_margins(program, constant.margins))
    assert bound == pytest.approx(optimum.objective, rel=1e-6)
    copies = np.repeat(np.arange(12), 2)
    doubled = replace(program, X=X[copies], y=y[copies], D=D[copies], copy_of=copies)
    assert best_constant(doubled).objective == pytest.approx(constant.objective, rel=1e-9)
    assert best_constant(doubled).margins[::2] == pytest.approx(constant.margins / 2.0)


def test_without_an_intercept_the_best_constant_network_is_zero():
    program = gaussian_program(Squared(), 0.1)
    constant = best_constant(program)
    assert constant.objective == program.solution(*np.zeros((2, *program.shape))).objective
    assert not constant.outputs.any()


def test_a_bound_that_was_not_priced_is_about_the_patterns_used(monkeypatch):
    def nothing_new(program, multipliers, **options):
        return np.zeros((len(program.X), 0), dtype=np.int8)

    monkeypatch.setattr(rounds, "price", nothing_new)
    monkeypatch.setattr(rounds, "_CONSTANT_GAP", -1.0)  # the bound is found at the end only
    X = np.random.default_rng(0).normal(size=(20, 100))
    X, y = np.hstack([X, np.ones((20, 1))]), np.tile([1, -1], 10)
    D = sample_patterns(X, 8, random_state=0)
    program = ConvexProgram(X, y, D, Hinge(), GroupLasso(1e-3), LpBall(np.inf, 50.0))
    solver = InteriorPoint(max_iter=1)  # leaves the bound open
    solution = WorkingSet(solver=solver, width=0).solve(program)
    assert solution.status == "optimal"  # by the bound at zero, of which nobody asked prices
    assert solution.lower_bound_scope == "patterns"


def test_goes_on_from_its_own_solution():
    program = gaussian_program(Hinge(), 0.1, n=30, d=4)
    first = WorkingSet(solver=InteriorPoint(), max_rounds=1).solve(program)
    second = WorkingSet(solver=InteriorPoint(), max_rounds=3).solve(program, first)
    assert second.objective <= first.objective * (1 + 1e-9)


def test_a_time_limit_ends_the_rounds_and_leaves_the_solver_as_it_is():
    program = gaussian_program(SquaredHinge(), 0.1, n=40, d=5)
    network = train_certified(program, width=16, n_steps=50)
    V, W, D = network.to_convex(program.X, program.D)
    seed = replace(program, D=D).solution(V, W).objective
    solver = InteriorPoint()
    options = {"solver": solver, "network": network, "max_rounds": 50}
    with pytest.warns(ConvergenceWarning, match="time limit"):
        solution = WorkingSet(1e-9, time_limit=0.0, **options).solve(program)
    assert solution.status == "time limit"
    assert solution.n_iter < 10  # one look at one round
    assert solution.objective <= seed * (1 + 1e-12)
    assert solver.time_limit is None


@pytest.mark.parametrize("scales", [(100.0, 100.0), (300.0, 0.01)])
def test_features_of_any_scale(scales):
    X, y = small_data(n=60)
    X[:, :2] *= scales
    ball = LpBall(np.inf, 0.1 * np.array(scales))
    program = ConvexProgram(
        X, y, sample_patterns(X, 4, random_state=0), Hinge(), GroupLasso(1e-2), ball
    )
    solution = WorkingSet(width=8, n_new=8).solve(program)
    assert solution.status == "optimal"
    reference = WorkingSet(width=8, n_new=8, solver=InteriorPoint()).solve(program)
    assert solution.objective <= reference.objective + 0.02


def test_three_classes_and_admm():
    pytest.importorskip("torch")
    from convexrobust.solvers import ADMM

    X, y = small_data(n_classes=3, n=18)
    program = ConvexProgram(
        X,
        y,
        sample_patterns(X, 5, random_state=0),
        Hinge(),
        GroupLasso(0.02),
        LpBall(np.inf, 0.05),
        n_outputs=3,
    )
    fixed = InteriorPoint().solve(program).objective
    solution = WorkingSet(5e-2, solver=ADMM(5e-2, 400), width=8, max_rounds=1).solve(program)
    assert solution.lower_bound <= solution.objective < fixed


def test_an_open_gap_is_told():
    program = gaussian_program(Hinge(), 0.1, n=30, d=4)
    with pytest.warns(ConvergenceWarning, match="WorkingSet"):
        solution = WorkingSet(1e-6, solver=InteriorPoint(max_iter=3), max_rounds=1).solve(program)
    assert solution.status != "optimal"
    assert solution.lower_bound <= solution.objective


# ---------------------------------------------------------------- certified training


def objective_of(program, U, A):
    """Return the certified objective at a network's own gates, by the program itself."""
    network = TwoLayerReLU(U, A, intercept=program.intercept)
    features = program.sets.center[:, : network.n_features]
    V, W, D = network.to_convex(features, np.zeros((len(program.X), 0), dtype=np.int8))
    point = replace(program.certified(), D=D)
    decay = (np.sum(U**2) + np.sum(np.abs(A).sum(axis=1) ** 2)) / 2
    return point.mean_loss(xp, point.margins(xp, V, W)) + program.regularizer.beta * decay


@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("ball", BALLS, ids=name)
def test_gradients_of_certified_training(loss, ball):
    from convexrobust.solvers.working_set.seeding import _CertifiedBound

    program, rng = small_program(loss, ball), np.random.default_rng(1)
    U, A = rng.normal(size=(3, 4)), rng.normal(size=(4, 1))
    gradients = _CertifiedBound(program).gradients(U, A, 1.0)
    for direction in (rng.normal(size=7) for _ in range(3)):
        dU, dA = np.zeros_like(U), np.zeros_like(A)
        dU.flat[:5], dA.flat[:2] = direction[:5], direction[5:]
        h = 1e-6
        difference = objective_of(program, U + h * dU, A + h * dA)
        difference -= objective_of(program, U - h * dU, A - h * dA)
        slope = np.sum(gradients[0] * dU) + np.sum(gradients[1] * dA)
        assert slope == pytest.approx(difference / (2 * h), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", [Hinge(), Logistic()], ids=name)
def test_certified_training_lowers_what_is_certified_and_exact(loss):
    program = small_program(loss, BALLS[2], n=25, beta=1e-2, D=np.ones((25, 1)))
    short, trained = (train_certified(program, width=8, n_steps=n) for n in (1, 200))
    assert exact_objective(program, trained)[1] < 0.9 * exact_objective(program, short)[0]


def test_certified_training_starts_from_a_network():
    program = small_program(Hinge(), BALLS[2])
    network = train_certified(program, width=6, n_steps=50)
    again = train_certified(program, start=network, n_steps=1, learning_rate=1e-9)
    np.testing.assert_allclose(
        again.predict(program.X[:, :-1]), network.predict(program.X[:, :-1]), atol=1e-6
    )
    with pytest.raises(ValueError, match="start is a network of 3 inputs"):
        train_certified(gaussian_program(Hinge(), 0.1), start=network)


def interrupt(*args, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("place", "function"), [(rounds, "price"), (monitor.Monitor, "record")], ids=str
)
def test_ctrl_c_keeps_the_best_point(monkeypatch, place, function):
    """Between two solves and inside one: it ends everything, with valid bounds and a warning."""
    program = small_program(Hinge(), BALLS[2])
    monkeypatch.setattr(place, function, interrupt)
    with pytest.warns(ConvergenceWarning, match="WorkingSet.* stopped with status 'interrupted'"):
        found = WorkingSet(1e-6, width=8).solve(program)
    zero = program.solution(*np.zeros((2, *program.shape))).objective
    assert found.lower_bound <= found.objective < zero
    V, W = found.V, found.W
    assert replace(program, D=found.D).solution(V, W).objective == pytest.approx(found.objective)


@pytest.mark.parametrize("formulation", ["soft", "hard", "one-sided"])
@pytest.mark.parametrize("seed", range(4))
def test_a_good_start_keeps_the_bound_and_the_cones(formulation, seed):
    """A first network near the optimum beats the first solve, and may be outside hard cones."""
    program = gaussian_program(Hinge(), 0.1, n=16, d=3, seed=seed, beta=0.1)
    program = replace(program, formulation=formulation)
    found = WorkingSet(1e-3, random_state=seed).solve(program)
    assert found.status == "optimal"
    assert found.cone_violation <= 1e-4
    reference = InteriorPoint().solve(replace(program, D=found.D))
    assert found.lower_bound <= reference.objective * (1 + 1e-6)
    assert found.objective == pytest.approx(reference.objective, abs=1.1e-3)


@pytest.mark.parametrize("margin", [0.0, 0.2], ids=["slightly better", "far better"])
def test_a_point_with_its_bound_comes_before_a_slightly_better_one_without(margin):
    class OpenAtFirst:
        """Its first point is the best; a useful bound comes with the third, which is worse."""

        objectives = ()

        def solve(self, program, start=None):
            found = InteriorPoint(1e-6).solve(program)
            shrink, worse = 1.0, found
            while self.objectives and worse.objective <= self.objectives[0] + margin:
                shrink -= 1e-3
                worse = program.solution(shrink * found.V, shrink * found.W)
            self.objectives = *self.objectives, worse.objective
            bound = worse.objective - 0.05 if len(self.objectives) > 2 else 0.0
            return replace(
                found, V=worse.V, W=worse.W, objective=worse.objective, lower_bound=bound
            )

    solver = OpenAtFirst()
    program = gaussian_program(Hinge(), 0.1)
    working_set = WorkingSet(0.1, solver=solver, width=0, n_new=2, max_rounds=2)
    if margin > 0.0:
        with pytest.warns(ConvergenceWarning, match="WorkingSet"):
            found = working_set.solve(program)
        assert found.objective == solver.objectives[0] < solver.objectives[2]
        return
    found = working_set.solve(program)
    assert len(solver.objectives) == 3
    assert found.objective == solver.objectives[2] > solver.objectives[0]
    assert found.status == "optimal"
    assert 0.0 < found.gap <= 0.1
    again = replace(program, D=found.D).solution(found.V, found.W)
    assert again.objective == pytest.approx(found.objective, rel=1e-12)


def test_no_multipliers_are_no_prices():
    class Mute:
        def solve(self, program, start=None):
            return replace(InteriorPoint().solve(program), multipliers=None)

    found = WorkingSet(solver=Mute()).solve(gaussian_program(Hinge(), 0.1))
    assert found.lower_bound <= found.objective
