import numpy as np
import pytest
import torch

from convexrobust.backends import numpy as xp
from convexrobust.backends import torch as torch_backend
from convexrobust.perturbations import DUAL_NORM, LpBall, Neighbourhoods, exponent_of
from convexrobust.projection import project_rows

EPSILONS = [0.3, np.array([0.1, 0.0, 0.5, 0.3])]
NORMS = [1, 2, np.inf]


def random_points(n=40, d=4, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def norm_of(ball, delta):
    epsilon = ball.epsilons(delta.shape[1])
    assert np.all(delta[:, epsilon == 0] == 0)
    used = epsilon > 0
    return np.linalg.norm(delta[:, used] / epsilon[used], ball.p, axis=1)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("epsilon", EPSILONS, ids=["scalar", "per-feature"])
class TestGeometry:
    def test_steepest_attains_the_support(self, p, epsilon):
        ball, G = LpBall(p, epsilon), random_points()
        delta = ball.steepest(xp, G)
        assert np.all(norm_of(ball, delta) <= 1 + 1e-12)
        np.testing.assert_allclose(np.sum(delta * G, axis=1), ball.support(xp, G.T), rtol=1e-12)

    def test_support_is_the_weighted_dual_norm(self, p, epsilon):
        G = random_points()
        expected = np.linalg.norm(G * epsilon, DUAL_NORM[p], axis=1)
        np.testing.assert_allclose(LpBall(p, epsilon).support(xp, G.T), expected)

    def test_projection_is_nearest(self, p, epsilon):
        # The variational inequality <a - P(a), z - P(a)> <= 0 for all z in the set: z = steepest
        # point of a - P(a) is the hardest one.
        ball, A = LpBall(p, epsilon), random_points()
        projected = ball.project(xp, A)
        assert np.all(norm_of(ball, projected) <= 1 + 1e-9)
        hardest = ball.steepest(xp, A - projected)
        inner = np.sum((A - projected) * (hardest - projected), axis=1)
        assert inner.max() <= 1e-7

    def test_projection_keeps_what_is_inside(self, p, epsilon):
        ball = LpBall(p, epsilon)
        inside = ball.sample(random_points(), np.random.default_rng(0))
        np.testing.assert_allclose(ball.project(xp, inside), inside, atol=1e-12)

    def test_sample_is_inside_and_not_all_at_the_centre(self, p, epsilon):
        ball = LpBall(p, epsilon)
        length = norm_of(ball, ball.sample(random_points(500), np.random.default_rng(0)))
        assert length.max() <= 1 + 1e-12
        assert length.max() > 0.9

    def test_torch_agrees(self, p, epsilon):
        ball, A = LpBall(p, epsilon), random_points()
        tensor = torch.as_tensor(A)
        for method in (ball.project, ball.steepest):
            np.testing.assert_allclose(
                method(torch_backend, tensor).numpy(), method(xp, A), atol=1e-12
            )
        np.testing.assert_allclose(
            ball.support(torch_backend, tensor.T).numpy(), ball.support(xp, A.T), atol=1e-12
        )

    def test_bounds_are_respected(self, p, epsilon):
        X = np.clip(random_points(), -1, 1)
        ball = LpBall(p, epsilon, bounds=(-1, 1))
        for delta in (
            ball.project(xp, 3 * random_points(seed=1), X),
            ball.sample(X, np.random.default_rng(0)),
        ):
            assert np.abs(X + delta).max() <= 1 + 1e-12
            assert norm_of(ball, delta).max() <= 1 + 1e-9


@pytest.mark.parametrize("p", NORMS)
def test_neighbourhood_supports_agree_with_sampling(p):
    X = np.hstack([np.clip(random_points(30, 3), -1, 1), np.ones((30, 1))])
    ball = LpBall(p, np.array([0.3, 0.1, 0.0]), bounds=(-1, 1))
    sets, Q = ball.around(X, intercept=True), random_points(30, 4, seed=2)
    support = sets.support(xp, Q)
    rng = np.random.default_rng(3)
    for _ in range(200):
        delta = np.hstack([ball.sample(X[:, :3], rng), np.zeros((30, 1))])
        value = np.sum((X + delta - sets.center) * Q, axis=1)
        assert np.all(value <= support + 1e-12)
    rows = np.array([3, 7, 20])
    pairs = sets.support_pairs(xp, Q.T, rows)
    assert pairs.shape == (3, 30)
    np.testing.assert_allclose(np.diag(pairs[:, rows]), support[rows])


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [1e-200, 1e-150, 1e-8, 1e8])
def test_projection_on_sets_of_any_size(p, reach):
    A = random_points() * np.logspace(-3, 3, 40)[:, None]
    projected = project_rows(xp, A, np.full((1, 4), reach), p)
    assert np.all(np.linalg.norm(projected, p, axis=1) <= reach * (1 + 1e-12))
    unit = project_rows(xp, A / max(reach, 1e-100), np.ones((1, 4)), p)
    rounding = np.finfo(float).eps * np.abs(A).max() / reach  # of the shrunk entries
    np.testing.assert_allclose(projected / reach, unit, atol=np.clip(rounding, 1e-6, 1.0))


def test_projection_on_a_small_cross_polytope_stops_where_rounding_does(monkeypatch):
    """The reach is near the rounding of A, so that the norm cannot come close to 1."""
    sums, row_sum = [], xp.row_sum
    monkeypatch.setattr(xp, "row_sum", lambda A: sums.append(0) or row_sum(A))
    project_rows(xp, random_points(), 1e-14 * np.array([[1.0, 0.5, 2.0, 0.3]]), 1)
    assert len(sums) < 40


BACKENDS = pytest.mark.parametrize("tensor", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])


def backend_of(A):
    return torch_backend if torch.is_tensor(A) else xp


@BACKENDS
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("d", [5, 100])  # sorted, and by Newton's method
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("size", [1e-290, 1e-160, 1e-20, 1.0, 1e20, 1e160])
def test_projection_meets_its_optimality_conditions(tensor, p, d, equal, size):
    """It is the nearest point: no point of the set is further along what is left over."""
    rng = np.random.default_rng(0)
    axes = np.ones((1, d)) if equal else rng.uniform(0.1, 1.0, (1, d))
    axes[0, -1] = 0.0  # as the intercept
    scale = size * rng.uniform(0.5, 2.0, (30, 1))
    A = min(size, 1.0) * rng.normal(size=(30, d)) * np.logspace(-2, 2, 30)[:, None]
    A, reach, factor = tensor(A), tensor(axes), tensor(scale)
    Z = np.asarray(project_rows(backend_of(A), A, reach, p, factor)) / scale
    A = np.asarray(A) / scale
    assert np.all(Z[:, -1] == 0.0)
    assert np.all(LpBall(p, axes[0]).length(Z) <= 1.0 + 1e-14)
    if p == 2 and equal and size < 1e-150:  # radii that cannot be squared
        np.testing.assert_array_equal(Z, 0.0)
        return
    left = A[:, :-1] - Z[:, :-1]
    furthest = np.linalg.norm(axes[:, :-1] * left, DUAL_NORM[p], axis=1)
    inner = np.sum(left * Z[:, :-1], axis=1)
    assert np.all(furthest - inner <= 1e-12 * np.linalg.norm(A, axis=1))


@BACKENDS
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("d", [4, 80])
def test_ways_to_give_radii_agree(tensor, p, d):
    A, rng = tensor(random_points(20, d)), np.random.default_rng(1)
    backend, scale = backend_of(A), rng.uniform(0.1, 2.0, (20, 1))
    scale[3], A[4] = 0.0, 0.0
    axes = np.linspace(0.2, 1.0, d)[None]
    factored = project_rows(backend, A, tensor(axes), p, tensor(scale))
    full = project_rows(backend, A, tensor(scale * axes), p)
    np.testing.assert_allclose(factored, full, atol=1e-14)
    column = project_rows(backend, A, tensor(scale), p)
    full = project_rows(backend, A, tensor(scale * np.ones((1, d))), p)
    np.testing.assert_allclose(column, full, atol=1e-14)
    for projected in (factored, column):
        assert not np.asarray(projected)[3:5].any()


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 70)])
def test_projection_in_low_precision_is_feasible(p, dtype, shape):
    reach = torch.linspace(1.0, 2.0, shape[1])[None].to(dtype)
    A = torch.as_tensor(random_points(50, 70)).to(dtype)
    projected = project_rows(torch_backend, A, reach, p)
    assert projected.dtype == dtype
    length = torch.linalg.vector_norm(projected.double() / reach.double(), ord=p, dim=1)
    assert float(length.max()) <= 1.0 + 4.0 * torch.finfo(dtype).eps
    assert float(length.min()) >= 1.0 - 10.0 * torch.finfo(dtype).eps


def test_what_is_left_of_sums_of_shapes_is_refused_but_for_boxes():
    sets = Neighbourhoods(random_points(3, 2), np.arange(1.0, 7.0).reshape(3, 2), 0.1, "l2")
    assert sets.p == 2
    assert not sets.one_shape
    with pytest.raises(ValueError, match="sets of many shapes add up for norm inf only"):
        sets.remainder(np.ones((2, 1)), np.ones((3, 1)))


def test_properties_of_sets():
    X = random_points(3, 2)
    ball = LpBall(np.inf, np.array([0.1, 0.2]), (-9, 9))
    assert not ball.unperturbed
    assert LpBall(2, np.zeros(2)).unperturbed
    boxes, nominal = ball.around(X), ball.scaled_to(0.0).around(X)
    assert not boxes.one_shape
    assert not boxes.unperturbed
    assert nominal.one_shape
    assert nominal.unperturbed
    np.testing.assert_allclose(boxes.reach, [[0.1, 0.2]] * 3)
    np.testing.assert_array_equal(boxes.rows([2, 0]).reach, boxes.reach[[2, 0]])


@pytest.mark.parametrize(
    ("given", "p"),
    [
        (1, 1),
        (2.0, 2),
        (np.float32(np.inf), np.inf),
        (np.int64(2), 2),
        ("l1", 1),
        ("1", 1),
        ("l2", 2),
        (" L2 ", 2),
        ("inf", np.inf),
        ("linf", np.inf),
    ],
)
def test_a_norm_is_a_number_or_its_name(given, p):
    for norm in (exponent_of(given), LpBall(given, 0.1).p):
        assert norm == p
        assert isinstance(norm, type(p))


@pytest.mark.parametrize("given", [3, 0, -1, np.nan, "l3", "", [1], None, True, np.ones(2), {}])
def test_any_other_norm_is_refused_with_the_legal_ones(given):
    message = r'norm must be 1, 2 or numpy.inf, or a name: "l1", "l2", "linf".*got '
    with pytest.raises(ValueError, match=message):
        LpBall(given, 0.1)
    with pytest.raises(ValueError, match=message):
        Neighbourhoods(np.zeros((1, 2)), np.ones((1, 2)), 0.1, given)


def test_box_support_is_exact():
    X = np.array([[0.9, -0.9], [0.0, 0.0]])
    sets = LpBall(np.inf, 0.2, bounds=(-1, 1)).around(X)
    Q = np.array([[1.0, 1.0], [1.0, 1.0]])
    reach = np.sum(sets.center * Q, axis=1) + sets.support(xp, Q)
    np.testing.assert_allclose(reach, [1.0 - 0.7, 0.4])


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("bounds", [None, (-3, 3)])
def test_distance_is_below_every_choice_of_perturbations(p, bounds):
    X = np.clip(random_points(6, 3), -3, 3)
    sets = LpBall(p, np.array([0.4, 0.1, 0.7]), bounds).around(X)
    rng = np.random.default_rng(0)
    G, B, rows = rng.normal(size=(3, 5)), rng.exponential(size=(6, 5)), np.arange(6)
    distance = sets.distance(G, B, rows)
    reach = sets.radius * sets.weights * np.ones((6, 1))
    for _ in range(300):
        rho = project_rows(xp, 3 * rng.normal(size=(6, 3)) * reach, reach, p)
        assert np.all(distance <= np.linalg.norm(G + rho.T @ B, axis=0) + 1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 0.1), "norm must be"),
        ((2, -0.1), "epsilon must be"),
        ((2, np.nan), "epsilon must be"),
        ((2, np.ones((2, 2))), "epsilon must be"),
        ((2, 0.1, (1, 0)), "bounds must be"),
        ((2, 0.1, 3), "bounds must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LpBall(*arguments)


def test_lengths_and_bounds_are_checked_against_the_data():
    X = random_points(5, 3)
    with pytest.raises(ValueError, match="epsilon has 2 entries but the data has 3"):
        LpBall(2, np.ones(2)).around(X)
    with pytest.raises(ValueError, match="bounds have 2 entries"):
        LpBall(2, 1.0, (np.zeros(2), 1)).around(X)
    with pytest.raises(ValueError, match="bounds exclude the data"):
        LpBall(2, 1.0, (0, 1)).around(X)


def test_scaled_to_keeps_the_shape():
    ball = LpBall(2, np.array([0.1, 0.2])).scaled_to(1.0)
    np.testing.assert_allclose(ball.epsilon, [0.5, 1.0])
    assert LpBall(2, 0.3).scaled_to(1.0).epsilon == 1.0
