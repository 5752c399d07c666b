"""The compiled iteration of `ADMM` is the one on tensors."""

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from convexrobust import (
    ConvexProgram,
    GroupLasso,
    Hinge,
    Logistic,
    LpBall,
    Solution,
    SquaredHinge,
    duality,
    sample_patterns,
)
from convexrobust.solvers import ADMM, InteriorPoint, compiled
from convexrobust.solvers.admm import fused
from convexrobust.solvers.admm.splitting import Splitting
from convexrobust.solvers.tensors import scalar_like
from tests.cases import LOSSES, name, small_data

pytest.importorskip("numba")

NOMINAL, ROBUST = LpBall(np.inf, 0.0), LpBall(np.inf, 0.1)
BOUNDED = LpBall(np.inf, 0.1, (-6.0, 6.0))


def program_of(loss=None, ball=ROBUST, formulation="soft", n_classes=2, n=30, P=7, **options):
    loss = loss or Hinge()
    X, y = small_data(loss.task, n_classes, n)
    D = sample_patterns(X, P, random_state=0)
    outputs = n_classes if n_classes > 2 else 1
    beta = GroupLasso(0.02)
    return ConvexProgram(X, y, D, loss, beta, ball, formulation, n_outputs=outputs, **options)


def iterated(splitting, n_steps):
    """Take steps, the weights balanced in between."""
    splitting.advance(n_steps)
    splitting.balance()
    splitting.advance(n_steps)
    return splitting


def arrays(splitting):
    """Return everything that the next iteration or a certificate depends on."""
    (s, *others), (z, x, *products) = splitting.state, splitting.found
    weights = torch.tensor(splitting.weights())
    return [a for a in (*s, *others, *z, *x, *products, weights) if a is not None]


def is_fused(splitting):
    return isinstance(splitting.iteration, fused.FusedIteration)


def away_from_ties(program):
    """Return a start: near 0 cut weights of boxes tie with others, and rounding chooses."""
    V, W = np.random.default_rng(0).normal(size=(2, *program.shape))
    return Solution(V, W, np.inf)


def assert_same_iterates(program, dtype="float64", rtol=1e-7, start=None):
    like = scalar_like(dtype, "cpu")
    in_one, on_tensors = (Splitting(program, like, start, fused=by) for by in (True, False))
    assert is_fused(in_one)
    assert not is_fused(on_tensors)
    pairs = zip(arrays(iterated(in_one, 20)), arrays(iterated(on_tensors, 20)), strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert float(torch.abs(a - b).max()) <= rtol * float(torch.abs(b).max())


@pytest.mark.parametrize("ball", [NOMINAL, ROBUST, BOUNDED], ids=["nominal", "shared", "boxes"])
@pytest.mark.parametrize("formulation", ["soft", "one-sided", "hard"])
def test_iterates_are_those_on_tensors(ball, formulation):
    program = program_of(ball=ball, formulation=formulation)
    assert_same_iterates(program, start=away_from_ties(program))


@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("formulation", ["soft", "hard"])
def test_for_every_loss(loss, formulation):
    assert_same_iterates(program_of(loss, formulation=formulation))


@pytest.mark.parametrize("ball", [NOMINAL, ROBUST, BOUNDED], ids=["nominal", "shared", "boxes"])
@pytest.mark.parametrize("formulation", ["soft", "one-sided", "hard"])
def test_for_several_classes(ball, formulation):
    program = program_of(ball=ball, formulation=formulation, n_classes=3)
    assert_same_iterates(program, start=away_from_ties(program))


@pytest.mark.parametrize("loss", [Hinge(), Logistic()], ids=name)
@pytest.mark.parametrize("formulation", ["soft", "hard"])
def test_two_classes_with_an_output_each(loss, formulation):
    """There is one margin for the two outputs."""
    program = program_of(loss, formulation=formulation)
    program = replace(program, y=(program.y > 0).astype(int), n_outputs=2)
    assert_same_iterates(program)
    found, exact = ADMM(1e-3, 5000).solve(program), InteriorPoint(1e-6).solve(program)
    assert found.status == "optimal"
    assert found.objective == pytest.approx(exact.objective, rel=2e-3)


@pytest.mark.parametrize("by_numba", [True, False])
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.task == "regression"], ids=name)
@pytest.mark.parametrize("formulation", ["soft", "hard"])
def test_margins_that_no_multiplier_moves(loss, formulation, by_numba, monkeypatch):
    """Without intercept those of rows that are 0, or whose boxes hold 0."""
    if not by_numba:
        monkeypatch.setattr(fused, "compiles", lambda program: False)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 2))
    X[5] = 0.0
    y = np.abs(X[:, 0]) + 0.3 * X[:, 1] + 0.1 * rng.normal(size=200) + 0.5
    D, ball = sample_patterns(X, 8, random_state=0), LpBall(np.inf, 0.3)
    program = ConvexProgram(X, y, D, loss, GroupLasso(0.01), ball, formulation, intercept=False)
    found, exact = ADMM(1e-2, 5000).solve(program), InteriorPoint(1e-6).solve(program)
    assert found.status == "optimal"
    assert found.objective == pytest.approx(exact.objective, rel=2e-2)


@pytest.mark.parametrize("loss", [SquaredHinge(), Logistic()], ids=name)
@pytest.mark.parametrize("formulation", ["soft", "hard"])
def test_for_every_loss_of_several_classes(loss, formulation):
    weight = np.linspace(0.5, 2.0, 60)
    weight[[3, 7]] = 0.0
    options = {"n_classes": 5, "n": 60, "sample_weight": weight}
    assert_same_iterates(program_of(loss, formulation=formulation, **options))


@pytest.mark.parametrize("formulation", ["soft", "hard"])
def test_for_margins_at_a_scale(formulation):
    class Doubled(Hinge):
        margin_scales = 2.0

    program = program_of(Doubled(), formulation=formulation, n_classes=3)
    assert_same_iterates(program, start=away_from_ties(program))


def test_probabilities_that_fall_steeply_with_the_multipliers():
    """Where many slacks are open the true class's probability falls by far more than e a step."""
    X = np.random.default_rng(0).normal(size=(300, 11))
    y, D = np.argmax(X[:, :5] + 0.6 * X[:, :5] ** 2, axis=1), sample_patterns(X, 60, random_state=0)
    assert_same_iterates(
        ConvexProgram(X, y, D, Logistic(), GroupLasso(1e-3), ROBUST, "soft", n_outputs=5)
    )


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("ball", [NOMINAL, ROBUST, LpBall(np.inf, 0.1, (-3.0, 3.0))], ids=repr)
def test_with_more_features_than_rows(ball, n_classes):
    rng = np.random.default_rng(0)
    X, y = np.clip(rng.normal(size=(12, 40)), -3.0, 3.0), np.arange(12) % n_classes
    program = ConvexProgram(
        *(X, y if n_classes > 2 else 2 * y - 1, sample_patterns(X, 8, random_state=0), Hinge()),
        *(GroupLasso(0.02), ball, "soft"),
        n_outputs=n_classes if n_classes > 2 else 1,
    )
    assert_same_iterates(program, start=away_from_ties(program))


def test_with_weights_and_features_that_are_not_perturbed():
    weight = np.linspace(0.5, 2.0, 30)
    ball = LpBall(np.inf, np.array([0.1, 0.0]))
    assert_same_iterates(program_of(ball=ball, sample_weight=weight))


@pytest.mark.parametrize("by_numba", [True, False])
@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_samples_of_no_weight_change_nothing(loss, by_numba, monkeypatch):
    if not by_numba:
        monkeypatch.setattr(fused, "compiles", lambda program: False)
    weight = np.ones(30)
    weight[[3, 7, 8]] = 0.0
    program, kept = program_of(loss, sample_weight=weight), weight > 0.0
    without = replace(
        program, X=program.X[kept], y=program.y[kept], D=program.D[kept], sample_weight=None
    )
    found, aim = (ADMM(1e-3, 3000).solve(p) for p in (program, without))
    assert found.status == aim.status == "optimal"
    assert found.objective == pytest.approx(aim.objective, rel=2e-3)


def test_in_single_precision():
    assert_same_iterates(program_of(), "float32", rtol=1e-3)


@pytest.mark.parametrize("ball", [ROBUST, BOUNDED], ids=["shared", "boxes"])
def test_a_start_is_taken_over(ball):
    program = program_of(ball=ball)
    rough = ADMM(1e-2).solve(program)
    again, afresh = (ADMM(1e-5, 5000).solve(program, start) for start in (rough, None))
    assert again.status == afresh.status == "optimal"
    assert again.objective == pytest.approx(afresh.objective, rel=2e-5)
    assert again.history[0].objective < afresh.history[0].objective


@pytest.mark.parametrize(
    "program",
    [
        program_of(ball=LpBall(2, 0.1)),
        program_of(copy_of=np.arange(30) // 2),
    ],
    ids=["l2", "copies"],
)
def test_others_stay_on_tensors(program):
    assert not compiled.compiles(program)
    assert not is_fused(Splitting(program, scalar_like("float64", "cpu")))


def test_nominal_programs_of_any_ball():
    assert compiled.compiles(program_of(ball=LpBall(2, 0.0)))


def test_without_numba_or_with_many_threads_it_stays_on_tensors(monkeypatch):
    program, like = program_of(), scalar_like("float64", "cpu")
    compiled._numba_works.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert not is_fused(Splitting(program, like))
    compiled._numba_works.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: fused._FEW_THREADS + 1)
        assert not is_fused(Splitting(program, like))
    assert is_fused(Splitting(program, like))


def test_a_numba_that_cannot_be_imported_is_told(monkeypatch):
    program, like = program_of(), scalar_like("float64", "cpu")
    monkeypatch.setitem(sys.modules, "numba", None)  # its import fails
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    compiled._numba_works.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="cannot be imported"):
            assert not is_fused(Splitting(program, like))
    finally:
        compiled._numba_works.cache_clear()


def test_where_nothing_can_be_kept_it_compiles_all_the_same(monkeypatch):
    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, options)

    monkeypatch.setattr("numba.njit", njit)
    function, options = compiled.compiled(replace)
    assert function is replace
    assert "fastmath" in options


def test_multipliers_that_were_handed_out_stay():
    splitting = Splitting(program_of(), scalar_like("float64", "cpu"), None)
    splitting.advance(10)
    handed, V = splitting.multipliers(), splitting.point()[0]
    copies = handed.margins.copy(), handed.cones_v[0].copy(), handed.slopes[0].copy(), V.copy()
    splitting.advance(10)
    for a, b in zip((handed.margins, handed.cones_v[0], handed.slopes[0], V), copies, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("by_numba", [True, False])
@pytest.mark.parametrize("ball", [NOMINAL, ROBUST, BOUNDED], ids=["nominal", "shared", "boxes"])
def test_before_the_first_step_it_shows_the_start(ball, by_numba):
    """The weights and the dual point are those that it takes over."""
    program = program_of(ball=ball)
    start = ADMM(1e-3).solve(program)
    splitting = Splitting(program, scalar_like("float64", "cpu"), start, fused=by_numba)
    np.testing.assert_array_equal(splitting.point(), (start.V, start.W))
    found, given = splitting.multipliers(), duality.repaired(program, start.multipliers)
    pairs = [(found.margins, given.margins), (found.cones_v[0], given.cones_v[0])]
    pairs += [(found.slopes[e], slope) for e, slope in given.slopes.items() if found.slopes]
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=1e-9 * np.abs(given.margins).max())
    again = Splitting(program, scalar_like("float64", "cpu"), start, fused=by_numba)
    again.advance(5)
    np.testing.assert_array_equal(splitting.point(), (start.V, start.W))


@pytest.mark.parametrize("by_numba", [True, False])
def test_steps_at_once_are_steps_one_by_one(by_numba):
    """All that a step needs is in the state and the weights."""
    like, program = scalar_like("float64", "cpu"), program_of(ball=BOUNDED)
    at_once, one_by_one = (Splitting(program, like, fused=by_numba) for _ in range(2))
    at_once.advance(7)
    for _ in range(7):
        one_by_one.advance(1)
    for a, b in zip(arrays(at_once), arrays(one_by_one), strict=True):
        assert torch.equal(a, b)
