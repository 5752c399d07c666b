"""Adam against its formula, written out step by step."""

import numpy as np
import pytest

from convexrobust.adam import Adam


@pytest.mark.parametrize("decays", [(0.9, 0.999), (0.5, 0.9)])
def test_the_formula(decays):
    rng = np.random.default_rng(0)
    w, floor = rng.normal(size=(3, 2)), 1e-3
    gradients = rng.normal(size=(5, 3, 2))
    rates = rng.uniform(0.1, 1.0, size=(5, 3, 2))
    adam, moved, expected = Adam([w], decays, floor), w, w.copy()
    for k in range(5):
        (moved,) = adam.step([moved], [gradients[k]], rates[k])
        # The moments as weighted means of all gradients so far, newest first.
        ages = np.arange(k + 1)[:, None, None]
        past = gradients[k::-1]
        mean = (decays[0] ** ages * past).sum(0) / (decays[0] ** ages).sum()
        square = (decays[1] ** ages * past**2).sum(0) / (decays[1] ** ages).sum()
        expected -= rates[k] * mean / (np.sqrt(square) + floor)
    np.testing.assert_allclose(moved, expected, rtol=1e-12)


def test_no_gradient_no_step_and_the_first_step_has_the_length_of_the_rate():
    weights = [np.zeros(2), np.zeros(1)]
    gradients = [np.array([0.0, -3.0]), np.array([1e-3])]
    first, second = Adam(weights).step(weights, gradients, 0.5)
    np.testing.assert_allclose(first, [0.0, 0.5])
    np.testing.assert_allclose(second, [-0.5], rtol=1e-6)
    np.testing.assert_allclose(Adam(weights).step(weights, gradients, -0.5)[0], [0.0, -0.5])
