import itertools
from functools import partial

import numpy as np
import pytest
from scipy.stats import beta
from sklearn.datasets import load_iris, make_moons
from sklearn.ensemble import RandomForestClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from convexrobust import ConvexRobustClassifier, TwoLayerReLU, attacks
from convexrobust.certificates import certified_radius, exact_radius
from convexrobust.conversion import as_network, network_labels
from convexrobust.evaluation import RobustnessTable, evaluate_robustness, subjects
from convexrobust.perturbations import LpBall

SHORT = {
    "fgsm": {},
    "pgd": {"n_steps": 10, "n_restarts": 2},
    "apgd": {"n_steps": 10},
    "square": {"n_queries": 50},
}
X, Y = make_moons(60, noise=0.25, random_state=0)
LABELS = np.where(Y, "yes", "no")


@pytest.fixture(scope="module")
def perceptron():
    return MLPClassifier((16,), max_iter=3000, random_state=0, solver="lbfgs").fit(X, LABELS)


def of(table, model, measure):
    return [row.accuracy for row in table.rows if (row.model, row.measure) == (model, measure)]


@pytest.mark.parametrize("norm", [1, 2, np.inf])
def test_the_sandwich(perceptron, norm):
    convex = ConvexRobustClassifier(0.1, norm, n_patterns=5, random_state=0).fit(X, LABELS)
    models = {"convex": convex, "perceptron": perceptron}
    radii = [0.0, 0.1, 0.3]
    table = evaluate_robustness(models, X, LABELS, radii, norm=norm, suite=SHORT)
    for name, model in models.items():
        clean, worst, certified, exact = (
            np.array(of(table, name, m)) for m in ("clean", "worst attack", "certified", "exact")
        )
        assert (certified <= exact).all()
        assert (exact <= worst).all()
        assert (worst <= clean).all()
        np.testing.assert_allclose(clean, model.score(X, LABELS))
        assert clean[0] == worst[0] == certified[0] == exact[0]
        assert exact[2] < clean[2]
        for attack in SHORT:
            assert (worst <= np.array(of(table, name, attack)) + 1e-12).all()
        network, labels, ball = as_network(model), network_labels(model, LABELS), LpBall(norm, 0.1)
        radius = certified_radius(network, X, labels, ball)
        expected = [np.mean((radius >= t) & (model.predict(X) == LABELS)) for t in radii]
        np.testing.assert_allclose(certified, expected)
        true = exact_radius(network, X, labels, ball)
        for t, share in zip(radii, exact, strict=True):
            right = model.predict(X) == LABELS
            assert np.mean(right & (true.lower > t)) <= share <= np.mean(right & (true.upper >= t))


def test_a_pipeline_is_measured_in_units_of_its_input(perceptron):
    scale = np.array([100.0, 0.01])
    model = MLPClassifier((16,), max_iter=3000, random_state=0, solver="lbfgs")
    pipeline = make_pipeline(StandardScaler(), model).fit(X * scale, LABELS)
    shape = (X * scale).std(axis=0)
    table = evaluate_robustness(
        {"pipeline": pipeline}, X * scale, LABELS, [0.1, 0.2], feature_scale=shape, suite=SHORT
    )
    inside = pipeline[0].transform(X * scale)
    expected = evaluate_robustness({"model": pipeline[1]}, inside, LABELS, [0.1, 0.2], suite=SHORT)
    for measure in ("clean", "fgsm", "certified", "exact"):
        np.testing.assert_allclose(of(table, "pipeline", measure), of(expected, "model", measure))


def test_bounds_and_immutable_features_help(perceptron):
    plain, held, cut = (
        evaluate_robustness(perceptron, X, LABELS, 0.3, suite={}, **options)
        for options in (
            {},
            {"feature_scale": [1.0, 0.0]},
            {"bounds": (X.min(axis=0), X.max(axis=0))},
        )
    )
    exact = [table.accuracy("MLPClassifier", 0.3, "exact") for table in (plain, held, cut)]
    assert exact[0] <= min(exact[1:])
    assert exact[0] < exact[1]


def test_several_classes():
    X, y = load_iris(return_X_y=True)
    model = MLPClassifier((8,), max_iter=3000, random_state=0, solver="lbfgs").fit(X, y)
    table = evaluate_robustness(model, X, y, [0.05, 0.2], suite=SHORT)
    worst, exact = (of(table, "MLPClassifier", m) for m in ("worst attack", "exact"))
    assert exact[1] <= worst[1] < model.score(X, y)


def test_a_torch_module_is_what_its_network_is():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    network = TwoLayerReLU(rng.normal(size=(3, 8)), rng.normal(size=(8, 1)))
    y = np.where(network.predict(X)[:, 0] > 0.2, 1, -1)
    module = torch.nn.Sequential(torch.nn.Identity(), *network.to_torch())
    table = evaluate_robustness({"a": network, "b": module}, X, y, [0.1, 0.3], suite=SHORT)
    for measure in ("clean", *SHORT, "worst attack"):
        np.testing.assert_allclose(of(table, "a", measure), of(table, "b", measure), atol=0.035)
    assert np.isnan(of(table, "b", "exact")).all()
    assert np.isnan(of(table, "b", "certified")).all()
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())


def test_other_classifiers_are_attacked_without_gradients():
    forest = RandomForestClassifier(10, random_state=0).fit(X, LABELS)
    table = evaluate_robustness({"forest": forest}, X, LABELS, [0.0, 0.3], suite=SHORT)
    assert np.isnan(of(table, "forest", "pgd")).all()
    square = of(table, "forest", "square")
    assert square == of(table, "forest", "worst attack")
    assert square[0] == forest.score(X, LABELS) > square[1]


def test_confidence_intervals_are_those_of_clopper_and_pearson(perceptron):
    table = evaluate_robustness(perceptron, X, LABELS, 0.2, suite=SHORT, confidence=0.9)
    for row in table.rows:
        k = round(row.accuracy * row.n)
        low = beta.ppf(0.05, k, row.n - k + 1) if k > 0 else 0.0
        high = beta.ppf(0.95, k + 1, row.n - k) if k < row.n else 1.0
        np.testing.assert_allclose((row.low, row.high), (low, high))
        assert row.n == len(X)


def test_without_time_samples_stay_undecided():
    rng = np.random.default_rng(1)
    network = TwoLayerReLU(rng.normal(size=(3, 30)), rng.normal(size=(30, 1)))
    y = np.where(network.predict(X)[:, 0] > 0, 1, -1)
    row = evaluate_robustness(network, X, y, 0.3, suite={}, time_limit=0.0).rows[-1]
    assert row.measure == "exact"
    assert row.undecided > 0
    certified = evaluate_robustness(network, X, y, 0.3, suite={}, exact=False)
    assert row.accuracy == certified.accuracy("TwoLayerReLU", 0.3, "certified")
    assert "*" in str(RobustnessTable([row]))


def test_the_table(perceptron):
    table = evaluate_robustness({"perceptron": perceptron}, X, LABELS, [0.1, 0.2], suite=SHORT)
    lines = str(table).splitlines()
    assert len(lines) == 4
    assert all(len(line) == len(lines[0]) for line in lines)
    assert f"{100 * table.accuracy('perceptron', 0.1, 'clean'):.1f}%" in lines[2]
    frame = table.to_frame()
    assert len(frame) == len(table.rows) == 2 * (len(SHORT) + 4)
    with pytest.raises(KeyError, match="no 'cleen'"):
        table.accuracy("perceptron", 0.1, "cleen")


def test_a_contradiction_is_an_error(perceptron, monkeypatch):
    monkeypatch.setattr(subjects.Network, "stands", lambda self, *_: False)
    with pytest.raises(RuntimeError, match="proven robust"):
        evaluate_robustness(perceptron, X, LABELS, 0.01, suite={"fgsm": {}})


def test_a_suite_has_names_of_its_own(perceptron):
    suite = {
        "pgd": {"n_steps": 10},
        "pgd-1": {"attack": "pgd", "n_steps": 1},
        "ten steps": {"attack": "pgd", "n_steps": 10},
        "apgd": {"n_steps": 10},
        "mine": partial(attacks.apgd, n_steps=10, random_state=0),
    }
    table = evaluate_robustness(perceptron, X, LABELS, [0.2], suite=suite)
    found = {name: of(table, "MLPClassifier", name) for name in suite}
    assert (
        found["ten steps"] == found["pgd"] <= found["pgd-1"] < of(table, "MLPClassifier", "clean")
    )
    assert found["mine"] == found["apgd"]
    assert list(suite) == [row.measure for row in table.rows[1:6]]


def test_functions_of_a_suite_attack_what_has_gradients():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    hidden, output = rng.normal(size=(3, 8)), rng.normal(size=(8, 1))
    middle = np.median(TwoLayerReLU(hidden, output).predict(X), axis=0)
    network = TwoLayerReLU(hidden, output, offset=-middle)
    y = np.where(network.predict(X)[:, 0] > 0.0, 1, -1)
    module = torch.nn.Sequential(torch.nn.Identity(), *network.to_torch())
    forest = RandomForestClassifier(5, random_state=0).fit(X, y)
    models = {"network": network, "module": module, "forest": forest}
    suite = {"square": {"n_queries": 5}, "mine": partial(attacks.pgd, n_steps=10)}
    table = evaluate_robustness(models, X, y, [0.2], suite=suite)
    assert (
        of(table, "network", "mine") == of(table, "module", "mine") < of(table, "module", "clean")
    )
    assert np.isnan(of(table, "forest", "mine"))
    assert module.training


def within_twice_the_radius(loss_and_gradient, X, ball, xp):
    return attacks.fgsm(loss_and_gradient, X, ball.scaled_to(2.0 * ball.radius), xp=xp)


def written_on_what_was_given(loss_and_gradient, X, ball, xp):
    X += 2.0 * ball.radius
    return X


@pytest.mark.parametrize("attack", [within_twice_the_radius, written_on_what_was_given])
def test_points_of_functions_are_checked(perceptron, attack):
    with pytest.raises(RuntimeError, match=r"suite\['mine'\]: an attacked point left the ball"):
        evaluate_robustness(perceptron, X, LABELS, 0.1, suite={"mine": attack})


@pytest.mark.parametrize(
    "points", [None, X[:2], X.tolist(), X[:, 0]], ids=lambda p: type(p).__name__
)
def test_functions_return_points(perceptron, points):
    with pytest.raises(ValueError, match=r"suite\['mine'\] must return points like X"):
        evaluate_robustness(
            perceptron, X, LABELS, 0.1, suite={"mine": lambda loss, X, ball, xp: points}
        )


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (["pgd"], "suite must be a dict"),
        ("pgd", "suite must be a dict"),
        ({3: {}}, "suite must have strings as names"),
        ({"clean": {"attack": "pgd"}}, "suite must have strings as names, and none of"),
        ({"pgd": None}, r"suite\['pgd'\] must be a dict of options, or a function"),
        ({"pgd-100": {"n_steps": 100}}, r"suite\['pgd-100'\] has no known attack.*'fgsm', 'pgd'"),
        ({"mine": {"attack": "dgp"}}, r"suite\['mine'\] has no known attack.*got 'dgp'"),
        ({"mine": {"attack": attacks.pgd}}, r"suite\['mine'\] has no known attack"),
        ({"pgd": {"attack": "apgd"}}, "give it a name of its own"),
        ({"mine": lambda model: model}, r"suite\['mine'\] must be callable as attack"),
        ({"pgd": {"steps": 3}}, r"suite\['pgd'\] has no option 'steps' .*'MLPClassifier'.*n_steps"),
        ({"pgd": {"xp": np}}, "has no option 'xp'"),
        ({"pgd": {7: 3}}, "has no option 7"),
        ({"p": {"attack": "pgd", "n_steps": "many"}}, r"suite\['p'\] must have a whole number"),
        ({"pgd": {"n_steps": 2.5}}, "a whole number >= 1 as 'n_steps', got 2.5"),
        ({"pgd": {"n_restarts": 0}}, "a whole number >= 1 as 'n_restarts'"),
        ({"pgd": {"step": "long"}}, "a number as 'step', got 'long'"),
        ({"square": {"shape": 28}}, "a tuple .* as 'shape'"),
        ({"square": {"random_state": "seed"}}, "as 'random_state', got 'seed'"),
    ],
)
def test_a_suite_that_cannot_be_is_refused_before_any_work(perceptron, monkeypatch, suite, message):
    monkeypatch.setattr(subjects.Network, "is_right", None)
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(perceptron, X, LABELS, 0.1, suite=suite)


def test_modules_have_options_of_their_own(perceptron):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Tanh())
    y = np.where(Y, 1, -1)
    suite = {"pgd": {"batch_size": 20, "n_steps": 2}}
    table = evaluate_robustness({"module": module}, X, y, 0.1, suite=suite)
    assert of(table, "module", "pgd") <= of(table, "module", "clean")
    with pytest.raises(ValueError, match="no option 'batch_size' for the model 'perceptron'"):
        evaluate_robustness({"perceptron": perceptron}, X, LABELS, 0.1, suite=suite)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confidence": "high"}, "confidence"),
        ({"epsilons": "large"}, "epsilons must be numbers"),
        ({"random_state": "seed"}, "random_state must be"),
        ({"X": X.astype(str)}, "no numbers"),
        ({"X": X[:5]}, "one length"),
        ({"X": X[:0], "y": LABELS[:0]}, "one length"),
        ({"confidence": 1.0}, "confidence"),
        ({"suite": {"pdg": {}}}, "'pdg'"),
        ({"y": np.where(Y, "yes", "maybe")}, "maybe"),
        ({"estimators": {"it": "no model"}}, "'it'"),
        ({"X": np.where(X > 1.5, np.nan, X)}, "finite"),
        ({"epsilons": [-0.1]}, "epsilon"),
        ({"epsilons": []}, "a radius"),
        ({"estimators": {}}, "a model"),
        ({"bounds": (0.0, 0.1)}, "bounds exclude"),
        ({"X": np.hstack([X, X])}, "shape"),
    ],
)
def test_wrong_input_is_refused(perceptron, change, message):
    arguments = {"estimators": perceptron, "X": X, "y": LABELS, "epsilons": 0.1} | change
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(**arguments)


def test_names_must_be_distinct(perceptron):
    with pytest.raises(ValueError, match="dict of names"):
        evaluate_robustness([perceptron, perceptron], X, LABELS, 0.1)


def test_a_model_that_is_never_right():
    forest = RandomForestClassifier(5, random_state=0).fit(X, np.where(Y, "no", "yes"))
    wrong = forest.predict(X) != LABELS
    table = evaluate_robustness({"a": forest}, X[wrong], LABELS[wrong], 0.1, suite=SHORT)
    assert of(table, "a", "square") == [0.0]
    network = TwoLayerReLU(np.zeros((3, 1)), np.ones((1, 1)), offset=np.array([-1.0]))
    table = evaluate_robustness({"b": network}, X, np.ones(len(X), int), 0.1, suite=SHORT)
    assert (
        of(table, "b", "clean") == of(table, "b", "certified") == of(table, "b", "exact") == [0.0]
    )


def test_pairwise_scores_are_refused():
    X, y = load_iris(return_X_y=True)
    model = SVC(decision_function_shape="ovo").fit(X, y)
    with pytest.raises(ValueError, match="ovr"):
        evaluate_robustness(model, X, y, 0.1, suite={"square": {"n_queries": 5}})


def test_an_attack_that_does_not_apply_is_left_out(perceptron):
    table = evaluate_robustness(perceptron, X, LABELS, 0.1, suite={"fgsm": {}, "autoattack": {}})
    assert np.isnan(of(table, "MLPClassifier", "autoattack"))
    assert of(table, "MLPClassifier", "worst attack") == of(table, "MLPClassifier", "fgsm")


def test_an_estimator_around_a_deeper_module_is_attacked_by_gradients():
    torch = pytest.importorskip("torch")
    from convexrobust.deep import AdversarialClassifier

    def network(n_features, n_outputs):
        sizes = (n_features, 8, 8, n_outputs)
        layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        return torch.nn.Sequential(
            layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2]
        )

    model = AdversarialClassifier(0.1, network=network, n_epochs=20, random_state=0).fit(X, LABELS)
    table = evaluate_robustness(model, X, LABELS, 0.3, suite=SHORT)
    assert of(table, "AdversarialClassifier", "clean") == [model.score(X, LABELS)]
    assert of(table, "AdversarialClassifier", "pgd") <= of(table, "AdversarialClassifier", "clean")
