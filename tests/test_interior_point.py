"""The interior-point method against Clarabel, its own certificate, and special programs."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from convexrobust import duality
from convexrobust.backends import numpy as numpy_backend
from convexrobust.losses import Hinge, Logistic, Squared, SquaredHinge
from convexrobust.patterns import enumerate_patterns, sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import FORMULATIONS, ConvexProgram
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import ConicSolver
from convexrobust.solvers.interior_point import InteriorPoint, solver, system
from convexrobust.solvers.interior_point import data as interior_data
from convexrobust.solvers.interior_point import rows as interior_rows
from convexrobust.solvers.interior_point.data import Data, Neurons
from convexrobust.solvers.interior_point.iterate import Iterate
from convexrobust.solvers.interior_point.newton import newton_step
from convexrobust.solvers.interior_point.rows import DenseRows, ProductRows
from tests.cases import BALLS, LOSSES, MARGIN_LOSSES, name, small_data, small_program

NOMINAL = LpBall(2, 0.0)


def pairwise(losses, balls):
    """Return triples with a formulation in which any two values meet, given three of each."""
    return [
        (loss, ball, FORMULATIONS[(i + j) % 3])
        for i, loss in enumerate(losses)
        for j, ball in enumerate(balls)
    ]


def few_patterns(loss, n_classes=2, n=9, P=5):
    return sample_patterns(small_data(loss.task, n_classes, n)[0], P, random_state=0)


def check_against_clarabel(program, rel=1e-6, **options):
    """Assert that both solvers certify the same optimum; return our solution."""
    reference = ConicSolver().solve(program)
    solution = InteriorPoint(**options).solve(program)
    assert solution.status == "optimal"
    assert solution.relative_gap <= 1e-5
    assert solution.cone_violation <= 1e-6
    assert solution.lower_bound <= reference.objective + 1e-6 * abs(reference.objective)
    # Clarabel's own gap is up to 3e-6 here: what it may be off by is no disagreement.
    slack = rel * abs(reference.objective) + abs(reference.gap)
    assert abs(solution.objective - reference.objective) <= slack
    assert program.lower_bound(solution.multipliers) == pytest.approx(
        solution.lower_bound, rel=1e-9, abs=1e-12
    )
    return solution


@pytest.mark.parametrize(
    ("loss", "ball", "formulation"), pairwise(LOSSES, [*BALLS, NOMINAL]), ids=name
)
def test_agrees_with_clarabel(loss, ball, formulation):
    check_against_clarabel(small_program(loss, ball, formulation, D=few_patterns(loss)))


@pytest.mark.parametrize(
    ("loss", "ball", "formulation"), pairwise(MARGIN_LOSSES, BALLS[1:4]), ids=name
)
def test_three_classes(loss, ball, formulation):
    D = few_patterns(loss, 3)
    check_against_clarabel(small_program(loss, ball, formulation, n_classes=3, D=D))


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_weights_are_repetitions_and_zero_weights_leave_out_the_loss(formulation):
    loss, weight = SquaredHinge(), np.array([1, 2, 0, 3, 1, 0, 2, 1, 1])
    program = small_program(loss, BALLS[2], formulation, D=few_patterns(loss))
    weighted = check_against_clarabel(replace(program, sample_weight=weight))
    if formulation == "soft":  # elsewhere the rows of weight 0 still have cone rows
        data = {key: np.repeat(getattr(program, key), weight, axis=0) for key in "XyD"}
        repeated = InteriorPoint().solve(replace(program, **data))
        assert weighted.objective == pytest.approx(repeated.objective, rel=3e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_a_large_beta_gives_the_zero_network(loss):
    program = small_program(loss, BALLS[2], beta=50.0, D=few_patterns(loss))
    solution = InteriorPoint().solve(program)
    assert solution.status == "optimal"
    assert not solution.V.any()
    assert not solution.W.any()


def test_duplicated_and_constant_columns():
    program = small_program(Hinge(), BALLS[2], D=few_patterns(Hinge()))
    X = program.X
    X = np.hstack([X[:, :2], X[:, :1], np.zeros((len(X), 1)), np.full((len(X), 1), 2.0), X[:, 2:]])
    check_against_clarabel(replace(program, X=X))
    D = np.hstack([program.D, program.D])
    check_against_clarabel(replace(program, X=X, D=D, formulation="hard"))


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("formulation", ["soft", "hard"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_badly_scaled_features_give_valid_bounds(scale, formulation):
    """The right answer, or a warning: the status tells which."""
    program = small_program(Hinge(), BALLS[2], formulation, D=few_patterns(Hinge()))
    X = program.X * np.array([scale, 1.0, 1.0])
    ball = LpBall(np.inf, np.array([0.15 * scale, 0.15]))
    program = replace(program, X=X, perturbation=ball)
    solution = InteriorPoint().solve(program)
    reference = ConicSolver().solve(program)
    assert solution.lower_bound <= reference.objective * (1 + 1e-6)
    assert reference.lower_bound <= solution.objective * (1 + 1e-6) + solution.cone_violation
    assert (solution.status == "optimal") == (abs(solution.relative_gap) <= 1e-6)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("loss", [Hinge(), Logistic(), Squared()], ids=name)
def test_stopping_early_warns_and_stays_valid(loss, formulation):
    program = small_program(loss, BALLS[1], formulation, D=few_patterns(loss))
    optimum = InteriorPoint().solve(program).objective
    with pytest.warns(ConvergenceWarning, match="InteriorPoint stopped .* after 2 iterations"):
        solution = InteriorPoint(max_iter=2).solve(program)
    assert solution.lower_bound <= optimum * (1 + 1e-9)
    assert program.certified().objective(numpy_backend, solution.V, solution.W) <= (
        solution.objective + 1e-12
    )
    with pytest.warns(ConvergenceWarning, match="time limit"):
        InteriorPoint(time_limit=0.0).solve(program)


@pytest.mark.parametrize(
    ("loss", "ball", "formulation"),
    pairwise([Hinge(), Squared(), Logistic()], [BALLS[2], BALLS[1], BALLS[5], NOMINAL]),
    ids=name,
)
def test_neurons_left_out_do_not_change_the_optimum(loss, ball, formulation, monkeypatch):
    """With few neurons in play at first, pricing finds all that matter and proves it."""
    program = small_program(loss, ball, formulation, D=few_patterns(loss, n=12, P=20), n=12)
    full = InteriorPoint().solve(program)
    for limit in ("_FEWEST", "_ROBUST_UNKNOWNS", "_SOFT_UNKNOWNS", "_NOMINAL_UNKNOWNS"):
        monkeypatch.setattr(solver, limit, 6)
    partial = InteriorPoint().solve(program)
    assert partial.status == full.status == "optimal"
    assert partial.objective == pytest.approx(full.objective, rel=3e-6)
    assert partial.lower_bound <= full.objective


@pytest.mark.parametrize("loss", [Hinge(), Squared()], ids=name)
def test_many_neurons_without_perturbation_take_the_factor_in_the_samples(loss, monkeypatch):
    program = small_program(loss, NOMINAL, "hard", D=few_patterns(loss, n=12, P=20), n=12)
    dense = InteriorPoint().solve(program)
    monkeypatch.setattr(system, "_ACCURATE_UNKNOWNS", 0)
    check_against_clarabel(program, tol=1e-5, rel=1e-5)
    assert dense.status == "optimal"


def all_patterns_of_random_labels(seed, n, d, beta, formulation):
    """A hinge program whose optimum has samples at the kink, and flat neurons in many cells."""
    rng = np.random.default_rng(seed)
    X = np.column_stack([rng.standard_normal((n, d - 1)), np.ones(n)])
    y = rng.standard_normal(n)
    y = np.where(y > np.median(y), 1.0, -1.0)
    D = enumerate_patterns(X)
    return ConvexProgram(X, y, D, Hinge(), GroupLasso(beta), NOMINAL, formulation)


@pytest.mark.parametrize(
    ("seed", "n", "d", "beta", "formulation"),
    [
        ([1, 12, 3], 12, 3, 0.01, "hard"),  # the dense factor: rises of samples at the kink
        (1, 14, 4, 0.03, "hard"),  # the factor in the samples
        ([7, 8], 14, 4, 0.003, "soft"),
    ],
)
def test_small_gaps_of_all_patterns(seed, n, d, beta, formulation):
    """Degenerate optima, where a Newton system that is not exact ends the progress early."""
    program = all_patterns_of_random_labels(seed, n, d, beta, formulation)
    solution = InteriorPoint(tol=1e-8).solve(program)
    assert solution.status == "optimal"


def test_the_slower_factor_is_right_where_the_normal_equations_are_not():
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((rows, 6)))[0] for rows in (40, 6))
    values, y = np.logspace(-6, 8, 6), rng.standard_normal(40)
    exact = y - U @ (values**2 / (1.0 + values**2) * (y @ U))
    M = DenseRows(((U * values) @ V.T).T[:, None, None])  # of one neuron with 40 weights
    solve = system._by_singular_vectors(np.eye(40)[None], M)
    assert solve(y[None])[0] == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("n_margins", [1, 3])
@pytest.mark.parametrize("in_cache", [10, 10**6])  # in several parts, or in one
def test_rows_as_products_are_the_rows_themselves(n_margins, in_cache, monkeypatch):
    monkeypatch.setattr(interior_rows, "_IN_CACHE", in_cache)
    rng = np.random.default_rng(0)
    X, h = rng.normal(size=(7, 3)), rng.normal(size=(7, n_margins, 2))
    h = np.concatenate([h, -h[..., :1]], axis=2)  # the third neuron is of the kind of the first
    roots = rng.normal(size=(7, n_margins, n_margins))
    change, a = rng.normal(size=(3, 3)), rng.normal(size=(7, n_margins))
    blocks = rng.normal(size=(3, 3, 3))
    products = ProductRows(h, X, np.array([4, 1, 4])).mixed(roots)
    dense = DenseRows(h[..., None] * X[:, None, None, :]).mixed(roots)
    assert products.dense() == pytest.approx(dense.dense())
    assert products.apply(change) == pytest.approx(dense.apply(change))
    assert products.pull(a) == pytest.approx(dense.pull(a))
    assert products.scaled(blocks) == pytest.approx(dense.scaled(blocks))
    assert products.gram(blocks) == pytest.approx(dense.gram(blocks))


@pytest.mark.parametrize("n_margins", [1, 3])
def test_grams_without_rows_of_zeros(n_margins):
    rng = np.random.default_rng(0)
    active = rng.random(size=(40, 1, 4)) < 0.1
    rows = ProductRows(
        rng.normal(size=(40, n_margins, 4)) * active, rng.normal(size=(40, 30)), np.arange(4)
    )
    roots = np.linalg.cholesky(np.eye(30) + np.ones((30, 30)) * np.arange(4)[:, None, None])
    assert rows._gram_active(roots) == pytest.approx(rows._gram_dense(roots))
    assert rows._mostly_zeros()
    everywhere = ProductRows(np.ones((40, n_margins, 4)), rows.X, rows.kind)
    assert not everywhere._mostly_zeros()


def test_a_solve_by_grams_without_rows_of_zeros_is_the_same(monkeypatch):
    monkeypatch.setattr(system, "_ACCURATE_UNKNOWNS", 0)
    program = small_program(Hinge(), NOMINAL, "hard", D=few_patterns(Hinge(), n=12, P=20), n=12)
    objectives = []
    for mostly in (False, True):
        monkeypatch.setattr(ProductRows, "_mostly_zeros", lambda self, mostly=mostly: mostly)
        objectives.append(InteriorPoint(tol=1e-8).solve(program).objective)
    assert objectives[1] == pytest.approx(objectives[0], rel=1e-7)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("ball", BALLS, ids=str)
def test_data_of_fewer_neurons_are_those_of_the_program(ball, formulation):
    program = small_program(Hinge(), ball, formulation)
    neurons, index = Neurons.all_of(program), np.array([3, 0, 2])
    everything = Data(program, neurons)
    assert everything.nominal_rows.shape[2] == len(neurons.signs)  # kept, but not for fewer
    fewer, anew = everything.at(index), Data(program, neurons.at(index))
    for part in ("F", "F_slope", "hurts", "S", "mask", "nominal_rows", "X_cone", "reach", "fold"):
        np.testing.assert_array_equal(getattr(fewer, part), getattr(anew, part))


def test_inverse_factors():
    rng = np.random.default_rng(0)
    A = rng.normal(size=(5, 4, 4))
    blocks = A @ A.transpose(0, 2, 1) + np.eye(4)
    inverses = interior_rows.inverse_factors(blocks)
    assert inverses == pytest.approx(np.linalg.inv(np.linalg.cholesky(blocks)), abs=1e-12)


def test_squares_are_kept_or_not(monkeypatch):
    program = small_program(Hinge(), NOMINAL, "hard")
    kept = InteriorPoint(tol=1e-8).solve(program)
    monkeypatch.setattr(interior_data, "_MANY", 0)
    assert InteriorPoint(tol=1e-8).solve(program).objective == pytest.approx(kept.objective)


def test_normal_equations_without_a_factor_are_no_end(monkeypatch):
    def fails(B, M):
        raise np.linalg.LinAlgError

    monkeypatch.setattr(system, "_ACCURATE_UNKNOWNS", 0)
    monkeypatch.setattr(system, "_by_normal_equations", fails)
    program = small_program(Hinge(), NOMINAL, "hard", D=few_patterns(Hinge(), n=12, P=20), n=12)
    check_against_clarabel(program)


def test_the_scale_of_the_bound_takes_few_evaluations(monkeypatch):
    evaluations = []
    conjugate = Logistic.conjugate

    def counted(self, multipliers):
        evaluations.append(conjugate(self, multipliers))
        return evaluations[-1]

    monkeypatch.setattr(Logistic, "conjugate", counted)
    program = small_program(Logistic(), NOMINAL, D=few_patterns(Logistic()))
    multipliers = InteriorPoint(tol=1e-3).solve(program).multipliers
    evaluations.clear()
    program.lower_bound(multipliers)
    assert len(evaluations) <= 20


@pytest.mark.parametrize(
    ("function", "high", "most"),
    [
        (lambda t: 3.0 * t, 0.7, 5),  # at the end
        (lambda t: -t, 1e6, 5),
        (lambda t: 1.0 - (t - 0.3) ** 2, 1.0, 7),
        (lambda t: 1.0 - (t - 1.0) ** 2, 1e6, 7),
        (lambda t: t - 0.2 * t * np.log(t + 1e-300), 5.0, 15),
        (lambda t: min(t, 0.5 - 0.25 * t), 1.0, 60),  # a kink
    ],
)
def test_concave_maximum(function, high, most):
    seen = []
    best = duality._concave_maximum(lambda t: seen.append(t) or function(t), high)
    assert best >= max(function(t) for t in np.linspace(0.0, high, 1001)) - 1e-8
    assert len(seen) <= most
    assert 0.0 <= min(seen) <= max(seen) <= high


def test_better_than_the_optimum_of_fewer_patterns():
    D = few_patterns(Hinge(), n=12, P=20)
    values = [
        InteriorPoint().solve(small_program(Hinge(), BALLS[2], D=D[:, :P], n=12)).objective
        for P in (2, 8, 20)
    ]
    assert np.all(np.diff(values) <= 1e-6)


class TestBadInput:
    def test_copies_are_refused_by_name(self):
        program = small_program(Hinge(), BALLS[2], D=few_patterns(Hinge()))
        with pytest.raises(ValueError, match=r"copy_of.*ConicSolver"):
            InteriorPoint().solve(replace(program, copy_of=np.arange(9) // 2))

    @pytest.mark.parametrize("options", [{"tol": 0.0}, {"tol": np.nan}, {"max_iter": 0}])
    def test_options(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            InteriorPoint(**options).solve(small_program(Hinge(), BALLS[2]))


def test_repr_shows_the_options():
    assert (
        repr(InteriorPoint(tol=1e-4)) == "InteriorPoint(tol=0.0001, max_iter=300, time_limit=None)"
    )


def test_a_direction_that_is_no_number_is_not_taken(monkeypatch):
    program = small_program(Hinge(), BALLS[2], D=few_patterns(Hinge()))
    iterate = Iterate(Data(program, Neurons.all_of(program)))
    direct = iterate.cone.direct
    monkeypatch.setattr(iterate.cone, "direct", lambda change: direct(np.nan * change))
    before = iterate.cone.s
    assert not newton_step(iterate)
    assert iterate.cone.s is before
