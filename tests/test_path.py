import sys
from dataclasses import replace

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import scale

from convexrobust import ConicSolver, ConvexRobustClassifier, ConvexRobustRegressor, Solution
from convexrobust.estimators.path import largest_beta, regularization_path
from convexrobust.losses import Hinge, Logistic, Squared, SquaredHinge
from convexrobust.patterns import sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import FORMULATIONS
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import ProgramRefusedError, conic
from tests.cases import name, small_data, small_program

EPSILONS = [0.05, 0.2]


def data(load, n_features=4):
    X, y = load(return_X_y=True)
    rows = np.linspace(0, len(X) - 1, 40).astype(int)
    return scale(X)[rows, :n_features], (scale(y) if load is load_diabetes else y)[rows]


CLASSIFIER = ConvexRobustClassifier(n_patterns=4, solver=ConicSolver(), random_state=0)
CASES = {
    "two classes": (CLASSIFIER, load_breast_cancer),
    "three classes": (CLASSIFIER, load_iris),
    "one-versus-rest": (clone(CLASSIFIER).set_params(multi_class="ovr"), load_iris),
    "regression": (
        ConvexRobustRegressor(n_patterns=4, solver=ConicSolver(), random_state=0),
        load_diabetes,
    ),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request):
    estimator, load = request.param
    X, y = data(load)
    return regularization_path(estimator, X, y, epsilons=EPSILONS), estimator, X, y


def test_objectives_are_those_of_independent_fits(case):
    path, estimator, X, y = case
    for i, epsilon in enumerate(path.epsilons):
        for j in (1, 4, 7):
            alone = clone(estimator).set_params(epsilon=epsilon, beta=path.betas[j]).fit(X, y)
            assert path.objectives[i, j] == pytest.approx(alone.objective_, rel=1e-4)
            np.testing.assert_array_equal(path.estimators[i][j].patterns_, alone.patterns_)


def test_tables_move_as_they_must(case):
    path, *_ = case
    assert np.all(np.diff(path.betas) < 0.0)
    np.testing.assert_allclose(path.betas[-1], 1e-3 * path.betas[0])
    assert np.all(path.lower_bounds <= path.objectives)
    assert np.all(np.diff(path.objectives, axis=1) <= 1e-4 * path.objectives[:, :1])
    assert np.all(np.diff(path.objectives, axis=0) >= -1e-4 * path.objectives[1])
    # Along beta the penalty of an optimum can only grow; the slack is for what the gaps leave.
    growth = np.diff(path.penalties, axis=1)
    gaps = (path.objectives - path.lower_bounds)[:, :-1] / -np.diff(path.betas)
    assert np.all(growth >= -2.0 * gaps - 1e-2 * path.penalties[:, 1:])
    assert np.all(path.n_neurons[:, 0] == 0)
    assert np.all(path.n_neurons[:, -1] > 0)
    assert np.all(path.seconds > 0.0)


def test_estimators_are_fitted_ones_of_their_own(case):
    path, estimator, X, y = case
    for i, j in np.ndindex(path.objectives.shape):
        model = path.estimators[i][j]
        assert (model.epsilon, model.beta) == (path.epsilons[i], path.betas[j])
        assert model.objective_ == path.objectives[i, j]
        assert model.network_.n_neurons == path.n_neurons[i, j]
        assert model.solver is estimator.solver
    assert not hasattr(estimator, "network_")
    best = path.estimators[0][-1]
    least = LinearRegression().fit(X, y).score(X, y) if y.dtype == float else 0.8
    assert best.score(X, y) > least
    assert best.robust_score(X, y) <= best.score(X, y)


def test_the_first_beta_is_that_of_the_programs_of_fit(case):
    path, estimator, X, y = case
    smallest = clone(estimator).set_params(epsilon=EPSILONS[0])
    largest = max(largest_beta(program) for program in smallest.programs(X, y))
    np.testing.assert_allclose(path.betas[0], largest)


@pytest.mark.parametrize(("label", "n_compiled"), [("two classes", 1), ("one-versus-rest", 3)])
def test_problem_is_compiled_once_for_each_program(monkeypatch, label, n_compiled):
    compiled = []

    class Counted(conic._Compiled):
        def __init__(self, program):
            compiled.append(program)
            super().__init__(program)

    monkeypatch.setattr(conic, "_Compiled", Counted)
    estimator, load = CASES[label]
    regularization_path(estimator, *data(load), betas=[0.1, 0.01], epsilons=EPSILONS)
    assert len(compiled) == n_compiled


class Growing:
    """A solver that adds one pattern to the first program, and notes where it starts."""

    def __init__(self, calls):
        self.calls = calls

    def __deepcopy__(self, memo):  # the list is to be seen from outside
        return self

    def solve(self, program, start=None) -> Solution:
        self.calls.append((program, start))
        n_patterns = program.D.shape[1] + (start is None)
        V = np.full((*program.shape[:2], n_patterns), 1e-3 * len(self.calls))
        D = np.hstack([program.D, 1 - program.D[:, :1]]) if start is None else None
        return Solution(V, V, objective=1.0, D=D)


def test_patterns_are_sampled_once_and_those_of_the_solver_stay():
    np.random.seed(1)  # noqa: NPY002 -- at some, the pattern that the solver adds is sampled too
    calls = []
    estimator = ConvexRobustClassifier(n_patterns=3, solver=Growing(calls))  # no seed
    X, y = data(load_breast_cancer)
    path = regularization_path(estimator, X, y, betas=[0.1, 0.01, 0.2], epsilons=EPSILONS)
    assert all(model.patterns_.shape[1] == 4 for row in path.estimators for model in row)
    sampled, added = calls[0][0].D, 1 - calls[0][0].D[:, :1]
    everything = {column.tobytes() for column in np.hstack([sampled, added]).T}
    for program, _ in calls[1:]:
        assert {column.tobytes() for column in program.D.T} == everything
    beta = [(p.perturbation.epsilon, p.regularizer.beta) for p, _ in calls]
    assert beta == [(e, b) for e in EPSILONS for b in (0.2, 0.1, 0.01)]
    # From the last one; at a new epsilon from the last one with the largest beta.
    found = [None if start is None else round(1e3 * start.V[0, 0, 0]) for _, start in calls]
    assert found == [None, 1, 2, 1, 4, 5]


def test_one_radius_per_feature_keeps_its_shape():
    X, y = data(load_breast_cancer)
    estimator = clone(CLASSIFIER).set_params(epsilon=np.array([0.1, 0.2, 0.0, 0.05]))
    path = regularization_path(estimator, X, y, betas=[0.01])
    np.testing.assert_allclose(path.estimators[0][0].epsilon, estimator.epsilon)
    path = regularization_path(estimator, X, y, betas=[0.01], epsilons=[0.4])
    np.testing.assert_allclose(path.estimators[0][0].epsilon, 2.0 * estimator.epsilon)


@pytest.mark.parametrize(("epsilons", "tol"), [([0.0, 0.1], 1e-2), ([0.0], 1e-3)], ids=str)
def test_the_largest_radius_decides_on_the_gap(epsilons, tol):
    X, y = data(load_breast_cancer)
    path = regularization_path(ConvexRobustClassifier(), X, y, betas=[0.1], epsilons=epsilons)
    assert [row[0].solver_.tol for row in path.estimators] == [tol] * len(epsilons)


def test_weights_are_repeated_rows():
    X, y = data(load_breast_cancer)
    weight = np.random.default_rng(0).integers(0, 3, len(y))
    weighted = regularization_path(CLASSIFIER, X, y, betas=[0.01], sample_weight=weight)
    repeated = regularization_path(CLASSIFIER, X.repeat(weight, 0), y.repeat(weight), betas=[0.01])
    np.testing.assert_allclose(weighted.objectives, repeated.objectives, rtol=1e-9)


class TestLargestBeta:
    @staticmethod
    def program(loss, epsilon, formulation, n_classes=2):
        D = sample_patterns(small_data(loss.task, n_classes)[0], 5, random_state=0)
        ball = LpBall(np.inf, epsilon)
        return small_program(loss, ball, formulation, n_classes=n_classes, D=D)

    @staticmethod
    def n_neurons(program, share):
        beta = GroupLasso(share * largest_beta(program))
        solution = ConicSolver().solve(replace(program, regularizer=beta))
        return np.count_nonzero(np.linalg.norm(np.stack([solution.V, solution.W]), axis=2))

    @pytest.mark.parametrize("loss", [Hinge(), SquaredHinge(), Logistic(), Squared()], ids=name)
    @pytest.mark.parametrize("formulation", FORMULATIONS)
    def test_is_exact_without_perturbations(self, loss, formulation):
        program = self.program(loss, 0.0, formulation)
        assert self.n_neurons(program, 1.0) == 0
        assert self.n_neurons(program, 0.9) > 0

    def test_is_exact_for_three_classes_of_the_logistic_loss(self):
        program = self.program(Logistic(), 0.0, "soft", 3)
        assert self.n_neurons(program, 1.0) == 0
        assert self.n_neurons(program, 0.9) > 0

    @pytest.mark.parametrize("formulation", FORMULATIONS)
    @pytest.mark.parametrize(("loss", "n_classes"), [(Hinge(), 2), (Hinge(), 3), (Squared(), 2)])
    def test_is_an_upper_bound_otherwise(self, loss, n_classes, formulation):
        assert self.n_neurons(self.program(loss, 0.1, formulation, n_classes), 1.0) == 0


class TestPlot:
    def test_lines_and_bands(self, case):
        pyplot = pytest.importorskip("matplotlib.pyplot")
        path, *_ = case
        ax = path.plot()
        assert len(ax.lines) == len(ax.collections) == len(EPSILONS)
        np.testing.assert_array_equal(ax.lines[1].get_ydata(), path.objectives[1])
        given = pyplot.figure().add_subplot()
        assert path.plot(given) is given
        pyplot.close("all")

    def test_missing_matplotlib_is_named(self, case, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        with pytest.raises(ImportError, match=r"convexrobust\[plot\]"):
            case[0].plot()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"betas": [0.1, -1.0]}, "betas must be"),
        ({"betas": []}, "betas must be"),
        ({"betas": 0.1}, "betas must be"),
        ({"epsilons": [np.nan]}, "epsilons must be"),
        ({"epsilons": [[0.1]]}, "epsilons must be"),
    ],
)
def test_bad_grids_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        regularization_path(CLASSIFIER, *data(load_breast_cancer), **arguments)


def test_other_bad_arguments_are_named():
    X, y = data(load_diabetes)
    with pytest.raises(TypeError, match="estimator must be"):
        regularization_path(LinearRegression(), X, y)
    with pytest.raises(ValueError, match="estimator must have one program"):
        regularization_path(clone(CLASSIFIER).set_params(formulation="exchange"), X, y > 0)
    for solver in ("admm", ConicSolver):
        with pytest.raises(ValueError, match="solver must be an object with solve"):
            regularization_path(ConvexRobustRegressor(solver=solver), X, y)
    with pytest.raises(ValueError, match="betas has no default"):
        regularization_path(ConvexRobustRegressor(n_patterns=2), X, np.zeros(len(y)))


def test_a_solver_is_asked_about_every_radius_before_the_first_fit():
    class Nominal(ConicSolver):
        def refusal(self, program):
            return None if program.sets.unperturbed else "Nominal takes no perturbation."

        def solve(self, program, start=None):
            raise AssertionError("a path that cannot be finished was begun")

    X, y = data(load_breast_cancer)
    model = clone(CLASSIFIER).set_params(solver=Nominal())
    with pytest.raises(ProgramRefusedError, match="takes no perturbation"):
        regularization_path(model, X, y, betas=[0.1], epsilons=[0.0, 0.1])
