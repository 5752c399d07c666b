from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest

from convexrobust.duality import Multipliers, repaired
from convexrobust.losses import Hinge, Squared, SquaredHinge
from convexrobust.patterns import enumerate_patterns, sample_patterns
from convexrobust.perturbations import DUAL_NORM, LpBall
from convexrobust.program import FORMULATIONS, ConvexProgram
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import ConicSolver
from convexrobust.solvers.working_set.pricing import (
    best_cone_multipliers,
    global_lower_bound,
    price,
)
from tests.cases import BALLS, LOSSES, name, small_data, small_program

NOMINAL = LpBall(2, 0.0)


def id_of(ball):
    return "nominal" if ball is NOMINAL else name(ball)


# Every ball with each formulation; losses and several classes with one formulation each.
CASES = [(Hinge(), ball, 2, form) for ball in (*BALLS, NOMINAL) for form in FORMULATIONS]
CASES += [(loss, BALLS[2], 2, FORMULATIONS[k % 3]) for k, loss in enumerate(LOSSES[1:])]
CASES += [
    (SquaredHinge(), ball, 3, FORMULATIONS[k % 3])
    for k, ball in enumerate((BALLS[0], BALLS[1], BALLS[5], NOMINAL))
]
CASE_IDS = ["-".join((name(loss), id_of(ball), str(c), form)) for loss, ball, c, form in CASES]


def with_few_patterns(loss, ball, formulation, n_classes, P=6):
    D = sample_patterns(small_data(loss.task, n_classes)[0], P, random_state=1)
    return small_program(loss, ball, formulation, n_classes=n_classes, D=D)


def cones_of(program, draw):
    """Return multipliers of the cone rows, drawn by their shape."""
    P = program.D.shape[1]
    return [[draw((len(r), P)) for r in rows] for rows in (program.rows_v, program.rows_w)]


def without_cones(program, multipliers):
    return Multipliers(multipliers.margins, multipliers.slopes, *cones_of(program, np.zeros))


def gates_data(seed, n=14, d=4):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, np.where(np.sin(2 * X[:, 0]) + X[:, 1] * X[:, 2] > 0, 1, -1)


def gates_program(seed, loss, epsilon=0.0, formulation="hard", D=None):
    X, y = gates_data(seed)
    D = sample_patterns(X, 5, random_state=seed) if D is None else D
    ball = LpBall(2, epsilon)
    return ConvexProgram(X, y, D, loss, GroupLasso(0.02), ball, formulation, intercept=False)


@pytest.mark.parametrize(("loss", "ball", "n_classes", "formulation"), CASES, ids=CASE_IDS)
def test_bound_at_the_optimal_margins_is_the_optimum(loss, ball, n_classes, formulation):
    program = with_few_patterns(loss, ball, formulation, n_classes)
    solution = ConicSolver().solve(program)
    forgotten = without_cones(program, solution.multipliers)
    bound = program.lower_bound(best_cone_multipliers(program, forgotten, tol=1e-7))
    assert bound <= solution.objective * (1 + 1e-7)
    # What the solver's own multipliers prove, less the accuracy asked for.
    assert bound >= solution.lower_bound * (1 - 1e-5)


@pytest.mark.parametrize(("loss", "ball", "n_classes", "formulation"), CASES, ids=CASE_IDS)
def test_bound_is_never_worse(loss, ball, n_classes, formulation):
    program = with_few_patterns(loss, ball, formulation, n_classes)
    rng = np.random.default_rng(0)
    n, n_margins = program.margin_map.offsets.shape
    for size in (0.0, 0.02, 1.0):
        given = Multipliers(
            rng.uniform(size=(n, n_margins)) / n,
            {e: 0.01 * rng.normal(size=program.X.shape) for e in set(program.margin_map.slope_of)},
            *cones_of(program, lambda shape, size=size: size * rng.uniform(size=shape)),
        )
        bound = program.lower_bound(best_cone_multipliers(program, given, n_iter=40))
        assert bound >= program.lower_bound(given) * (1 - 1e-9) - 1e-12


@pytest.mark.parametrize("ball", [*BALLS, NOMINAL], ids=id_of)
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_largest_residual_is_that_of_a_conic_solver(ball, formulation):
    program = with_few_patterns(Hinge(), ball, formulation, 2, P=4)
    n = len(program.X)
    rng = np.random.default_rng(3)
    a = rng.uniform(0.2, 1.0, (n, 1)) / n
    start = Multipliers(a, {0: 0.1 * rng.normal(size=program.X.shape)}, [], [])
    start = repaired(program, without_cones(program, start))
    expected = max(residuals_by_cvxpy(program, start))
    # With beta this small the residual alone limits the scale t of the bound t sum(a).
    beta = 0.05 * expected
    program = replace(program, regularizer=GroupLasso(beta))
    bound = program.lower_bound(best_cone_multipliers(program, start))
    assert bound == pytest.approx(beta / expected * a.sum(), rel=1e-5)


def residuals_by_cvxpy(program, point):
    """Yield max -h(u) over the unit ball, written with u, for each neuron of a hinge program."""
    signed = program.y[:, None] * point.margins
    sets = program.sets
    pull = -signed * sets.center + program.y[:, None] * point.slopes[0]
    for sign, all_rows in ((1, program.rows_v), (-1, program.rows_w)):
        rows = all_rows[0]
        for D in program.D.T:
            u = cp.Variable(program.X.shape[1])
            weights = np.broadcast_to(sets.weights, sets.center.shape)
            q = DUAL_NORM[sets.p]
            gaps = [
                sets.radius * cp.norm(cp.multiply(weights[k], u), q)
                - (2 * D[k] - 1) * (sets.center[k] @ u)
                for k in rows
            ]
            rate = sign * ((D @ pull) @ u)
            demanded = [cp.norm(u) <= 1]
            if program.formulation == "soft":
                rate += sum(
                    point.margins[k, 0] * cp.pos(g) for k, g in zip(rows, gaps, strict=True)
                )
            else:
                demanded += [gap <= 0 for gap in gaps]
            yield -cp.Problem(cp.Minimize(rate), demanded).solve(solver="CLARABEL")


@pytest.mark.parametrize(
    ("loss", "epsilon", "formulation"),
    [(Hinge(), 0.0, "hard"), (SquaredHinge(), 0.1, "soft")],
)
def test_column_generation_reaches_the_optimum_over_all_patterns(loss, epsilon, formulation):
    program = gates_program(0, loss, epsilon, formulation)
    every = replace(program, D=enumerate_patterns(program.X))
    optimum = ConicSolver().solve(every).objective
    for _ in range(15):
        solution = ConicSolver().solve(program)
        new = price(program, solution.multipliers)
        if new.shape[1] == 0:
            break
        program = replace(program, D=np.hstack([program.D, new]))
    assert solution.objective == pytest.approx(optimum, rel=1e-4)
    assert program.D.shape[1] < every.D.shape[1] / 4
    bound = global_lower_bound(program, solution.multipliers)
    assert bound <= optimum * (1 + 1e-6)
    assert bound == pytest.approx(optimum, rel=1e-4 + 1e-4)  # 1e-4: what pricing tolerates


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_rounds", [0, 1])
def test_pricing_finds_a_violated_pattern_if_there_is_one(seed, n_rounds):
    program = gates_program(seed, Hinge())
    for _ in range(n_rounds):
        new = price(program, ConicSolver().solve(program).multipliers, n_patterns=3)
        program = replace(program, D=np.hstack([program.D, new]))
    solution = ConicSolver().solve(program)
    exact = global_lower_bound(program, solution.multipliers)
    new = price(program, solution.multipliers)
    assert exact < solution.lower_bound * 0.99  # there is one
    assert new.shape[1] >= 1
    worst = replace(program, D=new[:, :1])
    cut = worst.lower_bound(
        best_cone_multipliers(worst, without_cones(worst, solution.multipliers))
    )
    assert cut == pytest.approx(exact, rel=1e-2)  # and the first is the worst of all


@pytest.mark.parametrize(
    ("loss", "n_classes", "ball"),
    [
        *((Hinge(), 2, ball) for ball in BALLS),
        (SquaredHinge(), 3, BALLS[1]),
        (SquaredHinge(), 3, BALLS[5]),
        (Squared(), 2, BALLS[0]),
    ],
    ids=name,
)
def test_priced_patterns_are_new_realisable_and_improve(loss, n_classes, ball):
    program = with_few_patterns(loss, ball, "soft", n_classes, P=3)
    solution = ConicSolver().solve(program)
    new = price(program, solution.multipliers, n_patterns=4, n_starts=60)
    assert new.dtype == np.int8
    assert 1 <= new.shape[1] <= 4
    columns = {bytes(column) for column in np.hstack([program.D, new]).T}
    assert len(columns) == 3 + new.shape[1]
    assert {bytes(c) for c in new.T} <= {bytes(c) for c in enumerate_patterns(program.X).T}
    improved = ConicSolver().solve(replace(program, D=np.hstack([program.D, new])))
    assert improved.objective < solution.lower_bound


def test_nothing_is_found_at_the_optimum_over_all_patterns():
    program = gates_program(1, SquaredHinge(), formulation="soft")
    program = replace(program, D=enumerate_patterns(program.X))
    few = price(program, ConicSolver().solve(program).multipliers)
    assert few.shape == (14, 0)


def test_global_bound_holds_for_every_network_of_other_patterns():
    """epsilon 0: a network with the patterns of any other sample is a feasible point."""
    program = gates_program(3, SquaredHinge(), formulation="soft")
    multipliers = ConicSolver().solve(program).multipliers
    bound = global_lower_bound(program, multipliers)
    assert bound > 0
    for seed in range(3):
        D = sample_patterns(program.X, 25, random_state=50 + seed)
        assert bound <= ConicSolver().solve(replace(program, D=D)).objective


def test_batches_do_not_change_the_global_bound(monkeypatch):
    program = gates_program(2, Hinge())
    multipliers = ConicSolver().solve(program).multipliers
    whole = global_lower_bound(program, multipliers)
    monkeypatch.setattr("convexrobust.solvers.working_set.pricing._PATTERNS_AT_ONCE", 100)
    assert global_lower_bound(program, multipliers) == pytest.approx(whole, rel=1e-5)


def test_too_many_cells_are_refused_with_a_remedy():
    program = gates_program(0, Hinge())
    multipliers = without_cones(program, Multipliers(np.ones((14, 1)), {}, [], []))
    with pytest.raises(ValueError, match=r"756 patterns.*use `price`"):
        global_lower_bound(program, multipliers, limit=700)


@pytest.mark.parametrize("ball", [BALLS[0], BALLS[4], BALLS[5], NOMINAL], ids=id_of)
@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("value", [0.0, np.nan, 1e6])
def test_any_multipliers_will_do(ball, formulation, value):
    program = with_few_patterns(Hinge(), ball, formulation, 2, P=4)
    given = Multipliers(
        np.full((9, 1), value),
        {0: np.full(program.X.shape, value)},
        *cones_of(program, lambda shape: np.full(shape, value)),
    )
    bound = program.lower_bound(best_cone_multipliers(program, given, n_iter=200))
    assert bound >= program.lower_bound(given) * (1 - 1e-9)
    assert bound <= 1.0  # the zero network's loss
    new = price(program, given, n_starts=20)
    assert new.shape[0] == 9
    assert new.shape[1] == 0 or value == 1e6


def test_bad_counts_are_refused():
    program = gates_program(0, Hinge())
    multipliers = without_cones(program, Multipliers(np.ones((14, 1)), {}, [], []))
    with pytest.raises(ValueError, match="n_patterns must be a positive integer"):
        price(program, multipliers, n_patterns=0)
    with pytest.raises(ValueError, match="n_starts must be a positive integer"):
        price(program, multipliers, n_starts=1.5)
