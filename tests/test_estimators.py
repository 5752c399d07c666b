import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

from convexrobust import (
    Absolute,
    ConicSolver,
    ConvexRobustClassifier,
    ConvexRobustRegressor,
    Exchange,
    Hinge,
    InteriorPoint,
    Logistic,
    Squared,
    SquaredHinge,
    WorkingSet,
)


@pytest.fixture(scope="module")
def cancer():
    X, y = load_breast_cancer(return_X_y=True)
    X, y = scale(X)[:, :8], np.array(["malignant", "benign"])[y]
    return X[:80], y[:80], X[80:160], y[80:160]


@pytest.fixture(scope="module")
def fitted(cancer):
    model = ConvexRobustClassifier(epsilon=0.1, n_patterns=6, random_state=0)
    return model.fit(*cancer[:2])


@parametrize_with_checks(
    [
        ConvexRobustClassifier(n_patterns=6),
        ConvexRobustClassifier(loss=Logistic(), multi_class="ovr", n_patterns=4),
        ConvexRobustRegressor(n_patterns=6),
    ]
)
# On data without a signal, which some checks use, the zero network is the best one.
@pytest.mark.filterwarnings("ignore:The fitted network is constant")
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_fit_idempotent,
        estimator_checks.check_sample_weight_equivalence_on_dense_data,
        estimator_checks.check_estimators_pickle,
        estimator_checks.check_dict_unchanged,
        estimator_checks.check_n_features_in,
    ],
    ids=lambda check: check.__name__,
)
@pytest.mark.parametrize("model", [ConvexRobustClassifier(), ConvexRobustRegressor()], ids=repr)
@pytest.mark.filterwarnings("ignore:The fitted network is constant")
def test_scikit_learn_contract_with_generated_patterns(model, check):
    check(type(model).__name__, model)


class TestClassifier:
    def test_learned_attributes(self, fitted, cancer):
        X, y, *_ = cancer
        assert list(fitted.classes_) == ["benign", "malignant"]
        assert fitted.patterns_.shape == (80, 6)
        assert fitted.lower_bound_ <= fitted.objective_
        assert fitted.gap_ <= 1e-4 * fitted.objective_
        assert fitted.n_iter_ >= 1
        assert fitted.score(X, y) > 0.9

    def test_robust_scores_sandwich_the_truth(self, fitted, cancer):
        _, _, X, y = cancer
        for epsilon in (0.05, 0.1, 0.3):
            scores = {
                method: fitted.robust_score(X, y, epsilon=epsilon, method=method)
                for method in ("certified", "exact", "attack")
            }
            assert scores["certified"] <= scores["exact"] <= scores["attack"]
            assert scores["attack"] <= fitted.score(X, y)
        assert fitted.robust_score(X, y, epsilon=0.0) == fitted.score(X, y)
        assert fitted.robust_score(X, y) == fitted.robust_score(X, y, epsilon=0.1)

    def test_certified_radius_is_certified(self, fitted, cancer):
        _, _, X, y = cancer
        radius = fitted.certified_radius(X)
        correct = fitted.predict(X) == y
        for epsilon in (0.05, 0.2):
            assert np.mean(correct & (radius > epsilon)) == pytest.approx(
                fitted.robust_score(X, y, epsilon=epsilon), abs=1e-9
            )

    def test_labels_outside_the_classes_count_as_wrong(self, fitted, cancer):
        _, _, X, _ = cancer
        assert fitted.robust_score(X, np.full(len(X), "healthy")) == 0.0

    def test_same_seed_same_model_and_pickle(self, fitted, cancer):
        X, y, X_test, _ = cancer
        twin = clone(fitted).fit(X, y)
        expected = fitted.decision_function(X_test)
        np.testing.assert_array_equal(twin.decision_function(X_test), expected)
        copied = pickle.loads(pickle.dumps(fitted))
        np.testing.assert_array_equal(copied.decision_function(X_test), expected)

    def test_warm_start_only_improves(self, cancer):
        X, y, *_ = cancer
        model = ConvexRobustClassifier(n_patterns=4, warm_start=True, random_state=0).fit(X, y)
        objectives = [model.objective_]
        for _ in range(2):
            objectives.append(model.fit(X, y).objective_)
        assert np.all(np.diff(objectives) <= 1e-6)
        assert objectives[-1] < objectives[0]

    @pytest.mark.parametrize("formulation", ["hard", "one-sided"])
    def test_cone_formulations(self, cancer, formulation):
        X, y, *_ = cancer
        model = ConvexRobustClassifier(0.02, formulation=formulation, n_patterns=6, random_state=0)
        model.fit(X, y)
        assert model.solution_.cone_violation <= 1e-6
        assert model.robust_score(X, y) > 0.8

    def test_probabilities(self, cancer):
        X, y, *_ = cancer
        model = ConvexRobustClassifier(loss=Logistic(), n_patterns=3, random_state=0).fit(X, y)
        probabilities = model.predict_proba(X)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)
        np.testing.assert_array_equal(
            model.classes_[probabilities.argmax(axis=1)], model.predict(X)
        )
        np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), probabilities)
        assert not hasattr(ConvexRobustClassifier(), "predict_proba")

    def test_given_patterns_and_samplers(self, cancer):
        X, y, *_ = cancer
        for patterns in ("data", "means", "pca"):
            model = ConvexRobustClassifier(patterns=patterns, n_patterns=3, random_state=0)
            assert model.fit(X, y).patterns_.shape[1] == 3
        D = (X[:, :4] > 0).astype(int)
        assert ConvexRobustClassifier(patterns=D).fit(X, y).patterns_.shape == (80, 4)

    def test_bounds_and_immutable_features(self, cancer):
        X, y, *_ = cancer
        epsilon = np.full(X.shape[1], 0.2)
        epsilon[:4] = 0.0
        model = ConvexRobustClassifier(
            epsilon, bounds=(X.min(axis=0), X.max(axis=0)), n_patterns=3, random_state=0
        ).fit(X, y)
        everywhere = clone(model).set_params(epsilon=0.2, bounds=None).fit(X, y)
        assert model.objective_ < everywhere.objective_
        certified, attacked = (model.robust_score(X, y, method=m) for m in ("certified", "attack"))
        assert certified <= attacked


class TestMultiClass:
    @pytest.mark.parametrize("multi_class", ["joint", "ovr"])
    def test_iris(self, multi_class):
        X, y = load_iris(return_X_y=True)
        X = scale(X)[::3]
        y = np.array(["a", "b", "c"])[y][::3]
        model = ConvexRobustClassifier(multi_class=multi_class, n_patterns=4, random_state=0)
        model.fit(X, y)
        assert model.score(X, y) > 0.9
        assert model.decision_function(X).shape == (50, 3)
        scores = [model.robust_score(X, y, method=m) for m in ("certified", "exact", "attack")]
        assert scores == sorted(scores)
        assert model.lower_bound_ <= model.objective_
        radius = model.certified_radius(X)
        correct = model.predict(X) == y
        assert np.mean(correct & (radius > 0.1)) == pytest.approx(scores[0], abs=1e-9)

    def test_joint_training_certifies_more_than_independent_outputs(self):
        X, y = load_iris(return_X_y=True)
        X, y = scale(X)[::3], y[::3]
        joint, ovr = (
            ConvexRobustClassifier(multi_class=m, n_patterns=4, beta=1e-2, random_state=0)
            .fit(X, y)
            .robust_score(X, y)
            for m in ("joint", "ovr")
        )
        assert joint >= ovr

    def test_inside_one_vs_rest_of_scikit_learn(self):
        X, y = load_iris(return_X_y=True)
        X, y = scale(X)[::5], y[::5]
        model = OneVsRestClassifier(ConvexRobustClassifier(n_patterns=2, random_state=0))
        assert model.fit(X, y).score(X, y) > 0.8


@pytest.fixture(scope="module")
def diabetes():
    X, y = load_diabetes(return_X_y=True)
    return scale(X)[:80, :5], scale(y)[:80]


class TestRegressor:
    def test_intervals_and_scores(self, diabetes):
        X, y = diabetes
        model = ConvexRobustRegressor(epsilon=0.1, n_patterns=5, random_state=0).fit(X, y)
        assert model.score(X, y) > 0.2
        lo, hi = model.predict_interval(X)
        rng = np.random.default_rng(0)
        for _ in range(50):
            moved = model.predict(X + rng.uniform(-0.1, 0.1, X.shape))
            assert np.all((lo <= moved + 1e-12) & (moved <= hi + 1e-12))
        scores = [model.robust_score(X, y, method=m) for m in ("certified", "exact", "attack")]
        assert scores == sorted(scores)
        assert scores[2] < model.score(X, y)

    def test_shifting_the_target_shifts_the_prediction(self, diabetes):
        X, y = diabetes
        model = ConvexRobustRegressor(n_patterns=3, random_state=0)
        first, second = model.fit(X, y).predict(X), clone(model).fit(X, y + 100).predict(X)
        np.testing.assert_allclose(first + 100, second, atol=1e-4)


class Noting:
    """A solver that notes what it is given."""

    def __init__(self):
        self.given = []

    def __deepcopy__(self, memo):  # the list is to be seen from outside
        return self

    def solve(self, program, start=None):
        self.given.append(program)
        return InteriorPoint().solve(program, start)


def assert_same_program(program, other):
    for name in ("X", "y", "D", "sample_weight"):
        np.testing.assert_array_equal(getattr(program, name), getattr(other, name))
    assert program.regularizer == other.regularizer
    assert program.perturbation.epsilon == other.perturbation.epsilon
    assert type(program.loss) is type(other.loss)
    for name in ("formulation", "intercept", "n_outputs"):
        assert getattr(program, name) == getattr(other, name)


class TestPrograms:
    @pytest.mark.parametrize(
        ("estimator", "load", "n_programs"),
        [
            (ConvexRobustClassifier(0.05, loss=SquaredHinge()), load_breast_cancer, 1),
            (ConvexRobustClassifier(formulation="hard", epsilon=0.01), load_iris, 1),
            (ConvexRobustClassifier(multi_class="ovr"), load_iris, 3),
            (ConvexRobustRegressor(beta=0.01), load_diabetes, 1),
        ],
        ids=["two classes", "three classes", "one-versus-rest", "regression"],
    )
    def test_are_those_that_fit_solves(self, estimator, load, n_programs):
        X, y = load(return_X_y=True)
        rows = np.linspace(0, len(X) - 1, 40).astype(int)
        X, y = scale(X)[rows, :4], y[rows]
        weight = np.arange(40) % 3
        solver = Noting()
        model = clone(estimator).set_params(n_patterns=3, solver=solver, random_state=0)
        programs = model.programs(X, y, weight)
        assert solver.given == []
        model.fit(X, y, weight)
        assert len(programs) == len(solver.given) == n_programs
        for program, solved in zip(programs, solver.given, strict=True):
            assert_same_program(program, solved)
        objective = sum(InteriorPoint().solve(program).objective for program in programs)
        assert objective == pytest.approx(model.objective_, rel=1e-12)

    @pytest.mark.parametrize("estimator", [ConvexRobustClassifier, ConvexRobustRegressor])
    def test_nothing_is_learned(self, cancer, estimator):
        X, y = cancer[0], (cancer[1] == "benign").astype(int)
        names = pd.DataFrame(X, columns=[f"feature {j}" for j in range(X.shape[1])])
        seed = np.random.RandomState(0)
        model = estimator(n_patterns=3, random_state=seed)
        before = dict(vars(model))
        first, second = (model.programs(names, y)[0] for _ in range(2))
        assert vars(model) == before
        np.testing.assert_array_equal(first.D, second.D)
        fitted = model.fit(X[:, :4], y)
        before = dict(vars(fitted))
        fitted.programs(X[:, :5], y)
        assert vars(fitted) == before

    def test_data_are_checked_as_in_fit(self, cancer):
        X, y, *_ = cancer
        with pytest.raises(ValueError, match="NaN"):
            ConvexRobustClassifier().programs(np.where(X == X[0, 0], np.nan, X), y)
        with pytest.raises(ValueError, match="two classes"):
            ConvexRobustClassifier().programs(X, np.ones(len(X)))
        with pytest.raises(ValueError, match="Negative values in data passed to `sample_weight`"):
            ConvexRobustRegressor().programs(X, X[:, 0], -np.ones(len(X)))


class TestEcosystem:
    def test_pipeline_grid_search_and_frames(self, cancer):
        X, y, *_ = cancer
        frame = pd.DataFrame(X, columns=[f"feature {j}" for j in range(X.shape[1])])
        pipeline = make_pipeline(
            StandardScaler().set_output(transform="pandas"),
            ConvexRobustClassifier(n_patterns=2, random_state=0),
        )
        grid = {"convexrobustclassifier__beta": [1e-3, 1e-1]}
        search = GridSearchCV(pipeline, grid, cv=2).fit(frame, y)
        assert search.best_score_ > 0.8
        names = search.best_estimator_[-1].feature_names_in_
        assert list(names) == list(frame.columns)

    def test_metadata_routing(self, cancer):
        X, y, *_ = cancer
        weight = np.where(y == "benign", 5.0, 1.0)
        with sklearn.config_context(enable_metadata_routing=True):
            model = ConvexRobustClassifier(n_patterns=2, random_state=0)
            model.set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
            search = GridSearchCV(model, {"beta": [1e-2]}, cv=2)
            search.fit(X, y, sample_weight=weight)
        direct = clone(model).set_params(beta=1e-2).fit(X, y, sample_weight=weight)
        np.testing.assert_allclose(search.decision_function(X), direct.decision_function(X))

    def test_a_solver_can_be_shared_and_cloned(self, cancer):
        X, y, *_ = cancer
        model = ConvexRobustClassifier(n_patterns=2, solver=ConicSolver("SCS"), random_state=0)
        assert clone(model.fit(X, y)).fit(X, y).solution_.solver == "SCS"


@pytest.mark.parametrize(("name", "norm"), [("l2", 2), ("inf", np.inf)])
def test_a_norm_may_be_a_name(cancer, name, norm):
    X, y, *_ = cancer
    named, plain = (
        ConvexRobustClassifier(0.05, p, n_patterns=3, random_state=0).fit(X, y)
        for p in (name, norm)
    )
    assert named.get_params()["norm"] == clone(named).norm == name
    assert named.solution_.objective == plain.solution_.objective
    assert named.robust_score(X, y) == plain.robust_score(X, y)


class TestBadInput:
    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"epsilon": -0.1}, "epsilon must be"),
            ({"epsilon": np.ones(3)}, "epsilon has 3 entries but the data has 8 features"),
            ({"norm": 3}, "norm must be 1, 2 or"),
            ({"norm": "l3"}, "norm must be 1, 2 or.*got 'l3'"),
            ({"norm": None}, "norm must be 1, 2 or.*got None"),
            ({"beta": -1.0}, "beta must be"),
            ({"beta": np.nan}, "beta must be"),
            ({"formulation": "medium"}, "formulation must be one of"),
            ({"n_patterns": 0}, "n_patterns"),
            ({"patterns": "spiral"}, "directions must be one of"),
            ({"patterns": np.ones((7, 2))}, r"patterns have shape \(7, 2\) but X has 80 rows"),
            ({"loss": Squared()}, "loss must be a classification loss"),
            ({"loss": "hinge"}, "loss must be a classification loss"),
            ({"bounds": (-0.1, 0.1)}, "bounds exclude the data"),
            ({"bounds": (1, 0)}, "bounds must be a pair"),
            ({"loss": Hinge}, "loss must be .*got the class Hinge"),
            ({"solver": "admm"}, "solver must be an object with solve.*got 'admm'"),
            ({"solver": InteriorPoint}, "solver must be .*got the class InteriorPoint"),
            ({"solver": object()}, "solver must be an object with solve"),
            ({"multi_class": "crammer"}, "multi_class must be one of"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_parameters_are_named(self, cancer, parameters, message):
        model = ConvexRobustClassifier(**parameters)
        for method in (model.fit, model.programs):
            with pytest.raises(ValueError, match=message):
                method(*cancer[:2])

    def test_data(self, cancer):
        X, y, *_ = cancer
        broken = X.copy()
        broken[0, 0] = np.nan
        with pytest.raises(ValueError, match="NaN"):
            ConvexRobustClassifier().fit(broken, y)
        with pytest.raises(ValueError, match="infinity"):
            ConvexRobustClassifier().fit(np.where(np.isnan(broken), np.inf, X), y)
        with pytest.raises(ValueError, match="two classes"):
            ConvexRobustClassifier().fit(X, np.ones(len(X)))
        with pytest.raises(ValueError, match="two classes"):
            ConvexRobustClassifier().fit(X, y, sample_weight=(y == "benign").astype(float))
        with pytest.raises(ValueError, match="inconsistent numbers of samples"):
            ConvexRobustClassifier().fit(X, y[:-1])
        with pytest.raises(ValueError, match="classification loss"):
            ConvexRobustClassifier(loss=Squared()).fit(X, y)
        with pytest.raises(ValueError, match="regression loss"):
            ConvexRobustRegressor(loss=Hinge()).fit(X, X[:, 0])

    def test_scores(self, fitted, cancer):
        _, _, X, y = cancer
        with pytest.raises(ValueError, match="method must be one of"):
            fitted.robust_score(X, y, method="guess")
        with pytest.raises(ValueError, match="epsilon must be"):
            fitted.robust_score(X, y, epsilon=-1.0)

    def test_more_patterns_than_exist_are_announced(self):
        X = np.array([[0.0], [1.0], [2.0], [3.0]])
        with pytest.warns(UserWarning, match="50"):
            model = ConvexRobustClassifier(n_patterns=50).fit(X, [0, 0, 1, 1])
        assert model.patterns_.shape[1] <= 8

    def test_default_number_of_patterns_is_silent(self):
        X = np.array([[0.0], [1.0], [2.0], [3.0]])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ConvexRobustClassifier().fit(X, [0, 0, 1, 1])

    def test_empty_cones_point_to_soft(self):
        # Without an intercept and with both signs of every feature, no neuron is stable.
        X, y = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]), [0, 1, 1, 0]
        with pytest.warns(UserWarning, match=r"network is constant .*formulation='soft'"):
            ConvexRobustClassifier(1.5, formulation="hard", fit_intercept=False).fit(X, y)

    @pytest.mark.parametrize("epsilon", [3.0, 1000.0])
    @pytest.mark.parametrize("estimator", [ConvexRobustClassifier, ConvexRobustRegressor])
    def test_too_large_an_epsilon_is_announced(self, cancer, estimator, epsilon):
        X, y = scale(cancer[0][:80, :6]), cancer[1][:80]
        y = y if estimator is ConvexRobustClassifier else 1.0 * (y == "benign")
        with pytest.warns(UserWarning, match="network is constant.*beta or epsilon"):
            estimator(epsilon, random_state=0).fit(X, y)

    def test_a_small_part_of_large_outputs_is_no_constant(self):
        rng = np.random.default_rng(0)
        X = np.hstack([rng.normal(size=(60, 3)), np.full((60, 1), 100.0)])
        y = X[:, 0] + np.maximum(X[:, 1], 0.0)
        model = ConvexRobustRegressor(0.02, beta=1e-6, fit_intercept=False, random_state=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The fitted network is constant")
            model.fit(X, y + 1000.0)
        assert np.ptp(model.predict(X)) > 0.1
        y[0] = 1e6  # an outlier, which the offset follows
        model = ConvexRobustRegressor(loss=Absolute(), beta=1e-5, random_state=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The fitted network is constant")
            model.fit(X[:, :3], y)
        assert r2_score(y[1:], model.predict(X[1:, :3])) > 0.5

    def test_too_large_a_penalty_is_announced(self, cancer):
        with pytest.warns(UserWarning, match="network is constant.*beta or epsilon"):
            ConvexRobustClassifier(beta=100.0, n_patterns=2).fit(*cancer[:2])


class TestDifficultFeatures:
    @pytest.mark.parametrize("estimator", [ConvexRobustClassifier, ConvexRobustRegressor])
    @pytest.mark.parametrize("size", [[1e-6, 1e6, 1e-6, 1e6], 1e-6, 1e6], ids=str)
    def test_badly_scaled_ones_are_solved_or_announced(self, cancer, estimator, size):
        X, y = cancer[0][:40, :4] * np.array(size), (cancer[1][:40] == "benign").astype(int)
        model = estimator(np.mean(size) * 0.1, n_patterns=3, random_state=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(X, y)
        # The zero network's objective is at most 1.
        announced = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        assert model.lower_bound_ <= model.objective_
        assert announced or model.gap_ <= 1e-3
        assert np.isfinite(model.predict(X)).all()

    def test_conic_solver_announces_an_open_gap(self, cancer):
        X, y = 1e6 * cancer[0][:40, :4], cancer[1][:40]
        model = ConvexRobustClassifier(1e5, n_patterns=3, solver=ConicSolver(), random_state=0)
        with pytest.warns(ConvergenceWarning):
            model.fit(X, y)

    def test_a_zero_feature_changes_nothing(self, cancer):
        X, y, *_ = cancer
        D = (X[:, :4] > 0).astype(int)
        wide = np.hstack([X, np.zeros((len(X), 1))])
        without = ConvexRobustClassifier(patterns=D).fit(X, y)
        model = ConvexRobustClassifier(patterns=D).fit(wide, y)
        assert model.objective_ == pytest.approx(without.objective_, rel=1e-3)
        np.testing.assert_allclose(model.network_.hidden[-2], 0.0, atol=1e-2)

    def test_a_constant_feature_is_a_second_intercept(self, cancer):
        X, y, *_ = cancer
        D = (X[:, :4] > 0).astype(int)
        epsilon = np.append(np.full(X.shape[1], 0.1), 0.0)
        wide = np.hstack([X, np.ones((len(X), 1))])
        model = ConvexRobustClassifier(epsilon, patterns=D).fit(wide, y)
        without = ConvexRobustClassifier(0.1, patterns=D).fit(X, y)
        assert model.objective_ <= without.objective_ * (1 + 1e-3)  # a bias costs less on two
        hidden = model.network_.hidden
        np.testing.assert_allclose(hidden[-2], hidden[-1], atol=1e-2 * np.abs(hidden).max())


@pytest.mark.parametrize("loss", [SquaredHinge(), Logistic()])
@pytest.mark.parametrize("norm", [1, 2, np.inf])
def test_every_loss_and_norm_certifies_on_real_data(cancer, loss, norm):
    X, y, X_test, y_test = cancer
    model = ConvexRobustClassifier(0.1, norm, loss=loss, n_patterns=3, random_state=0).fit(X, y)
    assert model.solution_.relative_gap <= 1e-4
    assert model.robust_score(X_test, y_test) <= model.robust_score(X_test, y_test, method="attack")


class TestFormulations:
    def test_generated_patterns_beat_sampled_ones(self, cancer):
        X, y = cancer[:2]
        sampled = ConvexRobustClassifier(n_patterns=8, random_state=0).fit(X, y)
        generated = ConvexRobustClassifier(random_state=0).fit(X, y)
        assert generated.objective_ < sampled.objective_
        assert generated.solution_.solver.startswith("WorkingSet")
        assert generated.patterns_.shape[1] == generated.solution_.V.shape[2]
        assert generated.lower_bound_ <= generated.objective_

    def test_exchange_brackets_the_worst_case(self):
        rng = np.random.default_rng(0)
        X = rng.normal(size=(10, 2))
        y = np.where(X[:, 0] * X[:, 1] > 0, "same", "different")
        options = {"epsilon": 0.2, "beta": 0.02, "random_state": 0}
        soft = ConvexRobustClassifier(**options).fit(X, y)
        model = ConvexRobustClassifier(formulation="exchange", **options).fit(X, y)
        assert model.lower_bound_ <= model.objective_ <= soft.objective_ * (1 + 1e-3)
        assert model.patterns_.shape == (10, model.network_.n_neurons)
        assert model.robust_score(X, y, method="exact") >= model.robust_score(X, y)

    def test_exchange_takes_its_options_from_an_exchange(self):
        rng = np.random.default_rng(1)
        X = rng.normal(size=(12, 2))
        y = np.where(X[:, 0] * X[:, 1] > 0, 1, 0)
        exchange = Exchange(patterns="grow", max_rounds=1, random_state=0)
        model = ConvexRobustClassifier(0.2, formulation="exchange", solver=exchange)
        with pytest.warns(ConvergenceWarning, match="round limit"):
            model.fit(X, y)
        assert model.solver_ is exchange
        assert model.n_iter_ == 1
        assert model.lower_bound_ <= model.objective_

    @pytest.mark.parametrize("formulation", ["soft", "hard"])
    def test_exchange_is_no_solver_of_other_formulations(self, cancer, formulation):
        model = ConvexRobustClassifier(formulation=formulation, solver=Exchange())
        with pytest.raises(ValueError, match="set formulation='exchange'"):
            model.fit(*cancer[:2])

    def test_unknown_formulation_is_refused(self, cancer):
        with pytest.raises(ValueError, match="formulation must be one of"):
            ConvexRobustClassifier(formulation="firm").fit(*cancer[:2])


class Watch:
    """A callback that counts certified iterates, scores networks and stops the fit after some."""

    def __init__(self, X, stop_after=None):
        self.X, self.stop_after = X, stop_after
        self.calls, self.rows, self.predictions = [], [], []

    def setup(self, estimator, context):
        self.calls.append("setup")

    def teardown(self, estimator, context):
        self.calls.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.calls.append(f"begin {context.task_name}")

    def on_fit_task_end(self, estimator, context, *, metadata, fitted_estimator):
        self.calls.append(f"end {context.task_name}")
        self.predictions.append(fitted_estimator.predict(self.X))
        if metadata is not None:
            self.rows.append(metadata)
        return len(self.rows) == self.stop_after


class TestCallbacks:
    @pytest.mark.parametrize("solver", [InteriorPoint(1e-4), None], ids=str)
    def test_every_certified_iterate_is_a_task(self, cancer, solver):
        X, y = cancer[0][:40, :4], cancer[1][:40]
        watch = Watch(X)
        model = ConvexRobustClassifier(0.1, solver=solver, random_state=0).set_callbacks(watch)
        model.fit(X, y)
        assert watch.calls[:2] == ["setup", "begin fit"]
        assert watch.calls[-2:] == ["end fit", "teardown"]
        assert len(watch.rows) == len(model.solution_.history) > 1
        assert watch.rows[-1]["lower_bound"] <= model.objective_
        assert min(row["objective"] for row in watch.rows) == pytest.approx(model.objective_)
        np.testing.assert_array_equal(watch.predictions[-1], model.predict(X))
        fresh = clone(model)
        assert fresh.get_params().keys() == model.get_params().keys()

    @pytest.mark.parametrize("solver", [InteriorPoint(1e-9), None], ids=str)
    def test_a_callback_can_stop_the_fit(self, cancer, solver):
        X, y = cancer[0][:40, :4], cancer[1][:40]
        watch = Watch(X, stop_after=1)
        model = ConvexRobustClassifier(0.1, solver=solver, random_state=0).set_callbacks(watch)
        with pytest.warns(ConvergenceWarning, match="'interrupted'"):
            model.fit(X, y)
        assert len(watch.rows) == 1
        # A generated network, the first point of a working set, may be better than the iterate.
        assert model.lower_bound_ <= model.objective_ <= watch.rows[0]["objective"]

    @pytest.mark.parametrize("stop_after", [None, 1])
    def test_hears_of_no_iterates_but_those_of_its_program(self, stop_after):
        rng = np.random.default_rng(0)
        X, y = rng.normal(size=(60, 30)), np.arange(60) < 24
        X[:, 0] += y  # a constant network is looked at, and not proven best
        watch = Watch(X, stop_after)
        model = ConvexRobustClassifier(0.9, random_state=0).set_callbacks(watch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(X, y)
        assert len(watch.rows) == len(model.solution_.history)
        assert model.solution_.status == "interrupted" or stop_after is None
        assert model.lower_bound_ <= model.objective_ <= 0.81  # of the constant network

    def test_of_a_regressor_and_a_grid_search(self):
        X, y = load_diabetes(return_X_y=True)
        X, y = scale(X[:60, :3]), y[:60] / 100
        watch = Watch(X)
        model = ConvexRobustRegressor(0.1, n_patterns=3, random_state=0).set_callbacks(watch)
        model.fit(X, y)
        np.testing.assert_allclose(watch.predictions[-1], model.predict(X))
        search = GridSearchCV(model, {"beta": [1e-3, 1e-2]}, cv=2).fit(X, y)
        assert np.isfinite(search.cv_results_["mean_test_score"]).all()


class TestWarmStart:
    def test_the_same_data_again_are_no_worse(self, cancer):
        X, y = cancer[0][:40, :3], cancer[1][:40]
        model = ConvexRobustClassifier(0.2, beta=0.03, warm_start=True, random_state=0).fit(X, y)
        for _ in range(3):
            before = model.objective_
            assert model.fit(X, y).objective_ <= before * (1 + 1e-9)

    def test_other_parameters_bring_another_solver(self, cancer):
        X, y = cancer[0][:30, :3], cancer[1][:30]
        model = ConvexRobustClassifier(0.2, warm_start=True, random_state=0)
        model.set_params(formulation="exchange", beta=0.03).fit(X, y)
        assert isinstance(model.solver_, Exchange)
        model.set_params(formulation="soft").fit(X, y)
        assert isinstance(model.solver_, WorkingSet)
        model.set_params(n_patterns=4).fit(X, y)
        assert isinstance(model.solver_, InteriorPoint)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("multi_class", ["joint", "ovr"])
def test_exchange_of_several_classes(multi_class):
    X, y = load_iris(return_X_y=True)
    X, y = scale(X)[::6, 1:3], y[::6]
    options = {"formulation": "exchange", "multi_class": multi_class, "random_state": 0}
    model = ConvexRobustClassifier(0.1, beta=0.03, **options).fit(X, y)
    assert model.lower_bound_ <= model.objective_
    assert model.score(X, y) > 0.8


def test_exchange_without_penalty_or_loss():
    X, y = np.array([[1.0], [2.0], [3.0]]), np.ones(3)
    model = ConvexRobustRegressor(0.1, formulation="exchange")
    with pytest.warns(UserWarning, match="network is constant"):
        assert model.fit(X, y).objective_ == pytest.approx(0.0, abs=1e-9)


def test_patterns_without_columns_are_refused(cancer):
    X, y = cancer[0][:20], cancer[1][:20]
    with pytest.raises(ValueError, match="patterns must have rows and columns"):
        ConvexRobustClassifier(patterns=np.zeros((20, 0), dtype=int)).fit(X, y)
