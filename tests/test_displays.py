"""Displays: what is drawn is true, and the numbers drawn are those computed elsewhere."""

import sys
from functools import partial

import numpy as np
import pytest
from sklearn.datasets import make_moons
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale

from convexrobust import (
    ConicSolver,
    ConvexProgram,
    ConvexRobustClassifier,
    GroupLasso,
    Hinge,
    InteriorPoint,
    LpBall,
    TwoLayerReLU,
    WorkingSet,
    attacks,
    certificates,
    certify,
    exact_radius,
    sample_patterns,
)
from convexrobust.backends import numpy as numpy_backend
from convexrobust.displays import (
    AdversarialExamplesDisplay,
    CertifiedRadiusDisplay,
    ConvergenceDisplay,
    RobustAccuracyDisplay,
    RobustBoundaryDisplay,
)
from convexrobust.displays.boundary import ball_outlines
from convexrobust.program import Progress, Solution

plt = pytest.importorskip("matplotlib.pyplot")

X, Y = make_moons(40, noise=0.2, random_state=1)
X = scale(X)
EPSILONS = np.linspace(0.0, 0.8, 9)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def model():
    return ConvexRobustClassifier(0.2, n_patterns=10, random_state=0).fit(X, Y)


@pytest.fixture(scope="module")
def program():
    P = np.column_stack([X, np.ones(len(X))])
    D = sample_patterns(P, 6, random_state=0)
    return ConvexProgram(
        P, 2 * Y - 1, D, Hinge(), GroupLasso(1e-2), LpBall(np.inf, 0.1), intercept=True
    )


def three_classes(n_features=2):
    rng = np.random.default_rng(0)
    network = TwoLayerReLU(rng.normal(size=(n_features + 1, 8)), rng.normal(size=(8, 3)))
    points = rng.normal(size=(30, n_features))
    return network, points, rng.integers(3, size=30)


# ------------------------------------------------------------------------- robust accuracy


def assert_ordered(display):
    lower, upper = display.exact
    for below, above in ((display.certified, lower), (lower, upper), (upper, display.attacked)):
        assert np.all(below <= above)
    assert np.all(display.attacked <= display.clean)
    for curve in (display.certified, lower, upper, display.attacked):
        assert np.all(np.diff(curve) <= 0.0)


@pytest.mark.parametrize("p", [1, 2, np.inf])
def test_band_is_ordered_and_starts_at_the_clean_accuracy(model, p):
    ball = LpBall(p, 0.3, bounds=(-4.0, 4.0))
    display = RobustAccuracyDisplay.from_estimator(
        model, X, Y, ball=ball, epsilons=EPSILONS, exact=True
    )
    assert_ordered(display)
    assert display.clean == model.score(X, Y)
    assert display.certified[0] == display.attacked[0] == display.clean
    assert display.certified[-1] < display.clean


def test_band_of_several_classes_is_ordered():
    network, points, labels = three_classes(4)
    labels[:20] = network.predict(points[:20]).argmax(axis=1)
    ball = LpBall(np.inf, [0.1, 0.2, 0.0, 0.1])
    display = RobustAccuracyDisplay.from_estimator(network, points, labels, ball=ball, exact=True)
    assert_ordered(display)
    assert display.clean == np.mean(network.predict(points).argmax(axis=1) == labels)


def test_accuracies_are_those_of_robust_score(model):
    display = RobustAccuracyDisplay.from_estimator(model, X, Y, epsilons=EPSILONS, exact=True)
    for i, epsilon in enumerate(EPSILONS):
        certified, exact, attacked = (
            model.robust_score(X, Y, epsilon=epsilon, method=method)
            for method in ("certified", "exact", "attack")
        )
        assert display.certified[i] == certified
        assert display.exact[0, i] <= exact <= display.exact[1, i]
        assert exact <= display.attacked[i] <= attacked


def test_default_radii_go_to_twice_the_trained_one(model):
    display = RobustAccuracyDisplay.from_estimator(model, X, Y)
    np.testing.assert_allclose(display.epsilons, np.linspace(0.0, 0.4, 21))
    assert display.estimator_name == "ConvexRobustClassifier"


def test_a_weaker_attack_leaves_more(model):
    options = {"epsilons": EPSILONS, "ball": LpBall(2, 0.2)}
    strong = RobustAccuracyDisplay.from_estimator(model, X, Y, **options)
    none = RobustAccuracyDisplay.from_estimator(
        model, X, Y, attack=lambda objective, X, ball: X, **options
    )
    assert np.all(none.attacked == none.clean)
    assert strong.attacked.sum() < none.attacked.sum()


def test_points_broken_once_are_not_attacked_again(model):
    sizes = []

    def attack(objective, X, ball):
        sizes.append(len(X))
        return attacks.fgsm(objective, X, ball)

    display = RobustAccuracyDisplay.from_estimator(
        model, X, Y, epsilons=EPSILONS, ball=LpBall(np.inf, 0.2), attack=attack
    )
    assert sizes[0] == len(X)
    assert sizes[1:] == [round(share * len(X)) for share in display.attacked[:-1]]


def test_nothing_is_left_of_a_network_that_is_broken_everywhere(model):
    display = RobustAccuracyDisplay.from_estimator(model, X, Y, epsilons=[0.0, 50.0, 60.0])
    assert display.attacked.tolist() == [display.clean, 0.0, 0.0]


def test_accuracy_from_a_bracket_of_exact_radii(model):
    ball = LpBall(2, 0.2)
    found = exact_radius(model, X, Y, ball)
    drawn = RobustAccuracyDisplay.from_predictions(
        Y,
        model.predict(X),
        certified_radius=found.lower,
        attacked_radius=found.upper,
        exact_radius=found,
        label="exact search",
    )
    np.testing.assert_array_equal(drawn.exact, [drawn.certified, drawn.attacked])
    finite = np.concatenate([found.lower, found.upper[np.isfinite(found.upper)]])
    assert drawn.epsilons[-1] > finite.max()
    assert drawn.attacked[-1] == np.mean(np.isinf(found.upper))
    texts = [text.get_text() for text in drawn.ax_.get_legend().get_texts()]
    assert texts == ["exact search", "certified", "exact", "attacked"]


def test_accuracy_from_radii_by_hand():
    display = RobustAccuracyDisplay.from_predictions(
        [0, 0, 1, 1],
        [0, 0, 1, 0],
        certified_radius=[0.1, 0.3, np.inf, 5.0],
        attacked_radius=[0.2, 0.3, np.inf, 0.1],
        exact_radius=([0.1, 0.3, np.inf, 0.0], [0.2, 0.3, np.inf, 0.0]),
        epsilons=[0.3, 0.0, 0.1, 0.15, 0.2, 0.31],
    )
    np.testing.assert_allclose(display.epsilons, [0.0, 0.1, 0.15, 0.2, 0.3, 0.31])
    assert display.certified.tolist() == [0.75, 0.75, 0.5, 0.5, 0.5, 0.25]
    assert display.attacked.tolist() == [0.75, 0.75, 0.75, 0.5, 0.25, 0.25]
    assert display.exact[1].tolist() == display.attacked.tolist()
    assert display.clean == 0.75


def test_pipeline_is_certified_in_the_units_of_its_input():
    raw = X * [100.0, 0.1]
    pipe = make_pipeline(StandardScaler(), MLPClassifier([6], random_state=0, max_iter=3000))
    pipe.fit(raw, Y)
    ball = LpBall(np.inf, [20.0, 0.02])
    display = RobustAccuracyDisplay.from_estimator(pipe, raw, Y, ball=ball, epsilons=[0, 20.0])
    truth = np.mean(certify(pipe, raw, Y, ball).status == "robust")
    assert display.clean == pipe.score(raw, Y)
    assert display.certified[-1] == truth
    with pytest.raises(ValueError, match="ball must be given, as Pipeline"):
        RobustAccuracyDisplay.from_estimator(pipe, raw, Y)


def test_curves_drawn_are_the_attributes(model):
    display = RobustAccuracyDisplay.from_estimator(
        model, X, Y, epsilons=EPSILONS, exact=True, color="red", name="mine"
    )
    for line, curve in (
        (display.certified_, display.certified),
        (display.attacked_, display.attacked),
        (display.exact_, display.exact[0]),
    ):
        np.testing.assert_array_equal(line.get_xydata(), np.column_stack([EPSILONS, curve]))
        assert line.get_color() == "red"
    band = display.band_.get_paths()[0].vertices
    assert {tuple(v) for v in np.column_stack([EPSILONS, display.certified])} <= set(
        map(tuple, band)
    )
    assert {tuple(v) for v in np.column_stack([EPSILONS, display.attacked])} <= set(
        map(tuple, band)
    )
    assert display.clean_.get_ydata() == [display.clean]
    assert display.ax_.get_xlabel() == r"$\ell_\infty$ radius $\epsilon$ (units of X)"


def test_two_models_share_axes_and_one_legend():
    _, ax = plt.subplots()
    first = RobustAccuracyDisplay([0, 1], [0.9, 0.5], [0.9, 0.6], estimator_name="a")
    second = RobustAccuracyDisplay([0, 1], [0.8, 0.6], [0.8, 0.7], exact=[0.8, 0.65])
    assert first.plot(ax) is first
    assert second.plot(ax, name="b").ax_ is first.ax_ is ax
    assert first.figure_ is ax.figure
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["a", "b", "certified", "exact", "attacked"]
    assert first.certified_.get_color() != second.certified_.get_color()
    assert plt.get_fignums() == [ax.figure.number]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"certified_radius": [0.1]}, "one entry a sample.*certified_radius 1"),
        ({"attacked_radius": [0.1, -1.0]}, "attacked_radius must be one number >= 0"),
        ({"exact_radius": ([0.1], [0.2])}, "one entry a sample.*exact_radius 1"),
        ({"epsilons": [0.1, np.nan]}, "epsilons must be a list of finite numbers"),
    ],
)
def test_accuracy_refuses_radii(arguments, message):
    valid = {"certified_radius": [0.1, 0.2], "attacked_radius": [0.1, 0.2]}
    with pytest.raises(ValueError, match=message):
        RobustAccuracyDisplay.from_predictions([0, 1], [0, 1], **{**valid, **arguments})


def test_accuracy_refuses_a_model_curves_and_missing_radii():
    linear = LogisticRegression().fit(X, Y)
    with pytest.raises(ValueError, match="LogisticRegression cannot be read"):
        RobustAccuracyDisplay.from_estimator(linear, X, Y, ball=LpBall(2, 0.1))
    with pytest.raises(ValueError, match=r"attacked must have shape \(2,\), got \(3,\)"):
        RobustAccuracyDisplay([0, 1], [1, 1], [1, 1, 1])
    network, points, labels = three_classes()
    with pytest.raises(ValueError, match="epsilons must be given"):
        RobustAccuracyDisplay.from_estimator(network, points, labels, ball=LpBall(2, 0.0))


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
    display = CertifiedRadiusDisplay([0.1], [True])
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'convexrobust\[plot\]'"):
        display.plot()


# --------------------------------------------------------------------------------- radii


def test_radii_are_those_of_the_predictions(model):
    display = CertifiedRadiusDisplay.from_estimator(model, X, Y)
    np.testing.assert_array_equal(display.radii, model.certified_radius(X))
    np.testing.assert_array_equal(display.right, model.predict(X) == Y)
    exact = CertifiedRadiusDisplay.from_estimator(model, X, Y, method="exact")
    assert np.all(exact.radii >= display.radii)
    found = exact_radius(model, X, model.predict(X), model._ball())
    np.testing.assert_array_equal(exact.radii, found.lower)


def test_histogram_holds_every_sample_once():
    radii = [0.0, 0.1, 0.2, 0.35, 0.1, np.inf, np.inf]
    right = [True, True, True, True, False, True, False]
    display = CertifiedRadiusDisplay(radii, right).plot(bins=4)
    up, down = ([bar.get_height() for bar in bars] for bars in (display.right_, display.wrong_))
    assert sum(up) == 4
    assert sum(down) == -1  # wrong ones downwards
    labels = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert labels == ["right (5, of which 1 without limit)", "wrong (2, of which 1 without limit)"]
    assert display.ax_.yaxis.get_major_formatter()(-3, 0) == "3"


def test_survival_is_the_certified_accuracy(model):
    display = CertifiedRadiusDisplay.from_estimator(model, X, Y, kind="survival")
    x, share = display.line_.get_data()
    assert share[0] == model.score(X, Y)
    for radius in np.linspace(0.01, x[-1], 7):
        drawn = share[np.searchsorted(x, radius) - 1]  # the step left of it goes on up to it
        assert drawn == pytest.approx(model.robust_score(X, Y, epsilon=radius))


def test_radius_display_of_wrong_or_constant_models():
    wrong = CertifiedRadiusDisplay.from_predictions([0, 0], [1, 1], [0.1, np.inf])
    assert not wrong.right.any()
    constant = CertifiedRadiusDisplay([np.inf], [True]).plot()
    assert constant.ax_.get_xlim() == (0.0, 1.0)


def test_radius_display_refuses():
    with pytest.raises(ValueError, match="radii must be one number >= 0"):
        CertifiedRadiusDisplay([-0.1], [True])
    with pytest.raises(ValueError, match="one entry a sample"):
        CertifiedRadiusDisplay.from_predictions([0, 1], [0, 1], [0.1])
    with pytest.raises(ValueError, match="kind must be one of"):
        CertifiedRadiusDisplay([0.1], [True]).plot(kind="pie")
    with pytest.raises(ValueError, match="method must be one of"):
        CertifiedRadiusDisplay.from_estimator(three_classes()[0], X, Y, method="lp")


# ----------------------------------------------------------------------- decision boundary


@pytest.mark.parametrize("epsilon", [0.4, np.array([0.4, 0.1])])
@pytest.mark.parametrize("p", [1, 2, np.inf])
def test_outlines_are_the_balls(p, epsilon):
    ball, directions = LpBall(p, epsilon), np.array([[1, 0], [0, -1], [1, 1], [-1, 2]], float)
    for point, corners in zip(X, ball_outlines(ball, X), strict=True):
        np.testing.assert_allclose(ball.length(corners - point), 1.0)
        # They reach as far as the ball does, but for the arcs between an ellipse's corners.
        reach = np.max((corners - point) @ directions.T, axis=0)
        np.testing.assert_allclose(reach, ball.support(numpy_backend, directions.T), rtol=4e-4)


@pytest.mark.parametrize("p", [1, 2, np.inf])
def test_outline_with_an_immutable_feature_is_a_segment(p):
    (corners,) = ball_outlines(LpBall(p, [0.4, 0.0]), X[:1])
    np.testing.assert_array_equal(corners[:, 1], X[0, 1])
    np.testing.assert_allclose(corners[:, 0].max(), X[0, 0] + 0.4)
    np.testing.assert_allclose(corners[:, 0].min(), X[0, 0] - 0.4)


@pytest.mark.parametrize("p", [1, 2, np.inf])
def test_outlines_are_cut_by_the_bounds(p):
    points = np.array([[0.0, 0.0], [0.9, 0.9], [-1.0, 0.2], [1.0, -1.0]])
    ball = LpBall(p, 0.5, bounds=([-1.0, -1.0], [1.0, 1.0]))
    rng = np.random.default_rng(0)
    for point, corners in zip(points, ball_outlines(ball, points), strict=True):
        assert np.all(np.abs(corners) <= 1.0 + 1e-12)
        assert np.all(ball.length(corners - point) <= 1.0 + 1e-12)
        at_bounds = np.any(np.isclose(np.abs(corners), 1.0), axis=1)
        np.testing.assert_allclose(ball.length(corners - point)[~at_bounds], 1.0)
        # Whatever random point is in ball and bounds is in the polygon, but for the ellipse's arcs.
        samples = point + rng.uniform(-0.5, 0.5, (300, 2))
        inside = (ball.length(samples - point) <= 1.0 - 1e-3) & np.all(np.abs(samples) < 1, axis=1)
        assert np.all(_contained(corners, samples[inside]))
        outside = (ball.length(samples - point) > 1.0) | np.any(np.abs(samples) > 1, axis=1)
        assert not np.any(_contained(corners, samples[outside]))


def _contained(corners, points):
    from matplotlib.path import Path

    return Path(corners).contains_points(points)


def test_boundary_draws_every_ball_and_which_are_robust(model):
    ball = LpBall(2, 0.3)
    display = RobustBoundaryDisplay.from_estimator(model, X, Y, ball=ball, linewidth=1.5)
    assert set(display.balls_.get_linewidth()) == {1.5}
    truth = certify(model, X, Y, ball, "exact").status == "robust"
    np.testing.assert_array_equal(display.robust, truth)
    assert 0 < truth.sum() < len(truth)
    paths, styles = display.balls_.get_paths(), display.balls_.get_linestyles()
    assert len(paths) == len(X)
    for path, outline in zip(paths, ball_outlines(ball, X), strict=True):
        np.testing.assert_array_equal(path.vertices[: len(outline)], outline)
    solid = np.array([pattern is None for _, pattern in styles])
    np.testing.assert_array_equal(solid, truth)
    assert display.ax_.get_aspect() == 1.0
    inside = [(low, high) for low, high in (display.ax_.get_xlim(), display.ax_.get_ylim())]
    corners = np.concatenate(ball_outlines(ball, X))
    for (low, high), side in zip(inside, corners.T, strict=True):
        assert low < side.min() < side.max() < high


def test_robust_balls_hold_no_other_class(model):
    """Brute force: no corner of a solid outline is classified otherwise, some of a dashed one."""
    ball = LpBall(np.inf, 0.25)
    display = RobustBoundaryDisplay.from_estimator(model, X, Y, ball=ball, resolution=20)
    for corners, label, robust in zip(ball_outlines(ball, X), Y, display.robust, strict=True):
        sides = np.concatenate(
            [np.linspace(a, b, 50) for a, b in zip(corners, np.roll(corners, 1, 0), strict=True)]
        )
        assert np.all(model.predict(sides) == label) == robust


def test_boundary_of_several_classes():
    network, points, labels = three_classes()
    display = RobustBoundaryDisplay.from_estimator(
        network, points, labels, ball=LpBall(1, [0.1, 0.3]), resolution=40
    )
    grid = np.stack(np.meshgrid(display.x0, display.x1), axis=-1).reshape(-1, 2)
    winner = network.predict(grid).argmax(axis=1).reshape(40, 40)
    np.testing.assert_array_equal(display.scores.argmax(axis=2), winner)
    assert len(display.regions_) == len(np.unique(winner))
    assert [len(points_.get_offsets()) for points_ in display.points_] == list(np.bincount(labels))
    assert display.ax_.get_aspect() == "auto"  # features of different units


def test_boundary_of_a_constant_network_has_one_region():
    network = TwoLayerReLU(np.zeros((3, 1)), np.ones((1, 1)), offset=np.array([1.0]))
    display = RobustBoundaryDisplay.from_estimator(network, X, 2 * Y - 1, ball=LpBall(2, 0.1))
    assert len(display.regions_) == 1
    np.testing.assert_array_equal(display.robust, Y == 1)


def test_boundary_names_features_and_classes():
    pd = pytest.importorskip("pandas")
    frame, names = pd.DataFrame(X, columns=["height", "width"]), np.array(["cat", "dog"])
    model = ConvexRobustClassifier(0.1, n_patterns=4, random_state=0).fit(frame, names[Y])
    display = RobustBoundaryDisplay.from_estimator(model, frame, names[Y], resolution=10)
    assert (display.ax_.get_xlabel(), display.ax_.get_ylabel()) == ("height", "width")
    texts = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert texts[:2] == ["cat", "dog"]
    np.testing.assert_array_equal(display.y, Y)


def test_boundary_refuses(model):
    network, points, labels = three_classes(3)
    with pytest.raises(ValueError, match=r"X must have shape \(n, 2\)"):
        RobustBoundaryDisplay.from_estimator(network, points, labels, ball=LpBall(2, 0.1))
    with pytest.raises(ValueError, match="bounds exclude the data"):
        ball_outlines(LpBall(1, 0.1, bounds=(0.0, 1.0)), np.array([[0.5, 1.5]]))
    with pytest.raises(ValueError, match=r"scores must have shape \(3, 2, 2\)"):
        RobustBoundaryDisplay([0, 1], [0, 1, 2], np.zeros((2, 3, 2)), X, Y)
    with pytest.raises(ValueError, match="not among the classes"):
        RobustBoundaryDisplay.from_estimator(model, X, Y + 5)


# ---------------------------------------------------------------------------- convergence


@pytest.mark.parametrize(
    "solver",
    [
        InteriorPoint(),
        WorkingSet(1e-2, width=4, n_new=4, max_rounds=3, random_state=0),
    ],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_band_encloses_the_optimum_at_any_time(program, solver):
    solution = solver.solve(program)
    display = ConvergenceDisplay.from_solution(solution)
    assert np.all(display.objective >= solution.objective)
    assert np.all(display.lower_bound <= solution.lower_bound)
    assert np.all(np.diff(display.objective) <= 0.0)
    assert np.all(np.diff(display.lower_bound) >= 0.0)
    assert display.objective[-1] == solution.objective
    assert display.lower_bound[-1] == solution.lower_bound
    assert np.all(display.relative_gap >= solution.relative_gap)
    if isinstance(solver, InteriorPoint):  # for the patterns of the program
        optimum = ConicSolver().solve(program)
        assert np.all(display.objective >= optimum.lower_bound)
        assert np.all(display.lower_bound <= optimum.objective)


def test_band_drawn_is_the_attributes(program):
    solution = InteriorPoint().solve(program)
    display = ConvergenceDisplay.from_solution(solution, against="iterations", name="IP")
    steps = [row.n_iter for row in solution.history]
    drawn = np.column_stack([steps, display.objective])
    np.testing.assert_array_equal(display.objective_.get_xydata(), drawn)
    assert {tuple(row) for row in drawn} <= set(map(tuple, display.band_.get_paths()[0].vertices))
    texts = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert texts == ["IP: objective", "IP: lower bound"]
    gap = display.plot(kind="gap")
    assert gap.ax_.get_yscale() == "log"
    assert gap.band_ is None
    np.testing.assert_array_equal(gap.gap_.get_xdata(), display.seconds)


def test_iterates_outside_the_cones_do_not_count():
    history = (
        Progress(1, 0.1, 0.2, -np.inf, 0.5),  # below the optimum, outside the cones
        Progress(2, 0.2, 0.9, 0.1, 0.0),
        Progress(3, 0.3, 0.8, 0.7, 0.0),  # a bound of other patterns
        Progress(4, 0.4, 0.6, 0.5, 0.0),
    )
    zero = np.zeros((1, 1, 1))
    solution = Solution(zero, zero, 0.6, 0.5, history=history)
    display = ConvergenceDisplay.from_solution(solution)
    np.testing.assert_array_equal(display.objective, [np.nan, 0.9, 0.8, 0.6])
    np.testing.assert_array_equal(display.lower_bound, [np.nan, 0.1, 0.5, 0.5])


def test_convergence_of_an_estimator(model):
    display = ConvergenceDisplay.from_estimator(model)
    assert display.objective[-1] == model.objective_
    assert display.lower_bound[-1] == model.lower_bound_


def test_convergence_refuses(program):
    with pytest.raises(ValueError, match="must be a fitted one of convexrobust"):
        ConvergenceDisplay.from_estimator(ConvexRobustClassifier())
    zero = np.zeros((1, 1, 1))
    with pytest.raises(ValueError, match="and clarabel recorded none"):
        ConvergenceDisplay.from_solution(Solution(zero, zero, 1.0, solver="clarabel"))
    with pytest.raises(ValueError, match="one entry a sample"):
        ConvergenceDisplay([1.0], [0.5, 0.6], seconds=[1.0], n_iter=[1])
    display = ConvergenceDisplay([1.0], [0.5], seconds=[1.0], n_iter=[1])
    with pytest.raises(ValueError, match="kind must be one of"):
        display.plot(kind="both")
    with pytest.raises(ValueError, match="against must be one of"):
        display.plot(against="epochs")


# ------------------------------------------------------------------- adversarial examples


def test_images_are_the_points_and_inside_the_ball():
    network, points, _ = three_classes(6)
    labels, ball = network.predict(points).argmax(axis=1), LpBall(np.inf, 0.3)
    labels[:5] = (labels[:5] + 1) % 3
    display = AdversarialExamplesDisplay.from_estimator(
        network, points, labels, shape=(2, 3), ball=ball, n_examples=30
    )
    assert display.images_.shape == (3, 30)
    clean, adversarial, difference = (
        np.array([image.get_array() for image in row]).reshape(30, 6) for row in display.images_
    )
    np.testing.assert_array_equal(clean, display.X)
    np.testing.assert_array_equal(adversarial, display.X_adv)
    np.testing.assert_allclose(difference, adversarial - clean)
    assert np.all(ball.length(difference) <= 1.0 + 1e-9)
    np.testing.assert_array_equal(display.y_pred, network.predict(clean).argmax(axis=1))
    np.testing.assert_array_equal(display.y_pred_adv, network.predict(adversarial).argmax(axis=1))


def test_examples_begin_with_those_that_the_attack_breaks():
    network, points, _ = three_classes(6)
    labels = network.predict(points).argmax(axis=1)
    labels[:5] = (labels[:5] + 1) % 3
    ball = LpBall(2, 0.2)
    display = AdversarialExamplesDisplay.from_estimator(
        network, points, labels, shape=(2, 3), ball=ball, n_examples=30
    )
    right, broken = display.y_pred == display.y_true, display.y_pred_adv != display.y_true
    rank = np.where(right, ~broken, 2)
    assert np.all(np.diff(rank) >= 0)
    assert set(rank) == {0, 1, 2}
    bold = np.array([[text.get_fontweight() == "bold" for text in row] for row in display.labels_])
    np.testing.assert_array_equal(bold, [~right, broken])


def test_examples_by_another_attack(model):
    display = AdversarialExamplesDisplay.from_estimator(
        model, X, Y, shape=(1, 2), attack=partial(attacks.apgd, n_steps=5), n_examples=3
    )
    assert display.X.shape == (3, 2)
    labels = 2 * display.y_true - 1
    bounds = certificates.margin_bounds(model.network_, display.X, labels, model._ball())
    margins = labels * model.decision_function(display.X_adv)
    assert np.all(bounds <= margins + 1e-9)


def test_colour_images_and_axes_reuse():
    rng = np.random.default_rng(0)
    clean = rng.uniform(0.0, 255.0, (2, 12))
    _, ax = plt.subplots()
    display = AdversarialExamplesDisplay.from_predictions(
        clean, clean + 3.0, ["a", "b"], ["a", "c"], shape=(2, 2, 3), limits=(0.0, 255.0), ax=ax
    )
    assert display.ax_ is ax
    np.testing.assert_allclose(
        display.images_[0, 1].get_array(), clean[1].reshape(2, 2, 3) / 255.0, atol=1e-12
    )
    np.testing.assert_allclose(display.images_[2, 0].get_array(), 3.0)
    assert "difference\n(up to 3)" in [text.get_text() for text in ax.get_yticklabels()]


def test_examples_refuse(model):
    with pytest.raises(ValueError, match="shape must be"):
        AdversarialExamplesDisplay.from_estimator(model, X, Y, shape=(2, 2))
    with pytest.raises(ValueError, match="X_adv must have the shape of X"):
        AdversarialExamplesDisplay(X, X[:3], Y, Y, shape=(1, 2))
    with pytest.raises(ValueError, match="one entry a sample"):
        AdversarialExamplesDisplay(X, X, Y, Y[:3], shape=(1, 2))
