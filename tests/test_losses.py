import numpy as np
import pytest

from convexrobust.backends import numpy as xp
from convexrobust.losses import EpsilonInsensitive, Hinge, Huber, Pinball
from tests.cases import LOSSES, MARGIN_LOSSES, name


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_worst_case_is_the_maximum_over_the_interval(loss):
    rng = np.random.default_rng(0)
    lo = rng.normal(size=200)
    hi = lo + rng.exponential(size=200)
    y = rng.choice([-1.0, 1.0], 200) if loss.task == "classification" else rng.normal(size=200)
    inside = [loss.worst_case(xp, z, z, y) for z in np.linspace(lo, hi, 101)]
    np.testing.assert_allclose(loss.worst_case(xp, lo, hi, y), np.max(inside, axis=0), atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_loss_is_convex_and_non_increasing_in_the_margins(loss):
    rng = np.random.default_rng(1)
    n_margins = 2 if loss.task == "regression" else 3
    a, b = rng.normal(size=(2, 500, n_margins)) * 2
    middle = loss.value(xp, (a + b) / 2)
    assert np.all(middle <= (loss.value(xp, a) + loss.value(xp, b)) / 2 + 1e-12)
    assert np.all(loss.value(xp, a + rng.exponential(size=a.shape)) <= loss.value(xp, a) + 1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_conjugate_is_the_supremum_of_the_fenchel_inequality(loss):
    # Fenchel-Young holds at every pair, and with equality at the best margins of a fine grid.
    grid = np.linspace(-6.0, 6.0, 241)
    margins = np.column_stack([m.ravel() for m in np.meshgrid(grid, grid)])
    value = loss.value(xp, margins)
    for a in ([0.3, 0.1], [0.0, 0.6], [0.5, 0.5], [0.2, 0.0]):
        a = np.array(a) * min(1.0, loss.largest_multiplier)
        conjugate = loss.conjugate(a[None])[0]
        supremum = np.max(-margins @ a - value)
        assert supremum <= conjugate + 1e-12
        # For a = 0 entries the supremum may lie at infinity; the grid then comes close.
        assert supremum >= conjugate - 5e-2


@pytest.mark.parametrize(
    "loss", [loss for loss in LOSSES if np.isfinite(loss.smoothness)], ids=name
)
def test_smoothness_bounds_the_second_differences(loss):
    z, h = np.linspace(-3, 3, 601), 1e-3
    y = np.ones_like(z)

    def value(z):
        return loss.worst_case(xp, z, z, y)

    curvature = (value(z + h) - 2 * value(z) + value(z - h)) / h**2
    assert curvature.max() <= loss.smoothness * (1 + 1e-6) + 1e-6
    assert curvature.max() >= loss.smoothness * 0.99


@pytest.mark.parametrize("loss", MARGIN_LOSSES, ids=name)
def test_a_single_margin_is_the_binary_loss(loss):
    z = np.linspace(-2, 2, 9)
    np.testing.assert_allclose(loss.value(xp, z[:, None]), loss.worst_case(xp, z, z, np.ones(9)))


@pytest.mark.parametrize("tube", [-0.1, np.nan, np.inf, "0.1", None])
def test_epsilon_insensitive_refuses_what_is_no_tube(tube):
    with pytest.raises(ValueError, match="tube must be a finite number >= 0"):
        EpsilonInsensitive(tube)


@pytest.mark.parametrize("quantile", [0.1, 0.8])
def test_the_worst_residual_of_an_interval_is_weighed_by_its_side(quantile):
    """By the formula of the loss itself: low predictions cost the quantile, high ones the rest."""
    rng = np.random.default_rng(0)
    lo, width, y = rng.normal(size=40), rng.uniform(size=40), rng.normal(size=40)
    ends = np.stack([lo, lo + width])
    expected = np.maximum(quantile * (y - ends), (quantile - 1.0) * (y - ends)).max(axis=0)
    found = Pinball(quantile).worst_case(xp, lo, lo + width, y)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_worst_margin_of_an_interval_has_the_scale_of_the_loss():
    class Doubled(Hinge):
        margin_scales = 2.0

    y, lo, hi = np.array([1.0, -1.0, 1.0]), np.array([0.2, -0.9, 0.6]), np.array([0.7, -0.1, 0.8])
    found = Doubled().worst_case(xp, lo, hi, y)
    np.testing.assert_allclose(found, np.maximum(1.0 - 2.0 * np.where(y > 0, lo, -hi), 0.0))


@pytest.mark.parametrize("delta", [0.05, 0.5, 5.0])
def test_hubers_location_is_the_root_of_the_pull(delta):
    rng = np.random.default_rng(0)
    y, weight = np.append(rng.normal(size=30), 40.0), rng.uniform(size=31)
    at = Huber(delta).location(y, weight)
    pull = weight @ np.clip(y - at, -delta, delta)
    assert abs(pull) <= 1e-12 * delta * weight.sum()
