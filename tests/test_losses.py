import numpy as np
import pytest

from convexrobust.backends import numpy as xp
from convexrobust.losses import EpsilonInsensitive
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


def test_epsilon_insensitive_refuses_a_negative_tube():
    with pytest.raises(ValueError, match="tube"):
        EpsilonInsensitive(-0.1)
