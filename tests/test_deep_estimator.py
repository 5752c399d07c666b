"""Estimators of networks trained by gradient descent: scikit-learn's contract, scores, truths."""
# ruff: noqa: E402 - without torch the file is skipped before it imports what needs it

import pickle
from functools import partial

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.utils.estimator_checks import parametrize_with_checks

torch = pytest.importorskip("torch")

from convexrobust import ConvexRobustClassifier, LpBall, TwoLayerReLU, deep
from convexrobust.deep.attacks import fgsm, worst_case
from convexrobust.deep.augmentation import Augmented
from convexrobust.deep.catalogue import (
    METHODS,
    NETWORKS,
    REGRESSION_METHODS,
    create_method,
    create_network,
)
from convexrobust.deep.estimator import AdversarialClassifier, AdversarialRegressor
from convexrobust.deep.least_squares import largest_residuals, rescaled
from convexrobust.deep.losses import CrossEntropy, HalfSquares
from convexrobust.deep.methods import Attacked, Certified, Mart, Trades, WeightPerturbed
from convexrobust.deep.methods.base import OF_ANY_LOSS
from convexrobust.deep.training import train
from convexrobust.evaluation import evaluate_robustness

QUICK = {"n_epochs": 15, "learning_rate": 0.05, "random_state": 0}


@pytest.fixture(scope="module")
def cancer():
    X, y = load_breast_cancer(return_X_y=True)
    X, y = scale(X)[:, :8], np.array(["malignant", "benign"])[y]
    return X[:80], y[:80], X[80:160], y[80:160]


@pytest.fixture(scope="module")
def fitted(cancer):
    return AdversarialClassifier(epsilon=0.1, **QUICK).fit(*cancer[:2])


@pytest.fixture(scope="module")
def diabetes():
    X, y = load_diabetes(return_X_y=True)
    return scale(X[:120, :4]), y[:120]


@pytest.fixture(scope="module")
def undefended(diabetes):
    """Return the robust score of plain training on the diabetes data."""
    X, y = diabetes
    model = AdversarialRegressor(0.3, method="standard", **QUICK).fit(X, y)
    return model.robust_score(X, y, method="attack")


@parametrize_with_checks(
    [
        AdversarialClassifier(method="fgsm", n_epochs=8, learning_rate=0.1, width=16),
        AdversarialRegressor(method="fgsm", n_epochs=8, learning_rate=0.1, batch_size=32, width=16),
    ]
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


class TestClassifier:
    def test_learned_attributes(self, fitted, cancer):
        X, y, X_test, _ = cancer
        assert list(fitted.classes_) == ["benign", "malignant"]
        assert isinstance(fitted.network_, TwoLayerReLU)
        assert fitted.n_iter_ == len(fitted.history_.epochs) == 15
        assert fitted.history_["loss"][-1] < fitted.history_["loss"][0]
        assert fitted.score(X, y) > 0.9
        outputs = fitted.network_.predict(X_test)[:, 0]
        np.testing.assert_allclose(fitted.decision_function(X_test), outputs, atol=1e-12)

    @pytest.mark.parametrize("n_classes", [2, 3])
    def test_robust_scores_sandwich_the_truth(self, n_classes):
        X, y = load_iris(return_X_y=True)
        rows = y < n_classes if n_classes == 3 else y > 0  # the two that are hard to tell apart
        X, y = scale(X)[rows][::2], y[rows][::2]
        model = AdversarialClassifier(0.2, norm=2, **QUICK).fit(X, y)
        assert model.decision_function(X).shape == ((len(X),) if n_classes == 2 else (len(X), 3))
        for epsilon in (0.05, 0.2, 0.5):
            certified, exact, attack = (
                model.robust_score(X, y, epsilon=epsilon, method=method)
                for method in ("certified", "exact", "attack")
            )
            assert certified <= exact <= attack <= model.score(X, y)
        assert attack < model.score(X, y)
        assert model.robust_score(X, y, epsilon=0.0) == model.score(X, y)
        assert model.robust_score(X, y) == model.robust_score(X, y, epsilon=0.2)
        first = np.arange(len(X)) == 0
        alone = model.robust_score(X, y, sample_weight=first)
        assert alone == model.robust_score(X[:1], y[:1])

    def test_the_score_is_certified_by_default(self, fitted, cancer):
        _, _, X, y = cancer
        certified, attack = (
            fitted.robust_score(X, y, epsilon=0.3, method=m) for m in ("certified", "attack")
        )
        assert fitted.robust_score(X, y, epsilon=0.3) == certified < attack

    def test_labels_outside_the_classes_count_as_wrong(self, fitted, cancer):
        _, _, X, _ = cancer
        assert fitted.robust_score(X, np.full(len(X), "healthy")) == 0.0

    @pytest.mark.parametrize("n_classes", [2, 3])
    def test_probabilities_are_those_of_the_outputs(self, n_classes):
        X, y = load_iris(return_X_y=True)
        X, y = scale(X)[y < n_classes], y[y < n_classes]
        model = AdversarialClassifier(method="standard", **QUICK).fit(X, y)
        probabilities, outputs = model.predict_proba(X), model.decision_function(X)
        if n_classes == 2:
            outputs = np.column_stack([0.0 * outputs, outputs])
        expected = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(probabilities, expected, rtol=1e-10)
        np.testing.assert_array_equal(
            model.classes_[probabilities.argmax(axis=1)], model.predict(X)
        )

    def test_training_on_attacks_makes_robust(self):
        """One feature survives the attack; twenty others predict as well, and do not."""
        rng = np.random.default_rng(0)
        y = rng.choice([-1, 1], 200)
        X = np.column_stack([y, np.tile(0.2 * y, (20, 1)).T]) + 0.1 * rng.normal(size=(200, 21))
        scores = {}
        for method in ("standard", "fgsm", "pgd"):
            model = AdversarialClassifier(0.3, method=method, **QUICK).fit(X[:100], y[:100])
            assert model.score(X[100:], y[100:]) > 0.95
            scores[method] = model.robust_score(X[100:], y[100:], method="attack")
        assert scores["standard"] < 0.2
        assert min(scores["fgsm"], scores["pgd"]) > 0.9

    def test_same_seed_same_model_and_pickle(self, fitted, cancer):
        X, y, X_test, _ = cancer
        before = torch.random.get_rng_state()
        twin = clone(fitted).fit(X, y)
        assert torch.equal(torch.random.get_rng_state(), before)
        expected = fitted.decision_function(X_test)
        np.testing.assert_array_equal(twin.decision_function(X_test), expected)
        copied = pickle.loads(pickle.dumps(fitted))
        np.testing.assert_array_equal(copied.decision_function(X_test), expected)
        other = clone(fitted).set_params(random_state=1).fit(X, y)
        assert not np.array_equal(other.decision_function(X_test), expected)

    def test_weight_decay_and_radii_of_features_matter(self, cancer):
        X, y, *_ = cancer
        strong = AdversarialClassifier(beta=1.0, **QUICK).fit(X, y)
        weak = AdversarialClassifier(beta=0.0, **QUICK).fit(X, y)
        assert np.linalg.norm(strong.network_.hidden) < np.linalg.norm(weak.network_.hidden)
        epsilon = np.zeros(8)
        free = AdversarialClassifier(epsilon, method="pgd", **QUICK).fit(X, y)
        plain = AdversarialClassifier(0.3, method="standard", **QUICK).fit(X, y)
        np.testing.assert_allclose(free.decision_function(X), plain.decision_function(X))

    def test_more_arguments_of_train(self, cancer, tmp_path):
        X, y, X_test, y_test = cancer
        validation = X_test, np.where(y_test == "malignant", 1, -1)
        training = {
            "validation": validation,
            "keep": "best",
            "log": tmp_path / "log.csv",
            "schedule": None,
        }
        model = AdversarialClassifier(0.1, training=training, **QUICK).fit(X, y)
        accuracy = model.history_["validation_accuracy"][model.history_.best_epoch]
        assert model.score(X_test, y_test) == pytest.approx(accuracy)
        assert set(model.history_["learning_rate"]) == {0.05}
        assert len((tmp_path / "log.csv").read_text().splitlines()) == 16

    def test_another_network(self):
        X, y = load_iris(return_X_y=True)
        X = np.repeat(scale(X), 16, axis=1)  # (n, 1, 8, 8)

        def network(n_features, n_outputs):
            images = torch.nn.Unflatten(1, (1, 8, 8))
            return torch.nn.Sequential(images, create_network("cnn", (1, 8, 8), n_outputs))

        model = AdversarialClassifier(0.05, network=network, method="fgsm", **QUICK).fit(X, y)
        assert next(model.model_.parameters()).dtype == torch.float32
        assert not hasattr(model, "network_")
        assert model.score(X, y) > 0.9
        assert model.robust_score(X, y, method="attack") <= model.score(X, y)
        for options in ({}, {"method": "exact"}):
            with pytest.raises(ValueError, match=r"two-layer network .* method='attack' only"):
                model.robust_score(X, y, **options)


class TestRegressor:
    def test_robust_scores_sandwich_the_truth(self, diabetes):
        X, y = diabetes
        model = AdversarialRegressor(0.1, beta=1.0, **QUICK).fit(X, y)
        scores = [model.robust_score(X, y, method=m) for m in ("certified", "exact", "attack")]
        assert scores == sorted(scores)
        assert scores[-1] < model.score(X, y)
        assert model.robust_score(X, y) == scores[0] < scores[-1]
        assert model.robust_score(X, y, epsilon=0.0) == pytest.approx(model.score(X, y))

    @pytest.mark.parametrize("method", sorted(REGRESSION_METHODS.keys() - {"standard"}))
    def test_the_worst_squared_error_falls(self, method, diabetes, undefended):
        """At epsilon 0.3 of a standard deviation; a larger score is a smaller squared error."""
        X, y = diabetes
        model = AdversarialRegressor(0.3, method=method, **QUICK).fit(X, y)
        assert model.score(X, y) > 0.1
        assert model.robust_score(X, y, method="attack") > undefended
        assert {"loss", "epoch", "seconds"} <= set(model.history_.epochs[0])
        assert "accuracy" not in model.history_.epochs[0]

    def test_a_method_with_options(self, diabetes):
        X, y = diabetes
        method = partial(Trades, weight=0.0)
        free = AdversarialRegressor(0.3, method=method, **QUICK).fit(X, y)
        plain = AdversarialRegressor(0.3, method="standard", **QUICK).fit(X, y)
        np.testing.assert_allclose(free.predict(X), plain.predict(X), rtol=1e-6)

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ("mart", "got 'mart' .it needs the probabilities of classes; 'trades'"),
            ("certified", "got 'certified' .it bounds margins.*ConvexRobustRegressor"),
            ("ibp", "got 'ibp' .it bounds margins"),
            (Mart, "Mart cannot take HalfSquares: it needs .*Methods of regression: Standard, "),
            (Certified, "Certified is one of classification, for regression give one of"),
        ],
    )
    def test_methods_of_classes_are_refused(self, method, message, diabetes):
        with pytest.raises(ValueError, match=message):
            AdversarialRegressor(method=method, **QUICK).fit(*diabetes)

    def test_targets_in_other_units_give_the_same_network(self, diabetes):
        """f -> s f scales the loss by s^2 and, on balanced neurons, the weight decay by s."""
        X, y = diabetes
        model = AdversarialRegressor(0.1, beta=0.5, **QUICK).fit(X, y)
        scaled = AdversarialRegressor(0.1, beta=0.5e3, **QUICK).fit(X, 1e3 * y - 7.0)
        np.testing.assert_allclose(scaled.predict(X), 1e3 * model.predict(X) - 7.0, rtol=1e-6)

    def test_the_optimum_is_in_units_of_the_targets(self):
        """At x = 1 and x = -1 with y = a and -a, where different neurons are active.

        A prediction s costs the penalty beta s on each side, neurons of either sign being balanced,
        so that the objective is (a - s)^2 / 2 + 2 beta s and its optimum s = a - 2 beta.
        """
        X, y = np.array([[1.0], [-1.0]]), np.array([10.0, -10.0])

        def network(n_features, n_outputs):
            layers = (
                torch.nn.Linear(n_features, 8, bias=False, dtype=torch.float64),
                torch.nn.ReLU(),
                torch.nn.Linear(8, n_outputs, bias=False, dtype=torch.float64),
            )
            return torch.nn.Sequential(*layers)

        model = AdversarialRegressor(
            method="standard", beta=1.0, network=network, n_epochs=200, learning_rate=0.1,
            random_state=0,
        ).fit(X, y)  # fmt: skip
        np.testing.assert_allclose(model.predict(X), [8.0, -8.0], rtol=1e-3)

    def test_constant_targets(self):
        X = np.arange(8.0)[:, None]
        model = AdversarialRegressor(**QUICK).fit(X, np.full(8, 3.0))
        assert np.isfinite(model.predict(X)).all()

    def test_another_network(self, diabetes):
        X, y = diabetes

        def network(n_features, n_outputs):
            layers = torch.nn.Linear(n_features, 8), torch.nn.Tanh(), torch.nn.Linear(8, n_outputs)
            return torch.nn.Sequential(torch.nn.Sequential(*layers))

        model = AdversarialRegressor(0.1, network=network, **QUICK).fit(X, y)
        assert model.robust_score(X, y, method="attack") < model.score(X, y)
        assert model.score(X, y) > 0.2
        with pytest.raises(ValueError, match="method='certified' needs a two-layer network"):
            model.robust_score(X, y)


class TestLeastSquares:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("nested", [True, False])
    def test_rescaled_models(self, bias, nested):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1, bias=bias))
        model = torch.nn.Sequential(model) if nested else model
        x = torch.randn(5, 3)
        before = model(x).detach()
        torch.testing.assert_close(rescaled(model, 3.0, -1.0)(x), 3.0 * before - 1.0)

    @pytest.mark.parametrize("norm", [1, 2, np.inf])
    @pytest.mark.parametrize("attack", ["fgsm", "pgd"])
    def test_of_a_linear_model_in_closed_form(self, norm, attack):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 1, dtype=torch.float64)
        x, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
        ball = LpBall(norm, 0.3)
        dual = {1: np.inf, 2: 2, np.inf: 1}[norm]
        reach = 0.3 * np.linalg.norm(model.weight.detach().numpy().ravel(), dual)
        worst = (model(x)[:, 0] - y).abs().detach() + reach
        method = getattr(Attacked, attack)(ball, sample_loss=HalfSquares())
        points = method.points(model, x, y)
        loss, figures = method.loss(model, x, points, y)
        assert loss.item() == pytest.approx(0.5 * worst.square().mean().item())
        assert figures["residual"] == pytest.approx(worst.mean().item())
        method.scale = 0.0
        assert torch.equal(method.points(model, x, y), x)

    def test_the_worst_of_a_two_layer_network_is_found(self):
        """Against a fine grid in two dimensions."""
        torch.manual_seed(1)
        model = create_network("two-layer", (2,), 1, width=4).double()
        x, y = torch.randn(20, 2, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
        steps = torch.linspace(-0.2, 0.2, 81, dtype=torch.float64)
        grid = torch.cartesian_prod(steps, steps)
        with torch.no_grad():
            worst = model((x[:, None] + grid).reshape(-1, 2)).reshape(20, -1).abs().amax(1)
        options = {"n_restarts": 5, "random_state": 0}
        points = largest_residuals(model, x, y, LpBall(np.inf, 0.2), **options)
        found = model(points)[:, 0].abs().detach()
        assert (found <= worst + 1e-9).all()  # the corners of the box are on the grid
        assert (found >= worst - 1e-3).float().mean() > 0.9

    def test_distances_and_logarithms_of_losses(self):
        loss, y = HalfSquares(), torch.tensor([1.0, 2.0])
        clean, attacked = torch.tensor([[1.0], [5.0]]), torch.tensor([[3.0], [4.0]])
        for apart in (loss.divergences, loss.distances):
            assert apart(clean, attacked, y).tolist() == [2.0, 0.5]
        outputs = clean.clone().requires_grad_()
        logarithms = loss.logarithms(outputs, y)
        assert torch.isfinite(logarithms).all()
        assert logarithms[1].item() == pytest.approx(np.log(4.5))
        (gradient,) = torch.autograd.grad(logarithms.sum(), outputs)
        assert gradient[:, 0].tolist() == pytest.approx([0.0, 2.0 / 3.0])

    def test_several_outputs_are_refused(self):
        model = torch.nn.Linear(2, 3)
        method = Attacked(LpBall(2, 0.1), sample_loss=HalfSquares())
        with pytest.raises(ValueError, match="regression has one output"):
            method.points(model, torch.zeros(4, 2), torch.zeros(4))

    def test_targets_of_residuals_are_refused(self):
        x = torch.zeros(2, 3)
        with pytest.raises(ValueError, match="targets are classes"):
            fgsm(torch.nn.Linear(3, 1), x, x[:, 0], LpBall(2, 0.1), loss="residual", targets=1)


class TestSampleLoss:
    def test_every_method_but_those_of_classes_takes_one(self):
        for name in deep.methods.__all__:
            kind = getattr(deep.methods, name)
            if getattr(kind, "only_classes", ""):
                assert name in ("Mart", "Certified")
            elif name not in ("Method", "LossMethod"):
                assert name in OF_ANY_LOSS

    def test_what_is_no_loss_is_refused(self):
        ball = LpBall(2, 0.1)
        with pytest.raises(
            ValueError, match=r"sample_loss must be CrossEntropy\(\) or HalfSquares"
        ):
            Trades(ball, sample_loss="squares")
        with pytest.raises(ValueError, match=r"got the class HalfSquares: give HalfSquares\(\)"):
            Attacked.pgd(ball, sample_loss=HalfSquares)
        with pytest.raises(ValueError, match="loss must be a loss of margins"):
            Certified(ball, loss=HalfSquares())
        assert "sample_loss" not in vars(Trades(ball, sample_loss=CrossEntropy()))

    def test_a_loss_of_the_other_task_is_not_overruled(self, cancer):
        method = partial(Trades, sample_loss=HalfSquares())
        with pytest.raises(ValueError, match="Trades is one of regression, for classification"):
            AdversarialClassifier(method=method).fit(*cancer[:2])

    @pytest.mark.parametrize(
        ("method", "before"),
        [
            ("pgd", {"name": "LeastSquares", "attack": "pgd", "n_steps": 10}),
            ("fast", {"name": "LeastSquares", "attack": "fast", "n_steps": 10}),
            ("standard", {"name": "LeastSquares", "attack": "standard", "n_steps": 10}),
            ("gradalign", {"name": "SquaredGradAlign", "attack": ["_attacked", {}]}),
        ],
    )
    def test_checkpoints_of_the_classes_before_can_be_resumed(self, method, before, tmp_path):
        X, y, file = np.arange(8.0)[:, None] / 8.0, np.arange(8.0), tmp_path / "run.pt"
        model = AdversarialRegressor(method=method, training={"checkpoint": file}, **QUICK)
        expected = model.fit(X, y).predict(X)
        state = torch.load(file, weights_only=True)
        now = state["settings"]["method"]
        kept = ("ball",) if before["name"] == "LeastSquares" else ("ball", "mode", "weight")
        state["settings"]["method"] = before | {name: now[name] for name in kept}
        torch.save(state, file)
        np.testing.assert_array_equal(clone(model).fit(X, y).predict(X), expected)
        state["settings"]["method"]["name"] = "SquaredTrades"
        torch.save(state, file)
        with pytest.raises(ValueError, match="of another training: method was"):
            clone(model).fit(X, y)


class TestSampleWeight:
    @pytest.mark.parametrize("estimator", [AdversarialClassifier, AdversarialRegressor])
    @pytest.mark.parametrize("method", ["pgd", "ssds"])
    def test_equal_weights_are_none_and_rows_of_weight_0_are_not_there(self, estimator, method):
        X, y = load_iris(return_X_y=True)
        X, kept = scale(X), np.arange(150) % 4 > 0
        options = QUICK | {"n_epochs": 3, "batch_size": 32, "method": method}

        def outputs(X_train, y_train, weight=None):
            model = estimator(0.2, **options).fit(X_train, y_train, sample_weight=weight)
            return model._outputs(X)

        plain = outputs(X, y)
        np.testing.assert_array_equal(outputs(X, y, np.full(150, 0.3)), plain)
        np.testing.assert_array_equal(outputs(X, y, 0.3 * kept), outputs(X[kept], y[kept]))
        assert not np.allclose(outputs(X, y, 1.0 + y), plain)

    def test_heavy_samples_are_fitted(self):
        X = np.tile([[-1.0], [1.0]], (20, 1))
        y = np.repeat([0.0, 1.0], 20)  # contradictory targets at either point
        weight = np.where(y == 1.0, 3.0, 1.0)
        model = AdversarialRegressor(0.0, beta=0.0, **QUICK | {"n_epochs": 200})
        fitted = model.fit(X, y, sample_weight=weight).predict(X)
        np.testing.assert_allclose(fitted, 0.75, atol=1e-2)
        classes = AdversarialClassifier(0.0, beta=0.0, **QUICK | {"n_epochs": 200})
        classes.fit(X, y, sample_weight=weight)
        np.testing.assert_allclose(classes.predict_proba(X)[:, 1], 0.75, atol=1e-2)

    def test_a_class_without_weight_is_not_there(self, cancer):
        X, y, *_ = cancer
        with pytest.raises(ValueError, match="two classes with positive weight"):
            AdversarialClassifier().fit(X, y, sample_weight=(y == "benign").astype(float))
        three = np.where(np.arange(len(y)) < 5, "unknown", y)
        model = AdversarialClassifier(**QUICK).fit(X, three, sample_weight=three != "unknown")
        assert list(model.classes_) == ["benign", "malignant"]


class TestExchangeable:
    def test_pipeline_grid_search_and_evaluation(self, cancer):
        X, y, X_test, y_test = cancer
        convex = make_pipeline(StandardScaler(), ConvexRobustClassifier(0.1, n_patterns=3))
        deep = make_pipeline(StandardScaler(), AdversarialClassifier(0.1, **QUICK))
        grid = {"adversarialclassifier__method": ["standard", "fgsm"]}
        search = GridSearchCV(deep, grid, cv=2).fit(X, y)
        assert search.best_score_ > 0.8
        models = {"convex": convex.fit(X, y), "deep": search.best_estimator_}
        table = evaluate_robustness(
            models, X_test, y_test, [0.1], suite={"fgsm": {}, "pgd": {"n_steps": 10}}
        )
        for name in models:
            chain = [
                table.accuracy(name, 0.1, measure)
                for measure in ("certified", "exact", "worst attack", "clean")
            ]
            assert chain == sorted(chain)
            assert chain[-1] > 0.8

    @pytest.mark.parametrize("name", deep.__all__)
    def test_public_names_exist(self, name):
        assert hasattr(deep, name)

    def test_same_words_as_the_convex_estimators(self):
        shared = {"epsilon", "norm", "beta", "bounds", "random_state"}
        assert shared <= AdversarialClassifier().get_params().keys()
        assert shared <= ConvexRobustClassifier().get_params().keys()


class TestCatalogue:
    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_learns(self, name):
        rng = np.random.default_rng(0)
        X = np.repeat([[-1.0, 0.0], [1.0, 0.0]], 20, axis=0) + 0.2 * rng.normal(size=(40, 2))
        y = np.repeat([0, 1], 20)
        options = {"n_epochs": 10, "batch_size": 20, "learning_rate": 0.05, "beta": 1e-4}
        model = AdversarialClassifier(0.1, method=name, width=16, random_state=0, **options)
        assert model.fit(X, y).score(X, y) > 0.9

    def test_a_class_with_options(self):
        method = create_method(partial(Trades, weight=2.5), LpBall(2, 0.1), n_rows=4)
        assert (type(method), method.weight) == (Trades, 2.5)
        assert create_method("trades", LpBall(2, 0.1), n_rows=4, weight=2.5).weight == 2.5

    def test_rows_and_seeds_reach_those_who_want_them(self):
        assert create_method("ssds", LpBall(2, 0.1), n_rows=7).n_rows == 7
        states = [
            create_method("dale", LpBall(2, 0.1), n_rows=7, random_state=seed).state_dict()
            for seed in (3, 3, 4)
        ]
        first, same, other = (state["generator"] for state in states)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)

    def test_what_cannot_be_is_refused(self):
        ball = LpBall(2, 0.1)
        with pytest.raises(ValueError, match="method must be one of"):
            create_method("magic", ball, n_rows=1)
        with pytest.raises(ValueError, match="method must be one of"):
            create_method(Trades(ball), ball, n_rows=1)
        with pytest.raises(ValueError, match=r"has no option \['wait'\]; it has \['weight'"):
            create_method("trades", ball, n_rows=1, wait=3)
        with pytest.raises(ValueError, match="norm must be inf"):
            create_method("ibp", ball, n_rows=1)

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ("trades", "got 'trades': create_method makes one"),
            (Trades, "got the class Trades: give"),
        ],
    )
    def test_methods_that_are_no_objects(self, method, message):
        model, x = torch.nn.Linear(2, 1), torch.zeros(4, 2)
        with pytest.raises(ValueError, match=message):
            train(model, method, x, torch.ones(4), n_epochs=1)
        with pytest.raises(TypeError, match="Trades is a class: give Trades"):
            WeightPerturbed(Trades)
        with pytest.raises(ValueError, match="the class Trades: give"):
            Augmented(Trades)
        with pytest.raises(ValueError, match="method must be an object that trains by batches"):
            create_method(lambda ball: ball, LpBall(2, 0.1), n_rows=4)

    def test_attacks_that_are_no_functions(self):
        ball, x, y = LpBall(2, 0.1), torch.zeros(4, 2), torch.ones(4)
        model, known = torch.nn.Linear(2, 1), "attacks.fgsm, .*attacks.square, .*got 'magic'"
        with pytest.raises(ValueError, match=known):
            Attacked(ball, attack="magic")
        with pytest.raises(ValueError, match=known):
            train(model, Trades(ball), x, y, n_epochs=1, attack="magic")
        with pytest.raises(ValueError, match="got the class Trades"):
            worst_case(lambda x: x[:, 0] + 1.0, x, y, ball, attacks=[Trades])

    @pytest.mark.parametrize("name", NETWORKS[:-1])
    @pytest.mark.parametrize("n_outputs", [1, 4])
    def test_networks(self, name, n_outputs):
        shape = (5,) if name == "two-layer" else (3, 8, 8)
        network = create_network(name, shape, n_outputs)
        with torch.no_grad():
            assert network.eval()(torch.zeros(2, *shape)).shape == (2, n_outputs)

    def test_networks_of_other_points_are_refused(self):
        with pytest.raises(ValueError, match="network must be one of"):
            create_network("transformer", (5,), 1)
        with pytest.raises(ValueError, match=r"'two-layer' takes points \(n, d\)"):
            create_network("two-layer", (1, 8, 8), 1)
        with pytest.raises(ValueError, match=r"'cnn' takes images \(n, c, h, w\)"):
            create_network("cnn", (5,), 1)


class TestBadInput:
    @pytest.mark.parametrize("estimator", [AdversarialClassifier, AdversarialRegressor])
    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"epsilon": -0.1}, "epsilon must be"),
            ({"epsilon": np.ones(3)}, "epsilon has 3 entries but the data has 8 features"),
            ({"norm": 3}, "norm must be 1, 2 or"),
            ({"norm": "l3"}, "norm must be 1, 2 or.*got 'l3'"),
            ({"beta": -1.0}, "beta must be"),
            ({"beta": np.nan}, "beta must be"),
            ({"method": "magic"}, "method must be one of"),
            ({"width": 0}, "width must be a whole number"),
            ({"n_epochs": 0}, "n_epochs must be a whole number"),
            ({"batch_size": 2.5}, "batch_size must be a whole number"),
            ({"network": torch.nn.Linear(8, 1)}, "network must be a function"),
            ({"network": lambda d, c: torch.nn.Linear(d, c + 1)}, r"outputs \(n, 1\) for these"),
            ({"bounds": (-0.1, 0.1)}, r"bounds exclude the data: X\[0, 0\]"),
            ({"bounds": (1, 0)}, "bounds must be a pair"),
            ({"training": {"schedule": "spiral"}}, "schedule must be one of"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_parameters_are_named(self, cancer, estimator, parameters, message):
        X, y, *_ = cancer
        with pytest.raises(ValueError, match=message):
            estimator(**parameters).fit(X, (y == "benign").astype(int))

    def test_scores(self, fitted, cancer):
        _, _, X, y = cancer
        with pytest.raises(ValueError, match="method must be one of"):
            fitted.robust_score(X, y, method="guess")
        with pytest.raises(ValueError, match="epsilon must be"):
            fitted.robust_score(X, y, epsilon=-1.0)

    def test_classes_and_norms(self, cancer):
        X, y, *_ = cancer
        with pytest.raises(ValueError, match="two classes"):
            AdversarialClassifier().fit(X, np.ones(len(X)))
        with pytest.raises(ValueError, match="norm must be inf"):
            AdversarialClassifier(norm=2, method="ibp").fit(X, y)
        with pytest.raises(ValueError, match="validation"):
            AdversarialRegressor(training={"validation": (X, y)}).fit(X, X[:, 0])

    def test_a_diverging_loss_stops(self, cancer):
        X, y, *_ = cancer
        with pytest.raises(FloatingPointError, match="there is no checkpoint"):
            AdversarialClassifier(learning_rate=1e300, n_epochs=3).fit(X, y)
