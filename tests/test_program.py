from dataclasses import replace
from fractions import Fraction

import cvxpy as cp
import numpy as np
import pytest
import torch

from convexrobust.backends import cvxpy as cvxpy_backend
from convexrobust.backends import numpy as xp
from convexrobust.backends import torch as torch_backend
from convexrobust.duality import Multipliers
from convexrobust.losses import Hinge, Huber, Logistic, Pinball, Squared
from convexrobust.patterns import enumerate_patterns, sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import FORMULATIONS, ConvexProgram
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import ConicSolver
from tests.cases import BALLS, LOSSES, MARGIN_LOSSES, name, small_data, small_program

ALL_CASES = [(loss, ball, 2) for loss in LOSSES for ball in BALLS] + [
    (loss, ball, 3) for loss in MARGIN_LOSSES for ball in (BALLS[1], BALLS[2], BALLS[5])
]
CASE_IDS = [f"{name(loss)}-{name(ball)}-{classes}" for loss, ball, classes in ALL_CASES]


def random_weights(program, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, *program.shape))


def few_patterns(X, P=5):
    return sample_patterns(X, P, random_state=0)


@pytest.mark.parametrize(("loss", "ball", "n_classes"), ALL_CASES, ids=CASE_IDS)
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_backends_agree(loss, ball, n_classes, formulation):
    D = few_patterns(small_data(loss.task, n_classes)[0])
    program = small_program(loss, ball, formulation, n_classes=n_classes, D=D)
    V, W = random_weights(program)
    expected = program.objective(xp, V, W)
    tensors = torch.as_tensor(V), torch.as_tensor(W)
    assert program.objective(torch_backend, *tensors).item() == pytest.approx(expected, rel=1e-9)
    expressions = [[cp.Constant(u) for u in U] for U in (V, W)]
    value = program.objective(cvxpy_backend, *expressions).value
    assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("loss", "ball", "n_classes"), ALL_CASES, ids=CASE_IDS)
def test_margins_bound_every_perturbed_network(loss, ball, n_classes):
    # The theorem: for any V, W and any 0/1 matrix D, realisable or not.
    rng = np.random.default_rng(0)
    X, _ = small_data(loss.task, n_classes)
    program = small_program(
        loss, ball, n_classes=n_classes, D=rng.integers(0, 2, (len(X), 6)).astype(np.int8)
    )
    V, W = random_weights(program)
    bound = program.margins(xp, V, W)
    directions, offsets, _ = program.margin_map
    for _ in range(100):
        moved = X.copy()
        moved[:, :2] += ball.sample(X[:, :2], rng)
        hidden = [np.maximum(moved @ U, 0.0).sum(axis=2) for U in (V, W)]
        margins = np.einsum("nec,cn->ne", directions, hidden[0] - hidden[1]) + offsets
        assert np.all(margins >= bound - 1e-12)


@pytest.mark.parametrize(("loss", "ball", "n_classes"), ALL_CASES, ids=CASE_IDS)
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_lower_bound_holds_for_any_multipliers(loss, ball, n_classes, formulation):
    D = few_patterns(small_data(loss.task, n_classes)[0])
    program = small_program(loss, ball, formulation, n_classes=n_classes, D=D)
    optimum = ConicSolver().solve(program).objective
    rng = np.random.default_rng(0)
    n, n_margins = program.margin_map.offsets.shape
    for scale in (0.01, 1.0):
        multipliers = Multipliers(
            rng.normal(size=(n, n_margins)) * scale,
            {e: rng.normal(size=program.X.shape) for e in set(program.margin_map.slope_of)},
            [rng.normal(size=(len(r), D.shape[1])) for r in program.rows_v],
            [rng.normal(size=(len(r), D.shape[1])) for r in program.rows_w],
        )
        assert program.lower_bound(multipliers) <= optimum * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize(("loss", "ball", "n_classes"), ALL_CASES, ids=CASE_IDS)
def test_the_order_of_the_formulations_and_the_duality_gap(loss, ball, n_classes):
    D = few_patterns(small_data(loss.task, n_classes)[0])
    solutions = [
        ConicSolver().solve(small_program(loss, ball, f, n_classes=n_classes, D=D))
        for f in ("soft", "one-sided", "hard")
    ]
    for solution in solutions:
        assert solution.status == "optimal"
        assert solution.lower_bound <= solution.objective * (1 + 1e-7)
        assert solution.relative_gap <= 1e-4
        assert solution.cone_violation <= 1e-6
    soft, one_sided, hard = (solution.objective for solution in solutions)
    assert soft <= one_sided * (1 + 1e-5)
    assert one_sided <= hard * (1 + 1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_exact_optimum_without_perturbations(loss):
    """All patterns, epsilon 0: soft = one-sided = hard, and no gradient-descent run is better."""
    values = [
        ConicSolver().solve(small_program(loss, LpBall(2, 0.0), formulation)).objective
        for formulation in FORMULATIONS
    ]
    np.testing.assert_allclose(values, values[0], rtol=2e-5)
    program = small_program(loss, LpBall(2, 0.0))
    assert min(nonconvex_run(program, seed) for seed in range(5)) >= values[0] * (1 - 1e-5)


def nonconvex_run(program, seed, width=12):
    """Return the objective of the non-convex problem after a run of L-BFGS from a random start."""
    generator = torch.Generator().manual_seed(seed)
    d = program.X.shape[1]
    hidden = torch.randn(d, width, generator=generator, dtype=torch.float64, requires_grad=True)
    output = torch.randn(width, generator=generator, dtype=torch.float64, requires_grad=True)
    X = torch.as_tensor(program.X)
    optimizer = torch.optim.LBFGS([hidden, output], max_iter=300, line_search_fn="strong_wolfe")

    def objective():
        z = torch.relu(X @ hidden) @ output
        losses = program.loss.worst_case(torch_backend, z, z, program.y)
        decay = hidden.square().sum() + output.square().sum()
        return losses.mean() + program.regularizer.beta / 2 * decay

    def closure():
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)
    return objective().item()


def test_more_patterns_never_hurt_and_more_perturbation_never_helps():
    X, _ = small_data()
    D = enumerate_patterns(X)
    for formulation in FORMULATIONS:
        by_patterns = [
            ConicSolver().solve(small_program(Hinge(), BALLS[2], formulation, D=D[:, :P])).objective
            for P in (2, 8, 20, D.shape[1])
        ]
        by_epsilon = [
            ConicSolver()
            .solve(small_program(Hinge(), LpBall(np.inf, e), formulation, D=D[:, :12]))
            .objective
            for e in (0.0, 0.05, 0.1, 0.3)
        ]
        assert np.all(np.diff(by_patterns) <= 1e-6)
        assert np.all(np.diff(by_epsilon) >= -1e-6)


def test_weights_are_repetitions():
    X, y = small_data()
    D, weight = few_patterns(X), np.array([1, 2, 1, 3, 1, 1, 2, 1, 1])
    arguments = (Logistic(), GroupLasso(0.02), BALLS[2], "soft")
    repeated = (np.repeat(a, weight, axis=0) for a in (X, y, D))
    weighted = ConvexProgram(X, y, D, *arguments, sample_weight=weight)
    values = [
        ConicSolver().solve(p).objective for p in (weighted, ConvexProgram(*repeated, *arguments))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


COPY_OF = np.array([0, 0, 1, 1, 1, 2, 4, 3, 3])


def copied(program):
    """Return the program with its rows as copies of five samples of different weights."""
    y = program.y[:5][COPY_OF]
    return replace(program, y=y, copy_of=COPY_OF, sample_weight=np.array([1.0, 2.0, 0.5, 1.0, 3.0]))


def loss_by_hand(loss, z, y):
    """Return the cvxpy losses of each row for outputs z, a list of C vectors."""
    if loss.task == "regression":
        residual = cp.abs(z[0] - y)
        if isinstance(loss, Pinball):
            return cp.maximum(loss.quantile * (y - z[0]), (1.0 - loss.quantile) * (z[0] - y))
        if isinstance(loss, Huber):
            return cp.huber(z[0] - y, loss.delta) / 2
        tube = getattr(loss, "tube", 0.0)
        return residual**2 / 2 if isinstance(loss, Squared) else cp.pos(residual - tube)
    if len(z) == 1:
        margins = cp.reshape(cp.multiply(y, z[0]), (len(y), 1), order="F")
    else:
        rivals = [[c for c in range(len(z)) if c != label] for label in y]
        margins = cp.vstack(
            [cp.hstack([z[y[k]][k] - z[c][k] for c in row]) for k, row in enumerate(rivals)]
        )
    if isinstance(loss, Logistic):
        return cp.log_sum_exp(cp.hstack([np.zeros((len(y), 1)), -margins]), axis=1)
    hinge = cp.pos(1 - cp.min(margins, axis=1))
    return hinge if isinstance(loss, Hinge) else hinge**2


@pytest.mark.parametrize(
    ("loss", "n_classes"),
    [(loss, 2) for loss in LOSSES] + [(loss, 3) for loss in MARGIN_LOSSES],
    ids=name,
)
def test_copies_are_the_program_with_the_worst_copy_written_out(loss, n_classes):
    D = few_patterns(small_data(loss.task, n_classes)[0], 12)
    program = copied(small_program(loss, LpBall(2, 0.0), "hard", n_classes=n_classes, D=D))
    variables = [[cp.Variable(program.shape[1:]) for _ in range(program.n_outputs)] for _ in "VW"]
    z = [
        cp.sum(cp.multiply(D, program.X @ (v - w)), axis=1) for v, w in zip(*variables, strict=True)
    ]
    losses = loss_by_hand(loss, z, program.y)
    worst = [cp.max(losses[np.flatnonzero(COPY_OF == k)]) for k in range(5)]
    value = cp.sum(cp.multiply(program.sample_weight / 7.5, cp.hstack(worst)))
    value += 0.02 * sum(cp.sum(cp.norm(u, 2, axis=0)) for U in variables for u in U)
    cones = [cp.multiply(program.signs, program.X @ u) >= 0 for U in variables for u in U]
    expected = cp.Problem(cp.Minimize(value), cones).solve(solver=cp.CLARABEL)
    solution = ConicSolver().solve(program)
    assert solution.objective == pytest.approx(expected, rel=1e-5)
    assert solution.relative_gap <= 1e-4


@pytest.mark.parametrize(
    ("loss", "ball", "n_classes"),
    [(loss, BALLS[2], 2) for loss in LOSSES] + [(loss, BALLS[1], 3) for loss in MARGIN_LOSSES],
    ids=name,
)
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_lower_bound_of_copies(loss, ball, n_classes, formulation):
    D = few_patterns(small_data(loss.task, n_classes)[0])
    program = copied(small_program(loss, ball, formulation, n_classes=n_classes, D=D))
    solution = ConicSolver().solve(program)
    assert solution.lower_bound <= solution.objective * (1 + 1e-7)
    assert solution.relative_gap <= 1e-4
    rng = np.random.default_rng(0)
    for scale in (0.01, 1.0):
        noise = [scale * rng.normal(size=a.shape) for a in (solution.multipliers.margins,) * 2]
        for margins in (noise[0], solution.multipliers.margins + noise[1]):
            moved = solution.multipliers._replace(margins=margins)
            assert program.lower_bound(moved) <= solution.objective * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_backends_agree_on_copies(loss):
    program = copied(small_program(loss, BALLS[2], D=few_patterns(small_data(loss.task)[0])))
    V, W = random_weights(program)
    rows = replace(program, copy_of=None, sample_weight=None)
    losses = loss.value(xp, rows.margins(xp, V, W))
    worst = np.array([losses[COPY_OF == k].max() for k in range(5)])
    expected = program.weight @ worst + program.penalty(xp, V, W)
    assert program.objective(xp, V, W) == pytest.approx(expected, rel=1e-12)
    tensors = torch.as_tensor(V), torch.as_tensor(W)
    assert program.objective(torch_backend, *tensors).item() == pytest.approx(expected, rel=1e-9)
    expressions = [[cp.Constant(u) for u in U] for U in (V, W)]
    assert program.objective(cvxpy_backend, *expressions).value == pytest.approx(expected, rel=1e-9)


def test_single_copies_are_no_copies():
    program = small_program(Logistic(), BALLS[2], D=few_patterns(small_data()[0]))
    single = replace(program, copy_of=np.arange(9))
    one, other = (ConicSolver().solve(p) for p in (program, single))
    assert one.objective == pytest.approx(other.objective, rel=1e-6)
    assert single.lower_bound(one.multipliers) == program.lower_bound(one.multipliers)


def test_solver_compiles_again_for_other_copies():
    solver, program = (
        ConicSolver(),
        small_program(Hinge(), BALLS[2], D=few_patterns(small_data()[0])),
    )
    program = replace(program, y=program.y[COPY_OF])
    alone, together = program, replace(program, copy_of=COPY_OF)
    assert solver.solve(alone).objective != pytest.approx(
        solver.solve(together).objective, rel=1e-3
    )
    assert solver.solve(together).relative_gap <= 1e-4


def test_zero_multipliers_give_the_trivial_bound():
    program = small_program(Squared(), BALLS[0])
    P = program.D.shape[1]
    empty = [np.zeros((len(program.X), P))]
    zero = Multipliers(np.zeros((9, 2)), {0: np.zeros_like(program.X)}, empty, empty)
    assert program.lower_bound(zero) == 0.0


def test_prox_is_the_minimiser():
    rng = np.random.default_rng(0)
    penalty, U, step = GroupLasso(0.7), rng.normal(size=(3, 6)), 0.9
    Z = penalty.prox(xp, U, step)

    def value(Z):
        return 0.5 * np.sum((Z - U) ** 2) + step * penalty.value(xp, Z)

    assert np.any(np.all(Z == 0, axis=0))
    for _ in range(200):
        assert value(Z) <= value(Z + 0.1 * rng.normal(size=Z.shape)) + 1e-12
    torch_prox = penalty.prox(torch_backend, torch.as_tensor(U), step)
    np.testing.assert_allclose(torch_prox.numpy(), Z)


class TestBadInput:
    def program(self, **changes):
        X, y = small_data()
        arguments = {
            "X": X,
            "y": y,
            "D": few_patterns(X),
            "loss": Hinge(),
            "regularizer": GroupLasso(0.1),
            "perturbation": LpBall(2, 0.1),
        }
        return ConvexProgram(**{**arguments, **changes})

    def test_formulation(self):
        with pytest.raises(ValueError, match="formulation must be one of"):
            self.program(formulation="medium")

    def test_patterns_of_other_data(self):
        with pytest.raises(ValueError, match="patterns have shape"):
            self.program(D=np.ones((4, 2)))
        with pytest.raises(ValueError, match="only 0 and 1"):
            self.program(D=np.full((9, 2), 0.5))

    def test_labels(self):
        with pytest.raises(ValueError, match="y must hold only"):
            self.program(y=np.arange(9))
        with pytest.raises(ValueError, match="y has 3 entries"):
            self.program(y=np.ones(3))

    def test_weights(self):
        with pytest.raises(ValueError, match="sample_weight"):
            self.program(sample_weight=-np.ones(9)).weight  # noqa: B018

    @pytest.mark.parametrize(
        ("copy_of", "message"),
        [
            (np.zeros(4, int), "one integer for each of the 9 rows"),
            (np.zeros(9), "one integer"),
            (np.full(9, 3), "each at least once"),
            (np.arange(9) - 1, "each at least once"),
        ],
    )
    def test_copies(self, copy_of, message):
        with pytest.raises(ValueError, match=message):
            self.program(copy_of=copy_of)

    def test_weights_of_copies_are_those_of_samples(self):
        with pytest.raises(ValueError, match="sample_weight"):
            self.program(copy_of=COPY_OF, sample_weight=np.ones(9)).weight  # noqa: B018

    def test_beta(self):
        with pytest.raises(ValueError, match="beta must be"):
            GroupLasso(-1.0)

    def test_several_outputs_for_regression(self):
        with pytest.raises(ValueError, match="n_outputs"):
            self.program(loss=Squared(), n_outputs=3)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e300, 1e-300])
def test_lower_bound_holds_for_multipliers_that_are_no_numbers(junk):
    program = small_program(Hinge(), BALLS[2], "hard", D=few_patterns(small_data()[0]))
    optimum = ConicSolver().solve(program).objective
    margins, slope = np.full((9, 1), 0.01), np.full(program.X.shape, 0.001)
    cones = np.full((9, program.D.shape[1]), 0.01)
    for field in (margins, slope, cones):
        kept, field[::2] = field[::2].copy(), junk
        with np.errstate(all="ignore"):
            bound = program.lower_bound(Multipliers(margins, {0: slope}, [cones], [cones]))
        assert 0.0 <= bound <= optimum * (1 + 1e-6)
        field[::2] = kept


def test_bounds_pay_for_the_rounding_of_large_features():
    """Features of size 1e9 around a large mean: terms of 1e9 cancel in margins and residuals."""
    X, _ = small_data()
    far = small_program(Hinge(), LpBall(np.inf, 0.1), D=few_patterns(X))
    far = replace(far, X=np.hstack([X[:, :2] + 1e9, X[:, 2:]]))
    V, W = random_weights(far)
    slack = far.margins(xp, V, W) - far.safe_margins(V, W)
    exact = exact_margins_in_rationals(far, V, W)
    error = np.abs(
        np.array(
            [
                float(Fraction(m) - e)
                for m, e in zip(far.margins(xp, V, W)[:, 0], exact, strict=True)
            ]
        )
    )
    assert error.max() > 0
    assert np.all(error <= slack[:, 0])


def exact_margins_in_rationals(program, V, W):
    """Return the margins of a soft l-inf hinge program without bounds in rational arithmetic."""
    X, D, v, w = (np.vectorize(Fraction)(A) for A in (program.X, program.D, V[0], W[0]))
    radius = np.vectorize(Fraction)(program.sets.radius * program.sets.weights[0])
    margins = []
    for k, label in enumerate(program.y):
        slope = (v - w) @ D[k]
        margin = int(label) * (X[k] @ slope) - radius @ np.abs(slope)
        U = w if label > 0 else v
        for i in range(U.shape[1]):
            gap = radius @ np.abs(U[:, i]) - (2 * D[k, i] - 1) * (X[k] @ U[:, i])
            margin -= max(gap, Fraction(0))
        margins.append(margin)
    return margins
