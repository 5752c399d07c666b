from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from convexrobust.backends import numpy as xp
from convexrobust.losses import Hinge, Logistic, Squared, SquaredHinge
from convexrobust.patterns import sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import ADMM, ConicSolver
from convexrobust.solvers.admm import margin_prox
from convexrobust.solvers.admm.balance import Balance
from convexrobust.solvers.admm.margin_prox import MarginProx
from convexrobust.solvers.admm.reach import BoxReach, SharedReach
from tests.cases import BALLS, LOSSES, name, small_data


def program_of(loss, ball, formulation="soft", *, n_classes=2, n=24, P=6, **options):
    X, y = small_data(loss.task, n_classes, n)
    outputs = n_classes if n_classes > 2 else 1
    D = sample_patterns(X, P, random_state=0)
    return ConvexProgram(
        X, y, D, loss, GroupLasso(0.05), ball, formulation, n_outputs=outputs, **options
    )


def assert_optimal(program, tol=2e-3, **options):
    reference = ConicSolver().solve(program)
    solution = ADMM(tol, 10_000, **options).solve(program)
    assert solution.status == "optimal"
    assert abs(solution.relative_gap) <= tol
    assert solution.lower_bound <= reference.objective * (1 + 1e-7)
    assert all(row.lower_bound <= reference.objective * (1 + 1e-7) for row in solution.history)
    assert solution.objective == pytest.approx(reference.objective, rel=2 * tol)


@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("formulation", ["soft", "hard"])
def test_agrees_with_clarabel_for_every_loss(loss, formulation):
    assert_optimal(program_of(loss, BALLS[2], formulation))


@pytest.mark.parametrize("ball", [*BALLS[1:], LpBall(2, 0.0)], ids=name)
def test_agrees_with_clarabel_for_every_ball(ball):
    assert_optimal(program_of(SquaredHinge(), ball))


def test_agrees_with_clarabel_for_the_l1_ball():
    assert_optimal(program_of(SquaredHinge(), BALLS[0], n=12, P=3), tol=1e-2)


def test_agrees_with_clarabel_for_one_sided_cones():
    assert_optimal(program_of(Hinge(), BALLS[2], "one-sided"))


@pytest.mark.parametrize("loss", [Hinge(), Logistic()], ids=name)
def test_agrees_with_clarabel_for_three_classes(loss):
    program = program_of(loss, LpBall(np.inf, 0.05), n_classes=3, n=15, P=3)
    assert_optimal(program, tol=1e-2)


@pytest.mark.parametrize("loss", [Hinge(), Squared()], ids=name)
def test_agrees_with_clarabel_for_copies(loss):
    copies = np.repeat(np.arange(8), 3)
    program = program_of(loss, LpBall(2, 0.0))
    y = program.y[copies] if loss.task == "classification" else program.y
    assert_optimal(replace(program, y=y, copy_of=copies))


def test_single_precision_and_sample_weights():
    weight = np.linspace(0.1, 2.0, 24)
    program = program_of(SquaredHinge(), BALLS[2], sample_weight=weight)
    assert_optimal(program, tol=1e-2, dtype="float32")


def test_goes_on_where_it_stopped():
    program = program_of(Hinge(), BALLS[2])
    with pytest.warns(ConvergenceWarning, match="ADMM stopped"):
        first = ADMM(1e-9, 400).solve(program)
    with pytest.warns(ConvergenceWarning, match="ADMM stopped"):
        second = ADMM(1e-9, 50).solve(program, first)
    with pytest.warns(ConvergenceWarning, match="ADMM stopped"):
        cold = ADMM(1e-9, 50).solve(program)
    assert second.gap <= 1.5 * first.gap < cold.gap


@pytest.mark.parametrize("ball", BALLS, ids=repr)
def test_the_logistic_loss_to_high_accuracy(ball):
    solution = ADMM(1e-7, 1000).solve(program_of(Logistic(), ball))
    assert solution.gap < 1e-7 * solution.objective


def test_the_balance_of_the_logistic_loss_has_its_root_everywhere():
    """Bends of all sizes, where Newton's method from elsewhere goes to and fro for ever."""
    rng = np.random.default_rng(0)
    n = 2000
    program = program_of(Logistic(), BALLS[0])
    program = replace(
        program, X=np.resize(program.X, (n, 3)), y=np.resize(program.y, n), D=np.ones((n, 1))
    )
    balance = Balance(program, torch.zeros((), dtype=torch.float64))
    constant = torch.as_tensor(rng.normal(size=(1, n)) * 10.0 ** rng.uniform(-2, 3, (1, n)))
    slope = torch.as_tensor(n * 10.0 ** rng.uniform(-6, 4, (1, n)))
    a = balance(constant, slope)
    expected = torch.sigmoid(-(constant + slope * a)) / n
    assert torch.allclose(a, expected, rtol=1e-6, atol=1e-12)


def test_a_device_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=r"device='cuda' is not usable .* use device='cpu'"):
        ADMM(device="cuda").solve(program_of(Hinge(), BALLS[2]))
    with pytest.raises(ValueError, match="dtype must be one of"):
        ADMM(dtype="float16").solve(program_of(Hinge(), BALLS[2]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    assert_optimal(program_of(SquaredHinge(), BALLS[2]), device="cuda")


@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("n_margins", [1, 3])
def test_balance_satisfies_its_equation(loss, n_margins):
    """a = -weight * dloss(m) at m = c + g a + k0 + k1 A, up to the ambiguity at a kink."""
    program = program_of(loss, BALLS[2])
    rng, n = np.random.default_rng(0), len(program.X)
    c, g = rng.normal(size=(n_margins, n)), rng.uniform(0.1, 3.0, size=(n_margins, n)) * n
    k0, k1 = rng.normal(size=n) / 3, rng.uniform(0.0, 1.0, size=n) * n
    tensors = [torch.as_tensor(value) for value in (c, g, k0, k1)]
    a = Balance(program, tensors[0])(*tensors[:2], tuple(tensors[2:])).numpy()
    margins = (c + g * a + k0 + k1 * a.sum(axis=0)).T
    shares = a.T / program.weight[:, None]
    # Fenchel-Young: equality holds exactly where a is minus a subgradient at the margins.
    total = loss.value(xp, margins) + loss.conjugate(shares) + np.sum(shares * margins, axis=1)
    np.testing.assert_allclose(total, 0.0, atol=1e-6)


@pytest.mark.parametrize("ball", [*BALLS[:3], LpBall(2, 0.0)], ids=name)
def test_blocks_of_rows_change_nothing(ball, monkeypatch):
    program = program_of(Hinge(), ball)
    options = {"max_iter": 60, "tol": 1e-9}
    with pytest.warns(ConvergenceWarning):
        whole = ADMM(**options).solve(program)
    monkeypatch.setattr(margin_prox, "_ROWS_IN_CACHE", 3)
    with pytest.warns(ConvergenceWarning):
        parts = ADMM(**options).solve(program)
    np.testing.assert_allclose(parts.V, whole.V, atol=1e-10)
    assert parts.lower_bound == pytest.approx(whole.lower_bound, rel=1e-9)


@pytest.mark.parametrize(
    ("loss", "ball"),
    [(loss, BALLS[2]) for loss in LOSSES] + [(Hinge(), ball) for ball in (*BALLS[:2], BALLS[5])],
    ids=name,
)
def test_steps_of_the_margins_reach_the_proximal_point(loss, ball):
    """Repeated, they solve a = -weight * dloss(m) at the margins of the slopes they return."""
    program = program_of(loss, ball)
    prox, n = MarginProx(program, torch.zeros((), dtype=torch.float64)), len(program.X)
    n_margins = program.margin_map.offsets.shape[1]
    given = torch.as_tensor(np.random.default_rng(0).normal(size=(n_margins, n, 3)))
    a = torch.zeros(n_margins, n, dtype=torch.float64)
    for _ in range(50):
        a, M = prox(given, 0.1 / n, a, lambda a: None)
    slopes, shares = M.numpy(), a.numpy().T / program.weight[:, None]
    centre = np.einsum("ekd,kd->ke", slopes, program.sets.center) + program.margin_map.offsets
    margins = centre - np.stack([program.sets.support(xp, Q) for Q in slopes], axis=1)
    total = loss.value(xp, margins) + loss.conjugate(shares) + np.sum(shares * margins, axis=1)
    np.testing.assert_allclose(total, 0.0, atol=1e-6)


@pytest.mark.parametrize("ball", BALLS[:5], ids=name)
def test_steps_of_the_reaches_reach_the_proximal_point(ball):
    """Repeated, they minimise beta |z| + rho_z/2 |z - z0|^2 + rho_a/2 (A - A0)^2, rho(z) <= A."""
    reach = SharedReach(program_of(Hinge(), ball).sets, torch.zeros((), dtype=torch.float64))
    rng = np.random.default_rng(0)
    Z0, A0 = rng.normal(size=(2, 1, 3, 2)), rng.normal(size=(2, 1, 2)) / 3
    rho_z, rho_a, beta = 2.0, 5.0, 0.6
    last = torch.zeros(2, 1, 2, dtype=torch.float64)
    for _ in range(100):
        Z, A = reach.prox(torch.as_tensor(Z0), rho_z, torch.as_tensor(A0), rho_a, beta, last)
    for index in np.ndindex(2, 1, 2):
        side, output, neuron = index
        z, bound = cp.Variable(3), cp.Variable()
        norm = cp.norm(cp.multiply(reach.axes.numpy(), z), {1: "inf", 2: 2, np.inf: 1}[ball.p])
        cost = beta * cp.norm(z, 2) + rho_a / 2 * cp.square(bound - A0[index])
        cost += rho_z / 2 * cp.sum_squares(z - Z0[side, output, :, neuron])
        cp.Problem(cp.Minimize(cost), [norm <= bound]).solve(solver=cp.CLARABEL)
        least = cost.value
        z.value, bound.value = Z[side, output, :, neuron].numpy(), A[index].numpy()
        assert norm.value <= bound.value + 1e-12
        assert cost.value == pytest.approx(least, abs=1e-7)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
def test_steps_of_reaches_of_boxes_reach_the_proximal_point(ratio):
    """The factor of the group norm is bisected here; Newton's steps alone may go to and fro."""
    rng = np.random.default_rng(0)
    shape, rho_z, beta = (2, 1, 5, 2000), 3.0, 0.5
    Z0, A0 = torch.as_tensor(rng.normal(size=(2, *shape)) * [[[[[0.5]]]], [[[[0.1]]]]])
    reach, rho_a = BoxReach(program_of(Hinge(), BALLS[-1]).sets, Z0[0, 0, 0, 0]), rho_z / ratio
    last = torch.zeros(2, 1, 2000, dtype=torch.float64)
    for _ in range(20):
        Z, A = reach.prox(Z0, rho_z, A0, rho_a, beta, last)
    low, high = torch.zeros(2, 1, 1, 2000), torch.ones(2, 1, 1, 2000)
    for _ in range(60):
        s = (low + high) / 2.0
        t = ((s * Z0.abs() - A0) / (1.0 / rho_a + s / rho_z)).clamp_min(0.0)
        thresholded = (Z0.abs() - t / rho_z).clamp_min(0.0)
        length = thresholded.norm(dim=-2, keepdim=True).clamp_min(1e-30)
        short = s < (1.0 - beta / rho_z / length).clamp_min(0.0)
        low, high = torch.where(short, s, low), torch.where(short, high, s)
    expected = Z0.sign() * thresholded * (1.0 - beta / rho_z / length).clamp_min(0.0)
    assert torch.allclose(Z, expected, rtol=0.0, atol=1e-6)
    assert torch.allclose(A, torch.maximum(expected.abs(), A0 + t / rho_a), rtol=0.0, atol=1e-6)


def test_ctrl_c_before_the_first_iteration(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("convexrobust.solvers.admm.splitting.MarginProx", interrupted)
    with pytest.warns(ConvergenceWarning, match="interrupted"):
        solution = ADMM().solve(program_of(Hinge(), BALLS[2]))
    assert not solution.V.any()
    assert solution.state is None


@pytest.mark.parametrize("formulation", ["soft", "hard"])
def test_what_is_handed_out_stays_as_it_was(formulation):
    """The iteration works in place: the dual point of the best bound must be a copy."""
    program = program_of(Hinge(), BALLS[2], formulation)
    with pytest.warns(ConvergenceWarning):
        solution = ADMM(1e-12, 150).solve(program)
    assert program.lower_bound(solution.multipliers) == solution.lower_bound
    assert program.solution(solution.V, solution.W).objective == solution.objective
    again = [u.copy() for u in (solution.V, solution.multipliers.margins)]
    with pytest.warns(ConvergenceWarning):
        ADMM(1e-12, 50).solve(program, solution)
    for before, now in zip(again, (solution.V, solution.multipliers.margins), strict=True):
        np.testing.assert_array_equal(now, before)
