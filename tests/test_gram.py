"""Gram matrices as operators, with many and with few rows."""

import numpy as np
import pytest
import torch

from convexrobust import ConvexProgram, GroupLasso, Hinge, LpBall, sample_patterns
from convexrobust.solvers import ADMM, InteriorPoint
from convexrobust.solvers.admm.gram import Gram


def data(n, d, rank):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d)))


@pytest.mark.parametrize("arrays", ["tensors", "numpy"])
@pytest.mark.parametrize(("n", "d", "rank"), [(30, 5, 5), (5, 30, 5), (5, 30, 3), (30, 5, 2)])
def test_products_and_inverses_are_those_of_the_matrix(n, d, rank, arrays):
    X = data(n, d, rank)
    A, shift = (
        torch.ones(2, d, 4, dtype=X.dtype).cumsum(dim=2),
        torch.tensor([[0.1, 1.0, 2.0, 9.0]]),
    )
    gram, dense = Gram.of(X), X.T @ X
    assert gram.few_rows == (n < d)
    if arrays == "numpy":
        gram, A, shift, dense = gram.numpy(), A.numpy(), shift.double().numpy(), dense.numpy()
    np.testing.assert_allclose(gram.product(A), dense @ A, atol=1e-9)
    for shifts in (0.3, shift):
        found = gram.solve(gram.inverse(0.5, shifts), A)
        np.testing.assert_allclose(0.5 * (dense @ found) + shifts * found, A, atol=1e-6)


@pytest.mark.parametrize("n", [1, 4, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_shift_for_each_column_of_each_matrix(n, dtype):
    X = data(n, 20, min(n, 20)).to(dtype)
    X[:, 3] = 0.0  # a feature that says nothing
    A = torch.linspace(-1.0, 1.0, 2 * 20 * 3, dtype=dtype).reshape(2, 20, 3)
    shift = torch.tensor([[[0.1, 0.1, 0.1]], [[0.2, 1.0, 5.0]]], dtype=dtype)
    gram = Gram.of(X)
    found = gram.solve(gram.inverse(2.0, shift), A)
    assert found.dtype == dtype
    error = 2.0 * (X.T @ (X @ found)) + shift * found - A
    assert float(error.abs().max()) < (1e-10 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("shape", [(3, 20), (20, 3)])
def test_of_zeros(shape):
    gram, A = Gram.of(torch.zeros(shape)), torch.ones(shape[1], 2)
    assert torch.equal(gram.solve(gram.inverse(3.0, 0.5), A), 2.0 * A)
    assert torch.equal(gram.product(A), 0.0 * A)


@pytest.mark.parametrize("ball", [LpBall(2, 0.1), LpBall(np.inf, 0.1, (-1.0, 1.0))], ids=repr)
def test_programs_with_more_features_than_rows_are_solved(ball):
    rng = np.random.default_rng(0)
    X, y = rng.uniform(-1.0, 1.0, size=(12, 40)), np.array([-1, 1] * 6)
    D = sample_patterns(X, 8, random_state=0)
    program = ConvexProgram(X, y, D, Hinge(), GroupLasso(0.02), ball, "soft", intercept=False)
    found, exact = ADMM(1e-4, 5000).solve(program), InteriorPoint(1e-6).solve(program)
    assert found.status == "optimal"
    assert found.objective == pytest.approx(exact.objective, rel=2e-4)
