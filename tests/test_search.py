"""The search for beta: what it chooses, and that it is the estimator it chose."""

import numpy as np
import pytest
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.utils.estimator_checks import parametrize_with_checks

from convexrobust import (
    ConicSolver,
    ConvexRobustClassifier,
    ConvexRobustRegressor,
    RegularizationPathCV,
    WorkingSet,
    regularization_path,
)
from convexrobust.losses import Logistic

BETAS = [0.3, 0.001, 0.03]
CLASSIFIER = ConvexRobustClassifier(n_patterns=4, random_state=0)
REGRESSOR = ConvexRobustRegressor(n_patterns=4, random_state=0)


@parametrize_with_checks(
    [
        RegularizationPathCV(CLASSIFIER, betas=[0.1, 0.01], cv=2),
        RegularizationPathCV(clone(CLASSIFIER).set_params(loss=Logistic()), betas=[0.1], cv=2),
        RegularizationPathCV(REGRESSOR, betas=[0.1, 0.01], cv=2),
    ]
)
@pytest.mark.filterwarnings("ignore:The fitted network is constant")
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def data(load, n=60, n_features=5):
    X, y = load(return_X_y=True)
    rows = np.linspace(0, len(X) - 1, n).astype(int)
    return scale(X)[rows, :n_features], (scale(y) if load is load_diabetes else y)[rows]


@pytest.mark.parametrize(
    ("estimator", "load", "folds"),
    [
        (CLASSIFIER, load_breast_cancer, StratifiedKFold(3)),
        (clone(CLASSIFIER).set_params(multi_class="ovr"), load_iris, StratifiedKFold(3)),
        (REGRESSOR, load_diabetes, KFold(3)),
    ],
    ids=["two classes", "one-versus-rest", "regression"],
)
@pytest.mark.parametrize("scoring", ["certified", "attack"])
def test_scores_are_those_of_the_paths_in_the_folds(estimator, load, folds, scoring):
    X, y = data(load)
    search = RegularizationPathCV(estimator, betas=BETAS, cv=3, scoring=scoring).fit(X, y)
    for scores, (train, test) in zip(search.scores_, folds.split(X, y), strict=True):
        path = regularization_path(estimator, X[train], y[train], betas=BETAS, tol=0.05)
        expected = [m.robust_score(X[test], y[test], method=scoring) for m in path.estimators[0]]
        np.testing.assert_allclose(scores[np.argsort(BETAS)[::-1]], expected)
    assert search.best_score_ == search.scores_.mean(axis=0).max()
    assert search.best_beta_ == BETAS[search.scores_.mean(axis=0).argmax()]


def test_the_best_estimator_is_a_fit_to_all_data():
    X, y = data(load_breast_cancer)
    search = RegularizationPathCV(CLASSIFIER, betas=BETAS, cv=2).fit(X, y)
    plain = clone(CLASSIFIER).set_params(beta=search.best_beta_).fit(X, y)
    np.testing.assert_array_equal(search.decision_function(X), plain.decision_function(X))
    np.testing.assert_array_equal(search.predict(X), plain.predict(X))
    np.testing.assert_array_equal(search.certified_radius(X), plain.certified_radius(X))
    assert search.score(X, y) == plain.score(X, y)
    assert search.robust_score(X, y, 0.2, "exact") == plain.robust_score(X, y, 0.2, "exact")
    assert search.network_ is search.best_estimator_.network_
    np.testing.assert_array_equal(search.classes_, [0, 1])


def test_without_a_last_fit_there_are_scores_only():
    X, y = data(load_breast_cancer)
    search = RegularizationPathCV(CLASSIFIER, betas=BETAS, cv=2, refit=False).fit(X, y)
    assert search.scores_.shape == (2, 3)
    with pytest.raises(NotFittedError, match="refit=False fits no estimator"):
        search.predict(X)
    search.set_params(refit=True).fit(X, y).set_params(refit=False).fit(X, 1 - y)
    assert not hasattr(search, "best_estimator_")  # which knew the other labels


def test_equal_scores_go_to_the_first_beta_given():
    X, y = data(load_breast_cancer)
    options = {"cv": 2, "scoring": lambda model, X, y: 1.0}
    for betas in (BETAS, BETAS[::-1]):
        search = RegularizationPathCV(CLASSIFIER, betas=betas, **options).fit(X, y)
        assert search.best_beta_ == betas[0]


def test_default_betas_start_where_the_network_is_zero():
    X, y = data(load_diabetes)
    search = RegularizationPathCV(REGRESSOR, cv=2).fit(X, y)
    np.testing.assert_allclose(search.betas_, regularization_path(REGRESSOR, X, y).betas)


def test_generated_patterns_and_a_given_solver():
    X, y = data(load_breast_cancer)
    model = ConvexRobustClassifier(random_state=0)
    search = RegularizationPathCV(model, betas=[0.1, 0.01], cv=2).fit(X, y)
    assert isinstance(search.best_estimator_.solver_, WorkingSet)
    assert search.best_estimator_.solver_.tol == 1e-2  # that of the folds is another
    model = clone(CLASSIFIER).set_params(solver=ConicSolver())
    search = RegularizationPathCV(model, betas=[0.1, 0.01], cv=2).fit(X, y)
    assert isinstance(search.best_estimator_.solver_, ConicSolver)


def test_weights_of_zero_take_rows_out_of_training_and_scores():
    X, y = data(load_breast_cancer)
    weight = np.ones(len(y))
    weight[::4] = 0.0
    wrong = np.where(weight == 0.0, 1 - y, y)  # would change fits and scores
    folds = list(KFold(3).split(X))
    search = RegularizationPathCV(CLASSIFIER, betas=BETAS, cv=folds)
    scores = clone(search).fit(X, y, sample_weight=weight).scores_
    np.testing.assert_array_equal(clone(search).fit(X, wrong, weight).scores_, scores)
    assert not np.array_equal(clone(search).fit(X, wrong).scores_, scores)
    weight[:20] = 0.0
    with pytest.raises(ValueError, match="sample_weight is 0 for all held-out rows"):
        clone(search).fit(X, y, weight)


def test_what_it_offers_is_what_the_estimator_offers():
    X, y = data(load_diabetes)
    search = RegularizationPathCV(REGRESSOR, betas=[0.1], cv=2).fit(X, y)
    lower, upper = search.predict_interval(X)
    assert (lower <= search.predict(X)).all()
    assert (search.predict(X) <= upper).all()
    assert not hasattr(search, "decision_function")
    assert not hasattr(search, "classes_")
    assert is_regressor(search)
    assert is_classifier(RegularizationPathCV(CLASSIFIER))
    assert not hasattr(RegularizationPathCV(CLASSIFIER), "predict_proba")
    logistic = clone(CLASSIFIER).set_params(loss=Logistic())
    assert hasattr(RegularizationPathCV(logistic), "predict_proba")


def test_in_a_pipeline():
    X, y = load_breast_cancer(return_X_y=True)
    search = RegularizationPathCV(CLASSIFIER, betas=[0.1, 0.01], cv=2)
    model = make_pipeline(StandardScaler(), search).fit(X[:100], y[:100])
    assert model.score(X[100:], y[100:]) > 0.85


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "accuracy"}, "scoring must be one of"),
        ({"betas": [-1.0]}, "betas must be a list"),
        ({"betas": []}, "betas must be a list"),
        ({"tol": 0.0}, "tol must be a positive number"),
        ({"tol": "small"}, "tol must be a positive number"),
        ({"betas": ["small"]}, "betas must be a list of numbers"),
        ({"scoring": np.array(["exact"])}, "scoring must be one of"),
        ({"scoring": lambda model, X, y: np.nan}, "scoring must return finite numbers, got nan"),
        ({"scoring": lambda model, X, y: np.ones(3)}, "scoring must return finite numbers"),
        ({"cv": []}, "cv gave no folds"),
    ],
)
def test_bad_arguments_are_named(options, message):
    X, y = data(load_breast_cancer)
    with pytest.raises(ValueError, match=message):
        RegularizationPathCV(CLASSIFIER, **{"betas": [0.1], "cv": 2} | options).fit(X, y)


def test_estimators_that_have_no_path_are_refused():
    X, y = data(load_breast_cancer)
    with pytest.raises(TypeError, match="must be a ConvexRobustClassifier"):
        RegularizationPathCV(LinearRegression(), betas=[0.1]).fit(X, y)
    with pytest.raises(ValueError, match="formulation='exchange'"):
        RegularizationPathCV(ConvexRobustClassifier(formulation="exchange"), cv=2).fit(X, y)
    with pytest.raises(NotFittedError):
        RegularizationPathCV(CLASSIFIER).predict(X)
