import numpy as np
import pytest
from sklearn.datasets import load_iris, make_moons
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
from sklearn.tree import DecisionTreeClassifier

from convexrobust import ConvexRobustClassifier, LpBall, TwoLayerReLU, as_network
from convexrobust.certificates import certify
from convexrobust.conversion import network_labels

X, Y = make_moons(80, noise=0.2, random_state=0)
SMALL = {"hidden_layer_sizes": (6,), "max_iter": 3000, "random_state": 0, "solver": "lbfgs"}


def test_a_network_is_itself():
    network = TwoLayerReLU(np.ones((3, 2)), np.ones((2, 1)))
    assert as_network(network) is network


def test_a_perceptron_of_two_classes():
    model = MLPClassifier(**SMALL).fit(X, np.where(Y, "b", "a"))
    output = as_network(model).predict(X)[:, 0]
    np.testing.assert_array_equal(np.where(output > 0.0, "b", "a"), model.predict(X))
    np.testing.assert_allclose(1.0 / (1.0 + np.exp(-output)), model.predict_proba(X)[:, 1])


def test_a_perceptron_of_three_classes():
    X, y = load_iris(return_X_y=True)
    model = MLPClassifier(**SMALL).fit(X, y)
    outputs = np.exp(as_network(model).predict(X))
    expected = outputs / outputs.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(X), expected, atol=1e-9)


def test_a_perceptron_for_regression():
    model = MLPRegressor(**SMALL).fit(X, Y)
    np.testing.assert_allclose(as_network(model).predict(X)[:, 0], model.predict(X))


@pytest.mark.parametrize(
    "scaler",
    [
        StandardScaler(),
        StandardScaler(with_mean=False),
        StandardScaler(with_std=False),
        MinMaxScaler((-1.0, 2.0)),
        MaxAbsScaler(),
        RobustScaler(),
        RobustScaler(with_centering=False),
        RobustScaler(with_scaling=False),
        PCA(2),
        "passthrough",
        None,
    ],
    ids=str,
)
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_scaling_joins_the_hidden_layer(scaler, fit_intercept):
    model = ConvexRobustClassifier(0.1, n_patterns=3, random_state=0, fit_intercept=fit_intercept)
    pipeline = make_pipeline(StandardScaler(), scaler, model).fit(10.0 * X + 3.0, Y)
    new = 10.0 * np.random.default_rng(0).normal(size=(50, 2))
    network = as_network(pipeline)
    np.testing.assert_allclose(network.predict(new)[:, 0], pipeline.decision_function(new))
    assert network.n_features == 2


def test_a_pipeline_is_certified_in_units_of_its_input():
    scale = np.array([10.0, 0.1])
    model = ConvexRobustClassifier(0.1, n_patterns=3, random_state=0)
    pipeline = make_pipeline(StandardScaler(), model).fit(X * scale, Y)
    ball = LpBall(np.inf, 0.2 * scale * X.std(axis=0))
    found = certify(pipeline, X * scale, Y, ball, "exact")
    inside = LpBall(np.inf, 0.2)
    standardised = StandardScaler().fit_transform(X)
    expected = certify(pipeline[-1], standardised, Y, inside, "exact")
    np.testing.assert_array_equal(found.status, expected.status)
    assert {"robust", "broken"} == set(found.status)
    broken = found.status == "broken"
    assert (pipeline.predict(found.X_adv[broken]) != Y[broken]).all()


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_torch_network(bias, flatten):
    torch = pytest.importorskip("torch")
    layers = [torch.nn.Linear(4, 5, bias=bias), torch.nn.ReLU(), torch.nn.Linear(5, 3, bias=bias)]
    model = torch.nn.Sequential(*([torch.nn.Flatten()] if flatten else []), *layers)
    X = torch.randn(20, 4)
    expected = model(X).detach().numpy()
    np.testing.assert_allclose(as_network(model).predict(X.numpy()), expected, atol=1e-6)
    assert model[-1].weight.requires_grad


def test_a_subclass_of_sequential():
    pytest.importorskip("torch")
    from convexrobust.deep.networks import two_layer

    assert as_network(two_layer(3, 5, 2)).output.shape == (5, 2)


def test_there_and_back_through_torch():
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for intercept in (True, False):
        hidden, output = rng.normal(size=(4, 5)), rng.normal(size=(5, 2))
        network = TwoLayerReLU(hidden, output, intercept, rng.normal(size=2))
        back = as_network(network.to_torch())
        np.testing.assert_array_equal(back.hidden, hidden)
        np.testing.assert_array_equal(back.output, output)
        np.testing.assert_array_equal(back.offset, network.offset)


def other_models():
    torch = pytest.importorskip("torch")
    nn = torch.nn

    def layers():
        return nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)

    class Own(nn.Sequential):
        def forward(self, x):
            return -super().forward(x)

    relu = nn.ReLU()
    twice = nn.Sequential(nn.Linear(2, 3), relu, nn.Linear(3, 1), relu)
    hooked = nn.Sequential(*layers())
    hooked[-1].register_forward_hook(lambda module, inputs, outputs: -outputs)
    nan = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        nan[0].weight[0, 0] = np.nan
    return [
        (nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), "Tanh"),
        (nn.Linear(2, 1), "forward method"),
        (nn.Sequential(nn.Flatten(0), *layers()), "layers"),
        (twice, "layers"),
        (Own(*layers()), "forward method"),
        (hooked, "hooks"),
        (nan, "finite"),
        (MLPClassifier((3, 3), max_iter=500).fit(X[:, :1], Y), "2 hidden layers"),
        (MLPClassifier((3,), "tanh", max_iter=500).fit(X, Y), "tanh"),
        (MLPClassifier((3,), max_iter=500).fit(X, np.column_stack([Y, 1 - Y])), "several labels"),
        (make_pipeline(PCA(1, whiten=True), MLPClassifier(**SMALL)).fit(X, Y), "whiten"),
        (make_pipeline(MinMaxScaler(clip=True), MLPClassifier(**SMALL)).fit(X, Y), "clipping"),
        (make_pipeline(DecisionTreeClassifier()).fit(X, Y), "not a network"),
        (LogisticRegression().fit(X, Y), "not a network"),
        (ConvexRobustClassifier(), "not fitted"),
        (MLPRegressor(hidden_layer_sizes=(3,), loss="poisson", max_iter=500).fit(X, Y), "exp"),
        (make_pipeline(StandardScaler(), MLPClassifier(**SMALL).fit(X, Y)), "not fitted"),
        ("network", "not a network"),
    ]


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_other_models_are_refused_by_name():
    for model, reason in other_models():
        with pytest.raises(ValueError, match=reason):
            as_network(model)


def test_labels_are_those_of_the_model():
    model = MLPClassifier(**SMALL).fit(X, np.where(Y, "b", "a"))
    np.testing.assert_array_equal(network_labels(model, ["b", "a"]), [1, -1])
    with pytest.raises(ValueError, match="'c'"):
        network_labels(model, ["b", "c"])
    np.testing.assert_array_equal(network_labels(as_network(model), [1, -1]), [1, -1])
