import numpy as np
import pytest

from convexrobust.losses import Hinge, Logistic, SquaredHinge
from convexrobust.perturbations import LpBall
from convexrobust.solvers import ConicSolver
from tests.cases import BALLS, LOSSES, name, small_program

pytest.importorskip("torch")

from convexrobust.solvers.admm import ADMM


def assert_optimal(program, tol=1e-3):
    reference = ConicSolver().solve(program)
    solution = ADMM(tol=tol, max_iter=20_000).solve(program)
    assert solution.status == "optimal"
    assert solution.relative_gap <= tol
    assert solution.lower_bound <= reference.objective * (1 + 1e-7)
    if program.formulation == "soft":
        assert reference.lower_bound * (1 - 1e-7) <= solution.objective
    assert solution.objective == pytest.approx(reference.objective, rel=2 * tol, abs=1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("formulation", ["soft", "one-sided", "hard"])
def test_agrees_with_clarabel_for_every_loss(loss, formulation):
    assert_optimal(small_program(loss, BALLS[2], formulation))


@pytest.mark.parametrize("ball", [*BALLS, LpBall(2, 0.0)], ids=name)
@pytest.mark.parametrize("formulation", ["soft", "hard"])
def test_agrees_with_clarabel_for_every_ball(ball, formulation):
    assert_optimal(small_program(Hinge(), ball, formulation))


@pytest.mark.parametrize("loss", [Hinge(), SquaredHinge(), Logistic()], ids=name)
@pytest.mark.parametrize("formulation", ["soft", "hard"])
def test_agrees_with_clarabel_for_three_classes(loss, formulation):
    assert_optimal(small_program(loss, LpBall(np.inf, 0.05), formulation, n_classes=3))
